"""What `check` returns: a status, and a card that helps."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

from course_lib.grading.exercise import Exercise, Misconception
from course_lib.notebook.cards import header, inline_markdown, pairs, section

SIGNS = {"passed": "✓", "failed": "✗", "todo": "○"}
WORDS = {"passed": "Passed", "failed": "Not yet", "todo": "To do"}


@dataclass
class Verdict:
    """The verdict on one answer.

    Attributes:
        exercise: The record.
        status: "todo", "failed" or "passed".
        stage: Where it ended: "defined", "values", "awkward", "gradients", "method", "compiles"
            or "done".
        message: One sentence.
        case: The name of the failing case.
        shown: Inputs, expected and actual values of that case, as text.
        cause: The misconception that does exactly what the answer did.
        tried: The cases that passed.
        failures: Failures in a row, this one included; decides how much of the cause is shown.
        staff: Whether the staff version was checked, which earns no points.
        error: What the answer raised.
    """

    exercise: Exercise
    status: str
    stage: str
    message: str
    case: str | None = None
    shown: list[tuple[str, str]] = field(default_factory=list)
    cause: Misconception | None = None
    tried: list[str] = field(default_factory=list)
    failures: int = 1
    staff: bool = False
    error: Exception | None = field(default=None, repr=False)

    @property
    def advice(self) -> list[tuple[str, str]]:
        """What the card says beyond the counterexample: (label, sentence), more with each failure.

        First failure: the counterexample alone. Second: a question about the guilty line. Third:
        the misconception by its name.
        """
        if self.status == "todo":
            return [("Next", "Write it, run its cell, then run this cell again.")]
        if self.status == "passed":
            return [("Next", _what_next(self.exercise, self.staff))]
        lines = []
        if self.cause is not None and self.failures >= 2:
            lines.append(("Ask yourself", self.cause.question))
        if self.cause is not None and self.failures >= 3:
            lines.append(("Probably", f"**{self.cause.name}.** {self.cause.says}"))
        hint = f'`hint("{self.exercise.name}")` has the next hint.'
        lines.append(("Next", f"Try this case by hand, then run again. {hint}"))
        return lines

    def __str__(self) -> str:
        """The card as plain text."""
        exercise = self.exercise
        head = f"{SIGNS[self.status]} {WORDS[self.status]}: {exercise.title}"
        lines = [head, f"  {self.message}"]
        if self.case:
            lines.append(f"  Case: {self.case}.")
        lines += [f"    {label} = {value}" for label, value in self.shown]
        lines += [f"  {label}: {text}" for label, text in self.advice]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        exercise = self.exercise
        earned = f"{exercise.points} points" if self.status == "passed" and not self.staff else ""
        case = f"<p class='course-case'>Case: {escape(self.case)}</p>" if self.case else ""
        values = [(label, escape(value)) for label, value in self.shown]
        advice = [(label, inline_markdown(text)) for label, text in self.advice]
        tried = ""
        if self.tried:
            items = "".join(f"<li>{escape(name)}</li>" for name in self.tried)
            noun = "case passes" if len(self.tried) == 1 else "cases pass"
            tried = (
                f"<details><summary>{len(self.tried)} {noun}</summary><ul>{items}</ul></details>"
            )
        return section(
            self.status,
            header(WORDS[self.status], exercise.title, earned, SIGNS[self.status]),
            f"<p>{inline_markdown(self.message)}</p>",
            case,
            pairs(values, "values"),
            pairs(advice, "advice"),
            tried,
        )


def _what_next(exercise: Exercise, staff: bool) -> str:
    if staff:
        return "This was the staff version: it earns no points, and what builds on it can go on."
    from course_lib.grading.exercise import exercises_of

    titles = {each.name: each.title for each in exercises_of(exercise.chapter)}
    opened = [titles[name] for name in exercise.unlocks if name in titles]
    return f"You now have what *{opened[0]}* needs." if opened else "On to the next one."
