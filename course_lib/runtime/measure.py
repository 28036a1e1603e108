"""Measure what a piece of PyTorch costs: memory, saved tensors, time, FLOPs, and the machine.

Memory is counted from the operators themselves, so it means the same on a CPU and on a GPU: bytes
of tensors made inside the block, not what an allocator holds in reserve.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

__all__ = [
    "MemoryMeasure",
    "Roofline",
    "SavedForBackward",
    "SavedTensor",
    "Timing",
    "count_flops",
    "measure_memory",
    "roofline",
    "saved_for_backward",
    "time_interleaved",
]


_FALLBACK_L2_BYTES = 128 << 20


# Memory.


class MemoryMeasure(TorchDispatchMode):
    """Bytes of tensors made inside a block; see :func:`measure_memory`.

    Attributes:
        live_bytes: Bytes alive now of storages made inside. After the block it still falls, as
            results die.
        peak_bytes: The most that were alive at once.
        largest_bytes: The largest storage made inside.
        largest_shape: Shape of the tensor it was made for.
        largest_op: The operator that made it, such as ``"aten::mm"``.
        ops: How often each operator ran, backward included.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Otherwise the first use imports the compiler, which takes seconds. Nothing is compiled
        # inside a measurement.
        return False

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self.largest_bytes = 0
        self.largest_shape: tuple[int, ...] = ()
        self.largest_op: str | None = None
        self.ops: Counter[str] = Counter()
        # By identity of the storage's C++ object, since views share it. An entry goes when the
        # storage does, so that an identity used again is a new storage.
        self._inside: dict[int, int] = {}
        self._outside: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator and count the storages it made."""
        kwargs = kwargs or {}
        # What an operator receives before any operator made it comes from outside the block.
        for tensor in _tensors((args, kwargs)):
            self._note_outside(tensor.untyped_storage())
        result = self._run(func, args, kwargs)
        name = func._schema.name
        self.ops[name] += 1
        for tensor in _tensors(result):
            self._note_made(tensor, name)
        return result

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        first = next(iter(_tensors((args, kwargs))), None)
        if func.namespace == "aten" or first is None or first.device.type not in ("cpu", "cuda"):
            return func(*args, **kwargs)
        # The body of a custom operator may be Python that calls other operators. PyTorch leaves
        # modes off in there; straight to the device's kernel, this one stays on and sees them.
        device_keys = torch._C.DispatchKeySet(
            torch._C.DispatchKey.CPU if first.device.type == "cpu" else torch._C.DispatchKey.CUDA
        )
        with self:
            return func.redispatch(device_keys, *args, **kwargs)

    def _note_outside(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._inside and key not in self._outside:
            self._outside.add(key)
            _when_freed(storage, self._outside.discard, key)

    def _note_made(self, tensor: torch.Tensor, op: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._outside:
            return
        size = storage.nbytes()
        if key not in self._inside:
            _when_freed(storage, self._forget, key)
        # The difference, for `resize_` and `out=` make a storage grow.
        self.live_bytes += size - self._inside.get(key, 0)
        self._inside[key] = size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if size > self.largest_bytes:
            self.largest_bytes, self.largest_op = size, op
            self.largest_shape = tuple(tensor.shape)

    def _forget(self, key: int) -> None:
        self.live_bytes -= self._inside.pop(key, 0)


@contextmanager
def measure_memory() -> Iterator[MemoryMeasure]:
    """Count the memory of tensors that are made inside the block.

    Counted by storage: views cost nothing, an in-place operator costs nothing, and a storage stops
    counting when the last tensor or autograd node that holds it lets go. Inputs made before the
    block are not counted. What an operator uses internally is invisible, unless it is a custom
    operator written in Python. It means the same on every device, and keeps no tensor alive.
    """
    with MemoryMeasure() as measure:
        yield measure


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One storage that autograd keeps for the backward pass.

    Attributes:
        shape: Shape of the first tensor saved from it.
        dtype: Its element type.
        nbytes: Bytes of the whole storage, which is what stays allocated.
        is_input: Whether it exists anyway, as a parameter or an input that was named.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    nbytes: int
    is_input: bool


@dataclass(slots=True)
class SavedForBackward:
    """What autograd kept inside a block; see :func:`saved_for_backward`."""

    tensors: list[SavedTensor] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        """All bytes kept, each storage once."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def activation_bytes(self) -> int:
        """Bytes kept only for the sake of the backward pass."""
        return sum(tensor.nbytes for tensor in self.tensors if not tensor.is_input)


