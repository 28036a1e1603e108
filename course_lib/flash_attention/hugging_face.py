"""Models of the transformers library, run on this chapter's attention.

    name = register_attention()
    model.set_attn_implementation(name)    # and back: model.set_attn_implementation("sdpa")

transformers lets a library replace two functions:

    the attention function   is called by every layer with q, k, v, and a mask;
    the mask function        makes that mask, once a forward pass.

Replace the first alone, and causality is lost without a word: where no mask function is known by
the name, the mask is None. So both are replaced here. Ours makes no [Tq, Tk] table but a
``Pattern``, which says which queries meet which keys (``hugging_face_masks.py``).

Nothing that would change the result is ever ignored. What this attention cannot do raises an error.

Needs ``pip install 'course_lib[wild]'``: transformers is imported by ``register_attention``.
"""

# torch.compiler.disable hides the arguments of what it decorates.
# pyright: reportCallIssue=false

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import Tensor

from . import hugging_face_masks as masks
from .band import EVERYTHING
from .dispatch import Implementation, check_implementation
from .hugging_face_masks import CAUSAL, Pattern
from .ops import flash_attention, flash_attention_varlen

__all__ = ["register_attention"]

# What the layers of some models ask for, and this attention does not do.
REFUSED = (
    *("softcap", "s_aux", "sinks", "position_bias", "head_mask", "output_attentions"),
    *("indices", "block_indices", "cache", "block_table", "k_cache", "v_cache"),
)
NOT_PASSED: Any = object()


def register_attention(
    name: str = "course_attention", *, implementation: Implementation = "auto"
) -> str:
    """Make ``flash_attention`` known to transformers under a name.

    Exact for causal and bidirectional attention, grouped heads, sliding windows, dynamic caches,
    padding on the left or right (hidden tokens get zeros), and samples packed into one row, with
    ``cu_seq_lens_q`` and ``cu_seq_lens_k`` or with ``position_ids`` that start anew.

    Args:
        name: What to pass to ``set_attn_implementation`` or as ``attn_implementation``. If it
            contains "flash", vision towers hand over all images in one call, else one by one. Such
            a name must be set as a dict, ``{"text_config": name, "vision_config": name}``; as a
            plain string, transformers would look for it on the hub.
        implementation: As in ``flash_attention``.

    Returns:
        The name.

    Raises:
        ImportError: transformers is not installed.
        RuntimeError: This version of transformers calls attention or makes masks in a way that is
            not known here.
        ValueError: The name is taken, or the implementation does not exist.

    A model raises when it runs:
        NotImplementedError: Something was asked for that would change the result and that this
            attention does not do: dropout, a softcap, sinks, attention weights as output, a mask
            of one's own, a static cache.
        ValueError: It cannot be seen which tokens belong together.
    """
    check_implementation(implementation)
    try:
        import transformers
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"register_attention needs transformers, which cannot be imported here ({error}): "
            "pip install 'course_lib[wild]'"
        ) from error
    try:
        check_signatures()
        masks.check_masks()
    except Exception as error:
        raise RuntimeError(
            f"transformers {transformers.__version__} works in a way that course_lib does not "
            f"know: {error}. It knows versions 5.4 to 5.23"
        ) from error
    taken = AttentionInterface().get(name) or AttentionMaskInterface().get(name)
    if taken and getattr(taken, "func", None) is not attention:
        raise ValueError(f"name must be free, and transformers knows {name!r} already")
    AttentionInterface.register(name, functools.partial(attention, implementation=implementation))
    AttentionMaskInterface.register(name, masks.flash_mask)
    return name


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Pattern | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = NOT_PASSED,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    *,
    implementation: Implementation,
    **others: Any,
) -> tuple[Tensor, None]:
    """What every layer calls: q [B, Hq, Tq, D], k and v [B, Hkv, Tk, D], to [B, Tq, Hq, D].

    The names are those of transformers, which expects attention weights beside the output; there
    are none.
    """
    asked = [n for n in REFUSED if others.get(n) is not None and others[n] is not False]
    if dropout > 0.0:
        asked.append(f"dropout={dropout}")
    if cu_seq_lens_q is None and cu_seq_lens_k is not None:
        asked.append("cu_seq_lens_k without cu_seq_lens_q")
    if asked:
        raise NotImplementedError(f"this attention does not do {', '.join(asked)}")
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)

    pattern: Any = attention_mask
    shape = (query.shape[0], query.shape[2], key.shape[2])
    if pattern is None:  # the model asks for no mask, as vision towers do
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if causal and cu_seq_lens_q is None:
            raise ValueError(
                f"attention_mask is None in a causal {type(module).__name__}: this model does not "
                "make its masks with transformers.masking_utils, so padding cannot be seen here"
            )
        pattern = Pattern.dense(CAUSAL if causal else EVERYTHING, shape)
    check_pattern(pattern, shape, sliding_window)
    options: dict[str, Any] = {
        "window_size": tuple(pattern.band),
        "scale": scaling,
        "implementation": implementation,
    }

    if cu_seq_lens_q is not None:
        cu_k = cu_seq_lens_q if cu_seq_lens_k is None else cu_seq_lens_k
        if not (pattern.is_dense or pattern.packed):
            raise NotImplementedError("cu_seq_lens_q cannot be combined with padding")
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, H, D]
        lengths = cu_seq_lens_q.to(torch.int32), cu_k.to(torch.int32)
        out = flash_attention_varlen(q, k, v, *lengths, **options)
        return out.unflatten(0, shape[:2]), None
    # Packed samples show in the positions, but the mask function saw those in some calls only.
    if position_ids is not NOT_PASSED and not pattern.packed and query.shape[2] > 1:
        check_positions(pattern, position_ids)
    if pattern.is_dense:
        return flash_attention(query, key, value, **options).transpose(1, 2), None
    return attention_in_blocks(query, key, value, pattern, options), None


