# %% [markdown]
# # Why is the exact answer cheaper?
#
# Take 8,192 tokens with vectors of length 64 and compute self-attention (自注意力) on one CPU
# thread. One program makes three library calls. The other is a Python loop of twenty lines. It
# works on small pieces, corrects itself again and again, and does *more* arithmetic. Both give the
# same answer, up to float32 rounding. Which one is faster, and where does the other's time go?
#
# The answer leads to the idea behind FlashAttention, and you will build it in steps small enough to
# find again without notes. Chinese terms stand in brackets, since the texts behind this course are
# Chinese.
#
# **Afterwards you can**
#
# * derive online softmax and one-pass attention from one invariant;
# * count the bytes and operations of an attention kernel before anyone runs it;
# * say which tile size matters, why, and when tiling saves nothing;
# * read a FlashAttention kernel in Triton, line by line;
# * name six things that are often said about FlashAttention and are not so.
#
# **You need** Python, some PyTorch, and matrix products, but no earlier chapter. One thing is a
# black box until section 7: `flash_attention`, the course's own operator. Its contract is one
# assertion; it stands below the setup. No GPU is needed.
#
# **Time:** 70 to 90 minutes here, labs included; then about 80 for the core exercises. The end
# of section 5 is a good place for a break.

# %% tags=["setup"]
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

from course_lib import setup
from course_lib.flash_attention import flash_attention, kernels, labs, reference_attention
from course_lib.notebook.figures import show, source
from course_lib.notebook.questions import predict, recall, reveal
from course_lib.notebook.recorded import excerpt, recorded, recorded_on
from course_lib.runtime.measure import count_flops, measure_memory, roofline, time_interleaved
from course_lib.runtime.tile import HAS_TRITON

setup("flash_attention")

# %%
qkv = torch.randn(3, 2, 4, 100, 64, generator=torch.Generator().manual_seed(0))
ours = flash_attention(*qkv, causal=True)
assert torch.allclose(ours, reference_attention(*qkv, causal=True), atol=1e-6)

# %% [markdown]
# If you did earlier chapters, warm up with three of their questions; recalling an answer helps more
# than rereading it. If not, go straight on.

# %%
recall("flash_attention")

# %% [markdown]
# ## 1. The puzzle
#
# Here are the three calls. `scores` are the attention scores (注意力分数), also called logits;
# division by 8 = √64 is the scaling factor (缩放因子).

# %%
TOKENS, HEAD_DIM = 8192, 64


def three_calls(q, k, v):
    scores = (q / math.sqrt(q.shape[1])) @ k.T  # [TOKENS, TOKENS]
    weights = torch.softmax(scores, dim=-1)
    return weights @ v


# %% [markdown]
# And here is the loop. Do not try to understand the middle yet: it is what sections 3 to 6 build.
# Notice only that no matrix of scores in it is larger than 512 × 512.


# %%
def tiled_loop(q, k, v, tile=512):
    out = torch.empty_like(q)
    for i in range(0, len(q), tile):
        q_tile = q[i : i + tile] / math.sqrt(q.shape[1])
        row_max = torch.full((len(q_tile), 1), -math.inf)
        row_sum, acc = torch.zeros_like(row_max), torch.zeros_like(q_tile)
        for j in range(0, len(k), tile):
            scores = q_tile @ k[j : j + tile].T
            new_max = torch.maximum(row_max, scores.amax(dim=1, keepdim=True))
            weights = (scores - new_max).exp_()
            rescale = (row_max - new_max).exp()
            row_sum = row_sum * rescale + weights.sum(dim=1, keepdim=True)
            acc = acc * rescale + weights @ v[j : j + tile]
            row_max = new_max
        out[i : i + tile] = acc / row_sum
    return out


# %%
predict("puzzle")

# %% [markdown]
# Now both run: one thread, taking turns, so that a slow moment of the machine slows both. A third
# candidate makes the same three calls, but writes into two large buffers that exist already.

# %% tags=["outcome"]
generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(TOKENS, HEAD_DIM, generator=generator) for _ in range(3))
buffers = [torch.zeros(TOKENS, TOKENS) for _ in range(2)]


def three_calls_into_buffers():
    torch.mm(q / math.sqrt(HEAD_DIM), k.T, out=buffers[0])
    torch.softmax(buffers[0], dim=-1, out=buffers[1])
    return buffers[1] @ v


ways = {
    "three calls": lambda: three_calls(q, k, v),
    "three calls into buffers": three_calls_into_buffers,
    "loop over tiles": lambda: tiled_loop(q, k, v),
}
timings = time_interleaved(ways, repeats=3, warmup=0)
seconds = {name: timing.median for name, timing in timings.items()}
lines = {name: f"{value:.2f} s" for name, value in seconds.items()}
ratio = seconds["three calls"] / seconds["loop over tiles"]
lines["The loop is faster by"] = f"a factor of {ratio:.1f}"
run = recorded("flash_attention_cpu")
if ratio < 1.3 and run:
    best = {name: each["best"] for name, each in run["seconds"].items()}
    lines["Recorded"] = (
        f"{best['three calls']:.2f} s against {best['tile 512']:.2f} s ({recorded_on(run)})"
    )
reveal("puzzle", lines)

# %%
# NBVAL_CHECK_OUTPUT
truth = three_calls(q[:1024].double(), k.double(), v.double())
for way in (three_calls, tiled_loop):
    error = (way(q[:1024], k, v) - truth).abs().max().item()
    assert error < 5e-7
    print(f"{way.__name__:11} differs from float64 by less than", 5e-7)
