"""Merging partial attentions in Triton: from pieces of the keys to all of them.

The idea in one sentence
    A softmax over many keys is a weighed mean of softmaxes over pieces of them, and the logsumexp
    of a piece is all that its weight needs.

The equations, for parts s = 1 ... S of one row
    L   = logsumexp_s(lse_s)                         logsumexp over all keys
    w_s = exp(lse_s - L)                             shares, which add up to 1
    O   = sum_s w_s O_s

    Backward, from dO and dL:

        g_s   = dO . O_s                             one number a part and row
        delta = sum_s w_s g_s - dL
        dO_s  = w_s dO
        dlse_s = w_s (g_s - delta)                   = w_s (dO . (O_s - O) + dL)

What it costs, for N rows of D elements in S parts, e bytes an element
                           part by part in PyTorch       these kernels
    forward bytes          about (4 S + 1) N D e         (S + 1) N D e
    forward FLOPs          3 S N D                       2 S N D
    backward bytes         about 7 S N D e               (2 S + 1) N D e
    backward FLOPs         6 S N D                       3 S N D, or 5 where S > 32

    Every element of a part is read once and meets one multiplication: only bytes count. (The
    backward reads the parts of a row a second time where they do not fit into one tile; they are
    then still in the cache.)

Axis legend
    S  parts, BLOCK_S of them at a time      N  rows (batch, heads and queries), BLOCK_M at a time
    D  head dimension                        BLOCK_D  D, rounded up to a power of two

    outs is [S, N, D] with any strides, as long as the last one is 1; everything else is
    contiguous. lses, lse and their gradients are fp32. A part with lse = -inf has seen no key:
    its share is 0, and its output is not even read.

Weights are measured from the largest lse, not from L: far from zero L is a rounded number, and the
shares would no longer add up to 1.

References:
    Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867,
    section 3.1 (the merge is associative); Dao et al., "Flash-Decoding" (2023).
"""

from course_lib.runtime.tile import tl, triton

from .kernels import LN2, LOG2E, load_tile, store_tile

__all__ = ["merge_attention_states_bwd_kernel", "merge_attention_states_fwd_kernel"]

UNSPECIALIZED = ["stride_outs_s", "stride_outs_n", "S", "N"]


# ---- what both kernels share ---------------------------------------------------------------


