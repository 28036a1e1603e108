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

from .reference import causal_visible

__all__ = ["tiled_attention_bwd", "tiled_attention_fwd"]

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


def _query_blocks(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = SCORE_ELEMENTS // max(q.shape[0] * q.shape[1] * k.shape[2], 1)
    rows = min(max(rows, 16), max(q.shape[2], 1))
    for start in range(0, q.shape[2], rows):
        yield slice(start, min(start + rows, q.shape[2]))


def _grouped(x: Tensor, kv_heads: int) -> Tensor:
    """[B, Hq, T, ...] as [B, Hkv, GROUP, T, ...], so that a kv head meets its query heads."""
    return x.unflatten(1, (kv_heads, x.shape[1] // kv_heads))


def _scores(
    q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float, lengths: tuple[int, int]
) -> Tensor:
    """Scaled scores of one block of queries, [B, Hkv, GROUP, rows, Tk], -inf where hidden."""
    scores = (q @ k.transpose(-2, -1)).to(statistics_dtype(q)) * scale
    if causal:
        visible = causal_visible(*lengths, device=q.device)[rows]
        scores = scores.masked_fill(~visible, -math.inf)
    return scores


def tiled_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """O [B, Hq, Tq, D] in the inputs' dtype and L [B, Hq, Tq] in fp32 (fp64 for fp64 inputs)."""
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full(q.shape[:3], -math.inf, dtype=statistics_dtype(q), device=q.device)
    if q.numel() == 0 or k.shape[2] == 0:
        return out, lse
    dtype, kv_heads = compute_dtype(q), k.shape[1]
    k_all, v_all = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]  # [B, Hkv, 1, Tk, D]
    for rows in _query_blocks(q, k):
        q_block = _grouped(q[:, :, rows], kv_heads).to(dtype)
        scores = _scores(q_block, k_all, rows, causal, scale, (q.shape[2], k.shape[2]))
        row_max = scores.amax(dim=-1, keepdim=True)
        # A row without keys is measured from zero, so that its weights are exp(-inf) = 0.
        row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
        weights = (scores - row_max).exp_()
        row_sum = weights.sum(dim=-1, keepdim=True)
        acc = (weights.to(dtype) @ v_all).to(row_sum.dtype)
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
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK, dV in the inputs' dtype, from what the forward saved."""
    statistics = statistics_dtype(q)
    dq = torch.zeros_like(q, memory_format=torch.contiguous_format)
    dk = torch.zeros(k.shape, dtype=statistics, device=k.device)
    dv = torch.zeros(v.shape, dtype=statistics, device=v.device)
    if q.numel() == 0 or k.shape[2] == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    dtype, kv_heads = compute_dtype(q), k.shape[1]
    k_all, v_all = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]
    for rows in _query_blocks(q, k):
        q_block = _grouped(q[:, :, rows], kv_heads).to(dtype)
        do_block = _grouped(dout[:, :, rows], kv_heads).to(dtype)
        o_block = _grouped(out[:, :, rows], kv_heads)
        lse_block = _grouped(lse[:, :, rows], kv_heads)[..., None]
        delta = (do_block.to(statistics) * o_block.to(statistics)).sum(-1, keepdim=True)
        delta = delta - _grouped(dlse[:, :, rows], kv_heads)[..., None]

        scores = _scores(q_block, k_all, rows, causal, scale, (q.shape[2], k.shape[2]))
        weights = (scores - lse_block.masked_fill(lse_block == -math.inf, 0.0)).exp_()
        dweights = (do_block @ v_all.transpose(-2, -1)).to(statistics)
        dscores = (weights * (dweights - delta)).to(dtype)  # [B, Hkv, GROUP, rows, Tk]
        weights = weights.to(dtype)

        dq[:, :, rows] = ((dscores @ k_all).to(statistics) * scale).flatten(1, 2).to(q.dtype)
        # The group is a batch here, and its gradients add up in the shared kv head.
        dk += (dscores.transpose(-2, -1) @ q_block).sum(dim=2, dtype=statistics) * scale
        dv += (weights.transpose(-2, -1) @ do_block).sum(dim=2, dtype=statistics)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
