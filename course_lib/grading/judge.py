"""The judge of the official grade: hostile code in, an honest score out.

Trusted parent, untrusted child, data only. The child (`worker.py`, in a `sandbox.py`) runs the
submission and answers calls; here the inputs are drawn from a secret seed, each answer is taken as
bytes, and only then are its expected values computed and compared. Nothing of a submission is
imported, unpickled or evaluated in this process.

What a child says against itself (an exception, a budget that its own meter saw broken) counts, as
nobody else could have said it. What it says for itself never does: values are compared here, and
budgets of memory are enforced from outside.
"""

from __future__ import annotations

import hashlib
import hmac
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from course_lib.grading.attempt import (
    Attempt,
    Outcome,
    find_cause,
    normalised,
    not_an_answer,
    outcome_from,
    summary,
    times_ran,
)
from course_lib.grading.cells import Cell, read_cells
from course_lib.grading.check import expected_of, outcome_of
from course_lib.grading.compare import (
    TOLERANCE_FACTOR,
    Expected,
    Mismatch,
    compare,
    copy_data,
    leaves,
    same_data,
)
from course_lib.grading.exercise import STAGES, Case, Data, Exercise, chapter_of
from course_lib.grading.result import CaseResult, ExerciseResult, Finding
from course_lib.grading.rules import Notebook
from course_lib.grading.run import AnswerTodo, Ran
from course_lib.grading.sandbox import Sandbox
from course_lib.grading.session import MEMORY_SLACK, Fault, RemoteError, Session
from course_lib.grading.submission import Submission
from course_lib.runtime.interpreter import KernelError

MEMORY_ROUNDINGS = 256.0
"""A memory case is judged by other answers, and may differ by this many roundings."""


@dataclass(frozen=True)
class Judged:
    """What the judge says of one submission.

    Attributes:
        exercises: Every exercise of the chapter, in its order.
        seconds: Where the time went: "overhead", "learner", "oracle".
        notes: What should be said of its cells.
    """

    exercises: tuple[ExerciseResult, ...]
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()


@dataclass
class _Truth:
    """One exercise under the secret seed. Values are computed when first asked for, and kept."""

    exercise: Exercise
    seed: int
    run_seed: int
    cases: list[Case]
    public: list[bool]
    harness: str
    spend: Callable[[float], None]
    _kept: dict[tuple, Any] = field(default_factory=dict)

    def want(self, case: Case) -> Expected:
        """What a correct answer returns."""
        return self._once(("want", id(case)), lambda: expected_of(self.exercise, case, self.seed))

    def run_known(self, answer: Any, case: Case) -> Outcome:
        """What one of the record's own answers does."""
        key = ("known", id(answer), id(case))
        return self._once(key, lambda: outcome_of(self.exercise, answer, case, self.run_seed))

    def memory_case(self) -> Case | None:
        """The large case whose memory is limited from outside, or None where that tells nothing."""
        budget = self.exercise.budget
        if self.exercise.kind == "kernel" or not (budget.peak_bytes or budget.largest_tensor):
            return None

        def make() -> Case | None:
            large = self.exercise.cases("large", self.seed)
            case = next((case for case in large if case.stage == "method"), None)
            return case if case is not None and _tells(case.data) else None

        return self._once(("large",), make)

    def replay_case(self) -> Case | None:
        """A case that no answer has seen, for the replay without kernels; None if all are fixed."""

        def make() -> Case | None:
            fresh = self.exercise.cases("small", self.run_seed)
            pairs = zip(fresh, self.exercise.cases("small", self.seed), strict=False)
            hidden = [case for case, other in pairs if not same_data(case.data, other.data)]
            return hidden[0] if hidden else None

        return self._once(("replay",), make)

    def memory_want(self, case: Case) -> Expected:
        """By accepted answers, since the oracle may need the memory that the case is about."""

        def make() -> Expected:
            run = self.exercise.harness
            outputs = [run(each, copy_data(case.data)) for each in self.exercise.accepts[:2]]
            true, other = (dict(leaves(output)) for output in outputs)
            tolerance = {}
            for path, value in true.items():
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    apart = (value.double() - other[path].double()).abs().max().item()
                    size = value.double().abs().max().item()
                    floor = MEMORY_ROUNDINGS * torch.finfo(value.dtype).eps * size
                    tolerance[path] = max(TOLERANCE_FACTOR * apart, floor)
            return Expected(outputs[0], outputs[0], tolerance, self.exercise.outputs)

        return self._once(("memory", id(case)), make)

    def _once(self, key: tuple, make: Callable[[], Any]) -> Any:
        if key not in self._kept:
            began = time.monotonic()
            self._kept[key] = make()
            self.spend(time.monotonic() - began)
        return self._kept[key]


