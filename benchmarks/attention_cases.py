"""Inputs of the attention benchmarks: sizes that models have, and how each layout holds them.

A case is a list of sequences, each with its queries and its keys: a dense batch has equal ones, a
packed batch does not, and in decoding every sequence has one query. Tensors are drawn packed,
[tokens, H, D], and laid out for each implementation before anything is timed.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from course_lib.flash_attention.band import Band

__all__ = [
    "BATCH",
    "FULL_BATCH",
    "ONE_ROW",
    "PACKED",
    "BenchCase",
    "Layout",
    "Packed",
    "cpu_cases",
    "draw",
    "gpu_cases",
    "skewed_lengths",
]


@dataclasses.dataclass(frozen=True)
class BenchCase:
    """One input of a benchmark."""

    name: str
    #: Which of our functions it is for: flash_attention, flash_attention_varlen,
    #: flash_attention_decode.
    kind: Literal["dense", "varlen", "decode"]
    q_lengths: tuple[int, ...]  #: queries of each sequence
    k_lengths: tuple[int, ...]  #: keys of each sequence
    Hq: int
    Hkv: int
    D: int
    causal: bool = False
    window_size: tuple[int, int] = (-1, -1)
    seed: int | None = None  #: that the lengths were drawn with

    @property
    def band(self) -> Band:
        """Which keys a query sees."""
        return Band.of(self.causal, self.window_size)

    @property
    def uniform(self) -> bool:
        """Whether all sequences are equally long."""
        return len({*zip(self.q_lengths, self.k_lengths, strict=True)}) == 1

    def pairs(self) -> int:
        """Visible pairs of query and key, over all sequences, of one head."""
        count: dict[tuple[int, int], int] = {}
        total = 0
        for lengths in zip(self.q_lengths, self.k_lengths, strict=True):
            if lengths not in count:
                count[lengths] = self.band.pairs(*lengths)
            total += count[lengths]
        return total

    def flops(self) -> int:
        """FLOPs of the forward: 4 D for every visible pair of every query head."""
        return 4 * self.Hq * self.D * self.pairs()

    def kv_bytes(self, itemsize: int) -> int:
        """Bytes of the keys and values that at least one query sees, read once."""
        seen = 0
        for Tq, Tk in zip(self.q_lengths, self.k_lengths, strict=True):
            keys = self.band.keys(slice(0, Tq), Tq, Tk)
            seen += keys.stop - keys.start
        return 2 * seen * self.Hkv * self.D * itemsize

    def padded(self) -> BenchCase:
        """The same batch with every sequence padded to the longest."""
        B = len(self.q_lengths)
        return dataclasses.replace(
            self,
            kind="dense",
            q_lengths=(max(self.q_lengths),) * B,
            k_lengths=(max(self.k_lengths),) * B,
            seed=None,
        )

    def shape(self) -> dict[str, Any]:
        """The sizes for a record: lengths are the longest, and the sums where they differ."""
        sizes: dict[str, Any] = {
            "B": len(self.q_lengths),
            "Hq": self.Hq,
            "Hkv": self.Hkv,
            "Tq": max(self.q_lengths),
            "Tk": max(self.k_lengths),
            "D": self.D,
        }
        if not self.uniform:
            sizes |= {
                "queries": sum(self.q_lengths),
                "keys": sum(self.k_lengths),
                "median_keys": statistics.median(self.k_lengths),
                "sum_of_squared_keys": sum(length**2 for length in self.k_lengths),
                "seed_of_lengths": self.seed,
            }
        return sizes


def skewed_lengths(
    count: int, *, median: int, longest: int, seed: int, sigma: float = 1.0
) -> tuple[int, ...]:
    """Lengths as collections of texts have them: log-normal, many short ones and a long tail.

    Args:
        count: How many.
        median: Of the distribution.
        longest: Where the tail is cut, as a model's context cuts it.
        seed: Of Python's generator.
        sigma: Standard deviation of the logarithm.
    """
    generator = random.Random(seed)
    return tuple(
        min(max(round(median * generator.lognormvariate(0.0, sigma)), 16), longest)
        for _ in range(count)
    )


# ---- the lists -----------------------------------------------------------------------------


def gpu_cases() -> Iterator[BenchCase]:
    """For a GPU with tens of gigabytes."""
    # 16k tokens a batch and 2048 features: the sizes that published figures use.
    for D in (64, 128):
        for causal in (False, True):
            for T in (512, 1024, 2048, 4096, 8192, 16384):
                yield _dense(f"T{T}", T, 2048 // D, 2048 // D, D, causal=causal)
    yield _dense("T4095", 4095, 16, 16, 128, causal=True, B=4)
    yield _dense("T4096", 4096, 28, 28, 72, B=4)
    yield _dense("T4096", 4096, 8, 8, 256, causal=True)
    # Grouped heads as in models of 8 and 70 billion parameters.
    yield _dense("gqa4/T8192", 8192, 32, 8, 128, causal=True, B=1)
    yield _dense("gqa8/T4096", 4096, 64, 8, 128, causal=True, B=1)
    # A chunk of a prompt against what is in the cache already: the diagonal is at the bottom right.
    yield _dense("chunk/Tq512/Tk8192", 512, 16, 16, 128, causal=True, Tk=8192, B=8)
    for left in (1023, 4095):
        window = (left, 0)
        yield _dense(f"window{left}/T16384", 16384, 16, 16, 128, causal=True, window_size=window)
    lengths = skewed_lengths(32, median=600, longest=8192, seed=0)
    for D in (64, 128):
        yield _varlen("texts", lengths, 2048 // D, 2048 // D, D, causal=True, seed=0)
    yield _varlen("texts/gqa4", lengths, 32, 8, 128, causal=True, seed=0)
    yield _varlen("texts", lengths, 16, 16, 128, seed=0)
    yield _varlen(
        "texts/window1023", lengths, 16, 16, 128, causal=True, window_size=(1023, 0), seed=0
    )
    equal = (2048,) * 16
    yield _varlen("equal2048", equal, 16, 16, 128, causal=True)
    for B, Tk in ((1, 131072), (1, 8192), (16, 8192), (64, 8192), (64, 2048)):
        yield _decode(f"B{B}/Tk{Tk}", (Tk,) * B, 32, 8, 128)
    yield _decode("B16/Tk8192/mha", (8192,) * 16, 32, 32, 128)
    caches = skewed_lengths(64, median=4000, longest=32768, seed=1)
    yield _decode("B64/ragged", caches, 32, 8, 128, seed=1)


def cpu_cases() -> Iterator[BenchCase]:
    """One of each kind, small enough for two cores and a few seconds."""
    yield _dense("T256", 256, 4, 4, 64, B=1)
    yield _dense("gqa2/T255", 255, 4, 2, 64, causal=True, B=1)
    yield _dense("chunk/Tq65/Tk255", 65, 2, 2, 64, causal=True, Tk=255, B=1)
    yield _dense("window31/T255", 255, 2, 2, 64, causal=True, window_size=(31, 0), B=1)
    lengths = skewed_lengths(6, median=60, longest=250, seed=0)
    yield _varlen("texts", lengths, 4, 2, 64, causal=True, seed=0)
    yield _varlen("texts", lengths, 2, 2, 64, seed=0)
    yield _decode("B3/Tk255", (255,) * 3, 4, 2, 64)
    yield _decode("B3/ragged", skewed_lengths(3, median=99, longest=255, seed=1), 4, 2, 64, seed=1)


def _mask_name(causal: bool) -> str:
    return "causal" if causal else "full"


def _dense(
    name: str,
    T: int,
    Hq: int,
    Hkv: int,
    D: int,
    *,
    causal: bool = False,
    Tk: int | None = None,
    B: int | None = None,
    window_size: tuple[int, int] = (-1, -1),
) -> BenchCase:
    B = B or 16384 // T
    return BenchCase(
        f"dense/{name}/D{D}/{_mask_name(causal)}",
        "dense",
        (T,) * B,
        (Tk or T,) * B,
        Hq,
        Hkv,
        D,
        causal=causal,
        window_size=window_size,
    )


def _varlen(
    name: str,
    lengths: tuple[int, ...],
    Hq: int,
    Hkv: int,
    D: int,
    *,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    seed: int | None = None,
) -> BenchCase:
    return BenchCase(
        f"varlen/{name}/D{D}/{_mask_name(causal)}",
        "varlen",
        lengths,
        lengths,
        Hq,
        Hkv,
        D,
        causal=causal,
        window_size=window_size,
        seed=seed,
    )


def _decode(
    name: str, caches: tuple[int, ...], Hq: int, Hkv: int, D: int, *, seed: int | None = None
) -> BenchCase:
    q_lengths = (1,) * len(caches)
    return BenchCase(f"decode/{name}/D{D}", "decode", q_lengths, caches, Hq, Hkv, D, seed=seed)


# ---- tensors -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Packed:
    """The tensors of a case, one sequence after another."""

    q: Tensor  #: [sum of q_lengths, Hq, D]
    k: Tensor  #: [sum of k_lengths, Hkv, D]
    v: Tensor  #: [sum of k_lengths, Hkv, D]
    dout: Tensor  #: [sum of q_lengths, Hq, D], the gradient that arrives


def draw(case: BenchCase, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> Packed:
    """Normal numbers, drawn where they are needed: gigabytes from a CPU would take minutes."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(lengths: Sequence[int], heads: int) -> Tensor:
        shape = (sum(lengths), heads, case.D)
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    return Packed(
        normal(case.q_lengths, case.Hq),
        normal(case.k_lengths, case.Hkv),
        normal(case.k_lengths, case.Hkv),
        normal(case.q_lengths, case.Hq),
    )


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an implementation wants [tokens, H, D], and the way back."""

    there: Callable[[Tensor, tuple[int, ...]], Tensor]
    back: Callable[[Tensor, tuple[int, ...]], Tensor]
    #: The same for the gradient that arrives, which is zero where there is no token.
    there_for_dout: Callable[[Tensor, tuple[int, ...]], Tensor]


def _to_batch(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """[tokens, H, D] → [B, H, longest, D], contiguous, with random numbers past the ends.

    Not zeros: a GPU multiplies them with less power, at a higher clock, than a model's numbers.
    """
    shape = (len(lengths), x.shape[1], max(lengths), x.shape[2])
    generator = torch.Generator(device=x.device).manual_seed(1)
    return _fill(
        torch.randn(shape, generator=generator, dtype=x.dtype, device=x.device), x, lengths
    )


def _to_batch_with_zeros(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return _fill(x.new_zeros(len(lengths), x.shape[1], max(lengths), x.shape[2]), x, lengths)


def _fill(batch: Tensor, x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    ends = list(accumulate(lengths))
    for b, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        batch[b, :, :length] = x[end - length : end].transpose(0, 1)
    return batch


def _from_batch(batch: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([batch[b, :, :n].transpose(0, 1) for b, n in enumerate(lengths)])


def _as_it_is(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return x


def _to_one_row(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return x.transpose(0, 1)[None].contiguous()


def _from_one_row(x: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return x[0].transpose(0, 1)


PACKED = Layout(_as_it_is, _as_it_is, _as_it_is)
#: [1, H, tokens, D]: all sequences as one.
ONE_ROW = Layout(_to_one_row, _from_one_row, _to_one_row)
#: [B, H, T, D], padded to the longest.
BATCH = Layout(_to_batch, _from_batch, _to_batch_with_zeros)
#: The same where the padding is meant to cost what tokens cost, in the backward too.
FULL_BATCH = Layout(_to_batch, _from_batch, _to_batch)
