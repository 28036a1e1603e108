"""`check`: run a learner's answer, in process, and say kindly and exactly what happened.

It is for learning. It runs the answer in the learner's own kernel, so it is no proof of anything.
"""

from __future__ import annotations

import contextlib
import random
import re
import traceback
from dataclasses import dataclass, field
from typing import Any

from course_lib.grading import progress
from course_lib.grading.compare import (
    Expected,
    Mismatch,
    agree,
    compare,
    copy_data,
    expected,
    same_data,
    value_text,
)
from course_lib.grading.exercise import (
    STAGES,
    Case,
    CheckUsageError,
    Data,
    Exercise,
    Misconception,
    Size,
    exercises_of,
    find_exercise,
)
from course_lib.grading.isolation import isolated
from course_lib.grading.verdict import Verdict
from course_lib.runtime.interpreter import KernelError, Run, interpreted
from course_lib.runtime.measure import MemoryMeasure, measure_memory

STAFF_MARK = "__course_staff_version__"


class AnswerTodo(Exception):
    """The answer is still the stub."""


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
    """One check under way: what was tried so far, for the card and for the search of a cause."""

    exercise: Exercise
    answer: Any
    seed: int
    cases: list[Case]
    tried: list[str] = field(default_factory=list)
    outcomes: list[tuple[Case, Outcome, Expected]] = field(default_factory=list)


def check(*answers: Any, **named: Any) -> Verdict:
    """Check one answer and show the verdict as a card.

    Use `check(online_softmax)` for a function or a class, and `check(plateau=plateau)` for a
    number or a letter. It never raises on account of the answer.

    Args:
        *answers: One function or class; the name it was given says which exercise.
        **named: One answer under its exercise's name.

    Returns:
        The verdict: `status` is "todo", "failed" or "passed". Jupyter shows it as a card.

    Raises:
        CheckUsageError: If not exactly one answer is given, or one without its name.
        UnknownExerciseError: If no exercise has this name.
    """
    name, answer = _named_answer(answers, named)
    exercise = find_exercise(name, _current_chapter())
    if exercise.kind == "choice" and isinstance(answer, str):
        answer = next((key for key in exercise.choices if key.lower() == answer.lower()), answer)
    try:
        verdict = evaluate(exercise, answer, seed=random.SystemRandom().randrange(2**31))
    except Exception as error:
        message = (
            f"The check itself stumbled over this answer: {_summary(error)} "
            "Your answer was not judged and nothing was recorded."
        )
        return Verdict(exercise, "failed", "checker", message, error=error)
    if getattr(answer, STAFF_MARK, False):
        verdict.staff = True
    elif verdict.stage != "stopped":
        cause = verdict.cause.name if verdict.cause else None
        progress.record_attempt(exercise.id, verdict.status, verdict.stage, cause)
        verdict.failures = progress.failures_of_one_cause(exercise.id)
    return verdict


def evaluate(exercise: Exercise, answer: Any, *, seed: int, size: Size = "small") -> Verdict:
    """Run an answer through the stages of its exercise. A pure function of its arguments.

    Stages stop at the first failure: defined, values (structure, shape, dtype first), awkward
    sizes, gradients, method (forbidden operators, memory, traffic, launches), compiles.

    Args:
        exercise: The record.
        answer: Whatever the learner defined under the exercise's name.
        seed: For the cases.
        size: "small" runs anywhere in about a second; "large" is for a GPU.

    Returns:
        The verdict, without the learner's history.
    """
    if problem := _not_an_answer(exercise, answer):
        return problem
    cases = sorted(exercise.cases(size, seed), key=lambda case: STAGES.index(case.stage))
    attempt = Attempt(exercise, answer, seed, cases)
    try:
        for case in cases:
            if verdict := _try_case(attempt, case):
                return verdict
        if verdict := _compiles(attempt):
            return verdict
    except AnswerTodo:
        return Verdict(exercise, "todo", "defined", "Not written yet.")
    except KeyboardInterrupt:
        at = cases[len(attempt.outcomes)].name if len(attempt.outcomes) < len(cases) else "the end"
        message = f"You stopped it during this case: {at}. Does a loop of it end?"
        return Verdict(exercise, "failed", "stopped", message, tried=attempt.tried)
    verdict = Verdict(exercise, "passed", "done", "All cases pass.", tried=attempt.tried)
    if exercise.kind == "kernel":
        from course_lib.grading.speed import speed_note

        verdict.note = speed_note(exercise, answer, seed)
    return verdict


