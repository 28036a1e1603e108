"""Exercise: decoding. One query a head, a long cache, many programs, grouped heads."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception
from course_lib.runtime.tile import tl, triton


def cases(size: str, seed: int) -> Iterable[Case]:
    """Inputs q [H_q, D], k and v [H_kv, T, D] in fp32, and the number of splits."""
    generator = torch.Generator().manual_seed(seed)

    def data(H_q: int, H_kv: int, T: int, D: int, splits: int) -> Data:
        q = 2 * torch.randn(H_q, D, generator=generator)
        k, v = torch.randn(2, H_kv, T, D, generator=generator)
        return {"q": q, "k": k, "v": v, "splits": splits}

    yield Case("one head, 32 keys, one split", data(1, 1, 32, 16, 1))
    yield Case("one head, 64 keys, two splits", data(1, 1, 64, 16, 2))
    yield Case("6 query heads, 2 key heads, one split", data(6, 2, 32, 16, 1))
    yield Case("50 keys in 3 splits", data(2, 1, 50, 16, 3), "awkward")
    yield Case("9 keys in 4 splits: one is empty", data(2, 1, 9, 16, 4), "awkward")
    heads, keys, splits = ((6, 1), 120, 2) if size == "small" else ((32, 8), 60_000, 16)
    yield Case(
        f"{heads[0]} query heads, {heads[1]} for keys, {keys:,} keys",
        data(*heads, keys, 32, splits),
        "method",
    )


def harness(answer, data):
    """Call the launcher."""
    return answer(data["q"], data["k"], data["v"], data["splits"])


def oracle(data: Data) -> torch.Tensor:
    """Head by head, in fp64."""
    q, k, v = (data[name].double() for name in "qkv")
    group = q.shape[0] // k.shape[0]
    out = torch.empty_like(q)
    for head in range(q.shape[0]):
        scores = k[head // group] @ q[head] / math.sqrt(q.shape[1])
        out[head] = torch.softmax(scores, dim=0) @ v[head // group]
    return out


@triton.jit
def split_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    T,
    split_keys,
    scale,
    H_kv: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BUG: tl.constexpr,
):
    """A program owns one key head and one split. BUG 0 is right, others are misconceptions."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    offs_d = tl.arange(0, D)
    offs_t = tl.arange(0, BLOCK_N)
    mask_rows = rows < GROUP
    # The query heads that share this key head lie side by side.
    heads = rows * H_kv + kv_head if BUG == 2 else kv_head * GROUP + rows
    q_tile = tl.load(
        q_ptr + heads[:, None] * D + offs_d[None, :], mask=mask_rows[:, None], other=0.0
    )
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    end = tl.minimum((split + 1) * split_keys, T)
    for start in range(split * split_keys, end, BLOCK_N):
        offs_n = start + offs_t
        mask_n = offs_n < (T if BUG == 6 else end)
        offs = (kv_head * T + offs_n)[:, None] * D + offs_d[None, :]
        k_tile = tl.load(k_ptr + offs, mask=mask_n[:, None], other=0.0)
        v_tile = tl.load(v_ptr + offs, mask=mask_n[:, None], other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
        scores = tl.where(mask_n[None, :], scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp(row_max - new_max)
        weights = tl.exp(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + tl.dot(weights, v_tile, input_precision="ieee")
        row_max = new_max
    # An empty split: out 0, lse -inf.
    divisor = row_sum if BUG == 4 else tl.where(row_sum == 0.0, 1.0, row_sum)
    lse = row_max + tl.log(divisor)
    if BUG == 7:
        lse = row_max
    if BUG == 9:
        lse = tl.where(row_sum == 0.0, 0.0, lse)
    place = split * H_kv * GROUP + heads
    tl.store(
        out_ptr + place[:, None] * D + offs_d[None, :],
        acc / divisor[:, None],
        mask=mask_rows[:, None],
    )
    tl.store(lse_ptr + place, lse, mask=mask_rows)


def _launch(bug: int = 0) -> Callable[..., torch.Tensor]:
    def split_decode(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int
    ) -> torch.Tensor:
        (H_q, D), (H_kv, T, _) = q.shape, k.shape
        parts = torch.zeros(splits, H_q, D, device=q.device)
        lse = torch.full((splits, H_q), -math.inf, device=q.device)
        split_keys = T // splits if bug == 5 else triton.cdiv(T, splits)
        if bug == 1:  # every query head reads its own copy of the keys
            k, v = (x.repeat_interleave(H_q // H_kv, dim=0) for x in (k, v))
            H_kv = H_q
        split_kernel[(H_kv, splits)](
            q,
            k,
            v,
            parts,
            lse,
            T,
            split_keys,
            1.0 if bug == 8 else D**-0.5,
            H_kv=H_kv,
            GROUP=H_q // H_kv,
            D=D,
            ROWS=max(16, triton.next_power_of_2(H_q // H_kv)),
            BLOCK_N=64,
            BUG=bug,
        )
        if bug == 3:
            return parts.mean(0)
        if bug == 10:
            return parts.sum(0)
        shares = torch.exp(lse - lse.amax(0))
        return (shares[..., None] * parts).sum(0) / shares.sum(0)[:, None]

    return split_decode


@triton.jit
def partial_kernel(q_ptr, k_ptr, v_ptr, part_ptr, T, splits, GROUP: tl.constexpr, D: tl.constexpr):
    """Unnormalised, in base 2: writes acc, row_max and row_sum side by side."""
    head, split = tl.program_id(0), tl.program_id(1)
    first, last = T * split // splits, T * (split + 1) // splits
    rows, dims, keys = tl.arange(0, 16), tl.arange(0, D), tl.arange(0, 64)
    real = rows < GROUP
    q_at = (head * GROUP + rows)[:, None] * D + dims[None, :]
    q_tile = tl.load(q_ptr + q_at, mask=real[:, None], other=0.0) * (1.4426950408889634 / D**0.5)
    top = tl.full([16], float("-inf"), tl.float32)
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([16, D], tl.float32)
    k_ptr += head * T * D
    v_ptr += head * T * D
    for start in range(first, last, 64):
        here = start + keys < last
        k_tile = tl.load(k_ptr + (start + keys)[None, :] * D + dims[:, None], here[None, :], 0.0)
        scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        scores = tl.where(here[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        factor = tl.exp2(top - new_top)
        total = total * factor + tl.sum(weights, 1)
        v_tile = tl.load(v_ptr + (start + keys)[:, None] * D + dims[None, :], here[:, None], 0.0)
        acc = tl.dot(weights, v_tile, acc * factor[:, None], input_precision="ieee")
        top = new_top
    row = (split * tl.num_programs(0) * GROUP + head * GROUP + rows) * (D + 2)
    tl.store(part_ptr + row[:, None] + dims[None, :], acc, mask=real[:, None])
    tl.store(part_ptr + row + D, top, mask=real)
    tl.store(part_ptr + row + D + 1, total, mask=real)


def unnormalised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, splits: int) -> torch.Tensor:
    (H_q, D), (H_kv, T, _) = q.shape, k.shape
    parts = torch.empty(splits, H_q, D + 2, device=q.device)
    partial_kernel[(H_kv, splits)](q, k, v, parts, T, splits, GROUP=H_q // H_kv, D=D)
    acc, top, total = parts.split([D, 1, 1], dim=-1)
    factor = torch.exp2(top - top.amax(0))
    return (factor * acc).sum(0) / (factor * total).sum(0)


normalised = _launch()

MISTAKES = tuple(
    misconception(name, question=question, says=f"This is what you get when {says}.")(
        _launch(bug=bug)
    )
    for bug, name, question, says in (
        (
            1,
            "keys read once for each query head",
            "Four query heads share a key head. How often do you load each key?",
            "every query head has its own program: right, and K and V are read GROUP times, which "
            "is all that decoding costs",
        ),
        (
            2,
            "heads dealt out in turn",
            "With 6 query heads and 2 key heads, which key head serves query head 1?",
            "query head h reads key head h % H_kv (`repeat`) instead of h // GROUP "
            "(`repeat_interleave`)",
        ),
        (
            3,
            "plain average of the splits",
            "One split holds the key that matters. Should the others weigh as much?",
            "the splits' outputs are averaged instead of weighed by exp(lse)",
        ),
        (
            4,
            "empty split is NaN",
            "9 keys in 4 splits of 3: what does the last program divide by?",
            "an empty split divides 0 by 0, and the merge spreads the NaN",
        ),
        (
            5,
            "last keys left out",
            "50 keys in 3 splits: how many keys are 3 times 50 // 3?",
            "the number of keys a split is rounded down",
        ),
        (
            6,
            "splits overlap",
            "Your tile has 64 keys and your split 17. Whose keys are the other 47?",
            "keys are masked at T instead of at the end of the split, so the next split counts "
            "them again",
        ),
        (
            7,
            "merged by the maximum alone",
            "Two splits have the same maximum; one holds ten keys near it, the other one. Same "
            "weight?",
            "row_max stands in for lse: the number of keys that contribute is lost",
        ),
        (
            8,
            "no scale",
            "How large are the scores of random queries and keys when D grows?",
            "1/sqrt(D) is missing",
        ),
        (
            9,
            "empty split counts as one key",
            "What is exp(lse) of your empty split?",
            "an empty split reports lse = 0: it then weighs as much as a key with score 0",
        ),
        (
            10,
            "outputs of the splits added",
            "Each split's output is divided by its own sum. Can they be added?",
            "normalised outputs are added without shares",
        ),
    )
)


def _bytes(data: Data) -> int:
    """K and V once, half as much again for whole tiles, and what the splits exchange."""
    (H_q, D), splits = data["q"].shape, data["splits"]
    return 6 * (data["k"].numel() + data["v"].numel()) + 16 * splits * H_q * (D + 4)


EXERCISE = Exercise(
    id="flash_attention.split_decode",
    kind="kernel",
    title="Decode: split the keys, share the loads",
    task=(
        "One new query a head against a cache of T keys. Write `split_decode(q, k, v, splits)`: a "
        "kernel in which each program takes one key head and one of `splits` parts of the keys, "
        "and handles all query heads that share the key head (h // GROUP) at once, as rows of one "
        "tile of at least 16. Then merge the parts. Every key is loaded once."
    ),
    why="This is how a model answers you: decoding is bound by reading the cache.",
    points=6,
    minutes=20,
    difficulty=4,
    core=False,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(normalised, unnormalised),
    misconceptions=MISTAKES,
    hints=(
        "Re-read your `merge_states`. At pencil size: 9 keys in 4 splits of 3. What are out and "
        "lse of the last split?",
        "Print each split's `lse`, and compare `torch.logsumexp(lse, 0)` with that of all scores. "
        "If it is too large, splits overlap; if too small, keys are lost.",
        "```python\nkv_head, split = tl.program_id(0), tl.program_id(1)\n"
        "heads = kv_head * GROUP + ...\n"
        "end = tl.minimum(..., T)\nfor start in range(split * split_keys, end, BLOCK_N):\n"
        "    mask_n = offs_n < ...\n    ...\ndivisor = tl.where(row_sum == 0, 1.0, row_sum)\n"
        "tl.store(..., acc / divisor[:, None], mask=...)\n"
        "tl.store(..., row_max + ..., mask=...)\n```",
    ),
    budget=Budget(launches=lambda data: 2, bytes_moved=_bytes),
    usual_failures=(
        "one program for each query head, so that keys are read GROUP times",
        "masks at T and not at the end of the split",
    ),
)
