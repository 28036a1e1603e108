"""What is special to the exercises of chapter 08: the numbers in their texts, and their time."""

from __future__ import annotations

import math
import time

import pytest
import torch

from course_lib.flash_attention.exercises import (
    CHAPTER,
    accepts_online_softmax,
    attention_backward,
    bytes_moved,
    causal_tiles,
    flash_forward,
    merge_states,
    one_pass_variance,
    online_softmax,
    safe_softmax,
    take_tile,
    two_new_tokens,
)
from course_lib.grading import compiles
from course_lib.grading.check import evaluate
from course_lib.grading.compiles import first_compile_error
from course_lib.runtime import crosscompile
from course_lib.runtime.tile import HAS_TRITON, tl, triton

RECORDS = {exercise.name: exercise for exercise in CHAPTER.exercises}
KERNELS = [exercise for exercise in CHAPTER.exercises if exercise.kind == "kernel"]

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
needs_compiler = pytest.mark.skipif(
    not HAS_TRITON or torch.cuda.is_available(), reason="compiles without a GPU"
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The chapter as a whole.


def test_core_first_and_within_its_time() -> None:
    core = [exercise.core for exercise in CHAPTER.exercises]
    assert core == sorted(core, reverse=True)
    minutes = sum(exercise.minutes for exercise in CHAPTER.exercises if exercise.core)
    assert 60 <= minutes <= 85


def test_kinds_are_mixed() -> None:
    assert {exercise.kind for exercise in CHAPTER.exercises} >= {
        "function",
        "kernel",
        "answer",
        "choice",
    }
    titles = " ".join(exercise.title for exercise in CHAPTER.exercises)
    for kind in ("Find the bug", "Transfer", "Write the test", "Published ≠ implemented"):
        assert kind in titles


def test_what_an_exercise_unlocks_comes_later() -> None:
    order = list(RECORDS)
    for exercise in CHAPTER.exercises:
        for name in exercise.unlocks:
            assert order.index(name) > order.index(exercise.name), (exercise.name, name)


@pytest.mark.parametrize("exercise", CHAPTER.exercises, ids=lambda exercise: exercise.name)
def test_a_check_takes_a_moment(exercise) -> None:
    """Twice, since the first one imports and compiles. CPU time: other work may be going on."""
    evaluate(exercise, exercise.accepts[0], seed=0)
    start = time.process_time()
    evaluate(exercise, exercise.accepts[0], seed=1)
    assert time.process_time() - start < 1.5


# The numbers that the texts name.


def test_exp_overflows_in_fp16_at_11_09() -> None:
    below, above = torch.tensor([11.0859375, 11.09375]).half()
    assert below.exp().isfinite()
    assert above.exp().isinf()
    assert round(math.log(65504), 2) == 11.09
    assert evaluate(RECORDS["overflow_score"], 11.09, seed=0).status == "passed"
    for near in (11.08, 11.1):
        assert evaluate(RECORDS["overflow_score"], near, seed=0).status == "passed"


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (11, "not to two decimals"),
        (11.05, "not to two decimals"),
        (11.2, "not to two decimals"),
        (12, "first whole number that overflows"),
        (88.7, "range of fp32"),
        (16, "base 2"),
        (65536, "the largest number itself"),
    ],
)
def test_a_number_near_a_known_mistake_is_known(answer: float, cause: str) -> None:
    verdict = evaluate(RECORDS["overflow_score"], answer, seed=0)
    assert verdict.status == "failed"
    assert verdict.cause is not None
    assert verdict.cause.name == cause


def test_hint_of_safe_softmax() -> None:
    terms = torch.tensor([10.0, 12.0]).exp()
    assert [round(term) for term in terms.tolist()] == [22026, 162755]
    assert safe_softmax.largest_exponent({}) < 12


