"""The official grade of many submissions: `course grade`.

Everything of one run stands in its output folder:

    seed                      the secret seed, readable for its owner alone
    results/…/….json          one file a submission: see `course_lib.grading.result`

A file is written whole or not at all, the moment its submission is graded. So a run that was killed
goes on where it stopped, and nothing is graded twice: a file counts for as long as submission,
chapter, grader, seed and device are the same. Identical submissions are graded once.

What judges is an engine: it takes tasks and gives outcomes. `course_lib.grading.pool` is the local
one.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import course_lib
from course_lib._version import __version__
from course_lib.grading.exercise import Chapter, chapters
from course_lib.grading.pool import Outcome, Task
from course_lib.grading.result import (
    ExerciseResult,
    Graded,
    Result,
    ResultError,
    canonical,
    dumps,
    loads,
)
from course_lib.grading.seed import seed_id
from course_lib.grading.sources import Source
from course_lib.grading.submission import Submission

STRONG = ("bwrap", "none")
"""Sandbox levels of an official grade; "none" is that of a submission of which no code ran."""

NO_CHAPTER = (
    "It does not say of which chapter it is: neither a `setup(…)` in it nor its file's name does. "
    "The instructor can say it with --chapter."
)

Engine = Callable[[Iterator[Task]], Iterator[Outcome]]
"""Judges tasks, in any order, and gives one outcome for each."""


class GradeError(RuntimeError):
    """The run cannot go on. The message says why."""


@dataclass(frozen=True)
class Settings:
    """What one run is asked to do.

    Attributes:
        out: The output folder.
        seed: The secret seed.
        device: "cpu" or "cuda".
        chapter: The chapter of all submissions, or None where each says its own.
        allow_weak: Whether results from a weak sandbox count.
        again: Whether to grade what has a result already.
        engine: The engine's name, for the envelope.
    """

    out: Path
    seed: bytes = field(repr=False)
    device: str = "cpu"
    chapter: Chapter | None = None
    allow_weak: bool = False
    again: bool = False
    engine: str = "local"


@dataclass(frozen=True)
class Line:
    """What became of one source.

    Attributes:
        source: What was handed in.
        graded: Its result in its envelope; None where the grader failed.
        file: Where the result stands.
        failure: Why there is no result, or "".
        reused: Whether it stood there already.
        same_as: The name of the submission that it is a copy of, byte for byte, or "".
    """

    source: Source
    graded: Graded | None
    file: Path | None = None
    failure: str = ""
    reused: bool = False
    same_as: str = ""


Tell = Callable[[Line, int], None]
"""Is told each line, and how many there are by then."""


def grade(
    sources: Sequence[Source],
    settings: Settings,
    engine: Engine,
    tell: Tell = lambda line, count: None,
) -> list[Line]:
    """Grade submissions, and write each result as soon as it is there.

    Args:
        sources: What was handed in; their names differ.
        settings: What is asked for.
        engine: What judges.
        tell: For a progress line.

    Returns:
        One line a source, in their order.

    Raises:
        GradeError: If a result cannot be written.
    """
    run = _Run(sources, settings, tell)
    for outcome in engine(run.tasks()):
        run.finish(outcome)
    return [run.finished[source.name] for source in sources]


@dataclass(frozen=True)
class _Item:
    """A source that was read: its submission, and the chapter that it is graded as."""

    source: Source
    submission: Submission
    chapter: Chapter | None

    @property
    def key(self) -> tuple[str, str]:
        """The same for what is graded once."""
        return self.submission.sha256, self.chapter.package if self.chapter else ""

    def without_code(self) -> _Item:
        """For keeping: a class's code need not be in memory all at once."""
        return replace(self, submission=replace(self.submission, cells=()))


