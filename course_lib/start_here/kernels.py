"""Five kernels, each built on the ones before: the rungs of chapter 00.

                   grid                 a program owns       new on this rung
    add            tiles of n           BLOCK elements       program id, offsets, mask
    row_sum        rows                 one row              row stride, reduction
    row_softmax    rows                 one row              two reductions, neutral elements
    copy           tiles of M × N       a tile               two axes, two strides a tensor
    matmul         tiles of M × N       a tile, all of K     a loop, an accumulator, tl.dot

Axis legend
    M, N     rows and columns           K         inner extent of a product [M, K] @ [K, N]
    BLOCK    elements of a program      BLOCK_M   rows, BLOCK_N columns, BLOCK_K steps of a tile
    stride_xm, stride_xn                elements between neighbours of x along M and along N

They are written to be read. The tuned kernels of the course begin in chapter 08.
"""

from course_lib.runtime.tile import tl, triton

__all__ = ["add_kernel", "copy_kernel", "matmul_kernel", "row_softmax_kernel", "row_sum_kernel"]


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    """Add x and y into out, all [n]."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def row_sum_kernel(x_ptr, out_ptr, N, stride_xm, BLOCK_N: tl.constexpr):
    """Sum each row of x, [M, N], into out, [M]. BLOCK_N is at least N."""
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=offs_n < N, other=0.0)
    tl.store(out_ptr + row, tl.sum(x, axis=0))


@triton.jit
def row_softmax_kernel(x_ptr, out_ptr, N, stride_xm, stride_om, BLOCK_N: tl.constexpr):
    """Write the softmax of each row of x, [M, N], into out. BLOCK_N is at least N."""
    row = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(x_ptr + row * stride_xm + offs_n, mask=mask, other=float("-inf"))
    weights = tl.exp(x - tl.max(x, axis=0))  # masked lanes: exp(-inf) = 0
    out = weights / tl.sum(weights, axis=0)
    tl.store(out_ptr + row * stride_om + offs_n, out, mask=mask)


@triton.jit
def copy_kernel(
    x_ptr, out_ptr, M, N, stride_xm, stride_xn, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Copy x into out, both [M, N] with any strides."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]  # [BLOCK_M, BLOCK_N]
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, tl.load(x_ptrs, mask=mask), mask=mask)


@triton.jit
def matmul_kernel(
    a_ptr, b_ptr, out_ptr, M, N, K,
    stride_am, stride_ak, stride_bk, stride_bn, stride_om, stride_on,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Multiply: out = a @ b, [M, N] = [M, K] @ [K, N]."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + offs_m[:, None] * stride_am + offs_k[None, :] * stride_ak
        b_ptrs = b_ptr + offs_k[:, None] * stride_bk + offs_n[None, :] * stride_bn
        a = tl.load(a_ptrs, mask=mask_m & (offs_k < K)[None, :], other=0.0)
        b = tl.load(b_ptrs, mask=(offs_k < K)[:, None] & mask_n, other=0.0)
        acc = tl.dot(a, b, acc)
    out_ptrs = out_ptr + offs_m[:, None] * stride_om + offs_n[None, :] * stride_on
    tl.store(out_ptrs, acc, mask=mask_m & mask_n)
