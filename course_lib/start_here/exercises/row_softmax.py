"""Exercise: two reductions of one row that stays on the chip."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton

GAP = "unused elements after each row of x"


def cases(size: str, seed: int) -> Iterable[Case]:
    """Matrices [M, N]; with a GAP, elements that are not theirs stand between two rows of x."""
    generator = torch.Generator().manual_seed(seed)

    def scores(m: int, n: int) -> torch.Tensor:
        return 2.0 * torch.randn(m, n, generator=generator)

    small = torch.tensor([[0.0, 1.0, 2.0], [-3.0, -5.0, -4.0]])
    yield Case("two rows of three", {"x": small})
    yield Case("rows of seven in a buffer nine wide", {"x": scores(5, 7), GAP: 2})
    far = torch.tensor([[200.0, 199.0, 190.0, 0.0, -9.0], [-200.0, -201.0, -203.0, -220.0, -300.0]])
    yield Case("scores near 200 and near -200", {"x": far}, "awkward")
    yield Case("rows of one", {"x": scores(3, 1), GAP: 1}, "awkward")
    yield Case("rows of 100", {"x": scores(3, 100), GAP: 4}, "method")


def harness(answer, data):
    """Lay the rows out with gaps of NaN between them; the output is dense and starts as NaN."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    m, n = data["x"].shape
    gap = data.get("unused elements after each row of x", 0)
    buffer = torch.full((m, n + gap), float("nan"), device=device)
    x = buffer[:, :n]
    x.copy_(data["x"])
    out = torch.full((m, n), float("nan"), device=device)
    answer(x, out)
    return out.cpu()


def oracle(data: Data) -> torch.Tensor:
    """From the logarithms of pairwise ratios, in fp64: p_i = 1 / sum_j exp(x_j - x_i)."""
    x = data["x"].double()
    return 1.0 / (x[:, None, :] - x[:, :, None]).exp().sum(dim=2)


@triton.jit
def _softmax(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * stride_om + offs_n, weights / tl.sum(weights, axis=0), mask=mask)


def row_softmax(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _softmax[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _two_rows(x_ptr, out_ptr, M, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0) * 2 + tl.arange(0, 2)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0)
    row_max = tl.max(tl.where(mask, x, float("-inf")), axis=1)
    row_max = tl.where(offs_m < M, row_max, 0.0)
    weights = tl.where(mask, tl.exp2((x - row_max[:, None]) * 1.4426950408889634), 0.0)
    row_sum = tl.where(offs_m < M, tl.sum(weights, axis=1), 1.0)
    out = weights / row_sum[:, None]
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :], out, mask=mask)


