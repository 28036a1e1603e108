"""The other loop order, kept for comparison: keys outside, queries inside.

The first FlashAttention paper loops over blocks of keys and, inside, over blocks of queries. Each
block of K and V is then read once, but the unfinished outputs cannot stay on the chip: they are
read and written again for every block of keys. `kernels.py` has it the other way round. This
kernel exists for the tile walker, where the two can be seen and counted side by side; it is not
fast, takes one head, and no public function uses it.

Reference: Dao et al., "FlashAttention", arXiv 2205.14135, algorithm 1.
"""

from course_lib.flash_attention.kernels import causal_mask, online_softmax_step
from course_lib.runtime.tile import tl, triton

__all__ = ["key_outer_fwd_kernel"]


@triton.jit
def key_outer_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    row_max_ptr,
    row_sum_ptr,
    T,
    scale_log2,  # softmax scale * log2(e)
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Write O for one head. T must be a multiple of both blocks; tensors are contiguous [T, D]."""
    # One program: every block of keys changes every output, so blocks of keys cannot run at once.
    offs_d = tl.arange(0, D)
    for start_n in range(0, T, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_tile = tl.load(k_ptr + offs_n[:, None] * D + offs_d[None, :])
        v_tile = tl.load(v_ptr + offs_n[:, None] * D + offs_d[None, :])

        first = start_n // BLOCK_M * BLOCK_M if CAUSAL else 0
        for start_m in range(first, T, BLOCK_M):
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q_tile = tl.load(q_ptr + offs_m[:, None] * D + offs_d[None, :])
            o_pointers = o_ptr + offs_m[:, None] * D + offs_d[None, :]
            if start_n == 0:
                row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
                row_sum = tl.zeros([BLOCK_M], tl.float32)
                acc = tl.zeros([BLOCK_M, D], tl.float32)
            else:
                row_max = tl.load(row_max_ptr + offs_m)
                row_sum = tl.load(row_sum_ptr + offs_m)
                acc = tl.load(o_pointers) * row_sum[:, None]

            scores = tl.dot(q_tile, k_tile.T, input_precision="ieee")  # [BLOCK_M, BLOCK_N]
            if CAUSAL:
                scores = tl.where(causal_mask(offs_m, offs_n, T, T), scores, float("-inf"))
            weights, row_max, row_sum, acc = online_softmax_step(
                scores, row_max, row_sum, acc, scale_log2
            )
            acc = tl.dot(weights, v_tile, acc, input_precision="ieee")

            # The output is kept divided, so that it is right after the last block of keys.
            tl.store(o_pointers, acc / row_sum[:, None])
            tl.store(row_max_ptr + offs_m, row_max)
            tl.store(row_sum_ptr + offs_m, row_sum)
        # What this block of keys stored, the next one reads.
        tl.debug_barrier()
