"""What becomes of masks when a transformers model runs on this chapter's attention.

transformers asks a mask function once a forward pass; it alone is told everything: lengths, cache,
padding, samples that share a row, and the rule (causal, a window). Its own functions answer with a
[Tq, Tk] table. ``flash_mask`` answers with a ``Pattern``, a few numbers that kernels can follow, or
raises an error where no such numbers say the same.
"""

# torch.compiler.disable hides the arguments of what it decorates.
# pyright: reportCallIssue=false

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from .band import EVERYTHING, Band

__all__ = ["CAUSAL", "Pattern", "check_masks", "flash_mask"]

CAUSAL = Band(-1, 0)


@dataclasses.dataclass(eq=False)
class Pattern:
    """A mask in a few numbers: blocks of queries and keys, and the band inside each block.

    Attributes:
        band: Aligned at the bottom right of every block.
        shape: (rows of the batch, queries, keys).
        blocks: (row, first query, queries, first key, keys). No query is in two blocks.
        packed: The blocks are samples, found by their positions.
        device: Of the masked tensors.
        positions_in_order: The position_ids that were found to match the blocks.
    """

    band: Band
    shape: tuple[int, int, int]
    blocks: list[tuple[int, int, int, int, int]]
    packed: bool = False
    device: torch.device | str = "cpu"
    positions_in_order: Tensor | None = None

    @classmethod
    def dense(cls, band: Band, shape: tuple[int, int, int]) -> Pattern:
        """Every row is one block."""
        rows, q_length, kv_length = shape
        return cls(band, shape, [(row, 0, q_length, 0, kv_length) for row in range(rows)])

    @property
    def is_dense(self) -> bool:
        """Every row is one block, so there is nothing to pick out."""
        return self.blocks == Pattern.dense(self.band, self.shape).blocks

    @functools.cached_property
    def indices(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where the queries and keys of the blocks lie in [rows * T], and cu_seqlens of both."""
        rows, q_length, kv_length = self.shape
        q_place = torch.arange(rows * q_length).view(rows, q_length)
        k_place = torch.arange(rows * kv_length).view(rows, kv_length)
        q_runs = [q_place[row, first : first + count] for row, first, count, _, _ in self.blocks]
        k_runs = [k_place[row, first : first + count] for row, _, _, first, count in self.blocks]
        counts = [[0, *map(len, q_runs)], [0, *map(len, k_runs)]]
        cu_q, cu_k = torch.tensor(counts).cumsum(1).to(torch.int32).to(self.device)
        return torch.cat(q_runs).to(self.device), torch.cat(k_runs).to(self.device), cu_q, cu_k

    def contiguous(self) -> Pattern:
        """Asked for when ``generate`` makes masks ahead of a forward pass, for static caches."""
        raise NotImplementedError(
            "this attention does not run with a static cache; a dynamic cache, the default, will do"
        )

    def table(self) -> Tensor:
        """The same as booleans, [rows, queries, keys]: to compare with, not for the kernels."""
        table = torch.zeros(self.shape, dtype=torch.bool)
        for row, q, q_count, k, k_count in self.blocks:
            table[row, q : q + q_count, k : k + k_count] = self.band.visible(q_count, k_count)
        return table


@torch.compiler.disable
def flash_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **_: object,  # how a table should be made: its dtype, when it may be left out
) -> Pattern:
    """What transformers calls in place of its ``sdpa_mask``, with the same arguments.

    Args:
        batch_size: Rows.
        q_length: Queries; they stand at positions q_offset, q_offset + 1, ...
        kv_length: Keys; they stand at positions kv_offset, kv_offset + 1, ...
        q_offset: Position of the first query: the number of tokens that a cache has seen.
        kv_offset: Position of the first key, which is not 0 where a cache forgets.
        mask_function: The rule, for one pair: (row, head, query, key) -> bool.
        attention_mask: [batch_size, positions], True where there is a token.
        device: Of the tensors that will be masked.

    Raises:
        NotImplementedError: The mask cannot be said as blocks and a band.
        ValueError: attention_mask does not fit the lengths.
    """
    band, samples = _rule(mask_function)
    shape = (batch_size, q_length, kv_length)
    before = int(q_offset) - kv_offset  # keys before the first query
    if band != EVERYTHING and before + q_length != kv_length:
        raise NotImplementedError(
            f"the last query must stand on the last key, got {q_length} queries after {before} of "
            f"{kv_length} keys. With a static cache, use a dynamic one: its keys end where the "
            "queries do"
        )
    if samples is not None:
        starts = torch.diff(samples, prepend=samples[:, :1] - 1) != 0  # [batch_size, q_length]
        places = [*starts.flatten().nonzero().flatten().tolist(), batch_size * q_length]
        runs = [(*divmod(at, q_length), end - at) for at, end in itertools.pairwise(places)]
        blocks = [(row, first, count, first, count) for row, first, count in runs]
        return Pattern(band, shape, blocks, packed=True, device=device)

    if attention_mask is None:
        return Pattern.dense(band, shape)
    blocks = []
    for row, (first, end) in enumerate(_runs(attention_mask, batch_size, kv_length, kv_offset)):
        if band == EVERYTHING:
            blocks.append((row, 0, q_length, first, end - first))
        else:  # query i stands on key before + i, and is hidden where that is
            query = max(first - before, 0)
            blocks.append((row, query, max(end - before - query, 0), first, end - first))
    return Pattern(band, shape, blocks, device=device)


def _runs(mask: Tensor, rows: int, kv_length: int, kv_offset: int) -> list[list[int]]:
    """Where the visible keys of each row begin and end."""
    visible = mask[:, kv_offset : kv_offset + kv_length].bool()
    if visible.shape != (rows, kv_length):
        raise ValueError(
            f"attention_mask must have {rows} rows, and a column for each of "
            f"{kv_offset + kv_length} tokens, those in the cache included; "
            f"got shape {tuple(mask.shape)}"
        )
    count = visible.sum(1)
    first = visible.byte().argmax(1)
    end = torch.where(count > 0, kv_length - visible.flip(1).byte().argmax(1), first)
    if not torch.equal(end - first, count):
        raise NotImplementedError(
            "attention_mask must hide tokens at the ends of a row only; a row hides some between "
            "others (padded on the right, and then continued?)"
        )
    return torch.stack([first, end], dim=1).tolist()


def _rule(function: Callable[..., Tensor] | None) -> tuple[Band, Tensor | None]:
    """The band of a mask function of transformers, and the sample of each token if it has that.

    Such a function answers for one pair of tokens. Asked for all pairs, it would give the table
    that we do not want. But it is put together from a few parts, and a part's name and variables
    say what it does. A part that is not among them is somebody's own mask.
    """
    known = getattr(function, "__module__", "") == "transformers.masking_utils"
    if function is None or not known:
        raise NotImplementedError(f"this attention cannot apply a mask of one's own, {function!r}")
    inside = inspect.getclosurevars(function).nonlocals
    match function.__qualname__.split(".")[0]:
        case "causal_mask_function":
            return CAUSAL, None
        case "bidirectional_mask_function":
            return EVERYTHING, None
        case "sliding_window_overlay":  # so many keys, the query's own among them
            return Band(inside["sliding_window"] - 1, -1), None
        case "sliding_window_bidirectional_overlay":  # so many on either side
            return Band(inside["sliding_window"], inside["sliding_window"]), None
        case "packed_sequence_mask_function":
            return EVERYTHING, inside["packed_sequence_mask"]
        case "remap_positions_for_packed_sequence":  # distances within a sample stay the same
            return _rule(inside["mask_function"])
        case "and_masks":
            bands, samples = zip(*map(_rule, inside["mask_functions"]), strict=True)
            sides = ([side for side in sides if side >= 0] for sides in zip(*bands, strict=True))
            left, right = (min(bounds, default=-1) for bounds in sides)
            return Band(left, right), next((s for s in samples if s is not None), None)
        case name:
            raise NotImplementedError(
                f"this attention cannot apply the mask {name}; it can apply causal and "
                "bidirectional masks, sliding windows and packed samples"
            )


def check_masks() -> None:
    """Compare with the tables of the transformers that is installed.

    Raises:
        Exception: A mask function has another name, other variables, or another meaning.
    """
    from transformers import masking_utils as masks

    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2]])
    samples = masks.find_packed_sequence_indices(positions)
    assert samples is not None
    window = masks.sliding_window_causal_mask_function(3)
    # Older versions need no such function: distances within a sample are the same without it.
    remapped = getattr(masks, "remap_positions_for_packed_sequence", lambda rule, _: rule)
    rules = {
        "causal": masks.causal_mask_function,
        "bidirectional": masks.bidirectional_mask_function,
        "window": window,
        "two-sided window": masks.sliding_window_bidirectional_mask_function(2),
        "packed": masks.and_masks(
            masks.packed_sequence_mask_function(samples), remapped(window, positions)
        ),
    }
    for name, rule in rules.items():
        for queries in (8,) if name == "packed" else (8, 3):
            theirs = masks.sdpa_mask(
                1, queries, 8, 8 - queries, mask_function=rule, allow_is_causal_skip=False
            )
            ours = flash_mask(1, queries, 8, 8 - queries, mask_function=rule).table()
            if theirs is None or not torch.equal(ours, theirs[:, 0]):
                raise ValueError(f"its {name} mask is another")
