"""The public functions ``flash_attention`` and ``flash_attention_varlen``.

Validation, and the registration of four operators. What runs inside them is in ``fused.py`` (the
kernels) and in ``tiled.py`` (PyTorch).
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .band import Band
from .cu_seqlens import Packing, check_cu_seqlens, check_values
from .dispatch import (
    Implementation,
    check_implementation,
    check_scale,
    check_tensor,
    check_triton_can_take,
    runs_triton,
)
from .fused import fused_attention_bwd, fused_attention_fwd
from .tiled import (
    statistics_dtype,
    tiled_attention_bwd,
    tiled_attention_fwd,
    tiled_attention_varlen_bwd,
    tiled_attention_varlen_fwd,
)

__all__ = ["flash_attention", "flash_attention_varlen"]


# ---- a batch of sequences of one length ------------------------------------------------------


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation = ...,
) -> Tensor: ...
@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: bool,
    implementation: Implementation = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention, forward and backward, in memory linear in the sequence length.

    S = scale * Q K^T,   O = softmax(S) V,   L = logsumexp(S), without ever storing S.

    Args:
        q: [B, Hq, Tq, D], fp16, bf16 or fp32; fp64 runs in PyTorch only.
        k: [B, Hkv, Tk, D], same dtype and device. Hkv divides Hq; query head h reads kv head
            h // (Hq // Hkv), as in grouped-query attention.
        v: [B, Hkv, Tk, D].
        causal: Query i sees key j only where j <= i + Tk - Tq. The mask is aligned at the bottom
            right: the last query sees every key (``is_causal`` of PyTorch's SDPA aligns at the top
            left; the two agree where Tq = Tk).
        window_size: (left, right), a sliding window as in flash-attention: query i sees key j only
            where i + Tk - Tq - left <= j <= i + Tk - Tq + right, and -1 is no bound on that side.
            With ``causal`` the right side is 0. A "sliding window of W" that counts the query's
            own position is (W - 1, 0). Tiles outside the window are not visited.
        scale: Softmax scale, a positive number; 1/sqrt(D) if None.
        return_lse: Also return L.
        implementation: "triton" runs the Triton kernels or raises; they take CUDA tensors, and CPU
            tensors inside ``with interpreted():``. "torch" runs the same algorithm in PyTorch,
            block by block over the queries, anywhere. On a T4 (compute capability 7.5) "triton"
            runs without tensor cores, slowly, and for D <= 128. "auto" is "triton" if all of this
            holds, and "torch" otherwise: the tensors are on a CUDA device of compute capability
            8.0 or more (so not a T4), Triton can be imported, the dtype is fp16, bf16 or fp32,
            16 <= D <= 256, and B and Hq are below 65536.

    Returns:
        O, [B, Hq, Tq, D], in the dtype of q, contiguous. With ``return_lse`` also L, [B, Hq, Tq],
        natural logarithm, fp32 (fp64 for fp64 inputs). A query that sees no key has O = 0 and
        L = -inf. Both are differentiable, once.

    Cost:
        4 B Hq Tq Tk D FLOPs forward and 14 backward (10 would be the least; two products are
        computed twice, which makes the result the same in every run), half of that when causal.
        D is padded to a power of two inside the kernels. Saved for backward: q, k, v, O and L.
        fp32 products are exact fp32, not TF32.

    Raises:
        TypeError: An argument has the wrong type, or a dtype that the implementation cannot take.
        ValueError: Shapes, devices, head counts, head dimension, scale or implementation do not
            fit; the message names the argument, what it was, and what was expected.
        RuntimeError: ``implementation="triton"`` with tensors that no kernel can reach.
        TritonUnavailable: ``implementation="triton"`` where Triton cannot be imported.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 100, 64) for _ in range(3))
        >>> flash_attention(q, k, v, causal=True).shape
        torch.Size([1, 4, 100, 64])

    Source:
        Dao, "FlashAttention-2", arXiv 2307.08691. The kernels are in ``kernels.py``.
    """
    _check_batch(q, k, v)
    check_implementation(implementation)
    if implementation == "triton":
        check_triton_can_take(q, grid=(q.shape[1], q.shape[0]))
    band = Band.of(causal, window_size)
    scale = check_scale(scale, q.shape[3])
    out, lse = _flash_attention_fwd(q, k, v, band.left, band.right, scale, implementation)
    return (out, lse) if return_lse else out


# ---- a packed batch of sequences of different lengths ----------------------------------------