def _named_answer(answers: tuple, named: dict[str, Any]) -> tuple[str, Any]:
    if len(answers) + len(named) != 1:
        raise CheckUsageError(
            f"check takes one answer; it was given {len(answers) + len(named)}. "
            "Use check(my_function), or check(my_number=my_number)."
        )
    if named:
        return next(iter(named.items()))
    (answer,) = answers
    if isinstance(answer, str):
        raise CheckUsageError(f"check takes the answer itself. Without quotes: check({answer}).")
    names = [*_names_in_notebook(answer), getattr(answer, "__name__", "")]
    known = [each.name for each in exercises_of(chapter)] if (chapter := _current_chapter()) else []
    if name := next((name for name in names if name in known), names[-1]):
        if name not in known and hasattr(answer, "arg_names"):
            raise CheckUsageError(
                f"{name} is a kernel. Check the function that launches it: {', '.join(known)}."
            )
        return name, answer
    raise CheckUsageError(
        f"check was given {value_text(answer)}, which has no name. "
        "Write check(name=value), with the exercise's name."
    )


def _names_in_notebook(answer: Any) -> list[str]:
    """The top-level names of the notebook that are bound to this very object."""
    try:
        from IPython.core.getipython import get_ipython
    except ImportError:
        return []
    shell = get_ipython()
    return [name for name, value in shell.user_ns.items() if value is answer] if shell else []


def _current_chapter() -> str | None:
    from course_lib.notebook.session import current_chapter

    return current_chapter()


def _not_an_answer(exercise: Exercise, answer: Any) -> Verdict | None:
    if answer is Ellipsis or answer is None:
        return Verdict(exercise, "todo", "defined", f"`{exercise.name}` has no value yet.")
    wants_callable = exercise.kind in ("function", "kernel", "class")
    if wants_callable and not callable(answer):
        message = f"`{exercise.name}` should be a {exercise.kind}; it is {value_text(answer)}."
        return Verdict(exercise, "failed", "defined", message)
    if not wants_callable and callable(answer):
        message = f"`{exercise.name}` should be a value; it is a function. Call it first?"
        return Verdict(exercise, "failed", "defined", message)
    if exercise.kind == "answer" and isinstance(answer, str):
        message = f"`{exercise.name}` should be a number, without quotes; it is {answer!r}."
        return Verdict(exercise, "failed", "defined", message)
    if exercise.kind == "choice" and not (isinstance(answer, str) and answer in exercise.choices):
        letters = ", ".join(repr(letter) for letter in exercise.choices)
        message = f"`{exercise.name}` should be one of {letters}; it is {value_text(answer)}."
        return Verdict(exercise, "failed", "defined", message)
    return None


def _try_case(attempt: Attempt, case: Case) -> Verdict | None:
    """Run one case; None where it passes."""
    exercise = attempt.exercise
    want = expected_of(exercise, case, attempt.seed)
    outcome = outcome_of(exercise, attempt.answer, case, attempt.seed)
    attempt.outcomes.append((case, outcome, want))
    if outcome.error is not None:
        return _raised(attempt, case, outcome)
    mismatch = compare(outcome.value, want)
    if mismatch is not None:
        message = mismatch.message
        if mismatch.kind == "finite" and exercise.kind == "kernel":
            message += (
                " Either no program wrote this element (is the grid large enough?), or a masked "
                "lane without `other` entered the arithmetic."
            )
        return _failed(attempt, case, outcome, message, mismatch)
    if outcome.problem is not None:
        return _failed(attempt, case, outcome, outcome.problem.message)
    attempt.tried.append(case.name)
    return None


