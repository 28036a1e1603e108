"""What this machine can do: asked on the first call, never at import."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from course_lib.runtime.tile import HAS_TRITON, TRITON_MISSING

__all__ = [
    "DeviceReport",
    "Gpu",
    "Missing",
    "capability",
    "default_device",
    "device_report",
    "supports_triton",
]

# Triton's NVIDIA backend supports these; below Ampere it does not use the tensor cores for tl.dot.
_TRITON_CAPABILITY = (7, 5)
_TRITON_DOT_CAPABILITY = (8, 0)

# Packages of the "in the wild" sections: import name, and the name that pip knows.
_WILD_PACKAGES = {
    "transformers": "transformers",
    "sklearn": "scikit-learn",
    "skimage": "scikit-image",
}


@dataclass(frozen=True, slots=True)
class Gpu:
    """One NVIDIA GPU.

    Attributes:
        name: As the driver calls it.
        capability: Compute capability, such as ``(9, 0)`` for sm_90.
        memory_bytes: All of its memory.
    """

    name: str
    capability: tuple[int, int]
    memory_bytes: int

    @property
    def arch(self) -> str:
        """NVIDIA's name of the architecture, such as ``"sm_90"``."""
        major, minor = self.capability
        return f"sm_{major}{minor}"


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that this machine lacks.

    Attributes:
        what: The thing.
        cost: What the course cannot do without it.
        remedy: What to do about it; empty where there is nothing to do.
    """

    what: str
    cost: str
    remedy: str = ""


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """This machine, as far as the course cares.

    Attributes:
        python: Version of Python.
        torch: Version of PyTorch.
        triton: Version of Triton, None where it cannot be imported.
        gpu: The current GPU, None where PyTorch can use none.
        gpu_count: GPUs that PyTorch can use.
        kernels: How Triton kernels run: ``"compiled"`` for the GPU, ``"interpreted"`` on the CPU,
            or ``"unavailable"``.
        cpu_count: CPU cores that this process may use.
        ram_bytes: Memory that this process may use; None where the system does not say.
        disk_free_bytes: Free disk space under the current directory.
        missing: What is missing, what that costs, and what to do.
    """

    python: str
    torch: str
    triton: str | None
    gpu: Gpu | None
    gpu_count: int
    kernels: Literal["compiled", "interpreted", "unavailable"]
    cpu_count: int
    ram_bytes: int | None
    disk_free_bytes: int
    missing: tuple[Missing, ...]

    def lines(self) -> list[str]:
        """The report for a reader, in at most three lines."""
        parts = [f"Python {self.python}", f"PyTorch {self.torch}"]
        if self.triton:
            parts.append(f"Triton {self.triton}")
        parts.append(f"{self.cpu_count} CPU core{'s' * (self.cpu_count != 1)}")
        if self.ram_bytes is not None:
            parts.append(f"{_gib(self.ram_bytes)} memory")
        parts.append(f"{_gib(self.disk_free_bytes)} free disk")
        lines = [", ".join(parts), self._kernel_line()]
        if self.missing:
            lines.append("Missing: " + "; ".join(f"{m.what} ({m.cost})" for m in self.missing))
        return lines

    def _kernel_line(self) -> str:
        if self.gpu is None:
            where = "No GPU"
        else:
            count = f"{self.gpu_count} x " if self.gpu_count > 1 else ""
            memory = _gib(self.gpu.memory_bytes)
            where = f"GPU: {count}{self.gpu.name} ({self.gpu.arch}, {memory})"
        how = {
            "compiled": "Triton kernels are compiled for it",
            "interpreted": "Triton kernels run on the CPU under the interpreter, right but slow",
            "unavailable": "Triton kernels do not run here, everything else does",
        }
        return f"{where}: {how[self.kernels]}."


@functools.cache
def device_report() -> DeviceReport:
    """Look at this machine, once; later calls return the same report."""
    with warnings.catch_warnings(record=True) as caught:
        # PyTorch explains in a warning why it cannot use a GPU that is there.
        warnings.simplefilter("always")
        gpu_count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    complaint = str(caught[0].message).splitlines()[0] if caught and not gpu_count else None
    gpu = None
    if gpu_count:
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        gpu = Gpu(properties.name, (properties.major, properties.minor), properties.total_memory)
    if not HAS_TRITON:
        kernels = "unavailable"
    else:
        compiled = gpu is not None and gpu.capability >= _TRITON_CAPABILITY
        kernels = "compiled" if compiled else "interpreted"
    return DeviceReport(
        python=platform.python_version(),
        torch=torch.__version__,
        triton=importlib.metadata.version("triton") if HAS_TRITON else None,
        gpu=gpu,
        gpu_count=gpu_count,
        kernels=kernels,
        cpu_count=_cpu_count(),
        ram_bytes=_ram_bytes(),
        disk_free_bytes=shutil.disk_usage(Path.cwd()).free,
        missing=tuple(_missing(gpu, complaint)),
    )


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability(device: str | torch.device) -> tuple[int, int] | None:
    """Compute capability of a CUDA device, such as ``(9, 0)``; None for any other device.

    Raises:
        RuntimeError: The device is a CUDA device that PyTorch cannot use.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    return _capability(index)


