"""Exercise: a tile in two dimensions, with strides of its own on each side."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton


def cases(size: str, seed: int) -> Iterable[Case]:
    """Matrices [M, N]; "by columns" means that x lies in memory as its transpose."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, n, generator=generator)

    yield Case("one full tile, 8 × 16", {"x": matrix(8, 16), "layout": "by rows"})
    small = torch.arange(1.0, 7.0).reshape(2, 3)
    yield Case("two rows of three", {"x": small, "layout": "by rows"})
    yield Case("30 × 20, several tiles", {"x": matrix(30, 20), "layout": "by rows"})
    yield Case("9 × 21, stored by columns", {"x": matrix(9, 21), "layout": "by columns"}, "awkward")
    yield Case(
        "19 × 35, stored by columns", {"x": matrix(19, 35), "layout": "by columns"}, "method"
    )


def harness(answer, data):
    """Lay x out as asked; the output is stored by rows and starts as NaN."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = data["x"].to(device)
    if data["layout"] == "by columns":
        x = x.t().contiguous().t()
    out = torch.full(x.shape, float("nan"), device=device)
    answer(x, out)
    return out.cpu()


def oracle(data: Data) -> torch.Tensor:
    """The matrix itself."""
    return data["x"].double()


def _grid(x: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(x.shape[0], 8), triton.cdiv(x.shape[1], 16)


@triton.jit
def _copy(x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, x, mask=mask)


def tiles_in_a_grid(x: torch.Tensor, out: torch.Tensor) -> None:
    _copy[_grid(x)](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@triton.jit
def _numbered(x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    columns = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    inside = (rows < M) & (columns < N)
    x = tl.load(x_ptr + rows * stride_xm + columns * stride_xn, mask=inside, other=0.0)
    tl.store(out_ptr + rows * stride_om + columns * stride_on, x, mask=inside)


def numbered_tiles(x: torch.Tensor, out: torch.Tensor) -> None:
    """A one-dimensional grid; the program's number is taken apart."""
    m, n = x.shape
    grid = (triton.cdiv(m, 16) * triton.cdiv(n, 8),)
    _numbered[grid](x, out, m, n, *x.stride(), *out.stride(), BLOCK_M=16, BLOCK_N=8)


@triton.jit
def _rows_only(x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, x, mask=mask)


