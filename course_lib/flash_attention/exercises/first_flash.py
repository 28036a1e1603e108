"""Exercise: the kernel with three blanks. Lengths divide, so that nothing needs a mask."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton


def cases(size: str, seed: int) -> Iterable[Case]:
    """q, k and v [N, D] in fp32; N is a multiple of 32, D a power of two."""
    generator = torch.Generator().manual_seed(seed)

    def data(N: int, D: int, spread: float = 2.0) -> Data:
        q, k, v = torch.randn(3, N, D, generator=generator)
        return {"q": spread * q, "k": k, "v": v}

    yield Case("one tile: 32 × 32 scores, D = 16", data(32, 16))
    late = data(64, 32)
    late["k"][-1] = 4 * late["q"][3]
    yield Case("two tiles, the largest score in the second", late)
    uneven = data(64, 32)
    uneven["q"][::2, 0], uneven["k"][:, 0] = 150 * 32**0.5, 1.0
    yield Case("every other row scores 150 above the rest", uneven)
    early = data(64, 32)
    early["q"][:, 0], early["k"][:, 0] = 30.0, -1.0
    early["k"][:32, 0] = 25.0
    yield Case("two tiles, the first 130 above the second", early, "awkward")
    length = 96 if size == "small" else 4096
    yield Case(f"{length:,} queries and keys", data(length, 32), "method")


def harness(answer, data):
    """Call the launcher."""
    return answer(data["q"], data["k"], data["v"])


def oracle(data: Data) -> torch.Tensor:
    """The formula, with the whole matrix, in fp64."""
    q, k, v = (data[name].double() for name in "qkv")
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, N, scale, D: tl.constexpr, BLOCK: tl.constexpr, BUG: tl.constexpr
):
    """A program owns BLOCK queries. BUG 0 is right, the others are the misconceptions."""
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D)
    q_tile = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :])
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        k_tile = tl.load(k_ptr + offs_n[:, None] * D + offs_d[None, :])
        v_tile = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :])
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
        if BUG == 1:
            new_max = tl.maximum(row_max, tl.max(scores, axis=0))
        elif BUG == 2:
            new_max = tl.max(scores, axis=1)
        else:
            new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp(row_max - new_max)
        weights = tl.exp(scores - new_max[:, None])
        part = tl.dot(weights, v_tile, input_precision="ieee")
        if BUG == 3:
            row_sum = row_sum * rescale + tl.sum(weights, axis=1)
            acc = acc + part
        elif BUG == 4:
            row_sum = row_sum + tl.sum(weights, axis=1)
            acc = acc * rescale[:, None] + part
        elif BUG == 5:
            row_sum = row_sum + tl.sum(weights, axis=1)
            acc = acc + part
        elif BUG == 6:
            row_sum = row_sum * rescale + tl.sum(weights, axis=1)
            acc = (acc + part) * rescale[:, None]
        elif BUG == 7:
            row_sum = row_sum * rescale + tl.sum(weights, axis=0)
            acc = acc * rescale[:, None] + part
        else:
            row_sum = row_sum * rescale + tl.sum(weights, axis=1)
            acc = acc * rescale[:, None] + part
        row_max = new_max
    if BUG != 8:
        acc = acc / row_sum[:, None]
    tl.store(out_ptr + offs_m[:, None] * D + offs_d[None, :], acc)


def _launch(block: int = 32, bug: int = 0) -> Callable[..., torch.Tensor]:
    def first_flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        (N, D), out = q.shape, torch.empty_like(q)
        grid = (N // block,)
        attention_kernel[grid](q, k, v, out, N, D**-0.5, D=D, BLOCK=block, BUG=bug)
        return out

    return first_flash


@triton.jit
def base_2_kernel(q_ptr, k_ptr, v_ptr, out_ptr, N, D: tl.constexpr, BLOCK: tl.constexpr):
    """Two passes over the keys, in base 2: first the log-sum-exp, then the output."""
    offs = tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D)
    rows = (tl.program_id(0) * BLOCK + offs)[:, None] * D + offs_d[None, :]
    q_tile = tl.load(q_ptr + rows) * (1.4426950408889634 / (D**0.5))
    log_sum = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, N, BLOCK):
        k_tile = tl.load(k_ptr + (start + offs)[None, :] * D + offs_d[:, None])  # [D, BLOCK]
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        top = tl.maximum(log_sum, tl.max(scores, axis=1))
        terms = tl.sum(tl.exp2(scores - top[:, None]), axis=1)
        log_sum = top + tl.log2(tl.exp2(log_sum - top) + terms)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in range(0, N, BLOCK):
        k_tile = tl.load(k_ptr + (start + offs)[None, :] * D + offs_d[:, None])
        v_tile = tl.load(v_ptr + (start + offs)[:, None] * D + offs_d[None, :])
        probs = tl.exp2(tl.dot(q_tile, k_tile, input_precision="ieee") - log_sum[:, None])
        acc = tl.dot(probs, v_tile, acc, input_precision="ieee")
    tl.store(out_ptr + rows, acc)


def two_passes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(q)
    base_2_kernel[(q.shape[0] // 32,)](q, k, v, out, q.shape[0], D=q.shape[1], BLOCK=32)
    return out


one_pass = _launch()

MISTAKES = tuple(
    misconception(name, question=question, says=f"This is what you get when {says}.")(
        _launch(bug=bug)
    )
    for bug, name, question, says in (
        (
            1,
            "maximum along the wrong axis",
            "`scores` is [queries, keys]. Which axis disappears when a row's maximum is taken?",
            "the maximum is taken over the queries (axis 0); the tile is square, so nothing "
            "complains",
        ),
        (
            2,
            "running maximum lost",
            "The second tile's scores are all 130 lower. What is `exp(row_max - new_max)` then?",
            "the tile's maximum replaces the running one: where it falls, the factor overflows",
        ),
        (
            3,
            "output not rescaled",
            "`row_sum` shrinks when the maximum rises. What else was measured from the old one?",
            "the accumulator is not rescaled after a new maximum",
        ),
        (
            4,
            "sum not rescaled",
            "`acc` shrinks when the maximum rises. What else was measured from the old one?",
            "the running sum is not rescaled after a new maximum",
        ),
        (
            5,
            "nothing rescaled",
            "What are `acc` and `row_sum` relative to, after the maximum has changed?",
            "neither the sum nor the accumulator is rescaled after a new maximum",
        ),
        (
            6,
            "new part rescaled too",
            "Which part is still relative to the old maximum: `acc`, or this tile's product?",
            "the factor also multiplies this tile's part; the first tile's factor is 0, and wipes "
            "it out",
        ),
        (
            7,
            "sum along the wrong axis",
            "`weights` is [queries, keys]. Over which of the two does a row's sum run?",
            "the weights are summed over the queries (axis 0)",
        ),
        (
            8,
            "never divided",
            "What do the weights of a row add up to before the division?",
            "the accumulator is stored without the division by `row_sum`",
        ),
    )
)


EXERCISE = Exercise(
    id="flash_attention.first_flash",
    kind="kernel",
    title="Your first kernel: three blanks",
    task=(
        "The kernel below is complete but for three blanks: the new maximum, the two updates, and "
        "the tile that is stored. The launcher stands already. Lengths are multiples of 32 here, "
        "so nothing needs a mask."
    ),
    why="You have the inner loop of every FlashAttention under your fingers.",
    points=4,
    minutes=9,
    difficulty=3,
    core=False,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(one_pass, two_passes),
    misconceptions=MISTAKES,
    hints=(
        "Re-read your `tiled_attention`: the names are the same. At pencil size: after the first "
        "tile `rescale` is exp(-inf) = 0, whatever the scores.",
        "Put `tl.device_print` aside: in the interpreter a plain `print(row_sum)` inside the loop "
        "works. With v = 1 every column of `acc` equals `row_sum`.",
        "```python\nnew_max = tl.maximum(row_max, tl.max(scores, axis=...))\n"
        "row_sum = row_sum * ... + tl.sum(weights, axis=...)\n"
        "acc = acc * ...[:, None] + tl.dot(...)\nout_tile = acc / ...\n```",
    ),
    budget=Budget(launches=lambda data: 1),
    unlocks=("flash_forward",),
    usual_failures=(
        "reduces over axis 0; the square tile hides it from the shapes",
        "writes rescale where rescale[:, None] is meant",
    ),
)
