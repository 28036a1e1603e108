# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Exercises: why is the exact answer cheaper?
#
# Write your answer into a cell, run it, and run the `check` below it. The card that appears says
# what was tried, shows the smallest case that fails, and what to do next. `hint("name")` climbs
# the help ladder a rung at a time. Nothing here needs a GPU: kernels run in Triton's interpreter
# where there is none.
#
# The first nine exercises are the core, about 80 minutes. Do them in order, since later ones use
# earlier ones. A cell that says **Solved** is a worked neighbour of the exercise after it: run it,
# read it, and change a number.

# %% tags=["setup"]
import math

import torch

from course_lib import check, progress, setup
from course_lib.runtime.tile import tl, triton

setup("flash_attention")

# %% [markdown] card="overflow_score"

# %% exercise="overflow_score"
# BEGIN SOLUTION
overflow_score = math.log(65504)  # 11.09
# END SOLUTION

# %% check="overflow_score"
check(overflow_score=overflow_score)

# %% [markdown]
# Now look at what happens past that score. The largest score takes everything with it.

# %%
scores = torch.tensor([[12.0, 1.0, 0.0]]).half()
terms = scores.exp()
terms, terms / terms.sum()

# %% [markdown] card="safe_softmax"


# %% exercise="safe_softmax"
def safe_softmax(scores):
    """Softmax of each row.

    Args:
        scores: [M, N], fp16, finite.

    Returns:
        [M, N], fp16: each row adds up to 1.
    """
    # BEGIN SOLUTION
    wide = scores.float()
    terms = torch.exp(wide - wide.amax(dim=-1, keepdim=True))
    return (terms / terms.sum(dim=-1, keepdim=True)).half()
    # END SOLUTION


# %% check="safe_softmax"
check(safe_softmax)

# %% [markdown]
# ### Solved: a sum that changes its unit
#
# Scores 2 and 1 came first, then a 4. The first sum was measured from 2: its unit is exp(2). When
# the maximum rises to 4, the unit becomes exp(4), so the old sum must shrink by exp(2 - 4).

# %%
old_max, old_sum = 2.0, math.exp(2 - 2) + math.exp(1 - 2)
new_max = max(old_max, 4.0)
new_sum = old_sum * math.exp(old_max - new_max) + math.exp(4 - new_max)

at_once = sum(math.exp(score - 4) for score in (2, 1, 4))
assert math.isclose(new_sum, at_once)
print(f"{old_sum:.4f} in units of exp(2), then {new_sum:.4f} in units of exp(4)")

# %% [markdown] card="online_softmax"


# %% exercise="online_softmax"
def online_softmax(tiles):
    """Both softmax statistics of a row, after one pass.

    Args:
        tiles: Iterator of tensors [n], fp32, n > 0 and not always the same. All of them lie in one
            buffer, which is overwritten with NaN before the next tile comes.

    Returns:
        row_max: [], fp32, the largest score.
        row_sum: [], fp32, the sum of exp(score - row_max) over all scores.
    """
    # BEGIN SOLUTION
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        new_max = torch.maximum(row_max, tile.max())
        row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
        row_max = new_max
    return row_max, row_sum
    # END SOLUTION


# %% check="online_softmax"
check(online_softmax)

# %% [markdown]
# ### What two infinities do
#
# A hidden key has score -inf. As long as a row has seen nothing else, its maximum is -inf too.

# %%
nothing = torch.tensor(-math.inf)
nothing - nothing, torch.exp(nothing - 0.0), torch.exp(nothing - nothing)

# %% [markdown] card="take_tile"