def expected_of(exercise: Exercise, case: Case, seed: int) -> Expected:
    """What a correct answer returns, with the accepted answers run as the learner's is."""

    def run(answer: Any, data: Data) -> Any:
        with isolated(seed), _kernels_interpreted(exercise):
            return exercise.harness(answer, data)

    return expected(exercise, case.data, run)


def outcome_of(exercise: Exercise, answer: Any, case: Case, seed: int = 0) -> Outcome:
    """Run an answer on a case, and keep what it returned, raised, printed and used.

    Kernels always run under the guarded interpreter here: on a GPU an access out of bounds would
    end the learner's session.

    Raises:
        AnswerTodo: If the answer is still the stub.
    """
    data = copy_data(case.data)
    metered = case.stage == "method"
    trace = metered and exercise.budget.bytes_moved is not None
    with isolated(seed) as printed, _kernels_interpreted(exercise, trace=trace) as launches:
        meter = measure_memory() if metered else contextlib.nullcontext()
        try:
            with meter as memory:
                value = exercise.harness(answer, data)
        except (Exception, SystemExit) as error:
            if _says_todo(error, exercise):
                raise AnswerTodo from error
            kept = error if isinstance(error, Exception) else RuntimeError("it called exit()")
            return Outcome(error=kept, printed=str(printed))
    problem = _changed_input(case.data, data)
    if problem is None and memory is not None:
        problem = _over_budget(exercise, case.data, memory, launches)
    return Outcome(value, None, problem, str(printed))


def _kernels_interpreted(
    exercise: Exercise, *, trace: bool = False
) -> contextlib.AbstractContextManager[Run | None]:
    return interpreted(trace=trace) if exercise.kind == "kernel" else contextlib.nullcontext()


def _changed_input(before: Data, after: Data) -> Problem | None:
    for name in before:
        if not same_data(before[name], after[name]):
            return Problem("input", f"It changed its input `{name}`. Work on a copy.")
    return None


def _over_budget(
    exercise: Exercise, data: Data, memory: MemoryMeasure, launches: Run | None
) -> Problem | None:
    """The first limit that was broken: operators, memory, launches, traffic."""
    budget = exercise.budget
    for name in exercise.forbids:
        if memory.ops.get(name):
            message = f"It calls `{name}`, which this exercise asks you to write."
            return Problem(f"calls {name}", message)
    if budget.largest_tensor and memory.largest_bytes > (most := budget.largest_tensor(data)):
        made = f"a tensor of {memory.largest_bytes:,} bytes, of shape {list(memory.largest_shape)}"
        return Problem("largest", f"It makes {made}. The budget for one tensor is {most:,}.")
    if budget.peak_bytes and memory.peak_bytes > (most := budget.peak_bytes(data)):
        held = f"At its peak it holds {memory.peak_bytes:,} bytes"
        return Problem("peak", f"{held}. The budget is {most:,}.")
    if launches is None:
        return None
    if budget.launches:
        count, most = len(launches.launches), budget.launches(data)
        if count == 0:
            return Problem("no launch", "It launched no kernel. Start one with `kernel[grid](…)`.")
        if count > most:
            return Problem("launches", f"It launched {count} kernels. The budget is {most}.")
    if budget.bytes_moved:
        moved = launches.bytes_loaded + launches.bytes_stored
        if moved > (most := budget.bytes_moved(data)):
            message = f"Its kernels move {moved:,} bytes. The budget is {most:,}."
            return Problem("traffic", message)
    return None


def _compiles(attempt: Attempt) -> Verdict | None:
    """Compile the learner's kernels for one GPU architecture, where Triton can."""
    exercise = attempt.exercise
    if exercise.kind != "kernel":
        return None
    from course_lib.grading.compiles import first_compile_error

    with isolated(attempt.seed):
        data = copy_data(attempt.cases[0].data)
        error = first_compile_error(exercise, attempt.answer, data)
    if error is None:
        attempt.tried.append("compiles for a GPU")
        return None
    message = f"It runs in the interpreter and does not compile for a GPU: {error}"
    return Verdict(exercise, "failed", "compiles", message, tried=attempt.tried)


