"""`check`: run a learner's answer, in process, and say kindly and exactly what happened.

It is for learning. It runs the answer in the learner's own kernel, so it is no proof of anything.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from course_lib.grading import progress
from course_lib.grading.compare import (
    Expected,
    Mismatch,
    compare,
    copy_data,
    expected,
    leaves,
    tensor_text,
)
from course_lib.grading.exercise import (
    STAGES,
    Case,
    Data,
    Exercise,
    Misconception,
    Size,
    find_exercise,
)
from course_lib.grading.verdict import Verdict
from course_lib.runtime.interpreter import KernelError, interpreted
from course_lib.runtime.measure import measure_memory

STAFF_MARK = "__course_staff_version__"


class AnswerTodo(Exception):
    """The answer is still the stub."""


@dataclass
class Outcome:
    """What an answer did with one case: it returned, or it raised."""

    value: Any = None
    error: Exception | None = None

    def is_like(self, other: Outcome, want: Expected) -> bool:
        """Whether both returned the same values within the tolerance, or raised alike."""
        if self.error or other.error:
            return _what_went_wrong(self.error) == _what_went_wrong(other.error)
        as_truth = Expected(other.value, want.like, want.tolerance)
        return _same_structure(self.value, other.value) and compare(self.value, as_truth) is None


@dataclass
class Run:
    """The state of one check: what was tried so far, for the card and the search for a cause."""

    exercise: Exercise
    answer: Any
    tried: list[str] = field(default_factory=list)
    outcomes: list[tuple[Case, Outcome, Expected]] = field(default_factory=list)


def check(*answers: Any, **named: Any) -> Verdict:
    """Check one answer and show the verdict as a card.

    Use `check(online_softmax)` for a function or a class (its name says which exercise), and
    `check(plateau=plateau)` for a number or a letter. It never raises on account of the answer.

    Args:
        *answers: One function or class.
        **named: One answer under its exercise's name.

    Returns:
        The verdict: `status` is "todo", "failed" or "passed". Jupyter shows it as a card.

    Raises:
        TypeError: If not exactly one answer is given, or a value is given without its name.
        UnknownExerciseError: If no exercise has this name.
    """
    from course_lib.notebook.session import current_chapter

    if len(answers) + len(named) != 1:
        raise TypeError(
            f"check takes one answer; it was given {len(answers) + len(named)}. "
            "Use check(my_function), or check(my_number=my_number)."
        )
    if named:
        ((name, answer),) = named.items()
    else:
        (answer,) = answers
        name = getattr(answer, "__name__", None)
        if name is None:
            raise TypeError(
                f"check was given {tensor_text(answer)}, which has no name. "
                "Write check(name=value), with the exercise's name."
            )
    exercise = find_exercise(name, current_chapter())
    verdict = evaluate(exercise, answer, seed=random.SystemRandom().randrange(2**31))
    if not getattr(answer, STAFF_MARK, False):
        cause = verdict.cause.name if verdict.cause else None
        progress.record_attempt(exercise.id, verdict.status, verdict.stage, cause)
    else:
        verdict.staff = True
    verdict.failures = progress.standing(exercise.id).failures_in_a_row
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
    run = Run(exercise, answer)
    if problem := _not_an_answer(exercise, answer):
        return problem
    cases = sorted(exercise.cases(size, seed), key=lambda case: STAGES.index(case.stage))
    try:
        with warnings_kept_out():
            for case in cases:
                if verdict := _try_case(run, case):
                    return verdict
            if verdict := _compiles(run):
                return verdict
    except AnswerTodo:
        return Verdict(exercise, "todo", "defined", "Not written yet.")
    return Verdict(exercise, "passed", "done", "All cases pass.", tried=run.tried)


def _not_an_answer(exercise: Exercise, answer: Any) -> Verdict | None:
    if answer is Ellipsis or answer is None:
        return Verdict(exercise, "todo", "defined", f"`{exercise.name}` has no value yet.")
    wants_callable = exercise.kind in ("function", "kernel", "class")
    if wants_callable and not callable(answer):
        message = f"`{exercise.name}` should be a {exercise.kind}; it is {tensor_text(answer)}."
        return Verdict(exercise, "failed", "defined", message)
    if not wants_callable and callable(answer):
        message = f"`{exercise.name}` should be a value; it is a function. Call it first?"
        return Verdict(exercise, "failed", "defined", message)
    if exercise.kind == "choice" and answer not in exercise.choices:
        letters = ", ".join(repr(letter) for letter in exercise.choices)
        message = f"`{exercise.name}` should be one of {letters}; it is {answer!r}."
        return Verdict(exercise, "failed", "defined", message)
    return None


def _try_case(run: Run, case: Case) -> Verdict | None:
    """Run one case; None where it passes."""
    exercise = run.exercise
    want = expected(exercise, case.data)
    data = copy_data(case.data)
    outcome, problem = (
        _measured(exercise, run.answer, data)
        if case.stage == "method"
        else (outcome_of(exercise, run.answer, data), None)
    )
    run.outcomes.append((case, outcome, want))
    if outcome.error is not None:
        return _raised(run, case, outcome.error)
    if changed := _changed_input(case.data, data):
        return _failed(run, case, f"It changed its input `{changed}`. Work on a copy.")
    mismatch = compare(outcome.value, want)
    if mismatch is not None:
        return _failed(run, case, mismatch.message, mismatch)
    if problem is not None:
        return _failed(run, case, problem)
    run.tried.append(case.name)
    return None


def outcome_of(exercise: Exercise, answer: Any, data: Data) -> Outcome:
    """Run an answer on data, and keep what it returned or raised.

    Raises:
        AnswerTodo: If the answer is still the stub.
    """
    try:
        with _guarded(exercise):
            return Outcome(value=exercise.harness(answer, data))
    except (Exception, SystemExit) as error:
        if _says_todo(error):
            raise AnswerTodo from error
        return Outcome(error=error if isinstance(error, Exception) else _exited(error))


@contextlib.contextmanager
def _guarded(exercise: Exercise) -> Iterator[Any]:
    """Kernels of an exercise run under the guarded interpreter unless a GPU runs them."""
    if exercise.kind == "kernel" and not torch.cuda.is_available():
        with interpreted() as session:
            yield session
    else:
        yield None


def _measured(exercise: Exercise, answer: Any, data: Data) -> tuple[Outcome, str | None]:
    """Run an answer and hold what it used against the exercise's budget."""
    budget = exercise.budget
    with contextlib.ExitStack() as stack:
        session = None
        if exercise.kind == "kernel":
            session = stack.enter_context(interpreted(trace=budget.bytes_moved is not None))
        memory = stack.enter_context(measure_memory())
        outcome = outcome_of(exercise, answer, data)
    if outcome.error is not None:
        return outcome, None
    forbidden = [name for name in exercise.forbids if memory.ops.get(name)]
    if forbidden:
        return outcome, f"It calls `{forbidden[0]}`, which this exercise asks you to write."
    for limit, used, what in (
        (budget.largest_tensor, memory.largest_bytes, "Its largest tensor has"),
        (budget.peak_bytes, memory.peak_bytes, "At its peak it holds"),
    ):
        if limit is not None and used > limit(data):
            shape = f", of shape {list(memory.largest_shape)}" if limit is budget.largest_tensor else ""
            return outcome, f"{what} {used:,} bytes{shape}. The budget is {limit(data):,}."
    if session is not None and budget.bytes_moved is not None:
        moved = session.bytes_loaded + session.bytes_stored
        if moved > budget.bytes_moved(data):
            return outcome, (
                f"Its kernels move {moved:,} bytes. The budget is {budget.bytes_moved(data):,}."
            )
    if session is not None and budget.launches is not None:
        allowed = budget.launches(data)
        if not 0 < len(session.launches) <= allowed:
            return outcome, (
                f"It launched {len(session.launches)} kernels; it should launch 1 to {allowed}."
            )
    return outcome, None


