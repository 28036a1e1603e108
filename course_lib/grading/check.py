"""`check`: run a learner's answer, in process, and say kindly and exactly what happened.

It is for learning. It runs the answer in the learner's own kernel, so it is no proof of anything.
"""

from __future__ import annotations

import contextlib
import random
import traceback
from typing import Any

from course_lib.grading import progress
from course_lib.grading.attempt import (
    Attempt,
    Outcome,
    find_cause,
    normalised,
    not_an_answer,
    outcome_from,
    summary,
)
from course_lib.grading.compare import (
    Expected,
    Mismatch,
    compare,
    copy_data,
    expected,
    value_text,
)
from course_lib.grading.exercise import (
    STAGES,
    Case,
    CheckUsageError,
    Data,
    Exercise,
    Size,
    exercises_of,
    find_exercise,
)
from course_lib.grading.isolation import isolated
from course_lib.grading.run import AnswerTodo, run_answer
from course_lib.grading.verdict import Verdict
from course_lib.runtime.interpreter import KernelError, interpreted

STAFF_MARK = "__course_staff_version__"


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
    answer = normalised(exercise, answer)
    try:
        verdict = evaluate(exercise, answer, seed=random.SystemRandom().randrange(2**31))
    except Exception as error:
        message = (
            f"The check itself stumbled over this answer: {summary(error)} "
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
    if problem := not_an_answer(exercise, answer):
        status, message = problem
        return Verdict(exercise, status, "defined", message)
    cases = sorted(exercise.cases(size, seed), key=lambda case: STAGES.index(case.stage))

    def run_known(known: Any, case: Case) -> Outcome:
        return outcome_of(exercise, known, case, seed)

    attempt = Attempt(
        exercise,
        cases,
        run=lambda case: run_known(answer, case),
        run_known=run_known,
        want=lambda case: expected_of(exercise, case, seed),
    )
    try:
        for case in cases:
            if verdict := _try_case(attempt, answer, case):
                return verdict
        if verdict := _compiles(attempt, answer, seed):
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


def _try_case(attempt: Attempt, answer: Any, case: Case) -> Verdict | None:
    """Run one case; None where it passes."""
    exercise = attempt.exercise
    want = attempt.want(case)
    outcome = attempt.run(case)
    attempt.outcomes.append((case, outcome, want))
    if outcome.error is not None:
        return _raised(attempt, answer, case, outcome)
    mismatch = compare(outcome.value, want)
    if mismatch is not None:
        message = mismatch.message
        if mismatch.kind == "finite" and exercise.kind == "kernel":
            message += (
                " Either no program wrote this element (is the grid large enough?), or a masked "
                "lane without `other` entered the arithmetic."
            )
        return _failed(attempt, answer, case, outcome, message, mismatch)
    if outcome.problem is not None:
        return _failed(attempt, answer, case, outcome, outcome.problem.message)
    attempt.tried.append(case.name)
    return None


def expected_of(exercise: Exercise, case: Case, seed: int) -> Expected:
    """What a correct answer returns, with the accepted answers run as the learner's is."""

    def run(answer: Any, data: Data) -> Any:
        guards = interpreted() if exercise.kind == "kernel" else contextlib.nullcontext()
        with isolated(seed), guards:
            return exercise.harness(answer, data)

    return expected(exercise, case.data, run)


def outcome_of(exercise: Exercise, answer: Any, case: Case, seed: int = 0) -> Outcome:
    """Run an answer on a case, and keep what it returned, raised, printed and used.

    Raises:
        AnswerTodo: If the answer is still the stub.
    """
    metered = case.stage == "method"
    ran = run_answer(
        exercise.harness,
        answer,
        case.data,
        name=exercise.name,
        kernel=exercise.kind == "kernel",
        metered=metered,
        trace=metered and exercise.budget.bytes_moved is not None,
        seed=seed,
    )
    return outcome_from(exercise, case.data, ran)


def _compiles(attempt: Attempt, answer: Any, seed: int) -> Verdict | None:
    """Compile the learner's kernels for one GPU architecture, where Triton can."""
    exercise = attempt.exercise
    if exercise.kind != "kernel":
        return None
    from course_lib.grading.compiles import first_compile_error

    with isolated(seed):
        data = copy_data(attempt.cases[0].data)
        error = first_compile_error(exercise.harness, answer, data)
    if error is None:
        attempt.tried.append("compiles for a GPU")
        return None
    message = f"It runs in the interpreter and does not compile for a GPU: {error}"
    return Verdict(exercise, "failed", "compiles", message, tried=attempt.tried)


def _failed(
    attempt: Attempt,
    answer: Any,
    case: Case,
    outcome: Outcome,
    message: str,
    mismatch: Mismatch | None = None,
) -> Verdict:
    exercise = attempt.exercise
    broke_a_rule = outcome.problem is not None and mismatch is None
    if exercise.kind in ("answer", "choice"):
        # The expected value would give the answer away.
        message, shown = "Not this one.", [("yours", value_text(answer))]
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
        rerun=lambda: exercise.harness(answer, copy_data(case.data)),
    )


def _raised(attempt: Attempt, answer: Any, case: Case, outcome: Outcome) -> Verdict:
    error = outcome.error
    assert error is not None
    if isinstance(error, KernelError):
        where = f" Line {error.line}: `{error.source}`." if error.source else ""
        what = error.what[:1].upper() + error.what[1:].rstrip(". :")
        message = f"{what}.{where} {error.advice}".rstrip()
    else:
        line = _learners_line(error, answer)
        where = f" Line {line[0]}: `{line[1]}`." if line else ""
        message = f"It raised {summary(error)}{where}"
    verdict = _failed(attempt, answer, case, outcome, message)
    verdict.error = error
    return verdict


def _learners_line(error: Exception, answer: Any) -> tuple[int, str] | None:
    """Number and text of the last line of the learner's own cell in the traceback."""
    code = getattr(answer, "__code__", None)
    if code is None:
        return None
    frames = traceback.extract_tb(error.__traceback__)
    mine = [frame for frame in frames if frame.filename == code.co_filename]
    return (mine[-1].lineno or 0, mine[-1].line or "") if mine else None
