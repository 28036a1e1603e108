"""Every exercise of every chapter: right answers pass, wrong ones fail with their own words.

Two seeds by default, twenty with `--deep`.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from course_lib.grading import check
from course_lib.grading.check import evaluate
from course_lib.grading.compare import Expected, agree, compare, leaves
from course_lib.grading.exercise import (
    STAGES,
    Case,
    Exercise,
    Misconception,
    chapters,
    find_exercise,
)

EXERCISES = [exercise for chapter in chapters() for exercise in chapter.exercises]
MISTAKES = [(exercise, wrong) for exercise in EXERCISES for wrong in exercise.misconceptions]
CALLABLE = ("function", "kernel", "class")
PLAIN = (torch.Tensor, int, float, str, bool, type(None))

by_id = pytest.mark.parametrize(
    "exercise",
    [pytest.param(each, marks=pytest.mark.xdist_group(each.id)) for each in EXERCISES],
    ids=lambda exercise: exercise.id,
)


@pytest.fixture(autouse=True, scope="module")
def remembered() -> Iterator[None]:
    """Compute once what every wrong answer and every oracle does with a case.

    The search for a cause runs all misconceptions of an exercise beside each one. They are pure
    functions of case and seed, so it may be told what it saw before.
    """
    outcomes, truths = {}, {}
    really_run, really_expect = check.outcome_of, check.expected_of

    def remembered_outcome(exercise, answer, case, seed=0):
        key = exercise.id, exercise.harness, id(answer), case.name, seed
        if key not in outcomes:
            # The answer is kept as well, so that its id is not given to another.
            outcomes[key] = really_run(exercise, answer, case, seed), answer
        return outcomes[key][0]

    def remembered_expected(exercise, case, seed):
        key = exercise.id, exercise.accepts, case.name, seed
        if key not in truths:
            truths[key] = really_expect(exercise, case, seed)
        return truths[key]

    check.outcome_of, check.expected_of = remembered_outcome, remembered_expected
    yield
    check.outcome_of, check.expected_of = really_run, really_expect


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every test that asks for a seed two of them, or twenty."""
    if "seed" in metafunc.fixturenames:
        count = 20 if metafunc.config.getoption("--deep", default=False) else 2
        metafunc.parametrize("seed", range(count))


@by_id
def test_every_accepted_answer_passes(exercise: Exercise, seed: int) -> None:
    for answer in exercise.accepts:
        verdict = evaluate(exercise, answer, seed=seed)
        assert verdict.status == "passed", f"{getattr(answer, '__name__', answer)}: {verdict}"