def _compiles(run: Run) -> Verdict | None:
    """Compile the learner's kernels for one GPU architecture, where Triton can."""
    if run.exercise.kind != "kernel":
        return None
    from course_lib.grading.compiles import first_compile_error

    case = next(iter(run.outcomes))[0]
    error = first_compile_error(run.exercise, run.answer, copy_data(case.data))
    if error is None:
        run.tried.append("compiles for a GPU")
        return None
    return Verdict(
        run.exercise,
        "failed",
        "compiles",
        f"It runs in the interpreter and does not compile for a GPU: {error}",
        tried=run.tried,
    )


def _failed(run: Run, case: Case, message: str, mismatch: Mismatch | None = None) -> Verdict:
    shown = [(name, tensor_text(value)) for name, value in _shown_inputs(case.data)]
    if mismatch is not None:
        shown += [("expected", mismatch.expected), ("yours", mismatch.actual)]
    return Verdict(
        run.exercise,
        "failed",
        case.stage,
        message,
        case=case.name,
        shown=shown,
        cause=find_cause(run),
        tried=run.tried,
    )


def _raised(run: Run, case: Case, error: Exception) -> Verdict:
    if isinstance(error, KernelError):
        where = f" Line {error.line}: `{error.source}`." if error.source else ""
        message = f"{_capital(error.what)}.{where} {error.advice}".rstrip()
    else:
        line = _learners_line(error, run.answer)
        where = f" (line {line[0]}: `{line[1]}`)" if line else ""
        message = f"It raised {type(error).__name__}: {_first_line(error)}{where}"
    verdict = _failed(run, case, message)
    verdict.error = error
    return verdict


