"""What attention is compared with: ours, PyTorch's backends by name, flex_attention, the formula.

Each has a function that prepares it for a case: what to call, in which layout, with masks and
cumulative lengths made beforehand. One that cannot take the case raises ``Refused``, here or when
it is called, and the reason goes into the results.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.attention_cases import BATCH, FULL_BATCH, ONE_ROW, PACKED, BenchCase, Layout
from course_lib.flash_attention import (
    flash_attention,
    flash_attention_decode,
    flash_attention_varlen,
    reference_attention,
)
from course_lib.flash_attention.dispatch import Implementation

__all__ = [
    "OURS",
    "OURS_PADDED",
    "Prepared",
    "Refused",
    "flex_attention_peer",
    "peers",
    "reason_of",
]

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

#: Our names begin with this.
OURS = "ours_"
#: Our dense kernel on a packed batch, padded: what the packed kernel's speed is held against.
OURS_PADDED = "ours_padded"

SDPA_BACKENDS = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
# What makes the whole score matrix needs about so many bytes a score, gradients included, and may
# have so much of the memory.
BYTES_A_SCORE = 32
SHARE_OF_MEMORY = 4
CPU_BYTES = 1 << 30
LONGEST_REASON = 240


class Refused(RuntimeError):
    """An implementation cannot take a case. The message says why, in one line."""


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An implementation, ready to be called."""

    run: Attention
    layout: Layout
    #: What it computes, where that is not what the case asks for.
    case: BenchCase | None = None
    #: The directions in which its results are the case's. A padded batch without a mask is only
    #: good for its time.
    comparable: tuple[str, ...] = ("forward", "backward")
    #: What a reader should know, such as that a mask had to be made.
    note: str = ""


def peers(case: BenchCase, device: torch.device) -> dict[str, Callable[[], Prepared]]:
    """How to prepare each implementation for a case, ours first."""
    implementation: Implementation = "triton" if device.type == "cuda" else "torch"
    found: dict[str, Callable[[], Prepared]]
    found = {f"{OURS}{implementation}": functools.partial(_ours, case, device, implementation)}
    if case.kind == "varlen":
        found[OURS_PADDED] = functools.partial(_ours_padded, case, implementation)
    for name, backend in SDPA_BACKENDS.items():
        found[name] = functools.partial(_sdpa, case, device, backend)
    found["varlen_attn"] = functools.partial(_varlen_attn, case, device)
    flex = functools.partial(flex_attention_peer, case, device)
    found["flex"] = flex if device.type == "cuda" else _only_on_a_gpu
    found["plain"] = functools.partial(_plain, case, device)
    return found


def reason_of(error: BaseException, heard: list[warnings.WarningMessage]) -> str:
    """Why an implementation refused, in one line: its error, and what it warned of before."""
    lines = [str(error).strip().split("\n")[0] or "no message"]
    for warning in heard:
        text = str(warning.message).split("(Triggered internally")[0].strip().split("\n")[0]
        # SDPA says of every backend why it is out; of those that we turned off, just that.
        if text and not text.endswith(("not used because:", "runtime disabled.")):
            lines.append(text)
    # A machine's folders are nobody's business.
    text = re.sub(r"(/[\w.+-]+)+/(?=[\w.+-])", "", "; ".join(dict.fromkeys(lines)))
    name = "" if isinstance(error, Refused) else f"{type(error).__name__}: "
    text = f"{name}{text}"
    return text if len(text) <= LONGEST_REASON else f"{text[:LONGEST_REASON]} …"


# ---- ours ----------------------------------------------------------------------------------


