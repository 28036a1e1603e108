"""Inputs for decoding, and the judgement of an answer against the fp64 oracle."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from course_lib.flash_attention import reference_attention
from course_lib.flash_attention.decode import flash_attention_decode
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.numerics import assert_within_budget, budget


def run_if(implementation: str) -> contextlib.AbstractContextManager[object]:
    """The interpreter for the kernels, nothing for PyTorch."""
    return interpreted() if implementation == "triton" else contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class DecodeCase:
    """One input: the sequences of a batch have `lengths` valid keys; None is Tmax each."""

    name: str
    B: int
    Hq: int
    Hkv: int
    Tq: int
    Tmax: int
    D: int
    lengths: tuple[int, ...] | None = None
    left: int = -1
    splits: int | None = None
    scale: float | None = None
    #: As in ``cases.py``: where the largest scores are.
    values: Literal["normal", "late_max", "early_max", "heavy_tailed"] = "normal"
    #: "contiguous"; "bthd": views of [B, T, H, D]; "offset": no address is aligned; "poisoned":
    #: cut from larger tensors full of NaN.
    layout: Literal["contiguous", "bthd", "offset", "poisoned"] = "contiguous"

    @property
    def options(self) -> dict[str, object]:
        return {"window_size": (self.left, -1), "scale": self.scale, "return_lse": True}


# Interpreted tiles hold 32 keys and 16 rows, or 64 rows where there are more than 16 (launches).
CASES = (
    DecodeCase("plain", 2, 2, 2, 1, 70, 16),
    DecodeCase("lengths", 4, 2, 1, 1, 99, 16, lengths=(0, 1, 50, 99), splits=3),
    DecodeCase("group_of_4", 2, 8, 2, 1, 75, 24, lengths=(75, 33), splits=2),
    DecodeCase("group_of_7", 1, 7, 1, 1, 67, 16, splits=2),
    DecodeCase("group_of_7_by_5", 1, 14, 2, 5, 67, 16, splits=2),  # 35 rows: a tile of 64
    DecodeCase("two_blocks_of_rows", 1, 14, 1, 5, 40, 16, splits=2),  # 70 rows: 64 and 6
    DecodeCase("two_queries", 2, 4, 2, 2, 65, 16, lengths=(65, 1), splits=3),
    DecodeCase("three_queries", 3, 2, 1, 3, 41, 16, lengths=(2, 40, 3)),
    DecodeCase("four_queries", 1, 4, 1, 4, 33, 32, splits=2),  # 16 rows, a whole tile
    DecodeCase("five_queries", 2, 2, 2, 5, 66, 16, lengths=(66, 4), splits=4),
    DecodeCase("block", 1, 2, 2, 1, 32, 16, splits=2),
    DecodeCase("block_less_one", 1, 2, 2, 1, 31, 16),
    DecodeCase("block_plus_one", 1, 2, 2, 1, 33, 16, splits=2),
    DecodeCase("many_splits", 2, 2, 1, 2, 130, 16, lengths=(130, 20), splits=37),
    DecodeCase("more_splits_than_keys", 1, 2, 1, 1, 3, 16, splits=8),
    DecodeCase("window", 3, 4, 2, 1, 120, 16, lengths=(120, 41, 7), left=40, splits=3),
    DecodeCase("window_of_some_queries", 2, 2, 2, 4, 101, 16, lengths=(101, 35), left=33, splits=2),
    DecodeCase("window_of_one", 2, 2, 2, 3, 50, 16, lengths=(50, 2), left=0, splits=2),
    DecodeCase("window_wider_than_the_cache", 1, 2, 1, 2, 45, 16, left=1000, splits=2),
    DecodeCase("padded_72", 1, 2, 1, 2, 45, 72, splits=2),
    DecodeCase("padded_80", 2, 1, 1, 1, 70, 80, lengths=(64, 70), splits=2),
    DecodeCase("wide_128", 1, 4, 1, 1, 66, 128, splits=3),
    DecodeCase("wide_256", 1, 2, 1, 1, 66, 256, splits=2),
    DecodeCase("one_key", 2, 2, 1, 1, 1, 16, lengths=(1, 0)),
    DecodeCase("no_room", 1, 2, 1, 2, 0, 16, splits=2),
    DecodeCase("all_empty", 3, 2, 1, 1, 40, 16, lengths=(0, 0, 0), splits=2),
    DecodeCase("no_queries", 1, 2, 1, 0, 40, 16),
    DecodeCase("no_batch", 0, 2, 1, 1, 40, 16, lengths=()),
    DecodeCase("late_max", 1, 2, 1, 1, 131, 16, splits=4, values="late_max"),
    DecodeCase("early_max", 1, 2, 1, 2, 131, 16, splits=4, values="early_max"),
    DecodeCase("heavy_tailed", 2, 4, 2, 2, 99, 16, (99, 61), splits=3, values="heavy_tailed"),
    DecodeCase("scaled", 1, 2, 2, 1, 60, 16, scale=0.7),
    DecodeCase("bthd", 2, 6, 2, 3, 77, 16, lengths=(77, 50), splits=2, layout="bthd"),
    DecodeCase("offset", 1, 4, 2, 2, 60, 24, splits=2, layout="offset"),
    DecodeCase("poisoned", 2, 4, 2, 2, 60, 72, lengths=(60, 33), splits=2, layout="poisoned"),
)
LARGE = (
    DecodeCase("plain_large", 4, 32, 8, 1, 4097, 128),
    DecodeCase("lengths_large", 5, 16, 2, 1, 3001, 64, lengths=(0, 1, 517, 3000, 3001)),
    DecodeCase("one_long_sequence", 1, 8, 1, 1, 100_003, 128),
    DecodeCase("speculative_large", 3, 28, 4, 5, 2049, 128, lengths=(2049, 3, 777)),
    DecodeCase("chunk_of_a_prompt", 2, 16, 4, 133, 1500, 64, lengths=(1500, 140)),
    DecodeCase("window_large", 2, 16, 4, 3, 5000, 128, lengths=(5000, 4095), left=1023),
    DecodeCase("many_splits_large", 2, 4, 2, 1, 2000, 128, lengths=(2000, 100), splits=300),
    DecodeCase("narrow_16_large", 2, 4, 4, 1, 1999, 16),
    DecodeCase("narrow_32_large", 2, 8, 4, 2, 1999, 32),
    DecodeCase("padded_72_large", 2, 8, 2, 1, 1500, 72, lengths=(1500, 999)),
    DecodeCase("padded_80_large", 2, 8, 2, 4, 1500, 80, lengths=(1500, 999)),
    DecodeCase("wide_256_large", 2, 8, 2, 1, 1501, 256),
    DecodeCase("wide_256_rows_large", 2, 32, 1, 2, 1501, 256),
    DecodeCase("late_max_large", 1, 4, 1, 1, 9001, 64, values="late_max"),
    DecodeCase("heavy_tailed_large", 2, 8, 2, 2, 3001, 64, values="heavy_tailed"),
    DecodeCase("bthd_large", 2, 16, 4, 3, 1777, 128, lengths=(1777, 600), layout="bthd"),
    DecodeCase("offset_large", 2, 8, 2, 1, 1777, 72, lengths=(1777, 600), layout="offset"),
    DecodeCase("poisoned_large", 2, 8, 2, 1, 1777, 128, (1777, 600), layout="poisoned"),
)


class DecodeInputs(NamedTuple):
    q: Tensor
    k_cache: Tensor
    v_cache: Tensor
    cache_seqlens: Tensor | None


def make(
    case: DecodeCase, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0
) -> DecodeInputs:
    """Draw the tensors of a case. Keys and values that no query sees are NaN, in every case."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(case.B, heads, rows, case.D, generator=generator, dtype=torch.float64)
        for heads, rows in ((case.Hq, case.Tq), (case.Hkv, case.Tmax), (case.Hkv, case.Tmax))
    )
    if case.values in ("late_max", "early_max"):
        # Every query likes one direction, and keys have more and more of it, or less and less.
        q[..., 0] = 4.0
        ramp = torch.linspace(0.0, 8.0, max(case.Tmax, 1), dtype=torch.float64)[: case.Tmax]
        k[..., 0] += ramp if case.values == "late_max" else ramp.flip(0)
    elif case.values == "heavy_tailed":
        q = q * (1.5 * torch.randn(q.shape[:-1], generator=generator)).exp()[..., None]
        k = k * torch.randn(k.shape[:-1], generator=generator).exp()[..., None]
    for b, seen in enumerate(seen_keys(case)):
        for cache in (k, v):
            cache[b, :, : seen.start] = math.nan
            cache[b, :, seen.stop :] = math.nan
    q, k, v = (lay_out(x.to(dtype), case.layout, device) for x in (q, k, v))
    lengths = None
    if case.lengths is not None:
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device=device)
    return DecodeInputs(q, k, v, lengths)


