# %% [markdown]
# # Exercises: what does a kernel do with memory?
#
# Five rungs and three small questions, in the order of [the chapter](../notebooks/00_start_here.ipynb). A check counts in either notebook. Write, run the cell, run the `check` below it. Stuck? `hint("row_sum")` gives one hint at a time, and `print(x)` in a kernel shows what it holds.

# %% tags=["setup"]
import torch  # noqa: F401

from course_lib import check, hint, interpreted, progress, setup, solution  # noqa: F401
from course_lib.runtime.tile import tl, triton

setup("start_here")

# %% [markdown] card="warm_up"


# %% exercise="warm_up"
def warm_up(values):
    """Return every value plus 1, as a new tensor of the same shape and dtype."""
    # BEGIN SOLUTION
    return values + 1
    # END SOLUTION


# %% check="warm_up"
check(warm_up)

# %% [markdown] card="past_the_end"

# %% exercise="past_the_end"
# Elements past the end of `out` that are written, for n = 1,000 and BLOCK = 128.
# BEGIN SOLUTION
# STUB past_the_end = ...
# The grid is cdiv(1000, 128) = 8 programs, for 7 would stop at element 896. Each of them writes
# its whole block, elements 0 to 1,023 in all, and `out` ends at 999.
past_the_end = 8 * 128 - 1000
# END SOLUTION

# %% check="past_the_end"
check(past_the_end=past_the_end)

# %% [markdown] card="masked_add"


# %% exercise="masked_add"
@triton.jit
def masked_add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    # x, y, out: [n]. A program owns BLOCK elements of them.
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO: load x and y and store their sum, with a mask each")
    inside = offs < n
    total = tl.load(x_ptr + offs, mask=inside) + tl.load(y_ptr + offs, mask=inside)
    tl.store(out_ptr + offs, total, mask=inside)
    # END SOLUTION


def masked_add(x, y, out):
    """Write x + y into out. All three are fp32 [n]."""
    n = x.numel()
    grid = (triton.cdiv(n, 64),)
    masked_add_kernel[grid](x, y, out, n, BLOCK=64)


# %% check="masked_add"
check(masked_add)

# %% [markdown] card="row_sum"


# %% exercise="row_sum"
@triton.jit
def row_sum_kernel(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    # x: [M, N], rows stride_xm apart; out: [M]. A program owns one row.
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO: load the row, add its lanes up, store one number")
    row_ptr = x_ptr + row * stride_xm
    lanes = tl.load(row_ptr + offs_n, mask=offs_n < N, other=0.0)
    tl.store(out_ptr + row, tl.sum(lanes, axis=0))
    # END SOLUTION


def row_sum(x, out):
    """Write the sum of each row of x, fp32 [M, N], into out, fp32 [M]."""
    M, N = x.shape
    row_sum_kernel[(M,)](x, out, N, x.stride(0), BLOCK_N=triton.next_power_of_2(N))


# %% check="row_sum"
check(row_sum)

# %% [markdown] card="other_for_product"

# %% exercise="other_for_product"
# One letter in quotes: "a", "b", "c" or "d".
# BEGIN SOLUTION
# STUB other_for_product = ...
# Go backwards: a factor of 1 leaves a product alone, and q = 1 - p is 1 for p = 0. The neutral
# element is that of the whole way from the load to the reduction, not of the reduction alone.
other_for_product = "b"
# END SOLUTION

# %% check="other_for_product"
check(other_for_product=other_for_product)

# %% [markdown] card="row_softmax"


# %% exercise="row_softmax"
@triton.jit
def row_softmax_kernel(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    # x, out: [M, N], rows stride_xm and stride_om apart. A program owns one row.
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO: one load, two reductions, one store")
    inside = offs_n < N
    scores = tl.load(x_ptr + row * stride_xm + offs_n, mask=inside, other=float("-inf"))
    scores = tl.exp(scores - tl.max(scores, axis=0))
    scores = scores / tl.sum(scores, axis=0)
    tl.store(out_ptr + row * stride_om + offs_n, scores, mask=inside)
    # END SOLUTION


def row_softmax(x, out):
    """Write the softmax of each row of x into out. Both are fp32 [M, N]."""
    M, N = x.shape
    block = triton.next_power_of_2(N)
    row_softmax_kernel[(M,)](x, out, N, x.stride(0), out.stride(0), BLOCK_N=block)


# %% check="row_softmax"
check(row_softmax)

# %% [markdown] card="ragged_copy"


# %% exercise="ragged_copy"
@triton.jit
def ragged_copy_kernel(
    x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # x, out: [M, N] with any strides. Program (i, j) owns tile (i, j).
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO: two vectors of offsets, one mask, one load, one store")
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    columns = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (rows < M) & (columns < N)
    tile = tl.load(x_ptr + rows * stride_xm + columns * stride_xn, mask=inside)
    tl.store(out_ptr + rows * stride_om + columns * stride_on, tile, mask=inside)
    # END SOLUTION


def ragged_copy(x, out):
    """Copy x into out. Both are fp32 [M, N]."""
    M, N = x.shape
    # BEGIN SOLUTION
    # STUB grid = (1, 1)  # how many tiles of 8 × 16 are there along each axis?
    grid = (triton.cdiv(M, 8), triton.cdiv(N, 16))
    # END SOLUTION
    ragged_copy_kernel[grid](x, out, M, N, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)


# %% check="ragged_copy"
check(ragged_copy)

# %% [markdown] card="matmul"


# %% exercise="matmul"
@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on, BLOCK: tl.constexpr,
):  # fmt: skip
    # out [M, N] = a [M, K] @ b [K, N]. Program (i, j) owns tile (i, j) of out.
    offs_m = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK, BLOCK], tl.float32)
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO: a loop over K; both tiles masked; acc = tl.dot(…)")
    rows, columns, lanes = offs_m[:, None], offs_n[None, :], tl.arange(0, BLOCK)
    a_ptrs = a_ptr + rows * stride_am + lanes[None, :] * stride_ak
    b_ptrs = b_ptr + lanes[:, None] * stride_bk + columns * stride_bn
    for start in range(0, K, BLOCK):
        left = K - start
        a_tile = tl.load(a_ptrs, mask=(rows < M) & (lanes < left)[None, :], other=0.0)
        b_tile = tl.load(b_ptrs, mask=(lanes < left)[:, None] & (columns < N), other=0.0)
        acc = tl.dot(a_tile, b_tile, acc)
        a_ptrs += BLOCK * stride_ak
        b_ptrs += BLOCK * stride_bk
    # END SOLUTION
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, acc, mask=mask)


def matmul(a, b, out):
    """Write a @ b into out. a is fp16 [M, K], b fp16 [K, N], out fp32 [M, N]."""
    (M, K), N = a.shape, b.shape[1]
    # BEGIN SOLUTION
    # STUB grid = (1, 1)  # how many tiles of 16 × 16 has out along each axis?
    grid = (triton.cdiv(M, 16), triton.cdiv(N, 16))
    # END SOLUTION
    strides = (*a.stride(), *b.stride(), *out.stride())
    matmul_kernel[grid](a, b, out, M, N, K, *strides, BLOCK=16)


# %% check="matmul"
check(matmul)

# %% [markdown]
# What you have so far:

# %%
progress()