def _failed(
    attempt: Attempt,
    case: Case,
    outcome: Outcome,
    message: str,
    mismatch: Mismatch | None = None,
) -> Verdict:
    exercise = attempt.exercise
    broke_a_rule = outcome.problem is not None and mismatch is None
    if exercise.kind in ("answer", "choice"):
        # The expected value would give the answer away.
        message, shown = "Not this one.", [("yours", value_text(attempt.answer))]
    else:
        shown = [(name, value_text(value)) for name, value in case.data.items()]
        if mismatch is not None:
            shown += [("expected", mismatch.expected), ("yours", mismatch.actual)]
    return Verdict(
        exercise,
        "failed",
        "method" if broke_a_rule else "awkward" if case.stage == "method" else case.stage,
        message,
        case=case.name,
        shown=shown,
        cause=find_cause(attempt),
        tried=attempt.tried,
        printed=outcome.printed,
        rerun=lambda: exercise.harness(attempt.answer, copy_data(case.data)),
    )


def _raised(attempt: Attempt, case: Case, outcome: Outcome) -> Verdict:
    error = outcome.error
    assert error is not None
    if isinstance(error, KernelError):
        where = f" Line {error.line}: `{error.source}`." if error.source else ""
        what = error.what[:1].upper() + error.what[1:].rstrip(". :")
        message = f"{what}.{where} {error.advice}".rstrip()
    else:
        line = _learners_line(error, attempt.answer)
        where = f" Line {line[0]}: `{line[1]}`." if line else ""
        message = f"It raised {_summary(error)}{where}"
    verdict = _failed(attempt, case, outcome, message)
    verdict.error = error
    return verdict


def find_cause(attempt: Attempt) -> Misconception | None:
    """The misconception that did exactly what the answer did, on every case tried so far.

    Where several did, the remaining cases are tried as well to tell them apart.
    """
    exercise, seed = attempt.exercise, attempt.seed
    found = list(exercise.misconceptions)
    for case, outcome, want in reversed(attempt.outcomes):
        failing = case is attempt.outcomes[-1][0]
        found = [
            each for each in found if _did_the_same(attempt, each, case, outcome, want, failing)
        ]
    for case in attempt.cases[len(attempt.outcomes) :]:
        if len(found) < 2:
            break
        try:
            outcome = outcome_of(exercise, attempt.answer, case, seed)
        except AnswerTodo:
            break
        want = expected_of(exercise, case, seed)
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
        other = outcome_of(attempt.exercise, suspect.wrong, case, attempt.seed)
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
        return type(error), error.program, re.sub(r"`[^`]*`", "", error.what)
    return type(error), _summary(error) if error else ""


def _says_todo(raised: BaseException, exercise: Exercise) -> bool:
    """Whether the error is that of an untouched stub, and not of the learner's own code."""
    error: BaseException | None = raised
    while error is not None:
        text = _text(error)
        unwritten = isinstance(error, NotImplementedError)
        if unwritten and (not text or text.startswith(exercise.name)):
            return True
        if isinstance(error, KernelError | AssertionError) and "TODO" in text:
            return True
        error = error.__cause__
    return False


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:
        return "(its message cannot be shown)"


def _summary(error: BaseException) -> str:
    lines = _text(error).splitlines()
    first = lines[0][:300] if lines else "no message"
    return f"{type(error).__name__}: {first}" + ("" if first.endswith((".", "?", "!")) else ".")


def _learners_line(error: Exception, answer: Any) -> tuple[int, str] | None:
    """Number and text of the last line of the learner's own cell in the traceback."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == code.co_filename]
    return (mine[-1].lineno or 0, mine[-1].line or "") if mine else None
