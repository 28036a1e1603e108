"""FlashAttention in Triton: exact attention that never writes the score matrix to memory.

The idea in one sentence
    Keep one block of queries on the chip, walk over the keys block by block, and repair the
    running softmax whenever a larger score arrives.

The equations
    S = scale * Q K^T           scores, [Tq, Tk]
    P = exp(S - L)              probabilities, with L = logsumexp(S) of each row
    O = P V                     output, [Tq, D]

    The scores of one block of keys change the running state (row_max, row_sum, acc) so:

        new_max = max(row_max, rowmax(S_block))
        rescale = exp(row_max - new_max)
        row_sum = row_sum * rescale + rowsum(exp(S_block - new_max))
        acc     = acc     * rescale + exp(S_block - new_max) V_block

    After the last block O = acc / row_sum and L = row_max + log(row_sum).

    Backward, from the upstream gradients dO and dL, with nothing saved but Q, K, V, O and L:

        delta = rowsum(dO * O) - dL
        dS    = P * (dO V^T - delta)
        dV    = P^T dO        dK = scale * dS^T Q        dQ = scale * dS K

What it costs, for one head with Tq = Tk = T and e bytes an element
                           plain PyTorch                  these kernels
    forward bytes          4 T D e + about 4 T^2 e        4 T D e + 4 T, and K, V once more for
                           (S, P written and read)        every block of queries, mostly from L2
    forward FLOPs          4 T^2 D                        4 T^2 D, half of it when causal
    saved for backward     T^2 e                          T D e + 4 T  (O and L)
    backward FLOPs         8 T^2 D                        14 T^2 D  (S twice anew, dO V^T twice)

    More FLOPs and fewer bytes: a trade that a GPU likes, since it computes some hundred times
    faster than it reads.

Axis legend
    B   batch                      Hq, Hkv   query heads, key/value heads; Hq // Hkv share one
    Tq  queries                    Tk        keys and values
    D   head dimension             BLOCK_D   D, rounded up to a power of two
    BLOCK_M  queries a tile        BLOCK_N   keys a tile

    Tensors are [B, H, T, D] with any strides, as long as the last one is 1. Row statistics
    (lse, delta) are contiguous [B, Hq, Tq] in fp32.

Who sees whom
    The diagonal is aligned at the bottom right: it ends at the last query and the last key.
    Query i stands on key i + Tk - Tq. CAUSAL: it sees the keys up to there. WINDOWED: it sees
    `left` keys before that one and `right` keys after it.

    VARLEN: sequences of different lengths lie one after another along T, in a batch of one.
    Sequence s has the rows cu_seqlens[s] ... cu_seqlens[s + 1] - 1, and sees nothing but itself.
    Inside a kernel Tq and Tk are then the lengths of its own sequence.

Three habits, everywhere in this file
    * Scores live in base 2: exp(x) = exp2(x * log2(e)), and log2(e) is folded into the scale,
      since exp2 is the instruction that the hardware has.
    * Addresses: one 64-bit number says where a tile begins, 32-bit numbers walk inside it.
    * Sums are kept in fp32, whatever the dtype of the inputs.

References:
    Dao et al., "FlashAttention", arXiv 2205.14135; Dao, "FlashAttention-2", arXiv 2307.08691;
    Milakov and Gimelshein, "Online normalizer calculation for softmax", arXiv 1805.02867.
"""

from course_lib.runtime.tile import tl, triton

__all__ = [
    "flash_attention_bwd_dkdv_kernel",
    "flash_attention_bwd_dq_kernel",
    "flash_attention_bwd_preprocess_kernel",
    "flash_attention_fwd_kernel",
]

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e)
LN2 = tl.constexpr(0.6931471805599453)  # log(2)

# Triton would compile a kernel anew for a length or stride that happens to be 1 or a multiple of
# 16. Lengths change from call to call, and what strides are good for, ALIGN says.
UNSPECIALIZED = ["sequences", "Hq", "Hkv", "Tq", "Tk", "left", "right"] + [
    f"stride_{tensor}{axis}"
    for tensor in ("q", "k", "v", "o", "do", "dq", "dk", "dv")
    for axis in "bht"
]


# ---- tile arithmetic: no pointers here -----------------------------------------------------


@triton.jit
def causal_mask(offs_m, offs_n, Tq, Tk):
    """Which query sees which key: [len(offs_m), len(offs_n)] of booleans."""
    return offs_n[None, :] <= offs_m[:, None] + (Tk - Tq)


