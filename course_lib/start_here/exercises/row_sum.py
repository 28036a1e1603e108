"""Exercise: one program a row, and the first reduction."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton

GAP = "unused elements after each row"


def cases(size: str, seed: int) -> Iterable[Case]:
    """Matrices [M, N]; with a GAP, elements that are not theirs stand between two rows."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=generator) + 0.5

    small = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]])
    yield Case("two rows of three", {"x": small})
    yield Case("five rows of seven", {"x": matrix(5, 7)})
    yield Case("rows of seven in a buffer nine wide", {"x": matrix(3, 7), GAP: 2}, "awkward")
    yield Case("rows of one", {"x": matrix(3, 1), GAP: 3}, "awkward")
    yield Case("rows of 16, a power of two", {"x": matrix(2, 16)}, "awkward")
    yield Case("rows of 300", {"x": matrix(4, 300), GAP: 5}, "method")


def harness(answer, data):
    """Lay the rows out with gaps of NaN between them; the output starts as NaN."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    m, n = data["x"].shape
    gap = data.get("unused elements after each row", 0)
    buffer = torch.full((m, n + gap), float("nan"), device=device)
    x = buffer[:, :n]
    x.copy_(data["x"])
    out = torch.full((m,), float("nan"), device=device)
    answer(x, out)
    return out.cpu()


def oracle(data: Data) -> torch.Tensor:
    """Sums in fp64."""
    return data["x"].double().sum(dim=1)


@triton.jit
def _row(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=offs_n < N, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


def one_row_a_program(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _row[(m,)](x, out, n, x.stride(0), BLOCK_N=triton.next_power_of_2(n))


@triton.jit
def _in_pieces(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row_ptr = x_ptr + tl.program_id(0) * stride_xm
    offs_n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, N, BLOCK_N):
        acc += tl.load(row_ptr + start + offs_n, mask=start + offs_n < N, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(acc, axis=0))


def row_in_pieces(x: torch.Tensor, out: torch.Tensor) -> None:
    _in_pieces[(x.shape[0],)](x, out, x.shape[1], x.stride(0), BLOCK_N=64)


@triton.jit
def _four_rows(x_ptr, out_ptr, M, N, stride_xm, BLOCK_N: tl.constexpr):
    offs_m = tl.program_id(0) * 4 + tl.arange(0, 4)
    offs_n = tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_m, tl.sum(x, axis=1), mask=offs_m < M)


def four_rows_a_program(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    block = triton.next_power_of_2(n)
    _four_rows[(triton.cdiv(m, 4),)](x, out, m, n, x.stride(0), BLOCK_N=block)


@triton.jit
def _unmasked(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    x = tl.load(x_ptr + row * stride_xm + tl.arange(0, BLOCK_N))
    tl.store(out_ptr + row, tl.sum(x, axis=0))


@misconception(
    "no mask",
    question="A row of three is loaded with four lanes. Which element does the fourth lane read?",
    says="This is what you get without a mask: each row reads into the next one, and the last row "
    "past the end.",
)
def unmasked(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _unmasked[(m,)](x, out, n, x.stride(0), BLOCK_N=triton.next_power_of_2(n))


@triton.jit
def _no_other(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=offs_n < N)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


@misconception(
    "masked lanes without a value",
    question="Print `x` in the kernel. What does the fourth, masked lane hold when `tl.sum` adds "
    "all four?",
    says="This is what you get without `other=`: the load leaves masked lanes without a value, the "
    "guard makes that NaN, and one NaN makes the sum NaN. The store is innocent.",
)
def no_other(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _no_other[(m,)](x, out, n, x.stride(0), BLOCK_N=triton.next_power_of_2(n))


@triton.jit
def _other_inf(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=offs_n < N, other=float("-inf"))
    tl.store(out_ptr + row, tl.sum(x, axis=0))


@misconception(
    "filled for a maximum",
    question="Which number can be added to any sum without changing it?",
    says="This is what you get when masked lanes are -inf: right for a maximum, not for a sum.",
)
def other_is_minus_infinity(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _other_inf[(m,)](x, out, n, x.stride(0), BLOCK_N=triton.next_power_of_2(n))


@misconception(
    "BLOCK_N smaller than the row",
    question="How many elements of a row of seven does your program load?",
    says="This is what you get when BLOCK_N is less than N and nothing loops: the end of the row "
    "is missing.",
)
def block_too_small(x: torch.Tensor, out: torch.Tensor) -> None:
    _row[(x.shape[0],)](x, out, x.shape[1], x.stride(0), BLOCK_N=4)


@misconception(
    "width taken for the row stride",
    question="Print `x.shape[1]` and `x.stride(0)` for this case. Which of them leads to the next "
    "row?",
    says="This is what you get when rows are N apart in your offsets and further apart in memory.",
)
def width_as_stride(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _row[(m,)](x, out, n, n, BLOCK_N=triton.next_power_of_2(n))


@triton.jit
def _first_row(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + offs_n, mask=offs_n < N, other=0.0)
    tl.store(out_ptr + tl.program_id(0), tl.sum(x, axis=0))


@misconception(
    "every program reads row 0",
    question="Which part of your load's address depends on the program?",
    says="This is what you get when `row * stride_xm` is missing from the load.",
)
def first_row(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _first_row[(m,)](x, out, n, x.stride(0), BLOCK_N=triton.next_power_of_2(n))


@triton.jit
def _one_place(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    offs_n = tl.arange(0, BLOCK_N)
    row_ptr = x_ptr + tl.program_id(0) * stride_xm
    tl.store(out_ptr, tl.sum(tl.load(row_ptr + offs_n, mask=offs_n < N, other=0.0), axis=0))


@misconception(
    "all programs write one element",
    question="To which element of `out` does program 1 write?",
    says="This is what you get when the store's address does not depend on the program.",
)
def one_place(x: torch.Tensor, out: torch.Tensor) -> None:
    m, n = x.shape
    _one_place[(m,)](x, out, n, x.stride(0), BLOCK_N=triton.next_power_of_2(n))


@triton.jit
def _column(x_ptr, out_ptr, M, stride_xm, BLOCK_M: tl.constexpr):
    column = tl.program_id(0)
    offs_m = tl.arange(0, BLOCK_M)
    x = tl.load(x_ptr + column + offs_m * stride_xm, mask=offs_m < M, other=0.0)
    tl.store(out_ptr + column, tl.sum(x, axis=0))


@misconception(
    "columns summed",
    question="Do neighbouring lanes of your load lie beside each other, or below each other?",
    says="This is what you get when the stride multiplies the lanes instead of the row.",
)
def columns(x: torch.Tensor, out: torch.Tensor) -> None:
    m = x.shape[0]
    _column[(m,)](x, out, m, x.stride(0), BLOCK_M=triton.next_power_of_2(m))


EXERCISE = Exercise(
    id="start_here.row_sum",
    kind="kernel",
    title="Rung 2: the sum of each row",
    task=(
        "Sum every row of `x`, `[M, N]`, into `out`, `[M]`. One program owns one row, and "
        "`BLOCK_N` is N rounded up to "
        "a power of two. Rows may lie further apart than N: the distance is `x.stride(0)`. `out` "
        "starts as NaN: a NaN in your result is an element that no program wrote, or a masked lane "
        "without a value that was added up."
    ),
    why="You can map programs to rows and reduce along an axis, which is half of every softmax.",
    points=3,
    minutes=8,
    difficulty=2,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(one_row_a_program, row_in_pieces, four_rows_a_program),
    misconceptions=(
        unmasked,
        no_other,
        other_is_minus_infinity,
        block_too_small,
        width_as_stride,
        first_row,
        one_place,
        columns,
    ),
    hints=(
        "Re-read *Rung 2*. By hand: rows 1, 2, 3 and 4, 5, 7, four lanes. What must the fourth "
        "lane hold so that the sums are 6 and 16?",
        "The address of element (row, column) is `x_ptr + row * stride + column`. Write down the "
        "stride of "
        "`torch.empty(3, 9)[:, :7]`, then print it.",
        "```python\nrow = tl.program_id(0)\noffs_n = tl.arange(0, BLOCK_N)\nx = tl.load(x_ptr + "
        "... + offs_n, mask=..., other=...)\n"
        "tl.store(out_ptr + ..., tl.sum(x, axis=0))\n```",
    ),
    budget=Budget(
        bytes_moved=lambda data: 4 * (data["x"].numel() + data["x"].shape[0]),
        launches=lambda data: 1,
    ),
    unlocks=("row_softmax",),
    usual_failures=("uses N where the row stride belongs", "leaves `other=` out"),
)