buffers.clear()  # 537 MB

# %% [markdown]
# So the loop is no approximation: both are as exact as float32 allows. And Python is not what costs.
# Something large was going on in those three calls.
#
# ## 2. Count before you compute
#
# A program moves bytes and does arithmetic. Count both before anything is measured. With $N$ tokens,
# vectors of length $d$ and $b$ bytes a number, the three calls do this, in numbers moved:
#
# | call | reads | writes | operations |
# |:--|:--|:--|:--|
# | $S = QK^\top$ | $2Nd$ | $N^2$ | $2N^2d$ |
# | $P = \mathrm{softmax}(S)$ | $N^2$ | $N^2$ | a few $N^2$ |
# | $O = PV$ | $N^2 + Nd$ | $Nd$ | $2N^2d$ |
#
# Together, in bytes and in operations (a multiplication and an addition are two):
#
# $$\text{moved} = (4Nd + 4N^2)\,b \qquad \text{operations} = 4N^2d$$
#
# The inputs and the output are $4Nd$. All the rest is two intermediate matrices (中间矩阵) that
# nobody asked for.

# %%
# NBVAL_CHECK_OUTPUT
moved = labs.naive_bytes(TOKENS, HEAD_DIM, itemsize=4)
flops = 4 * TOKENS**2 * HEAD_DIM
assert moved == 4 * (4 * TOKENS * HEAD_DIM + 4 * TOKENS**2)
assert flops == 64 * count_flops(lambda: three_calls(q[:1024], k[:1024], v[:1024]))
wanted = 4 * 4 * TOKENS * HEAD_DIM
print(f"operations        {flops / 1e9:8.1f} billion")
print(f"bytes moved       {moved / 1e6:8.0f} MB")
print(f"inputs and output {wanted / 1e6:8.1f} MB, {wanted / moved:.1%} of that")

# %% [markdown]
# Less than one byte in a hundred is input or output. How much memory the intermediate matrices
# occupy can be measured: `measure_memory` counts the bytes of tensors made inside its block. Twice
# the tokens, four times the memory; the loop grows with its output.

# %%
# NBVAL_CHECK_OUTPUT
peak = {}
for n in (2048, 4096):
    for way in (three_calls, tiled_loop):
        with measure_memory() as measure:
            way(q[:n], k[:n], v[:n])
        peak[way, n] = measure.peak_bytes / 1e6
        print(f"{n} tokens, {way.__name__:12} peak {peak[way, n]:6.1f} MB")
assert 3.9 < peak[three_calls, 4096] / peak[three_calls, 2048] < 4.1 and peak[tiled_loop, 4096] < 5
assert round(TOKENS**2 * 4 / 1e6) == 268

# %% [markdown]
# Where, then, did the time go? Open the outcome above once more. With buffers that exist beforehand
# the three calls come close to the loop. So on this CPU most of the gap is the cost of *obtaining*
# 2 × 268 MB of fresh memory, which the operating system hands over page by page. The loop's scores
# take 1 MB a tile, and the same 1 MB serves again and again. Traffic itself becomes the limit where
# arithmetic is fast and memory is not: on a GPU. Section 8 says which of the two a machine waits
# for, and puts your own CPU on the map.
#
# The trouble with such matrices has three names: a memory bottleneck (内存瓶颈), I/O overhead
# (I/O开销), and a limit to scaling (扩展性限制), since GPU memory (显存) ends long before the
# sequence does. For 32 heads in 16 bits the scores of this one layer would be 4.3 GB.

# %%
assert round(32 * TOKENS**2 * 2 / 1e9, 1) == 4.3
if run:
    best = {name: each["best"] for name, each in run["seconds"].items()}
    gap = best["three calls"] - best["tile 512"]
    assert best["three calls"] - best["into buffers"] > 0.75 * gap  # gone, once buffers exist
assert round(512 * 512 * 4 / 1e6) == 1

# %% [markdown]
# The plan follows from the table: **never write S or P.** Compute a piece of S, use it, forget it.
# One thing is in the way. Softmax divides by a sum over the *whole* row, and the row is exactly
# what we do not want to keep.
#
# ## 3. Softmax: three passes, then two
#
# **Why a maximum.** $e^{x}$ leaves float32 at $x \approx 88.7$. Shifting all scores by the same
# amount changes no weight, so everyone subtracts the row's maximum first.

# %%
assert round(math.log(torch.finfo(torch.float32).max), 1) == 88.7
row = torch.tensor([12.0, 1.0, 0.0]) * 10
assert row.exp().sum().isinf()  # e^120 is too large for float32
assert torch.equal((row - row.max()).exp().sum(), torch.tensor(1.0))

# %% [markdown]
# **Three passes.** The safe softmax reads the scores three times:
#
# $$m=\max_i x_i \qquad \ell=\sum_i e^{x_i-m} \qquad p_i=\frac{e^{x_i-m}}{\ell}$$

# %%
scores = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0, 0.0], dtype=torch.float64)
m = max(scores)  # pass 1
ell = sum(math.exp(x - m) for x in scores)  # pass 2
p = [math.exp(x - m) / ell for x in scores]  # pass 3
assert torch.allclose(torch.tensor(p, dtype=torch.float64), torch.softmax(scores, dim=0))