@triton.jit
def load_lses(lses_ptr, start_s, S, N, rows, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """Load [BLOCK_S, BLOCK_M] logsumexps, -inf past the last part and past `rows` rows."""
    offs_s = start_s + tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    mask = (offs_s < S)[:, None] & (offs_m < rows)[None, :]
    pointers = lses_ptr + offs_s.to(tl.int64)[:, None] * N + offs_m[None, :]
    return tl.load(pointers, mask=mask, other=float("-inf"))


@triton.jit
def sum_of_parts(lses_ptr, S, N, rows, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """The largest lse of each row and the sum of exp(lse - largest): both [BLOCK_M]."""
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for start_s in range(0, S, BLOCK_S):
        lses = load_lses(lses_ptr, start_s, S, N, rows, BLOCK_S, BLOCK_M)
        new_max = tl.maximum(row_max, tl.max(lses, axis=0))
        # A row without keys so far is measured from zero, as -inf - (-inf) would be NaN.
        origin = tl.where(new_max == float("-inf"), 0.0, new_max)
        rescale = tl.exp2((row_max - origin) * LOG2E)
        row_sum = row_sum * rescale + tl.sum(tl.exp2((lses - origin[None, :]) * LOG2E), axis=0)
        row_max = new_max
    return row_max, row_sum


@triton.jit
def shares(lses, row_max, row_sum):
    """exp(lse - L) of a tile of parts, [BLOCK_S, BLOCK_M]; 0 for a part without keys."""
    origin = tl.where(row_max == float("-inf"), 0.0, row_max)
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    return tl.exp2((lses - origin[None, :]) * LOG2E) / divisor[None, :]


@triton.jit
def part_pointers(
    ptr,
    start_s,
    stride_s,
    stride_n,
    ALIGN: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Addresses of [BLOCK_S, BLOCK_M, BLOCK_D]. Parts lie far apart, so 64 bits lead to each."""
    offs_s = (start_s + tl.arange(0, BLOCK_S)).to(tl.int64) * stride_s
    offs_m = tl.arange(0, BLOCK_M) * stride_n
    offs_d = tl.arange(0, BLOCK_D)
    pointers = ptr + offs_s[:, None, None] + offs_m[None, :, None] + offs_d[None, None, :]
    return tl.multiple_of(pointers, (1, 1, ALIGN))


@triton.jit
def load_parts(pointers, lses, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Load [BLOCK_S, BLOCK_M, BLOCK_D] in fp32, zeros past D and wherever a part saw no key."""
    mask = (lses != float("-inf"))[:, :, None] & (tl.arange(0, BLOCK_D) < D)[None, None, :]
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store_gradients(
    douts_ptr,
    dlses_ptr,
    dout_tile,
    lses,
    weights,
    products,
    delta,
    start_s,
    S,
    N,
    rows,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write dO_s and dlse_s of a tile of parts: exactly 0 for a part without keys."""
    seen = lses != float("-inf")  # [BLOCK_S, BLOCK_M]
    dlses = tl.where(seen, weights * (products - delta[None, :]), 0.0)
    douts = tl.where(seen[:, :, None], weights[:, :, None] * dout_tile[None, :, :], 0.0)

    offs_s = start_s + tl.arange(0, BLOCK_S)
    offs_m = tl.arange(0, BLOCK_M)
    mask = (offs_s < S)[:, None] & (offs_m < rows)[None, :]
    mask_d = (tl.arange(0, BLOCK_D) < D)[None, None, :]
    stride_s = tl.cast(N, tl.int64) * D
    pointers = part_pointers(douts_ptr, start_s, stride_s, D, ALIGN, BLOCK_S, BLOCK_M, BLOCK_D)
    tl.store(pointers, douts.to(douts_ptr.dtype.element_ty), mask=mask[:, :, None] & mask_d)
    tl.store(dlses_ptr + offs_s.to(tl.int64)[:, None] * N + offs_m[None, :], dlses, mask=mask)


# ---- kernels -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_attention_states_fwd_kernel(
    outs_ptr,
    lses_ptr,
    out_ptr,
    lse_ptr,
    stride_outs_s,
    stride_outs_n,
    S,
    N,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write O and L."""
    # Grid (blocks of rows,): a program owns BLOCK_M rows of the result, and walks over the parts.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(N - first_row, BLOCK_M).to(tl.int32)
    outs_ptr += first_row * stride_outs_n
    out_ptr += first_row * D
    lses_ptr += first_row
    lse_ptr += first_row

    row_max, row_sum = sum_of_parts(lses_ptr, S, N, rows, BLOCK_S, BLOCK_M)

    # Each place of the tile has a sum of its own until the end, so that no threads have to meet
    # inside the loop.
    acc = tl.zeros([BLOCK_S, BLOCK_M, BLOCK_D], tl.float32)
    for start_s in range(0, S, BLOCK_S):
        lses = load_lses(lses_ptr, start_s, S, N, rows, BLOCK_S, BLOCK_M)
        pointers = part_pointers(
            outs_ptr, start_s, stride_outs_s, stride_outs_n, ALIGN, BLOCK_S, BLOCK_M, BLOCK_D
        )
        parts = load_parts(pointers, lses, D, BLOCK_D)
        acc += shares(lses, row_max, row_sum)[:, :, None] * parts

    out_tile = tl.sum(acc, axis=0)  # [BLOCK_M, BLOCK_D]
    # A row that saw no key at all: row_sum = 0, and so O = 0 and L = -inf.
    lse = row_max + tl.log2(tl.where(row_sum == 0.0, 1.0, row_sum)) * LN2  # [BLOCK_M]

    offs_m = tl.arange(0, BLOCK_M)
    store_tile(out_ptr, D, out_tile, rows, ALIGN, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < rows)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def merge_attention_states_bwd_kernel(
    outs_ptr,
    lses_ptr,
    dout_ptr,
    dlse_ptr,
    douts_ptr,
    dlses_ptr,
    stride_outs_s,
    stride_outs_n,
    S,
    N,
    ONE_BLOCK: tl.constexpr,  # S <= BLOCK_S
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Write dO_s and dlse_s."""
    # Grid (blocks of rows,): a program owns BLOCK_M rows, and the gradients of all their parts.
    first_row = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows = tl.minimum(N - first_row, BLOCK_M).to(tl.int32)
    outs_ptr += first_row * stride_outs_n
    douts_ptr += first_row * D
    dout_ptr += first_row * D
    lses_ptr += first_row
    dlses_ptr += first_row
    dlse_ptr += first_row

    offs_m = tl.arange(0, BLOCK_M)
    dout_tile = load_tile(dout_ptr, D, rows, ALIGN, D, BLOCK_M, BLOCK_D).to(tl.float32)
    delta = -tl.load(dlse_ptr + offs_m, mask=offs_m < rows, other=0.0)

    row_max, row_sum = sum_of_parts(lses_ptr, S, N, rows, BLOCK_S, BLOCK_M)

    # delta needs every part, and every dlse_s needs delta. O is not saved for this: in half
    # precision it is rounded, and dO . (O_s - O) is a small difference.
    for start_s in range(0, S, BLOCK_S):
        lses = load_lses(lses_ptr, start_s, S, N, rows, BLOCK_S, BLOCK_M)
        weights = shares(lses, row_max, row_sum)
        pointers = part_pointers(
            outs_ptr, start_s, stride_outs_s, stride_outs_n, ALIGN, BLOCK_S, BLOCK_M, BLOCK_D
        )
        parts = load_parts(pointers, lses, D, BLOCK_D)
        products = tl.sum(parts * dout_tile[None, :, :], axis=2)  # [BLOCK_S, BLOCK_M]
        delta += tl.sum(weights * products, axis=0)
        if ONE_BLOCK:
            store_gradients(
                *(douts_ptr, dlses_ptr, dout_tile, lses, weights, products, delta),
                *(start_s, S, N, rows, ALIGN, D, BLOCK_S, BLOCK_M, BLOCK_D),
            )

    if not ONE_BLOCK:
        for start_s in range(0, S, BLOCK_S):
            lses = load_lses(lses_ptr, start_s, S, N, rows, BLOCK_S, BLOCK_M)
            weights = shares(lses, row_max, row_sum)
            pointers = part_pointers(
                outs_ptr, start_s, stride_outs_s, stride_outs_n, ALIGN, BLOCK_S, BLOCK_M, BLOCK_D
            )
            parts = load_parts(pointers, lses, D, BLOCK_D)
            products = tl.sum(parts * dout_tile[None, :, :], axis=2)
            store_gradients(
                *(douts_ptr, dlses_ptr, dout_tile, lses, weights, products, delta),
                *(start_s, S, N, rows, ALIGN, D, BLOCK_S, BLOCK_M, BLOCK_D),
            )