@pytest.mark.parametrize(("tiles", "low", "high"), [(1, 1, 1), (2, 0.47, 0.53), (16, 0.05, 0.075)])
def test_how_often_a_missing_rescale_is_exact(tiles: int, low: float, high: float) -> None:
    scores = 3 * torch.randn(2000, 1024, generator=generator())
    row_max = torch.full([2000], -math.inf)
    row_sum = torch.zeros(2000)
    for tile in scores.chunk(tiles, dim=1):
        row_max = torch.maximum(row_max, tile.amax(1))
        row_sum = row_sum + (tile - row_max[:, None]).exp().sum(1)
    wide = scores.double()
    truth = (wide - wide.amax(1, keepdim=True)).exp().sum(1)
    exact = ((row_sum - truth).abs() <= 1e-5 * truth).double().mean()
    assert low <= exact <= high


def test_online_softmax_needs_a_late_maximum() -> None:
    """Sorted downwards, the missing rescale has error 0."""
    wrong = online_softmax.not_rescaled.wrong
    scores = torch.randn(64, generator=generator()).sort(descending=True).values
    row_max, row_sum = wrong(iter(scores.split(8)))
    true_max, true_sum = online_softmax.oracle({"scores": scores})
    torch.testing.assert_close(row_max.double(), true_max)
    torch.testing.assert_close(row_sum.double(), true_sum, rtol=1e-6, atol=0)