@misconception(
    "one axis not masked",
    question="A tile has 8 × 16 lanes and the matrix 2 × 3 elements. Which lanes does your mask "
    "switch off?",
    says="This is what you get when only rows, only columns, or one of the two accesses is masked.",
)
def one_axis_unmasked(x: torch.Tensor, out: torch.Tensor) -> None:
    _rows_only[_grid(x)](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@triton.jit
def _and(x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
         BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] and (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, x, mask=mask)


@misconception(
    "`and` instead of `&`",
    question="What is `(offs_m < M)[:, None] and (offs_n < N)[None, :]`: a mask of 8 × 16, or one "
    "of its two parts?",
    says="This is what you get when only columns are masked, as with `and`: it does not look at "
    "each lane, and hands on its second part. `&` joins masks lane by lane.",
)
def and_for_ampersand(x: torch.Tensor, out: torch.Tensor) -> None:
    _and[_grid(x)](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@misconception(
    "grid = (1, 1)",
    question="How many tiles of 8 × 16 does a matrix of 30 × 20 have along each axis, and how many "
    "programs do you launch?",
    says="This is what you get when one program is launched: it copies the first tile, and nobody "
    "copies the others.",
)
def one_program(x: torch.Tensor, out: torch.Tensor) -> None:
    _copy[(1, 1)](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@misconception(
    "a grid of one axis",
    question="Your kernel asks for `tl.program_id(1)`. How many programs does your grid have along "
    "that axis?",
    says="This is what you get when the grid counts bands of rows only: each band has its first "
    "tile, and nothing to the right of it.",
)
def grid_of_one_axis(x: torch.Tensor, out: torch.Tensor) -> None:
    _copy[_grid(x)[:1]](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@misconception(
    "strides swapped",
    question="By how many elements do you move in memory to reach the next row, and by how many to "
    "the next column?",
    says="This is what you get when the row offset is multiplied by the column stride, and the "
    "other way round.",
)
def strides_swapped(x: torch.Tensor, out: torch.Tensor) -> None:
    swapped = (x.stride(1), x.stride(0), out.stride(1), out.stride(0))
    _copy[_grid(x)](x, out, *x.shape, *swapped, BLOCK_M=8, BLOCK_N=16)


@misconception(
    "column stride taken for 1",
    question="Print `x.stride()` for this case. Are neighbours of one row neighbours in memory?",
    says="This is what you get when the column stride of x is assumed to be 1, as it is for a "
    "dense matrix only.",
)
def column_stride_of_one(x: torch.Tensor, out: torch.Tensor) -> None:
    strides = (x.stride(0), 1, out.stride(0), 1)
    _copy[_grid(x)](x, out, *x.shape, *strides, BLOCK_M=8, BLOCK_N=16)


@misconception(
    "input's strides used for the output",
    question="`x` is stored by columns here, and `out` by rows. Whose strides does your store use?",
    says="This is what you get when the output is addressed with the strides of the input.",
)
def strides_of_x_for_both(x: torch.Tensor, out: torch.Tensor) -> None:
    _copy[_grid(x)](x, out, *x.shape, *x.stride(), *x.stride(), BLOCK_M=8, BLOCK_N=16)


@misconception(
    "grid rounded down",
    question="How many programs do you launch for a matrix of 2 × 3?",
    says="This is what you get when the grid is M // BLOCK_M by N // BLOCK_N: partly filled tiles "
    "have no program.",
)
def grid_rounded_down(x: torch.Tensor, out: torch.Tensor) -> None:
    grid = (x.shape[0] // 8, x.shape[1] // 16)
    _copy[grid](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@misconception(
    "grid axes swapped",
    question="Which axis of the grid does `tl.program_id(0)` count, and how many tiles does that "
    "axis need?",
    says="This is what you get when the grid counts columns first and the kernel rows first.",
)
def grid_swapped(x: torch.Tensor, out: torch.Tensor) -> None:
    _copy[_grid(x)[::-1]](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@triton.jit
def _diagonal(x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, x, mask=mask)


@misconception(
    "one program id for both axes",
    question="Which tile does program (1, 0) own, and which program owns the tile to its right?",
    says="This is what you get when both axes use `tl.program_id(0)`: only tiles on the diagonal "
    "are copied.",
)
def diagonal(x: torch.Tensor, out: torch.Tensor) -> None:
    _diagonal[_grid(x)](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


@triton.jit
def _wrong_block(x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
                 BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x = tl.load(x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn, mask=mask)
    tl.store(out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, x, mask=mask)


@misconception(
    "rows counted in BLOCK_N",
    question="Where does the second tile from the top begin: at row BLOCK_M, or at row BLOCK_N?",
    says="This is what you get when the row's program id is multiplied by BLOCK_N: every second "
    "band of rows is skipped.",
)
def rows_in_block_n(x: torch.Tensor, out: torch.Tensor) -> None:
    _wrong_block[_grid(x)](x, out, *x.shape, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


EXERCISE = Exercise(
    id="start_here.ragged_copy",
    kind="kernel",
    title="Rung 4: a ragged copy in two dimensions",
    task=(
        "Copy `x` into `out`, both `[M, N]`, for any M and N and any strides, on a grid of tiles "
        "in two dimensions. "
        "In the last case `x` is stored by columns and `out` by rows. `out` starts as NaN: a NaN "
        "in your result is an element that no program wrote. The kernel is yours, and the grid too."
    ),
    why="You can address a tile of any strided tensor: the first five lines of nearly every "
    "kernel.",
    points=3,
    minutes=12,
    difficulty=3,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(tiles_in_a_grid, numbered_tiles),
    misconceptions=(
        one_axis_unmasked,
        strides_swapped,
        column_stride_of_one,
        strides_of_x_for_both,
        and_for_ampersand,
        one_program,
        grid_of_one_axis,
        grid_rounded_down,
        grid_swapped,
        diagonal,
        rows_in_block_n,
    ),
    hints=(
        "Re-read *Rung 4*. By hand: a matrix of 2 × 3, tiles of 2 × 2. Which programs are there, "
        "and which lanes does each mask?",
        "The address of (row, column) is `row * stride_xm + column * stride_xn`. Print both "
        "strides of `x` and of `x.t()`.",
        "```python\noffs_m = tl.program_id(0) * ... + tl.arange(0, BLOCK_M)\noffs_n = "
        "tl.program_id(1) * ... + tl.arange(0, BLOCK_N)\n"
        "mask = (offs_m < ...)[:, None] & (offs_n < ...)[None, :]\nx_ptrs = x_ptr + offs_m[:, "
        "None] * ... + offs_n[None, :] * ...\n```",
    ),
    budget=Budget(
        bytes_moved=lambda data: 2 * 4 * data["x"].numel(),
        launches=lambda data: 1,
    ),
    unlocks=("matmul",),
    usual_failures=(
        "leaves grid = (1, 1)",
        "masks rows and forgets columns",
        "one pair of strides for both tensors",
    ),
)
