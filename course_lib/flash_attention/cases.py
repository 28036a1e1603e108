"""Inputs for attention, declared once: tests, checks and benchmarks read this list.

Lengths differ pairwise and are not powers of two, so that an axis taken for another, or a tail
left out, cannot go unnoticed.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal

import torch
from torch import Tensor

from .band import Band

__all__ = [
    "CASES",
    "PACKED_CASES",
    "Case",
    "Inputs",
    "PackedCase",
    "cases",
    "make_inputs",
    "make_packed_inputs",
    "packed_cases",
]

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
    #: Keys to the left and right of the diagonal that a query sees; -1 is no bound.
    window_size: tuple[int, int] = (-1, -1)

    def flops(self) -> int:
        """FLOPs of the forward, 4 D for every visible pair of query and key."""
        pairs = Band.of(self.causal, self.window_size).pairs(self.Tq, self.Tk)
        return 4 * self.B * self.Hq * pairs * self.D


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Tensors of a case, with upstream gradients for both outputs."""

    q: Tensor  #: [B, Hq, Tq, D]; of a packed case [total_q, Hq, D], and the others likewise
    k: Tensor  #: [B, Hkv, Tk, D]
    v: Tensor  #: [B, Hkv, Tk, D]
    dout: Tensor  #: [B, Hq, Tq, D]
    dlse: Tensor  #: [B, Hq, Tq], fp32 or fp64


