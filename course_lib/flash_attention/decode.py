"""The public function ``flash_attention_decode``: a few new queries against a long cache."""

# A launch, kernel[grid](...), takes options that the kernel's own signature does not show.
# pyright: reportCallIssue=false

from __future__ import annotations

import dataclasses
import math
from typing import Literal, overload

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .band import Band
from .decode_launches import INTERPRETED_MULTIPROCESSORS, choose_splits, decode_config
from .dispatch import (
    LOG2E,
    Implementation,
    alignment,
    architecture,
    cdiv,
    check_implementation,
    check_scale,
    check_tensor,
    check_triton_can_take,
    device_of,
    runs_triton,
)
from .launches import LaunchConfig, block_d
from .merge import launch_merge_fwd
from .tiled import SCORE_ELEMENTS, compute_dtype, statistics_dtype

__all__ = ["flash_attention_decode", "launch_decode"]


@overload
def flash_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = ...,
    *,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    splits: int | None = ...,
    return_lse: Literal[False] = ...,
    implementation: Implementation = ...,
) -> Tensor: ...
@overload
def flash_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = ...,
    *,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    splits: int | None = ...,
    return_lse: Literal[True],
    implementation: Implementation = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def flash_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = ...,
    *,
    window_size: tuple[int, int] = ...,
    scale: float | None = ...,
    splits: int | None = ...,
    return_lse: bool,
    implementation: Implementation = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def flash_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None = None,
    *,
    window_size: tuple[int, int] = (-1, -1),
    scale: float | None = None,
    splits: int | None = None,
    return_lse: bool = False,
    implementation: Implementation = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a cache of keys and values, for inference.

    S = scale * Q K^T,   O = softmax(S) V,   L = logsumexp(S), over the valid keys of each sequence.
    The keys are cut into splits that run side by side; the query heads that share a kv head are
    rows of one tile, so every key is read once a group and not once a query head.

    Args:
        q: [B, Hq, Tq, D], the last Tq positions of each sequence (1 for ordinary decoding, more for
            speculative decoding or a chunk of a prompt); fp16, bf16 or fp32; fp64 runs in PyTorch
            only.
        k_cache: [B, Hkv, Tmax, D], same dtype and device; any strides, as long as the last one is
            1. Hkv divides Hq; query head h reads kv head h // (Hq // Hkv). The keys of the new
            positions must stand in it already.
        v_cache: [B, Hkv, Tmax, D].
        cache_seqlens: int32 [B], valid keys of each sequence, the new ones included; Tmax each if
            None. What no query sees, past the valid keys and left of every window, is never read:
            it may hold anything, NaN included.
        window_size: (left, right) as in flash-attention, -1 for no bound. Attention is causal,
            aligned at the bottom right: query i sees key j where j <= i + len - Tq, and with
            left >= 0 also only j >= i + len - Tq - left. ``right`` changes nothing, since no query
            sees past its own position.
        scale: Softmax scale, a positive number; 1/sqrt(D) if None.
        splits: Parts that the keys of a sequence are cut into. None chooses: as many as fill the
            GPU with two programs a multiprocessor, 2 * SMs // (B * Hkv * blocks of rows), but no
            more than one for 256 keys of Tmax (or of the window), and no more than 128. The result
            depends on it by rounding only. The PyTorch path needs none.
        return_lse: Also return L.
        implementation: "triton", "torch" or "auto", as in ``flash_attention``.

    Returns:
        O, [B, Hq, Tq, D], in the dtype of q, contiguous. With ``return_lse`` also L, [B, Hq, Tq],
        natural logarithm, fp32 (fp64 for fp64 inputs). A query that sees no key, as where the cache
        is empty or shorter than Tq, has O = 0 and L = -inf.

    Cost:
        2 B Hkv len D elements read, 4 B Hq Tq len D FLOPs, and for splits > 1 a second kernel with
        8 splits B Hq Tq D bytes in between.

        The values of cache_seqlens are checked once for each tensor and version of it, which waits
        for the GPU: a loop that adds to it in place pays once a step, not once a layer. Nothing is
        checked while a CUDA graph is captured, and a tensor made in inference mode, which counts no
        versions, only the first time. A wrong length that is not checked is taken as 0 or Tmax:
        memory outside the cache is never read.

    Raises:
        TypeError: An argument has the wrong type, or a dtype that the implementation cannot take.
        ValueError: Shapes, strides, devices, head counts, lengths, window_size, scale, splits or
            implementation do not fit; the message names the argument, what it was, and what was
            expected.
        RuntimeError: An input requires a gradient (there is no backward: use ``flash_attention``),
            or ``implementation="triton"`` with tensors that no kernel can reach.
        TritonUnavailable: ``implementation="triton"`` where Triton cannot be imported.

    Example:
        >>> k_cache, v_cache = torch.randn(2, 3, 2, 1000, 64)  # room for 1000 keys
        >>> lengths = torch.tensor([17, 901, 1000], dtype=torch.int32)
        >>> flash_attention_decode(torch.randn(3, 8, 1, 64), k_cache, v_cache, lengths).shape
        torch.Size([3, 8, 1, 64])

    Source:
        Dao, Haziza, Massa and Sizov, "Flash-Decoding for long-context inference" (2023). The
        kernels are in ``decode_kernels.py`` and ``merge_kernels.py``.
    """
    _check_tensors(q, k_cache, v_cache)
    if cache_seqlens is not None:
        _check_seqlens(cache_seqlens, q)
    left = Band.of(True, window_size).left
    scale = check_scale(scale, q.shape[3])
    if splits is not None and (isinstance(splits, bool) or not isinstance(splits, int)):
        raise TypeError(f"splits must be an int or None, got {splits!r}")
    if splits is not None and splits < 1:
        raise ValueError(f"splits must be at least 1, got {splits}")
    check_implementation(implementation)
    if implementation == "triton":
        check_triton_can_take(q, (q.shape[0], k_cache.shape[1]))
    if torch.is_grad_enabled():
        for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache)):
            if tensor.requires_grad:
                raise RuntimeError(
                    f"flash_attention_decode has no backward, and {name} requires a gradient: "
                    "call it under torch.no_grad() or torch.inference_mode(), or use "
                    "flash_attention"
                )
    out, lse = _flash_attention_decode(
        q, k_cache, v_cache, cache_seqlens, left, scale, splits, implementation
    )
    return (out, lse) if return_lse else out


# ---- validation ----------------------------------------------------------------------------


def _check_tensors(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> None:
    caches = (("k_cache", k_cache), ("v_cache", v_cache))
    check_tensor("q", q, q, "[B, H, T, D]")
    batch, q_heads, _, head_dim = q.shape
    if head_dim == 0:
        raise ValueError(f"q must have a head dimension of at least 1, got shape {tuple(q.shape)}")
    for name, cache in caches:
        check_tensor(name, cache, q, "[B, H, T, D]")
        if cache.shape[0] != batch:
            raise ValueError(f"{name} must have the batch size of q, {batch}, got {cache.shape[0]}")
        if cache.shape[3] != head_dim:
            raise ValueError(
                f"{name} must have the head dimension of q, {head_dim}, got {cache.shape[3]}"
            )
        if cache.stride(3) != 1 and head_dim != 1:
            # A copy, as other ops make one, would cost more than the attention, every time.
            raise ValueError(
                f"{name} must have stride 1 in its last dimension, got strides {cache.stride()}"
            )
    if k_cache.shape[1:3] != v_cache.shape[1:3]:
        raise ValueError(
            "v_cache must have the heads and the length of k_cache, "
            f"{tuple(k_cache.shape[1:3])}, got {tuple(v_cache.shape[1:3])}"
        )
    if k_cache.shape[1] == 0 or q_heads % k_cache.shape[1] != 0:
        raise ValueError(
            "the heads of q must be a multiple of the heads of k_cache and v_cache, "
            f"got {q_heads} and {k_cache.shape[1]}"
        )


def _check_seqlens(cache_seqlens: Tensor, q: Tensor) -> None:
    if not isinstance(cache_seqlens, Tensor):
        raise TypeError(
            f"cache_seqlens must be a torch.Tensor or None, got {type(cache_seqlens).__name__}"
        )
    if cache_seqlens.dtype != torch.int32:
        raise TypeError(f"cache_seqlens must be int32, got {cache_seqlens.dtype}")
    if cache_seqlens.shape != q.shape[:1]:
        raise ValueError(
            f"cache_seqlens must have shape [B], {tuple(q.shape[:1])}, "
            f"got {tuple(cache_seqlens.shape)}"
        )
    if cache_seqlens.device != q.device:
        raise ValueError(
            f"cache_seqlens must be on the device of q, {q.device}, got {cache_seqlens.device}"
        )


# Tensors of lengths that were found good → (version, longest that was allowed).
_checked_lengths: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _check_lengths(cache_seqlens: Tensor, longest: int) -> None:
    """Raise unless all values lie in 0 ... longest; asked inside the op, with real tensors."""
    if cache_seqlens.numel() == 0:
        return
    if cache_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    version = 0 if cache_seqlens.is_inference() else cache_seqlens._version
    if _checked_lengths.get(cache_seqlens) == (version, longest):
        return
    least, most = (int(x) for x in torch.stack(torch.aminmax(cache_seqlens)).tolist())
    if least < 0 or most > longest:
        raise ValueError(
            f"cache_seqlens must lie between 0 and {longest}, the keys that k_cache has room for, "
            f"got values from {least} to {most}"
        )
    _checked_lengths[cache_seqlens] = (version, longest)


def _rows(q: Tensor, kv_heads: int) -> Tensor:
    """The queries as [B, Hkv, R, D]; a copy, of a few numbers, only where no view is possible."""
    B, Hq, Tq, D = q.shape
    return q.reshape(B, kv_heads, Hq // kv_heads * Tq, D)


# ---- in PyTorch ----------------------------------------------------------------------------


def _torch_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    left: int,
    scale: float,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    """The same in PyTorch: block by block over the keys, with one running softmax."""
    B, _, Tq, D = q.shape
    Hkv, Tmax = k_cache.shape[1:3]
    dtype, statistics = compute_dtype(q), statistics_dtype(q)
    rows = _rows(q, Hkv).to(dtype)
    R = rows.shape[2]
    lengths = cache_seqlens
    if lengths is None:
        lengths = torch.full((B,), Tmax, dtype=torch.int32, device=q.device)
    lengths = lengths.clamp(0, Tmax)[:, None, None, None]
    position = torch.arange(R, device=q.device)[:, None] % Tq + lengths - Tq  # [B, 1, R, 1]

    row_max = torch.full((B, Hkv, R, 1), -math.inf, dtype=statistics, device=q.device)
    row_sum = torch.zeros_like(row_max)
    acc = torch.zeros((B, Hkv, R, D), dtype=statistics, device=q.device)
    block = max(SCORE_ELEMENTS // max(B * Hkv * max(R, D), 1), 16)
    begin, end = 0, Tmax
    if not q.is_cuda:  # on a GPU this would wait for it
        end = int(lengths.max())
        begin = max(int(lengths.min()) - Tq - left, 0) if left >= 0 else 0
    for start in range(begin, end, block):
        keys = torch.arange(start, min(start + block, end), device=q.device)
        visible = (keys < lengths) & (keys <= position)  # [B, 1, R, keys]
        if left >= 0:
            visible &= keys >= position - left
        k_block = k_cache[:, :, start : start + len(keys)].to(dtype)
        scores = (rows @ k_block.transpose(-2, -1)).to(statistics) * scale
        scores = scores.masked_fill(~visible, -math.inf)

        new_max = torch.maximum(row_max, scores.amax(dim=-1, keepdim=True))
        # A row without keys is measured from zero, so that its weights are exp(-inf) = 0.
        origin = new_max.masked_fill(new_max == -math.inf, 0.0)
        weights = (scores - origin).exp_()
        rescale = (row_max - origin).exp_()
        row_sum = row_sum * rescale + weights.sum(dim=-1, keepdim=True)
        # Weight 0 does not silence a NaN, and where no query looks there may be one.
        seen = visible.any(dim=-2)[..., None]  # [B, 1, keys, 1]
        v_block = v_cache[:, :, start : start + len(keys)].to(dtype)
        v_block = v_block.masked_fill(~seen, 0.0)
        acc = acc * rescale + (weights.to(dtype) @ v_block).to(statistics)
        row_max = new_max
    out = acc / row_sum.masked_fill(row_sum == 0, 1.0)
    lse = row_max.masked_fill(row_max == -math.inf, 0.0) + row_sum.log()
    return out.to(q.dtype).view(q.shape), lse.view(q.shape[:3])


# ---- in Triton -----------------------------------------------------------------------------


def _triton_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    left: int,
    scale: float,
    splits: int | None,
) -> tuple[Tensor, Tensor]:
    B, _, Tq, D = q.shape
    Hkv, Tmax = k_cache.shape[1:3]
    rows = _rows(q, Hkv)
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    config = decode_config(architecture(q), rows.shape[2], D, q.element_size())
    if splits is None:
        programs = B * Hkv * cdiv(rows.shape[2], config.BLOCK_M)
        keys = Tmax if left < 0 else min(Tmax, left + Tq)
        splits = choose_splits(programs, keys, _multiprocessors(q))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    grouped = (k_cache, v_cache, cache_seqlens)
    if splits == 1:
        parts, lses = out.view(1, *rows.shape), lse.view(1, *rows.shape[:3])
        launch_decode(rows, *grouped, parts, lses, Tq, left, scale, config)
        return out, lse
    parts = torch.empty((splits, *rows.shape), dtype=torch.float32, device=q.device)
    lses = torch.empty((splits, *rows.shape[:3]), dtype=torch.float32, device=q.device)
    launch_decode(rows, *grouped, parts, lses, Tq, left, scale, config)
    N = lse.numel()
    launch_merge_fwd(parts.view(splits, N, D), lses.view(splits, N), out.view(N, D), lse.view(N))
    return out, lse


def launch_decode(
    rows: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    parts: Tensor,
    lses: Tensor,
    Tq: int,
    left: int,
    scale: float,
    config: LaunchConfig,
) -> None:
    """Write the attention of every split; there is at least one row.

    Args:
        rows: [B, Hkv, R, D]; row r is query r % Tq of query head r // Tq of the group.
        k_cache: [B, Hkv, Tmax, D], as rows with any strides but the last, which is 1.
        v_cache: [B, Hkv, Tmax, D].
        cache_seqlens: int32 [B], or None.
        parts: [splits, B, Hkv, R, D], contiguous, in any dtype that a kernel takes.
        lses: [splits, B, Hkv, R], contiguous, fp32.
        Tq: Queries a head.
        left: Keys to the left of a query's own position that it sees; -1 for all.
        scale: Softmax scale.
        config: From ``decode_config``.
    """
    from .decode_kernels import flash_attention_decode_kernel

    B, Hkv, R, D = rows.shape
    Tmax, splits = k_cache.shape[2], parts.shape[0]
    if cache_seqlens is not None:
        cache_seqlens = cache_seqlens.contiguous()
    tensors = (rows, k_cache, v_cache)
    with device_of(rows):
        flash_attention_decode_kernel[(splits * cdiv(R, config.BLOCK_M), Hkv, B)](
            *(rows, k_cache, v_cache, cache_seqlens, parts, lses),
            *(x.stride(i) for x in tensors for i in range(3)),
            *(R, Tq, Tmax, Tmax if left < 0 else min(left, Tmax), splits, scale * LOG2E),
            ALIGN=alignment(*tensors, parts),
            D=D,
            BLOCK_D=block_d(D),
            **dataclasses.asdict(config),
        )


def _multiprocessors(x: Tensor) -> int:
    if not x.is_cuda:
        return INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


# ---- registration --------------------------------------------------------------------------


@torch.library.custom_op("course_lib::flash_attention_decode", mutates_args=())
def _flash_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    window_left: int,
    scale: float,
    splits: int | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    if cache_seqlens is not None:
        _check_lengths(cache_seqlens, k_cache.shape[2])
    use_triton = runs_triton(q, implementation, (q.shape[0], k_cache.shape[1]))
    if q.numel() == 0:
        return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=statistics_dtype(q))
    run = _triton_decode if use_triton else _torch_decode
    return run(q, k_cache, v_cache, cache_seqlens, window_left, scale, splits)


@_flash_attention_decode.register_fake
def _(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    window_left: int,
    scale: float,
    splits: int | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(q.shape[:3], dtype=statistics_dtype(q), device=q.device)
