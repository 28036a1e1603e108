"""Exercise: the open kernel. Any number of queries and keys, D = 72, rows with a stride."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton


def cases(size: str, seed: int) -> Iterable[Case]:
    """Inputs q [M, D], k and v [N, D] in fp32, and the columns between their rows."""
    generator = torch.Generator().manual_seed(seed)

    def data(M: int, N: int, D: int, gap: int = 0) -> Data:
        q = 2 * torch.randn(M, D, generator=generator)
        k, v = torch.randn(2, N, D, generator=generator)
        return {"q": q, "k": k, "v": v, "gap": gap}

    # Every score is 20 · -20 / 4. A key past the end would score 0 and outweigh them all, whatever
    # the tile, and the average of ones is 1.
    q, k = torch.zeros(3, 16), torch.zeros(5, 16)
    q[:, 0], k[:, 0] = 20.0, -20.0
    yield Case(
        "3 queries, 5 keys, D = 16: every score is -100 and every v is 1",
        {"q": q, "k": k, "v": torch.ones(5, 16), "gap": 0},
    )
    q, k, v = torch.zeros(1, 16), torch.zeros(2, 16), torch.zeros(2, 16)
    q[:, 0], k[1, 0], v[1] = 4.0, math.log(3.0), 4.0
    yield Case(
        "1 query, 2 keys, D = 16: the second scores ln 3 higher, its v is 4, the other's 0",
        {"q": q, "k": k, "v": v, "gap": 0},
    )
    yield Case("16 queries, 16 keys, D = 16", data(16, 16, 16))
    yield Case("3 queries, 5 keys, D = 16", data(3, 5, 16))
    yield Case("70 queries, 150 keys, D = 16", data(70, 150, 16), "awkward")
    low = data(20, 40, 16)
    low["q"][:, 0], low["k"][:, 0] = 20.0, -20.0
    yield Case("every score is near -100", low, "awkward")
    yield Case("rows lie 5 elements apart, D = 24", data(17, 33, 24, gap=5), "awkward")
    M, N = (90, 130) if size == "small" else (4000, 3000)
    yield Case(f"{M:,} queries, {N:,} keys, D = 72", data(M, N, 72), "method")


def harness(answer, data):
    """Call the launcher; with a gap, the tensors are columns of wider ones that hold NaN beside."""
    import torch

    def spaced(x):
        wide = torch.full([x.shape[0], x.shape[1] + data["gap"]], float("nan"), device=x.device)
        wide[:, : x.shape[1]] = x
        return wide[:, : x.shape[1]]

    q, k, v = (spaced(data[name]) if data["gap"] else data[name] for name in "qkv")
    return answer(q, k, v)


def oracle(data: Data) -> torch.Tensor:
    """The formula, with the whole matrix, in fp64."""
    q, k, v = (data[name].double() for name in "qkv")
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


@triton.jit
def flash_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_q,
    stride_k,
    stride_v,
    M,
    N,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BUG: tl.constexpr,
):
    """A program owns BLOCK_M queries. BUG 0 is right, the others are the misconceptions."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = (offs_m < M)[:, None]
    mask_d = (offs_d < (BLOCK_D if BUG == 3 else D))[None, :]
    q_mask = mask_d if BUG == 14 else mask_m & mask_d
    q_tile = tl.load(q_ptr + offs_m[:, None] * stride_q + offs_d[None, :], mask=q_mask, other=0.0)
    # What masked lanes of k hold.
    fill = float("-inf") if BUG == 11 else 0.0
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    last = (N // BLOCK_N) * BLOCK_N if BUG == 7 else N
    for start in range(0, last, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask = (offs_n < (2147483647 if BUG == 2 else N))[:, None] & mask_d
        k_tile = tl.load(
            k_ptr + offs_n[:, None] * stride_k + offs_d[None, :], mask=mask, other=fill
        )
        v_tile = tl.load(v_ptr + offs_n[:, None] * stride_v + offs_d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
        if BUG != 1 and BUG != 9 and BUG != 11:
            scores = tl.where((offs_n < N)[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp(row_max - new_max)
        weights = tl.exp(scores - new_max[:, None])
        if BUG == 9:
            weights = tl.where((offs_n < N)[None, :], weights, 0.0)
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        if BUG != 10:
            acc = acc * rescale[:, None]
        acc += tl.dot(weights, v_tile, input_precision="ieee")
        row_max = new_max
    store_mask = mask_m & mask_d
    if BUG == 4:
        store_mask = mask_d
    if BUG == 13:
        store_mask = mask_m
    rows = offs_m[:, None] * (stride_q if BUG == 15 else D)
    tl.store(out_ptr + rows + offs_d[None, :], acc / row_sum[:, None], mask=store_mask)


def _launch(block_m: int = 64, block_n: int = 64, bug: int = 0) -> Callable[..., torch.Tensor]:
    def flash_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (M, D), N = q.shape, k.shape[0]
        BLOCK_D = max(16, triton.next_power_of_2(D))
        # Rows that nobody writes are zero here, so that mistakes look the same every time.
        out = torch.zeros(M, D, dtype=q.dtype, device=q.device)
        grid = (M // block_m if bug == 6 else triton.cdiv(M, block_m),)
        strides = (D, D, D) if bug == 8 else (q.stride(0), k.stride(0), v.stride(0))
        scale = 1.0 if bug == 12 else (BLOCK_D if bug == 5 else D) ** -0.5
        flash_kernel[grid](
            q, k, v, out, *strides, M, N, scale, D, BLOCK_D, block_m, block_n, BUG=bug
        )
        return out

    return flash_forward


@triton.jit
def advancing_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    stride_q,
    stride_k,
    stride_v,
    M,
    N,
    scale_log2,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """In base 2, with pointers that advance, and keys transposed as they are loaded."""
    start_m = tl.program_id(0) * BLOCK_M
    rows, keys, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    inside = dims < D
    valid = (start_m + rows < M)[:, None] & inside[None, :]
    q_tile = tl.load(q_ptr + (start_m + rows)[:, None] * stride_q + dims, mask=valid, other=0.0)
    q_tile = q_tile * scale_log2
    k_ptrs = k_ptr + keys[None, :] * stride_k + dims[:, None]
    v_ptrs = v_ptr + keys[:, None] * stride_v + dims[None, :]
    top = tl.full([BLOCK_M], -1.0e30, tl.float32)  # finite: no row here is without a key
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for left in range(N, 0, -BLOCK_N):
        here = keys < left
        k_tile = tl.load(k_ptrs, mask=inside[:, None] & here[None, :], other=0.0)
        v_tile = tl.load(v_ptrs, mask=here[:, None] & inside[None, :], other=0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        scores = scores + tl.where(here, 0.0, float("-inf"))[None, :]
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        factor = tl.exp2(top - new_top)
        total = total * factor + tl.sum(weights, 1)
        acc = tl.dot(weights, v_tile, acc * factor[:, None], input_precision="ieee")
        top = new_top
        k_ptrs += BLOCK_N * stride_k
        v_ptrs += BLOCK_N * stride_v
    out_ptrs = out_ptr + (start_m + rows)[:, None] * D + dims[None, :]
    tl.store(out_ptrs, acc * (1.0 / total)[:, None], mask=valid)


def advancing(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    (M, D), N = q.shape, k.shape[0]
    out = q.new_empty(M, D)
    strides = (x.stride(0) for x in (q, k, v))
    scale_log2 = math.log2(math.e) / math.sqrt(D)
    advancing_kernel[(triton.cdiv(M, 32),)](
        q,
        k,
        v,
        out,
        *strides,
        M,
        N,
        scale_log2,
        D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)),
        BLOCK_M=32,
        BLOCK_N=64,
        num_warps=4,
    )
    return out


square_tiles = _launch()

MISTAKES = tuple(
    misconception(name, question=question, says=f"This is what you get when {says}.")(
        _launch(bug=bug) if bug else _launch(block_m=16)
    )
    for bug, name, question, says in (
        (
            1,
            "padded keys score 0, not -inf",
            "A masked load gives zeros, so a key past the end scores 0. What does it weigh beside "
            "keys that score -100?",
            "keys past the end keep the score 0 instead of -inf: each of them then has a weight",
        ),
        (
            2,
            "keys loaded past the end",
            "5 keys, a tile of 64: which addresses do the other 59 lanes read?",
            "the loads of k and v have no mask over the keys",
        ),
        (
            3,
            "columns past D",
            "D = 72 lies in a tile of 128. What lies in memory behind column 71?",
            "the loads are not masked over D: they read on into the next row",
        ),
        (
            4,
            "rows stored past the end",
            "70 queries, tiles of 64: whose memory do rows 70 to 127 belong to?",
            "the store has no mask over the queries",
        ),
        (
            5,
            "scale from the padded D",
            "Is the scale 1/sqrt(72), or 1/sqrt(128)?",
            "the scale is taken from BLOCK_D instead of D",
        ),
        (
            6,
            "last queries left out",
            "How many tiles of 64 cover 70 queries?",
            "the grid is rounded down: the last rows are never written",
        ),
        (
            7,
            "last keys left out",
            "How many tiles of 64 cover 150 keys?",
            "the loop over the keys is rounded down",
        ),
        (
            8,
            "row stride taken for D",
            "`q` may be a part of a wider tensor. How far apart are its rows?",
            "rows are taken to lie D elements apart instead of `q.stride(0)`",
        ),
        (
            10,
            "output not rescaled",
            "`row_sum` shrinks when the maximum rises. What else was measured from the old one?",
            "the accumulator is not rescaled after a new maximum",
        ),
        (
            9,
            "weights masked, maximum not",
            "The keys past the end weigh nothing now. Do their scores of 0 still enter the "
            "maximum?",
            "the weights past the end are set to 0, but their scores took part in the maximum: "
            "where the real ones lie far below 0, their weights underflow",
        ),
        (
            11,
            "keys filled with -inf",
            "A key of -inf times a query whose elements are 0, 2 and -3: what are the products?",
            "the load of k fills with -inf: the product with a query is NaN, +inf or -inf. The "
            "score must be -inf, so it is the scores that need `tl.where`",
        ),
        (
            12,
            "no scale",
            "How large are the scores of random queries and keys when D grows?",
            "1/sqrt(D) is missing",
        ),
        (
            13,
            "columns stored past D",
            "D = 24 lies in a tile of 32. Where do columns 24 to 31 land in `out`?",
            "the store has no mask over D: it writes on into the next row",
        ),
        (
            14,
            "queries loaded past the end",
            "3 queries, a tile of 64: which addresses do the other 61 rows read?",
            "the load of q has no mask over the queries",
        ),
        (
            15,
            "output stored with q's stride",
            "`out` is contiguous and `q` need not be. How far apart are the rows of `out`?",
            "the output's rows are placed `q.stride(0)` apart instead of D",
        ),
        (
            0,
            "too few rows for each load",
            "How many queries share each key that you load?",
            "BLOCK_M is 16: right, but K and V are read for every 16 queries, and with D = 72 that "
            "moves more than the score matrix would",
        ),
    )
)


def _bytes(data: Data) -> int:
    """Q and O once, K and V once for every 32 queries, and two numbers a row."""
    (M, D), N = data["q"].shape, data["k"].shape[0]
    return 4 * (2 * M * D + math.ceil(M / 32) * 2 * N * D + 2 * M)


EXERCISE = Exercise(
    id="flash_attention.flash_forward",
    kind="kernel",
    title="FlashAttention for any length",
    task=(
        "Write the kernel and its launcher: `flash_forward(q, k, v)` for any number of queries and "
        "keys and any D up to 128, 72 among them. Rows may lie further apart than D. One launch, "
        "and every key that is loaded serves at least 32 queries."
    ),
    why="Masks, padding and strides are what separates a demonstration from a kernel one can call.",
    points=6,
    minutes=30,
    difficulty=4,
    core=False,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(square_tiles, advancing),
    misconceptions=MISTAKES,
    hints=(
        "Re-read `load_tile` in the chapter's kernel. At pencil size: 3 queries and 5 keys in a "
        "tile of 16 × 16. Which of the 256 scores are real, and what should the others be?",
        "Print `row_sum` for v = 1 and all q = 0: every weight is 1, so it must be N, the "
        "number of "
        "keys, and not a multiple of BLOCK_N.",
        "```python\nmask_m, mask_d = offs_m < M, offs_d < D\n"
        "q_tile = tl.load(..., mask=..., other=0.0)\n"
        "for start in range(0, N, BLOCK_N):\n    offs_n = ...\n    k_tile = tl.load(..., mask=..., "
        "other=0.0)\n"
        '    scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale\n'
        "    scores = tl.where(..., scores, ...)\n    ...\n"
        "tl.store(..., mask=...)\n```",
    ),
    budget=Budget(launches=lambda data: 1, bytes_moved=_bytes),
    unlocks=("split_decode",),
    usual_failures=(
        "masks the load of k and not the scores, so keys past the end weigh exp(0 - max)",
        "uses q.shape[1] as the row stride",
    ),
)