def two_rows_in_base_two(x: torch.Tensor, out: torch.Tensor) -> None:
    """Two rows a program, exponentials in base 2, masked by `tl.where`."""
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _two_rows[(triton.cdiv(m, 2),)](x, out, m, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _unmasked(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=offs_n < N, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * stride_om + offs_n, weights / tl.sum(weights, axis=0))


@misconception(
    "an access without a mask",
    question="Your kernel loads once and stores once. Do both have the mask?",
    says="This is what you get when the load or the store has no mask: the last row runs past the "
    "end.",
)
def unmasked(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _unmasked[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _no_max(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=float("-inf"))
    weights = tl.exp(x)
    tl.store(out_ptr + row * stride_om + offs_n, weights / tl.sum(weights, axis=0), mask=mask)


@misconception(
    "maximum not subtracted",
    question="What is exp(200) in fp32, and what is infinity divided by infinity?",
    says="This is what you get when exp is taken of the scores themselves: it overflows above 88 "
    "and vanishes below -104.",
)
def no_max(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _no_max[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _zero_lanes(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=0.0)
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * stride_om + offs_n, weights / tl.sum(weights, axis=0), mask=mask)


@misconception(
    "masked lanes counted in the sum",
    question="A masked lane holds 0. What is exp(0 - maximum), and is it part of your sum?",
    says="This is what you get with `other=0.0`: each masked lane is a score of 0 that was never "
    "there.",
)
def masked_lanes_counted(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _zero_lanes[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _zero_max(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=0.0)
    weights = tl.where(mask, tl.exp(x - tl.max(x, axis=0)), 0.0)
    tl.store(out_ptr + row * stride_om + offs_n, weights / tl.sum(weights, axis=0), mask=mask)


@misconception(
    "a maximum of zero",
    question="What is your maximum for a row in which every score is near -200?",
    says="This is what you get when masked lanes are 0 in the maximum: every exponential of a very "
    "negative row is 0.",
)
def maximum_of_zero(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _zero_max[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _no_other(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask)
    weights = tl.exp(x - tl.max(x, axis=0))
    tl.store(out_ptr + row * stride_om + offs_n, weights / tl.sum(weights, axis=0), mask=mask)


@misconception(
    "masked lanes without a value",
    question="Which value do masked lanes of your load have, and does it enter the sum?",
    says="This is what you get without `other=`: a GPU promises nothing about masked lanes, and "
    "the guard makes them NaN.",
)
def no_other(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _no_other[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@triton.jit
def _undivided(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=float("-inf"))
    tl.store(out_ptr + row * stride_om + offs_n, tl.exp(x - tl.max(x, axis=0)), mask=mask)


@misconception(
    "not divided by the sum",
    question="What do your weights of one row add up to?",
    says="This is what you get when the exponentials are stored without the division: the largest "
    "is always 1.",
)
def undivided(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _undivided[(m,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)


@misconception(
    "input's stride used for the output",
    question="Print `x.stride(0)` and `out.stride(0)` for this case. Which one does your store "
    "use?",
    says="This is what you get when the store uses the row stride of x: the output's rows lie "
    "closer together.",
)
def one_stride_for_both(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _softmax[(m,)](x, out, n, x.stride(0), x.stride(0), BLOCK_N=block)


@misconception(
    "width taken for the row stride",
    question="Print `x.shape[1]` and `x.stride(0)` for this case. Which of them leads to the next "
    "row?",
    says="This is what you get when rows are N apart in your offsets and further apart in memory.",
)
def width_as_stride(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _softmax[(m,)](x, out, n, n, n, BLOCK_N=triton.next_power_of_2(n))


EXERCISE = Exercise(
    id="start_here.row_softmax",
    kind="kernel",
    title="Rung 3: the softmax of each row",
    task=(
        "Write the softmax of every row of `x` into `out`, both `[M, N]`, with one load and one "
        "store a row. "
        "The two tensors have row strides of their own. Scores go up to 200 and down to −300. "
        "`out` starts as NaN."
    ),
    why="You have fused five PyTorch operations into one pass over memory: this is what kernels "
    "are for.",
    points=3,
    minutes=8,
    difficulty=2,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(row_softmax, two_rows_in_base_two),
    misconceptions=(
        unmasked,
        no_max,
        masked_lanes_counted,
        maximum_of_zero,
        no_other,
        undivided,
        one_stride_for_both,
        width_as_stride,
    ),
    hints=(
        "Re-read *Rung 3*. By hand: 0, 1, 2 in four lanes. The maximum is 2. What must exp give "
        "for the fourth lane?",
        "Every row of the result adds up to 1, and adding 100 to a row of x changes nothing. Print "
        "both.",
        "```python\nx = tl.load(x_ptr + ... + offs_n, mask=mask, other=...)\nweights = tl.exp(x - "
        "tl.max(..., axis=0))\n"
        "tl.store(out_ptr + ... + offs_n, weights / ..., mask=mask)\n```",
    ),
    budget=Budget(
        bytes_moved=lambda data: 2 * 4 * data["x"].numel(),
        launches=lambda data: 1,
    ),
    unlocks=("ragged_copy",),
    usual_failures=("other=0.0, taken over from rung 2", "one row stride for both tensors"),
)
