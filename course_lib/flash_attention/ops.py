"""The public function ``flash_attention``: validation, dispatch, launches, autograd."""

# A launch, kernel[grid](...), takes options that the kernel's own signature does not show.
# pyright: reportCallIssue=false

from __future__ import annotations

import contextlib
import dataclasses
import math
from typing import Literal, overload

import torch
from torch import Tensor

from .launches import HEAD_DIMS, block_d, launch_config, table_architecture
from .tiled import statistics_dtype, tiled_attention_bwd, tiled_attention_fwd

__all__ = ["flash_attention"]

Implementation = Literal["auto", "triton", "torch"]

_IMPLEMENTATIONS = ("auto", "triton", "torch")
_TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_DTYPES = (*_TRITON_DTYPES, torch.float64)
_LOG2E = 1.4426950408889634
_MAX_GRID_YZ = 65535  # CUDA's limit on the second and third axis of a grid: heads and batch


@overload
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = ...,
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
    _check_tensors(q, k, v)
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation must be one of {_IMPLEMENTATIONS}, got {implementation!r}"
        )
    if implementation == "triton":
        _check_triton_can_take(q)
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {causal!r}")
    scale = _checked_scale(scale, q.shape[3])
    out, lse = _flash_attention_fwd(q, k, v, causal, scale, implementation)
    return (out, lse) if return_lse else out


# ---- validation ----------------------------------------------------------------------------


def _check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != 4:
            raise ValueError(
                f"{name} must have 4 dimensions [B, H, T, D], got shape {tuple(tensor.shape)}"
            )
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    batch, q_heads, _, head_dim = q.shape
    for name, tensor in (("k", k), ("v", v)):
        if tensor.shape[0] != batch:
            raise ValueError(
                f"{name} must have the batch size of q, {batch}, got {tensor.shape[0]}"
            )
        if tensor.shape[3] != head_dim:
            raise ValueError(
                f"{name} must have the head dimension of q, {head_dim}, got {tensor.shape[3]}"
            )
    if head_dim == 0:
        raise ValueError(f"q must have a head dimension of at least 1, got shape {tuple(q.shape)}")
    if k.shape[1] != v.shape[1]:
        raise ValueError(
            f"k and v must have the same number of heads, got {k.shape[1]} and {v.shape[1]}"
        )
    if k.shape[2] != v.shape[2]:
        raise ValueError(
            f"k and v must have the same length, got {k.shape[2]} keys and {v.shape[2]} values"
        )
    if k.shape[1] == 0 or q_heads % k.shape[1] != 0:
        raise ValueError(
            f"the heads of q must be a multiple of the heads of k and v, "
            f"got {q_heads} and {k.shape[1]}"
        )


def _check_triton_can_take(q: Tensor) -> None:
    if q.dtype not in _TRITON_DTYPES:
        raise TypeError(
            f'q must be fp16, bf16 or fp32 for implementation="triton", got {q.dtype}; '
            'fp64 runs with implementation="torch"'
        )
    if q.shape[3] not in HEAD_DIMS:
        raise ValueError(
            f"q must have a head dimension of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} for "
            f'implementation="triton", got {q.shape[3]}'
        )
    if max(q.shape[0], q.shape[1]) > _MAX_GRID_YZ:
        raise ValueError(
            f'q must have at most {_MAX_GRID_YZ} sequences and heads for implementation="triton", '
            f"got shape {tuple(q.shape)}"
        )


def _checked_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {scale!r}")
    if not (scale > 0.0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale!r}")
    return float(scale)


# ---- dispatch ------------------------------------------------------------------------------


