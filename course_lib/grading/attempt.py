"""An answer that is called somewhere: what it did with each case, and why it may have failed.

`check` calls the answer in its own process, the official grade in a child. Both judge it here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from course_lib.grading.compare import Expected, agree, compare, value_text
from course_lib.grading.exercise import Case, Data, Exercise, Misconception
from course_lib.grading.run import AnswerTodo, Ran, Usage, text_of
from course_lib.runtime.interpreter import KernelError


@dataclass(frozen=True)
class Problem:
    """What is wrong with an answer whose values may be right: its kind, and a sentence."""

    kind: str
    message: str


@dataclass
class Outcome:
    """What an answer did with one case: it returned or raised, and it may have broken a rule."""

    value: Any = None
    error: Exception | None = None
    problem: Problem | None = None
    printed: str = ""

    def is_like(self, other: Outcome, want: Expected) -> bool:
        """Whether both did the same thing wrong, or returned the same values."""
        if self.error or other.error:
            return _what_went_wrong(self.error) == _what_went_wrong(other.error)
        kinds = [each.problem.kind if each.problem else None for each in (self, other)]
        return kinds[0] == kinds[1] and agree(self.value, other.value, want)


@dataclass
class Attempt:
    """One answer under judgement: what was tried so far, for the verdict and the search of a cause.

    Attributes:
        exercise: The record.
        cases: All its cases, in the order in which they are tried.
        run: What the answer does with a case, wherever it lives. Raises `AnswerTodo` for a stub.
        run_known: What one of the record's own answers does with a case, in this process.
        want: What a correct answer returns for a case.
        tried: Names of the cases that passed.
        outcomes: What happened so far.
    """

    exercise: Exercise
    cases: list[Case]
    run: Callable[[Case], Outcome]
    run_known: Callable[[Any, Case], Outcome]
    want: Callable[[Case], Expected]
    tried: list[str] = field(default_factory=list)
    outcomes: list[tuple[Case, Outcome, Expected]] = field(default_factory=list)


def not_an_answer(exercise: Exercise, answer: Any) -> tuple[Literal["todo", "failed"], str] | None:
    """What is wrong with the thing itself, before it is run: a status and a sentence, or None."""
    if answer is Ellipsis or answer is None:
        return "todo", f"`{exercise.name}` has no value yet."
    wants_callable = exercise.kind in ("function", "kernel", "class")
    if wants_callable and not callable(answer):
        is_now = value_text(answer)
        return "failed", f"`{exercise.name}` should be a {exercise.kind}; it is {is_now}."
    if not wants_callable and callable(answer):
        message = f"`{exercise.name}` should be a value; it is a function. Call it first?"
        return "failed", message
    if exercise.kind == "answer" and isinstance(answer, str):
        message = f"`{exercise.name}` should be a number, without quotes; it is {answer!r}."
        return "failed", message
    if exercise.kind == "choice" and not (isinstance(answer, str) and answer in exercise.choices):
        letters = ", ".join(repr(letter) for letter in exercise.choices)
        message = f"`{exercise.name}` should be one of {letters}; it is {value_text(answer)}."
        return "failed", message
    return None


def normalised(exercise: Exercise, answer: Any) -> Any:
    """The answer itself, or the letter of a choice whatever its case."""
    if exercise.kind == "choice" and isinstance(answer, str):
        return next((key for key in exercise.choices if key.lower() == answer.lower()), answer)
    return answer


def outcome_from(exercise: Exercise, data: Data, ran: Ran) -> Outcome:
    """Judge what was seen of a run by the exercise's rules; values are compared elsewhere."""
    if ran.error is not None:
        return Outcome(error=ran.error, printed=ran.printed)
    problem = None
    if ran.changed is not None:
        problem = Problem("input", f"It changed its input `{ran.changed}`. Work on a copy.")
    elif ran.usage is not None:
        problem = over_budget(exercise, data, ran.usage)
    return Outcome(ran.value, None, problem, ran.printed)


