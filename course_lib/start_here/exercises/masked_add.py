"""Exercise: the mask that keeps a program inside its tensors."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton


def cases(size: str, seed: int) -> Iterable[Case]:
    """Lengths that are no multiples of a tile, one that is, and one below a tile."""
    generator = torch.Generator().manual_seed(seed)

    def pair(n: int) -> Data:
        x, y = torch.randn(2, n, generator=generator)
        return {"x": x, "y": y}

    few = {"x": torch.tensor([1.0, 2.0, 3.0]), "y": torch.tensor([10.0, 20.0, 30.0])}
    yield Case("three elements, one program", few)
    yield Case("150 elements, three programs", pair(150))
    yield Case("128 elements, two full programs", pair(128), "awkward")
    yield Case("one element", pair(1), "awkward")
    yield Case("100 elements", pair(100), "method")


def harness(answer, data):
    """Launch into an output that starts as NaN, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y = data["x"].to(device), data["y"].to(device)
    out = torch.full_like(x, float("nan"))
    answer(x, y, out)
    return out.cpu()


def oracle(data: Data) -> torch.Tensor:
    """The sum, in fp64."""
    return data["x"].double() + data["y"].double()


@triton.jit
def _masked(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


def masked(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _masked[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@triton.jit
def _whole(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        total = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
        total += tl.load(y_ptr + offs, mask=offs < n, other=0.0)
        tl.store(out_ptr + offs, total, mask=offs < n)


def one_program_walks(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    """One program goes over everything: correct, and slow on a GPU."""
    _whole[(1,)](x, y, out, x.numel(), BLOCK=32)


@triton.jit
def _unmasked(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)


@misconception(
    "an access without a mask",
    question="Your kernel touches memory in three lines. Which of them have `mask=`?",
    says="This is what you get when a load or the store has no mask: the last program runs past "
    "the end.",
)
def unmasked(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _unmasked[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@misconception(
    "grid rounded down",
    question="How many programs do you launch for three elements?",
    says="This is what you get when the grid is n // BLOCK: the last, partly filled tile has no "
    "program.",
)
def grid_rounded_down(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _masked[(x.numel() // 64,)](x, y, out, x.numel(), BLOCK=64)


@triton.jit
def _without_pid(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@misconception(
    "program id left out",
    question="Which offsets does program 1 compute, and which does program 0?",
    says="This is what you get when the offsets do not depend on the program: all programs do the "
    "first tile.",
)
def without_pid(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _without_pid[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@triton.jit
def _pid_unscaled(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@misconception(
    "program id not multiplied by BLOCK",
    question="Where does the tile of program 1 begin: at element 1, or at element BLOCK?",
    says="This is what you get when tiles begin at pid instead of pid * BLOCK: they overlap, and "
    "the rest is missing.",
)
def pid_unscaled(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _pid_unscaled[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@triton.jit
def _lane_mask(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    offs = tl.program_id(0) * BLOCK + lane
    x = tl.load(x_ptr + offs, mask=lane < n)
    y = tl.load(y_ptr + offs, mask=lane < n)
    tl.store(out_ptr + offs, x + y, mask=lane < n)


@misconception(
    "mask of the lane instead of the offset",
    question="Lane 30 of program 2 stands for which element? Is that number what you compare with "
    "n?",
    says="This is what you get when the lane's number, not the element's, is compared with n.",
)
def lane_mask(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _lane_mask[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@triton.jit
def _x_twice(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(x_ptr + offs, mask=offs < n)
    tl.store(out_ptr + offs, x + y, mask=offs < n)


@misconception(
    "x read twice",
    question="From which pointer does each of your two loads read?",
    says="This is what you get when both loads use x_ptr.",
)
def x_twice(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _x_twice[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@triton.jit
def _store_at_lane(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    offs = tl.program_id(0) * BLOCK + lane
    x = tl.load(x_ptr + offs, mask=offs < n)
    y = tl.load(y_ptr + offs, mask=offs < n)
    tl.store(out_ptr + lane, x + y, mask=offs < n)


@misconception(
    "stored at the lane instead of the offset",
    question="To which elements of `out` do programs 0 and 1 write?",
    says="This is what you get when the store has other offsets than the loads: all programs write "
    "the first tile.",
)
def store_at_lane(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _store_at_lane[(triton.cdiv(x.numel(), 64),)](x, y, out, x.numel(), BLOCK=64)


@misconception(
    "grid for another BLOCK",
    question="Multiply the size of your grid by BLOCK. Is that at least n?",
    says="This is what you get when the grid is computed with a larger BLOCK than the kernel is "
    "given.",
)
def grid_for_another_block(x: torch.Tensor, y: torch.Tensor, out: torch.Tensor) -> None:
    _masked[(triton.cdiv(x.numel(), 128),)](x, y, out, x.numel(), BLOCK=64)


EXERCISE = Exercise(
    id="start_here.masked_add",
    kind="kernel",
    title="Rung 1: the mask",
    task=(
        "Add `x` and `y` into `out`, all `[n]`, for any n. `masked_add` launches the kernel; the "
        "kernel is yours. "
        "Every element of `out` starts as NaN, so a NaN in your result is an element that no "
        "program wrote. If you passed it in the chapter, skip it."
    ),
    why="You can write a kernel that stays inside its tensors whatever their length.",
    points=2,
    minutes=5,
    difficulty=1,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(masked, one_program_walks),
    misconceptions=(
        unmasked,
        grid_rounded_down,
        without_pid,
        pid_unscaled,
        lane_mask,
        x_twice,
        store_at_lane,
        grid_for_another_block,
    ),
    hints=(
        "Re-read *One kernel*. By hand: n = 3 and BLOCK = 4. Which lane must do nothing, in all "
        "three accesses?",
        "`mask` must be true exactly n times over all programs. Print `(offs < n)` for the last "
        "program on paper.",
        "```python\noffs = ... * BLOCK + tl.arange(0, BLOCK)\nmask = ... < ...\nx = tl.load(x_ptr "
        "+ offs, mask=...)\n"
        "y = tl.load(y_ptr + offs, mask=...)\ntl.store(out_ptr + offs, x + y, mask=...)\n```",
    ),
    budget=Budget(
        bytes_moved=lambda data: 3 * 4 * data["x"].numel(),
        launches=lambda data: 1,
    ),
    unlocks=("row_sum",),
    usual_failures=("masks the loads and forgets the store", "compares the lane with n"),
)