@contextmanager
def saved_for_backward(*inputs: torch.Tensor | torch.nn.Module) -> Iterator[SavedForBackward]:
    """Record what a forward pass saves for its backward pass.

    Args:
        inputs: Tensors, and modules with their parameters and buffers, that exist anyway; what is
            saved of them is marked, and is no part of ``activation_bytes``.

    Yields:
        The record. It holds sizes, not tensors.
    """
    saved = SavedForBackward()
    known = {tensor.untyped_storage()._cdata for tensor in _tensors_of(inputs)}
    seen: set[int] = set()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in seen:
            seen.add(key)
            _when_freed(storage, seen.discard, key)
            saved.tensors.append(
                SavedTensor(tuple(tensor.shape), tensor.dtype, storage.nbytes(), key in known)
            )
        # Returned as it came, a saved output would hold the node that holds it, and never die.
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor))


def _tensors_of(inputs: Sequence[torch.Tensor | torch.nn.Module]) -> Iterator[torch.Tensor]:
    for each in inputs:
        if isinstance(each, torch.nn.Module):
            yield from each.parameters()
            yield from each.buffers()
        else:
            yield each


def _when_freed(storage: torch.UntypedStorage, call: Callable[[int], Any], key: int) -> None:
    weakref.finalize(storage, call, key).atexit = False


# Time.


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: median, 20th and 80th percentile, and the number of calls measured."""

    median: float
    p20: float
    p80: float
    n: int


def time_interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 7,
    warmup: int = 1,
    threads: int = 1,
    device: str | torch.device = "cpu",
) -> dict[str, Timing]:
    """Time several functions against each other, fairly.

    They take turns, in an order that rotates from round to round, so that a machine that slows
    down slows all of them. On a GPU each call is timed by events, after its L2 cache was flushed
    and while it is kept busy for half a millisecond, which hides the time of the host's launch.

    Args:
        functions: What to call, by name.
        repeats: Rounds that are measured.
        warmup: Rounds before that, which are not.
        threads: Threads that PyTorch may use on the CPU during the measurement.
        device: Where the functions work.

    Returns:
        A timing for each name, in seconds.

    Raises:
        ValueError: ``repeats`` or ``threads`` is below 1, or ``warmup`` below 0.
    """
    if repeats < 1 or warmup < 0 or threads < 1:
        raise ValueError(
            "repeats and threads must be at least 1 and warmup at least 0, got "
            f"repeats={repeats}, threads={threads}, warmup={warmup}"
        )
    on_gpu = torch.device(device).type == "cuda"
    timer = _gpu_timer(torch.device(device)) if on_gpu else _seconds_on_cpu
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with _cpu_threads(threads):
        for _ in range(warmup):
            for name in names:
                timer(functions[name])
        for turn in range(repeats):
            start = turn % max(len(names), 1)
            for name in names[start:] + names[:start]:
                seconds[name].append(timer(functions[name]))
    return {name: _summary(times) for name, times in seconds.items()}


def _seconds_on_cpu(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


_HEAD_START_CYCLES = 1_000_000  # about half a millisecond


def _gpu_timer(device: torch.device) -> Callable[[Callable[[], object]], float]:
    properties = torch.cuda.get_device_properties(device)
    l2_bytes = getattr(properties, "L2_cache_size", 0) or _FALLBACK_L2_BYTES
    flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def seconds(function: Callable[[], object]) -> float:
        with torch.cuda.device(device):
            flush.zero_()
            # The GPU waits while the host launches, so that what Python costs is not counted.
            torch.cuda._sleep(_HEAD_START_CYCLES)
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            function()
            stop.record()
            stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    return seconds


@contextmanager
def _cpu_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _summary(times: Sequence[float]) -> Timing:
    ordered = sorted(times)
    return Timing(
        median=statistics.median(ordered),
        p20=_percentile(ordered, 0.2),
        p80=_percentile(ordered, 0.8),
        n=len(ordered),
    )


def _percentile(ordered: Sequence[float], fraction: float) -> float:
    """Linear interpolation between the two nearest of a sorted sequence."""
    position = fraction * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


# Work, and what a machine could do.


def count_flops(function: Callable[[], object]) -> int:
    """FLOPs of the matrix products, convolutions and attention in a call, backward included.

    A multiplication and an addition are two. Elementwise work counts as nothing, as is the custom.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        function()
    return counter.get_total_flops()