@torch.compiler.disable
def attention_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, pattern: Pattern, options: dict[str, Any]
) -> Tensor:
    """Pick the blocks out, run them as sequences of different lengths, and put them back."""
    q_index, k_index, cu_q, cu_k = (x.to(query.device) for x in pattern.indices)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * T, H, D]
    out = flash_attention_varlen(q[q_index], k[k_index], v[k_index], cu_q, cu_k, **options)
    padded = out.new_zeros(q.shape).index_copy(0, q_index, out)
    return padded.unflatten(0, pattern.shape[:2])


# ---- what must not pass in silence ---------------------------------------------------------


def check_pattern(pattern: object, shape: tuple[int, int, int], sliding_window: int | None) -> None:
    """Raise unless our mask function made this, and for such a layer."""
    if not isinstance(pattern, Pattern):
        raise NotImplementedError(
            "this attention cannot apply a mask of one's own, got a "
            f"{type(pattern).__name__} of shape {tuple(getattr(pattern, 'shape', ()))}; it takes "
            "an attention_mask of shape (batch, tokens), or cu_seq_lens_q"
        )
    if pattern.shape != shape:
        raise ValueError(
            f"the mask was made for (batch, queries, keys) = {pattern.shape}, the layer has {shape}"
        )
    if sliding_window is not None and pattern.band.left != sliding_window - 1:
        raise ValueError(
            f"the layer has sliding_window={sliding_window}, but by its mask a query sees "
            f"{pattern.band.left} keys before its own (-1: all)"
        )


@torch.compiler.disable
def check_positions(pattern: Pattern, position_ids: Tensor | None) -> None:
    """Raise if positions start anew inside a block: it is several samples then.

    The mask function is not told positions if there is a cache (as by default) or a 2-D mask, and
    a model whose positions have several axes may tell nobody.
    """
    advice = (
        "pass cu_seq_lens_q and cu_seq_lens_k (int32, from 0), or give the text's position_ids "
        "with use_cache=False and without attention_mask"
    )
    rows, q_length, kv_length = pattern.shape
    if position_ids is None or position_ids.shape not in ((1, q_length), (rows, q_length)):
        if pattern.band.right != 0:  # many an encoder has no positions
            return
        raise ValueError(
            "position_ids of the text do not reach the layers, so it cannot be seen whether "
            f"samples share a row: {advice}. A model that counts positions in 3 axes takes "
            "torch.cat([text[None], position_ids]), (4, batch, tokens), with text counted from 0"
        )
    if position_ids is pattern.positions_in_order:  # as in the layer before
        return
    inside = torch.zeros(rows, q_length - 1, dtype=torch.bool)
    for row, first, count, key, keys in pattern.blocks:
        if q_length == kv_length:  # hidden tokens may have any positions
            first, count = max(first, key), min(count, keys)
        inside[row, first : first + max(count - 1, 0)] = True
    jumps = torch.diff(position_ids) != 1
    if bool((jumps & inside.to(jumps.device)).any()):
        raise ValueError(f"position_ids jump inside a row, as if it were several samples: {advice}")
    pattern.positions_in_order = position_ids


def check_signatures() -> None:
    """Raise TypeError unless transformers knows no arguments but those that are handled here.

    What is new, or has a new name, would arrive and be ignored, whatever it means.
    """
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import eager_mask, sdpa_mask
    from transformers.modeling_flash_attention_utils import FlashAttentionKwargs

    # The kernels need no maximum, and a pattern is made in one way only.
    lengths = {"max_length_q", "max_length_k"}
    tables = {"local_size", "allow_is_causal_skip", "allow_is_bidirectional_skip", "dtype"}
    for ours, also, *theirs in (
        (attention, {*REFUSED}, flash_attention_forward, sdpa_attention_forward),
        (masks.flash_mask, tables | {"allow_torch_fix", "use_vmap"}, eager_mask, sdpa_mask),
    ):
        known = {*inspect.signature(ours).parameters, *also, "kwargs"}
        for function in theirs:
            new = {*inspect.signature(function).parameters} - known
            if new:
                raise TypeError(f"{function.__name__} has new arguments {sorted(new)}")
    changed = {*FlashAttentionKwargs.__annotations__} ^ {"cu_seq_lens_q", "cu_seq_lens_k", *lengths}
    if changed:
        raise TypeError(f"FlashAttentionKwargs has changed in {sorted(changed)}")