class _Run:
    """One run under way."""

    def __init__(self, sources: Sequence[Source], settings: Settings, tell: Tell) -> None:
        self.sources, self.settings, self.tell = sources, settings, tell
        self.seed_id = seed_id(settings.seed)
        self.finished: dict[str, Line] = {}
        # Of the submissions with one key, the first is judged; the others wait for it.
        self.waiting: dict[tuple[str, str], list[_Item]] = {}
        self.outcomes: dict[tuple[str, str], Outcome] = {}

    def tasks(self) -> Iterator[Task]:
        """What has to be judged, read when it is asked for. All else is finished on the way."""
        known = chapters()
        for source in self.sources:
            submission = source.read()
            chapter = self.settings.chapter or submission.chapter(known)
            item = _Item(source, submission, chapter)
            if submission.status == "unreadable" or chapter is None:
                self._unjudged(item)
            elif (graded := self._standing(item)) is not None:
                self._done(Line(source, graded, self._file(item), reused=True))
            elif item.key in self.outcomes:
                self._judged(item, self.outcomes[item.key])
            elif item.key in self.waiting:
                self.waiting[item.key].append(item.without_code())
            else:
                self.waiting[item.key] = [item.without_code()]
                yield Task(submission, chapter.package)

    def finish(self, outcome: Outcome) -> None:
        """Write the result of a task, for all who handed in the same bytes."""
        key = outcome.task.submission.sha256, outcome.task.chapter
        items = self.waiting.pop(key)
        short = replace(outcome.task, submission=items[0].submission)
        self.outcomes[key] = outcome = _checked(replace(outcome, task=short), items[0])
        for item in items:
            self._judged(item, outcome)

    def _done(self, line: Line) -> None:
        self.finished[line.source.name] = line
        self.tell(line, len(self.finished))

    def _standing(self, item: _Item) -> Graded | None:
        """The result that stands there already, if it still counts."""
        if self.settings.again:
            return None
        file = self._file(item)
        try:
            graded = loads(file.read_bytes())
        except (OSError, ResultError):
            # Not there, or damaged: to grade it again loses nothing.
            return None
        if graded.sandbox not in STRONG and not self.settings.allow_weak:
            return None
        if graded.result.origin != self._result(item, ()).origin:
            return None
        if graded.student != item.source.student:
            graded = replace(graded, student=item.source.student)
            self._write(file, graded)
        return graded

    def _unjudged(self, item: _Item) -> None:
        """A submission of which no code is run: every exercise is missing, and says why."""
        exercises: tuple[ExerciseResult, ...] = ()
        if item.chapter is not None:
            exercises = tuple(
                ExerciseResult(
                    each.id, 0, each.points, "missing", "defined", item.submission.reason
                )
                for each in item.chapter.exercises
            )
        result = self._result(item, exercises)
        self._put(item, result, sandbox="none", start="none", seconds=0.0)

    def _judged(self, item: _Item, outcome: Outcome) -> None:
        if outcome.failure:
            self._done(Line(item.source, None, failure=outcome.failure))
            return
        first = outcome.task.submission.name
        result = self._result(item, outcome.exercises, outcome.notes)
        if item.source.name == first:
            how = {"start": outcome.start, "seconds": outcome.seconds, "spent": outcome.spent}
            self._put(item, result, sandbox=outcome.sandbox, **how)
        else:
            how = {"start": "copied", "seconds": 0.0}
            self._put(item, result, same_as=first, sandbox=outcome.sandbox, **how)

    def _put(self, item: _Item, result: Result, same_as: str = "", **how) -> None:
        """Write a result in its envelope."""
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        graded = Graded(
            item.source.name,
            item.source.student,
            result,
            engine=self.settings.engine,
            finished_at=now,
            **how,
        )
        file = self._file(item)
        self._write(file, graded)
        self._done(Line(item.source, graded, file, same_as=same_as))

    def _result(
        self, item: _Item, exercises: tuple[ExerciseResult, ...], notes: tuple[str, ...] = ()
    ) -> Result:
        """The result. Nothing enters it but bytes, chapter, grader, seed and device."""
        status, reason = "graded", item.submission.reason
        if item.submission.status == "unreadable":
            status = "unreadable"
        elif item.chapter is None:
            status, reason = "no_chapter", NO_CHAPTER
        return Result(
            item.submission.sha256,
            item.chapter.package if item.chapter else "",
            status,
            exercises,
            grader_version(),
            self.seed_id,
            self.settings.device,
            reason,
            (*item.submission.notes, *notes),
        )

    def _file(self, item: _Item) -> Path:
        """Where its result stands. The name is for people; what tells it apart is at its end."""
        parts = (grader_version(), self.seed_id, self.settings.device)
        mark = hashlib.sha256(canonical([item.source.name, *item.key, *parts])).hexdigest()[:16]
        name = PurePosixPath(item.source.name)
        folders = [_file_name(part) for part in name.parts[:-1]][-3:]
        file = f"{_file_name(name.stem)}-{mark}.json"
        return self.settings.out.joinpath("results", *folders, file)

    def _write(self, file: Path, graded: Graded) -> None:
        try:
            write_whole(file, dumps(graded))
        except OSError as error:
            raise GradeError(f"{file} cannot be written: {error.strerror}.") from None


def _checked(outcome: Outcome, item: _Item) -> Outcome:
    """A failure in place of an outcome that does not answer for every exercise."""
    assert item.chapter is not None
    if outcome.failure:
        return outcome
    want = [(each.id, float(each.points)) for each in item.chapter.exercises]
    got = [(each.id, each.max_score) for each in outcome.exercises]
    if got == want:
        return outcome
    return replace(outcome, failure=f"The judge answered for {got}; expected {want}.")


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whenever the machine stops."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.getpid()}-{file.name[-24:]}")
    with draft.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    os.replace(draft, file)


@functools.cache
def grader_version() -> str:
    """The release, and a hash of what decides a grade.

    That is: the sources of the grader, of the runtime and of every exercise; Python, torch, Triton
    and numpy.
    """
    root = Path(course_lib.__path__[0])
    digest = hashlib.sha256()
    for pattern in ("grading/**/*.py", "runtime/**/*.py", "*/exercises/*.py"):
        for path in sorted(root.glob(pattern)):
            text = path.read_bytes()
            digest.update(f"{path.relative_to(root).as_posix()} {len(text)}\n".encode() + text)
    for package in ("torch", "triton", "numpy"):
        digest.update(f"{package} {_installed(package)}\n".encode())
    digest.update(f"python {sys.version_info[:2]}\n".encode())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _file_name(text: str) -> str:
    """A text as a part of a path: letters, digits, dots and dashes, and no way out of a folder."""
    return re.sub(r"[^\w.-]+", "_", text)[:40].strip("._") or "_"
