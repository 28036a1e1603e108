"""Cumulative sequence lengths: where the sequences of a packed batch begin and end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Packing", "check_cu_seqlens", "check_values"]


class Packing(NamedTuple):
    """int32 [sequences + 1] each: sequence s has the rows cu[s] ... cu[s + 1] - 1."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor

    @property
    def sequences(self) -> int:
        """How many there are."""
        return len(self.cu_seqlens_q) - 1


def check_cu_seqlens(name: str, cu_seqlens: Tensor, q: Tensor) -> None:
    """Raise unless it can hold cumulative lengths; what it holds, ``check_values`` reads.

    Raises:
        TypeError: It is not an int32 tensor.
        ValueError: It is not on the device of q, or not a list of at least one number.
    """
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype != torch.int32:
        raise TypeError(f"{name} must be int32, got {cu_seqlens.dtype}")
    if cu_seqlens.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {cu_seqlens.device}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(
            f"{name} must have shape [sequences + 1], got shape {tuple(cu_seqlens.shape)}"
        )


# What was found right: (version, rows) of a tensor. A layer asks about the lengths that the layer
# before it asked about, and reading them makes the host wait for the GPU.
_checked: WeakIdKeyDictionary = WeakIdKeyDictionary()


def check_values(name: str, cu_seqlens: Tensor, rows: int) -> None:
    """Raise ValueError unless the numbers begin at 0, never fall, and end at `rows`.

    A kernel would take a wrong number for an address. The numbers are read once for each tensor
    and each change of it; of a tensor made in inference mode, which counts no changes, only once.
    While a CUDA graph is captured they cannot be read, and are not.
    """
    version = 0 if cu_seqlens.is_inference() else cu_seqlens._version
    if _checked.get(cu_seqlens) == (version, rows):
        return
    if cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    numbers = cu_seqlens.tolist()
    if numbers[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {numbers[0]}")
    for s in range(len(numbers) - 1):
        if numbers[s + 1] < numbers[s]:
            raise ValueError(
                f"{name} must not decrease, got {numbers[s]} and then {numbers[s + 1]} "
                f"at position {s + 1}"
            )
    if numbers[-1] != rows:
        raise ValueError(f"{name} must end with the number of rows, {rows}, got {numbers[-1]}")
    _checked[cu_seqlens] = (version, rows)