# %% exercise="take_tile"
def take_tile(row_max, row_sum, acc, scores, values):
    """Take one tile of keys into the state of an online softmax.

    Args:
        row_max: [M], fp32, the largest score of each row so far; -inf where it has seen none.
        row_sum: [M], fp32, the sum of exp(score - row_max) so far.
        acc: [M, D], fp32, the sum of exp(score - row_max) times the value so far.
        scores: [M, N], fp32; -inf where a key is hidden.
        values: [N, D], fp32.

    Returns:
        row_max, row_sum and acc with this tile's keys taken in.
    """
    # BEGIN SOLUTION
    # STUB # The code below is right until a row has seen no key. Repair it, and delete this line:
    # STUB raise NotImplementedError("take_tile: find the bug, then delete this line")
    # STUB new_max = torch.maximum(row_max, scores.amax(dim=1))
    # STUB weights = torch.exp(scores - new_max[:, None])
    # STUB rescale = torch.exp(row_max - new_max)
    # STUB row_sum = row_sum * rescale + weights.sum(dim=1)
    # STUB acc = acc * rescale[:, None] + weights @ values
    # STUB return new_max, row_sum, acc
    new_max = torch.maximum(row_max, scores.amax(dim=1))
    # Measured from 0, an empty row has weights and rescale exp(-inf) = 0, and not NaN.
    origin = torch.where(new_max == -math.inf, 0.0, new_max)
    weights = torch.exp(scores - origin[:, None])
    rescale = torch.exp(row_max - origin)
    row_sum = row_sum * rescale + weights.sum(dim=1)
    acc = acc * rescale[:, None] + weights @ values
    return new_max, row_sum, acc
    # END SOLUTION


# %% check="take_tile"
check(take_tile)

# %% [markdown]
# ### Solved: two sums that were measured from different maxima
#
# Two programs each summed half of a row. Before their sums can be added, both must be brought to
# one unit. The logarithm of a sum, put back to unit 1, is the log-sum-exp: one number in place of
# two.

# %%
half_a, half_b = torch.tensor([2.0, 1.0]), torch.tensor([4.0, 0.0, 3.0])
max_a, max_b = half_a.max(), half_b.max()
sum_a, sum_b = (half_a - max_a).exp().sum(), (half_b - max_b).exp().sum()

top = torch.maximum(max_a, max_b)
both = sum_a * (max_a - top).exp() + sum_b * (max_b - top).exp()
lse_a, lse_b = max_a + sum_a.log(), max_b + sum_b.log()

whole = torch.cat([half_a, half_b])
torch.testing.assert_close(top + both.log(), torch.logsumexp(whole, 0))
torch.testing.assert_close(top + both.log(), torch.log(lse_a.exp() + lse_b.exp()))
print(f"lse {lse_a:.4f} and {lse_b:.4f} make {top + both.log():.4f}")

# %% [markdown] card="merge_states"


# %% exercise="merge_states"
def merge_states(out_a, lse_a, out_b, lse_b):
    """Merge the attention of the same queries to two disjoint sets of keys.

    Args:
        out_a: [M, D], fp32, attention to the first set, each row divided by its sum.
        lse_a: [M], fp32, log of the sum of exp(score) over the first set; -inf where it is empty.
        out_b: [M, D], fp32, the same for the second set.
        lse_b: [M], fp32.

    Returns:
        out: [M, D], fp32, attention to all keys; 0 where both sets are empty.
        lse: [M], fp32, their log-sum-exp; -inf where both are empty.
    """
    # BEGIN SOLUTION
    top = torch.maximum(lse_a, lse_b)
    origin = torch.where(top == -math.inf, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - origin), torch.exp(lse_b - origin)
    total = weight_a + weight_b
    divisor = torch.where(total == 0, 1.0, total)
    out = (weight_a[:, None] * out_a + weight_b[:, None] * out_b) / divisor[:, None]
    return out, origin + torch.log(total)
    # END SOLUTION


# %% check="merge_states"
check(merge_states)

# %% [markdown]
# ### Solved: count the bytes of two steps and of one
#
# `y = exp(2 * x)` on N fp32 numbers. As two operations it reads x, writes 2x, reads 2x, writes y.
# As one operation it reads x and writes y.