def supports_triton(device: str | torch.device, *, dot_heavy: bool = False) -> bool:
    """Whether compiled Triton kernels run, and run well, on a device.

    Args:
        device: Where the tensors are.
        dot_heavy: The kernel lives on ``tl.dot``. Before Ampere (sm_80), on a T4 for one, Triton
            does not use the tensor cores for it, so such an op is better off in PyTorch there.
    """
    found = capability(device) if HAS_TRITON else None
    needed = _TRITON_DOT_CAPABILITY if dot_heavy else _TRITON_CAPABILITY
    return found is not None and found >= needed


def default_device() -> torch.device:
    """Where a notebook puts its tensors: the GPU if PyTorch can use one, else the CPU."""
    return torch.device("cuda" if device_report().gpu is not None else "cpu")


def _missing(gpu: Gpu | None, complaint: str | None) -> list[Missing]:
    missing = []
    if not HAS_TRITON:
        missing.append(
            Missing(
                "Triton",
                f"no kernel cell runs: {TRITON_MISSING}",
                "Use Linux, WSL 2, Colab or a container, then `pip install triton`.",
            )
        )
    if gpu is None and _has_nvidia_gpu():
        # A GPU that lies idle is worth a word; a machine without one needs none.
        built_for_cuda = torch.version.cuda is not None
        reason = complaint or "the driver does not answer, or the GPUs are hidden"
        missing.append(
            Missing(
                "use of the NVIDIA GPU that is here",
                reason if built_for_cuda else "this PyTorch is built for CPUs only",
                "Run nvidia-smi, and look at CUDA_VISIBLE_DEVICES."
                if built_for_cuda
                else "Install PyTorch for CUDA: https://pytorch.org/get-started/locally",
            )
        )
    if gpu is not None and HAS_TRITON and not _has_c_compiler():
        missing.append(
            Missing(
                "a C compiler",
                "Triton needs one to launch on the GPU",
                "Install gcc, as with `apt install gcc`, or set CC.",
            )
        )
    wild = [pip for name, pip in _WILD_PACKAGES.items() if importlib.util.find_spec(name) is None]
    if wild:
        missing.append(
            Missing(
                ", ".join(wild),
                'for some "in the wild" sections only',
                f"pip install {' '.join(wild)}",
            )
        )
    return missing


def _has_nvidia_gpu() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def _has_c_compiler() -> bool:
    return any(shutil.which(name) for name in (os.environ.get("CC") or "", "gcc", "clang", "cc"))


def _cpu_count() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _ram_bytes() -> int | None:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
    # A container may have less than its machine.
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.0f} GiB"
