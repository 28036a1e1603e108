"""Exercise: a loop over K with an accumulator that stays on the chip."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton


def cases(size: str, seed: int) -> Iterable[Case]:
    """Matrices [M, K] and [K, N] in fp16; sizes pairwise different."""
    generator = torch.Generator().manual_seed(seed)

    def pair(m: int, k: int, n: int) -> Data:
        a = torch.randn(m, k, generator=generator).half()
        return {"a": a, "b": torch.randn(k, n, generator=generator).half()}

    whole = torch.randint(-4, 5, (2, 16, 16), generator=generator).half()
    yield Case("one tile of whole numbers, 16 × 16 × 16", {"a": whole[0], "b": whole[1]})
    yield Case("K = 48: one tile of output, three steps", pair(16, 48, 16))
    yield Case("M = 40, K = 32, N = 20: six tiles", pair(40, 32, 20), "awkward")
    yield Case("K = 21: the last step is partly filled", pair(16, 21, 16), "awkward")
    yield Case("M = 5, K = 37, N = 19", pair(5, 37, 19), "method")


def harness(answer, data):
    """Launch into an output that starts as NaN, on the GPU where there is one."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = data["a"].to(device), data["b"].to(device)
    out = torch.full((a.shape[0], b.shape[1]), float("nan"), device=device)
    answer(a, b, out)
    return out.cpu()


def oracle(data: Data) -> torch.Tensor:
    """The product in fp64, as a sum of outer products."""
    a, b = data["a"].double(), data["b"].double()
    return (a[:, :, None] * b[None, :, :]).sum(dim=1)