# %%
N, itemsize = 1000, 4
two_steps = (N + N) * itemsize + (N + N) * itemsize
one_step = (N + N) * itemsize
assert two_steps == 2 * one_step
print(f"{two_steps:,} and {one_step:,} bytes")

# %% [markdown] card="bytes_moved"


# %% exercise="bytes_moved"
def bytes_moved(Tq, Tk, D, BLOCK_M, itemsize):
    """Bytes that attention moves between memory and chip, for one head.

    Args:
        Tq: Number of queries.
        Tk: Number of keys.
        D: Head dimension.
        BLOCK_M: Queries in a tile; need not divide Tq.
        itemsize: Bytes of one element, of S and P too.

    Returns:
        naive: Bytes of three separate operations, an integer.
        tiled: Bytes of tiled attention, an integer.
    """
    # BEGIN SOLUTION
    q_or_out, k_or_v, scores = (n * itemsize for n in (Tq * D, Tk * D, Tq * Tk))
    naive = 2 * q_or_out + 2 * k_or_v + 4 * scores  # S and P are written and read
    tiles = math.ceil(Tq / BLOCK_M)
    tiled = 2 * q_or_out + tiles * 2 * k_or_v  # Q and O once; K and V for every tile
    return naive, tiled
    # END SOLUTION


# %% check="bytes_moved"
check(bytes_moved)

# %% [markdown] card="useless_tile"

# %% exercise="useless_tile"
# BEGIN SOLUTION
for BLOCK_M in (16, 24, 32, 48, 64, 96, 192):
    naive, tiled = bytes_moved(8192, 8192, 96, BLOCK_M, 4)
    print(f"BLOCK_M = {BLOCK_M:3}: {naive / 1e6:.0f} MB naive, {tiled / 1e6:.0f} MB tiled")
# 4 T² = 2 T² D / BLOCK_M where BLOCK_M = D / 2.
useless_tile = 48
# END SOLUTION

# %% check="useless_tile"
check(useless_tile=useless_tile)

# %% [markdown]
# ### Solved: one query, one key at a time
#
# The output is an average of values. Its numerator is a sum like `row_sum`, with a value beside
# each weight, so it changes its unit in the same way.

# %%
generator = torch.Generator().manual_seed(0)
query, keys, values = (torch.randn(*s, generator=generator) for s in ((4,), (6, 4), (6, 3)))

row_max, row_sum, acc = torch.tensor(-math.inf), torch.tensor(0.0), torch.zeros(3)
for key, value in zip(keys, values, strict=True):
    score = key @ query / math.sqrt(4)
    new_max = torch.maximum(row_max, score)
    rescale, weight = torch.exp(row_max - new_max), torch.exp(score - new_max)
    row_sum = row_sum * rescale + weight
    acc = acc * rescale + weight * value
    row_max = new_max

at_once = torch.softmax(keys @ query / math.sqrt(4), dim=0) @ values
torch.testing.assert_close(acc / row_sum, at_once)
print(f"largest difference {float((acc / row_sum - at_once).abs().max()):.0e}")

# %% [markdown] card="tiled_attention"


# %% exercise="tiled_attention"
def tiled_attention(q, k, v, block_m, block_n):
    """Attention without a tensor larger than its inputs.

    Args:
        q: [M, D], fp32.
        k: [N, D], fp32.
        v: [N, D], fp32.
        block_m: Queries in a tile; need not divide M.
        block_n: Keys in a tile; need not divide N.

    Returns:
        [M, D], fp32: softmax(q kᵀ / sqrt(D)) v.
    """
    # BEGIN SOLUTION
    out, scale = torch.empty_like(q), q.shape[1] ** -0.5
    for i in range(0, q.shape[0], block_m):
        q_tile = q[i : i + block_m] * scale  # [block_m, D]
        row_max = torch.full([len(q_tile), 1], -math.inf)
        row_sum, acc = torch.zeros_like(row_max), torch.zeros_like(q_tile)
        for j in range(0, k.shape[0], block_n):
            scores = q_tile @ k[j : j + block_n].T  # [block_m, block_n]
            new_max = torch.maximum(row_max, scores.amax(dim=1, keepdim=True))
            rescale, weights = torch.exp(row_max - new_max), torch.exp(scores - new_max)
            row_sum = row_sum * rescale + weights.sum(dim=1, keepdim=True)
            acc = acc * rescale + weights @ v[j : j + block_n]
            row_max = new_max
        out[i : i + block_m] = acc / row_sum
    return out
    # END SOLUTION