def seen_keys(case: DecodeCase) -> list[slice]:
    """Which keys of each sequence at least one query sees."""
    lengths = [case.Tmax] * case.B if case.lengths is None else case.lengths
    if case.left < 0:
        return [slice(0, length) for length in lengths]
    return [slice(max(length - case.Tq - case.left, 0), length) for length in lengths]


def lay_out(x: Tensor, layout: str, device: str) -> Tensor:
    x = x.to(device)
    if layout == "bthd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        parent = torch.full((x.numel() + 3,), math.nan, dtype=x.dtype, device=device)
        return parent[3:].view(x.shape).copy_(x)
    if layout == "poisoned":
        parent = torch.full([n + 16 for n in x.shape], math.nan, dtype=x.dtype, device=device)
        return parent[tuple(slice(8, 8 + n) for n in x.shape)].copy_(x)
    return x


def definition(case: DecodeCase, x: DecodeInputs) -> tuple[Tensor, Tensor]:
    """Sequence by sequence, over its valid keys alone, from the reference of the chapter."""
    outs, lses = [], []
    for b, seen in enumerate(seen_keys(case)):
        out, lse = reference_attention(
            x.q[b : b + 1],
            x.k_cache[b : b + 1, :, seen],
            x.v_cache[b : b + 1, :, seen],
            causal=True,
            window_size=(case.left, -1),
            scale=case.scale,
            return_lse=True,
        )
        outs.append(out)
        lses.append(lse)
    if not outs:
        return x.q.clone(), x.q.new_empty(x.q.shape[:3])
    return torch.cat(outs), torch.cat(lses)