def _runs_triton(q: Tensor, implementation: str) -> bool:
    """Decide, by the rule in the docstring of ``flash_attention``. Runs inside the op."""
    if implementation == "torch":
        return False
    from course_lib.runtime.tile import HAS_TRITON, TRITON_MISSING, TritonUnavailable

    if implementation == "auto":
        return (
            HAS_TRITON
            and q.is_cuda
            and torch.version.hip is None
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
            and q.dtype in _TRITON_DTYPES
            and q.shape[3] in HEAD_DIMS
            and max(q.shape[0], q.shape[1]) <= _MAX_GRID_YZ
        )
    if not HAS_TRITON:
        raise TritonUnavailable(
            f'implementation="triton" needs Triton, which cannot be imported here '
            f'({TRITON_MISSING}); implementation="torch" runs everywhere'
        )
    from course_lib.runtime.interpreter import interpreting

    if not q.is_cuda and not interpreting():
        raise RuntimeError(
            f'implementation="triton" needs CUDA tensors, got device {q.device}. On CPU, run the '
            "kernels under the interpreter (`with interpreted():`, from "
            'course_lib.runtime.interpreter), or use implementation="torch"'
        )
    if not interpreting():
        arch = _architecture(q)
        if arch is None or (arch < 80 and q.shape[3] > 128):
            capability = torch.cuda.get_device_capability(q.device)
            raise RuntimeError(
                'implementation="triton" needs compute capability 8.0 or more, or 7.5 and a head '
                f"dimension of at most 128; got {capability} and {q.shape[3]}; "
                'implementation="torch" runs everywhere'
            )
    return True


def _architecture(q: Tensor) -> int | None:
    """The row of the launch table; None under the interpreter, and on GPUs that are too old."""
    from course_lib.runtime.interpreter import interpreting

    if interpreting():
        return None
    return table_architecture(torch.cuda.get_device_capability(q.device))


# ---- launches ------------------------------------------------------------------------------


def _cdiv(x: int, y: int) -> int:
    return (x + y - 1) // y


def _rows_contiguous(x: Tensor) -> Tensor:
    """The tensor itself if the elements of a row lie side by side, else a copy that has it so."""
    return x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()


def _alignment(*tensors: Tensor) -> int:
    """What every row of every tensor begins at a multiple of, in bytes: 16, or one element."""
    for x in tensors:
        starts = [x.data_ptr()]
        starts += [x.stride(i) * x.element_size() for i in range(3) if x.shape[i] > 1]
        if any(start % 16 for start in starts):
            return x.element_size()
    return 16


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in range(3)]


def _constants(q: Tensor, causal: bool) -> dict[str, int | bool]:
    return {
        "CAUSAL": causal,
        "D": q.shape[3],
        "BLOCK_D": block_d(q.shape[3]),
    }