@dataclass(frozen=True, slots=True)
class Roofline:
    """The two speeds that bound every kernel on a machine.

    Attributes:
        bytes_per_second: Of memory traffic: a copy of n bytes moves 2 n.
        flops_per_second: Of a large matrix product.
        device: Where it was measured.
        dtype: Element type of the matrix product.
        threads: CPU threads in use.
    """

    bytes_per_second: float
    flops_per_second: float
    device: str
    dtype: torch.dtype
    threads: int

    @property
    def ridge(self) -> float:
        """FLOPs per byte from which on a kernel is bound by arithmetic, not by memory."""
        return self.flops_per_second / self.bytes_per_second

    def attainable(self, intensity: float) -> float:
        """FLOPs per second that a kernel of so many FLOPs per byte can reach at best."""
        return min(self.flops_per_second, intensity * self.bytes_per_second)

    def seconds(self, *, nbytes: float, flops: float) -> float:
        """Time that moving so many bytes and doing so many FLOPs takes at least."""
        return max(nbytes / self.bytes_per_second, flops / self.flops_per_second)


def roofline(device: str | torch.device = "cpu", *, threads: int = 1) -> Roofline:
    """Measure this machine's memory bandwidth and arithmetic, in well under two seconds.

    Args:
        device: ``"cpu"``, or a CUDA device.
        threads: CPU threads to use.

    Returns:
        The best of a few runs of a copy that no cache holds, and of a matrix product, in float32
        on a CPU and in half precision on a GPU.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        nbytes, size = 1 << 30, 8192
        has_bfloat16 = torch.cuda.get_device_capability(device)[0] >= 8
        dtype = torch.bfloat16 if has_bfloat16 else torch.float16
    else:
        nbytes, size, dtype = 64 << 20, 640, torch.float32

    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a = torch.ones(size, size, dtype=dtype, device=device)
    product = torch.empty_like(a)
    functions: dict[str, Callable[[], object]] = {
        "copy": lambda: target.copy_(source),
        "matmul": lambda: torch.mm(a, a, out=product),
    }
    # A roof is what the machine can do, so the best run counts, not the median.
    best = _best_seconds(functions, device, threads)
    return Roofline(
        bytes_per_second=2 * nbytes / best["copy"],
        flops_per_second=2 * size**3 / best["matmul"],
        device=str(device),
        dtype=dtype,
        threads=threads,
    )


def _best_seconds(
    functions: Mapping[str, Callable[[], object]], device: torch.device, threads: int
) -> dict[str, float]:
    timer = _gpu_timer(device) if device.type == "cuda" else _seconds_on_cpu
    with _cpu_threads(threads):
        for function in functions.values():
            timer(function)
        return {
            name: min(timer(function) for _ in range(5)) for name, function in functions.items()
        }