@triton.jit
def window_mask(offs_m, offs_n, Tq, Tk, left, right):
    """The same for a window of keys on both sides of the diagonal."""
    ahead = offs_n[None, :] - (offs_m[:, None] + (Tk - Tq))  # how far right of the diagonal
    return (ahead >= -left) & (ahead <= right)


@triton.jit
def online_softmax_step(scores, row_max, row_sum, acc, scale_log2):
    """Take one block of scores into the running softmax.

    scores are raw dot products, [BLOCK_M, BLOCK_N], with -inf where a key is hidden. row_max is
    the largest scaled score so far, in base 2; row_sum and acc are the sums measured from it.
    Returns the block's weights, and the new row_max, row_sum and (rescaled) acc.
    """
    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * scale_log2)  # [BLOCK_M]
    # A row that has seen no key yet has new_max = -inf, and -inf - (-inf) is NaN. Measured from
    # zero instead, its weights and its rescale factor are exp2(-inf) = 0.
    origin = tl.where(new_max == float("-inf"), 0.0, new_max)

    weights = tl.exp2(scores * scale_log2 - origin[:, None])  # [BLOCK_M, BLOCK_N]
    rescale = tl.exp2(row_max - origin)  # [BLOCK_M]

    row_sum = row_sum * rescale + tl.sum(weights, axis=1)
    acc = acc * rescale[:, None]
    return weights, new_max, row_sum, acc


@triton.jit
def finish_softmax(row_max, row_sum, acc):
    """Divide once at the end: returns the output tile and the natural-log row logsumexp."""
    # A row that saw no key at all has row_sum = 0: output 0, logsumexp -inf.
    divisor = tl.where(row_sum == 0.0, 1.0, row_sum)
    return acc / divisor[:, None], (row_max + tl.log2(divisor)) * LN2


# ---- tiles: where memory is touched --------------------------------------------------------


@triton.jit
def tile_pointers(tile_ptr, stride_t, ALIGN, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr):
    """Addresses of a [BLOCK_T, BLOCK_D] tile that begins at tile_ptr."""
    offs_t = tl.arange(0, BLOCK_T)
    offs_d = tl.arange(0, BLOCK_D)
    # The compiler cannot see that every row begins at a multiple of ALIGN bytes. Told so, it
    # reads 16 bytes at a time also where D is 72 or 80.
    return tl.multiple_of(tile_ptr + offs_t[:, None] * stride_t + offs_d[None, :], (1, ALIGN))