# %% check="tiled_attention"
check(tiled_attention)

# %% [markdown]
# ### A formula that everybody knows, and fp32
#
# The variance is the mean of the squares minus the square of the mean. Here are 100,000 numbers
# around 1,000.

# %%
x = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) + 1000
by_formula = (x**2).mean() - x.mean() ** 2
true_variance = x.double().var(correction=0)
print(f"by the formula {float(by_formula):.3f}, in truth {float(true_variance):.3f}")

# %% [markdown] card="one_pass_variance"


# %% exercise="one_pass_variance"
def one_pass_variance(tiles):
    """Mean and variance of a stream, after one pass.

    Args:
        tiles: Iterator of tensors [n], fp32, n > 0 and not always the same. All of them lie in one
            buffer that the next tile overwrites.

    Returns:
        mean: [], fp32.
        variance: [], fp32, the mean squared distance from the mean.
    """
    # BEGIN SOLUTION
    # Enough: the count, the mean, and the sum of squared distances from the mean.
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        n, tile_mean = len(tile), tile.mean()
        total, delta = count + n, tile_mean - mean
        squares = squares + ((tile - tile_mean) ** 2).sum() + delta**2 * (count * n / total)
        mean = mean + delta * (n / total)
        count = total
    return mean, squares / count
    # END SOLUTION


# %% check="one_pass_variance"
check(one_pass_variance)

# %% [markdown]
# Here the core ends. `progress()` shows where you stand. What follows is stretch: take what you
# like. The kernels are the longest way and the best one.

# %%
progress()

# %% [markdown]
# ### How often a mistake does not show
#
# A missing rescale harms nothing when the first tile holds the maximum. Here is how often that
# happens to a random row of 1,024 scores.


# %%
def first_tile_wins(tiles, rows=2000):
    """Share of random rows whose largest of 1,024 scores stands in the first of so many tiles."""
    scores = torch.randn(rows, 1024, generator=torch.Generator().manual_seed(0))
    return float((scores.argmax(dim=1) < 1024 // tiles).float().mean())


for tiles in (1, 2, 16):
    print(f"{tiles:2} tiles: the mistake is exact in {first_tile_wins(tiles):.0%} of the rows")

# %% [markdown] card="accepts_online_softmax"


# %% exercise="accepts_online_softmax"
def accepts_online_softmax(f):
    """Whether an implementation of the online softmax is right.

    Args:
        f: A function that takes an iterator of tensors [n], fp32 and finite, and returns
            (row_max, row_sum).

    Returns:
        True or False.
    """
    # BEGIN SOLUTION
    rows = (
        [[1.0, 3.0], [0.5]],  # the tiles are ragged, and the maximum is not in the last one
        [[1.0, 0.5], [1.5, 4.0], [3.0]],  # it rises, then stays
        [[0.0], [20.0]],  # it rises by much
        [[-5.0, -7.0], [-6.0]],  # every score is negative
        [[500.0, 501.0], [502.0, 1.0]],  # exp of a score overflows
        [[0.0, 1.0], [10.0, 10.0], [9.0]],
    )
    for tiles in rows:
        parts = [torch.tensor(tile) for tile in tiles]
        try:
            row_max, row_sum = f(iter(parts))  # an iterator can be read once
        except Exception:
            return False
        scores = torch.cat(parts).double()
        true_max, true_sum = scores.max(), (scores - scores.max()).exp().sum()
        if abs(row_max - true_max) > 1e-4 * max(1.0, abs(true_max)):
            return False
        # Written so that NaN is not close either.
        if not abs(row_sum - true_sum) <= 1e-4 * true_sum:
            return False
    return True
    # END SOLUTION


# %% check="accepts_online_softmax"
check(accepts_online_softmax)

# %% [markdown]
# ### Solved: the first half of the loop as a kernel
#
# This kernel computes the log-sum-exp of each row of a matrix, a tile of columns at a time. A
# program owns `BLOCK` rows. The state is a vector, one element a row; `axis=1` runs over columns.


# %%
@triton.jit
def row_lse_kernel(x_ptr, lse_ptr, N, BLOCK: tl.constexpr):
    """Write the log-sum-exp of BLOCK rows of x, [M, N]."""
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        tile = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :])  # [BLOCK, BLOCK]
        new_max = tl.maximum(row_max, tl.max(tile, axis=1))
        weights = tl.exp(tile - new_max[:, None])
        row_sum = row_sum * tl.exp(row_max - new_max) + tl.sum(weights, axis=1)
        row_max = new_max
    tl.store(lse_ptr + offs_m, row_max + tl.log(row_sum))