def _ours(case: BenchCase, device: torch.device, implementation: Implementation) -> Prepared:
    if case.kind == "dense":
        return Prepared(_dense(case, implementation), BATCH)
    if case.kind == "varlen":
        cu_seqlens = _cumulative(case.q_lengths, device)
        return Prepared(
            lambda q, k, v: flash_attention_varlen(
                *(q, k, v, cu_seqlens),
                causal=case.causal,
                window_size=case.window_size,
                implementation=implementation,
            ),
            PACKED,
        )
    cache_seqlens = None if case.uniform else _lengths(case.k_lengths, device)
    return Prepared(
        lambda q, k, v: flash_attention_decode(
            q, k, v, cache_seqlens, implementation=implementation
        ),
        BATCH,
    )


def _ours_padded(case: BenchCase, implementation: Implementation) -> Prepared:
    # Causal rows see nothing of the padding after them, others do; and every gradient is of the
    # whole batch.
    return Prepared(
        _dense(case, implementation),
        FULL_BATCH,
        case=case.padded(),
        comparable=("forward",) if case.causal else (),
        note="dense kernel on the padded batch",
    )


def _dense(case: BenchCase, implementation: Implementation) -> Attention:
    return lambda q, k, v: flash_attention(
        *(q, k, v),
        causal=case.causal,
        window_size=case.window_size,
        implementation=implementation,
    )


# ---- PyTorch -------------------------------------------------------------------------------