@triton.jit
def load_tile(
    tile_ptr, stride_t, rows, ALIGN, D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Load [BLOCK_T, BLOCK_D], with zeros past D and, unless rows is None, past `rows` rows."""
    mask = (tl.arange(0, BLOCK_D) < D)[None, :]
    if rows is not None:
        mask = mask & (tl.arange(0, BLOCK_T) < rows)[:, None]
    pointers = tile_pointers(tile_ptr, stride_t, ALIGN, BLOCK_T, BLOCK_D)
    return tl.load(pointers, mask=mask, other=0.0)


@triton.jit
def store_tile(
    tile_ptr,
    stride_t,
    tile,
    rows,
    ALIGN,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the first `rows` rows and D columns of a [BLOCK_T, BLOCK_D] tile."""
    mask = (tl.arange(0, BLOCK_T) < rows)[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :]
    pointers = tile_pointers(tile_ptr, stride_t, ALIGN, BLOCK_T, BLOCK_D)
    tl.store(pointers, tile.to(tile_ptr.dtype.element_ty), mask=mask)


# ---- which keys a block of queries needs, and the other way round -----------------------------


@triton.jit
def key_range(
    start_m,
    Tq,
    Tk,
    left,
    right,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The keys of queries start_m ... start_m + BLOCK_M - 1.

    Returns (begin, unmasked_begin, unmasked_end, end): no query sees a key before begin or from
    end on. Every query sees every key from unmasked_begin to unmasked_end, which are whole tiles
    away from begin. Before and after them a mask is needed.
    """
    begin = 0
    unmasked_begin = 0
    unmasked_end = Tk
    end = Tk
    first = start_m + (Tk - Tq)  # where the diagonal crosses the first query, and the last
    last = first + BLOCK_M - 1
    if WINDOWED:
        begin = tl.minimum(Tk, tl.maximum(0, first - left))
        unmasked_begin = begin + tl.cdiv(tl.maximum(0, last - left - begin), BLOCK_N) * BLOCK_N
        unmasked_end = tl.minimum(Tk, tl.maximum(0, first + right + 1))
        end = tl.minimum(Tk, tl.maximum(0, last + right + 1))
    if CAUSAL:
        unmasked_end = tl.minimum(Tk, tl.maximum(0, first + 1))
        end = tl.minimum(Tk, tl.maximum(0, last + 1))
    whole = tl.maximum(0, unmasked_end - unmasked_begin) // BLOCK_N * BLOCK_N
    return begin, unmasked_begin, unmasked_begin + whole, end


@triton.jit
def query_range(
    start_n,
    Tq,
    Tk,
    left,
    right,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The queries that see keys start_n ... start_n + BLOCK_N - 1; returns what key_range does.

    Without a window the unmasked queries go on to Tq, which need not be a whole tile away.
    """
    begin = 0
    unmasked_begin = 0
    unmasked_end = Tq
    end = Tq
    first = start_n - (Tk - Tq)  # where the diagonal crosses the first key, and the last
    last = first + BLOCK_N - 1
    if WINDOWED:
        begin = tl.minimum(Tq, tl.maximum(0, first - right))
        unmasked_begin = begin + tl.cdiv(tl.maximum(0, last - right - begin), BLOCK_M) * BLOCK_M
        end = tl.minimum(Tq, tl.maximum(0, last + left + 1))
        whole = tl.maximum(0, tl.minimum(Tq, first + left + 1) - unmasked_begin)
        unmasked_end = unmasked_begin + whole // BLOCK_M * BLOCK_M
    if CAUSAL:
        begin = tl.minimum(Tq, tl.maximum(0, first))
        unmasked_begin = begin + tl.cdiv(tl.maximum(0, last - begin), BLOCK_M) * BLOCK_M
    return begin, unmasked_begin, unmasked_end, end


# ---- where a sequence of a packed batch lies -------------------------------------------------


@triton.jit
def find_sequence(block, cu_seqlens_ptr, sequences, BLOCK: tl.constexpr):
    """Which sequence block number `block` of a packed batch works on, and on which of its blocks.

    Sequence s is given the block numbers from cu_seqlens[s] // BLOCK + s on. These are as many as
    it needs, or one more, so a launch needs neither a list of blocks nor the longest length.
    """
    low = 0
    high = sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_seqlens_ptr + middle) // BLOCK + middle <= block:
            low = middle
        else:
            high = middle
    return low, block - (tl.load(cu_seqlens_ptr + low) // BLOCK + low)


@triton.jit
def sequence_rows(cu_seqlens_ptr, sequence):
    """The first row of a sequence, and how many it has."""
    begin = tl.load(cu_seqlens_ptr + sequence)
    return begin, tl.load(cu_seqlens_ptr + sequence + 1) - begin


# ---- kernels -------------------------------------------------------------------------------


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flash_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_ob,
    stride_oh,
    stride_ot,
    sequences,
    Hq,
    Hkv,
    Tq,
    Tk,
    left,
    right,
    scale_log2,  # softmax scale * log2(e)
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    VARLEN: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write O and the row logsumexp."""
    # Grid (blocks of queries, Hq, B): a program owns BLOCK_M queries of one head, and all of
    # their output. It reads the keys it needs itself, so no program waits for another.
    block_m = tl.program_id(0)
    if CAUSAL:
        # The last queries have the most keys: start them first, and none is left over at the end.
        block_m = tl.num_programs(0) - 1 - block_m
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // (Hq // Hkv)

    q_ptr += batch * stride_qb + head * stride_qh
    o_ptr += batch * stride_ob + head * stride_oh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    lse_ptr += (batch * Hq + head) * Tq
    if VARLEN:
        sequence, block_m = find_sequence(block_m, cu_seqlens_q_ptr, sequences, BLOCK_M)
        q_begin, Tq = sequence_rows(cu_seqlens_q_ptr, sequence)
        k_begin, Tk = sequence_rows(cu_seqlens_k_ptr, sequence)
        if block_m * BLOCK_M >= Tq:
            return
        q_ptr += q_begin.to(tl.int64) * stride_qt
        o_ptr += q_begin.to(tl.int64) * stride_ot
        k_ptr += k_begin.to(tl.int64) * stride_kt
        v_ptr += k_begin.to(tl.int64) * stride_vt
        lse_ptr += q_begin

    start_m = block_m * BLOCK_M
    first_row = start_m.to(tl.int64)
    q_ptr += first_row * stride_qt
    o_ptr += first_row * stride_ot

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Tq

    q_tile = load_tile(q_ptr, stride_qt, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    begin, unmasked_begin, unmasked_end, end = key_range(
        start_m, Tq, Tk, left, right, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N
    )

    # The loop is compiled once for every stretch of keys: with a mask for the left edge of a
    # window, without one for the keys that every query of the block sees, and with one again for
    # the diagonal and the ragged end.
    for STRETCH in tl.static_range(0 if WINDOWED else 1, 3):  # pyright: ignore
        first = begin if STRETCH == 0 else unmasked_begin if STRETCH == 1 else unmasked_end
        last = tl.minimum(unmasked_begin, end) if STRETCH == 0 else unmasked_end
        last = end if STRETCH == 2 else last
        first_row = tl.cast(first, tl.int64)
        k_tile_ptr = k_ptr + first_row * stride_kt
        v_tile_ptr = v_ptr + first_row * stride_vt
        for start_n in range(first, last, BLOCK_N):
            rows = Tk - start_n if STRETCH != 1 else None

            k_tile = load_tile(k_tile_ptr, stride_kt, rows, ALIGN, D, BLOCK_N, BLOCK_D)
            scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]

            if STRETCH != 1:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask = (offs_n < Tk)[None, :]
                if CAUSAL:
                    mask = mask & causal_mask(offs_m, offs_n, Tq, Tk)
                if WINDOWED:
                    mask = mask & window_mask(offs_m, offs_n, Tq, Tk, left, right)
                scores = tl.where(mask, scores, float("-inf"))

            weights, row_max, row_sum, acc = online_softmax_step(
                scores, row_max, row_sum, acc, scale_log2
            )

            v_tile = load_tile(v_tile_ptr, stride_vt, rows, ALIGN, D, BLOCK_N, BLOCK_D)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision="ieee")

            k_tile_ptr += BLOCK_N * stride_kt
            v_tile_ptr += BLOCK_N * stride_vt

    o_tile, lse = finish_softmax(row_max, row_sum, acc)

    store_tile(o_ptr, stride_ot, o_tile, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + offs_m, lse, mask=mask_m)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flash_attention_bwd_preprocess_kernel(
    o_ptr,
    do_ptr,
    dlse_ptr,
    delta_ptr,
    stride_ob,
    stride_oh,
    stride_ot,
    stride_dob,
    stride_doh,
    stride_dot,
    Hq,
    Tq,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write delta = rowsum(dO * O) - dL, all that the backward needs to know of the output."""
    # Grid (blocks of queries, Hq, B): a program owns BLOCK_M rows of one head.
    start_m = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    first_row = start_m.to(tl.int64)
    o_ptr += batch * stride_ob + head * stride_oh + first_row * stride_ot
    do_ptr += batch * stride_dob + head * stride_doh + first_row * stride_dot
    dlse_ptr += (batch * Hq + head) * Tq
    delta_ptr += (batch * Hq + head) * Tq

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Tq

    o_tile = load_tile(o_ptr, stride_ot, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    do_tile = load_tile(do_ptr, stride_dot, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    dlse = tl.load(dlse_ptr + offs_m, mask=mask_m, other=0.0)

    delta = tl.sum(o_tile.to(tl.float32) * do_tile.to(tl.float32), axis=1) - dlse  # [BLOCK_M]

    tl.store(delta_ptr + offs_m, delta, mask=mask_m)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flash_attention_bwd_dkdv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_dob,
    stride_doh,
    stride_dot,
    stride_dkb,
    stride_dkh,
    stride_dkt,
    stride_dvb,
    stride_dvh,
    stride_dvt,
    sequences,
    Hq,
    Hkv,
    Tq,
    Tk,
    left,
    right,
    scale,
    scale_log2,
    GROUPED: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    VARLEN: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dK and dV."""
    # Grid (blocks of keys, Hkv, B): a program owns BLOCK_N keys of one kv head, and the whole of
    # their dK and dV. It visits every query that sees them, in every query head of the group, so
    # that nothing is added up in memory and the result is the same in every run.
    block_n = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)

    q_ptr += batch * stride_qb
    do_ptr += batch * stride_dob
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    dk_ptr += batch * stride_dkb + kv_head * stride_dkh
    dv_ptr += batch * stride_dvb + kv_head * stride_dvh
    rows = Tq  # of lse and delta, from one head to the next
    lse_ptr += batch * Hq * rows
    delta_ptr += batch * Hq * rows
    if VARLEN:
        sequence, block_n = find_sequence(block_n, cu_seqlens_k_ptr, sequences, BLOCK_N)
        q_begin, Tq = sequence_rows(cu_seqlens_q_ptr, sequence)
        k_begin, Tk = sequence_rows(cu_seqlens_k_ptr, sequence)
        if block_n * BLOCK_N >= Tk:
            return
        q_ptr += q_begin.to(tl.int64) * stride_qt
        do_ptr += q_begin.to(tl.int64) * stride_dot
        k_ptr += k_begin.to(tl.int64) * stride_kt
        v_ptr += k_begin.to(tl.int64) * stride_vt
        dk_ptr += k_begin.to(tl.int64) * stride_dkt
        dv_ptr += k_begin.to(tl.int64) * stride_dvt
        lse_ptr += q_begin
        delta_ptr += q_begin

    start_n = block_n * BLOCK_N
    first_row = start_n.to(tl.int64)
    k_ptr += first_row * stride_kt
    v_ptr += first_row * stride_vt
    dk_ptr += first_row * stride_dkt
    dv_ptr += first_row * stride_dvt

    offs_n = start_n + tl.arange(0, BLOCK_N)

    k_tile = load_tile(k_ptr, stride_kt, Tk - start_n, ALIGN, D, BLOCK_N, BLOCK_D)
    v_tile = load_tile(v_ptr, stride_vt, Tk - start_n, ALIGN, D, BLOCK_N, BLOCK_D)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    begin, unmasked_begin, unmasked_end, end = query_range(
        start_n, Tq, Tk, left, right, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N
    )

    # Known to be 1, the loop over heads costs no registers, and the tiles can be larger.
    group = Hq // Hkv if GROUPED else 1
    for head_of_group in range(group):
        head = kv_head * group + head_of_group
        statistics = head * rows

        # Compiled once for every stretch, as in the forward: over the diagonal with a mask, then
        # without, and with a mask again for the other edge of a window.
        for STRETCH in tl.static_range(
            0 if CAUSAL or WINDOWED else 1,  # pyright: ignore
            3 if WINDOWED else 2,  # pyright: ignore
        ):
            first = begin if STRETCH == 0 else unmasked_begin if STRETCH == 1 else unmasked_end
            last = tl.minimum(unmasked_begin, end) if STRETCH == 0 else unmasked_end
            last = end if STRETCH == 2 else last
            row = tl.cast(first, tl.int64)
            q_tile_ptr = q_ptr + head * stride_qh + row * stride_qt
            do_tile_ptr = do_ptr + head * stride_doh + row * stride_dot
            for start_m in range(first, last, BLOCK_M):
                offs_m = start_m + tl.arange(0, BLOCK_M)
                mask_m = offs_m < Tq
                # Rows past the end have q = dO = lse = delta = 0, and so add nothing.
                lse = tl.load(lse_ptr + statistics + offs_m, mask=mask_m, other=0.0)
                delta = tl.load(delta_ptr + statistics + offs_m, mask=mask_m, other=0.0)

                q_tile = load_tile(q_tile_ptr, stride_qt, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
                # Transposed, keys down and queries across, so that weights need no transposing.
                scores = tl.dot(k_tile, q_tile.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                weights = tl.exp2(scores * scale_log2 - (lse * LOG2E)[None, :])
                if STRETCH != 1:
                    if CAUSAL:
                        mask = causal_mask(offs_m, offs_n, Tq, Tk)
                    else:
                        mask = window_mask(offs_m, offs_n, Tq, Tk, left, right)
                    weights = tl.where(mask.T, weights, 0.0)

                do_tile = load_tile(
                    do_tile_ptr, stride_dot, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D
                )
                dv_acc = tl.dot(weights.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")

                dweights = tl.dot(v_tile, do_tile.T, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                dscores = weights * (dweights - delta[None, :])
                dk_acc = tl.dot(dscores.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")

                q_tile_ptr += BLOCK_M * stride_qt
                do_tile_ptr += BLOCK_M * stride_dot

    store_tile(dk_ptr, stride_dkt, dk_acc * scale, Tk - start_n, ALIGN, D, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, stride_dvt, dv_acc, Tk - start_n, ALIGN, D, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def flash_attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    cu_seqlens_q_ptr,
    cu_seqlens_k_ptr,
    stride_qb,
    stride_qh,
    stride_qt,
    stride_kb,
    stride_kh,
    stride_kt,
    stride_vb,
    stride_vh,
    stride_vt,
    stride_dob,
    stride_doh,
    stride_dot,
    stride_dqb,
    stride_dqh,
    stride_dqt,
    sequences,
    Hq,
    Hkv,
    Tq,
    Tk,
    left,
    right,
    scale,
    scale_log2,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    VARLEN: tl.constexpr,
    ALIGN: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write dQ."""
    # Grid (blocks of queries, Hq, B): a program owns BLOCK_M queries of one head, and the whole
    # of their dQ. It walks over the keys as the forward does.
    block_m = tl.program_id(0)
    if CAUSAL:
        block_m = tl.num_programs(0) - 1 - block_m
    head = tl.program_id(1).to(tl.int64)
    batch = tl.program_id(2).to(tl.int64)
    kv_head = head // (Hq // Hkv)

    q_ptr += batch * stride_qb + head * stride_qh
    do_ptr += batch * stride_dob + head * stride_doh
    dq_ptr += batch * stride_dqb + head * stride_dqh
    k_ptr += batch * stride_kb + kv_head * stride_kh
    v_ptr += batch * stride_vb + kv_head * stride_vh
    lse_ptr += (batch * Hq + head) * Tq
    delta_ptr += (batch * Hq + head) * Tq
    if VARLEN:
        sequence, block_m = find_sequence(block_m, cu_seqlens_q_ptr, sequences, BLOCK_M)
        q_begin, Tq = sequence_rows(cu_seqlens_q_ptr, sequence)
        k_begin, Tk = sequence_rows(cu_seqlens_k_ptr, sequence)
        if block_m * BLOCK_M >= Tq:
            return
        q_ptr += q_begin.to(tl.int64) * stride_qt
        do_ptr += q_begin.to(tl.int64) * stride_dot
        dq_ptr += q_begin.to(tl.int64) * stride_dqt
        k_ptr += k_begin.to(tl.int64) * stride_kt
        v_ptr += k_begin.to(tl.int64) * stride_vt
        lse_ptr += q_begin
        delta_ptr += q_begin

    start_m = block_m * BLOCK_M
    first_row = start_m.to(tl.int64)
    q_ptr += first_row * stride_qt
    do_ptr += first_row * stride_dot
    dq_ptr += first_row * stride_dqt

    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < Tq

    q_tile = load_tile(q_ptr, stride_qt, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    do_tile = load_tile(do_ptr, stride_dot, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
    lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=0.0) * LOG2E  # base 2, as the scores
    delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    dq_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    begin, unmasked_begin, unmasked_end, end = key_range(
        start_m, Tq, Tk, left, right, CAUSAL, WINDOWED, BLOCK_M, BLOCK_N
    )

    for STRETCH in tl.static_range(0 if WINDOWED else 1, 3):  # pyright: ignore
        first = begin if STRETCH == 0 else unmasked_begin if STRETCH == 1 else unmasked_end
        last = tl.minimum(unmasked_begin, end) if STRETCH == 0 else unmasked_end
        last = end if STRETCH == 2 else last
        first_row = tl.cast(first, tl.int64)
        k_tile_ptr = k_ptr + first_row * stride_kt
        v_tile_ptr = v_ptr + first_row * stride_vt
        for start_n in range(first, last, BLOCK_N):
            rows = Tk - start_n if STRETCH != 1 else None

            k_tile = load_tile(k_tile_ptr, stride_kt, rows, ALIGN, D, BLOCK_N, BLOCK_D)
            scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            weights = tl.exp2(scores * scale_log2 - lse[:, None])
            if STRETCH != 1:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                mask = (offs_n < Tk)[None, :]
                if CAUSAL:
                    mask = mask & causal_mask(offs_m, offs_n, Tq, Tk)
                if WINDOWED:
                    mask = mask & window_mask(offs_m, offs_n, Tq, Tk, left, right)
                weights = tl.where(mask, weights, 0.0)

            v_tile = load_tile(v_tile_ptr, stride_vt, rows, ALIGN, D, BLOCK_N, BLOCK_D)
            dweights = tl.dot(do_tile, v_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            dscores = weights * (dweights - delta[:, None])
            dq_acc = tl.dot(dscores.to(k_tile.dtype), k_tile, dq_acc, input_precision="ieee")

            k_tile_ptr += BLOCK_N * stride_kt
            v_tile_ptr += BLOCK_N * stride_vt

    store_tile(dq_ptr, stride_dqt, dq_acc * scale, Tq - start_m, ALIGN, D, BLOCK_M, BLOCK_D)
