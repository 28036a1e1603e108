"""The same algorithm in plain PyTorch: block by block over the queries, for every machine.

This is what ``flash_attention`` runs where Triton cannot: on CPU, on a GPU without fast Triton
matrix products, in fp64. Only one block of scores exists at a time, in the forward and in the
backward, so memory stays linear in the length.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .band import EVERYTHING, Band
from .cu_seqlens import Packing

__all__ = [
    "tiled_attention_bwd",
    "tiled_attention_fwd",
    "tiled_attention_varlen_bwd",
    "tiled_attention_varlen_fwd",
]

#: Scores that may exist at one time, in elements: 64 MiB in fp32.
SCORE_ELEMENTS = 1 << 24


def compute_dtype(q: Tensor) -> torch.dtype:
    """The dtype of the matrix products: fp32 at least on CPU, the inputs' own on a GPU.

    A GPU adds up half-precision products in fp32 by itself; on CPU half precision is slow.
    """
    half = q.dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half and q.device.type == "cpu" else q.dtype


def statistics_dtype(q: Tensor) -> torch.dtype:
    """The dtype of softmax statistics: fp32, and fp64 for fp64 inputs."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def _blocks(q: Tensor, k: Tensor, band: Band) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and for each the keys that it sees."""
    B, H, Tq, _ = q.shape
    Tk = k.shape[2]
    height = SCORE_ELEMENTS // max(B * H * Tk, 1)
    height = min(max(height, 16), max(Tq, 1))
    for start in range(0, Tq, height):
        rows = slice(start, min(start + height, Tq))
        keys = band.keys(rows, Tq, Tk)
        if keys.stop > keys.start:
            yield rows, keys


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, T, ...] as [B, Hkv, GROUP, T, ...], so that a kv head meets its query heads."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def _hide(scores: Tensor, band: Band, rows: slice, keys: slice, Tq: int, Tk: int) -> Tensor:
    """One block of scores, [..., rows, keys], with -inf where a query does not see a key."""
    if band == EVERYTHING:
        return scores
    visible = band.visible(Tq, Tk, rows=rows, keys=keys, device=scores.device)
    return scores.masked_fill(~visible, -math.inf)


def tiled_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float
) -> tuple[Tensor, Tensor]:
    """O [B, Hq, Tq, D] in the inputs' dtype and L [B, Hq, Tq] in fp32 (fp64 for fp64 inputs)."""
    statistics, dtype, kv_heads = statistics_dtype(q), compute_dtype(q), k.shape[1]
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -math.inf, dtype=statistics, device=q.device)
    if q.numel() == 0:
        return out, lse
    k_all, v_all = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]  # [B, Hkv, 1, Tk, D]
    for rows, keys in _blocks(q, k, band):
        q_block = _grouped(q[:, :, rows], kv_heads).to(dtype)
        k_block, v_block = k_all[..., keys, :], v_all[..., keys, :]

        scores = (q_block @ k_block.transpose(-2, -1)).to(statistics) * scale
        scores = _hide(scores, band, rows, keys, q.shape[2], k.shape[2])
        row_max = scores.amax(dim=-1, keepdim=True)
        # A row without keys is measured from zero, so that its weights are exp(-inf) = 0.
        row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
        weights = (scores - row_max).exp_()  # [B, Hkv, GROUP, rows, keys]
        row_sum = weights.sum(dim=-1, keepdim=True)
        acc = (weights.to(dtype) @ v_block).to(statistics)

        out[:, :, rows] = (acc / row_sum.masked_fill(row_sum == 0, 1.0)).flatten(1, 2).to(q.dtype)
        lse[:, :, rows] = (row_max + row_sum.log()).squeeze(-1).flatten(1, 2)
    return out, lse


def tiled_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    band: Band,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the inputs' dtype, from what the forward saved."""
    statistics, dtype, kv_heads = statistics_dtype(q), compute_dtype(q), k.shape[1]
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=statistics, device=k.device)
    dv = torch.zeros(v.shape, dtype=statistics, device=v.device)
    if q.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    k_all, v_all = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]  # [B, Hkv, 1, Tk, D]
    for rows, keys in _blocks(q, k, band):
        q_block = _grouped(q[:, :, rows], kv_heads).to(dtype)
        do_block = _grouped(dout[:, :, rows], kv_heads).to(dtype)
        o_block = _grouped(out[:, :, rows], kv_heads)
        lse_block = _grouped(lse[:, :, rows], kv_heads)[..., None]
        k_block, v_block = k_all[..., keys, :], v_all[..., keys, :]
        delta = (do_block.to(statistics) * o_block.to(statistics)).sum(-1, keepdim=True)
        delta = delta - _grouped(dlse[:, :, rows], kv_heads)[..., None]

        scores = (q_block @ k_block.transpose(-2, -1)).to(statistics) * scale
        scores = _hide(scores, band, rows, keys, q.shape[2], k.shape[2])
        weights = (scores - lse_block.masked_fill(lse_block == -math.inf, 0.0)).exp_()
        dweights = (do_block @ v_block.transpose(-2, -1)).to(statistics)
        dscores = (weights * (dweights - delta)).to(dtype)  # [B, Hkv, GROUP, rows, keys]
        weights = weights.to(dtype)

        dq[:, :, rows] = ((dscores @ k_block).to(statistics) * scale).flatten(1, 2).to(q.dtype)
        # The group is a batch here, and its gradients add up in the shared kv head.
        dk[:, :, keys] += (dscores.transpose(-2, -1) @ q_block).sum(dim=2, dtype=statistics) * scale
        dv[:, :, keys] += (weights.transpose(-2, -1) @ do_block).sum(dim=2, dtype=statistics)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


# ---- packed batches: [1, H, total, D], one sequence after another ----------------------------


def tiled_attention_varlen_fwd(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, packing: Packing
) -> tuple[Tensor, Tensor]:
    """As ``tiled_attention_fwd``, for each sequence alone."""
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:3], dtype=statistics_dtype(q), device=q.device)
    for rows, keys in _sequences(packing):
        out[:, :, rows], lse[:, :, rows] = tiled_attention_fwd(
            q[:, :, rows], k[:, :, keys], v[:, :, keys], band, scale
        )
    return out, lse


def tiled_attention_varlen_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    band: Band,
    scale: float,
    packing: Packing,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``tiled_attention_bwd``, for each sequence alone."""
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for rows, keys in _sequences(packing):
        dq[:, :, rows], dk[:, :, keys], dv[:, :, keys] = tiled_attention_bwd(
            q[:, :, rows],
            k[:, :, keys],
            v[:, :, keys],
            out[:, :, rows],
            lse[:, :, rows],
            dout[:, :, rows],
            dlse[:, :, rows],
            band,
            scale,
        )
    return dq, dk, dv


def _sequences(packing: Packing) -> Iterator[tuple[slice, slice]]:
    """The rows of the queries and of the keys of every sequence."""
    ends_q, ends_k = (cu_seqlens.tolist() for cu_seqlens in packing)
    for s in range(packing.sequences):
        yield slice(ends_q[s], ends_q[s + 1]), slice(ends_k[s], ends_k[s + 1])
