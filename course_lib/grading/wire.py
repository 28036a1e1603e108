"""What crosses between the grader and the child that runs a student's code: bytes, and no objects.

A frame is a length-prefixed JSON header and a safetensors blob. Nothing is pickled, imported or
evaluated on the way. The grader reads frames that a hostile process may have written: sizes are
capped before anything is read, and whatever is not exactly of this form is a `WireError`.
"""

from __future__ import annotations

import json
import math
import re
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import load as _load_tensors
from safetensors.torch import save as _save_tensors

MAX_HEADER = 4 << 20
"""Most bytes of JSON in one frame."""
MAX_BLOB = 512 << 20
"""Most bytes of tensors in one frame."""
MAX_DEPTH = 32
MAX_NODES = 200_000
MAX_TEXT = 100_000
MAX_DIMENSIONS = 32
_LENGTHS = struct.Struct(">4sIQ")
_MAGIC = b"CGW1"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,79}")


class WireError(ValueError):
    """A frame, or a value in it, is not of the form that this module writes."""


class Closed(ConnectionError):
    """The other side is gone."""


class Opaque:
    """Stands for a value that cannot cross: it has its type's name and nothing else."""

    @staticmethod
    def named(module: str, name: str) -> Any:
        """An instance of a fresh type that carries the names of the original one."""
        return type(name, (Opaque,), {"__module__": module})()

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


