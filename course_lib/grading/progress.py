"""What the learner has tried, predicted and recalled: one SQLite file under `COURSE_HOME`.

Each call opens the file, writes one transaction and closes it, so that a kernel may be killed at
any moment and two notebooks may be open at once. A store that cannot be read or written costs a
warning, never the learner's cell.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count, pairwise
from pathlib import Path
from typing import Any

SCHEMA = """
CREATE TABLE IF NOT EXISTS attempt (
    id INTEGER PRIMARY KEY, exercise TEXT NOT NULL, status TEXT NOT NULL, stage TEXT NOT NULL,
    misconception TEXT, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS hint (
    id INTEGER PRIMARY KEY, exercise TEXT NOT NULL, rung INTEGER NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS prediction (
    id INTEGER PRIMARY KEY, question TEXT NOT NULL, value TEXT NOT NULL, at REAL NOT NULL);
CREATE TABLE IF NOT EXISTS recall (
    id INTEGER PRIMARY KEY, question TEXT NOT NULL, correct INTEGER NOT NULL, at REAL NOT NULL);
CREATE INDEX IF NOT EXISTS attempt_by_exercise ON attempt (exercise, id);
"""

LONGEST_PAUSE = 1800.0
"""Seconds between two checks that count as work at most."""

PATIENCE = 5.0
"""Seconds to wait while another notebook writes."""


@dataclass(frozen=True)
class Standing:
    """Where a learner stands with one exercise.

    Attributes:
        status: "passed" once it has passed, else the status of the last attempt, else "new".
        attempts: How many checks ran on written code.
        failures_in_a_row: Failed checks since the last pass.
        minutes: From the first attempt to the first pass (or to the last attempt), 30 at most
            for a pause.
        last_at: When the last check ran (seconds since 1970), or None.
    """

    status: str = "new"
    attempts: int = 0
    failures_in_a_row: int = 0
    minutes: float = 0.0
    last_at: float | None = None


def home() -> Path:
    """Where the course keeps the learner's data: `COURSE_HOME`, or the user's data directory."""
    if os.environ.get("COURSE_HOME"):
        return Path(os.environ["COURSE_HOME"])
    import platformdirs

    return Path(platformdirs.user_data_dir("threshold-to-flashattention", appauthor=False))


def store_path() -> Path:
    """The SQLite file."""
    return home() / "progress.sqlite3"


@contextmanager
def _store() -> Iterator[sqlite3.Connection]:
    store_path().parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(store_path(), timeout=PATIENCE)) as connection:
        if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
            connection.execute("PRAGMA journal_mode=WAL")
        connection.executescript(SCHEMA)
        with connection:
            yield connection


def _write(sql: str, *values: object) -> None:
    _attempt("saved", lambda store: store.execute(sql, values), None)


def _read(sql: str, *values: object) -> list[tuple]:
    return _attempt("read", lambda store: store.execute(sql, values).fetchall(), [])


def _attempt(verb: str, action: Callable[[sqlite3.Connection], Any], otherwise: Any) -> Any:
    """Do something with the store; where that cannot be, warn and give `otherwise`."""
    try:
        try:
            return _patiently(action)
        except sqlite3.DatabaseError as error:
            if not _is_damage(error):
                raise
            _set_aside(error)
            return _patiently(action)
    except (sqlite3.Error, OSError) as error:
        advice = "Your code is not affected."
        warnings.warn(
            f"Progress could not be {verb} at {store_path()}: {error}. {advice}", stacklevel=4
        )
        return otherwise


def _patiently(action: Callable[[sqlite3.Connection], Any]) -> Any:
    """Do something with the store, again while another process is at it.

    SQLite's own timeout does not cover the moments in which one process turns the write-ahead log
    on, or removes it as the last one to leave.
    """
    until = time.monotonic() + PATIENCE
    while True:
        try:
            with _store() as store:
                return action(store)
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > until:
                raise
            time.sleep(0.01)


def _is_damage(error: sqlite3.Error) -> bool:
    """Whether the file itself is broken; a locked or unreadable one is not."""
    code = getattr(error, "sqlite_errorcode", None)
    return code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _is_whole() -> bool:
    """Whether the store can be read now. Another process may have set the broken one aside."""
    try:
        with closing(sqlite3.connect(store_path(), timeout=PATIENCE)) as connection:
            return connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.DatabaseError:
        return False


def _set_aside(error: sqlite3.Error) -> None:
    """Move a damaged store away under a name that says so; nothing of it is deleted."""
    if _is_whole():
        return
    name = f"{store_path().name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}"
    damaged = store_path().with_name(name)
    for number in count(2):
        if not damaged.exists():
            break
        damaged = store_path().with_name(f"{name}-{number}")
    for suffix in ("", "-wal", "-shm"):
        with suppress(FileNotFoundError):
            os.replace(f"{store_path()}{suffix}", f"{damaged}{suffix}")
    warnings.warn(
        f"The record of your progress is damaged ({error}). It was moved to {damaged}, and a new "
        "one was begun. Your code is not affected.",
        stacklevel=5,
    )


def record_attempt(exercise: str, status: str, stage: str, misconception: str | None) -> None:
    """Record one check."""
    _write(
        "INSERT INTO attempt (exercise, status, stage, misconception, at) VALUES (?, ?, ?, ?, ?)",
        exercise,
        status,
        stage,
        misconception,
        time.time(),
    )


def standing(exercise: str) -> Standing:
    """Where the learner stands with one exercise."""
    return _standing(
        _read("SELECT status, at FROM attempt WHERE exercise = ? ORDER BY id", exercise)
    )


def standings() -> dict[str, Standing]:
    """Where the learner stands with every exercise that was ever checked."""
    by_exercise: dict[str, list[tuple[str, float]]] = {}
    for exercise, status, at in _read("SELECT exercise, status, at FROM attempt ORDER BY id"):
        by_exercise.setdefault(exercise, []).append((status, at))
    return {exercise: _standing(rows) for exercise, rows in by_exercise.items()}


def _standing(rows: list[tuple[str, float]]) -> Standing:
    tried = [(status, at) for status, at in rows if status != "todo"]
    if not tried:
        return Standing("todo" if rows else "new", last_at=rows[-1][1] if rows else None)
    statuses = [status for status, _ in tried]
    failures = next((i for i, s in enumerate(reversed(statuses)) if s != "failed"), len(statuses))
    until = statuses.index("passed") + 1 if "passed" in statuses else len(tried)
    times = [rows[0][1]] + [at for _, at in tried[:until]]
    seconds = sum(min(b - a, LONGEST_PAUSE) for a, b in pairwise(times))
    status = "passed" if "passed" in statuses else statuses[-1]
    return Standing(status, len(tried), failures, seconds / 60, rows[-1][1])


def failures_of_one_cause(exercise: str) -> int:
    """How many of the last checks failed in a row with the cause of the very last; at least 1."""
    rows = _read(
        "SELECT status, misconception FROM attempt WHERE exercise = ? AND status != 'todo' "
        "ORDER BY id DESC LIMIT 20",
        exercise,
    )
    same = next((i for i, row in enumerate(rows) if row != rows[0]), len(rows))
    return max(same, 1)


def record_hint(exercise: str, rung: int) -> None:
    """Record that a rung of the help ladder was shown."""
    _write("INSERT INTO hint (exercise, rung, at) VALUES (?, ?, ?)", exercise, rung, time.time())


def rungs_shown(exercise: str) -> int:
    """How many rungs of the help ladder the learner has seen."""
    rows = _read("SELECT COALESCE(MAX(rung), 0) FROM hint WHERE exercise = ?", exercise)
    return rows[0][0] if rows else 0


def record_prediction(question: str, value: str) -> None:
    """Record what the learner predicted."""
    _write(
        "INSERT INTO prediction (question, value, at) VALUES (?, ?, ?)",
        question,
        value,
        time.time(),
    )


def last_prediction(question: str) -> str | None:
    """The learner's last prediction, or None."""
    sql = "SELECT value FROM prediction WHERE question = ? ORDER BY id DESC LIMIT 1"
    rows = _read(sql, question)
    return rows[0][0] if rows else None


def record_recall(question: str, correct: bool, at: float | None = None) -> None:
    """Record an answer to a recall question, given now or `at` (seconds since 1970)."""
    _write(
        "INSERT INTO recall (question, correct, at) VALUES (?, ?, ?)",
        question,
        int(correct),
        time.time() if at is None else at,
    )


def recalls(question: str) -> list[tuple[bool, float]]:
    """Answers to a recall question so far: correct or not, and when (seconds since 1970)."""
    rows = _read("SELECT correct, at FROM recall WHERE question = ? ORDER BY id", question)
    return [(bool(correct), at) for correct, at in rows]


def chapters_begun() -> dict[str, float]:
    """When the learner first tried, predicted or recalled something, by the chapter's package."""
    rows = _read(
        "SELECT exercise, at FROM attempt UNION ALL SELECT question, at FROM prediction "
        "UNION ALL SELECT question, at FROM recall"
    )
    begun: dict[str, float] = {}
    for name, at in sorted(rows, key=lambda row: row[1]):
        begun.setdefault(name.split(".")[0], at)
    return begun