# %% [markdown]
# **Two passes.** Can the sum be taken while the maximum is still unknown? Suppose that after $i$
# scores we hold the maximum *so far* and the sum *relative to it*:
#
# $$\ell_i=\sum_{j\le i}e^{x_j-m_i}$$
#
# A larger score arrives. Every term of the sum is now measured from the wrong origin, and all of
# them by the same factor $e^{m_{i-1}-m_i}$. One multiplication repairs the whole past:
#
# $$m_i=\max(m_{i-1},x_i)\qquad \ell_i=\ell_{i-1}\,e^{m_{i-1}-m_i}+e^{x_i-m_i}$$
#
# This is online softmax (在线 Softmax). The cell checks the invariant after every score, not only at
# the end.

# %%
m, ell = -math.inf, 0.0
for i, x in enumerate(scores.tolist()):
    new_m = max(m, x)
    ell = ell * math.exp(m - new_m) + math.exp(x - new_m)
    m = new_m
    assert math.isclose(ell, (scores[: i + 1] - m).exp().sum())

# %% [markdown]
# Note the start: the maximum of nothing is $-\infty$, and $e^{-\infty - m} = 0$ forgets the empty
# past by itself.
#
# Try it on numbers of your own. Then make the classical mistake, and find out when nobody notices.

# %%
labs.online_softmax_lab()

# %% [markdown]
# How often does the repair happen? Commit to a number.

# %%
predict("running_max")

# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
rows = torch.randn(2000, 8192, generator=torch.Generator().manual_seed(0))


def new_maxima(values, slack=0.0):
    """How often a row's running maximum is replaced; it may be exceeded by `slack` before it is."""
    held, count = values[:, 0].clone(), torch.ones(len(values))
    for column in values.T[1:]:
        higher = column > held + slack
        held = torch.where(higher, column, held)
        count += higher
    return count


tiles = rows.unflatten(1, (64, 128)).amax(dim=2)  # the largest score of each of 64 tiles
one_by_one = (rows.cummax(dim=1).values.diff(dim=1) > 0).sum(dim=1).add(1).float().mean().item()
by_tile = new_maxima(tiles).mean().item()
lazy = new_maxima(tiles * math.log2(math.e), slack=8.0)
harmonic = sum(1 / n for n in range(1, 8193))
assert abs(one_by_one - harmonic) < 0.2 and lazy.max() == 1
reveal(
    "running_max",
    {
        "One score at a time": f"{one_by_one:.1f} (harmonic number {harmonic:.2f})",
        "64 tiles of 128 scores": f"{by_tile:.1f}",
        "64 tiles, repaired only past a factor of 2⁸": f"{lazy.mean():.0f}: the first tile's alone",
    },
)

# %% [markdown]
# The outcome's last line is what FlashAttention-4 does with 16-bit inputs (`flash_attn/cute` in
# Dao-AILab/flash-attention). The origin need not be the exact maximum, only close enough that nothing
# overflows. If it is moved only when $e^{\text{score}}$ exceeds $e^{\text{origin}}$ by a factor of
# $2^8$, random scores never move it after the first tile, and the rescaling is skipped.
#
# ## 4. One pass for attention, though none for softmax
#
# Two passes remain, since the weights $p_i$ need the final sum. For softmax itself there is no way
# around this: the last score changes every earlier weight. But attention does not want the weights.
# It wants one weighted sum of the values, and a sum can be repaired as $\ell$ was:
#
# $$o_i=o_{i-1}\,\frac{\ell_{i-1}\,e^{m_{i-1}-m_i}}{\ell_i}+\frac{e^{x_i-m_i}}{\ell_i}\,v_i$$
#
# The invariant: $o_i$ is the exact attention output over the first $i$ keys.

# %%
values = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
m, ell, o = -math.inf, 0.0, torch.zeros(4, dtype=torch.float64)
for i, x in enumerate(scores.tolist()):
    new_m = max(m, x)
    rescale, weight = math.exp(m - new_m), math.exp(x - new_m)
    new_ell = ell * rescale + weight
    o = o * (ell * rescale / new_ell) + weight / new_ell * values[i]
    m, ell = new_m, new_ell
    assert torch.allclose(o, torch.softmax(scores[: i + 1], dim=0) @ values[: i + 1])

# %% [markdown]
# One pass, and a state of two numbers and one vector, however long the row is. FlashAttention-2
# keeps the product $a_i = \ell_i\,o_i$ instead and divides once at the end. That is one division a row
# in place of one a step:
#
# $$a_i=a_{i-1}\,e^{m_{i-1}-m_i}+e^{x_i-m_i}\,v_i\qquad o=a_N/\ell_N$$

# %%
m, ell, a = -math.inf, 0.0, torch.zeros(4, dtype=torch.float64)
for x, value in zip(scores.tolist(), values, strict=True):
    new_m = max(m, x)
    rescale, weight = math.exp(m - new_m), math.exp(x - new_m)
    ell, a, m = ell * rescale + weight, a * rescale + weight * value, new_m
assert torch.allclose(a / ell, o)

# %% [markdown]
# Read the puzzle's loop again. `row_max`, `row_sum`, `acc` and `rescale` are $m$, $\ell$, $a$ and the
# factor, for 512 rows and 512 keys at a time.
#
# ## 5. States can be merged
#
# Nothing above used the order of the keys. So two workers may take different keys and merge their
# results, in any order and any grouping. Each hands over its output and $L = m + \log \ell$, the row's
# logsumexp. The weight of part $s$ is its share of the total sum:
#
# $$L=\log\sum_s e^{L_s}\qquad o=\sum_s e^{L_s-L}\,o_s$$
#
# At least one part must have seen a key. If all are empty, every $L_s$ is $-\infty$, and the weights
# are $-\infty-(-\infty)$: not a number. A merge must treat that case by itself.
#
# During generation there is one query and a long cache of keys. With few sequences and heads, only
# splitting the keys keeps a whole GPU busy; it is called split-KV. The exercises build the merge
# itself.