def test_the_merge_is_associative_and_commutative() -> None:
    case = next(c for c in merge_states.cases("small", 0) if c.name == "five parts, some empty")
    out, lse = case.data["out"], case.data["lse"]
    merge = merge_states.shifted
    ab, cd = merge(out[0], lse[0], out[1], lse[1]), merge(out[2], lse[2], out[3], lse[3])
    tree = merge(*merge(*cd, *ab), out[4], lse[4])
    for got, want in zip(tree, merge_states.oracle(case.data), strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


def test_an_empty_row_stays_empty() -> None:
    case = next(c for c in take_tile.cases("small", 0) if "every key" in c.name)
    for answer in take_tile.EXERCISE.accepts:
        row_max, row_sum, acc = take_tile.harness(answer, case.data)
        assert row_max.item() == -math.inf
        assert row_sum.item() == 0
        assert acc.item() == 0


def test_tiling_saves_nothing_at_64_rows_for_128_dimensions() -> None:
    naive, tiled = bytes_moved.one_length(8192, 128, 64, 2)
    assert (round(naive / 1e6), round(tiled / 1e6)) == (545, 541)
    ratio = [n / t for b in (32, 64, 128) for n, t in [bytes_moved.one_length(8192, 128, b, 2)]]
    assert ratio[0] < 0.6
    assert 0.95 < ratio[1] < 1.05
    assert ratio[2] > 1.9


def test_useless_tile_breaks_even() -> None:
    above, below = bytes_moved.one_length(8192, 96, 48, 4)
    assert below / above == pytest.approx(1, abs=0.01)
    for answer in (47, 48, 49, 47.7):
        assert evaluate(RECORDS["useless_tile"], answer, seed=0).status == "passed"


@pytest.mark.parametrize(("BLOCK_M", "megabytes"), [(32, 17.0), (64, 8.7), (128, 4.5)])
def test_bytes_read_by_tiles(BLOCK_M: int, megabytes: float) -> None:
    """The tile walker's meter: N = 1,024, d = 64, fp32, loads only (so without the output)."""
    _, tiled = bytes_moved.one_length(1024, 64, BLOCK_M, 4)
    read = tiled - 1024 * 64 * 4
    assert read / 1e6 == pytest.approx(megabytes, abs=0.06)


def test_variance_by_the_formula_cancels() -> None:
    x = torch.randn(100_000, generator=generator()) + 1000
    by_formula = float((x**2).mean() - x.mean() ** 2)
    truth = float(x.double().var(correction=0))
    assert abs(by_formula - truth) > 0.03
    for answer in one_pass_variance.EXERCISE.accepts:
        assert float(answer(iter(x.split(4096)))[1]) == pytest.approx(truth, rel=1e-4)


def test_hint_of_the_transfer() -> None:
    """Means 1.5 and 6, squares .5 and 0, together mean 3 and squares 14."""
    mean, variance = one_pass_variance.pairwise_merge(
        iter([torch.tensor([1.0, 2.0]), torch.tensor([6.0])])
    )
    assert float(mean) == 3
    assert 3 * float(variance) == pytest.approx(14)


def test_causal_visits_528_of_1024_tiles_and_masks_32() -> None:
    plan = causal_tiles.oracle({"Tq": 1024, "Tk": 1024, "BLOCK_M": 32, "BLOCK_N": 32})
    assert sum(end for _, end in plan) == 528
    assert sum(end - full for full, end in plan) == 32
    assert len(plan) * 32 == 1024


def test_rows_of_ds_sum_to_zero_only_with_delta() -> None:
    q, k, v, grad_out = torch.randn(4, 50, 16, generator=generator(), dtype=torch.float64)
    probs = torch.softmax(q @ k.T / 4, dim=1)
    dprobs = grad_out @ v.T
    delta = (grad_out * (probs @ v)).sum(1, keepdim=True)
    assert (probs * (dprobs - delta)).sum(1).abs().max() < 1e-14
    assert (probs * dprobs).sum(1).abs().max() > 0.5


def test_backward_by_finite_differences() -> None:
    """The oracle is autograd; this does not use it."""
    case = next(iter(attention_backward.cases("small", 0)))
    q, k, v = (case.data[name].double() for name in "qkv")
    grad_out = case.data["grad_out"].double()

    def loss(q, k, v):
        out = torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v
        return (out * grad_out).sum()

    for which, gradient in enumerate(attention_backward.oracle(case.data)):
        step = torch.zeros_like(gradient)
        step[0, 1] = 1e-6
        plus, minus = ([x.clone() for x in (q, k, v)] for _ in range(2))
        plus[which] += step
        minus[which] -= step
        slope = (loss(*plus) - loss(*minus)) / 2e-6
        assert float(slope) == pytest.approx(float(gradient[0, 1]), abs=1e-8)


def test_torch_aligns_new_tokens_at_the_top_left() -> None:
    assert two_new_tokens.measured({}) == "D"
    q = torch.randn(1, 1, 1, 8, generator=generator())
    k, v = torch.randn(2, 1, 1, 10, 8, generator=generator())
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(out[0, 0, 0], v[0, 0, 0])


def test_write_the_test_has_four_right_ones_of_fourteen() -> None:
    truth = accepts_online_softmax.oracle({})
    assert (len(truth), truth.count("accepted")) == (14, 4)
    right = accepts_online_softmax.random_rows
    for case in (
        *accepts_online_softmax.cases("small", 1),
        *accepts_online_softmax.cases("small", 2),
    ):
        assert accepts_online_softmax.harness(right, case.data) == truth


def test_write_the_test_is_not_passed_by_counting_calls() -> None:
    def counting(verdicts):
        answers = iter(verdicts)
        return lambda f: next(answers)

    truth = accepts_online_softmax.oracle({})
    first, second = (next(iter(accepts_online_softmax.cases("small", s))).data for s in (1, 2))
    learnt = [truth[i] == "accepted" for i in first["order"]]
    assert accepts_online_softmax.harness(counting(learnt), first) == truth
    assert accepts_online_softmax.harness(counting(learnt), second) != truth


def test_a_failing_test_says_which_implementation_it_misjudged() -> None:
    verdict = evaluate(RECORDS["accepts_online_softmax"], lambda f: True, seed=0)
    assert verdict.message.startswith("Your verdict on “its maximum is right, and its sum too")
    assert verdict.message.endswith("should be 'rejected'; it is 'accepted'.")
    assert verdict.cause is not None
    assert verdict.cause.name == "accepts everything"


@needs_triton
@pytest.mark.parametrize("block", [16, 32, 128])
def test_a_forgotten_key_mask_is_named_whatever_the_tile(block: int) -> None:
    """A learner's tile need not be that of the misconception."""
    without_mask = flash_forward._launch(block, block, bug=1)
    for seed in range(3):
        verdict = evaluate(RECORDS["flash_forward"], without_mask, seed=seed)
        assert "every score is -100" in str(verdict.case)
        assert verdict.cause is not None
        assert verdict.cause.name == "padded keys score 0, not -inf"


# Kernels.


@needs_triton
@pytest.mark.parametrize("exercise", KERNELS, ids=lambda exercise: exercise.name)
def test_an_answer_in_plain_torch_launches_nothing(exercise) -> None:
    def in_torch(*args):
        if exercise.name != "split_decode":
            q, k, v = args
            return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v
        q, k, v, _ = args
        k, v = (x.repeat_interleave(q.shape[0] // k.shape[0], dim=0) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q[:, None], k, v)[:, 0]

    verdict = evaluate(exercise, in_torch, seed=0)
    assert (verdict.status, verdict.stage) == ("failed", "method")
    assert "no kernel" in verdict.message


@needs_compiler
@pytest.mark.parametrize("exercise", KERNELS, ids=lambda exercise: exercise.name)
def test_accepted_kernels_compile_quickly(exercise) -> None:
    data = next(iter(exercise.cases("small", 0))).data
    for answer in exercise.accepts:
        assert first_compile_error(exercise.harness, answer, data) is None
        start = time.process_time()
        assert first_compile_error(exercise.harness, answer, data) is None
        assert time.process_time() - start < 0.5  # remembered


if HAS_TRITON:

    @triton.jit
    def helper_with_a_bad_axis(x):
        """Fail inside a device function."""
        return tl.sum(x, axis=2)

    @triton.jit
    def odd_kernel(x_ptr, out_ptr, N: tl.constexpr, MODE: tl.constexpr):
        """Do something that the compiler refuses; the mode says what."""
        x = tl.load(x_ptr + tl.arange(0, N))
        if MODE == "raise":
            raise ValueError("no")
        elif MODE == "name":
            x = x + no_such_name  # noqa: F821 # pyright: ignore[reportUndefinedVariable]
        elif MODE == "helper":
            x = x + helper_with_a_bad_axis(x[:, None])
        elif MODE == "48":
            x = x + tl.sum(tl.arange(0, 48), axis=0)
        tl.store(out_ptr + tl.arange(0, N), x)


@needs_compiler
@pytest.mark.parametrize(
    ("mode", "line", "message"),
    [
        ("raise", 'raise ValueError("no")', "Raise"),
        ("name", "no_such_name", "not defined"),
        ("helper", "tl.sum(x, axis=2)", "invalid axis"),
        ("48", "tl.arange(0, 48)", "power of 2"),
    ],
)
def test_a_compiler_message_is_one_line_with_the_learners_line(mode, line, message) -> None:
    x = torch.zeros(64)
    launch = compiles._seen(odd_kernel, (x, x), {"N": 64, "MODE": mode})
    error = compiles._compile_error(launch)
    assert error is not None
    assert "\n" not in error
    assert line in error
    assert message in error


@needs_compiler
def test_too_much_shared_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small kernel on a chip with less than it needs: a large one would take minutes."""
    exercise = KERNELS[0]
    data = next(iter(exercise.cases("small", 0))).data
    monkeypatch.setitem(crosscompile.SHARED_MEMORY, compiles.ARCHITECTURE, 16)
    launch = compiles._launches(exercise.harness, exercise.accepts[0], data)[0]
    error = compiles._compile_error(launch)
    assert error is not None
    assert "shared memory" in error


@needs_triton
def test_a_launch_is_described_as_the_compiler_wants_it() -> None:
    x = torch.zeros(64, dtype=torch.float16)
    kernel = KERNELS[0].accepts[0].__globals__["attention_kernel"]
    arguments = (x, x.float(), x.long(), x, 3, 0.5)
    launch = compiles._seen(kernel, arguments, {"D": 16, "BLOCK": 32, "BUG": 0, "num_warps": 8})
    assert launch is not None
    assert list(launch.signature.values()) == ["*fp16", "*fp32", "*i64", "*fp16", "i32", "fp32"]
    assert launch.constexprs == {"D": 16, "BLOCK": 32, "BUG": 0}
    assert (launch.num_warps, launch.num_stages) == (8, 3)
    assert (
        compiles._seen(kernel, (object(), *arguments[1:]), {"D": 16, "BLOCK": 32, "BUG": 0}) is None
    )


@needs_triton
def test_noting_launches_leaves_triton_as_it_was() -> None:
    from triton.runtime.jit import JITFunction

    before = JITFunction.run
    exercise = KERNELS[0]
    data = next(iter(exercise.cases("small", 0))).data
    compiles._launches(exercise.harness, exercise.accepts[0], data)
    assert JITFunction.run is before
