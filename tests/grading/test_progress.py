"""The learner's record: nothing that was committed is lost, and nothing stops a notebook."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from course_lib.grading import progress

NAME = "flash_attention.online_softmax"


def test_a_new_learner_has_no_history() -> None:
    assert progress.standing(NAME) == progress.Standing()
    assert progress.standings() == {}
    assert progress.last_prediction("a.b") is None
    assert progress.recalls("a.b") == []
    assert progress.rungs_shown(NAME) == 0
    assert progress.chapters_begun() == {}


def test_a_stub_is_no_attempt() -> None:
    progress.record_attempt(NAME, "todo", "defined", None)
    assert progress.standing(NAME).status == "todo"
    assert progress.standing(NAME).attempts == 0


def test_failures_are_counted_since_the_last_pass() -> None:
    for status in ("failed", "passed", "failed", "failed"):
        progress.record_attempt(NAME, status, "values", None)
    standing = progress.standing(NAME)
    assert (standing.status, standing.attempts, standing.failures_in_a_row) == ("passed", 4, 2)
    assert progress.standings() == {NAME: standing}


def test_a_long_pause_counts_as_half_an_hour(monkeypatch: pytest.MonkeyPatch) -> None:
    for at in (0.0, 60.0, 7 * 86_400.0):
        monkeypatch.setattr(time, "time", lambda at=at: at)
        progress.record_attempt(NAME, "failed", "values", None)
    assert progress.standing(NAME).minutes == 1 + 30


def test_the_last_prediction_counts() -> None:
    progress.record_prediction("c.q", "a")
    progress.record_prediction("c.q", "b")
    assert progress.last_prediction("c.q") == "b"


def test_a_chapter_begins_with_whatever_came_first() -> None:
    progress.record_recall("b.q", True, at=50.0)
    progress.record_recall("b.q", True, at=10.0)
    progress.record_prediction("c.q", "a")
    begun = progress.chapters_begun()
    assert begun["b"] == 10.0
    assert set(begun) == {"b", "c"}


@pytest.mark.parametrize("garbage", [b"not a database at all" * 100, b"\x00" * 4096])
def test_a_damaged_store_is_set_aside_and_named(garbage: bytes) -> None:
    progress.store_path().parent.mkdir(parents=True, exist_ok=True)
    progress.store_path().write_bytes(garbage)
    with pytest.warns(UserWarning, match=r"progress\.sqlite3\.damaged-"):
        progress.record_attempt(NAME, "passed", "done", None)
    assert progress.standing(NAME).status == "passed"
    kept = list(progress.home().glob("progress.sqlite3.damaged-*"))
    assert [path.read_bytes() for path in kept] == [garbage]


def test_damage_in_the_middle_of_the_file_is_found_while_reading() -> None:
    progress.record_attempt(NAME, "failed", "values", None)
    store = sqlite3.connect(progress.store_path())
    row = (NAME, "failed", "values", "x" * 100, 0.0)
    sql = "INSERT INTO attempt (exercise, status, stage, misconception, at) VALUES (?,?,?,?,?)"
    store.executemany(sql, [row] * 500)
    store.commit()
    store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store.close()
    data = bytearray(progress.store_path().read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    progress.store_path().write_bytes(bytes(data))
    with pytest.warns(UserWarning, match="damaged"):
        assert progress.standings() == {}
    assert list(progress.home().glob("progress.sqlite3.damaged-*"))


def test_two_damaged_stores_in_one_second_are_both_kept() -> None:
    progress.home().mkdir(parents=True, exist_ok=True)
    for text in (b"one" * 500, b"two" * 500):
        progress.store_path().write_bytes(text)
        with pytest.warns(UserWarning, match="damaged"):
            progress.standings()
    kept = {path.read_bytes() for path in progress.home().glob("progress.sqlite3.damaged-*")}
    assert kept == {b"one" * 500, b"two" * 500}


def test_a_locked_store_costs_a_warning_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    progress.record_attempt(NAME, "passed", "done", None)
    monkeypatch.setattr(progress, "PATIENCE", 0.05)
    holder = sqlite3.connect(progress.store_path())
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.warns(UserWarning, match="could not be saved"):
            progress.record_attempt(NAME, "failed", "values", None)
    finally:
        holder.rollback()
        holder.close()
    assert progress.standing(NAME).attempts == 1
    assert not list(progress.home().glob("*damaged*"))


def test_a_store_that_cannot_be_opened_costs_a_warning() -> None:
    progress.store_path().mkdir(parents=True)
    with pytest.warns(UserWarning, match="could not be read"):
        assert progress.standing(NAME) == progress.Standing()
    with pytest.warns(UserWarning, match="could not be saved"):
        progress.record_attempt(NAME, "passed", "done", None)


def test_a_home_that_is_a_file_costs_a_warning(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("x") / "file"
    file.write_text("")
    monkeypatch.setenv("COURSE_HOME", str(file))
    with pytest.warns(UserWarning, match="could not be read"):
        assert progress.standings() == {}


WRITER = """
import itertools, sys
from course_lib.grading import progress
for i in itertools.count():
    progress.record_attempt("c.e", "failed", "values", str(i))
    print(i, flush=True)
"""


def test_a_killed_process_loses_nothing_that_was_committed() -> None:
    """Kill a writer at arbitrary moments; what it said it wrote is there, and the file is whole."""
    for wait in (0.0, 0.013, 0.037):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert writer.stdout is not None
        for _ in range(5):
            writer.stdout.readline()
        time.sleep(wait)
        writer.send_signal(signal.SIGKILL)
        said = 5 + len([line for line in writer.stdout.read().splitlines() if line])
        writer.communicate()
        store = sqlite3.connect(progress.store_path())
        assert store.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = store.execute("SELECT misconception FROM attempt ORDER BY id").fetchall()
        store.execute("DELETE FROM attempt")
        store.commit()
        store.close()
        assert [int(number) for (number,) in rows][:said] == list(range(said))
        assert len(rows) <= said + 1


def test_several_processes_write_at_once() -> None:
    code = (
        "from course_lib.grading import progress\n"
        "for i in range(20): progress.record_attempt('c.e', 'failed', 'values', None)"
    )
    writers = [subprocess.Popen([sys.executable, "-W", "error", "-c", code]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0, 0, 0, 0]
    assert progress.standing("c.e").attempts == 80