class Judge:
    """Owns a sandbox, and judges submissions in it one after another; a context manager.

    Args:
        device: "cpu" or "cuda".
        allow_weak: Judge also where only limits protect this machine.
        secret_seed: From which all inputs are drawn. Equal seeds give equal grades.

    Attributes:
        sandbox_level: "bwrap" or "rlimits".
        start: "warm" where children are forked from a zygote, "cold" where each starts alone.
        why_cold: Why it is not warm, or "".

    Raises:
        SandboxError: If there is no sandbox that holds.
    """

    def __init__(
        self, device: str = "cpu", allow_weak: bool = False, *, secret_seed: bytes
    ) -> None:
        if not isinstance(secret_seed, bytes) or len(secret_seed) < 16:
            raise ValueError("secret_seed must be at least 16 bytes.")
        self._seed = secret_seed
        self._device = device
        self._truths: dict[str, _Truth] = {}
        self._oracle_seconds = 0.0
        self._sandbox = Sandbox(device=device, allow_weak=allow_weak)
        self.sandbox_level = self._sandbox.level
        self.start = self._sandbox.start
        self.why_cold = self._sandbox.why_cold

    def __enter__(self) -> Judge:
        # Sums are added in the same order on every machine, and judges do not crowd each other.
        self._threads = torch.get_num_threads()
        torch.set_num_threads(1)
        return self

    def __exit__(self, *exception: object) -> None:
        torch.set_num_threads(self._threads)
        self._sandbox.close()

    def grade(self, submission: Submission, chapter: str) -> Judged:
        """Judge one submission.

        Args:
            submission: Its cells, as text.
            chapter: The chapter's package name.

        Raises:
            SandboxError: If the grader itself fails; never on account of the submission.
            UnknownExerciseError: If there is no such chapter.
        """
        began, self._oracle_seconds = time.monotonic(), 0.0
        exercises = list(chapter_of(chapter).exercises)
        cells = read_cells(submission.cells)
        notebook = Notebook(cells)
        with Session(self._sandbox, cells) as session:
            trial = _Trial(session, cells, notebook, self._device)
            values = trial.values([each.name for each in exercises])
            results = {
                each.id: trial.judge(self._truth(each), values.get(each.name, _NOTHING))
                for each in exercises
            }
            trial.limit_memory(
                [self._truth(each) for each in exercises if results[each.id].status == "passed"],
                results,
            )
            notes = trial.notes()
        self.start = self._sandbox.start
        total, learner = time.monotonic() - began, session.learner_seconds
        overhead = max(0.0, total - learner - self._oracle_seconds)
        seconds = {"overhead": overhead, "learner": learner, "oracle": self._oracle_seconds}
        return Judged(tuple(results[each.id] for each in exercises), seconds, notes)

    def _truth(self, exercise: Exercise) -> _Truth:
        if exercise.id not in self._truths:
            seed = self._number(f"{exercise.id} cases")
            cases = list(exercise.cases("small", seed))
            cases.sort(key=lambda case: STAGES.index(case.stage))
            others = {case.name: case.data for case in exercise.cases("small", seed ^ 1)}
            self._truths[exercise.id] = _Truth(
                exercise,
                seed,
                self._number(f"{exercise.id} run"),
                cases,
                [case.name in others and same_data(case.data, others[case.name]) for case in cases],
                inspect.getsource(exercise.harness),
                self._spend,
            )
        return self._truths[exercise.id]

    def _number(self, what: str) -> int:
        digest = hmac.new(self._seed, what.encode(), hashlib.sha256).digest()
        return int.from_bytes(digest[:4], "big") % 2**31

    def _spend(self, seconds: float) -> None:
        self._oracle_seconds += seconds


