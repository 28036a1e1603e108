"""Which implementation runs, and what every launch needs to know of its tensors.

The rule stands in the docstring of ``flash_attention``; every op of the chapter follows it. It is
asked inside the registered operators, where the tensors are real.
"""

from __future__ import annotations

import contextlib
import math
from typing import Literal

import torch
from torch import Tensor

from .launches import HEAD_DIMS, table_architecture

__all__ = [
    "DTYPES",
    "Implementation",
    "alignment",
    "architecture",
    "cdiv",
    "check_implementation",
    "check_scale",
    "check_tensor",
    "check_triton_can_take",
    "computable",
    "device_of",
    "runs_triton",
]

Implementation = Literal["auto", "triton", "torch"]

IMPLEMENTATIONS = ("auto", "triton", "torch")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DTYPES = (*TRITON_DTYPES, torch.float64)
LOG2E = math.log2(math.e)
MAX_GRID_YZ = 65535  # CUDA's limit on the second and third axis of a grid


# ---- validation that the ops share ---------------------------------------------------------


def check_implementation(implementation: object) -> None:
    """Raise ValueError unless it is one of the three names."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {IMPLEMENTATIONS}, got {implementation!r}")


def check_scale(scale: float | None, head_dim: int) -> float:
    """The softmax scale as a float: 1/sqrt(head_dim) for None.

    Raises:
        TypeError, ValueError: It is not a positive, finite number.
    """
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise TypeError(f"scale must be a float or None, got {scale!r}")
    if not (scale > 0.0 and math.isfinite(scale)):
        raise ValueError(f"scale must be positive and finite, got {scale!r}")
    return float(scale)


def check_tensor(name: str, tensor: Tensor, like: Tensor, axes: str) -> None:
    """Raise unless it is a dense floating-point tensor with these axes, of q's dtype and device.

    Args:
        name: The argument, as the message should call it.
        tensor: What was given for it.
        like: q.
        axes: The layout, such as "[B, H, T, D]"; its commas count the dimensions.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    dimensions = axes.count(",") + 1
    if tensor.dim() != dimensions:
        raise ValueError(
            f"{name} must have {dimensions} dimensions {axes}, got shape {tuple(tensor.shape)}"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp16, bf16, fp32 or fp64, got {tensor.dtype}")
    if tensor.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of q, {like.dtype}, got {tensor.dtype}")
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of q, {like.device}, got {tensor.device}")


def check_triton_can_take(q: Tensor, grid: tuple[int, ...] = (1,), *, name: str = "q") -> None:
    """Raise unless the kernels take tensors like q; asked where "triton" was demanded.

    Args:
        q: [..., D], any number of axes before.
        grid: Extents that become the second and third axis of a grid.
        name: The argument, as the message should call it.
    """
    if q.dtype not in TRITON_DTYPES:
        raise TypeError(
            f'{name} must be fp16, bf16 or fp32 for implementation="triton", got {q.dtype}; '
            'fp64 runs with implementation="torch"'
        )
    if q.shape[-1] not in HEAD_DIMS:
        raise ValueError(
            f"{name} must have a head dimension of {HEAD_DIMS[0]} to {HEAD_DIMS[-1]} for "
            f'implementation="triton", got {q.shape[-1]}'
        )
    if max(grid) > MAX_GRID_YZ:
        raise ValueError(
            f"{name} must have at most {MAX_GRID_YZ} sequences and heads for "
            'implementation="triton", '
            f"got shape {tuple(q.shape)}"
        )


# ---- dispatch ------------------------------------------------------------------------------


def runs_triton(q: Tensor, implementation: str, grid: tuple[int, ...] = (1,)) -> bool:
    """Whether the kernels run, by the rule in the docstring of ``flash_attention``.

    Args:
        q: [..., D].
        implementation: As the caller of the op gave it.
        grid: Extents that become the second and third axis of a grid.

    Raises:
        RuntimeError, TritonUnavailable: "triton" was demanded, and no kernel can run here.
    """
    if implementation == "torch":
        return False
    from course_lib.runtime.tile import HAS_TRITON, TRITON_MISSING, TritonUnavailable

    if implementation == "auto":
        return (
            HAS_TRITON
            and q.is_cuda
            and torch.version.hip is None
            and torch.cuda.get_device_capability(q.device) >= (8, 0)
            and q.dtype in TRITON_DTYPES
            and q.shape[-1] in HEAD_DIMS
            and max(grid) <= MAX_GRID_YZ
        )
    if not HAS_TRITON:
        raise TritonUnavailable(
            f'implementation="triton" needs Triton, which cannot be imported here '
            f'({TRITON_MISSING}); implementation="torch" runs everywhere'
        )
    from course_lib.runtime.interpreter import interpreting

    if interpreting():
        return True
    if not q.is_cuda:
        raise RuntimeError(
            f'implementation="triton" needs CUDA tensors, got device {q.device}. On CPU, run the '
            "kernels under the interpreter (`with interpreted():`, from "
            'course_lib.runtime.interpreter), or use implementation="torch"'
        )
    arch = architecture(q)
    if arch is None or (arch < 80 and q.shape[-1] > 128):
        capability = torch.cuda.get_device_capability(q.device)
        raise RuntimeError(
            'implementation="triton" needs compute capability 8.0 or more, or 7.5 and a head '
            f"dimension of at most 128; got {capability} and {q.shape[-1]}; "
            'implementation="torch" runs everywhere'
        )
    return True


def architecture(x: Tensor) -> int | None:
    """The row of the launch table; None under the interpreter, and on GPUs that are too old."""
    from course_lib.runtime.interpreter import interpreting

    if interpreting():
        return None
    return table_architecture(torch.cuda.get_device_capability(x.device))


# ---- what a launch needs -------------------------------------------------------------------


def cdiv(x: int, y: int) -> int:
    """The quotient x / y, rounded up."""
    return (x + y - 1) // y


def alignment(*tensors: Tensor) -> int:
    """What every row of every tensor begins at a multiple of, in bytes: 16, or one element."""
    for x in tensors:
        starts = [x.data_ptr()]
        starts += [x.stride(i) * x.element_size() for i in range(x.dim() - 1) if x.shape[i] > 1]
        if any(start % 16 for start in starts):
            return x.element_size()
    return 16


def computable(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the kernels can take them.

    The elements of a row lie side by side, and the interpreter, which cannot compute in bf16, gets
    fp32.
    """
    from course_lib.runtime.interpreter import interpreting

    if interpreting():
        tensors = tuple(x.float() if x.dtype == torch.bfloat16 else x for x in tensors)
    return [x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in tensors]


def device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