def _sdpa(case: BenchCase, device: torch.device, backend: SDPBackend) -> Prepared:
    if backend == SDPBackend.MATH:
        _check_score_matrix(case, device)
    mask = _mask(case, device) if _needs_mask(case) else None
    sdpa = functools.partial(
        F.scaled_dot_product_attention,
        attn_mask=mask,
        is_causal=case.causal and mask is None,
        enable_gqa=case.Hq != case.Hkv,
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel([backend]):
            return sdpa(q, k, v)

    notes = ["on the padded batch"] if not case.uniform else []
    notes += ["with a mask in memory"] if mask is not None else []
    return Prepared(run, BATCH, note=", ".join(notes))


def _varlen_attn(case: BenchCase, device: torch.device) -> Prepared:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        raise Refused(f"torch {torch.__version__} has no varlen_attn ({error})") from None

    # The signature has changed with every release since 2.10.
    known = inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {}
    if "window_size" in known:
        options["window_size"] = tuple(case.band)
    elif case.band.is_window:
        raise Refused(f"varlen_attn of torch {torch.__version__} knows no window")
    else:
        options["is_causal"] = case.causal
    if "enable_gqa" in known:
        options["enable_gqa"] = case.Hq != case.Hkv
    cu_q, cu_k = (_cumulative(lengths, device) for lengths in (case.q_lengths, case.k_lengths))
    max_q, max_k = max(case.q_lengths), max(case.k_lengths)
    call: Callable[..., Any] = varlen_attn
    return Prepared(lambda q, k, v: call(q, k, v, cu_q, cu_k, max_q, max_k, **options), PACKED)


def _only_on_a_gpu() -> Prepared:
    raise Refused("compiled, and measured, on a GPU only")


def flex_attention_peer(case: BenchCase, device: torch.device) -> Prepared:
    """flex_attention with a block mask: compiled on a GPU, and on CPU as it is, for tests."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attention: Callable[..., Any] = flex_attention
    make_mask: Callable[..., Any] = create_block_mask
    if device.type == "cuda":
        import torch._functorch.config

        # Compiled code is kept by function, eight versions at most; past that the uncompiled one
        # would run, which is another algorithm. So a case starts anew, and a fallback is an error.
        torch._dynamo.reset()
        # Otherwise the compiled backward may overwrite what it was given, and runs only once.
        torch._functorch.config.donated_buffer = False
        attention = torch.compile(flex_attention, dynamic=False, fullgraph=True)
        # Compiled as well, or it would write the mask of every element first.
        make_mask = torch.compile(create_block_mask)

    if case.kind == "varlen":
        layout, Tq, Tk = ONE_ROW, sum(case.q_lengths), sum(case.k_lengths)
    else:
        layout, Tq, Tk = BATCH, max(case.q_lengths), max(case.k_lengths)
    # One mask for all sequences where they are alike, or are one row.
    B = None if case.uniform or case.kind == "varlen" else len(case.q_lengths)
    visible = _flex_mask(case, device)
    block_mask = None
    if visible is not None:
        block_mask = make_mask(visible, B, None, Tq, Tk, device=str(device))
    run = functools.partial(attention, block_mask=block_mask, enable_gqa=case.Hq != case.Hkv)
    return Prepared(run, layout)


def _flex_mask(case: BenchCase, device: torch.device) -> Callable[..., Tensor] | None:
    """Which query sees which key, as flex_attention asks for it; None where all see all."""
    longest = max(*case.q_lengths, *case.k_lengths)
    left, right = case.band.clipped(longest)
    bounded = left < longest or right < longest

    if case.kind == "varlen":
        # Which sequence a token belongs to, and where it stands in it; queries and keys alike.
        document = torch.repeat_interleave(
            torch.arange(len(case.q_lengths), device=device), _lengths(case.q_lengths, device)
        )

        def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            same = document[i] == document[j]
            return same & (j - i >= -left) & (j - i <= right) if bounded else same

        return visible
    if not case.uniform:
        if bounded or max(case.q_lengths) > 1:
            raise Refused("no mask for a padded batch whose queries see a part of their keys")
        lengths = _lengths(case.k_lengths, device)
        return lambda b, h, i, j: j < lengths[b]
    if not bounded:
        return None
    shift = case.k_lengths[0] - case.q_lengths[0]
    return lambda b, h, i, j: (j - i - shift >= -left) & (j - i - shift <= right)


def _plain(case: BenchCase, device: torch.device) -> Prepared:
    _check_score_matrix(case, device)
    if _needs_mask(case) and not case.uniform:
        raise Refused("the formula knows no lengths of single sequences")
    return Prepared(
        functools.partial(reference_attention, causal=case.causal, window_size=case.window_size),
        BATCH,
        note="" if case.uniform else "on the padded batch",
    )


# ---- lengths and masks ---------------------------------------------------------------------


def _lengths(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return _lengths((0, *accumulate(lengths)), device)


def _needs_mask(case: BenchCase) -> bool:
    """Whether SDPA needs a tensor to say what the case means, on a padded batch."""
    if case.band.is_window:
        return True
    if case.causal:
        # SDPA's is_causal is aligned at the top left: only where Tq = Tk is that the same. There,
        # no row sees the padding behind it.
        return case.q_lengths != case.k_lengths
    return not case.uniform


def _mask(case: BenchCase, device: torch.device) -> Tensor:
    """[B or 1, 1, Tq, Tk] booleans: which query sees which key, also past the ends."""
    pairs = list(zip(case.q_lengths, case.k_lengths, strict=True))
    Tq, Tk = max(case.q_lengths), max(case.k_lengths)
    if case.uniform:
        return case.band.visible(Tq, Tk, device=device)[None, None]
    if len(pairs) * Tq * Tk > _memory_for_scores(device):
        raise Refused(f"left out: a mask of {len(pairs)} x {Tq} x {Tk} is too large")
    mask = torch.zeros(len(pairs), 1, Tq, Tk, dtype=torch.bool, device=device)
    for b, (q_length, k_length) in enumerate(pairs):
        mask[b, 0, :q_length, :k_length] = case.band.visible(q_length, k_length, device=device)
        # Rows past the end see one key, since a row without keys is NaN in some backends.
        mask[b, 0, q_length:, 0] = True
    return mask


def _memory_for_scores(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BYTES
    return torch.cuda.get_device_properties(device).total_memory // SHARE_OF_MEMORY


def _check_score_matrix(case: BenchCase, device: torch.device) -> None:
    scores = len(case.q_lengths) * case.Hq * max(case.q_lengths) * max(case.k_lengths)
    if scores * BYTES_A_SCORE > _memory_for_scores(device):
        raise Refused(f"left out: a score matrix of {scores} elements is too large")