class RemoteCallable:
    """Stands for a function or a class that lives in the child."""

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: it is called where it lives."""
        raise TypeError(f"{self.__name__} lives in another process")


# Frames.


def send(sock: socket.socket, header: dict[str, Any], blob: bytes = b"") -> None:
    """Write one frame.

    Raises:
        Closed: If the other side is gone.
        WireError: If the frame is larger than the other side accepts.
    """
    text = json.dumps(header, separators=(",", ":")).encode()
    if len(text) > MAX_HEADER or len(blob) > MAX_BLOB:
        raise WireError(f"a frame of {len(text):,} + {len(blob):,} bytes is too large")
    try:
        sock.sendall(_LENGTHS.pack(_MAGIC, len(text), len(blob)) + text)
        if blob:
            sock.sendall(blob)
    except (BrokenPipeError, ConnectionResetError) as error:
        raise Closed("the other side is gone") from error


def receive(
    sock: socket.socket,
    *,
    deadline: float | None = None,
    watch: Callable[[], None] | None = None,
    max_blob: int = MAX_BLOB,
) -> tuple[dict[str, Any], bytes]:
    """Read one frame.

    Args:
        sock: A connected stream socket.
        deadline: `time.monotonic()` at which waiting ends.
        watch: Called at least every 50 ms while waiting; what it raises ends the wait.
        max_blob: Most bytes of tensors that are taken.

    Raises:
        Closed: If the other side is gone.
        TimeoutError: At the deadline.
        WireError: If it is not a frame, or too large.
    """
    magic, header_size, blob_size = _LENGTHS.unpack(
        _read(sock, _LENGTHS.size, deadline=deadline, watch=watch)
    )
    if magic != _MAGIC:
        raise WireError("it is not a frame")
    if header_size > MAX_HEADER or blob_size > max_blob:
        raise WireError(f"a frame of {header_size:,} + {blob_size:,} bytes is too large")
    text = _read(sock, header_size, deadline=deadline, watch=watch)
    blob = _read(sock, blob_size, deadline=deadline, watch=watch)
    try:
        header = json.loads(bytes(text))
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise WireError("the header is not an object")
    return header, bytes(blob)


def _read(
    sock: socket.socket,
    size: int,
    *,
    deadline: float | None,
    watch: Callable[[], None] | None,
) -> bytearray:
    # Grown as bytes arrive: the length that was announced costs nothing before they do.
    data = bytearray()
    try:
        while len(data) < size:
            if watch is not None:
                watch()
            step = 0.05 if watch is not None else None
            if deadline is not None:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError("no answer in time")
                step = left if step is None else min(step, left)
            sock.settimeout(step)
            try:
                part = sock.recv(min(size - len(data), 1 << 20))
            except TimeoutError:
                continue
            if not part:
                raise Closed("the other side is gone")
            data += part
    except (ConnectionResetError, BrokenPipeError) as error:
        raise Closed("the other side is gone") from error
    finally:
        sock.settimeout(None)
    return data


# Values.


def pack(value: Any) -> tuple[Any, bytes]:
    """A tree of plain data as JSON and a blob. Strides and offsets of tensors are kept.

    What is not plain data becomes its type's name. Tensors go to the CPU, detached.

    Args:
        value: Tensors, numbers, text, `None`, `...`, and lists, tuples and dicts of these.

    Raises:
        WireError: If the tree is too deep or too large.
    """
    packer = _Packer()
    tree = packer.tree(value, 0)
    return tree, _save_tensors(packer.tensors) if packer.tensors else b""


class _Packer:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.nodes = 0

    def tree(self, value: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise WireError("a value is nested too deeply, or has too many parts")
        kind = type(value)
        if value is None or kind in (bool, float):
            return value
        if kind is int:
            return value if value.bit_length() < 1024 else {"opaque": ["builtins", "int"]}
        if kind is str:
            return value[:MAX_TEXT].encode("utf-8", "replace").decode()
        if value is Ellipsis:
            return {"ellipsis": True}
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, list | tuple):
            name = "list" if isinstance(value, list) else "tuple"
            return {name: [self.tree(each, depth + 1) for each in value]}
        if isinstance(value, dict):
            pairs = value.items()
            return {"dict": [[self.tree(k, depth + 1), self.tree(v, depth + 1)] for k, v in pairs]}
        if kind.__module__ == "numpy" and not getattr(value, "ndim", 1):
            return self.tree(value.item(), depth + 1)
        if isinstance(value, bool | int | float | str):
            # A subclass may say anything of itself; its plain value is asked of the base class.
            base: Any = next(each for each in (int, float, str) if isinstance(value, each))
            return self.tree(base.__new__(base, value), depth + 1)
        if callable(value):
            return {"callable": _name(getattr(value, "__name__", kind.__name__))}
        return {"opaque": [_name(kind.__module__), _name(kind.__name__)]}

    def tensor(self, tensor: torch.Tensor) -> Any:
        tensor = tensor.detach().requires_grad_(False) if tensor.requires_grad else tensor.detach()
        plain = tensor.layout is torch.strided and tensor.device.type in ("cpu", "cuda")
        if not plain or tensor.is_quantized:
            return {"opaque": ["torch", "Tensor"]}
        tensor = tensor.cpu().resolve_conj().resolve_neg()
        is_complex = tensor.is_complex()
        if is_complex:
            tensor = torch.view_as_real(tensor)
        if not tensor.numel():
            tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
        start = int(tensor.storage_offset())
        first, last = _extent(list(tensor.shape), list(tensor.stride()), start)
        node: dict[str, Any] = {
            "shape": list(tensor.shape),
            "stride": list(tensor.stride()),
            "offset": start - first,
        }
        key = str(len(self.tensors))
        self.tensors[key] = tensor.as_strided((last - first,), (1,), first).clone()
        node["tensor"] = key
        if is_complex:
            node["complex"] = True
        return node


def unpack(tree: Any, blob: bytes, *, strict: bool = False) -> Any:
    """What `pack` packed.

    Args:
        tree: Its JSON.
        blob: Its tensors.
        strict: For frames of a process that is not trusted: tensors must be contiguous, so that a
            few bytes cannot claim to be an enormous tensor.

    Raises:
        WireError: If it is not of the form that `pack` writes.
    """
    try:
        tensors = _load_tensors(blob) if blob else {}
    except Exception as error:
        # The reader raises a type of its own for each of the many ways to be no safetensors.
        raise WireError(f"the tensors cannot be read: {type(error).__name__}") from None
    return _Unpacker(tensors, strict).value(tree, 0)


class _Unpacker:
    def __init__(self, tensors: dict[str, torch.Tensor], strict: bool) -> None:
        self.tensors, self.strict, self.nodes = tensors, strict, 0

    def value(self, tree: Any, depth: int) -> Any:
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise WireError("a value is nested too deeply, or has too many parts")
        if tree is None or isinstance(tree, bool | int | float):
            return tree
        if isinstance(tree, str):
            if len(tree) > MAX_TEXT:
                raise WireError("a text is too long")
            return tree
        if not isinstance(tree, dict):
            raise WireError(f"a bare {type(tree).__name__}")
        if "tensor" in tree:
            return self.tensor(tree)
        if len(tree) != 1:
            raise WireError(f"a node with the names {sorted(tree)[:5]}")
        (name, content), *_ = tree.items()
        if name == "ellipsis" and content is True:
            return ...
        if name == "callable":
            return RemoteCallable(_name(content))
        if name == "opaque" and isinstance(content, list) and len(content) == 2:
            return Opaque.named(_name(content[0]), _name(content[1]))
        if name in ("list", "tuple") and isinstance(content, list):
            values = [self.value(each, depth + 1) for each in content]
            return values if name == "list" else tuple(values)
        if name == "dict" and isinstance(content, list):
            return dict(self.pair(each, depth + 1) for each in content)
        raise WireError(f"an unknown node {name[:40]!r}")

    def pair(self, pair: Any, depth: int) -> tuple[Any, Any]:
        if not isinstance(pair, list) or len(pair) != 2:
            raise WireError("a dict's item is not a pair")
        key = self.value(pair[0], depth)
        if not isinstance(key, str | int | float | bool | type(None)):
            raise WireError("a dict's key is not plain")
        return key, self.value(pair[1], depth)

    def tensor(self, node: dict[str, Any]) -> torch.Tensor:
        if not set(node) <= {"tensor", "shape", "stride", "offset", "complex"}:
            raise WireError("a tensor with unknown properties")
        shape, stride = (_extents(node.get(name)) for name in ("shape", "stride"))
        offset = node.get("offset")
        key = node["tensor"]
        if not isinstance(key, str) or key not in self.tensors or len(shape) != len(stride):
            raise WireError("a tensor without its bytes, or with half a shape")
        if type(offset) is not int or offset < 0:
            raise WireError("a tensor's offset is no offset")
        flat = self.tensors[key]
        if flat.ndim != 1:
            raise WireError("a tensor's bytes are not flat")
        if self.strict:
            if offset != 0 or math.prod(shape) != flat.numel():
                raise WireError("a tensor's shape and its bytes differ")
            tensor = flat.reshape(shape)
        else:
            _, last = _extent(shape, stride, offset)
            if math.prod(shape) and last > flat.numel():
                raise WireError("a tensor reaches beyond its bytes")
            tensor = flat.clone().as_strided(shape, stride, offset)
        if "complex" in node:
            if node["complex"] is not True or not shape or shape[-1] != 2:
                raise WireError("a complex tensor without pairs")
            if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
                raise WireError(f"complex numbers made of {tensor.dtype}")
            tensor = torch.view_as_complex(tensor.clone())
        return tensor


def plain(value: Any) -> Any:
    """The value with its tensors contiguous: what a child sends, and `strict` takes."""
    if isinstance(value, torch.Tensor) and value.layout is torch.strided:
        return value.detach().contiguous().clone()
    if isinstance(value, list):
        return [plain(each) for each in value]
    if isinstance(value, tuple):
        return tuple(plain(each) for each in value)
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    return value


def _extents(value: Any) -> list[int]:
    ok = isinstance(value, list) and len(value) <= MAX_DIMENSIONS
    if not ok or not all(type(each) is int and 0 <= each < 1 << 48 for each in value):
        raise WireError("a shape or stride that is none")
    return value


def _extent(shape: list[int], stride: list[int], offset: int) -> tuple[int, int]:
    """First and one past the last element of a storage that a view touches."""
    if not math.prod(shape):
        return offset, offset
    steps = zip(shape, stride, strict=True)
    return offset, offset + sum((n - 1) * step for n, step in steps) + 1


def _name(text: Any) -> str:
    return text if isinstance(text, str) and _NAME.fullmatch(text) else "unnamed"
