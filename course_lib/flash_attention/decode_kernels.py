"""Decoding in Triton: a few new queries against a long cache of keys and values.

The idea in one sentence
    With a handful of queries attention costs what it costs to read the cache, so read it once,
    and with the whole GPU: cut the keys into splits, and let every program take one.

The equations
    Each split gives its own attention (O_s, lse_s), as in ``kernels.py``; ``merge_kernels.py``
    makes one of them:  L = logsumexp_s(lse_s),  O = sum_s exp(lse_s - L) O_s.

What it costs, for one kv head with GROUP query heads, Tq queries and T keys, e bytes an element
                           a program for each query head     these kernels
    bytes                  2 T D e GROUP                     2 T D e + 8 S GROUP Tq D
    FLOPs                  4 T D GROUP Tq                    the same
    FLOPs a byte           2 Tq / e                          2 GROUP Tq / e
    programs               B Hq                              B Hkv S

    The query heads that share a kv head are rows of one tile, as are their Tq queries, so that
    each tile of keys that arrives is met by GROUP * Tq rows instead of by Tq.

Axis legend
    B   batch                      Hkv    key/value heads
    R   rows, GROUP * Tq: row r is query r % Tq of query head r // Tq of the group
    Tq  queries                    Tmax   keys that the cache has room for
    D   head dimension             BLOCK_D  D, rounded up to a power of two
    BLOCK_M  rows a tile           BLOCK_N  keys a tile           splits  parts of the keys, S

    q is [B, Hkv, R, D], the caches [B, Hkv, Tmax, D], with any strides as long as the last one is
    1. The partial outputs are contiguous [S, B, Hkv, R, D], their lse [S, B, Hkv, R] in fp32.

Who sees whom
    Sequence b has `length` valid keys, its last Tq positions being those of the queries: query i
    sees key j where j <= i + length - Tq, and from `left` keys before that one on. What lies in
    the cache past `length` is never read.

References:
    Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference" (2023); Shazeer,
    "Fast transformer decoding: one write-head is all you need", arXiv 1911.02150.
"""

from course_lib.runtime.tile import tl, triton

from .kernels import finish_softmax, load_tile, online_softmax_step, store_tile, window_mask

__all__ = ["flash_attention_decode_kernel"]

UNSPECIALIZED = ["R", "Tq", "Tmax", "left", "splits"] + [
    f"stride_{tensor}{axis}" for tensor in "qkv" for axis in "bht"
]


@triton.jit
def split_range(split, splits, begin, end, BLOCK_N: tl.constexpr):
    """The keys of one split: whole tiles of begin ... end - 1, as evenly as tiles allow."""
    blocks = tl.cdiv(end - begin, BLOCK_N).to(tl.int64)
    first = (split * blocks // splits).to(tl.int32) * BLOCK_N
    last = ((split + 1) * blocks // splits).to(tl.int32) * BLOCK_N
    return begin + first, tl.minimum(begin + last, end)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flash_attention_decode_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    seqlens_ptr,  # None: every sequence fills the cache
    o_ptr,
    lse_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    R,
    Tq,
    Tmax,
    left,
    splits,
    scale_log2,  # softmax scale * log2(e)
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write O and the row logsumexp of one split of the keys."""
    # Grid (splits * blocks of rows, Hkv, B): a program owns BLOCK_M rows of one group, and one
    # split of its keys. Blocks of rows of the same split are neighbours, and read the same keys.
    row_blocks = tl.cdiv(R, BLOCK_M)
    split = (tl.program_id(0) // row_blocks).to(tl.int64)
    start_m = tl.program_id(0) % row_blocks * BLOCK_M
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    first_row = start_m.to(tl.int64)
    q_ptr += batch * stride_qb + kv_head * stride_qh + first_row * stride_qt
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    first_row += ((split * tl.num_programs(2) + batch) * tl.num_programs(1) + kv_head) * R
    o_ptr += first_row * D
    lse_ptr += first_row

    length = Tmax
    if seqlens_ptr is not None:
        # Bounded, so that a wrong length can give a wrong answer but never reach other memory.
        length = tl.minimum(tl.maximum(tl.load(seqlens_ptr + batch), 0), Tmax)
    begin = tl.minimum(tl.maximum(length - Tq - left, 0), length)
    first, last = split_range(split, splits, begin, length, BLOCK_N)

    offs_m = tl.arange(0, BLOCK_M)
    query = (start_m + offs_m) % Tq

    q_tile = load_tile(q_ptr, stride_qt, R - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    # Every tile is masked: with so few rows a comparison a score is nothing beside the loads. Only
    # the last tile of a sequence can be ragged, and what it lacks lies in every query's future.
    first_key = first.to(tl.int64)
    k_ptr += first_key * stride_kt
    v_ptr += first_key * stride_vt
    for start_n in range(first, last, BLOCK_N):
        rows = last - start_n

        k_tile = load_tile(k_ptr, stride_kt, rows, ALIGN, D, BLOCK_N, BLOCK_D)
        scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        offs_n = start_n + tl.arange(0, BLOCK_N)
        mask = window_mask(query, offs_n, Tq, length, left, 0)
        scores = tl.where(mask, scores, float("-inf"))

        weights, row_max, row_sum, acc = online_softmax_step(
            scores, row_max, row_sum, acc, scale_log2
        )

        v_tile = load_tile(v_ptr, stride_vt, rows, ALIGN, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

        k_ptr += BLOCK_N * stride_kt
        v_ptr += BLOCK_N * stride_vt

    o_tile, lse = finish_softmax(row_max, row_sum, acc)

    store_tile(o_ptr, D, o_tile, R - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + offs_m, lse, mask=offs_m < R - start_m)
