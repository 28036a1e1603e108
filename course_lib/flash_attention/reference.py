"""The definition of attention, in plain PyTorch, beside which everything else is measured."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

from .band import Band

__all__ = ["reference_attention", "reference_attention_varlen"]


@overload
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...
@overload
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...
@overload
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention as the formula says it, with the whole score matrix in memory.

    S = scale * Q K^T,   P = softmax(S),   O = P V,   L = logsumexp(S).

    Computed in the dtype of the inputs, fp64 included, and differentiable by autograd (O and L,
    any number of times).

    Args:
        q: [B, Hq, Tq, D].
        k: [B, Hkv, Tk, D]. Hkv divides Hq: query head h reads kv head h // (Hq // Hkv).
        v: [B, Hkv, Tk, D].
        causal: Query i sees key j only where j <= i + Tk - Tq (aligned at the bottom right: the
            last query sees every key).
        window_size: (left, right): query i sees key j only where
            i + Tk - Tq - left <= j <= i + Tk - Tq + right; -1 is no bound on that side. With
            ``causal`` the right side is 0.
        scale: Softmax scale, 1/sqrt(D) if None.
        return_lse: Also return the row logsumexp L.

    Returns:
        O, [B, Hq, Tq, D]; with ``return_lse`` also L, [B, Hq, Tq], natural logarithm. A query that
        sees no key has O = 0 and L = -inf.

    Cost:
        4 B Hq Tq Tk D FLOPs, and several [B, Hq, Tq, Tk] tensors of memory.

    Source:
        Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, equation 1; grouped heads:
        Ainslie et al., "GQA", arXiv 2305.13245.
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    group = q.shape[1] // max(k.shape[1], 1)
    k = k.repeat_interleave(group, dim=1)
    v = v.repeat_interleave(group, dim=1)

    scores = scale * (q @ k.transpose(-2, -1))  # [B, Hq, Tq, Tk]
    band = Band.of(causal, window_size)
    hidden = ~band.visible(q.shape[2], k.shape[2], device=q.device)
    scores = scores.masked_fill(hidden, -math.inf)

    # A query without keys has softmax 0/0; take 0, and keep the NaN out of the gradient as well.
    blind = hidden.all(dim=-1)  # [Tq]; every query, where there are no keys
    safe = scores.masked_fill(blind[:, None], 0.0)
    probs = torch.softmax(safe, dim=-1).masked_fill(blind[:, None], 0.0)
    out = probs @ v  # [B, Hq, Tq, D]
    if not return_lse:
        return out
    lse = torch.logsumexp(safe, dim=-1).masked_fill(blind, -math.inf)
    return out, lse


def reference_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a packed batch as what it means: one sequence after another, each alone.

    Args:
        q: [total_q, Hq, D], the queries of all sequences, one after another.
        k: [total_k, Hkv, D].
        v: [total_k, Hkv, D].
        cu_seqlens_q: [sequences + 1] integers: sequence s has the queries
            cu_seqlens_q[s] ... cu_seqlens_q[s + 1] - 1.
        cu_seqlens_k: The same for its keys; those of the queries if None.
        causal: As in :func:`reference_attention`, for every sequence.
        window_size: The same.
        scale: The same.
        return_lse: Also return the row logsumexp L.

    Returns:
        O, [total_q, Hq, D]; with ``return_lse`` also L, [total_q, Hq].
    """
    ends_q = cu_seqlens_q.tolist()
    ends_k = ends_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    outs, lses = [], []
    for s in range(len(ends_q) - 1):
        rows = slice(ends_q[s], ends_q[s + 1])
        keys = slice(ends_k[s], ends_k[s + 1])
        one = (x.transpose(0, 1)[None] for x in (q[rows], k[keys], v[keys]))  # [1, H, T, D]
        out, lse = reference_attention(
            *one, causal=causal, window_size=window_size, scale=scale, return_lse=True
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0].transpose(0, 1))
    out = torch.cat(outs) if outs else q.clone()
    lse = torch.cat(lses) if lses else q[..., 0].clone()
    return (out, lse) if return_lse else out
