"""The Triton path: what ``flash_attention`` runs where there is a GPU, launch by launch.

Everything here takes [B, H, T, D] and row statistics [B, Hq, Tq]. A packed batch comes as a view
of that shape, with a batch of one and T the total of all lengths, and a pair of cumulative
lengths beside it.
"""

# A launch, kernel[grid](...), takes options that the kernel's own signature does not show.
# pyright: reportCallIssue=false

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .band import Band
from .cu_seqlens import Packing
from .dispatch import LOG2E, alignment, architecture, cdiv, computable, device_of
from .launches import LaunchConfig, block_d, launch_config

__all__ = ["fused_attention_bwd", "fused_attention_fwd"]


def fused_attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, band: Band, scale: float, packing: Packing | None = None
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel: O in the dtype of q, L in fp32."""
    dtype = q.dtype
    q, k, v = computable(q, k, v)
    out = _empty(q, packing)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    launch_fwd(q, k, v, out, lse, band, scale, packing)
    return out.to(dtype), lse


def fused_attention_bwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    dlse: Tensor,
    band: Band,
    scale: float,
    packing: Packing | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernels: dQ, dK, dV in the dtype of q."""
    dtype = q.dtype
    q, k, v, out, dout = computable(q, k, v, out, dout)
    dq, dk, dv = (_empty(x, packing) for x in (q, k, v))
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    launch_bwd_preprocess(out, dout, dlse.contiguous(), delta)
    launch_bwd_dkdv(q, k, v, dout, lse.contiguous(), delta, dk, dv, band, scale, packing)
    launch_bwd_dq(q, k, v, dout, lse.contiguous(), delta, dq, band, scale, packing)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


# ---- one function a kernel -----------------------------------------------------------------
# Each writes into tensors that it is given. Row statistics (lse, delta) are contiguous; all other
# tensors may have any strides, with the elements of a row side by side.


def launch_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    band: Band,
    scale: float,
    packing: Packing | None = None,
) -> None:
    """Write O and L."""
    from .kernels import flash_attention_fwd_kernel

    if lse.numel() == 0:
        return
    config = _config("fwd", q, band, packing)
    with device_of(q):
        flash_attention_fwd_kernel[_grid(q, config.BLOCK_M, packing)](
            *(q, k, v, out, lse),
            *(packing or (None, None)),
            *_strides(q, k, v, out),
            *_extents(q, k, band, packing),
            scale * LOG2E,
            **_constants(q, band, packing),
            ALIGN=alignment(q, k, v, out),
            **dataclasses.asdict(config),
        )


def launch_bwd_preprocess(out: Tensor, dout: Tensor, dlse: Tensor, delta: Tensor) -> None:
    """Write delta = rowsum(dO * O) - dL; rows know nothing of sequences."""
    from .kernels import flash_attention_bwd_preprocess_kernel

    B, Hq, Tq, D = out.shape
    if delta.numel() == 0:
        return
    config = launch_config("bwd_preprocess", architecture(out), D, out.element_size())
    with device_of(out):
        flash_attention_bwd_preprocess_kernel[(cdiv(Tq, config.BLOCK_M), Hq, B)](
            *(out, dout, dlse, delta),
            *_strides(out, dout),
            *(Hq, Tq),
            ALIGN=alignment(out, dout),
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
    band: Band,
    scale: float,
    packing: Packing | None = None,
) -> None:
    """Write dK and dV, zero where there are no queries."""
    from .kernels import flash_attention_bwd_dkdv_kernel

    if dk.numel() == 0:
        return
    grouped = q.shape[1] != k.shape[1]
    name = "bwd_dkdv_grouped" if grouped else "bwd_dkdv"
    config = _config(name, q, band, packing)
    with device_of(q):
        flash_attention_bwd_dkdv_kernel[_grid(k, config.BLOCK_N, packing)](
            *(q, k, v, dout, lse, delta, dk, dv),
            *(packing or (None, None)),
            *_strides(q, k, v, dout, dk, dv),
            *_extents(q, k, band, packing),
            *(scale, scale * LOG2E),
            GROUPED=grouped,
            **_constants(q, band, packing),
            ALIGN=alignment(q, k, v, dout, dk, dv),
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
    band: Band,
    scale: float,
    packing: Packing | None = None,
) -> None:
    """Write dQ, zero where there are no keys."""
    from .kernels import flash_attention_bwd_dq_kernel

    if dq.numel() == 0:
        return
    config = _config("bwd_dq", q, band, packing)
    with device_of(q):
        flash_attention_bwd_dq_kernel[_grid(q, config.BLOCK_M, packing)](
            *(q, k, v, dout, lse, delta, dq),
            *(packing or (None, None)),
            *_strides(q, k, v, dout, dq),
            *_extents(q, k, band, packing),
            *(scale, scale * LOG2E),
            **_constants(q, band, packing),
            ALIGN=alignment(q, k, v, dout, dq),
            **dataclasses.asdict(config),
        )


# ---- what the launches share ---------------------------------------------------------------


def _empty(x: Tensor, packing: Packing | None) -> Tensor:
    """An uninitialised tensor of x's shape: contiguous, or for a packed batch the view of one."""
    _, H, T, D = x.shape
    if packing is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return torch.empty((T, H, D), dtype=x.dtype, device=x.device).transpose(0, 1)[None]


def _grid(x: Tensor, block: int, packing: Packing | None) -> tuple[int, int, int]:
    """Blocks of rows of x, heads, batch."""
    B, H, T, _ = x.shape
    # The numbering of `find_sequence`: one block more a sequence is enough for every remainder.
    blocks = cdiv(T, block) if packing is None else T // block + packing.sequences
    return blocks, H, B


def _config(kernel: str, q: Tensor, band: Band, packing: Packing | None) -> LaunchConfig:
    more = band.is_window or packing is not None
    arch = architecture(q)
    return launch_config(kernel, arch, q.shape[3], q.element_size(), windowed_or_packed=more)


def _strides(*tensors: Tensor) -> list[int]:
    return [x.stride(i) for x in tensors for i in range(3)]


def _extents(q: Tensor, k: Tensor, band: Band, packing: Packing | None) -> tuple[int, ...]:
    sequences = packing.sequences if packing else 0
    left, right = band.clipped(max(q.shape[2], k.shape[2]))
    return sequences, q.shape[1], k.shape[1], q.shape[2], k.shape[2], left, right


def _constants(q: Tensor, band: Band, packing: Packing | None) -> dict[str, int | bool]:
    return {
        "CAUSAL": band.is_causal,
        "WINDOWED": band.is_window,
        "VARLEN": packing is not None,
        "D": q.shape[3],
        "BLOCK_D": block_d(q.shape[3]),
    }