_RUNS_AS = {
    "aten::_softmax": ("aten::_safe_softmax",),
    "aten::scaled_dot_product_attention": ("aten::_scaled_dot_product_", "aten::_safe_softmax"),
}
"""How the names begin of what runs in an operator's place. PyTorch takes attention apart before
operators are counted: into a fused one of its family, or into products and a softmax."""


def times_ran(operator: str, ops: dict[str, int]) -> int:
    """How often a forbidden operator ran, under its own name or another."""
    others = _RUNS_AS.get(operator, ())
    return sum(n for name, n in ops.items() if name == operator or name.startswith(others))


def over_budget(exercise: Exercise, data: Data, usage: Usage) -> Problem | None:
    """The first limit that was broken: operators, memory, launches, traffic."""
    budget = exercise.budget
    for name in exercise.forbids:
        if times_ran(name, usage.ops):
            message = f"It calls `{name}`, which this exercise asks you to write."
            return Problem(f"calls {name}", message)
    if budget.largest_tensor and usage.largest_bytes > (most := budget.largest_tensor(data)):
        made = f"a tensor of {usage.largest_bytes:,} bytes, of shape {list(usage.largest_shape)}"
        return Problem("largest", f"It makes {made}. The budget for one tensor is {most:,}.")
    if budget.peak_bytes and usage.peak_bytes > (most := budget.peak_bytes(data)):
        held = f"At its peak it holds {usage.peak_bytes:,} bytes"
        return Problem("peak", f"{held}. The budget is {most:,}.")
    if usage.launches is None:
        return None
    if budget.launches:
        count, most = usage.launches, budget.launches(data)
        if count == 0:
            return Problem("no launch", "It launched no kernel. Start one with `kernel[grid](…)`.")
        if count > most:
            return Problem("launches", f"It launched {count} kernels. The budget is {most}.")
    if budget.bytes_moved and usage.bytes_moved > (most := budget.bytes_moved(data)):
        message = f"Its kernels move {usage.bytes_moved:,} bytes. The budget is {most:,}."
        return Problem("traffic", message)
    return None


def find_cause(attempt: Attempt) -> Misconception | None:
    """The misconception that did exactly what the answer did, on every case tried so far.

    Where several did, the remaining cases are tried as well to tell them apart.
    """
    found = list(attempt.exercise.misconceptions)
    for case, outcome, want in reversed(attempt.outcomes):
        failing = case is attempt.outcomes[-1][0]
        found = [
            each for each in found if _did_the_same(attempt, each, case, outcome, want, failing)
        ]
    for case in attempt.cases[len(attempt.outcomes) :]:
        if len(found) < 2:
            break
        try:
            outcome = attempt.run(case)
        except AnswerTodo:
            break
        want = attempt.want(case)
        alike = [each for each in found if _did_the_same(attempt, each, case, outcome, want, False)]
        found = alike or found
    return found[0] if found else None


def _did_the_same(
    attempt: Attempt,
    suspect: Misconception,
    case: Case,
    outcome: Outcome,
    want: Expected,
    failing: bool,
) -> bool:
    """Whether a misconception does with a case what the answer did, and fails where it failed."""
    try:
        other = attempt.run_known(suspect.wrong, case)
    except AnswerTodo:
        return False
    if not outcome.is_like(other, want):
        return False
    fails = other.error or other.problem or compare(other.value, want)
    return bool(fails) or not failing


def _what_went_wrong(error: Exception | None) -> tuple:
    """What two errors have in common when their causes are the same.

    An error of a kernel names the learner's own arguments between backticks, which differ where
    the mistake is the same; the program that made it, and how many elements it missed by, do not.
    """
    if isinstance(error, KernelError):
        return type(error).__name__, error.program, re.sub(r"`[^`]*`", "", error.what)
    return type(error).__name__, summary(error) if error else ""


def summary(error: BaseException) -> str:
    """An error in one line: its type, and the first line of its message."""
    lines = text_of(error).splitlines()
    first = lines[0][:300] if lines else "no message"
    return f"{type(error).__name__}: {first}" + ("" if first.endswith((".", "?", "!")) else ".")