_NOTHING = object()


class _Trial:
    """One submission being judged."""

    def __init__(
        self, session: Session, cells: list[Cell], notebook: Notebook, device: str
    ) -> None:
        self.session, self.cells, self.notebook, self.device = session, cells, notebook, device
        self.fault: Fault | None = None

    def values(self, names: list[str]) -> dict[str, Any]:
        """What the notebook defines under the exercises' names."""
        try:
            return self.session.values(names)
        except Fault as fault:
            self.fault = fault
            return {}

    def notes(self) -> tuple[str, ...]:
        """What became of cells, where it is worth a word."""
        notes = [f"Cell {cell.number}: {cell.note}." for cell in self.cells if cell.note]
        notes += [
            f"Cell {number} was left out: {why}"
            for number, why in sorted(self.session.dropped.items())
        ]
        return tuple(notes)

    def judge(self, truth: _Truth, value: Any) -> ExerciseResult:
        """Judge one exercise."""
        exercise = truth.exercise
        if value is _NOTHING:
            return self._missing(exercise)
        answer = normalised(exercise, value)
        if problem := not_an_answer(exercise, answer):
            status, message = problem
            return self._result(exercise, "missing" if status == "todo" else status, message)
        try:
            return self._cases(truth, answer)
        except AnswerTodo:
            return self._result(exercise, "missing", "Not written yet.")

    def _missing(self, exercise: Exercise) -> ExerciseResult:
        if self.fault is not None:
            message = f"The notebook's cells could not be run. {self.fault}"
            return self._result(exercise, self.fault.status, message)
        message = f"Nothing is called `{exercise.name}`."
        places = self.notebook.places(exercise.name)
        if places:
            number = places[-1].cell
            if number in self.session.dropped:
                message += f" Cell {number}, which defines it, was left out: "
                message += self.session.dropped[number]
            else:
                why = self.session.failed.get(number, "did not come so far")
                message += f" Cell {number}, which defines it, {why}."
        return self._result(exercise, "missing", message)

    def _cases(self, truth: _Truth, answer: Any) -> ExerciseResult:
        """Run the cases in order, up to the first that fails."""
        exercise = truth.exercise
        findings = self._noticed(exercise)
        violation = self._violation(exercise)
        attempt = Attempt(
            exercise,
            truth.cases,
            run=lambda case: self._run_safely(truth, answer, case),
            run_known=truth.run_known,
            want=truth.want,
        )
        cases: list[CaseResult] = []
        for case, public in zip(truth.cases, truth.public, strict=True):
            try:
                outcome, found = self._run(truth, answer, case)
            except Fault as fault:
                message = f"{_of(case)}: {fault}"
                cases.append(CaseResult(case.name, case.stage, fault.status, message))
                return self._result(
                    exercise, fault.status, message, case.stage, tuple(cases), findings
                )
            findings += tuple(each for each in found if each not in findings)
            if violation is not None:
                return violation
            want = truth.want(case)
            attempt.outcomes.append((case, outcome, want))
            mismatch = None if outcome.error else compare(outcome.value, want)
            if outcome.error or mismatch or outcome.problem:
                return self._failed(attempt, truth, case, public, mismatch, cases, findings)
            cases.append(CaseResult(case.name, case.stage, "passed"))
        if exercise.kind == "kernel":
            problem = self._kernels(truth)
            if problem is not None:
                status, stage, message = problem
                return self._result(exercise, status, message, stage, tuple(cases), findings)
        return self._result(exercise, "passed", "", "done", tuple(cases), findings)

    def _run(self, truth: _Truth, answer: Any, case: Case) -> tuple[Outcome, tuple[Finding, ...]]:
        """What the answer does with a case, in the child; plain values answer for themselves."""
        exercise = truth.exercise
        if exercise.kind in ("answer", "choice"):
            return outcome_of(exercise, answer, case, truth.run_seed), ()
        ran = self._call(truth, case)
        outcome = outcome_from(exercise, case.data, ran)
        if self.device == "cuda" and exercise.kind == "kernel" and not outcome.error:
            # The guards have seen it; now the compiled kernel, on the GPU.
            outcome = outcome_from(exercise, case.data, self._call(truth, case, compiled=True))
        return outcome, _findings(exercise, case, ran)

    def _run_safely(self, truth: _Truth, answer: Any, case: Case) -> Outcome:
        """For the search of a cause, which must not end the judging."""
        try:
            return self._run(truth, answer, case)[0]
        except Fault as fault:
            return Outcome(error=fault)

    def _call(
        self, truth: _Truth, case: Case, *, compiled: bool = False, idle: bool = False
    ) -> Ran:
        exercise = truth.exercise
        metered = case.stage == "method" and not (compiled or idle)
        request = {
            **self._harness(truth),
            "interpreted": exercise.kind == "kernel" and not compiled,
            "metered": metered,
            "trace": metered and exercise.budget.bytes_moved is not None,
            "idle": idle,
        }
        others = self.session.answered
        try:
            try:
                return self.session.call(request, case.data)
            except Fault as fault:
                if fault.status != "error" or not others:
                    raise
                # Once more in a fresh child: what an earlier answer left behind is not its fault.
                return self.session.call(request, case.data)
        except LookupError:
            raise AnswerTodo from None

    def _harness(self, truth: _Truth) -> dict[str, Any]:
        return {
            "name": truth.exercise.name,
            "harness": truth.harness,
            "harness_name": truth.exercise.harness.__name__,
            # Never the cases' own seed: whoever has that has every input.
            "seed": truth.run_seed,
        }

    # Rules.

    def _noticed(self, exercise: Exercise) -> tuple[Finding, ...]:
        """What a person should look at, whatever the answer's values are."""
        findings = []
        places = self.notebook.places(exercise.name)
        if len(places) > 1:
            message = f"`{exercise.name}` is defined {len(places)} times; the last one counts."
            findings.append(Finding("defined twice", message, str(places[-1])))
        if place := self.notebook.looks_around(exercise.name):
            message = "Code reaches for what runs it, or hides what it calls. Read it."
            findings.append(Finding("looks around", message, str(place)))
        return tuple(findings)

    def _violation(self, exercise: Exercise) -> ExerciseResult | None:
        """What the text alone proves."""
        if found := self.notebook.forbidden(exercise.name, exercise.forbids):
            operator, place = found
            message = f"It calls `{operator}`, which this exercise asks you to write."
            finding = Finding("forbidden operator", f"The text names `{operator}`.", str(place))
            return self._result(exercise, "forbidden", message, "method", (), (finding,))
        if (
            exercise.kind == "kernel"
            and self.notebook.is_readable()
            and not self.notebook.may_launch(exercise.name)
        ):
            message = "Nothing that it calls launches a kernel of this notebook."
            return self._result(exercise, "forbidden", message, "method")
        return None

    def _kernels(self, truth: _Truth) -> tuple[str, str, str] | None:
        """What is wrong with kernels whose values are right: status, stage, sentence."""
        exercise = truth.exercise
        try:
            data = truth.cases[0].data
            error = self.session.compile_error(self._harness(truth), data)
            if error is not None:
                message = f"It runs in the interpreter and does not compile for a GPU: {error}"
                return "failed", "compiles", message
            case = truth.replay_case()
            if case is not None and exercise.budget.launches is not None:
                ran = self._call(truth, case, idle=True)
                if ran.error is None and compare(ran.value, truth.want(case)) is None:
                    message = (
                        "Its outputs are right even when its kernels do nothing: they are "
                        "computed elsewhere."
                    )
                    return "forbidden", "method", message
        except Fault as fault:
            return fault.status, "compiles", str(fault)
        return None

    def limit_memory(self, truths: list[_Truth], results: dict[str, ExerciseResult]) -> None:
        """Run the large cases of what passed so far, with memory limited from outside.

        The limits of one child can only go down, so the largest budget comes first.
        """
        waiting = []
        for truth in truths:
            case = truth.memory_case()
            if case is not None:
                waiting.append((_allowance(truth.exercise, case.data), truth, case))
        for allowed, truth, case in sorted(waiting, key=lambda each: -each[0]):
            problem = self._memory_problem(truth, case, allowed)
            if problem is not None and problem[0] == "memory":
                # Once more in a fresh child: what earlier calls left behind is not its fault.
                self.session.end()
                problem = self._memory_problem(truth, case, allowed)
            exercise, before = truth.exercise, results[truth.exercise.id]
            status, message = problem or ("passed", "")
            cases = (*before.cases, CaseResult(case.name, "method", status, message))
            if problem is None:
                results[exercise.id] = replace(before, cases=cases)
            else:
                results[exercise.id] = self._result(
                    exercise, status, f"{_of(case)}: {message}", "method", cases, before.findings
                )

    def _memory_problem(self, truth: _Truth, case: Case, allowed: int) -> tuple[str, str] | None:
        request = {
            **self._harness(truth),
            "interpreted": False,
            "metered": False,
            "trace": False,
            "idle": False,
        }
        try:
            self.session.limit_memory(allowed)
            ran = self.session.call(request, case.data, patience=3.0)
        except Fault as fault:
            # An allocation that is refused in the wrong place ends the process.
            status = "memory" if fault.status == "error" else fault.status
            return status, str(fault)
        except LookupError:
            return "failed", "It says that it is not written yet."
        if ran.error is not None:
            if getattr(ran.error, "out_of_memory", False):
                return "memory", "It needs far more memory than the budget allows."
            return "error", f"It raised {type(ran.error).__name__}."
        mismatch = compare(ran.value, truth.memory_want(case))
        return None if mismatch is None else ("failed", _hidden(mismatch))

    # Words.

    def _failed(
        self,
        attempt: Attempt,
        truth: _Truth,
        case: Case,
        public: bool,
        mismatch: Mismatch | None,
        cases: list[CaseResult],
        findings: tuple[Finding, ...],
    ) -> ExerciseResult:
        outcome = attempt.outcomes[-1][1]
        exercise = truth.exercise
        status, stage = "failed", case.stage
        if outcome.error is not None:
            status = "memory" if getattr(outcome.error, "out_of_memory", False) else "error"
            message = self._raised(outcome.error, public)
        elif mismatch is not None:
            message = mismatch.message if public else _hidden(mismatch)
            stage = "awkward" if stage == "method" else stage
        else:
            assert outcome.problem is not None
            message, stage = outcome.problem.message, "method"
        if exercise.kind in ("answer", "choice"):
            # The expected value would give the answer away.
            message = "Not this one."
        else:
            message = f"{_of(case)}: {message}"
        cases.append(CaseResult(case.name, case.stage, status, message))
        cause = find_cause(attempt)
        if cause is not None:
            message += f" {cause.question} ({cause.name})"
        return self._result(exercise, status, message, stage, tuple(cases), findings)

    def _raised(self, error: Exception, public: bool) -> str:
        """An exception in words. Its message may hold inputs, so only public cases show it."""
        if isinstance(error, KernelError):
            where = f" in `{error.source}`" if error.source else ""
            if not public:
                return f"{type(error).__name__}{where}."
            what = error.what[:1].upper() + error.what[1:].rstrip(". :")
            return f"{what}{where}. {error.advice}".rstrip()
        where = ""
        if isinstance(error, RemoteError) and error.place is not None:
            number, line = error.place
            text = self.cells[number - 1].line(line) if 0 < number <= len(self.cells) else ""
            where = f" Cell {number}, line {line}: `{text[:120]}`." if text else ""
        return f"It raised {summary(error) if public else type(error).__name__ + '.'}{where}"

    def _result(
        self,
        exercise: Exercise,
        status: str,
        message: str,
        stage: str = "defined",
        cases: tuple[CaseResult, ...] = (),
        findings: tuple[Finding, ...] = (),
    ) -> ExerciseResult:
        points = float(exercise.points)
        score = points if status == "passed" else 0.0
        feedback = message or "All cases pass."
        return ExerciseResult(exercise.id, score, points, status, stage, feedback, cases, findings)