@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation = ...,
) -> Tensor: ...
@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    implementation: Implementation = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = ...,
    *,
    causal: bool = ...,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    return_lse: bool,
    implementation: Implementation = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention_varlen(
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
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention over a packed batch: sequences of different lengths, without padding.

    Every sequence attends to itself alone, as if ``flash_attention`` were called for each.

    Args:
        q: [total_q, Hq, D], the queries of all sequences one after another; dtypes as in
            ``flash_attention``.
        k: [total_k, Hkv, D], same dtype and device. Hkv divides Hq.
        v: [total_k, Hkv, D].
        cu_seqlens_q: int32 [sequences + 1], on the device of q: sequence s has the queries
            cu_seqlens_q[s] ... cu_seqlens_q[s + 1] - 1. It begins with 0, never falls, and ends
            with total_q. A sequence may be empty.
        cu_seqlens_k: The same for the keys; ``cu_seqlens_q`` if None. Where the two differ, causal
            attention is aligned at the bottom right of each sequence: its last query sees every key
            of it.
        causal: As in ``flash_attention``, within each sequence.
        window_size: As in ``flash_attention``, within each sequence.
        scale: Softmax scale, a positive number; 1/sqrt(D) if None.
        return_lse: Also return L.
        implementation: As in ``flash_attention``. "torch" goes through the sequences one by one.

    Returns:
        O, [total_q, Hq, D], in the dtype of q, contiguous. With ``return_lse`` also L,
        [total_q, Hq], natural logarithm, fp32 (fp64 for fp64 inputs). A query that sees no key has
        O = 0 and L = -inf. Both are differentiable, once.

    Cost:
        4 Hq D FLOPs for every pair of a query and a key that it sees. The longest length is not
        needed: a launch has one program for every block of queries that there is, and at most one
        idle program a sequence. The numbers in ``cu_seqlens_*`` are checked on the host, once for
        each tensor and each change of it; on a GPU the host waits for them that once.

    Raises:
        TypeError, ValueError, RuntimeError, TritonUnavailable: As ``flash_attention``; for
            ``cu_seqlens_*`` the message says which is wrong: the dtype, the device, the shape, the
            beginning, the order or the end.

    Example:
        >>> q, k, v = (torch.randn(100, 4, 64) for _ in range(3))
        >>> cu_seqlens = torch.tensor([0, 30, 30, 100], dtype=torch.int32)  # 30, 0 and 70 tokens
        >>> flash_attention_varlen(q, k, v, cu_seqlens, causal=True).shape
        torch.Size([100, 4, 64])

    Source:
        The interface follows ``flash_attn_varlen_func`` of github.com/Dao-AILab/flash-attention,
        without the arguments for the longest lengths.
    """
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    _check_packed(q, k, v, cu_seqlens_q, cu_seqlens_k)
    check_implementation(implementation)
    if implementation == "triton":
        check_triton_can_take(q, grid=(q.shape[1],))
    band = Band.of(causal, window_size)
    scale = check_scale(scale, q.shape[2])
    out, lse = _flash_attention_varlen_fwd(
        q, k, v, cu_seqlens_q, cu_seqlens_k, band.left, band.right, scale, implementation
    )
    return (out, lse.transpose(0, 1)) if return_lse else out


# ---- validation ----------------------------------------------------------------------------


def _check_batch(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, q, "[B, H, T, D]")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != q.shape[0]:
            raise ValueError(
                f"{name} must have the batch size of q, {q.shape[0]}, got {tensor.shape[0]}"
            )
    _check_heads(q, k, v)
    if k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k and v must have the same length, got {k.shape[2]} keys and {v.shape[2]} values"
        )


def _check_packed(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, tensor, q, "[total, H, D]")
    _check_heads(q, k, v)
    if k.shape[0] != v.shape[0]:
        raise ValueError(
            f"k and v must have the same length, got {k.shape[0]} keys and {v.shape[0]} values"
        )
    check_cu_seqlens("cu_seqlens_q", cu_q, q)
    check_cu_seqlens("cu_seqlens_k", cu_k, q)
    if cu_q.shape != cu_k.shape:
        raise ValueError(
            "cu_seqlens_q and cu_seqlens_k must be of the same length, "
            f"got {len(cu_q)} and {len(cu_k)} numbers"
        )


def _check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    head_dim = q.shape[-1]
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[-1] != head_dim:
            raise ValueError(
                f"{name} must have the head dimension of q, {head_dim}, got {tensor.shape[-1]}"
            )
    if head_dim == 0:
        raise ValueError(f"q must have a head dimension of at least 1, got shape {tuple(q.shape)}")
    q_heads, k_heads, v_heads = (x.shape[1] for x in (q, k, v))
    if k_heads != v_heads:
        raise ValueError(f"k and v must have the same number of heads, got {k_heads} and {v_heads}")
    if k_heads == 0 or q_heads % k_heads != 0:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k and v, "
            f"got {q_heads} and {k_heads}"
        )


# ---- registration --------------------------------------------------------------------------
# Opaque operators, so that torch.compile, export and opcheck see attention as one node. Which
# implementation runs is decided inside, where the real tensors are.


@torch.library.custom_op("course_lib::flash_attention_fwd", mutates_args=())
def _flash_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    fused = runs_triton(q, implementation, grid=(q.shape[1], q.shape[0]))
    run = fused_attention_fwd if fused else tiled_attention_fwd
    return run(q, k, v, Band(left, right), scale)


@_flash_attention_fwd.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, left: int, right: int, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=statistics_dtype(q), device=q.device)


@torch.library.custom_op("course_lib::flash_attention_bwd", mutates_args=())
def _flash_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    left: int,
    right: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fused = runs_triton(q, implementation, grid=(q.shape[1], q.shape[0]))
    run = fused_attention_bwd if fused else tiled_attention_bwd
    return run(q, k, v, out, lse, dout, dlse, Band(left, right), scale)


@_flash_attention_bwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    left: int,
    right: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, dout: Tensor, dlse: Tensor):
    # Gradients of tensors that do not ask for one are computed and dropped: dK and dV come from
    # one kernel, and frozen queries are rare.
    grads = torch.ops.course_lib.flash_attention_bwd(*ctx.saved_tensors, dout, dlse, *ctx.options)
    return *grads, *(None for _ in ctx.options)


_flash_attention_fwd.register_autograd(_backward, setup_context=_setup_context)


# The operators for packed batches take L as [Hq, total_q], as the kernels write it.


@torch.library.custom_op("course_lib::flash_attention_varlen_fwd", mutates_args=())
def _flash_attention_varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int,
    right: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    check_values("cu_seqlens_q", cu_seqlens_q, q.shape[0])
    check_values("cu_seqlens_k", cu_seqlens_k, k.shape[0])
    fused = runs_triton(q, implementation, grid=(q.shape[1],))
    run = fused_attention_fwd if fused else tiled_attention_varlen_fwd
    packing = Packing(cu_seqlens_q, cu_seqlens_k)
    q, k, v = _as_batch(q, k, v)
    out, lse = run(q, k, v, Band(left, right), scale, packing)
    return _as_packed(out), lse[0]


@_flash_attention_varlen_fwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    left: int,
    right: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    total_q, Hq, _ = q.shape
    return out, torch.empty((Hq, total_q), dtype=statistics_dtype(q), device=q.device)


@torch.library.custom_op("course_lib::flash_attention_varlen_bwd", mutates_args=())
def _flash_attention_varlen_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    left: int,
    right: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    fused = runs_triton(q, implementation, grid=(q.shape[1],))
    run = fused_attention_bwd if fused else tiled_attention_varlen_bwd
    packing = Packing(cu_seqlens_q, cu_seqlens_k)
    q, k, v, out, dout = _as_batch(q, k, v, out, dout)
    grads = run(q, k, v, out, lse[None], dout, dlse[None], Band(left, right), scale, packing)
    dq, dk, dv = (_as_packed(grad) for grad in grads)
    return dq, dk, dv


@_flash_attention_varlen_bwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    left: int,
    right: int,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _varlen_setup_context(ctx, inputs, output) -> None:
    *tensors, left, right, scale, implementation = inputs
    ctx.options = left, right, scale, implementation
    ctx.save_for_backward(*tensors, *output)


def _varlen_backward(ctx, dout: Tensor, dlse: Tensor):
    grads = torch.ops.course_lib.flash_attention_varlen_bwd(
        *ctx.saved_tensors, dout, dlse, *ctx.options
    )
    return *grads, None, None, *(None for _ in ctx.options)


_flash_attention_varlen_fwd.register_autograd(_varlen_backward, setup_context=_varlen_setup_context)


def _as_batch(*packed: Tensor) -> list[Tensor]:
    """[total, H, D] as [1, H, total, D]: views."""
    return [x.transpose(0, 1)[None] for x in packed]


def _as_packed(x: Tensor) -> Tensor:
    """[1, H, total, D] as [total, H, D], contiguous."""
    return x[0].transpose(0, 1).contiguous()
