"""Exercise: attention whose largest tensor is its output."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, Misconception, misconception


def cases(size: str, seed: int) -> Iterable[Case]:
    """Inputs q [M, D], k and v [N, D] in fp32, and the tile's extents."""
    generator = torch.Generator().manual_seed(seed)

    def data(rows: int, keys: int, dim: int, block_m: int, block_n: int, spread=2.0) -> Data:
        return {
            "q": spread * torch.randn(rows, dim, generator=generator),
            "k": torch.randn(keys, dim, generator=generator),
            "v": torch.randn(keys, dim, generator=generator),
            "block_m": block_m,
            "block_n": block_n,
        }

    yield Case(
        "one query, one tile of two keys: only the scale and the division matter",
        {
            "q": torch.tensor([[2.0, 0.0, 0.0, 0.0]]),
            "k": torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
            "v": torch.tensor([[4.0, 8.0, 0.0, 4.0], [0.0, 0.0, 4.0, 4.0]]),
            "block_m": 1,
            "block_n": 2,
        },
    )
    yield Case(
        "one query; the second key scores higher",
        {
            "q": torch.tensor([[2.0, 0.0]]),
            "k": torch.tensor([[0.0, 1.0], [2.0, 0.0], [1.0, 1.0]]),
            "v": torch.tensor([[0.0, 8.0], [4.0, 1.0], [2.0, 5.0]]),
            "block_m": 1,
            "block_n": 1,
        },
    )
    yield Case("six queries, eight keys, tiles of 3 × 4", data(6, 8, 5, 3, 4))
    yield Case("ragged: 7 queries, 11 keys, tiles of 4 × 3", data(7, 11, 6, 4, 3), "awkward")
    yield Case("one tile is larger than everything", data(5, 9, 3, 8, 16), "awkward")
    late = data(3, 10, 4, 2, 4)
    late["k"][-1] = 6 * late["q"][0]
    yield Case("the last key scores far above the rest", late, "awkward")
    early = data(3, 10, 4, 2, 4)
    early["k"][0] = 200 * early["q"][0] / early["q"][0].square().sum()
    yield Case("the first key scores 100 above the rest", early, "awkward")
    uneven = data(4, 9, 3, 4, 3, spread=1.0)
    uneven["q"][1] *= 300.0
    uneven["k"][:, 0] = uneven["k"][:, 0].abs() + 1
    uneven["q"][:, 0] = torch.tensor([1.0, 400.0, 1.0, -400.0])
    yield Case("rows whose scores lie 1,000 apart", uneven, "awkward")
    rows, keys = (300, 420) if size == "small" else (9000, 7000)
    blocks = (64, 96) if size == "small" else (512, 512)
    yield Case(f"{rows:,} queries, {keys:,} keys", data(rows, keys, 24, *blocks), "method")


def harness(answer, data):
    """Call the answer with the tensors and the tile's extents."""
    return answer(data["q"], data["k"], data["v"], data["block_m"], data["block_n"])


def oracle(data: Data) -> torch.Tensor:
    """The formula, with the whole matrix, in fp64."""
    q, k, v = (data[name].double() for name in "qkv")
    return torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v


def rows_then_keys(q, k, v, block_m: int, block_n: int) -> torch.Tensor:
    out = torch.empty_like(q)
    scale = q.shape[1] ** -0.5
    for i in range(0, q.shape[0], block_m):
        q_tile = q[i : i + block_m] * scale
        row_max = q.new_full((len(q_tile), 1), -math.inf)
        row_sum, acc = torch.zeros_like(row_max), torch.zeros_like(q_tile)
        for j in range(0, k.shape[0], block_n):
            scores = q_tile @ k[j : j + block_n].T
            new_max = torch.maximum(row_max, scores.amax(1, keepdim=True))
            rescale, weights = torch.exp(row_max - new_max), torch.exp(scores - new_max)
            row_sum = row_sum * rescale + weights.sum(1, keepdim=True)
            acc = acc * rescale + weights @ v[j : j + block_n]
            row_max = new_max
        out[i : i + block_m] = acc / row_sum
    return out