def _of(case: Case) -> str:
    return f"“{case.name}”"


def _hidden(mismatch: Mismatch) -> str:
    """A difference on a hidden case: its kind, and nothing of the values."""
    if mismatch.kind == "value":
        return "Its values are wrong."
    if mismatch.kind == "finite":
        return "It returns NaN or infinity where it should not."
    if mismatch.kind in ("shape", "dtype"):
        return mismatch.message
    return f"An output should be {mismatch.expected}."


def _tells(data: Data) -> bool:
    """Whether a limit from outside can tell who breaks the budget from who keeps it.

    What such budgets forbid is a matrix over two long extents (queries × keys); with another of its
    kind, as its softmax, it must not fit into the slack.
    """
    tensors = [each for _, each in leaves(data) if isinstance(each, torch.Tensor) and each.ndim]
    longest = sorted((max(each.shape) * each.element_size() for each in tensors), reverse=True)
    if len(longest) < 2:
        return False
    itemsize = max(each.element_size() for each in tensors)
    return 2 * longest[0] * longest[1] // itemsize > MEMORY_SLACK


def _allowance(exercise: Exercise, data: Data) -> int:
    """Bytes that an answer within its budget may hold at once on a large case."""
    budget = exercise.budget
    if budget.peak_bytes is not None:
        return budget.peak_bytes(data)
    assert budget.largest_tensor is not None
    # Inputs, outputs and a handful of tiles.
    return 8 * budget.largest_tensor(data)


