"""Tensor arguments as an interpreted kernel sees them: made-up addresses over real bytes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from course_lib.runtime.races import Shadow
from course_lib.runtime.trace import TensorInfo

__all__ = ["HALF_REGION", "REGION_BITS", "Pointer", "Region", "Regions", "Storage"]

# Each tensor argument has 16 TiB of addresses, and its storage begins in the middle of them: the
# upper bits of a pointer say which argument it came from, however far off it is.
REGION_BITS = 44
HALF_REGION = 1 << (REGION_BITS - 1)
# Above every address a process can have, so that a real address never looks like one of ours.
_FIRST_REGION = 1 << (62 - REGION_BITS)


class Pointer:
    """What stands for a tensor argument when Triton makes a typed pointer of it."""

    def __init__(self, dtype: Any, address: int) -> None:
        self.dtype = dtype
        self._address = address

    def data_ptr(self) -> int:
        """The made-up address of the first element."""
        return self._address


@dataclass(slots=True)
class Storage:
    """The bytes behind one or more tensor arguments.

    Attributes:
        host: All bytes, as a uint8 tensor on the CPU that shares memory with the argument where
            that lives on the CPU too.
        bytes: The same, as an array.
        device_storage: What to copy back to after the launch; None on the CPU.
        unit: Bytes that one entry of the shadow stands for: the smallest element size in use.
        written: Whether this launch wrote to it.
    """

    host: torch.Tensor
    bytes: np.ndarray
    device_storage: torch.UntypedStorage | None
    unit: int = 16
    written: bool = False
    _shadow: Shadow | None = None

    @property
    def shadow(self) -> Shadow:
        """Who touched what, made when it is first needed."""
        if self._shadow is None:
            self._shadow = Shadow(self.bytes.size // self.unit + 1)
        return self._shadow

    def copy_back(self) -> None:
        """Copy what the kernel wrote to the device that the tensor lives on."""
        if self.written and self.device_storage is not None:
            self.device_storage.copy_(self.host.untyped_storage())


@dataclass(slots=True)
class Region:
    """One tensor argument.

    Attributes:
        name: Its name in messages and traces.
        address: Made-up address of its first element.
        storage: The bytes it is a view of.
        offset: Bytes from the start of the storage to the first element.
        nbytes: Bytes from the start of the first element to the end of the last.
        info: Shape, strides and element type.
        members: For a view with holes, which elements of its span belong to it; else None.
    """

    name: str
    address: int
    storage: Storage
    offset: int
    nbytes: int
    info: TensorInfo
    members: np.ndarray | None
    _arrays: dict[np.dtype, np.ndarray] = field(default_factory=dict)

    def array(self, dtype: np.dtype) -> np.ndarray:
        """The span as a flat array of `dtype` that shares memory with the storage."""
        if dtype not in self._arrays:
            usable = self.nbytes - self.nbytes % dtype.itemsize
            self._arrays[dtype] = self.storage.bytes[self.offset :][:usable].view(dtype)
        return self._arrays[dtype]

    def shadow_entries(self, index: np.ndarray, itemsize: int) -> np.ndarray:
        """Entries of the storage's shadow that elements of `itemsize` bytes occupy."""
        first = (index * itemsize + self.offset) // self.storage.unit
        per_element = itemsize // self.storage.unit
        if per_element <= 1:
            return first
        return first.reshape(-1, 1) + np.arange(per_element)

    def index_of_entry(self, entry: int) -> int:
        """Element of this tensor that an entry of the storage's shadow lies in."""
        return (entry * self.storage.unit - self.offset) // self.info.itemsize


class Regions:
    """The tensor arguments of one launch."""

    def __init__(self) -> None:
        self._by_number: dict[int, Region] = {}
        self._storages: dict[tuple[torch.device, int], Storage] = {}

    def add(self, name: str, argument: Any) -> Pointer:
        """Register an argument and give the pointer that the kernel receives.

        Args:
            name: The kernel's name for it.
            argument: A ``torch.Tensor`` with memory, on any device, or ``triton.reinterpret`` of
                one.

        Raises:
            TypeError: It is no tensor.
            ValueError: It has no memory.
        """
        tensor = getattr(argument, "base", argument)
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.device.type == "meta" or tensor.layout != torch.strided:
            raise ValueError(
                f"`{name}` has no memory to point to: {tensor.device} device, {tensor.layout}"
            )
        itemsize = tensor.element_size()
        storage = self._storage_of(tensor)
        storage.unit = min(storage.unit, itemsize)
        span = _span(tensor)
        offset = int(tensor.storage_offset()) * itemsize
        number = _FIRST_REGION + len(self._by_number)
        # With the offset, the pointer is aligned as on a GPU, where storages begin on 256 bytes.
        address = (number << REGION_BITS) + HALF_REGION + offset
        dtype = str(tensor.dtype).removeprefix("torch.")
        info = TensorInfo(tuple(tensor.shape), tuple(tensor.stride()), dtype, itemsize)
        self._by_number[number] = Region(
            name, address, storage, offset, span * itemsize, info, _members(tensor, span)
        )
        return Pointer(argument.dtype, address)

    def of_address(self, address: int) -> Region | None:
        """The argument that an address, inside its bounds or not, was derived from."""
        return self._by_number.get(address >> REGION_BITS)

    def infos(self) -> dict[str, TensorInfo]:
        """Layouts by name."""
        return {region.name: region.info for region in self._by_number.values()}

    def copy_back(self) -> None:
        """Copy what the kernel wrote to the devices that the tensors live on."""
        for storage in self._storages.values():
            storage.copy_back()

    def _storage_of(self, tensor: torch.Tensor) -> Storage:
        storage = tensor.untyped_storage()
        key = (tensor.device, storage.data_ptr())
        if key not in self._storages:
            on_cpu = tensor.device.type == "cpu"
            host = torch.empty(0, dtype=torch.uint8)
            host.set_(storage if on_cpu else storage.cpu())  # pyright: ignore[reportArgumentType]
            self._storages[key] = Storage(host, host.numpy(), None if on_cpu else storage)
        return self._storages[key]


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