def merged_parts(q, k, v, block_m: int, block_n: int) -> torch.Tensor:
    """Normalises each tile and merges by log-sum-exp, in place."""
    outs = []
    for q_tile in q.split(block_m):
        out, lse = torch.zeros_like(q_tile), torch.full((len(q_tile),), -math.inf)
        for k_tile, v_tile in zip(k.split(block_n), v.split(block_n), strict=True):
            scores = torch.einsum("md,nd->mn", q_tile, k_tile).div_(math.sqrt(q.shape[1]))
            tile_lse = torch.logsumexp(scores, dim=1)
            part = scores.sub_(tile_lse[:, None]).exp_() @ v_tile
            share = torch.sigmoid(tile_lse - lse)[:, None]
            out.mul_(1 - share).addcmul_(share, part)
            lse = torch.logaddexp(lse, tile_lse)
        outs.append(out)
    return torch.cat(outs)


def two_passes(q, k, v, block_m: int, block_n: int) -> torch.Tensor:
    """First the maxima, then the sums: reads K twice, and is exact all the same."""
    out, scale = torch.zeros_like(q), 1 / math.sqrt(q.shape[1])
    for i in range(0, q.shape[0], block_m):
        rows = slice(i, i + block_m)
        tiles = [slice(j, j + block_n) for j in range(0, k.shape[0], block_n)]
        row_max = torch.stack([(q[rows] @ k[t].T).amax(1) for t in tiles]).amax(0) * scale
        row_sum = torch.zeros_like(row_max)
        for t in tiles:
            weights = (q[rows] @ k[t].T * scale - row_max[:, None]).exp()
            row_sum += weights.sum(1)
            out[rows] += weights @ v[t]
        out[rows] /= row_sum[:, None]
    return out


def _wrong(
    *,
    rescale_acc: bool = True,
    rescale_sum: bool = True,
    backwards: bool = False,
    divide: bool = True,
    normalise_each: bool = False,
    tile_max: bool = False,
    one_max: bool = False,
    scale=lambda dim, block_n: dim**-0.5,
    last_key=lambda keys, block_n: keys,
    pad: bool = False,
    last_query=lambda rows, block_m: rows,
    cut: bool = False,
    tall: bool = False,
    carried: bool = False,
    old_max_kept: bool = False,
    last_sum: bool = False,
):
    """The first accepted answer with one thing wrong."""

    def answer(q, k, v, block_m: int, block_n: int) -> torch.Tensor:
        out = torch.zeros_like(q)
        end = last_query(q.shape[0], block_m)
        row_max = row_sum = acc = out
        for i in range(0, end, block_m):
            q_tile = q[i : i + block_m] * scale(q.shape[1], block_n)
            if i == 0 or not carried:
                row_max = q.new_full((block_m if tall else len(q_tile), 1), -math.inf)
                row_sum, acc = torch.zeros_like(row_max), torch.zeros_like(q_tile)
            for j in range(0, last_key(k.shape[0], block_n), block_n):
                k_tile, v_tile = k[j : j + block_n], v[j : j + block_n]
                if pad:
                    missing = (0, 0, 0, block_n - len(k_tile))
                    k_tile = torch.nn.functional.pad(k_tile, missing)
                    v_tile = torch.nn.functional.pad(v_tile, missing)
                scores = q_tile @ k_tile.T
                best = scores.max().expand_as(row_max) if one_max else scores.amax(1, keepdim=True)
                new_max = best if tile_max else torch.maximum(row_max, best)
                rescale, weights = torch.exp(row_max - new_max), torch.exp(scores - new_max)
                if backwards and j > 0:
                    rescale = 1 / rescale
                row_sum = row_sum * (rescale if rescale_sum else 1) * (not last_sum)
                row_sum = row_sum + weights.sum(1, keepdim=True)
                acc = acc * (rescale if rescale_acc else 1) + weights @ v_tile
                if normalise_each:
                    acc = acc / row_sum
                row_max = row_max if old_max_kept else new_max
            out[i : i + block_m] = acc / row_sum if divide and not normalise_each else acc
        return out[:end] if cut else out

    return answer


@misconception(
    "whole score matrix",
    question="Which of your tensors grows when both the queries and the keys double?",
    says="This is what you get when a matrix of all queries or all keys is formed: right, and what "
    "tiling is there to avoid.",
)
def whole_matrix(q, k, v, block_m: int, block_n: int) -> torch.Tensor:
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = torch.exp(scores - scores.amax(1, keepdim=True))
    return weights @ v / weights.sum(1, keepdim=True)


@misconception(
    "softmaxes of tiles averaged",
    question="Each tile's softmax adds up to 1 by itself. How is it known which tile weighs more?",
    says="This is what you get when every tile is normalised alone and the outputs are averaged.",
)
def averaged(q, k, v, block_m: int, block_n: int) -> torch.Tensor:
    q_ = q / math.sqrt(q.shape[1])
    parts = [
        torch.exp((s := q_ @ k_tile.T) - torch.logsumexp(s, 1, True)) @ v_tile
        for k_tile, v_tile in zip(k.split(block_n), v.split(block_n), strict=True)
    ]
    return torch.stack(parts).mean(dim=0)


EXERCISE = Exercise(
    id="flash_attention.tiled_attention",
    kind="function",
    title="Attention in tiles",
    task=(
        "Close the chapter first: its loop is what you write here. "
        "Return `softmax(q kᵀ / sqrt(D)) v` without ever making a tensor larger than `q`, `k` or "
        "the output. Take `block_m` queries at a time, walk over the keys `block_n` at a time, and "
        "carry the three running quantities of the chapter. Extents need not divide."
    ),
    why="This is FlashAttention; the kernel later only changes where the tiles live.",
    points=6,
    minutes=20,
    difficulty=3,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(rows_then_keys, merged_parts, two_passes),
    misconceptions=(
        Misconception(
            "output not rescaled",
            _wrong(rescale_acc=False),
            "`row_sum` shrinks when the maximum rises. What else was measured from the old one?",
            "This is what you get when the accumulator is not rescaled after a new maximum.",
        ),
        Misconception(
            "sum not rescaled",
            _wrong(rescale_sum=False),
            "`acc` shrinks when the maximum rises. What else was measured from the old one?",
            "This is what you get when the running sum is not rescaled after a new maximum.",
        ),
        Misconception(
            "nothing rescaled",
            _wrong(rescale_acc=False, rescale_sum=False),
            "What are `acc` and `row_sum` relative to, after the maximum has changed?",
            "This is what you get when neither is rescaled: old keys weigh too much, although the "
            "weights add up to 1.",
        ),
        Misconception(
            "rescaled backwards",
            _wrong(backwards=True),
            "When the maximum rises, should the old part grow or shrink?",
            "This is what you get with the factor exp(new - old) instead of exp(old - new).",
        ),
        Misconception(
            "never divided",
            _wrong(divide=False),
            "What do your weights add up to at the end of a row?",
            "This is what you get when the accumulator is returned without the division.",
        ),
        Misconception(
            "divided in every step",
            _wrong(normalise_each=True),
            "After you divide, `acc` is an average. What does the next step add to it?",
            "This is what you get when each step divides by the sum so far and the next step goes "
            "on as if it had not.",
        ),
        Misconception(
            "maximum of the last tile",
            _wrong(tile_max=True),
            "Which maximum do you subtract when the next tile's scores are all far smaller?",
            "This is what you get when each tile's own maximum is used: where it falls, the old "
            "part is multiplied by a huge number.",
        ),
        Misconception(
            "one maximum for all rows",
            _wrong(one_max=True),
            "What is left of a row whose scores lie 1,000 below your maximum?",
            "This is what you get when a tile has one maximum instead of one a row: low rows "
            "become 0 / 0.",
        ),
        Misconception(
            "no scale",
            _wrong(scale=lambda dim, block_n: 1.0),
            "How large are the scores of random queries and keys when D grows?",
            "This is what you get when 1/sqrt(D) is missing.",
        ),
        Misconception(
            "scale 1/D",
            _wrong(scale=lambda dim, block_n: 1 / dim),
            "By how much does a sum of D random products spread: D, or its root?",
            "This is what you get with 1/D instead of 1/sqrt(D).",
        ),
        Misconception(
            "last keys dropped",
            _wrong(last_key=lambda keys, block_n: max(keys // block_n, 1) * block_n),
            "How many tiles of 3 cover 11 keys?",
            "This is what you get when the number of key tiles is rounded down.",
        ),
        Misconception(
            "padded keys counted",
            _wrong(pad=True),
            "A key of zeros has score 0. Is its weight 0?",
            "This is what you get when the last tile is padded with zeros: exp(0 - max) is not 0.",
        ),
        Misconception(
            "last queries left out",
            _wrong(last_query=lambda rows, block_m: max(rows // block_m, 1) * block_m),
            "How many blocks of 4 cover 7 queries?",
            "This is what you get when the number of query blocks is rounded down: the last rows "
            "are never written.",
        ),
        Misconception(
            "last queries missing from the output",
            _wrong(last_query=lambda rows, block_m: max(rows // block_m, 1) * block_m, cut=True),
            "How many blocks of 4 cover 7 queries, and how many rows do yours have together?",
            "This is what you get when only whole blocks of queries are collected.",
        ),
        Misconception(
            "state as tall as a whole block",
            _wrong(tall=True),
            "Seven queries in blocks of 4: how many rows has the last block, and how many has its "
            "`row_max`?",
            "This is what you get when the state is made with `block_m` rows; the last block has "
            "fewer queries than that.",
        ),
        Misconception(
            "state carried into the next queries",
            _wrong(carried=True),
            "The second block of queries starts. Which keys has it seen so far?",
            "This is what you get when `row_max`, `row_sum` and `acc` are made once, outside the "
            "loop over the queries.",
        ),
        Misconception(
            "maximum never stored",
            _wrong(old_max_kept=True),
            "After the first tile, what is `row_max`? And so what is `rescale` for the second?",
            "This is what you get when `row_max = new_max` is missing: it stays -inf, and each "
            "tile wipes out those before it.",
        ),
        Misconception(
            "divided by the last tile's sum",
            _wrong(last_sum=True),
            "`acc` holds all keys. Which keys does `row_sum` hold?",
            "This is what you get when `row_sum` is set in each tile instead of added to.",
        ),
        whole_matrix,
        averaged,
    ),
    hints=(
        "Re-read your `online_softmax`: it is one row of this. By hand: `block_n = 1`, scores 0 "
        "and then 2, values 8 and 1. After the first key acc is 8 and row_sum is 1. After the "
        "second?",
        "Print `row_sum` with `v` set to ones: `acc` must equal it in every column, after every "
        "tile.",
        "```python\nfor i in range(0, M, block_m):\n    q_tile = ...\n"
        "    row_max, row_sum, acc = ...\n"
        "    for j in range(0, N, block_n):\n        scores = ...\n        new_max = ...\n"
        "        rescale, weights = ...\n        row_sum = ...\n        acc = ...\n"
        "        row_max = new_max\n    out[i : i + block_m] = ...\n```",
    ),
    budget=Budget(
        largest_tensor=lambda data: 4 * max(data[name].numel() for name in "qkv"),
        peak_bytes=lambda data: 4 * 5 * max(data[name].numel() for name in "qkv"),
    ),
    forbids=("aten::_softmax", "aten::scaled_dot_product_attention"),
    unlocks=("one_pass_variance", "first_flash", "causal_tiles"),
    usual_failures=(
        "forgets to rescale the accumulator, since row_sum was the exercise before",
        "keeps row_max as [block_m] and broadcasts it along the wrong dimension",
    ),
)