@pytest.mark.parametrize(
    ("exercise", "wrong"),
    [
        pytest.param(exercise, wrong, marks=pytest.mark.xdist_group(exercise.id))
        for exercise, wrong in MISTAKES
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_every_misconception_is_rejected_clearly_and_named(exercise, wrong, seed: int) -> None:
    """It fails by its own name, and on some case by more than three times the tolerance."""
    verdict = evaluate(exercise, wrong.wrong, seed=seed)
    assert verdict.status == "failed", f"{wrong.name} was accepted"
    assert verdict.cause is not None, f"no cause was found: {verdict}"
    assert verdict.cause.name == wrong.name, f"taken for {verdict.cause.name!r}: {verdict}"
    by_value = verdict.stage in ("values", "awkward", "gradients") and verdict.error is None
    if by_value and not any(
        misses_clearly(exercise, wrong, case, seed) for case in exercise.cases("small", seed)
    ):
        pytest.fail(f"{wrong.name} is always within three times the tolerance: sharpen a case")


def misses_clearly(exercise: Exercise, wrong: Misconception, case: Case, seed: int) -> bool:
    """Whether a wrong answer raises on a case, or is off by more than three times the tolerance."""
    want = check.expected_of(exercise, case, seed)
    outcome = check.outcome_of(exercise, wrong.wrong, case, seed)
    triple = {path: 3 * tolerance for path, tolerance in want.tolerance.items()}
    return bool(
        outcome.error
        or outcome.problem
        or compare(outcome.value, Expected(want.oracle, want.like, triple))
    )


@by_id
def test_an_accepted_answer_needs_no_help_from_itself(exercise: Exercise, seed: int) -> None:
    """Left out of the calibration, an accepted answer passes all the same, or is said to be loose.

    A record whose third answer is honestly less exact than the others lists it to widen the
    tolerance; two of its answers must agree without that.
    """
    if exercise.kind not in CALLABLE:
        return
    alone = 0
    for left_out in exercise.accepts:
        rest = tuple(answer for answer in exercise.accepts if answer is not left_out)
        verdict = evaluate(replace(exercise, accepts=rest), left_out, seed=seed)
        alone += verdict.status == "passed"
    assert alone >= min(2, len(exercise.accepts) - 1)


def null_answers(like: torch.Tensor, data: dict) -> dict[str, torch.Tensor]:
    """Outputs that nobody computed, in place of a tensor like this one."""
    noise = torch.randn(like.shape, generator=torch.Generator().manual_seed(0))
    other_dtype = torch.float16 if like.dtype != torch.float16 else torch.float32
    nulls = {
        "zeros": torch.zeros_like(like),
        "ones": torch.ones_like(like),
        "noise": noise.to(like.dtype),
        "wrong dtype": like.to(other_dtype),
        "broadcastable": like[None],
    }
    if like.is_floating_point():
        nulls["nan"] = torch.full_like(like, math.nan)
    for name, value in data.items():
        if isinstance(value, torch.Tensor) and value.shape == like.shape:
            nulls[f"input {name}"] = value.clone()
    return nulls


def test_a_kernel_that_is_never_launched_fails() -> None:
    """Where the right output may equal an input, as in a copy, a launch is asked for."""
    copies = [each for each in EXERCISES if each.budget.launches and len(each.accepts) > 1]
    assert copies
    for exercise in copies:
        case = [each for each in exercise.cases("small", 0) if each.stage == "method"][-1]
        launched = check.outcome_of(exercise, exercise.accepts[0], case).value
        verdict = evaluate(
            replace(exercise, cases=lambda size, seed, case=case: [case]),
            lambda *args, launched=launched: launched,
            seed=0,
        )
        assert verdict.status == "failed", exercise.id


@by_id
def test_null_answers_fail(exercise: Exercise, seed: int) -> None:
    """An answer that returns such a thing on every case does not pass all of them."""
    passed: dict[str, bool] = {}
    for case in exercise.cases("small", seed):
        want = check.expected_of(exercise, case, seed)
        for path, like in leaves(want.like):
            if not isinstance(like, torch.Tensor) or like.numel() == 0:
                continue
            inputs = {} if exercise.budget.launches else case.data
            for name, null in null_answers(like, inputs).items():
                actual = _with_leaf(want.like, path, null)
                key = f"{path}: {name}"
                passed[key] = passed.get(key, True) and compare(actual, want) is None
        if not any(isinstance(leaf, torch.Tensor) for _, leaf in leaves(want.like)):
            for null in (None, "", 0, -1.0, math.nan):
                passed[repr(null)] = passed.get(repr(null), True) and compare(null, want) is None
    assert passed
    assert not [name for name, did in passed.items() if did]


def _with_leaf(tree, path: str, value, here: str = "output"):
    if here == path:
        return value
    if isinstance(tree, dict):
        return {k: _with_leaf(v, path, value, f"{here}[{k!r}]") for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_with_leaf(v, path, value, f"{here}[{i}]") for i, v in enumerate(tree))
    return tree


@by_id
def test_a_stub_is_still_to_do(exercise: Exercise) -> None:
    if exercise.kind in CALLABLE:

        def stub(*_args):
            raise NotImplementedError

        assert evaluate(exercise, stub, seed=0).status == "todo"
    else:
        assert evaluate(exercise, ..., seed=0).status == "todo"


@by_id
def test_an_answer_of_the_wrong_kind_gets_a_sentence(exercise: Exercise) -> None:
    for odd in (-12345, "?", [1], lambda: None, lambda *a: 1 / 0, lambda *a: sys.exit(3)):
        verdict = evaluate(exercise, odd, seed=0)
        assert verdict.status == "failed", odd
        assert verdict.message.endswith((".", "?"))
        assert verdict._repr_html_()


@by_id
def test_cases_are_plain_data_and_follow_the_seed(exercise: Exercise, seed: int) -> None:
    once = list(exercise.cases("small", seed))
    again = list(exercise.cases("small", seed))
    assert [case.name for case in once] == [case.name for case in again]
    assert len({case.name for case in once}) == len(once)
    for case, same in zip(once, again, strict=True):
        assert case.stage in STAGES
        for (path, a), (_, b) in zip(leaves(case.data), leaves(same.data), strict=True):
            assert isinstance(a, PLAIN), f"{case.name} {path}: {type(a)} cannot cross"
            if isinstance(a, torch.Tensor):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            else:
                assert a == b


@by_id
def test_the_harness_needs_nothing_but_itself(exercise: Exercise) -> None:
    """Its source alone, in an empty module, gives the same outputs."""
    namespace: dict = {}
    source = inspect.getsource(exercise.harness)
    exec("from __future__ import annotations\n" + source, namespace)
    alone = namespace[exercise.harness.__name__]
    case = next(iter(exercise.cases("small", 0)))
    want = check.expected_of(exercise, case, 0)
    again = check.outcome_of(replace(exercise, harness=alone), exercise.accepts[0], case)
    assert again.error is None
    assert agree(again.value, want.like, want)


@by_id
def test_the_record_is_complete(exercise: Exercise) -> None:
    assert exercise.name.isidentifier()
    assert 1 <= exercise.difficulty <= 5
    assert 1 <= exercise.points <= 20
    assert 1 <= exercise.minutes <= 60
    assert len(exercise.accepts) >= 2
    assert len(exercise.misconceptions) >= (6 if exercise.kind in CALLABLE else 2)
    assert len(exercise.hints) == 3
    assert all(len(hint) > 30 for hint in exercise.hints)
    names = [wrong.name for wrong in exercise.misconceptions]
    assert len(set(names)) == len(names)
    for wrong in exercise.misconceptions:
        assert wrong.question.endswith("?"), wrong.name
        assert wrong.says.endswith("."), wrong.name
    siblings = {each.name for each in EXERCISES if each.chapter == exercise.chapter}
    assert set(exercise.unlocks) <= siblings
    assert find_exercise(exercise.id) is exercise
    if exercise.kind == "choice":
        assert len(exercise.choices) >= 3
    has_budget = any(vars(exercise.budget).values()) or exercise.forbids
    stages = {case.stage for case in exercise.cases("small", 0)}
    assert not has_budget or "method" in stages, "limits are measured on method cases only"


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.slug)
def test_no_misconception_is_declared_and_forgotten(chapter) -> None:
    listed = {id(wrong) for exercise in chapter.exercises for wrong in exercise.misconceptions}
    for exercise in chapter.exercises:
        for name, value in vars(sys.modules[exercise.cases.__module__]).items():
            if isinstance(value, Misconception):
                assert id(value) in listed, f"{exercise.id}: {name} is in no exercise"


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.slug)
def test_names_are_unique_in_a_chapter(chapter) -> None:
    names = [exercise.name for exercise in chapter.exercises]
    assert len(set(names)) == len(names)
    assert all(exercise.chapter == chapter.package for exercise in chapter.exercises)


def test_a_failing_case_can_be_run_again_by_hand() -> None:
    exercise = find_exercise("flash_attention.online_softmax")
    verdict = evaluate(exercise, exercise.misconceptions[0].wrong, seed=0)
    assert verdict.rerun is not None
    want = check.expected_of(exercise, next(iter(exercise.cases("small", 0))), 0)
    assert compare(verdict.rerun(), want) is not None