# %%
qs, ks, vs = torch.randn(3, 1, 1, 90, 16, dtype=torch.float64, generator=generator)
parts = [
    flash_attention(qs, ks[:, :, s], vs[:, :, s], return_lse=True)
    for s in (slice(0, 7), slice(7, 60), slice(60, 90))
]
for order in ([0, 1, 2], [2, 0, 1]):
    outs, lses = (torch.stack(each) for each in zip(*(parts[i] for i in order), strict=True))
    merged = (torch.softmax(lses, dim=0)[..., None] * outs).sum(dim=0)
    assert torch.allclose(merged, reference_attention(qs, ks, vs), atol=1e-14)
empty = torch.tensor([-math.inf, -math.inf])
assert torch.softmax(empty, dim=0).isnan().all()  # no part has seen a key

# %% [markdown]
# ## 6. Tiles
#
# A chip has little fast memory and much slow memory; on a GPU the slow one is called global memory
# (全局内存). So we work in tiles (分块, tiling): hold BLOCK_M queries on the chip, and walk over the
# keys, BLOCK_N at a time. Scores of one tile are made, used and dropped. In this way the whole
# attention, all heads (多头注意力) included, is fused (融合) into one kernel, and the scores never
# reach global memory.
#
# Q is read once and O is written once. But every block of queries walks over all of K and V. Before
# you count the bytes: which change of tiles pays?

# %%
predict("tile_shape")

# %% [markdown]
# We do not trust formulas about kernels. The course's Triton kernel runs in an interpreter that
# notes every load and store, so the bytes below are counted, not computed. (Where Triton cannot be
# installed, a formula has to do.)


# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
def count_bytes(block_m, block_n, n=1024, d=64):
    """Bytes that the forward kernel reads, as its trace says; float32, one head."""
    if not HAS_TRITON:
        return labs.tiled_bytes(n, d, 4, block_m) - n * d * 4
    inputs = labs.walker_inputs(n, d)
    launch, out, _ = labs.trace_forward(*inputs, block_m=block_m, block_n=block_n)
    assert torch.allclose(out, reference_attention(*inputs), atol=1e-5)
    return sum(access.nbytes for access in launch.accesses if access.kind == "load")


read = {(m, n): count_bytes(m, n) for m, n in ((64, 64), (64, 128), (128, 64), (32, 256))}
for (m, _), count in read.items():
    assert count == labs.tiled_bytes(1024, 64, 4, m) - 1024 * 64 * 4  # all but the output
reveal(
    "tile_shape",
    {f"BLOCK_M {m}, BLOCK_N {n}": f"{count / 1e6:.1f} MB read" for (m, n), count in read.items()},
)

# %% [markdown]
# Now the formula. K and V are read once *for each block of queries*, so
#
# $$\text{moved}=\Bigl(2Nd+\frac{N}{\text{BLOCK\_M}}\,2Nd\Bigr)\,b$$
#
# and the cell above holds the kernel to it, to the last byte. One symbol is missing in it: BLOCK_N.
#
# The lab steps through that very trace. The square in the middle is the score matrix; it is dashed,
# because it does not exist in memory. Change BLOCK_N, then BLOCK_M, and watch the total. Then put
# the keys outside: that is the loop order of the first FlashAttention paper.

# %%
labs.tile_walker(step=13)

# %% [markdown]
# With the keys outside, K and V are read once, but the unfinished outputs go back and forth through
# memory, and no two blocks of keys can run at the same time. FlashAttention-2 swapped the loops.
#
# **Causal.** With a causal attention mask (注意力掩码), query $i$ sees keys up to $i$. Tiles above
# the diagonal are skipped, tiles below need no mask, and only those on it need one.

# %%
# NBVAL_CHECK_OUTPUT
tiles_of = {}
for n in (8, 32):
    visible = torch.ones(32 * n, 32 * n).tril().bool().view(n, 32, n, 32)
    some, every = visible.any(dim=3).any(dim=1), visible.all(dim=3).all(dim=1)
    tiles_of[n] = int(some.sum())
    print(f"{n:2} × {n:2} tiles: {tiles_of[n]:3} of {n * n:4} visited,", end=" ")
    print(int((some & ~every).sum()), "masked")
walk = labs.walk_forward(32, 32, True, labs.QUERY_OUTER)  # 256 tokens: 8 × 8 tiles
assert sum(access.tensor == "k" for access in walk.accesses) == tiles_of[8]  # the kernel agrees

# %% [markdown]
# ## 7. The kernel, read aloud
#
# Below is the kernel whose trace you just stepped through, piece by piece from the library's own
# source. `tl` is Triton's language: a *program* is one instance of the kernel, and a `[BLOCK_M,
# BLOCK_N]` value is a tile on the chip. `Tq` and `Tk` count queries and keys. `scale_log2` is the
# scaling factor times $\log_2 e$, an argument; why, the step below says.
#
# **Who owns what.** The grid has one program for each block of queries, each head (头数) and each
# sequence of the batch (批次). A program owns its queries' output entirely, so no program waits.

# %%
excerpt(kernels.flash_attention_fwd_kernel, "# Grid (blocks", "kv_head = head")

# %% [markdown]
# `Hq // Hkv` query heads share one head of keys and values (grouped-query attention, GQA). The
# program divides its head's number, and nothing is copied.
#
# **Where.** Pointers move to this program's head. `VARLEN` is for packed batches (chapter 07), in
# which sequences of different lengths lie one after another: a program first finds out whose
# queries it has. Here it is false, and the compiler leaves those lines out.