device = "cuda" if torch.cuda.is_available() else "cpu"
x = 5 * torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(device)
lse = torch.empty(64, device=device)
row_lse_kernel[(2,)](x, lse, 96, BLOCK=32)
torch.testing.assert_close(lse, torch.logsumexp(x, dim=1))

# %% [markdown] card="first_flash"


# %% exercise="first_flash"
@triton.jit
def first_flash_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, N, scale, D: tl.constexpr, BLOCK: tl.constexpr
):
    """Write out, [N, D]. A program owns BLOCK queries; every tensor is contiguous."""
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D)
    q_tile = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :])  # [BLOCK, D]
    row_max = tl.full([BLOCK], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)

    for start in range(0, N, BLOCK):
        offs_n = start + tl.arange(0, BLOCK)
        k_tile = tl.load(k_ptr + offs_n[:, None] * D + offs_d[None, :])  # [BLOCK, D]
        v_tile = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :])  # [BLOCK, D]
        # "ieee" keeps fp32 products exact on a GPU's tensor cores.
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale  # [queries, keys]

        # Blank 1: the new maximum of each row, [BLOCK].
        # BEGIN SOLUTION
        # STUB tl.static_assert(False, "TODO first_flash: new_max")
        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        # END SOLUTION
        rescale = tl.exp(row_max - new_max)
        weights = tl.exp(scores - new_max[:, None])
        # Blank 2: row_sum and acc with this tile; tl.dot(weights, v_tile, input_precision="ieee").
        # BEGIN SOLUTION
        # STUB tl.static_assert(False, "TODO first_flash: row_sum and acc")
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + tl.dot(weights, v_tile, input_precision="ieee")
        # END SOLUTION
        row_max = new_max

    # Blank 3: the tile to store, [BLOCK, D].
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO first_flash: out_tile")
    out_tile = acc / row_sum[:, None]
    # END SOLUTION
    tl.store(out_ptr + offs_m[:, None] * D + offs_d[None, :], out_tile)