@functools.lru_cache(maxsize=8)
def expected(
    case: DecodeCase, dtype: torch.dtype, seed: int, device: str
) -> tuple[tuple[Tensor, Tensor], tuple[float, float]]:
    """The oracle's O and L for a case as drawn in `dtype`, and the budget of each."""
    x = make(case, dtype, device=device, seed=seed)
    exact = DecodeInputs(x.q.double(), x.k_cache.double(), x.v_cache.double(), x.cache_seqlens)
    oracle, reference = definition(case, exact), definition(case, x)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    # A score is a sum of D products, in an order that PyTorch's own product does not share: one
    # rounding of its largest partial sum, at most |q| |k|. It moves a probability in proportion.
    # The splits' outputs are added up once more, which is a rounding of the output in fp32.
    longest = [t.norm(dim=-1).nan_to_num(0.0).max().item() if t.numel() else 0.0 for t in exact[:2]]
    values = exact.v_cache.nan_to_num(0.0).abs()
    largest = values.max().item() if values.numel() else 0.0
    rounding = torch.finfo(statistics).eps / 2
    score = rounding * (case.scale or case.D**-0.5) * longest[0] * longest[1]
    out_budget = budget(reference[0], oracle[0], dtype) + (score + rounding) * largest
    lse_budget = budget(reference[1], oracle[1], statistics) + score
    if dtype == torch.float64:  # the oracle is the reference, and has roundings of its own
        out_budget, lse_budget = 8.0 * out_budget, 8.0 * lse_budget
    return oracle, (out_budget, lse_budget)


def assert_matches_oracle(
    case: DecodeCase,
    dtype: torch.dtype,
    implementation: str,
    *,
    device: str = "cpu",
    seed: int = 0,
    splits: int | None = None,
) -> None:
    """O and L, their dtypes, and that the inputs are as they were."""
    oracle, budgets = expected(case, dtype, seed, device)
    x = make(case, dtype, device=device, seed=seed)
    before = [t.clone() for t in x if t is not None]

    actual = flash_attention_decode(  # pyright: ignore[reportCallIssue]
        *x,
        splits=splits or case.splits,
        implementation=implementation,
        **case.options,
    )

    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    assert [t.dtype for t in actual] == [dtype, statistics]
    assert all(t.is_contiguous() for t in actual)
    assert not any(t.isnan().any() for t in actual)
    for name, a, o, allowed in zip(("out", "lse"), actual, oracle, budgets, strict=True):
        assert_within_budget(a, o, allowed, name=name)
    after = [t for t in x if t is not None]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), "inputs changed"
