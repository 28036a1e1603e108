"""Races between the programs of one launch, found in a run where programs take turns.

Programs of a grid run at the same time on a GPU, in no order. The interpreter runs them one after
another, so its numbers come out right despite a race. A :class:`Shadow` remembers, for every
element of a storage, which programs touched it, and reports a pair whose order would matter:

* two programs write different values;
* one program reads what another wrote, or changed with an atomic;
* one program overwrites, with another value, what another read;
* one program uses an atomic on what another wrote without one.

Atomics among themselves are in order. Writing the value that is already there disturbs nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

__all__ = ["NOBODY", "SEVERAL", "Conflict", "Shadow"]

NOBODY = 0
SEVERAL = -1


@dataclass(frozen=True, slots=True)
class Conflict:
    """Elements on which this program and another disagree.

    Attributes:
        entry: The first of them, as an entry of the shadow.
        count: How many entries.
        other: Number of the other program, or ``SEVERAL``.
        others_deed: What the other did, as in "wrote", to fill "which program 3 ...".
    """

    entry: int
    count: int
    other: int
    others_deed: str


class Shadow:
    """Who touched each element of one storage. Programs are numbered from 1."""

    def __init__(self, entries: int) -> None:
        self._writer = np.zeros(entries, np.int32)
        self._by_atomic = np.zeros(entries, bool)
        # Two readers are enough: if any other program read an element, one of these is another.
        self._first_reader = np.zeros(entries, np.int32)
        self._last_reader = np.zeros(entries, np.int32)
        self._is_written = False

    def read(self, where: np.ndarray, program: int) -> Conflict | None:
        """Note that `program` reads the entries `where`."""
        if self._is_written:
            writers = self._writer[where]
            foreign = _foreign(writers, program)
            if foreign.any():
                by_atomic = bool(self._by_atomic[where][foreign].any())
                deed = "changed with an atomic" if by_atomic else "wrote"
                return _conflict(where, foreign, writers, deed)
        first = self._first_reader[where]
        self._first_reader[where] = np.where(first == NOBODY, program, first)
        self._last_reader[where] = program
        return None

    def write(
        self, where: np.ndarray, program: int, differs: Callable[[], np.ndarray]
    ) -> Conflict | None:
        """Note that `program` writes the entries `where`.

        Args:
            where: Entries of the shadow.
            program: Number of the writing program.
            differs: Gives, for each entry, whether the new value differs from what is there. It
                is asked only if somebody else was there.
        """
        writers, first = self._writer[where], self._first_reader[where]
        overwrites = _foreign(writers, program)
        first_is_foreign = _foreign(first, program)
        last = self._last_reader[where]
        was_read = first_is_foreign | _foreign(last, program)
        if overwrites.any() or was_read.any():
            changed = differs()
            if (overwrites & changed).any():
                return _conflict(where, overwrites & changed, writers, "wrote with another value")
            if (was_read & changed).any():
                readers = np.where(first_is_foreign, first, last)
                return _conflict(where, was_read & changed, readers, "read")
        self._writer[where] = program
        self._by_atomic[where] = False
        self._is_written = True
        return None

    def atomic(self, where: np.ndarray, program: int) -> Conflict | None:
        """Note that `program` updates the entries `where` with an atomic."""
        writers = self._writer[where]
        foreign = _foreign(writers, program)
        plain = foreign & ~self._by_atomic[where]
        if plain.any():
            return _conflict(where, plain, writers, "wrote without an atomic")
        self._writer[where] = np.where(foreign, SEVERAL, program)
        self._by_atomic[where] = True
        self._is_written = True
        return None


def _foreign(numbers: np.ndarray, program: int) -> np.ndarray:
    return (numbers != NOBODY) & (numbers != program)


def _conflict(where: np.ndarray, bad: np.ndarray, others: np.ndarray, deed: str) -> Conflict:
    at = int(np.flatnonzero(bad)[0])
    return Conflict(int(where.flat[at]), int(bad.sum()), int(others.flat[at]), deed)