def first_flash(q, k, v):
    """Launch the kernel.

    Args:
        q: [N, D], fp32, contiguous; N is a multiple of 32, D a power of two of at least 16.
        k: [N, D], likewise.
        v: [N, D], likewise.

    Returns:
        [N, D], fp32.
    """
    (N, D), out = q.shape, torch.empty_like(q)
    first_flash_kernel[(N // 32,)](q, k, v, out, N, D**-0.5, D=D, BLOCK=32)
    return out


# %% check="first_flash"
check(first_flash)

# %% [markdown]
# ### Solved: a tile that is larger than the data
#
# The largest element of each row of a [5, 9] matrix, with a tile of 8 × 16, in a view whose rows
# lie 12 elements apart. Two masks keep the loads inside; the value that fills the masked lanes
# must not win. For a maximum that is -inf.


# %%
@triton.jit
def row_max_kernel(x_ptr, out_ptr, stride, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Write the largest element of each row of x, [M, N]."""
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    x_ptrs = x_ptr + offs_m[:, None] * stride + offs_n[None, :]
    tile = tl.load(x_ptrs, mask=mask, other=float("-inf"))
    tl.store(out_ptr + offs_m, tl.max(tile, axis=1), mask=offs_m < M)


x = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)).to(device)[:, :9] - 9
largest = torch.empty(5, device=device)
row_max_kernel[(1,)](x, largest, x.stride(0), 5, 9, BLOCK_M=8, BLOCK_N=16)
torch.testing.assert_close(largest, x.amax(dim=1))

# %% [markdown] card="flash_forward"


# %% exercise="flash_forward"
@triton.jit
def flash_forward_kernel(
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
):
    """Write out, [M, D], contiguous. A program owns BLOCK_M queries. Change what you like."""
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO flash_forward: offsets, masks, loop, store")
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m, mask_d = (offs_m < M)[:, None], (offs_d < D)[None, :]
    q_ptrs = q_ptr + offs_m[:, None] * stride_q + offs_d[None, :]
    q_tile = tl.load(q_ptrs, mask=mask_m & mask_d, other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    for start in range(0, N, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < N
        mask = mask_n[:, None] & mask_d
        k_ptrs = k_ptr + offs_n[:, None] * stride_k + offs_d[None, :]
        v_ptrs = v_ptr + offs_n[:, None] * stride_v + offs_d[None, :]
        k_tile = tl.load(k_ptrs, mask=mask, other=0.0)
        v_tile = tl.load(v_ptrs, mask=mask, other=0.0)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee") * scale
        # A masked key has score 0, which weighs something. It must weigh nothing.
        scores = tl.where(mask_n[None, :], scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, axis=1))
        rescale = tl.exp(row_max - new_max)
        weights = tl.exp(scores - new_max[:, None])
        row_sum = row_sum * rescale + tl.sum(weights, axis=1)
        acc = acc * rescale[:, None] + tl.dot(weights, v_tile, input_precision="ieee")
        row_max = new_max

    out_ptrs = out_ptr + offs_m[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, acc / row_sum[:, None], mask=mask_m & mask_d)
    # END SOLUTION


def flash_forward(q, k, v):
    """Attention for any number of queries and keys.

    Args:
        q: [M, D], fp32; D is at most 128. Elements of a row are neighbours; rows are
            `q.stride(0)` elements apart, which may be more than D.
        k: [N, D], likewise; N > 0.
        v: [N, D], likewise.

    Returns:
        [M, D], fp32, contiguous: softmax(q kᵀ / sqrt(D)) v.
    """
    # BEGIN SOLUTION
    # STUB raise NotImplementedError("flash_forward: choose the tiles, allocate, launch")
    (M, D), N = q.shape, k.shape[0]
    out = torch.empty(M, D, dtype=q.dtype, device=q.device)
    # A tile needs a power of two, and tl.dot at least 16.
    BLOCK_D = max(16, triton.next_power_of_2(D))
    strides = q.stride(0), k.stride(0), v.stride(0)
    grid = (triton.cdiv(M, 64),)
    flash_forward_kernel[grid](
        q, k, v, out, *strides, M, N, D**-0.5, D=D, BLOCK_D=BLOCK_D, BLOCK_M=64, BLOCK_N=64
    )
    return out
    # END SOLUTION


# %% check="flash_forward"
check(flash_forward)

# %% [markdown]
# ### Solved: draw which tile sees what
#
# 8 × 8 in tiles of 2 × 2. `#`: every query of the tile sees every key of it. `/`: some do. A dot:
# none does.

# %%
visible = torch.ones(8, 8).tril().bool()
tiles = visible.unflatten(0, (4, 2)).unflatten(2, (4, 2)).transpose(1, 2).flatten(2)  # [4, 4, 4]
for row in tiles:
    print(" ".join("#" if tile.all() else "/" if tile.any() else "." for tile in row))

# %% [markdown] card="causal_tiles"


# %% exercise="causal_tiles"
def causal_tiles(Tq, Tk, BLOCK_M, BLOCK_N):
    """Which tiles of keys each block of queries needs, and which of them without a mask.

    Query i sees key j where j <= i + Tk - Tq.

    Args:
        Tq: Number of queries.
        Tk: Number of keys.
        BLOCK_M: Queries in a block.
        BLOCK_N: Keys in a tile.

    Returns:
        A list with (full, end) for each block of queries, as integers: tiles 0 to full - 1 need no
        mask, tiles full to end - 1 need one, tiles from end on are not visited.
    """
    # BEGIN SOLUTION
    plan = []
    for start in range(0, Tq, BLOCK_M):
        last = min(start + BLOCK_M, Tq) - 1
        seen_by_all = min(max(start + Tk - Tq + 1, 0), Tk)  # the first query sees the fewest
        seen_by_any = min(max(last + Tk - Tq + 1, 0), Tk)
        plan.append((seen_by_all // BLOCK_N, math.ceil(seen_by_any / BLOCK_N)))
    return plan
    # END SOLUTION


# %% check="causal_tiles"
check(causal_tiles)

# %% [markdown]
# Try it: with your plan for 1,024 queries and keys in tiles of 32 × 32, how many of 1,024 tiles
# does a causal kernel visit, and how many of those need a mask? The chapter names both numbers.

# %% tags=["exercise"]
visited, masked = ..., ...  # sums over causal_tiles(1024, 1024, 32, 32)

# %% tags=["solution"]
plan = causal_tiles(1024, 1024, 32, 32)
visited, masked = sum(end for _, end in plan), sum(end - full for full, end in plan)
assert (visited, masked) == (528, 32)
print(f"{visited} of {32 * 32:,} tiles are visited, {masked} of them are masked")

# %% [markdown] card="split_decode"


# %% exercise="split_decode"
@triton.jit
def split_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    T,
    split_keys,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write a part's out, [splits, H_q, D], and lse, [splits, H_q]. Change what you like."""
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO split_decode: one key head, one split, GROUP queries")
    kv_head, split = tl.program_id(0), tl.program_id(1)
    H_q = tl.num_programs(0) * GROUP
    rows, offs_d = tl.arange(0, ROWS), tl.arange(0, D)
    mask_rows = rows < GROUP
    heads = kv_head * GROUP + rows
    q_ptrs = q_ptr + heads[:, None] * D + offs_d[None, :]
    q_tile = tl.load(q_ptrs, mask=mask_rows[:, None], other=0.0)  # [ROWS, D]
    row_max = tl.full([ROWS], float("-inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)

    end = tl.minimum((split + 1) * split_keys, T)
    for start in range(split * split_keys, end, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < end
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

    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)  # an empty split: out 0, lse -inf
    place = split * H_q + heads
    out_ptrs = out_ptr + place[:, None] * D + offs_d[None, :]
    tl.store(out_ptrs, acc / divisor[:, None], mask=mask_rows[:, None])
    tl.store(lse_ptr + place, row_max + tl.log(divisor), mask=mask_rows)
    # END SOLUTION


def split_decode(q, k, v, splits):
    """Attention of one new token to a cache.

    Args:
        q: [H_q, D], fp32, contiguous; D is a power of two of at least 16.
        k: [H_kv, T, D], fp32, contiguous; query head h reads key head h // (H_q // H_kv).
        v: [H_kv, T, D], likewise.
        splits: Number of programs that share the keys of one key head; some may get none.

    Returns:
        [H_q, D], fp32.
    """
    # BEGIN SOLUTION
    # STUB raise NotImplementedError("split_decode: launch (H_kv, splits) programs, then merge")
    (H_q, D), (H_kv, T, _) = q.shape, k.shape
    group = H_q // H_kv
    parts = torch.empty(splits, H_q, D, device=q.device)
    lse = torch.empty(splits, H_q, device=q.device)
    rows = max(16, triton.next_power_of_2(group))
    sizes = {"GROUP": group, "D": D, "ROWS": rows, "BLOCK_N": 64}
    grid, split_keys = (H_kv, splits), triton.cdiv(T, splits)
    split_decode_kernel[grid](q, k, v, parts, lse, T, split_keys, D**-0.5, **sizes)
    share = torch.softmax(lse, dim=0)  # [splits, H_q]
    return (share[..., None] * parts).sum(0)
    # END SOLUTION


# %% check="split_decode"
check(split_decode)

# %% [markdown]
# ### Solved: the backward pass of one row
#
# Probabilities p = (.5, .25, .25), and the gradient with respect to them is (4, 0, 0). A score
# moves its own probability up and all of them down, so what counts is the distance from the
# average: `delta`, the sum of p times the gradient.

# %%
p, dp = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([4.0, 0.0, 0.0])
delta = (p * dp).sum()
ds = p * (dp - delta)

s = p.log().requires_grad_()
torch.softmax(s, dim=0).backward(dp)
torch.testing.assert_close(ds, s.grad)
assert ds.sum() == 0
print(f"delta = {float(delta)}, ds = {ds.tolist()}")

# %% [markdown]
# And delta needs no probabilities: the sum of p · dp over the keys is the sum of out · grad_out
# over the head dimension, because dp = grad_out · v and out = p · v.

# %% [markdown] card="attention_backward"


# %% exercise="attention_backward"
def attention_backward(q, k, v, out, lse, grad_out, block):
    """Gradients of out = softmax(q kᵀ / sqrt(D)) v.

    Args:
        q: [M, D], fp32.
        k: [N, D], fp32.
        v: [N, D], fp32.
        out: [M, D], fp32, the forward's output.
        lse: [M], fp32, natural log-sum-exp of each row of q kᵀ / sqrt(D).
        grad_out: [M, D], fp32.
        block: Keys (or queries) taken at a time; need not divide.

    Returns:
        dq: [M, D], fp32.
        dk: [N, D], fp32.
        dv: [N, D], fp32.
    """
    # BEGIN SOLUTION
    scale = 1 / math.sqrt(q.shape[1])
    delta = (grad_out * out).sum(dim=1, keepdim=True)  # [M, 1]
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for j in range(0, k.shape[0], block):
        keys = slice(j, j + block)
        probs = torch.exp(scale * q @ k[keys].T - lse[:, None])  # [M, block]
        dv[keys] = probs.T @ grad_out
        dscores = probs * (grad_out @ v[keys].T - delta)
        dq += scale * dscores @ k[keys]
        dk[keys] = scale * dscores.T @ q
    return dq, dk, dv
    # END SOLUTION


# %% check="attention_backward"
check(attention_backward)

# %% [markdown] card="two_new_tokens"

# %% exercise="two_new_tokens"
generator = torch.Generator().manual_seed(0)
q = torch.randn(1, 1, 2, 8, generator=generator)
k, v = torch.randn(2, 1, 1, 10, 8, generator=generator)
# BEGIN SOLUTION
# STUB # Measure here: the distance of the output's row 1 to each candidate.
# STUB two_new_tokens = ...  # "A", "B", "C", "D" or "E"
attention = torch.nn.functional.scaled_dot_product_attention
out = attention(q, k, v, is_causal=True)[0, 0, 1]
seen = {"A": slice(0, 10), "B": slice(8, 10), "C": slice(9, 10), "D": slice(0, 2)}
for letter, keys in seen.items():
    row = attention(q, k[:, :, keys], v[:, :, keys])[0, 0, 1]
    print(letter, f"is {float((out - row).abs().max()):.2g} away")
two_new_tokens = "D"
# END SOLUTION

# %% check="two_new_tokens"
check(two_new_tokens=two_new_tokens)

# %% [markdown]
# ## Where you stand

# %%
progress()