def find_cause(run: Run) -> Misconception | None:
    """The misconception that does exactly what the answer did, on every case tried so far."""
    for each in run.exercise.misconceptions:
        if all(
            _outcome_of_wrong(run.exercise, each, case).is_like(outcome, want)
            for case, outcome, want in reversed(run.outcomes)
        ):
            return each
    return None


def _outcome_of_wrong(exercise: Exercise, wrong: Misconception, case: Case) -> Outcome:
    try:
        return outcome_of(exercise, wrong.wrong, copy_data(case.data))
    except AnswerTodo as error:
        return Outcome(error=error)


def _what_went_wrong(error: Exception | None) -> tuple:
    """What two errors have in common when their causes are the same.

    An error of a kernel names the learner's own kernel, arguments and lines, which differ where
    the mistake is the same; the program that made it does not.
    """
    if isinstance(error, KernelError):
        return type(error), error.program
    return type(error), str(error)


def _same_structure(a: Any, b: Any) -> bool:
    def shape(value: Any) -> Any:
        return (value.shape, value.dtype) if isinstance(value, torch.Tensor) else type(value)

    return [(p, shape(v)) for p, v in leaves(a)] == [(p, shape(v)) for p, v in leaves(b)]


def _shown_inputs(data: Data) -> list[tuple[str, Any]]:
    return [(name, value) for name, value in data.items() if not isinstance(value, dict)]


def _changed_input(before: Data, after: Data) -> str | None:
    for (path, old), (_, new) in zip(leaves(before, ""), leaves(after, ""), strict=True):
        if isinstance(old, torch.Tensor) and not torch.equal(
            old.nan_to_num(), new.detach().nan_to_num()
        ):
            return path.strip("[]'")
    return None


def _says_todo(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, NotImplementedError) or "TODO" in str(error):
            return True
        error = error.__cause__
    return False


def _exited(error: BaseException) -> Exception:
    return RuntimeError(f"it called {type(error).__name__}")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else "(no message)"


def _learners_line(error: Exception, answer: Any) -> tuple[int, str] | None:
    """Number and text of the last line of the learner's own cell in the traceback."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return None
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename == code.co_filename
    ]
    return (frames[-1].lineno or 0, frames[-1].line or "") if frames else None


@contextlib.contextmanager
def warnings_kept_out() -> Iterator[None]:
    """Keep numerical warnings of wrong answers off the learner's page."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield
