"""Questions of chapter 08: what is asked before its results, and in later chapters."""

from __future__ import annotations

import math
import random

from course_lib.notebook.questions import Numbers, Question

PREDICT = (
    Question(
        id="flash_attention.puzzle",
        prompt=(
            "Attention for N = 8,192 tokens of size 64, in float32, on one CPU thread.\n\n"
            "**Three calls:** `scores = q @ k.T / 8`, `softmax`, `@ v`.\n\n"
            "**One loop** in Python over tiles of 512 keys: it corrects earlier results whenever a "
            "larger score turns up, so it does *more* arithmetic. Both are exact.\n\n"
            "Which is faster?"
        ),
        choices={
            "a": "the three calls, by a factor of 3 or more: loops in Python are slow",
            "b": "the three calls, by a factor of 1.3 to 3: they are optimised library code",
            "c": "neither, within a factor of 1.3: both do the same matrix products",
            "d": "the loop, by a factor of 1.3 or more",
        },
        answer="d",
        replies={
            "a": "The loop makes the same library calls, 256 times on smaller matrices. What "
            "Python adds is microseconds a tile.",
            "b": "The loop calls the same library. Its pieces are large enough to be fast, and "
            "small enough to stay in the cache.",
            "c": "The products are the same, and they are not all of the time. Two matrices of "
            "268 MB have to be obtained from the operating system, and filled.",
        },
        reply=(
            "The score matrix has 8,192² × 4 bytes = 268 MB, and the three calls need two such "
            "matrices. With both at hand beforehand, they come close to the loop: most of the gap "
            "is getting fresh memory. A tile's scores are 1 MB, used again and again."
        ),
    ),
    Question(
        id="flash_attention.tile_shape",
        prompt=(
            "A forward kernel keeps BLOCK_M rows of Q on chip and walks over K and V in tiles of "
            "BLOCK_N rows. With N = 1,024, D = 64, float32 and 64 × 64 tiles it reads 8.7 MB. "
            "Which change brings that close to half?"
        ),
        choices={
            "a": "BLOCK_N from 64 to 128: half as many tiles of K and V",
            "b": "BLOCK_M from 64 to 128: half as many walks over K and V",
            "c": "only both together",
            "d": "neither: the inputs have to be read in any case",
        },
        answer="b",
        replies={
            "a": "Half as many tiles, each twice as large: the walk over K and V reads the same "
            "bytes. BLOCK_N decides how they are sliced, not how often they are read.",
            "c": "BLOCK_N only slices the walk over K and V and changes no byte of it. BLOCK_M "
            "alone decides how many walks there are.",
            "d": "Once would be 0.8 MB. The rest is K and V read again for every block of rows of "
            "Q, and how many blocks there are is yours to choose.",
        },
        reply=(
            "K and V are read once for each block of rows: N / BLOCK_M times. At BLOCK_M = 32, 64 "
            "and 128 that is 17.0, 8.7 and 4.5 MB. Reuse is the idea; the tile is how to get it."
        ),
    ),
    Question(
        id="flash_attention.running_max",
        prompt=(
            "A row's 8,192 random scores arrive one at a time. Each time a new maximum appears, "
            "everything summed so far must be rescaled. How many new maxima do you expect, the "
            "first score included?"
        ),
        answer=sum(1 / n for n in range(1, 8193)),
        unit="new maxima",
        tolerance=0.25,
        replies={
            "low": "Early on a new maximum is common: the second score is one half of the time. "
            "Later it is rare, and yet it never stops being possible.",
            "high": "The n-th score is the largest so far with probability 1/n only. After a "
            "thousand scores a new maximum is a one in a thousand event.",
        },
        reply=(
            "The n-th score is the largest so far with probability 1/n, so the expected number is "
            "1 + 1/2 + … + 1/8192 = 9.59. Rescaling is rare."
        ),
    ),
    Question(
        id="flash_attention.one_new_token",
        prompt=(
            "A model generates. One new query meets ten cached keys and values, and the code calls "
            "`scaled_dot_product_attention(q, k, v, is_causal=True)` with q of shape [1, 1, 1, D] "
            "and k, v of shape [1, 1, 10, D]. What comes out?"
        ),
        choices={
            "a": "attention over all ten values: the newest token may see everything",
            "b": "exactly `v[0]`, the oldest value",
            "c": "an error: the shapes do not fit a causal mask",
            "d": "exactly `v[9]`, the newest value",
        },
        answer="b",
        replies={
            "a": "That is what the code means, and it is what you get without the flag. PyTorch "
            "aligns the mask to the top left corner, where row 0 may see key 0 only.",
            "c": "An error would be kinder. The mask is defined for any shape, and nothing in the "
            "call says that this query stands at position 9.",
            "d": "The mask goes the other way: row 0 sees the keys up to key 0. What is left is "
            "the oldest value, with weight 1.",
        },
        reply=(
            "`is_causal=True` lets query i see keys 0 to i, counted from the top left. The only "
            "query is number 0, so only key 0 is left, and its weight is 1. Generation needs the "
            "mask aligned to the bottom right."
        ),
    ),
    Question(
        id="flash_attention.fp16_error",
        prompt=(
            "Both ways compute attention in float16 from the same inputs, and both are compared "
            "with float64. The tiled way rescales its accumulator again and again. Its error is …"
        ),
        choices={
            "a": "larger: each rescaling rounds once more, and the errors add up",
            "b": "about the same: it is the same formula",
            "c": "about half: fewer intermediate results are rounded to float16",
            "d": "zero: FlashAttention is exact",
        },
        answer="c",
        replies={
            "a": "The rescaling happens in a float32 accumulator, where a rounding costs 6e-8. "
            "What hurts is rounding to float16, and the tiled way does that less often.",
            "b": "The formula is the same, the places where it is rounded are not. The three calls "
            "round scores and probabilities to float16 on their way through memory.",
            "d": "Exact means that it computes the same function and leaves nothing out. In "
            "floating point both ways round.",
        },
        reply=(
            "The three calls store the scores and the probabilities in float16. The tiled way "
            "keeps scores, sums and accumulator in float32 on chip and rounds the result."
        ),
    ),
)


def _step_numbers(rng: random.Random) -> Numbers:
    return {"total": rng.choice([6, 12, 18, 24, 36]), "factor": rng.choice([2, 3, 4])}


def _traffic_numbers(rng: random.Random) -> Numbers:
    return {"n": rng.choice([2048, 4096, 8192]), "block": rng.choice([32, 64, 128])}


def _tiles_numbers(rng: random.Random) -> Numbers:
    return {"rows": rng.choice([6, 8, 12, 16, 20, 24])}


def _matrix_numbers(rng: random.Random) -> Numbers:
    return {"heads": rng.choice([8, 16, 32]), "k": rng.choice([4, 8, 16, 32])}


def _merge_numbers(rng: random.Random) -> Numbers:
    return {
        "a": rng.choice([1, 2, 3]),
        "b": rng.choice([4, 5, 6]),
        "left": rng.choice([10, 20, 30]),
        "right": rng.choice([40, 50, 60]),
    }


def _maxima_numbers(rng: random.Random) -> Numbers:
    return {"n": rng.choice([1000, 4000, 16000, 64000, 1_000_000])}


def _group_numbers(rng: random.Random) -> Numbers:
    kv = rng.choice([2, 4, 8])
    return {"kv": kv, "q": kv * rng.choice([2, 4, 6, 8])}


RECALL = (
    Question(
        id="flash_attention.step",
        prompt=(
            "Online softmax: so far row_sum = {total}. The next tile holds one score, which is "
            "larger than row_max by ln {factor}. What is row_sum now?"
        ),
        numbers=_step_numbers,
        answer=lambda total, factor: total / factor + 1,
        tolerance=0.001,
        replies={
            "low": "The new score adds exp(0) = 1, since it is itself the new maximum.",
            "high": "The old sum was relative to a smaller maximum, so it shrinks.",
        },
        reply="The old sum is divided by {factor}, and the new maximum adds exp(0) = 1: {answer}.",
    ),
    Question(
        id="flash_attention.kv_traffic",
        prompt=(
            "Attention forward, not causal: N = {n:,}, D = 64, 2 bytes a number, "
            "BLOCK_M = {block}, no help from the L2 cache. How many MB of K and V does one head "
            "read?"
        ),
        numbers=_traffic_numbers,
        answer=lambda n, block: (n // block) * 2 * n * 64 * 2 / 1e6,
        unit="MB",
        replies={
            "low": "K and V are both read, and again for every block of rows of Q.",
            "high": "BLOCK_N does not enter. Per block of rows: 2 matrices × N × 64 × 2 bytes.",
        },
        reply="N / BLOCK_M walks of 2 × {n:,} × 64 × 2 bytes each: {answer} MB.",
    ),
    Question(
        id="flash_attention.causal_tiles",
        prompt=(
            "The scores are cut into {rows} × {rows} square tiles, and attention is causal. How "
            "many tiles must be visited?"
        ),
        numbers=_tiles_numbers,
        answer=lambda rows: rows * (rows + 1) // 2,
        unit="tiles",
        tolerance=0.0,
        replies={
            "low": "The tiles on the diagonal are half full, and are visited as well.",
            "high": "Above the diagonal nothing is visible, so nothing there is visited.",
        },
        reply=(
            "Row i of tiles needs i of them: {rows} × ({rows} + 1) / 2 = {answer}. Only the "
            "{rows} on the diagonal need a mask."
        ),
    ),
    Question(
        id="flash_attention.score_matrix",
        prompt=(
            "One sequence of {k}k tokens ({k} × 1,024), {heads} heads, 2 bytes a number. How many "
            "GiB would the scores of one layer take?"
        ),
        numbers=_matrix_numbers,
        answer=lambda heads, k: heads * (k * 1024) ** 2 * 2 / 2**30,
        unit="GiB",
        replies={
            "low": "Every head has a matrix of its own, with a row for each token.",
            "high": "Two bytes a score, and 1 GiB is 2³⁰ bytes.",
        },
        reply="{heads} heads × ({k} × 1,024)² scores × 2 bytes = {answer} GiB; tiled, none of it.",
    ),
    Question(
        id="flash_attention.merge",
        prompt=(
            "Two workers saw disjoint halves of the keys. Both have the same row_max; their "
            "row_sums are {a} and {b}, their outputs {left} and {right}. What is the output over "
            "all keys?"
        ),
        numbers=_merge_numbers,
        answer=lambda a, b, left, right: (a * left + b * right) / (a + b),
        replies={
            "low": "The outputs are weighted by their row_sums; the plain average is not enough.",
            "high": "The outputs are weighted by their row_sums, and divided by the sum of both.",
        },
        reply="({a} × {left} + {b} × {right}) / ({a} + {b}) = {answer}.",
    ),
    Question(
        id="flash_attention.how_many_maxima",
        prompt=(
            "{n:,} random scores arrive one at a time. About how often does a new maximum appear? "
            "(ln 10 is 2.3.)"
        ),
        numbers=_maxima_numbers,
        answer=lambda n: math.log(n) + 0.5772,
        tolerance=0.15,
        unit="times",
        replies={
            "low": "The early scores alone bring a few: 1 + 1/2 + 1/3 + 1/4 is already 2.1.",
            "high": "The n-th score is the largest so far with probability 1/n only.",
        },
        reply="1 + 1/2 + … + 1/n is about ln n + 0.58, here {answer}.",
    ),
    Question(
        id="flash_attention.decode_intensity",
        prompt=(
            "Generation, one new token: {q} query heads share {kv} heads of keys and values. In 16 "
            "bits, about how many operations does each byte of K and V serve, if it is read once?"
        ),
        numbers=_group_numbers,
        answer=lambda kv, q: q / kv,
        unit="operations a byte",
        replies={
            "low": "Each number of K serves one multiplication and one addition for each query "
            "head of its group.",
            "high": "A number has 2 bytes, and only the query heads of its own group use it.",
        },
        reply=(
            "2 operations over 2 bytes for each query row that shares the load: the group size, "
            "{answer}. In prefill it is BLOCK_M."
        ),
    ),
    Question(
        id="flash_attention.is_causal_with_cache",
        prompt=(
            "`scaled_dot_product_attention(q, k, v, is_causal=True)` with 2 queries and 10 keys. "
            "Which keys does the *last* query see?"
        ),
        choices={
            "a": "all ten",
            "b": "keys 0 and 1",
            "c": "keys 8 and 9",
        },
        answer="b",
        replies={
            "a": "That is the mask aligned to the bottom right, which generation needs. PyTorch "
            "aligns to the top left.",
            "c": "A causal mask cuts the future, never the past. Aligned to the top left, query 1 "
            "sees keys 0 and 1.",
        },
        reply="The mask is aligned to the top left corner: query i sees keys 0 to i.",
    ),
)
