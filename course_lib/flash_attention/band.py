"""Who sees whom: the band of keys around the diagonal that a query attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["EVERYTHING", "Band"]


class Band(NamedTuple):
    """Query i sees the keys from i + Tk - Tq - left to i + Tk - Tq + right; -1 is no bound.

    The diagonal is aligned at the bottom right: the last query stands on the last key.
    """

    left: int
    right: int

    @classmethod
    def of(cls, causal: bool, window_size: tuple[int, int]) -> Band:
        """The band that a caller asked for.

        Raises:
            TypeError, ValueError: An argument is not what the public functions document.
        """
        if not isinstance(causal, bool):
            raise TypeError(f"causal must be a bool, got {causal!r}")
        pair = isinstance(window_size, tuple | list) and len(window_size) == 2
        if not pair or not all(type(side) is int for side in window_size):
            raise TypeError(
                f"window_size must be a pair of ints (left, right), got {window_size!r}"
            )
        left, right = window_size
        if left < -1 or right < -1:
            raise ValueError(
                f"window_size must have sides of 0 or more, or -1 for no bound, got {window_size!r}"
            )
        return cls(left, 0 if causal else right)

    @property
    def is_causal(self) -> bool:
        """No bound on the left, and the diagonal on the right."""
        return self.left < 0 and self.right == 0

    @property
    def is_window(self) -> bool:
        """Bounded, and not just causal."""
        return (self.left >= 0 or self.right >= 0) and not self.is_causal

    def clipped(self, length: int) -> tuple[int, int]:
        """Both sides as numbers of at most `length`, which is no bound where it is the longest."""
        left, right = (length if side < 0 else min(side, length) for side in self)
        return left, right

    def keys(self, rows: slice, Tq: int, Tk: int) -> slice:
        """The keys that at least one of queries rows.start ... rows.stop - 1 sees."""
        left, right = self.clipped(max(Tq, Tk))
        begin = rows.start + Tk - Tq - left
        end = rows.stop + Tk - Tq + right
        begin = min(max(begin, 0), Tk)
        return slice(begin, max(min(end, Tk), begin))

    def visible(
        self,
        Tq: int,
        Tk: int,
        *,
        rows: slice | None = None,
        keys: slice | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Which query sees which key, [Tq, Tk] booleans, or the rows and keys of that."""
        left, right = self.clipped(max(Tq, Tk))
        rows, keys = rows or slice(0, Tq), keys or slice(0, Tk)
        row = torch.arange(rows.start, rows.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)[None, :]
        ahead = key - (row + (Tk - Tq))  # how far right of the diagonal
        return (ahead >= -left) & (ahead <= right)

    def pairs(self, Tq: int, Tk: int) -> int:
        """How many pairs of query and key there are: what attention costs, in dot products."""
        left, right = self.clipped(max(Tq, Tk))
        return sum(
            max(min(i + Tk - Tq + right, Tk - 1) - max(i + Tk - Tq - left, 0) + 1, 0)
            for i in range(Tq)
        )


EVERYTHING = Band(-1, -1)