def _device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def _computable(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernels can take them: the interpreter cannot compute in bf16."""
    from course_lib.runtime.interpreter import interpreting

    if interpreting():
        tensors = tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)
    return [_rows_contiguous(x) for x in tensors]


def flash_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: O in the dtype of q, L in fp32, both contiguous."""
    dtype = q.dtype
    q, k, v = _computable(q, k, v)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch_fwd(q, k, v, out, lse, causal, scale)
    return out.to(dtype), lse


def flash_attention_bwd(
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
    """Run the backward kernels: dQ, dK, dV in the dtype of q, contiguous."""
    dtype = q.dtype
    q, k, v, out, dout = _computable(q, k, v, out, dout)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    launch_bwd_preprocess(out, dout, dlse.contiguous(), delta)
    launch_bwd_dkdv(q, k, v, dout, lse.contiguous(), delta, dk, dv, causal, scale)
    launch_bwd_dq(q, k, v, dout, lse.contiguous(), delta, dq, causal, scale)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# Each of the four writes into tensors that it is given. Row statistics (lse, delta) are contiguous;
# all other tensors may have any strides, with the elements of a row side by side.


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> None:
    """Write O and L."""
    from .kernels import flash_attention_fwd_kernel

    B, Hq, Tq, D = q.shape
    Tk = k.shape[2]
    if lse.numel() == 0:
        return
    config = launch_config("fwd", _architecture(q), D, q.element_size())
    grid = (_cdiv(Tq, config.BLOCK_M), Hq, B)
    with _device_of(q):
        flash_attention_fwd_kernel[grid](
            *(q, k, v, out, lse),
            *_strides(q, k, v, out),
            *(Hq, k.shape[1], Tq, Tk, scale * _LOG2E),
            **_constants(q, causal),
            ALIGN=_alignment(q, k, v, out),
            **dataclasses.asdict(config),
        )


def launch_bwd_preprocess(out: Tensor, dout: Tensor, dlse: Tensor, delta: Tensor) -> None:
    """Write delta = rowsum(dO * O) - dL."""
    from .kernels import flash_attention_bwd_preprocess_kernel

    B, Hq, Tq, D = out.shape
    if delta.numel() == 0:
        return
    config = launch_config("bwd_preprocess", _architecture(out), D, out.element_size())
    grid = (_cdiv(Tq, config.BLOCK_M), Hq, B)
    with _device_of(out):
        flash_attention_bwd_preprocess_kernel[grid](
            *(out, dout, dlse, delta),
            *_strides(out, dout),
            *(Hq, Tq),
            ALIGN=_alignment(out, dout),
            D=D,
            BLOCK_D=block_d(D),
            BLOCK_M=config.BLOCK_M,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def launch_bwd_dkdv(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    causal: bool,
    scale: float,
) -> None:
    """Write dK and dV, zero where there are no queries."""
    from .kernels import flash_attention_bwd_dkdv_kernel

    B, Hq, Tq, D = q.shape
    Hkv, Tk = k.shape[1:3]
    if dk.numel() == 0:
        return
    grouped = Hq != Hkv
    name = "bwd_dkdv_grouped" if grouped else "bwd_dkdv"
    config = launch_config(name, _architecture(q), D, q.element_size())
    grid = (_cdiv(Tk, config.BLOCK_N), Hkv, B)
    with _device_of(q):
        flash_attention_bwd_dkdv_kernel[grid](
            *(q, k, v, dout, lse, delta, dk, dv),
            *_strides(q, k, v, dout, dk, dv),
            *(Hq, k.shape[1], Tq, Tk, scale, scale * _LOG2E),
            GROUPED=grouped,
            **_constants(q, causal),
            ALIGN=_alignment(q, k, v, dout, dk, dv),
            **dataclasses.asdict(config),
        )


def launch_bwd_dq(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    causal: bool,
    scale: float,
) -> None:
    """Write dQ, zero where there are no keys."""
    from .kernels import flash_attention_bwd_dq_kernel

    B, Hq, Tq, D = q.shape
    Tk = k.shape[2]
    if dq.numel() == 0:
        return
    config = launch_config("bwd_dq", _architecture(q), D, q.element_size())
    grid = (_cdiv(Tq, config.BLOCK_M), Hq, B)
    with _device_of(q):
        flash_attention_bwd_dq_kernel[grid](
            *(q, k, v, dout, lse, delta, dq),
            *_strides(q, k, v, dout, dq),
            *(Hq, k.shape[1], Tq, Tk, scale, scale * _LOG2E),
            **_constants(q, causal),
            ALIGN=_alignment(q, k, v, dout, dq),
            **dataclasses.asdict(config),
        )


# ---- registration --------------------------------------------------------------------------
# Two opaque operators, so that torch.compile, export and opcheck see attention as one node. Which
# implementation runs is decided inside, where the real tensors are.


@torch.library.custom_op("course_lib::flash_attention_fwd", mutates_args=())
def _flash_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, implementation: str
) -> tuple[Tensor, Tensor]:
    run = flash_attention_fwd if _runs_triton(q, implementation) else tiled_attention_fwd
    return run(q, k, v, causal, scale)


@_flash_attention_fwd.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, implementation: str
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
    causal: bool,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    run = flash_attention_bwd if _runs_triton(q, implementation) else tiled_attention_bwd
    return run(q, k, v, out, lse, dout, dlse, causal, scale)


@_flash_attention_bwd.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    causal: bool,
    scale: float,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return dq, dk, dv


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.causal, ctx.scale, ctx.implementation = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, dout: Tensor, dlse: Tensor):
    q, k, v, out, lse = ctx.saved_tensors
    # Gradients of tensors that do not ask for one are computed and dropped: dK and dV come from
    # one kernel, and frozen queries are rare.
    grads = torch.ops.course_lib.flash_attention_bwd(
        q, k, v, out, lse, dout, dlse, ctx.causal, ctx.scale, ctx.implementation
    )
    return *grads, None, None, None


_flash_attention_fwd.register_autograd(_backward, setup_context=_setup_context)
