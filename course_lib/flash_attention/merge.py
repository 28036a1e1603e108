"""The public function ``merge_attention_states``: validation, dispatch, launches, autograd."""

# A launch, kernel[grid](...), takes options that the kernel's own signature does not show.
# pyright: reportCallIssue=false

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .dispatch import (
    DTYPES,
    Implementation,
    alignment,
    cdiv,
    check_implementation,
    check_triton_can_take,
    device_of,
    runs_triton,
)
from .launches import block_d
from .merge_launches import merge_config
from .tiled import statistics_dtype

__all__ = ["launch_merge_bwd", "launch_merge_fwd", "merge_attention_states"]


def merge_attention_states(
    outs: Tensor | Sequence[Tensor],
    lses: Tensor | Sequence[Tensor],
    *,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys, merged into attention over all of them.

    The same queries attended to S sets of keys; part s has the normalised output O_s and the row
    logsumexp lse_s of its scores. Then, over the union of the keys,

    L = logsumexp_s(lse_s),   O = sum_s exp(lse_s - L) O_s,

    exactly, in whatever order the parts come. This is how split-KV decoding, ring attention and
    cascades over a shared prefix put their pieces together.

    Args:
        outs: [S, ..., D], or a sequence of S tensors [..., D]; fp16, bf16 or fp32 (fp64 runs in
            PyTorch only). D comes last; before it any axes, such as [B, H, T].
        lses: [S, ...], or a sequence of S tensors [...]; natural logarithm, fp32 whatever the dtype
            of outs (fp64 for fp64). -inf says that the part saw no key: its share is 0 and its
            output is not read, whatever stands there. +inf and NaN are no logsumexps, and make
            their row NaN.
        implementation: "triton", "torch" or "auto", as in ``flash_attention``.

    Returns:
        O, [..., D], contiguous, in the dtype of outs, and L, [...], contiguous, in that of lses. A
        row that no part has a key for has O = 0 and L = -inf. Both are differentiable, once, with
        respect to outs and lses; the gradients of a part without keys are 0. To lose nothing, keep
        partial outputs in fp32 where the queries are in half precision, and round the result.

    Cost:
        outs is read once and O written once: (S + 1) N D elements for N rows, and a pass over
        lses. Backward reads outs once more and writes its gradient: (2 S + 1) N D. A sequence is
        stacked first, and outs copied where the axes "..." cannot be flattened into one: either
        costs another 2 S N D.

    Raises:
        TypeError: An argument has the wrong type, or a dtype that the implementation cannot take.
        ValueError: Shapes, devices or implementation do not fit; the message names the argument,
            what it was, and what was expected.
        RuntimeError: ``implementation="triton"`` with tensors that no kernel can reach.
        TritonUnavailable: ``implementation="triton"`` where Triton cannot be imported.

    Example:
        >>> q, k, v = (torch.randn(1, 4, 100, 64) for _ in range(3))
        >>> parts = [
        ...     flash_attention(q, k[:, :, piece], v[:, :, piece], return_lse=True)
        ...     for piece in (slice(0, 40), slice(40, 100))
        ... ]
        >>> out, lse = merge_attention_states(*zip(*parts))

    Source:
        Milakov and Gimelshein, arXiv 1805.02867, section 3.1; its use for split keys: Dao et al.,
        "Flash-Decoding" (2023). The kernels are in ``merge_kernels.py``.
    """
    outs, lses = _stacked("outs", outs), _stacked("lses", lses)
    _check_parts(outs, lses)
    check_implementation(implementation)
    if implementation == "triton":
        check_triton_can_take(outs, name="outs")
    return _merge_attention_states_fwd(outs, lses, implementation)


# ---- validation ----------------------------------------------------------------------------


def _stacked(name: str, parts: Tensor | Sequence[Tensor]) -> Tensor:
    """One tensor, whichever way the parts were given."""
    if isinstance(parts, Tensor):
        return parts
    if not isinstance(parts, list | tuple):
        raise TypeError(
            f"{name} must be a torch.Tensor, or a list or tuple of them, got {type(parts).__name__}"
        )
    if not parts:
        raise ValueError(f"{name} must have at least one part where it is a sequence, got none")
    for index, part in enumerate(parts):
        if not isinstance(part, Tensor):
            raise TypeError(f"{name}[{index}] must be a torch.Tensor, got {type(part).__name__}")
        for what in ("shape", "dtype", "device"):
            first, this = getattr(parts[0], what), getattr(part, what)
            if this != first:
                first, this = (tuple(x) if what == "shape" else x for x in (first, this))
                raise ValueError(
                    f"{name} must be alike: {name}[0] has {what} {first}, {name}[{index}] {this}"
                )
    return torch.stack(tuple(parts))


def _check_parts(outs: Tensor, lses: Tensor) -> None:
    for name, tensor in (("outs", outs), ("lses", lses)):
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if outs.dtype not in DTYPES:
        raise TypeError(f"outs must be fp16, bf16, fp32 or fp64, got {outs.dtype}")
    if outs.dim() < 2 or outs.shape[-1] == 0:
        raise ValueError(
            f"outs must be [S, ..., D] with D of at least 1, got shape {tuple(outs.shape)}"
        )
    if lses.dtype != statistics_dtype(outs):
        raise TypeError(
            f"lses must be {statistics_dtype(outs)} where outs is {outs.dtype}, got {lses.dtype}"
        )
    if lses.shape != outs.shape[:-1]:
        raise ValueError(
            f"lses must have the shape of outs without its last axis, {tuple(outs.shape[:-1])}, "
            f"got {tuple(lses.shape)}"
        )
    if lses.device != outs.device:
        raise ValueError(f"lses must be on the device of outs, {outs.device}, got {lses.device}")


# ---- in PyTorch ----------------------------------------------------------------------------
# Part by part, so that nothing larger than one part is made in fp32.


def _shares(lses: Tensor) -> tuple[Tensor, Tensor]:
    """The weights of the parts, [S, ...], 0 without keys; and L, [...]."""
    if lses.shape[0] == 0:
        return lses, lses.new_full(lses.shape[1:], -math.inf)
    row_max = lses.amax(dim=0)
    # A row without keys is measured from zero, so that its weights are exp(-inf) = 0.
    row_max = row_max.masked_fill(row_max == -math.inf, 0.0)
    weights = (lses - row_max).exp_()
    row_sum = weights.sum(dim=0)
    lse = row_max + row_sum.log()
    return weights.div_(row_sum.masked_fill(row_sum == 0, 1.0)), lse


def _torch_merge_fwd(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    weights, lse = _shares(lses)
    acc = torch.zeros(outs.shape[1:], dtype=lses.dtype, device=outs.device)
    for part, weight, part_lse in zip(outs, weights, lses, strict=True):
        blind = (part_lse == -math.inf)[..., None]
        acc += weight[..., None] * part.to(acc.dtype).masked_fill(blind, 0.0)
    return acc.to(outs.dtype), lse


def _torch_merge_bwd(
    outs: Tensor, lses: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor]:
    weights, _ = _shares(lses)
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    products = torch.empty(lses.shape, dtype=lses.dtype, device=lses.device)
    blind = lses == -math.inf
    dout = dout.to(lses.dtype)
    for index, (part, weight) in enumerate(zip(outs, weights, strict=True)):
        hidden = blind[index][..., None]
        part = part.to(lses.dtype).masked_fill(hidden, 0.0)
        products[index] = (dout * part).sum(dim=-1)
        douts[index] = (weight[..., None] * dout).masked_fill(hidden, 0.0).to(outs.dtype)
    delta = (weights * products).sum(dim=0) - dlse
    return douts, (weights * (products - delta)).masked_fill(blind, 0.0)


# ---- in Triton -----------------------------------------------------------------------------


def _triton_merge_fwd(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    lse = torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device)
    launch_merge_fwd(*_rows(outs, lses), out.view(-1, out.shape[-1]), lse.view(-1))
    return out, lse


def _triton_merge_bwd(
    outs: Tensor, lses: Tensor, dout: Tensor, dlse: Tensor
) -> tuple[Tensor, Tensor]:
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    dlses = torch.empty(lses.shape, dtype=lses.dtype, device=lses.device)
    S, rows, D = outs.shape[0], math.prod(outs.shape[1:-1]), outs.shape[-1]
    launch_merge_bwd(
        *_rows(outs, lses),
        dout.reshape(rows, D).contiguous(),
        dlse.reshape(rows).contiguous(),
        douts.view(S, rows, D),
        dlses.view(S, rows),
    )
    return douts, dlses


def _rows(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The same as [S, N, D] and [S, N]: a copy only where the strides do not allow a view."""
    S, rows, D = outs.shape[0], math.prod(outs.shape[1:-1]), outs.shape[-1]
    outs = outs.reshape(S, rows, D)
    outs = outs if outs.stride(-1) == 1 else outs.contiguous()
    return outs, lses.reshape(S, rows).contiguous()


def launch_merge_fwd(outs: Tensor, lses: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write O and L.

    Args:
        outs: [S, N, D], any strides but the last, which is 1.
        lses: [S, N], fp32, contiguous.
        out: [N, D], contiguous, in any dtype that a kernel takes: the sum is rounded to it once.
        lse: [N], fp32, contiguous.
    """
    from .merge_kernels import merge_attention_states_fwd_kernel

    S, N, D = outs.shape
    if N == 0:
        return
    config = merge_config(S, D)
    with device_of(outs):
        merge_attention_states_fwd_kernel[(cdiv(N, config.BLOCK_M),)](
            *(outs, lses, out, lse),
            *(outs.stride(0), outs.stride(1), S, N),
            ALIGN=alignment(outs, out),
            D=D,
            BLOCK_D=block_d(D),
            BLOCK_M=config.BLOCK_M,
            BLOCK_S=config.BLOCK_S,
            num_warps=config.num_warps,
        )


def launch_merge_bwd(
    outs: Tensor, lses: Tensor, dout: Tensor, dlse: Tensor, douts: Tensor, dlses: Tensor
) -> None:
    """Write dO_s into douts, [S, N, D], and dlse_s into dlses, [S, N]: all but outs contiguous."""
    from .merge_kernels import merge_attention_states_bwd_kernel

    S, N, D = outs.shape
    if N == 0 or S == 0:
        return
    config = merge_config(S, D)
    with device_of(outs):
        merge_attention_states_bwd_kernel[(cdiv(N, config.BLOCK_M),)](
            *(outs, lses, dout, dlse, douts, dlses),
            *(outs.stride(0), outs.stride(1), S, N),
            ONE_BLOCK=config.BLOCK_S >= S,
            ALIGN=alignment(outs, dout, douts),
            D=D,
            BLOCK_D=block_d(D),
            BLOCK_M=config.BLOCK_M,
            BLOCK_S=config.BLOCK_S,
            num_warps=config.num_warps,
        )


# ---- registration --------------------------------------------------------------------------


@torch.library.custom_op("course_lib::merge_attention_states_fwd", mutates_args=())
def _merge_attention_states_fwd(
    outs: Tensor, lses: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    run = _triton_merge_fwd if runs_triton(outs, implementation) else _torch_merge_fwd
    return run(outs, lses)


@_merge_attention_states_fwd.register_fake
def _(outs: Tensor, lses: Tensor, implementation: str) -> tuple[Tensor, Tensor]:
    out = torch.empty(outs.shape[1:], dtype=outs.dtype, device=outs.device)
    return out, torch.empty(lses.shape[1:], dtype=lses.dtype, device=lses.device)


@torch.library.custom_op("course_lib::merge_attention_states_bwd", mutates_args=())
def _merge_attention_states_bwd(
    outs: Tensor, lses: Tensor, dout: Tensor, dlse: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    run = _triton_merge_bwd if runs_triton(outs, implementation) else _torch_merge_bwd
    return run(outs, lses, dout, dlse)


@_merge_attention_states_bwd.register_fake
def _(
    outs: Tensor, lses: Tensor, dout: Tensor, dlse: Tensor, implementation: str
) -> tuple[Tensor, Tensor]:
    douts = torch.empty(outs.shape, dtype=outs.dtype, device=outs.device)
    return douts, torch.empty(lses.shape, dtype=lses.dtype, device=lses.device)


def _setup_context(ctx, inputs, output) -> None:
    outs, lses, ctx.implementation = inputs
    ctx.save_for_backward(outs, lses)


def _backward(ctx, dout: Tensor, dlse: Tensor):
    grads = torch.ops.course_lib.merge_attention_states_bwd(
        *ctx.saved_tensors, dout, dlse, ctx.implementation
    )
    return *grads, None


_merge_attention_states_fwd.register_autograd(_backward, setup_context=_setup_context)