def _grid(out: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(out.shape[0], 16), triton.cdiv(out.shape[1], 16)


def _arguments(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> tuple:
    return a, b, out, *a.shape, b.shape[1], *a.stride(), *b.stride(), *out.stride()


@triton.jit
def _matmul(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
            stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        b_mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b_tile = tl.load(b_ptrs, mask=b_mask, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


def tiles(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _matmul[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@triton.jit
def _walking(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
             stride_om, stride_on, BLOCK_M: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    tiles_n = tl.cdiv(N, BLOCK)
    rows = (tl.program_id(0) // tiles_n * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(0) % tiles_n * BLOCK + tl.arange(0, BLOCK))[None, :]
    lane = tl.arange(0, BLOCK)
    a_ptrs = a_ptr + rows * stride_am + lane[None, :] * stride_ak
    b_ptrs = b_ptr + lane[:, None] * stride_bk + columns * stride_bn
    acc = tl.zeros([BLOCK_M, BLOCK], tl.float32)
    left = K
    while left > 0:
        a_tile = tl.load(a_ptrs, mask=(rows < M) & (lane < left)[None, :], other=0.0)
        b_tile = tl.load(b_ptrs, mask=(lane < left)[:, None] & (columns < N), other=0.0)
        acc += tl.dot(a_tile, b_tile)
        a_ptrs += BLOCK * stride_ak
        b_ptrs += BLOCK * stride_bk
        left -= BLOCK
    out_ptrs = out_ptr + rows * stride_om + columns * stride_on
    tl.store(out_ptrs, acc, mask=(rows < M) & (columns < N))


def walking_pointers(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    """Pointers that are moved along K, numbered tiles, another tile height."""
    grid = (triton.cdiv(out.shape[0], 32) * triton.cdiv(out.shape[1], 16),)
    _walking[grid](*_arguments(a, b, out), BLOCK_M=32, BLOCK=16)


@triton.jit
def _k_unmasked(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
                stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a_tile = tl.load(a_ptrs, mask=(offs_m < M)[:, None], other=0.0)
        b_tile = tl.load(b_ptrs, mask=(offs_n < N)[None, :], other=0.0)
        acc = tl.dot(a_tile, b_tile, acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "the tail of K not masked",
    question="In the last step of K = 21, which columns of `a` and rows of `b` do your lanes stand "
    "for?",
    says="This is what you get when M and N are masked and K is not: the last step runs past the "
    "rows of b.",
)
def k_tail_unmasked(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _k_unmasked[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@triton.jit
def _no_other(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
              stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        b_mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        acc = tl.dot(tl.load(a_ptrs, mask=a_mask), tl.load(b_ptrs, mask=b_mask), acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "masked lanes without a value",
    question="Masked lanes along K take part in every dot product. Which value leaves a sum of "
    "products unchanged?",
    says="This is what you get without `other=0.0`: a GPU promises nothing about masked lanes, and "
    "the guard makes them NaN.",
)
def no_other(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _no_other[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@misconception(
    "only the first step",
    question="Which columns of `a` does your kernel ever read?",
    says="This is what you get when nothing loops over K: the first 16 products are there, the "
    "others are missing.",
)
def only_first_step(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    tiles(a[:, :16], b[:16], out)


@triton.jit
def _overwritten(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
                 stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        b_mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        acc = tl.dot(a_tile, tl.load(b_ptrs, mask=b_mask, other=0.0))
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "accumulator overwritten",
    question="What does your accumulator hold after the second step: one product of tiles, or the "
    "sum of two?",
    says="This is what you get with `acc = tl.dot(a, b)`: each step replaces the sum instead of "
    "adding to it.",
)
def accumulator_overwritten(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _overwritten[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@triton.jit
def _half_acc(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
              stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float16)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        b_mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        acc += tl.dot(a_tile, tl.load(b_ptrs, mask=b_mask, other=0.0)).to(tl.float16)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "accumulator in fp16",
    question="How many significant digits does your accumulator keep between two steps?",
    says="This is what you get when the running sum is fp16: three digits, and every step rounds "
    "again.",
)
def accumulator_in_fp16(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _half_acc[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@misconception(
    "b read as its transpose",
    question="`b` is [K, N]. Which stride belongs to your offsets along K, and which to those "
    "along N?",
    says="This is what you get when the strides of b change places: that is `a @ b.T`.",
)
def b_transposed(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    arguments = (a, b, out, *a.shape, b.shape[1], *a.stride(), *b.stride()[::-1], *out.stride())
    _matmul[_grid(out)](*arguments, BLOCK=16)


@triton.jit
def _b_stays(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
             stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, BLOCK)
    b_ptrs = b_ptr + lane[:, None] * stride_bk + offs_n[None, :] * stride_bn
    b_tile = tl.load(b_ptrs, mask=(lane < K)[:, None] & (offs_n < N)[None, :], other=0.0)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + lane
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        acc = tl.dot(tl.load(a_ptrs, mask=a_mask, other=0.0), b_tile, acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "b does not move along K",
    question="In the second step, which rows of `b` meet the columns 16 to 31 of `a`?",
    says="This is what you get when a's tile advances along K and b's stays where it was.",
)
def b_stays(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _b_stays[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@triton.jit
def _whole_steps(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
                 stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for step in range(K // BLOCK):
        offs_k = step * BLOCK + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        b_mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b_tile = tl.load(b_ptrs, mask=b_mask, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "`K // BLOCK` steps",
    question="K is 21 and BLOCK is 16. How many steps does your loop take, and which columns of "
    "`a` does it reach?",
    says="This is what you get when the number of steps is rounded down: the last, partly filled "
    "step is missing. Use `tl.cdiv(K, BLOCK)` steps, or `range(0, K, BLOCK)`.",
)
def whole_steps_only(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _whole_steps[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@triton.jit
def _and(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
         stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] and (offs_k < K)[None, :]
        b_mask = (offs_k < K)[:, None] and (offs_n < N)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b_tile = tl.load(b_ptrs, mask=b_mask, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "`and` instead of `&`",
    question="What is `(offs_m < M)[:, None] and (offs_k < K)[None, :]`: a mask of 16 × 16, or one "
    "of its two parts?",
    says="This is what you get when only the second condition of each mask is in force, as with "
    "`and`: it does not look at each lane. `&` joins masks lane by lane.",
)
def and_for_ampersand(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _and[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@triton.jit
def _b_tile_turned(a_ptr, b_ptr, out_ptr, M, K, N, stride_am, stride_ak, stride_bk, stride_bn,
                   stride_om, stride_on, BLOCK: tl.constexpr):  # fmt: skip
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    for start in range(0, K, BLOCK):
        offs_k = start + tl.arange(0, BLOCK)
        a_mask = (offs_m < M)[:, None] & (offs_k < K)[None, :]
        b_mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[None, :] * stride_bk + offs_n[:, None] * stride_bn
        a_tile = tl.load(a_ptrs, mask=a_mask, other=0.0)
        b_tile = tl.load(b_ptrs, mask=b_mask, other=0.0)
        acc = tl.dot(a_tile, b_tile, acc)
    out_mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(
        out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on, acc, mask=out_mask
    )


@misconception(
    "b's tile turned over",
    question="`tl.dot` wants b's tile as [K, N]. In your address of `b`, is `offs_k` the column "
    "vector, `[:, None]`?",
    says="This is what you get when `offs_k[None, :]` stands in b's address: each tile is loaded "
    "as its transpose.",
)
def b_tile_turned(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _b_tile_turned[_grid(out)](*_arguments(a, b, out), BLOCK=16)


@misconception(
    "grid = (1, 1)",
    question="The output has 40 rows and 20 columns. How many tiles of 16 × 16 is that along each "
    "axis, and how many programs do you launch?",
    says="This is what you get when one program is launched: it computes the first tile, and "
    "nobody computes the others.",
)
def one_program(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _matmul[(1, 1)](*_arguments(a, b, out), BLOCK=16)


@misconception(
    "a grid of one axis",
    question="Your kernel asks for `tl.program_id(1)`. How many programs does your grid have along "
    "that axis?",
    says="This is what you get when the grid counts bands of rows only: each band has its first "
    "tile, and nothing to the right of it.",
)
def grid_of_one_axis(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _matmul[_grid(out)[:1]](*_arguments(a, b, out), BLOCK=16)


@misconception(
    "grid axes swapped",
    question="The output has 40 rows and 20 columns. How many tiles does `tl.program_id(0)` have "
    "to count?",
    says="This is what you get when the grid counts columns first and the kernel rows first.",
)
def grid_swapped(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    _matmul[_grid(out)[::-1]](*_arguments(a, b, out), BLOCK=16)


EXERCISE = Exercise(
    id="start_here.matmul",
    kind="kernel",
    title="Rung 5: a matrix product",
    task=(
        "Multiply `a`, `[M, K]`, by `b`, `[K, N]`, both fp16, into `out`, `[M, N]`, fp32, for any "
        "M, K and N. "
        "Each program owns one 16 × 16 tile of `out`, walks along K, and keeps its sum in fp32. "
        "`tl.dot` needs tiles of at least 16 in every direction. `out` starts as NaN: a NaN in "
        "your result is an element that no program wrote, or one that met a masked lane without a "
        "value. The grid is yours too."
    ),
    why="Two of these with a softmax between them are attention: you can now read the kernel of "
    "chapter 08.",
    points=5,
    minutes=20,
    difficulty=3,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(tiles, walking_pointers),
    misconceptions=(
        k_tail_unmasked,
        no_other,
        only_first_step,
        accumulator_overwritten,
        accumulator_in_fp16,
        b_transposed,
        b_stays,
        whole_steps_only,
        and_for_ampersand,
        b_tile_turned,
        one_program,
        grid_of_one_axis,
        grid_swapped,
    ),
    hints=(
        "Re-read *Rung 5*. By hand: [1 2 3] times a column of ones in steps of two. What does the "
        "second step add?",
        "After s steps the accumulator equals `a[:, :16 * s] @ b[:16 * s]`. Print both after the "
        "first step.",
        "```python\nacc = tl.zeros([BLOCK, BLOCK], tl.float32)\nfor start in range(0, K, BLOCK):\n "
        "   offs_k = start + tl.arange(0, BLOCK)\n"
        "    a_mask = (offs_m < M)[:, None] & (...)[None, :]\n    b_mask = (...)[:, None] & "
        "(offs_n < N)[None, :]\n"
        "    a_tile = tl.load(..., mask=a_mask, other=...)\n    b_tile = tl.load(..., mask=b_mask, "
        "other=...)\n"
        "    acc = tl.dot(..., ..., acc)\n```",
    ),
    budget=Budget(launches=lambda data: 1),
    usual_failures=(
        "leaves grid = (1, 1)",
        "masks M and N but not K",
        "advances a along K and not b",
    ),
)