# %%
excerpt(kernels.flash_attention_fwd_kernel, "q_ptr += batch", "lse_ptr += q_begin")

# %% [markdown]
# **The state.** `offs_m` are the numbers of this program's queries. One tile of queries is loaded
# once, and each of its rows has $m$, $\ell$ and $a$. Q, K and V may come in 16 bits; scores and state
# are always float32.

# %%
excerpt(kernels.flash_attention_fwd_kernel, "start_m = block_m", "acc = tl.zeros")

# %% [markdown]
# **A tile from memory.** `load_tile` reads BLOCK_T rows of BLOCK_D numbers, where BLOCK_D is D
# rounded up to a power of two. What lies past D or past the last row is not read, and counts as
# zero. `ALIGN` promises the compiler where rows begin, so that it may read 16 bytes at once.

# %%
source(kernels.load_tile)

# %% [markdown]
# **How far.** `key_range` gives four places. From `begin` to `end` lie the keys that some query of
# the block sees; from `unmasked_begin` to `unmasked_end` those that every query sees. In causal
# attention `begin` is 0, and the block's last queries set the end. With a sliding window (滑动窗口),
# in which a query sees only `left` keys before its own and `right` after it, the walk also starts
# late: tiles outside the window are never visited.

# %%
source(kernels.key_range)

# %% [markdown]
# **The walk.** Load keys, make scores, hide what must not be seen, take the scores into the state,
# load values, add, move both pointers on by BLOCK_N rows. It is the puzzle's inner loop, compiled
# once for each stretch: without a mask where every query sees every key, with one at the edges.

# %%
excerpt(kernels.flash_attention_fwd_kernel, "# The loop is compiled", "v_tile_ptr += BLOCK_N")

# %% [markdown]
# **The mask.** Query $i$ sees keys up to $i + Tk - Tq$, so that the last query sees every key.

# %%
source(kernels.causal_mask)

# %% [markdown]
# **The step**, section 4 in six lines. Two details pay their way. Exponentials are powers of two,
# since that is the instruction the hardware has: $e^x = 2^{x\log_2 e}$, with $\log_2 e$ folded into
# the scale. And a row that has seen no key yet would compute $-\infty-(-\infty)$, which is not a
# number; `origin` prevents that.

# %%
source(kernels.online_softmax_step)

# %% [markdown]
# **The end.** Divide once, write O, and write $L=m+\log \ell$: one number a row, for merging (section
# 5) and for the backward pass.

# %%
source(kernels.finish_softmax)

# %%
excerpt(kernels.flash_attention_fwd_kernel, "o_tile, lse =", "tl.store(lse_ptr")

# %% [markdown]
# The same kernel, program by program, in the viewer that you will use on your own kernels: which
# tile each access touches, on which line, and the bytes so far, beside a run with twice the
# BLOCK_M.

# %%
from course_lib.notebook.trace_viewer import trace_viewer

walk = labs.walk_forward(64, 64, False, labs.QUERY_OUTER)
trace_viewer(
    walk.launch,
    {"q": "Q", "k": "K", "v": "V", "o": "O", "lse": "L"},
    kernel=kernels.flash_attention_fwd_kernel,
    beside=labs.walk_forward(128, 64, False, labs.QUERY_OUTER).launch,
    beside_name="the kernel with BLOCK_M = 128",
)

# %% [markdown]
# ## 8. Measured
#
# A device has two limits: operations a second, and bytes a second. Their quotient, the *ridge*, is
# how many operations it can do in the time of moving one byte. An algorithm with fewer operations a
# byte than that waits for memory, and more operations in the waiting time would cost nothing. So a
# kernel that does more arithmetic may take less time.
#
# From the two formulas, in 16 bits ($b = 2$): the three calls do about $4N^2d/4N^2b = d/2$
# operations a byte, and the tiled kernel about BLOCK_M.

# %%
# NBVAL_CHECK_OUTPUT
for head_dim, block_m in ((64, 128), (128, 64), (128, 128)):
    naive, tiled = labs.attention_points(labs.PREFILL, 8192, head_dim, block_m, 1, itemsize=2)
    print(
        f"d = {head_dim:3}, BLOCK_M = {block_m:3}: "
        f"{naive.nbytes / 1e6:.0f} MB at {naive.intensity:3.0f} operations a byte, "
        f"tiled {tiled.nbytes / 1e6:.0f} MB at {tiled.intensity:3.0f}"
    )
assert (round(naive.nbytes / 1e6), round(tiled.nbytes / 1e6)) == (545, 273)

# %% [markdown]
# Look at the second line: with $d = 128$ and BLOCK_M = 64, tiling moves 541 MB where the three calls
# move 545. It saves nothing. **Tiling is not the idea; reuse is.** The one number that counts is
# query rows for each load of K and V: BLOCK_M when a prompt is read (prefill), and the group size
# when one token is generated. (A GPU's L2 cache helps both; the count ignores it.)
#
# The lab's peaks are those of NVIDIA's datasheets, dense and in 16 bits. Real kernels stay below.

# %%
labs.roofline_lab()

# %% [markdown]
# Your own machine has a ridge as well. It was measured just now, on one thread. Put the puzzle's
# three calls beside it, in float32:

# %%
mine = roofline()
naive, tiled = labs.attention_points(labs.PREFILL, TOKENS, HEAD_DIM, 512, 1, itemsize=4)
print(f"arithmetic {mine.flops_per_second / 1e9:6.0f} billion operations a second")
print(f"memory     {mine.bytes_per_second / 1e9:6.1f} billion bytes a second")
print(f"ridge      {mine.ridge:6.1f} operations a byte; an A100's is 153")
waits = "memory" if naive.intensity < mine.ridge else "arithmetic"
print(f"three calls {naive.intensity:5.1f} operations a byte: their limit here is {waits}")
print(f"tiles of 512 {tiled.intensity:4.0f}")
assert round(naive.intensity) == 16 and round(tiled.nbytes / 1e6) == 71
assert round(labs.DEVICES["A100 80 GB"].flops / labs.DEVICES["A100 80 GB"].bandwidth) == 153

# %% [markdown]
# A ridge below 16, as one CPU core usually has it, means: here the three calls are not short of
# bandwidth, and with buffers in hand they come close to the loop. Under an A100's ridge of 153 they
# are far to the left, and traffic is what they wait for. What a CPU does not forgive shows in the
# recorded curve: tiles too small drown in Python's overhead, tiles too large fall out of the cache,
# and in between lies a broad valley.

# %% tags=["folded"]
run = recorded("flash_attention_cpu")
if run is None:
    print("The recorded curve comes with the course's repository: benchmarks/recorded/.")
else:
    best = {name: each["best"] for name, each in run["seconds"].items()}
    sizes = [int(name.split()[1]) for name in best if name.startswith("tile ")]
    times = [best[f"tile {size}"] for size in sizes]
    assert min(times) < best["three calls"] / 1.5 and times[0] > min(times)
    fig, ax = plt.subplots()
    ax.loglog(sizes, times, "o-", base=2, label="loop over tiles")
    ax.axhline(best["three calls"], color="C1", ls="--", label="three calls")
    ax.axhline(best["into buffers"], color="C2", ls=":", label="three calls into buffers")
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_yticks([0.25, 0.5, 1, 2, 4], ["0.25", "0.5", "1", "2", "4"])
    ax.set(xlabel="tile (queries = keys)", ylabel="seconds, best run", title="N = 8192, d = 64")
    ax.legend()
    show(
        fig,
        alt=f"Time against tile size: {times[0]:.1f} s at tile {sizes[0]}, least "
        f"({min(times):.2f} s) at {sizes[times.index(min(times))]}; three calls "
        f"{best['three calls']:.2f} s.",
        caption=f"Recorded: {recorded_on(run)}, float32, best of {run['repeats']} runs in turn.",
    )

# %% [markdown]
# **On a GPU.** No recorded GPU run stands in this course yet, so no GPU curve is shown. On a machine
# with one, `course bench flash_attention` measures the kernel against PyTorch's backends.
#
# ## 9. In the wild
#
# A small Llama with random weights, straight from the transformers library. Its attention is
# replaced through the library's own hooks, and there are two: the function itself, and what becomes
# of masks. A replacement that forgets the second gets no mask at all, and its model reads the
# future. `register_attention` sets both. No mask tensor is made: the causal rule, windows, padding
# and packed sequences reach the kernels as numbers, and what the kernels cannot do is refused.

# %%
try:
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError:
    LlamaForCausalLM = None
    print("transformers is not installed here: pip install transformers. The rest goes on without.")

# %%
# NBVAL_CHECK_OUTPUT
if LlamaForCausalLM:
    from course_lib.flash_attention.hugging_face import register_attention

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 128, "intermediate_size": 128, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        llama = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    tokens = torch.randint(0, 128, (2, 77), generator=torch.Generator().manual_seed(0))
    logits, texts = {}, {}
    for name in ("eager", register_attention()):
        llama.set_attn_implementation(name)
        with torch.no_grad():
            logits[name] = llama(tokens).logits
            texts[name] = llama.generate(tokens[:1, :5], max_new_tokens=20, do_sample=False)
    assert (logits["eager"] - logits["course_attention"]).abs().max() < 1e-5
    assert torch.equal(texts["eager"], texts["course_attention"])
    print("same logits, and the same 20 generated tokens")

# %% [markdown]
# Equal logits show agreement for these tokens. Test the property itself, causality, as well: change
# the token at position 50; nothing before it may move, not by one bit.

# %%
# NBVAL_CHECK_OUTPUT
if LlamaForCausalLM:
    changed = tokens.clone()
    changed[:, 50] = (changed[:, 50] + 1) % 128
    with torch.no_grad():
        moved_by = (llama(changed).logits - logits["course_attention"]).abs().amax(dim=(0, 2))
    assert moved_by[:50].max() == 0 and moved_by[50:].max() > 0.01
    print("positions that moved:", int((moved_by > 0).nonzero()[0]), "and later")

# %% [markdown]
# **PyTorch has its own**, `F.scaled_dot_product_attention`. Where there are as many queries as keys,
# it agrees. During generation there are not, and a flag with an obvious name is waiting.

# %%
assert torch.allclose(F.scaled_dot_product_attention(*qkv, is_causal=True), ours, atol=1e-6)

# %%
predict("one_new_token")

# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
one = torch.randn(1, 1, 1, 64, generator=generator)
keys, vals = torch.randn(2, 1, 1, 10, 64, generator=generator)
out = F.scaled_dot_product_attention(one, keys, vals, is_causal=True)
assert torch.equal(out[0, 0, 0], vals[0, 0, 0])
right = reference_attention(one, keys, vals)  # one token, ten keys: it may see them all
assert torch.allclose(flash_attention(one, keys, vals, causal=True), right, atol=1e-6)
assert torch.allclose(F.scaled_dot_product_attention(one, keys, vals), right, atol=1e-6)
reveal("one_new_token", "exactly v[0]: bit for bit the oldest value")

