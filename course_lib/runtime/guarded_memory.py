"""The memory that an interpreted kernel works on: every access checked, raced, and traced.

Nothing is dereferenced. An access is a tile of made-up addresses (see :mod:`regions`); it is
checked, turned into element indices, and done by numpy on the tensor's own storage. That is an
order of magnitude faster than the lane-by-lane loads of Triton's interpreter, which pays for the
checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import EllipsisType
from typing import Any, NoReturn

import numpy as np
import triton.runtime.interpreter as triton_interpreter
from triton._C.libtriton import ir

from course_lib.runtime.kernel_errors import DataRace, KernelError, OutOfBounds, UnsupportedDtype
from course_lib.runtime.races import SEVERAL, Conflict
from course_lib.runtime.regions import HALF_REGION, REGION_BITS, Region, Regions
from course_lib.runtime.trace import Access, AccessKind

__all__ = ["GuardedMemory"]

TensorHandle = triton_interpreter.TensorHandle

_BFLOAT16_NAN = 0x7FC0
_NO_MASK = (
    "Which lanes fall outside the tensor, and what switches them off? Or is an offset multiplied "
    "by the wrong stride?"
)
_MASK_LETS_THROUGH = (
    "The mask lets these lanes through. Conditions on vectors are joined by & with parentheses; "
    "`and` and `if` do not look at each lane. Or is an offset multiplied by the wrong stride?"
)
_VERBS: dict[AccessKind, str] = {"load": "reads", "store": "writes", "atomic": "updates"}

Selector = np.ndarray | EllipsisType


class GuardedMemory:
    """The four memory operations of one launch that all others end in.

    They replace the methods ``create_masked_load``, ``create_masked_store``, ``create_atomic_rmw``
    and ``create_atomic_cas`` of Triton's ``InterpreterBuilder``.
    """

    def __init__(
        self,
        kernel: str,
        *,
        guard: bool,
        learner_line: Callable[[], tuple[int | None, str]],
        record: Callable[[Access], None] | None,
    ) -> None:
        """Start with no tensors.

        Args:
            kernel: The kernel's name, for messages.
            guard: Look for races and fill masked lanes with NaN. Bounds are always checked.
            learner_line: Gives the number and the text of the source line now running.
            record: Receives every access; None where no trace is wanted.
        """
        self.regions = Regions()
        self._kernel = kernel
        self._guard = guard
        self._learner_line = learner_line
        self._record = record
        self._grid = (1, 1, 1)
        self._program = (0, 0, 0)
        self._number = 1
        self._lock_address: int | float | None = None

    def start_program(self, program: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Say which program the following accesses belong to."""
        self._program, self._grid = program, grid
        self._number = (program[0] * grid[1] + program[1]) * grid[2] + program[2] + 1
        self._lock_address = None

    def load(self, pointers: Any, mask: Any, other: Any) -> Any:
        """Read a tile; masked lanes hold `other`, or NaN where it is None."""
        element, dtype = _element(pointers)
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape)
        every_lane = bool(active.all())
        lanes = pointers.data if every_lane else pointers.data[active]

        loaded = np.empty(lanes.shape, dtype)
        for region, select, index in self._parts("load", lanes, dtype.itemsize):
            if self._watches_races():
                entries = region.shadow_entries(index, dtype.itemsize)
                self._report("load", region, region.storage.shadow.read(entries, self._number))
            loaded[select] = region.array(dtype)[index]
            self._trace("load", region, index, pointers)
        self._trace_if_masked("load", lanes, pointers)

        if every_lane:
            return TensorHandle(loaded, element)
        if other is not None:
            tile = np.broadcast_to(other.data, shape).astype(dtype)
        else:
            tile = np.full(shape, self._masked_value(element), dtype)
        tile[active] = loaded
        return TensorHandle(tile, element)

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        """Write the lanes of a tile that are not masked."""
        _, dtype = _element(pointers)
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape)
        lanes = pointers.data[active]
        values = np.broadcast_to(value.data, shape)[active].astype(dtype, copy=False)

        for region, select, index in self._parts("store", lanes, dtype.itemsize):
            array, new = region.array(dtype), values[select]
            if self._watches_races():
                self._note_write(region, index, array, new)
            region.storage.written = True
            array[index] = new
            if self._guard:
                self._check_lanes_agree(region, index, array, new)
            self._trace("store", region, index, pointers)
        self._trace_if_masked("store", lanes, pointers)

    def atomic_rmw(self, original: Callable[..., Any], op: Any, pointers: Any, value: Any,
                   mask: Any, *order: Any) -> Any:  # fmt: skip
        """Check a read-modify-write, and let Triton's own method do it on real addresses."""
        active = np.broadcast_to(mask.data, pointers.data.shape)
        result = original(op, self._real_pointers(pointers, active), value, mask, *order)
        if op == ir.ATOMIC_OP.XCHG and self._lock_address == _scalar(pointers.data):
            self._lock_address = None
        return result

    def atomic_cas(self, original: Callable[..., Any], pointers: Any, compare: Any, value: Any,
                   *order: Any) -> Any:  # fmt: skip
        """Check a compare-and-swap, and let Triton's own method do it.

        One that succeeds on a scalar takes a lock, and an exchange at the same address releases
        it: what happens in between is in order.
        """
        active = np.ones(pointers.data.shape, bool)
        result = original(self._real_pointers(pointers, active), compare, value, *order)
        if pointers.data.size == 1 and _scalar(result.data) == _scalar(compare.data):
            self._lock_address = _scalar(pointers.data)
        return result

    def _real_pointers(self, pointers: Any, active: np.ndarray) -> Any:
        element, dtype = _element(pointers)
        if self._guard and (element.is_bf16() or element.is_fp8()):
            raise UnsupportedDtype(
                f"program {self._program} uses an atomic on {element}, which the interpreter "
                "would add up as raw bits",
                **self._place(None),
                advice="Accumulate into a float32 tensor and convert it after the launch.",
            )
        lanes = pointers.data[active]
        real = np.empty(lanes.shape, np.uint64)
        for region, select, index in self._parts("atomic", lanes, dtype.itemsize):
            if self._watches_races():
                entries = region.shadow_entries(index, dtype.itemsize)
                self._report("atomic", region, region.storage.shadow.atomic(entries, self._number))
            region.storage.written = True
            real[select] = region.array(dtype).ctypes.data + index * dtype.itemsize
            self._trace("atomic", region, index, pointers)
        self._trace_if_masked("atomic", lanes, pointers)
        addresses = np.zeros(pointers.data.shape, np.uint64)
        addresses[active] = real
        return TensorHandle(addresses, pointers.dtype)

    # Bounds.

    def _parts(
        self, kind: AccessKind, lanes: np.ndarray, itemsize: int
    ) -> Iterator[tuple[Region, Selector, np.ndarray]]:
        """Split lanes by tensor argument, check bounds, and turn addresses into indices."""
        if lanes.size == 0:
            return
        region = self.regions.of_address(int(lanes.flat[0]))
        if region is not None:
            offsets = _offsets(lanes, region)
            # All in one region, whose first element may lie anywhere in its upper half.
            if offsets.min() >= -HALF_REGION and offsets.max() < HALF_REGION // 2:
                yield region, ..., self._indices(kind, region, offsets, itemsize)
                return
        # Rare: a tile whose lanes point into several tensors, or to nowhere.
        owners = lanes >> np.uint64(REGION_BITS)
        for owner in np.unique(owners):
            select = owners == owner
            region = self.regions.of_address(int(owner) << REGION_BITS)
            if region is None:
                raise OutOfBounds(
                    f"program {self._program} {_VERBS[kind]} {_count(int(select.sum()))} at "
                    "addresses that belong to no tensor argument",
                    **self._place(None),
                    advice="Is an offset far too large, or an address kept inside a tensor? The "
                    "interpreter knows only tensors that are arguments of the kernel.",
                )
            yield (
                region,
                select,
                self._indices(kind, region, _offsets(lanes[select], region), itemsize),
            )

    def _indices(
        self, kind: AccessKind, region: Region, offsets: np.ndarray, itemsize: int
    ) -> np.ndarray:
        """Indices in units of `itemsize` bytes, all of them inside the tensor."""
        if int(offsets.min()) < 0 or int(offsets.max()) + itemsize > region.nbytes:
            self._refuse_bounds(kind, region, offsets, itemsize)
        own = region.info.itemsize
        # Only a cast pointer can be out of step with the elements.
        if (offsets % min(own, itemsize)).any():
            raise KernelError(
                f"program {self._program} {_VERBS[kind]} `{region.name}` at an address that is "
                f"not a multiple of {min(own, itemsize)} bytes",
                **self._place(region),
            )
        if region.members is not None and not region.members[offsets // own].all():
            bad = np.unique(offsets // own)
            bad = bad[~region.members[bad]]
            raise OutOfBounds(
                f"program {self._program} {_VERBS[kind]} {_count(bad.size)} in the gaps of "
                f"`{region.name}`, a view of shape {region.info.shape} with strides "
                f"{region.info.strides} (first bad index {bad[0]})",
                **self._place(region),
                advice="They belong to the tensor that this one is a view of. Is a mask missing, "
                "or the stride of another tensor in use?",
            )
        return offsets // itemsize

    def _refuse_bounds(
        self, kind: AccessKind, region: Region, offsets: np.ndarray, itemsize: int
    ) -> NoReturn:
        own = region.info.itemsize
        past = np.unique(offsets[offsets + itemsize > region.nbytes] // own)
        before = np.unique(offsets[offsets < 0] // own)
        bad, where = (past, "past the end of") if past.size else (before, "before the start of")
        place = self._place(region)
        masked = "mask" in place["source"]
        raise OutOfBounds(
            f"program {self._program} {_VERBS[kind]} {_count(bad.size)} {where} `{region.name}` "
            f"({_count(region.nbytes // own)}; first bad index {bad[0]})",
            **place,
            advice=_MASK_LETS_THROUGH if masked else _NO_MASK,
        )

    # Races.

    def _watches_races(self) -> bool:
        return self._guard and self._lock_address is None

    def _note_write(
        self, region: Region, index: np.ndarray, array: np.ndarray, new: np.ndarray
    ) -> None:
        entries = region.shadow_entries(index, array.itemsize)

        def differs() -> np.ndarray:
            changed = _bits(array[index]) != _bits(new)
            # An element may span several entries, which then lie in a second dimension.
            return changed if changed.shape == entries.shape else changed.reshape(-1, 1)

        self._report("store", region, region.storage.shadow.write(entries, self._number, differs))

    def _report(self, kind: AccessKind, region: Region, conflict: Conflict | None) -> None:
        if conflict is None:
            return
        # Overwriting is the word for destroying what another wants to read.
        verb = "overwrites" if conflict.others_deed == "read" else _VERBS[kind]
        if conflict.other == SEVERAL:
            other = "several programs"
        else:
            rest, z = divmod(conflict.other - 1, self._grid[2])
            x, y = divmod(rest, self._grid[1])
            other = f"program {(x, y, z)}"
        elements = -(-conflict.count * region.storage.unit // region.info.itemsize)
        raise DataRace(
            f"program {self._program} {verb} {_count(elements)} of `{region.name}`, which "
            f"{other} {conflict.others_deed} in the same launch (first at index "
            f"{region.index_of_entry(conflict.entry)})",
            **self._place(region),
            advice="On a GPU programs run at the same time, in no order. Give every element one "
            "program that writes it, use tl.atomic_add, or split the work into two launches.",
        )

    def _check_lanes_agree(
        self, region: Region, index: np.ndarray, array: np.ndarray, new: np.ndarray
    ) -> None:
        flat = index.reshape(-1)
        # Rising indices, by far the most common, cannot repeat.
        if (flat[1:] > flat[:-1]).all():
            return
        lost = _bits(array[index]) != _bits(new)
        if lost.any():
            raise DataRace(
                f"program {self._program} writes different values to the same element of "
                f"`{region.name}` in one store (index {int(index[lost].flat[0])})",
                **self._place(region),
                advice="Which lane wins is undefined. Are two lanes given the same offset?",
            )

    def _masked_value(self, element: Any) -> float | int:
        """What a masked lane holds without `other`; a GPU leaves it undefined."""
        if not self._guard or not element.is_floating() or element.is_fp8():
            return 0
        return _BFLOAT16_NAN if element.is_bf16() else math.nan

    # Records.

    def _place(self, region: Region | None) -> dict[str, Any]:
        line, source = self._learner_line()
        return {
            "kernel": self._kernel,
            "program": self._program,
            "tensor": region.name if region else None,
            "line": line,
            "source": source,
        }

    def _trace(self, kind: AccessKind, region: Region, index: np.ndarray, pointers: Any) -> None:
        if self._record is None:
            return
        start, stop = 0, 0
        element, dtype = _element(pointers)
        if index.size:
            # Through a cast pointer, count in the tensor's own elements all the same.
            own = region.info.itemsize
            start = int(index.min()) * dtype.itemsize // own
            stop = -(-(int(index.max()) + 1) * dtype.itemsize // own)
        # The interpreter holds a scalar as an array of one element.
        shape = pointers.data.shape if pointers.data.shape != (1,) else ()
        line, _ = self._learner_line()
        self._record(
            Access(
                program=self._program,
                kind=kind,
                tensor=region.name,
                start=start,
                stop=stop,
                elements=index.size,
                nbytes=index.size * dtype.itemsize,
                shape=tuple(shape),
                line=line or 0,
                dtype=str(element),
            )
        )

    def _trace_if_masked(self, kind: AccessKind, lanes: np.ndarray, pointers: Any) -> None:
        """Record an access all of whose lanes are masked: it moves nothing, but it is there."""
        if self._record is None or lanes.size or not pointers.data.size:
            return
        region = self.regions.of_address(int(pointers.data.flat[0]))
        if region is not None:
            self._trace(kind, region, np.empty(0, np.int64), pointers)


def _element(pointers: Any) -> tuple[Any, np.dtype]:
    """Element type that pointers point to, for Triton and for numpy."""
    element = pointers.get_element_ty()
    return element, triton_interpreter._get_np_dtype(element)


def _offsets(lanes: np.ndarray, region: Region) -> np.ndarray:
    """Signed distance in bytes from the tensor's first element."""
    return (lanes - np.uint64(region.address)).view(np.int64)


def _bits(values: np.ndarray) -> np.ndarray:
    """Values as unsigned integers, so that NaN equals itself and 0.0 differs from -0.0."""
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def _scalar(values: np.ndarray) -> int | float | None:
    return values.reshape(-1)[0].item() if values.size == 1 else None


def _count(n: int) -> str:
    return f"{n} element" if n == 1 else f"{n} elements"
