"""The memory that an interpreted kernel sees: every access checked, raced, and traced.

Each tensor argument gets a made-up address space of 16 TiB with its first element in the middle,
so a pointer says by its upper bits which argument it came from, and no overrun can reach a
neighbour, even where two arguments share a storage. Nothing is dereferenced: an access is checked,
turned into indices, and done by numpy on the tensor's own storage. That is also several times
faster than the interpreter's lane-by-lane loads, which pays for the checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import EllipsisType
from typing import Any, NoReturn

import numpy as np
import torch
import triton.runtime.interpreter as triton_interpreter
from triton._C.libtriton import ir

from course_lib.runtime.kernel_errors import DataRace, KernelError, OutOfBounds, UnsupportedDtype
from course_lib.runtime.trace import Access, AccessKind, TensorInfo

TensorHandle = triton_interpreter.TensorHandle

_REGION_BITS = 44
_HALF_REGION = 1 << (_REGION_BITS - 1)
# Above every address a process can have, so that a real address never looks like one of ours.
_FIRST_REGION = 1 << (62 - _REGION_BITS)

_NAN_BITS = {"bf16": 0x7FC0}
_OWN_PROGRAMS_RUN_TOGETHER = (
    "On a GPU programs run at the same time, in no order. Give every element one program that "
    "writes it, use tl.atomic_add, or split the work into two launches."
)

Selector = np.ndarray | EllipsisType


@dataclass(slots=True)
class _Storage:
    """The bytes behind one or more tensor arguments, and who touched them in this launch."""

    bytes: np.ndarray  # uint8
    device_storage: torch.UntypedStorage | None  # to copy back to; None on the CPU
    keep_alive: torch.Tensor
    unit: int = 16  # bytes that one shadow entry stands for: the smallest element size in use
    written: bool = False
    # Shadows, one entry a unit: program number + 1, and 0 for nobody.
    writer: np.ndarray | None = None
    wrote_atomically: np.ndarray | None = None
    first_reader: np.ndarray | None = None
    last_reader: np.ndarray | None = None

    def make_shadows(self) -> None:
        units = self.bytes.size // self.unit + 1
        self.writer = np.zeros(units, np.int32)
        self.wrote_atomically = np.zeros(units, bool)
        self.first_reader = np.zeros(units, np.int32)
        self.last_reader = np.zeros(units, np.int32)


@dataclass(slots=True)
class _Region:
    """One tensor argument."""

    name: str
    address: int
    storage: _Storage
    offset: int  # bytes from the storage's first byte to the tensor's first element
    nbytes: int  # from the first byte of the first element to the last byte of the last
    info: TensorInfo
    # For views with holes: which elements of the span belong to the view. None: all of them.
    members: np.ndarray | None
    arrays: dict[np.dtype, np.ndarray] = field(default_factory=dict)

    def array(self, dtype: np.dtype) -> np.ndarray:
        """The span as a flat array of `dtype`, sharing memory with the tensor."""
        if dtype not in self.arrays:
            usable = self.nbytes - self.nbytes % dtype.itemsize
            span = self.storage.bytes[self.offset : self.offset + usable]
            self.arrays[dtype] = span.view(dtype)
        return self.arrays[dtype]

    def shadow_index(self, index: np.ndarray, itemsize: int) -> np.ndarray:
        """Entries of the storage's shadows that the elements `index` occupy."""
        unit = self.storage.unit
        first = (index * itemsize + self.offset) // unit
        if itemsize <= unit:
            return first
        return (first[..., None] + np.arange(itemsize // unit)).reshape(-1)


class Pointer:
    """What stands for a tensor argument when Triton makes a typed pointer of it."""

    def __init__(self, dtype: Any, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        """The made-up address of the first element."""
        return self._address


class GuardedMemory:
    """Every tensor of one launch, and the four operations that all others end in."""

    def __init__(
        self,
        kernel: str,
        *,
        guard: bool,
        learner_line: Callable[[], tuple[int | None, str]],
        record: Callable[[Access], None] | None,
    ) -> None:
        self.kernel = kernel
        self.guard = guard
        self._learner_line = learner_line
        self._record = record
        self._regions: dict[int, _Region] = {}
        self._storages: dict[tuple[torch.device, int], _Storage] = {}
        self._grid = (1, 1, 1)
        self._program = (0, 0, 0)
        self._number = 1
        self._lock_address: int | None = None
        self.tensors: dict[str, TensorInfo] = {}

    # Setting up and taking down a launch.

    def add(self, name: str, argument: Any) -> Pointer:
        """Register one tensor argument and give the pointer that the kernel receives.

        Args:
            name: The kernel's name for it.
            argument: A ``torch.Tensor`` on any device with memory, or ``triton.reinterpret`` of
                one.
        """
        tensor = getattr(argument, "base", argument)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise ValueError(
                f"`{name}` has no memory to point to: {tensor.device} device, {tensor.layout}"
            )
        storage = self._storage_of(tensor)
        itemsize = tensor.element_size()
        storage.unit = min(storage.unit, itemsize)
        span = _span(tensor)
        offset = tensor.storage_offset() * itemsize
        number = _FIRST_REGION + len(self._regions)
        info = TensorInfo(
            tuple(tensor.shape), tuple(tensor.stride()), str(tensor.dtype)[6:], itemsize
        )
        # The offset keeps the alignment that the pointer has on a GPU, where storages are aligned.
        address = (number << _REGION_BITS) + _HALF_REGION + offset
        self._regions[number] = _Region(
            name, address, storage, offset, span * itemsize, info, _members(tensor, span)
        )
        self.tensors[name] = info
        return Pointer(argument.dtype, address)

    def _storage_of(self, tensor: torch.Tensor) -> _Storage:
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in self._storages:
            on_cpu = tensor.device.type == "cpu"
            host = storage if on_cpu else storage.cpu()
            as_bytes = torch.empty(0, dtype=torch.uint8).set_(host)  # pyright: ignore
            self._storages[key] = _Storage(as_bytes.numpy(), None if on_cpu else storage, as_bytes)
        return self._storages[key]

    def copy_back(self) -> None:
        """Copy what the kernel wrote to the devices that the tensors live on."""
        for storage in self._storages.values():
            if storage.written and storage.device_storage is not None:
                storage.device_storage.copy_(storage.keep_alive.untyped_storage())

    def start_program(self, program: tuple[int, int, int], grid: tuple[int, int, int]) -> None:
        """Say which program the following accesses belong to."""
        self._program, self._grid = program, grid
        self._number = (program[0] * grid[1] + program[1]) * grid[2] + program[2] + 1
        self._lock_address = None

    # The four operations. They replace methods of Triton's InterpreterBuilder.

    def load(self, pointers: Any, mask: Any, other: Any) -> Any:
        """``create_masked_load``."""
        element = pointers.get_element_ty()
        dtype = triton_interpreter._get_np_dtype(element)
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape)
        every_lane = bool(active.all())
        lanes = pointers.data if every_lane else pointers.data[active]

        loaded = np.empty(lanes.shape, dtype)
        for region, select, index in self._parts(lanes, dtype.itemsize, "reads"):
            if self.guard:
                self._note_read(region, index, dtype.itemsize)
            loaded[select] = region.array(dtype)[index]
            self._trace("load", region, index, shape, element, dtype.itemsize)
        if lanes.size == 0:
            self._trace_nothing("load", pointers.data, element)

        if every_lane:
            return TensorHandle(loaded, element)
        if other is not None:
            result = np.broadcast_to(other.data, shape).astype(dtype)
        else:
            result = np.full(shape, self._masked_value(element), dtype)
        result[active] = loaded
        return TensorHandle(result, element)

    def store(self, pointers: Any, value: Any, mask: Any) -> None:
        """``create_masked_store``."""
        element = pointers.get_element_ty()
        dtype = triton_interpreter._get_np_dtype(element)
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape)
        lanes = pointers.data[active]
        values = np.broadcast_to(value.data, shape)[active].astype(dtype, copy=False)

        for region, select, index in self._parts(lanes, dtype.itemsize, "writes"):
            stored = values[select]
            array = region.array(dtype)
            if self.guard:
                self._note_write(region, index, array, stored)
            region.storage.written = True
            array[index] = stored
            if self.guard:
                self._check_lanes_agree(region, index, array, stored)
            self._trace("store", region, index, shape, element, dtype.itemsize)
        if lanes.size == 0:
            self._trace_nothing("store", pointers.data, element)

    def atomic_rmw(self, original: Any, builder: Any, op: Any, pointers: Any, value: Any, mask: Any,
                   sem: Any, scope: Any) -> Any:  # fmt: skip
        """``create_atomic_rmw``: checked here, done by Triton's own method on real addresses."""
        shape = pointers.data.shape
        active = np.broadcast_to(mask.data, shape)
        real = self._atomic(pointers, active)
        result = original(builder, op, real, value, mask, sem, scope)
        if op == ir.ATOMIC_OP.XCHG and self._lock_address == _scalar(pointers.data):
            self._lock_address = None
        return result

    def atomic_cas(self, original: Any, builder: Any, pointers: Any, compare: Any, value: Any,
                   sem: Any, scope: Any) -> Any:  # fmt: skip
        """``create_atomic_cas``: one that succeeds on a scalar takes a lock."""
        real = self._atomic(pointers, np.ones(pointers.data.shape, bool))
        result = original(builder, real, compare, value, sem, scope)
        if pointers.data.size == 1 and _scalar(result.data) == _scalar(compare.data):
            self._lock_address = _scalar(pointers.data)
        return result

    def _atomic(self, pointers: Any, active: np.ndarray) -> Any:
        element = pointers.get_element_ty()
        if element.is_bf16() or element.is_fp8():
            raise UnsupportedDtype(
                f"program {self._program} uses an atomic on {element}, which the interpreter "
                "adds up as raw bits",
                **self._place(),
                advice="Let the output be float32 and convert after the launch.",
            )
        itemsize = max(1, element.primitive_bitwidth // 8)
        lanes = pointers.data[active]
        real = np.empty(lanes.shape, np.uint64)
        for region, select, index in self._parts(lanes, itemsize, "updates"):
            if self.guard:
                self._note_atomic(region, index, itemsize)
            region.storage.written = True
            base = region.storage.bytes.ctypes.data + region.offset
            real[select] = (index * itemsize + base).astype(np.uint64)
            self._trace("atomic", region, index, pointers.data.shape, element, itemsize)
        if lanes.size == 0:
            self._trace_nothing("atomic", pointers.data, element)
        addresses = np.zeros(pointers.data.shape, np.uint64)
        addresses[active] = real
        return TensorHandle(addresses, pointers.dtype)

    # Bounds.

    def _parts(
        self, lanes: np.ndarray, itemsize: int, verb: str
    ) -> Iterator[tuple[_Region, Selector, np.ndarray]]:
        """Split lanes by tensor argument, check bounds, and turn addresses into element indices."""
        if lanes.size == 0:
            return
        region = self._regions.get(int(lanes.flat[0]) >> _REGION_BITS)
        if region is not None:
            offsets = (lanes - np.uint64(region.address)).view(np.int64)
            low, high = int(offsets.min()), int(offsets.max())
            if -_HALF_REGION // 2 <= low and high < _HALF_REGION // 2:
                yield region, ..., self._checked(region, offsets, low, high, itemsize, verb)
                return
        # Rare: one tile whose lanes point into several tensors, or to nowhere.
        owners = lanes >> np.uint64(_REGION_BITS)
        for owner in np.unique(owners):
            region = self._regions.get(int(owner))
            select = owners == owner
            if region is None:
                raise OutOfBounds(
                    f"program {self._program} {verb} {int(select.sum())} elements at addresses "
                    "that belong to no tensor argument",
                    **self._place(),
                    advice="Is an offset far too large, or an address kept inside a tensor? The "
                    "interpreter knows only tensors that are arguments of the kernel.",
                )
            offsets = (lanes[select] - np.uint64(region.address)).view(np.int64)
            low, high = int(offsets.min()), int(offsets.max())
            yield region, select, self._checked(region, offsets, low, high, itemsize, verb)

    def _checked(
        self, region: _Region, offsets: np.ndarray, low: int, high: int, itemsize: int, verb: str
    ) -> np.ndarray:
        if low < 0 or high + itemsize > region.nbytes:
            self._out_of_bounds(region, offsets, itemsize, verb)
        shift = itemsize.bit_length() - 1
        if region.info.itemsize != itemsize and (offsets & (itemsize - 1)).any():
            raise KernelError(
                f"program {self._program} {verb} `{region.name}` at an address that is not a "
                f"multiple of {itemsize} bytes",
                **self._place(region),
            )
        index = offsets >> shift
        if region.members is not None:
            elements = offsets // region.info.itemsize
            outside = ~region.members[elements]
            if outside.any():
                bad = np.unique(elements[outside])
                raise OutOfBounds(
                    f"program {self._program} {verb} {_count(bad.size)} in the gaps of "
                    f"`{region.name}`, a view of shape {region.info.shape} with strides "
                    f"{region.info.strides} (first bad index {bad[0]})",
                    **self._place(region),
                    advice="Those elements belong to the tensor that this one is a view of. "
                    "Is a mask missing, or a stride of another tensor in use?",
                )
        return index

    def _out_of_bounds(
        self, region: _Region, offsets: np.ndarray, itemsize: int, verb: str
    ) -> NoReturn:
        size = region.nbytes // region.info.itemsize
        past = np.unique(offsets[offsets + itemsize > region.nbytes]) // region.info.itemsize
        before = np.unique(offsets[offsets < 0]) // region.info.itemsize
        bad, where = (past, "past the end of") if past.size else (before, "before the start of")
        raise OutOfBounds(
            f"program {self._program} {verb} {_count(bad.size)} {where} `{region.name}` "
            f"({_count(size)}; first bad index {bad[0]})",
            **self._place(region),
            advice="Give the access a mask that is false for lanes outside the tensor, as in "
            "mask=offs < n, or check the stride that the offset is multiplied by.",
        )

    # Races. Programs run one after another here, so the shadows hold all earlier programs.

    def _shadows(self, region: _Region) -> _Storage:
        if region.storage.writer is None:
            region.storage.make_shadows()
        return region.storage

    def _note_read(self, region: _Region, index: np.ndarray, itemsize: int) -> None:
        if self._lock_address is not None:
            return
        storage, where = self._shadows(region), region.shadow_index(index, itemsize)
        assert storage.writer is not None
        assert storage.wrote_atomically is not None
        assert storage.first_reader is not None
        assert storage.last_reader is not None
        if storage.written:
            writers = storage.writer[where]
            foreign = (writers != 0) & (writers != self._number)
            if foreign.any():
                atomically = bool(storage.wrote_atomically[where][foreign].any())
                how = "changed with an atomic" if atomically else "wrote"
                self._race(region, where, foreign, writers, "reads", f"which program {{}} {how}")
        first = storage.first_reader[where]
        storage.first_reader[where] = np.where(first == 0, self._number, first)
        storage.last_reader[where] = self._number

    def _note_write(
        self, region: _Region, index: np.ndarray, array: np.ndarray, stored: np.ndarray
    ) -> None:
        if self._lock_address is not None:
            return
        itemsize = array.itemsize
        storage, where = self._shadows(region), region.shadow_index(index, itemsize)
        assert storage.writer is not None
        assert storage.wrote_atomically is not None
        assert storage.first_reader is not None
        assert storage.last_reader is not None
        writers, first = storage.writer[where], storage.first_reader[where]
        last = storage.last_reader[where]
        overwrites = (writers != 0) & (writers != self._number)
        first_is_foreign = (first != 0) & (first != self._number)
        was_read = first_is_foreign | ((last != 0) & (last != self._number))
        if overwrites.any() or was_read.any():
            # Writing the value that is there already disturbs nobody.
            differs = _bits(array[index]) != _bits(stored)
            if itemsize > storage.unit:
                differs = np.repeat(differs.reshape(-1), itemsize // storage.unit)
            if (overwrites & differs).any():
                self._race(
                    region, where, overwrites & differs, writers,
                    "writes", "where program {} wrote another value",
                )  # fmt: skip
            if (was_read & differs).any():
                readers = np.where(first_is_foreign, first, last)
                self._race(
                    region,
                    where,
                    was_read & differs,
                    readers,
                    "overwrites",
                    "which program {} read",
                )
        storage.writer[where] = self._number
        storage.wrote_atomically[where] = False

    def _note_atomic(self, region: _Region, index: np.ndarray, itemsize: int) -> None:
        if self._lock_address is not None:
            return
        storage, where = self._shadows(region), region.shadow_index(index, itemsize)
        assert storage.writer is not None
        assert storage.wrote_atomically is not None
        writers = storage.writer[where]
        foreign = (writers != 0) & (writers != self._number) & ~storage.wrote_atomically[where]
        if foreign.any():
            self._race(
                region, where, foreign, writers, "updates", "which program {} stored without one"
            )
        storage.writer[where] = self._number
        storage.wrote_atomically[where] = True

    def _check_lanes_agree(
        self, region: _Region, index: np.ndarray, array: np.ndarray, stored: np.ndarray
    ) -> None:
        flat = index.reshape(-1)
        if flat.size < 2 or (flat[1:] > flat[:-1]).all():
            return
        lost = _bits(array[index]) != _bits(stored)
        if lost.any():
            raise DataRace(
                f"program {self._program} writes different values to the same element of "
                f"`{region.name}` in one store (index {int(index[lost].flat[0])})",
                **self._place(region),
                advice="Which lane wins is undefined. Are two lanes given the same offset?",
            )

    def _race(self, region: _Region, where: np.ndarray, bad: np.ndarray, others: np.ndarray,
              verb: str, other_did: str) -> NoReturn:  # fmt: skip
        at = int(np.flatnonzero(bad)[0])
        _, ny, nz = self._grid
        rest, z = divmod(int(others.flat[at]) - 1, nz)
        x, y = divmod(rest, ny)
        first = int(where.flat[at]) * region.storage.unit - region.offset
        raise DataRace(
            f"program {self._program} {verb} {_count(int(bad.sum()))} of `{region.name}`, "
            f"{other_did.format((x, y, z))} in the same launch "
            f"(first at index {first // region.info.itemsize})",
            **self._place(region),
            advice=_OWN_PROGRAMS_RUN_TOGETHER,
        )

    # Small things.

    def _masked_value(self, element: Any) -> float | int:
        """What a masked lane holds when the kernel gave no `other`: a GPU leaves it undefined."""
        if not self.guard or not element.is_floating():
            return 0
        if element.is_bf16():
            return _NAN_BITS["bf16"]
        return 0 if element.is_fp8() else math.nan

    def _place(self, region: _Region | None = None) -> dict[str, Any]:
        line, source = self._learner_line()
        return {
            "kernel": self.kernel,
            "program": self._program,
            "tensor": region.name if region else None,
            "line": line,
            "source": source,
        }

    def _trace(self, kind: AccessKind, region: _Region, index: np.ndarray, shape: tuple[int, ...],
               element: Any, itemsize: int) -> None:  # fmt: skip
        if self._record is None:
            return
        start, stop = int(index.min()), int(index.max()) + 1
        if itemsize != region.info.itemsize:
            # Through a cast pointer: count in the tensor's own elements all the same.
            own = region.info.itemsize
            start, stop = start * itemsize // own, -(-stop * itemsize // own)
        self._append(kind, region.name, start, stop, index.size, index.size * itemsize, shape,
                     element)  # fmt: skip

    def _trace_nothing(self, kind: AccessKind, pointers: np.ndarray, element: Any) -> None:
        if self._record is None or pointers.size == 0:
            return
        region = self._regions.get(int(pointers.flat[0]) >> _REGION_BITS)
        if region is not None:
            self._append(kind, region.name, 0, 0, 0, 0, pointers.shape, element)

    def _append(self, kind: AccessKind, name: str, start: int, stop: int, elements: int,
                nbytes: int, shape: tuple[int, ...], element: Any) -> None:  # fmt: skip
        assert self._record is not None
        line, _ = self._learner_line()
        # The interpreter holds a scalar as an array of one element.
        shape = () if shape == (1,) else tuple(shape)
        self._record(
            Access(
                self._program,
                kind,
                name,
                start,
                stop,
                elements,
                nbytes,
                shape,
                line or 0,
                str(element),
            )  # fmt: skip
        )


def _span(tensor: torch.Tensor) -> int:
    """Elements from the first to the last of a view, both included; 0 where there is none."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def _members(tensor: torch.Tensor, span: int) -> np.ndarray | None:
    if tensor.numel() == 0 or tensor.is_contiguous():
        return None
    members = torch.zeros(span, dtype=torch.bool)
    members.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return None if bool(members.all()) else members.numpy()


def _bits(values: np.ndarray) -> np.ndarray:
    """Values as unsigned integers, so that NaN equals itself and 0.0 differs from -0.0."""
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def _scalar(values: np.ndarray) -> int | float | None:
    return values.reshape(-1)[0].item() if values.size == 1 else None


def _count(n: int) -> str:
    return f"{n} element" if n == 1 else f"{n} elements"