# %% [markdown]
# FlashAttention itself once aligned the mask at the top left, too, and moved it to the bottom right
# in version 2.1. The word *causal* does not say which; test it with one query.
#
# | | what it changed |
# |:--|:--|
# | FlashAttention (2022) | tiles, online softmax, recomputation; keys in the outer loop |
# | FlashAttention-2 (2023) | queries outside, one division at the end, more programs at once |
# | FlashAttention-3 (2024) | Hopper: copies, matrix products and exponentials overlap; FP8 |
# | FlashAttention-4 | Blackwell: among other things, the lazy rescaling of section 3 |
#
# The mathematics is the same in all of them. What changed is who waits for whom.
#
# ## 10. Six things people say
#
# **"FlashAttention is an approximation."** Commit first: which one is *less* exact in float16?

# %%
predict("fp16_error")

# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
gen = torch.Generator().manual_seed(0)
half = [torch.randn(1, 1, 2048, 64, generator=gen).half() for _ in range(3)]
qd, kd, vd = (each.double() for each in half)
truth = torch.softmax(qd @ kd.mT / 8, dim=-1) @ vd
stored = torch.softmax(half[0] @ half[1].mT / 8, dim=-1) @ half[2]
if HAS_TRITON:
    flash = labs.trace_forward(*half, block_m=256, block_n=256)[1]
else:
    flash = flash_attention(*half)
errors = [(each.double() - truth).square().mean().sqrt().item() for each in (stored, flash)]
assert errors[1] < 0.7 * errors[0]
assert (f"{errors[0]:.1e}", f"{errors[1]:.0e}") == ("2.1e-05", "1e-05") or not HAS_TRITON
reveal("fp16_error", {"three calls": f"{errors[0]:.0e}", "our kernel": f"{errors[1]:.0e}"})

# %% [markdown]
# **"It needs fewer operations."** The products are the same, to the last operation. The loop adds
# rescaling on top.