_COMPUTES_NOTHING = (
    "empty", "zeros", "ones", "full", "fill_", "copy_", "clone", "view", "reshape", "_to_copy",
    "as_strided", "detach", "slice", "select", "transpose", "permute", "t", "expand", "unsqueeze",
    "squeeze", "alias", "lift_fresh", "new_empty", "new_full", "new_zeros", "zero_", "contiguous",
    "empty_like", "zeros_like", "ones_like", "full_like", "set_", "resize_", "_unsafe_view",
    "empty_strided", "new_empty_strided", "arange", "scalar_tensor", "item", "_local_scalar_dense",
    "all", "any", "eq", "ne", "is_nonzero", "isnan", "isfinite",
)  # fmt: skip


def _findings(exercise: Exercise, case: Case, ran: Ran) -> tuple[Finding, ...]:
    """What the child measured of itself, where a person may want to know it."""
    if ran.usage is None:
        return ()
    findings = []
    ops = ran.usage.ops
    for name in exercise.forbids:
        if count := times_ran(name, ops):
            message = f"`{name}` ran {count} times inside the answer."
            findings.append(Finding("forbidden operator ran", message, case.name))
    if exercise.kind == "kernel":
        library = [name for name in ops if name.split("::")[-1] not in _COMPUTES_NOTHING]
        if library:
            shown = ", ".join(sorted(library)[:6])
            message = f"Beside its kernels the answer ran {shown}."
            findings.append(Finding("library operator", message, case.name))
    return tuple(findings)
