"""Inputs for attention, declared once: tests, checks and benchmarks read this list.

Lengths differ pairwise and are not powers of two, so that an axis taken for another, or a tail
left out, cannot go unnoticed.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

__all__ = ["CASES", "Case", "Inputs", "cases", "make_inputs"]

Size = Literal["tiny", "small", "large"]
Values = Literal["normal", "late_max", "early_max", "heavy_tailed"]
Layout = Literal["contiguous", "bthd", "offset", "expanded"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One input. Extents as everywhere in the chapter; see ``kernels.py`` for the legend."""

    name: str
    size: Size
    B: int
    Hq: int
    Hkv: int
    Tq: int
    Tk: int
    D: int
    causal: bool = False
    scale: float | None = None
    #: "normal"; "late_max" and "early_max": the largest scores come with the last or the first
    #: keys, so that the running maximum is repaired in every block, or in none; "heavy_tailed":
    #: scores up to some hundreds, of both signs.
    values: Values = "normal"
    #: "contiguous"; "bthd": a transposed view of [B, T, H, D], as a projection leaves it; "offset":
    #: cut from a larger tensor at an odd offset, so that no address is aligned; "expanded": one kv
    #: head broadcast with stride 0.
    layout: Layout = "contiguous"

    def flops(self) -> int:
        """FLOPs of the forward, 4 D for every visible pair of query and key."""
        visible = self.Tq * self.Tk
        if self.causal:
            shift = self.Tk - self.Tq
            visible = sum(min(max(i + 1 + shift, 0), self.Tk) for i in range(self.Tq))
        return 4 * self.B * self.Hq * visible * self.D


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of a case, with upstream gradients for both outputs."""

    q: Tensor  #: [B, Hq, Tq, D]
    k: Tensor  #: [B, Hkv, Tk, D]
    v: Tensor  #: [B, Hkv, Tk, D]
    dout: Tensor  #: [B, Hq, Tq, D]
    dlse: Tensor  #: [B, Hq, Tq], fp32 or fp64


# Interpreted tiles are 64 queries by 32 keys forward and 32 by 64 backward (launches.py), so 64 and
# 65, 31 and 33 are a block, and one more or less.
CASES = (
    Case("plain", "tiny", 1, 2, 2, 67, 45, 16),
    Case("causal", "tiny", 1, 2, 2, 70, 70, 16, causal=True),
    Case("causal_more_keys", "tiny", 2, 2, 1, 37, 101, 16, causal=True),
    Case("causal_more_queries", "tiny", 1, 2, 1, 99, 41, 16, causal=True),
    Case("grouped", "tiny", 1, 6, 2, 33, 47, 24),
    Case("grouped_causal", "tiny", 2, 4, 1, 65, 65, 32, causal=True),
    Case("padded_72", "tiny", 1, 1, 1, 35, 66, 72),
    Case("padded_80", "tiny", 1, 1, 1, 66, 34, 80, causal=True),
    Case("wide_256", "tiny", 1, 1, 1, 21, 40, 256),
    Case("block", "tiny", 1, 1, 1, 64, 64, 16, causal=True),
    Case("block_less_one", "tiny", 1, 1, 1, 63, 31, 16, causal=True),
    Case("block_plus_one", "tiny", 1, 1, 1, 65, 33, 16, causal=True),
    Case("one_query", "tiny", 2, 2, 1, 1, 77, 16, causal=True),
    Case("one_key", "tiny", 1, 2, 1, 5, 1, 16),
    Case("one_by_one", "tiny", 1, 1, 1, 1, 1, 16, causal=True),
    Case("no_keys", "tiny", 1, 2, 1, 5, 0, 16),
    Case("no_queries", "tiny", 1, 2, 1, 0, 5, 16, causal=True),
    Case("no_batch", "tiny", 0, 2, 1, 4, 5, 16),
    Case("late_max", "tiny", 1, 1, 1, 34, 131, 16, values="late_max"),
    Case("early_max", "tiny", 1, 1, 1, 34, 131, 16, values="early_max"),
    Case("heavy_tailed", "tiny", 1, 2, 1, 67, 99, 16, causal=True, values="heavy_tailed"),
    Case("scaled", "tiny", 1, 1, 1, 40, 35, 16, scale=0.7),
    Case("bthd", "tiny", 2, 2, 2, 43, 38, 16, causal=True, layout="bthd"),
    Case("offset", "tiny", 1, 2, 2, 39, 42, 24, layout="offset"),
    Case("expanded", "tiny", 2, 2, 2, 36, 35, 16, layout="expanded"),
    Case("plain_small", "small", 2, 3, 3, 201, 167, 64),
    Case("causal_small", "small", 1, 4, 2, 259, 259, 64, causal=True),
    Case("causal_small_128", "small", 1, 2, 1, 131, 213, 128, causal=True),
    Case("plain_large", "large", 2, 8, 8, 2047, 1793, 128),
    Case("causal_large", "large", 2, 8, 8, 2049, 2049, 128, causal=True),
    Case("causal_more_keys_large", "large", 1, 8, 2, 777, 2345, 128, causal=True),
    Case("causal_more_queries_large", "large", 1, 8, 2, 2345, 777, 64, causal=True),
    Case("grouped_large", "large", 2, 16, 2, 1025, 1025, 64, causal=True),
    Case("padded_72_large", "large", 1, 4, 4, 1111, 999, 72),
    Case("padded_80_large", "large", 1, 4, 2, 1111, 1111, 80, causal=True),
    Case("narrow_16_large", "large", 1, 4, 4, 1000, 1201, 16, causal=True),
    Case("narrow_32_large", "large", 1, 4, 4, 1000, 1201, 32),
    Case("wide_256_large", "large", 1, 2, 1, 1023, 1025, 256, causal=True),
    Case("block_large", "large", 1, 2, 2, 512, 512, 128, causal=True),
    Case("one_query_large", "large", 4, 8, 2, 1, 4097, 128, causal=True),
    Case("late_max_large", "large", 1, 2, 2, 500, 3001, 64, values="late_max"),
    Case("heavy_tailed_large", "large", 1, 2, 2, 900, 901, 64, causal=True, values="heavy_tailed"),
    Case("bthd_large", "large", 2, 4, 4, 1001, 1003, 128, causal=True, layout="bthd"),
    Case("offset_large", "large", 1, 2, 2, 701, 703, 72, causal=True, layout="offset"),
)


def cases(size: Size) -> list[Case]:
    """Every case of one size."""
    return [case for case in CASES if case.size == size]


def make_inputs(
    case: Case,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw the tensors of a case.

    The numbers are drawn on the CPU in fp64 and rounded once, so that a case is the same on every
    device, and the same up to rounding in every dtype.

    Args:
        case: What to draw.
        dtype: Of q, k, v and dout. dlse is fp64 for fp64 and fp32 otherwise.
        device: Where to put them.
        seed: Of the generator.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q = normal(case.B, case.Hq, case.Tq, case.D)
    k = normal(case.B, case.Hkv, case.Tk, case.D)
    v = normal(case.B, case.Hkv, case.Tk, case.D)
    dout = normal(case.B, case.Hq, case.Tq, case.D)
    dlse = normal(case.B, case.Hq, case.Tq)

    if case.values in ("late_max", "early_max") and case.Tk:
        # Every query has a part along one direction, and keys climb (or fall) along it.
        ramp = torch.linspace(0.0, 12.0, case.Tk, dtype=torch.float64)
        ramp = ramp if case.values == "late_max" else ramp.flip(0)
        q[..., 0] = math.sqrt(case.D)
        k[..., 0] = ramp
    elif case.values == "heavy_tailed":
        # Cauchy-like tails, clipped so that a product still fits into fp16.
        k = (k / normal(case.B, case.Hkv, case.Tk, 1).abs().clamp_min(0.02)).clamp(-50, 50)

    q, k, v, dout = (_lay_out(x.to(dtype).to(device), case.layout) for x in (q, k, v, dout))
    if case.layout == "expanded":
        k, v = (x[:, :1].expand(-1, case.Hkv, -1, -1) for x in (k, v))
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return Inputs(q, k, v, dout, dlse.to(statistics).to(device))


def _lay_out(x: Tensor, layout: Layout) -> Tensor:
    if layout == "bthd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        B, H, T, D = x.shape
        parent = torch.full((B, H + 1, T + 3, D + 5), math.nan, dtype=x.dtype, device=x.device)
        view = parent[:, 1:, 2 : T + 2, 3 : D + 3]
        view.copy_(x)
        return view
    return x
