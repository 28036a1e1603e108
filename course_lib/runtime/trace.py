"""What an interpreted run did: every launch and, when traced, every access to memory."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Access", "Launch", "Run", "TensorInfo"]

AccessKind = Literal["load", "store", "atomic"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Layout of one tensor argument, strides in elements."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    itemsize: int


@dataclass(frozen=True, slots=True)
class Access:
    """One load, store or atomic of one program.

    Attributes:
        program: Grid index of the program.
        kind: ``"load"``, ``"store"`` or ``"atomic"``.
        tensor: Kernel argument, without a trailing ``_ptr`` or ``_desc``.
        start: First element touched, counted from the argument's first element.
        stop: One past the last element touched (``start == stop == 0`` if every lane is masked).
        elements: Lanes that are not masked. A broadcast pointer counts once for each lane.
        nbytes: ``elements`` times the size of one element.
        shape: Shape of the tile, ``()`` for a scalar.
        line: Line of source; 0 where it is unknown.
        dtype: Triton's name of the element type, such as ``"fp32"``.
    """

    program: tuple[int, int, int]
    kind: AccessKind
    tensor: str
    start: int
    stop: int
    elements: int
    nbytes: int
    shape: tuple[int, ...]
    line: int
    dtype: str

    def box(self, shape: Sequence[int], strides: Sequence[int]) -> tuple[range, ...]:
        """Bounding box of the access in a tensor's coordinates, one half-open range a dimension.

        Exact for tiles that are boxes, as all tiles of a matrix are. A dimension of stride 0
        (an expanded one) is returned whole.

        Args:
            shape: Shape of the tensor argument.
            strides: Its strides, in elements.
        """
        if len(shape) != len(strides):
            raise ValueError(f"shape has {len(shape)} dimensions, strides has {len(strides)}")
        if self.elements == 0:
            return tuple(range(0) for _ in shape)
        first, last = self.start, self.stop - 1
        ranges = [range(extent) for extent in shape]
        # Widest stride first: every coordinate is then the quotient of what the wider ones left.
        for dim in sorted(range(len(shape)), key=lambda d: (-strides[d], shape[d] == 1)):
            if strides[dim] == 0:
                continue
            low, high = 0, 0
            if shape[dim] > 1:
                low, first = divmod(first, strides[dim])
                high, last = divmod(last, strides[dim])
            ranges[dim] = range(low, high + 1)
        return tuple(ranges)


@dataclass(slots=True)
class Launch:
    """One kernel launch. ``accesses`` stays empty unless the run is traced."""

    kernel: str
    grid: tuple[int, int, int]
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    accesses: list[Access] = field(default_factory=list)

    @property
    def programs(self) -> int:
        """Number of programs in the grid."""
        return math.prod(self.grid)

    def box(self, access: Access) -> tuple[range, ...]:
        """Bounding box of one of this launch's accesses; see :meth:`Access.box`."""
        info = self.tensors[access.tensor]
        return access.box(info.shape, info.strides)


@dataclass(slots=True)
class Run:
    """Everything launched inside one ``with interpreted(...) as run:``."""

    guard: bool = True
    trace: bool = False
    launches: list[Launch] = field(default_factory=list)

    @property
    def programs(self) -> int:
        """Programs of all launches."""
        return sum(launch.programs for launch in self.launches)

    @property
    def bytes_loaded(self) -> int:
        """Bytes that loads read. Needs ``trace=True``; atomics are not counted."""
        return sum(self.bytes_by_tensor("load").values())

    @property
    def bytes_stored(self) -> int:
        """Bytes that stores wrote. Needs ``trace=True``; atomics are not counted."""
        return sum(self.bytes_by_tensor("store").values())

    def bytes_by_tensor(self, kind: AccessKind | None = None) -> dict[str, int]:
        """Bytes moved for each tensor argument, over all launches.

        Args:
            kind: Count one kind of access only; ``None`` counts all three.

        Raises:
            RuntimeError: The run was not traced, so nothing was recorded.
        """
        if not self.trace:
            raise RuntimeError("nothing was recorded: use `with interpreted(trace=True) as run:`")
        total: Counter[str] = Counter()
        for launch in self.launches:
            for access in launch.accesses:
                if kind is None or access.kind == kind:
                    total[access.tensor] += access.nbytes
        return dict(total)