@dataclasses.dataclass(frozen=True)
class PackedCase:
    """One packed batch: sequences of these lengths, one after another."""

    name: str
    size: Size
    lengths_q: tuple[int, ...]
    Hq: int
    Hkv: int
    D: int
    #: Lengths of the keys; None where they are those of the queries.
    lengths_k: tuple[int, ...] | None = None
    causal: bool = False
    scale: float | None = None
    values: Values = "normal"
    window_size: tuple[int, int] = (-1, -1)

    def lengths(self) -> list[tuple[int, int]]:
        """(Tq, Tk) of every sequence."""
        return list(zip(self.lengths_q, self.lengths_k or self.lengths_q, strict=True))

    def cu_seqlens(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """cu_seqlens_q and cu_seqlens_k, int32 [sequences + 1]."""
        q, k = (
            torch.tensor((0, *itertools.accumulate(lengths)), dtype=torch.int32, device=device)
            for lengths in (self.lengths_q, self.lengths_k or self.lengths_q)
        )
        return q, k

    def flops(self) -> int:
        """FLOPs of the forward, 4 D for every visible pair of query and key."""
        band = Band.of(self.causal, self.window_size)
        return 4 * self.Hq * self.D * sum(band.pairs(*pair) for pair in self.lengths())


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
    Case("window", "tiny", 1, 2, 1, 135, 135, 16, window_size=(20, 9)),
    Case("window_causal", "tiny", 1, 2, 1, 150, 150, 16, causal=True, window_size=(70, -1)),
    Case("window_wide", "tiny", 1, 1, 1, 160, 170, 16, window_size=(90, 75)),
    Case("window_more_keys", "tiny", 1, 2, 1, 37, 141, 24, causal=True, window_size=(50, 0)),
    Case("window_more_queries", "tiny", 1, 1, 1, 141, 37, 16, window_size=(11, 4)),
    Case("window_left_only", "tiny", 1, 1, 1, 99, 105, 16, window_size=(40, -1)),
    Case("window_right_only", "tiny", 1, 1, 1, 99, 105, 16, window_size=(-1, 3)),
    Case("window_of_one", "tiny", 1, 2, 1, 67, 67, 16, causal=True, window_size=(0, 0)),
    Case("window_late_max", "tiny", 1, 1, 1, 70, 131, 16, window_size=(64, 0), values="late_max"),
    Case("plain_small", "small", 2, 3, 3, 201, 167, 64),
    Case("causal_small", "small", 1, 4, 2, 259, 259, 64, causal=True),
    Case("causal_small_128", "small", 1, 2, 1, 131, 213, 128, causal=True),
    Case("window_small", "small", 1, 4, 2, 259, 300, 64, causal=True, window_size=(100, -1)),
    Case("plain_large", "large", 2, 8, 8, 2047, 1793, 128),
    Case("causal_large", "large", 2, 8, 8, 2049, 2049, 128, causal=True),
    Case("causal_more_keys_large", "large", 1, 8, 2, 777, 2345, 128, causal=True),
    Case("causal_more_queries_large", "large", 1, 8, 2, 2345, 777, 64, causal=True),
    Case("grouped_large", "large", 2, 16, 2, 1025, 1025, 64, causal=True),
    Case("padded_72_large", "large", 1, 4, 4, 1111, 999, 72),
    Case("padded_80_large", "large", 1, 4, 2, 1111, 1111, 80, causal=True),
    Case("window_large", "large", 1, 8, 2, 3001, 3001, 128, causal=True, window_size=(1023, -1)),
    Case("window_more_keys_large", "large", 1, 8, 2, 777, 2345, 64, window_size=(300, 70)),
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


PACKED_CASES = (
    PackedCase("packed", "tiny", (37, 5, 70), 2, 2, 16),
    PackedCase("packed_causal", "tiny", (70, 33, 1, 66), 2, 1, 16, causal=True),
    PackedCase("packed_empty", "tiny", (0, 40, 0, 0, 35, 0), 2, 1, 16, causal=True),
    PackedCase("packed_one", "tiny", (67,), 1, 1, 24, causal=True),
    PackedCase("packed_all_empty", "tiny", (0, 0), 2, 1, 16),
    PackedCase("packed_blocks", "tiny", (64, 63, 65, 32, 31), 1, 1, 16, causal=True),
    PackedCase("packed_many_short", "tiny", tuple(range(1, 14)), 2, 2, 16, causal=True),
    PackedCase("packed_grouped", "tiny", (33, 47, 20), 6, 2, 24),
    PackedCase("packed_more_keys", "tiny", (9, 40, 3), 2, 1, 16, (50, 41, 70), causal=True),
    PackedCase("packed_more_queries", "tiny", (50, 41), 2, 1, 16, (9, 40), causal=True),
    PackedCase("packed_no_keys", "tiny", (12, 30, 9), 2, 1, 16, (20, 0, 15), causal=True),
    PackedCase("packed_no_queries", "tiny", (12, 0, 9), 2, 1, 16, (20, 33, 15)),
    PackedCase("packed_window", "tiny", (90, 71), 2, 1, 16, causal=True, window_size=(20, -1)),
    PackedCase("packed_late_max", "tiny", (70, 64), 1, 1, 16, values="late_max", scale=0.4),
    PackedCase("packed_80", "tiny", (35, 66), 1, 1, 80, causal=True),
    PackedCase("packed_small", "small", (131, 7, 260, 64), 4, 2, 64, causal=True),
    PackedCase("packed_large", "large", (1, 2047, 333, 0, 4096, 65, 128), 16, 4, 128, causal=True),
    PackedCase("packed_full_large", "large", (999, 1024, 1111), 8, 8, 64),
    PackedCase("packed_more_keys_large", "large", (7, 1300), 8, 2, 128, (2345, 1301), causal=True),
    PackedCase("packed_many_large", "large", tuple(range(1, 300, 3)), 4, 4, 72, causal=True),
    PackedCase("packed_window_large", "large", (3001, 500), 8, 2, 128, window_size=(511, 0)),
)


def cases(size: Size) -> list[Case]:
    """Every case of one size."""
    return [case for case in CASES if case.size == size]


def packed_cases(size: Size) -> list[PackedCase]:
    """Every packed case of one size."""
    return [case for case in PACKED_CASES if case.size == size]


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


def make_packed_inputs(
    case: PackedCase,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Draw the tensors of a packed case: [total, H, D], as ``make_inputs`` draws one sequence."""
    total_q, total_k = sum(case.lengths_q), sum(case.lengths_k or case.lengths_q)
    one = Case(case.name, case.size, 1, case.Hq, case.Hkv, total_q, total_k, case.D)
    one = dataclasses.replace(one, values=case.values)
    drawn = make_inputs(one, dtype, device=device, seed=seed)
    packed = (
        x[0].transpose(0, 1).contiguous()
        for x in (drawn.q, drawn.k, drawn.v, drawn.dout, drawn.dlse)
    )
    return Inputs(*packed)


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
