"""The definition of attention, in plain PyTorch, beside which everything else is measured."""

from __future__ import annotations

import math
from typing import Literal, overload

import torch
from torch import Tensor

__all__ = ["reference_attention"]


@overload
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
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
    scale: float | None = ...,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...
def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
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
    hidden = torch.zeros(scores.shape[-2:], dtype=torch.bool, device=q.device)
    if causal:
        hidden = ~causal_visible(q.shape[2], k.shape[2], device=q.device)
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


def causal_visible(Tq: int, Tk: int, *, device: torch.device | str | None = None) -> Tensor:
    """Which query sees which key, [Tq, Tk] booleans, aligned at the bottom right."""
    queries = torch.arange(Tq, device=device)[:, None]
    keys = torch.arange(Tk, device=device)[None, :]
    return keys <= queries + (Tk - Tq)