# %%
# NBVAL_CHECK_OUTPUT
few = q[:1024], k[:1024], v[:1024]
assert count_flops(lambda: tiled_loop(*few)) == count_flops(lambda: three_calls(*few))
extra = 2 * (TOKENS // 512) * TOKENS * HEAD_DIM  # multiply and add, for acc, once a tile
print(f"products: equal; rescaling on top: {extra / flops:.2%}")

# %% [markdown]
# **"It computes softmax in one pass."** Nothing can. One last large score, and the first weight
# falls from 88 % to almost nothing, long after it was due.

# %%
early = torch.softmax(torch.tensor([2.0, 0.0]), dim=0)[0]
late = torch.softmax(torch.tensor([2.0, 0.0, 9.0]), dim=0)[0]
assert round(early.item(), 2) == 0.88 and late < 0.001

# %% [markdown]
# **"Any tile helps."** In any precision it breaks even where BLOCK_M = d/2, and below that it costs.

# %%
for head_dim in (64, 128):
    naive, even = labs.attention_points(labs.PREFILL, 8192, head_dim, head_dim // 2, 1, itemsize=2)
    worse = labs.attention_points(labs.PREFILL, 8192, head_dim, head_dim // 4, 1, itemsize=2)[1]
    assert abs(even.nbytes / naive.nbytes - 1) < 0.02 and worse.nbytes > 1.9 * naive.nbytes

# %% [markdown]
# **"A small random test is enough."** Take a missing rescale. One tile never shows the mistake, and
# two tiles hide it in half the rows. Use many tiles, and place the maximum yourself.

# %%
# NBVAL_CHECK_OUTPUT
test_rows = torch.randn(20_000, 256, generator=torch.Generator().manual_seed(0)).double()
for n in (1, 2, 16):
    m, wrong = test_rows[:, 0], torch.zeros(20_000).double()
    for part in test_rows.chunk(n, dim=1):
        m = torch.maximum(m, part.amax(dim=1))
        wrong += (part - m[:, None]).exp().sum(dim=1)  # the old sum is not rescaled
    right = (test_rows - m[:, None]).exp().sum(dim=1)
    share = torch.isclose(wrong, right, rtol=1e-9).double().mean()
    print(f"{n:2} tiles: {share:4.0%} of rows right")

# %% [markdown]
# **"Partial softmaxes are merged by averaging."** Only if the parts have equal weight, which no part
# promises. The softmax over their logsumexps gives the right weights.

# %%
outs, lses = (torch.stack(each) for each in zip(*parts, strict=True))
truth = reference_attention(qs, ks, vs)
assert (outs.mean(dim=0) - truth).abs().max() > 0.1
assert ((torch.softmax(lses, dim=0)[..., None] * outs).sum(dim=0) - truth).abs().max() < 1e-14

# %% [markdown]
# <details><summary><b>Engine room: the backward pass, other kernels, the API</b> (stretch)</summary>
#
# **Backward by recomputation (重计算).** The usual backward pass wants P, which was never stored. It
# is cheap to make again: $P=e^{S-L}$, one exponential a score, since $L$ was kept. With
# $\delta_i=\sum_j dO_{ij}O_{ij}$:
#
# $$dV=P^\top dO\qquad dP=dO\,V^\top\qquad dS=P\circ(dP-\delta)\qquad dQ=\tau\,dS\,K\qquad dK=\tau\,dS^\top Q$$
#
# $\tau$ is the scale. Every row of $dS$ sums to 0: adding the same number to a whole row of scores
# changes nothing. Leave out $\delta$ and it does not; a good test for your own backward.
#
# The library has three backward kernels: `flash_attention_bwd_preprocess_kernel` ($\delta$),
# `flash_attention_bwd_dkdv_kernel` (a program owns a block of keys) and
# `flash_attention_bwd_dq_kernel` (a program owns a block of queries). Scores and $dP$ are computed
# in both, seven products where five would do, so that each program owns what it writes and the
# result is the same in every run.
#
# **API.** `implementation="auto"` takes the kernels on a GPU of compute capability 8.0 or more, and
# plain PyTorch in blocks elsewhere. `help(...)` of each has shapes, dtypes, costs and errors.
#
# | `course_lib.flash_attention` | what it is for |
# |:--|:--|
# | `flash_attention(q, k, v, causal=…, window_size=…)` | a batch of sequences of one length |
# | `flash_attention_varlen(q, k, v, cu_seqlens_q)` | a packed batch, without padding |
# | `flash_attention_decode(q, k_cache, v_cache, cache_seqlens)` | a few new tokens, the keys cut into splits |
# | `merge_attention_states(outs, lses)` | section 5: parts over different keys, merged |
# | `hugging_face.register_attention()` | section 9: all of it inside a transformers model |
# </details>

# %% tags=["folded"]
qb, kb, vb, grad = torch.randn(4, 1, 1, 40, 16, dtype=torch.float64, generator=gen)
leaves = [each.clone().requires_grad_() for each in (qb, kb, vb)]
out, lse = flash_attention(*leaves, return_lse=True)
out.backward(grad)
P = (qb @ kb.mT / 4 - lse.detach()[..., None]).exp()
dP = grad @ vb.mT
dS = P * (dP - (grad * out.detach()).sum(dim=-1, keepdim=True))
for leaf, by_hand in zip(leaves, (dS @ kb / 4, dS.mT @ qb / 4, P.mT @ grad), strict=True):
    assert torch.allclose(leaf.grad, by_hand)
assert dS.sum(dim=-1).abs().max() < 1e-14 and (P * dP).sum(dim=-1).abs().max() > 1

# %% [markdown] exercises="flash_attention"
# ## Exercises
#
# The core takes about 80 minutes. Do it in order: each exercise is a step to the next.

# %% [markdown]
# ## Recap
#
# 1. Attention as three calls moves $4N^2$ numbers that nobody asked for; the inputs and the output
#    are less than a hundredth of it.
# 2. A running maximum and a running sum can be repaired by one factor when a larger score arrives,
#    and so can a weighted sum of values: one pass, a state of $m$, $\ell$ and $a$.
# 3. States over different keys merge exactly, in any order, weighted by their sums.
# 4. A tiled kernel reads K and V once for each block of queries, so BLOCK_M (or the group size, in
#    generation) decides the bytes, and BLOCK_N none of them.
# 5. The exact answer is cheaper because it never needs the large matrices. On a CPU that saves
#    obtaining fresh memory; on a GPU it saves traffic, and spends operations that cost little there.
#
# **Could you re-derive it?** Close the notebook, write the invariant for $\ell_i$, and let a larger
# score arrive.
#
# ## Sources
#
# * Online softmax: Milakov and Gimelshein, *Online normalizer calculation for softmax*,
#   arXiv 1805.02867.
# * The idea and its I/O bound: Dao et al., *FlashAttention*, arXiv 2205.14135.
# * The loop order used here: Dao, *FlashAttention-2*, arXiv 2307.08691.
# * Hopper: Shah et al., *FlashAttention-3*, arXiv 2407.08608.
# * Lazy rescaling: `flash_attn/cute/softmax.py` in github.com/Dao-AILab/flash-attention.
# * A derivation in three pages, from which the pass counting is taken: Ye, *From Online Softmax to
#   FlashAttention*, 2023.
# * Grouped-query attention: Ainslie et al., *GQA*, arXiv 2305.13245.
# * Rooflines: Williams, Waterman and Patterson, *Roofline*, Communications of the ACM 52(4), 2009.

# %% [markdown]
# <details><summary><b>For instructors</b></summary>
#
# **Five questions to discuss, and what a good answer contains**
#
# 1. *Why can softmax not be done in one pass, while attention can?* Softmax owes an output for every
#    score, and the last score changes them all. Attention owes one vector a row, and one factor
#    repairs it.
# 2. *Your colleague doubles BLOCK_N and the kernel gets faster. Does this contradict the byte count?*
#    No: bytes are equal. Fewer, larger products and fewer rescalings fit the hardware better. The
#    count is a bound, not a clock.
# 3. *Why does generation not profit from BLOCK_M?* There is one query row a head. Only heads that
#    share keys (GQA) or tokens decoded together add rows for each load.
# 4. *Which test would you write for an online softmax, and why not random rows?* Maximum late, maximum
#    early, a row without keys, large scores, many tiles. With one tile no row is wrong, with two
#    only half are.
# 5. *When is storing S the better choice?* Short sequences, where it fits in cache; when the weights
#    are wanted themselves; in the backward, if memory is free and arithmetic is not.
#
# **Three viva questions.** Write the invariant and derive the update from it. What does a program
# own in the forward, and what in each backward kernel? A kernel returns NaN for causal attention
# with more queries than keys: where do you look?
#
# **Usual failures.** The accumulator is not rescaled, only the sum. The new terms are rescaled as
# well. The maximum starts at 0. The mask is applied after the maximum. Bytes are counted with
# BLOCK_N in the formula. The scale is applied twice, or not folded with $\log_2 e$.
# </details>
