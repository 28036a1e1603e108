"""Stands for the judge: it runs nothing, and does what the submission's text tells it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

from course_lib.grading.result import CaseResult, ExerciseResult
from course_lib.grading.submission import Submission

SPENT = {"overhead": 0.1, "learner": 0.2, "oracle": 0.3}


def points_of(package: str) -> dict[str, float]:
    """Points by exercise. Asked where a judge is made, so that no worker has to import torch."""
    from course_lib.grading.exercise import exercises_of

    return {each.id: each.points for each in exercises_of(package)}


def verdict(points_by_id: dict[str, float], *, passed: bool) -> tuple[ExerciseResult, ...]:
    """Every exercise of a chapter, passed or failed."""
    word, stage = ("passed", "done") if passed else ("failed", "values")
    return tuple(
        ExerciseResult(
            name,
            points if passed else 0,
            points,
            word,
            stage,
            "So it is.",
            (CaseResult("a case", "values", word),),
        )
        for name, points in points_by_id.items()
    )


@dataclass
class FakeJudge:
    """A judge whose submissions say what happens: "good", "die", "raise", "hang", "die once".

    Of an "odd" one it notes so, and of a "short" one it forgets the first exercise.

    Attributes:
        level: The sandbox's level.
        at_start: What happens when it is entered: "", "raise" or "die".
        traces: A folder where it notes what it was asked, one file a call.
        slow: Seconds that a verdict takes.
        start: "warm" or "cold".
        points: Points by exercise of the one chapter that it knows.
    """

    level: str = "bwrap"
    at_start: str = ""
    traces: Path | None = None
    slow: float = 0.0
    start: str = "warm"
    points: dict[str, float] = field(default_factory=lambda: points_of("start_here"))

    @property
    def sandbox_level(self) -> str:
        return self.level

    def __enter__(self) -> FakeJudge:
        self._note("entered")
        if self.at_start == "raise":
            raise OSError("no sandbox here; apt-get install bubblewrap")
        if self.at_start == "die":
            os._exit(7)
        return self

    def __exit__(self, *_: object) -> None:
        self._note("left")

    def grade(self, submission: Submission, chapter: str) -> SimpleNamespace:
        calls = self._note(submission.name.replace("/", "_"))
        text = "\n".join(submission.cells)
        if "die" in text and ("once" not in text or calls == 1):
            os._exit(9)
        if "raise" in text:
            raise ValueError("this one confuses me")
        if "hang" in text:
            time.sleep(600)
        time.sleep(self.slow)
        exercises = verdict(self.points, passed="good" in text)
        if "short" in text:
            exercises = exercises[1:]
        notes = ("Cell 1 is odd.",) if "odd" in text else ()
        return SimpleNamespace(exercises=exercises, seconds=dict(SPENT), notes=notes)

    def _note(self, what: str) -> int:
        """Note a call; how many there were of this kind."""
        if self.traces is None:
            return 1
        (self.traces / f"{what}.{os.getpid()}.{time.monotonic_ns()}").touch()
        return len(list(self.traces.glob(f"{what}.*")))
