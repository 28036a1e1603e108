"""What `check` returns: a status, and a card that helps."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

from course_lib.grading.exercise import Exercise, Misconception
from course_lib.notebook.cards import header, inline_markdown, pairs, section

SIGNS = {"passed": "✓", "failed": "✗", "todo": "○"}
WORDS = {"passed": "Passed", "failed": "Not yet", "todo": "To do"}
NEXT_STEP = {
    "defined": "Give it a value of that kind, and run the cell again.",
    "values": "Work this case by hand, or a smaller one like it, beside your code.",
    "awkward": "What is special about this case? Follow it through your code.",
    "gradients": "Write the derivative of one line of the forward, and compare.",
    "method": "The result is right. Find the line that breaks this limit.",
    "compiles": "Change that line; the interpreter allows more than a GPU does.",
    "stopped": "Print the loop's variable.",
    "checker": "Please report this, with your code.",
}


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
        printed: The end of what the answer printed on that case.
        failures: Failures in a row with this same cause; decides how much of it is shown.
        staff: Whether the staff version was checked, which earns no points.
        note: What else there is to say; speed on the learner's GPU.
        rerun: Runs the answer on the failing case again, for `print` and the debugger.
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
    printed: str = ""
    failures: int = 1
    staff: bool = False
    note: str = ""
    rerun: Callable[[], object] | None = field(default=None, repr=False)
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
        if self.exercise.kind in ("answer", "choice"):
            lines.append(("Next", f"Work it out again from the start. {hint}"))
            return lines
        lines.append(("Next", f"{NEXT_STEP.get(self.stage, NEXT_STEP['values'])} {hint}"))
        return lines

    def __str__(self) -> str:
        """The card as plain text."""
        exercise = self.exercise
        head = f"{SIGNS[self.status]} {WORDS[self.status]}: {exercise.title}"
        lines = [head, f"  {self.message}"]
        if self.case:
            lines.append(f"  Case: {self.case}.")
        lines += [f"    {label}: {value}" for label, value in self.shown]
        if self.printed and self.status == "failed":
            lines += [
                "  Your code printed:",
                *(f"    {text}" for text in self.printed.splitlines()),
            ]
        if self.note:
            lines.append(f"  {self.note}")
        lines += [f"  {label}: {text}" for label, text in self.advice]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        exercise = self.exercise
        earned = f"{exercise.points} points" if self.status == "passed" and not self.staff else ""
        case = f"<p class='course-case'>Case: {escape(self.case)}</p>" if self.case else ""
        values = [(label, escape(value)) for label, value in self.shown]
        advice = [(label, inline_markdown(text)) for label, text in self.advice]
        printed = ""
        if self.printed and self.status == "failed":
            printed = (
                "<details><summary>What your code printed on this case</summary>"
                f"<pre>{escape(self.printed)}</pre></details>"
            )
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
            f"<p>{code_spans(self.message)}</p>",
            case,
            pairs(values, "values"),
            printed,
            f"<p>{escape(self.note)}</p>" if self.note else "",
            pairs(advice, "advice"),
            tried,
        )


def code_spans(text: str) -> str:
    """Plain text as HTML, with `code` between backticks; nothing else in it is markup."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def _what_next(exercise: Exercise, staff: bool) -> str:
    if staff:
        return "This was the staff version: it earns no points, and what builds on it can go on."
    from course_lib.grading.exercise import exercises_of

    titles = {each.name: each.title for each in exercises_of(exercise.chapter)}
    after = list(titles)[list(titles).index(exercise.name) + 1 :]
    if after:
        return f"The next one is *{titles[after[0]]}*."
    return "That was the last one of this chapter."
