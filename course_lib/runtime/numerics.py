"""How wrong may a result be? As wrong as PyTorch is at the same dtype, and not much more.

A tolerance that somebody typed in is either so wide that bugs pass, or so narrow that it fails on
another machine. Here a tolerance is derived from the case itself: compute the answer in fp64 (the
*oracle*), look how far plain PyTorch lands from it in the dtype under test, and allow twice that
and one rounding of the output. The same rule judges FlashAttention's own releases.

Also here: memory poisoned with NaN, in which reads and writes outside a tensor show themselves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "PoisonedView",
    "assert_within_budget",
    "budget",
    "max_error",
    "poisoned_copy",
    "poisoned_view",
    "rms_error",
]


def max_error(actual: Tensor, oracle: Tensor) -> float:
    """Largest absolute difference, in fp64; infinite where NaN or ±inf are not at the same places.

    Args:
        actual: Any floating dtype.
        oracle: Same shape, usually fp64.

    Raises:
        ValueError: The shapes differ.
    """
    difference = _difference(actual, oracle)
    return difference.max().item() if difference.numel() else 0.0


def rms_error(actual: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference over that of the oracle; 0/0 counts as 0.

    Raises:
        ValueError: The shapes differ.
    """
    difference = _difference(actual, oracle)
    expected = oracle.detach().double()
    expected = expected[torch.isfinite(expected)]
    wrong, size = difference.square().sum().item(), expected.square().sum().item()
    if wrong == 0.0:
        return 0.0
    return math.sqrt(wrong / size) if size else math.inf


def budget(reference: Tensor, oracle: Tensor, dtype: torch.dtype) -> float:
    """The error that a result in ``dtype`` may have.

    budget = 2 * max_error(reference, oracle) + eps/2 * max|oracle|

    Args:
        reference: What plain PyTorch computes from the same inputs in the same dtype.
        oracle: The same in fp64.
        dtype: Dtype of the result under test; eps is its machine epsilon.

    Returns:
        An absolute error, for :func:`assert_within_budget`. Where large terms cancel in the result,
        the reference may have been lucky; then add one rounding of those terms.
    """
    finite = oracle.detach().double().abs()
    finite = finite[torch.isfinite(finite)]
    largest = finite.max().item() if finite.numel() else 0.0
    return 2.0 * max_error(reference, oracle) + torch.finfo(dtype).eps / 2 * largest


def assert_within_budget(actual: Tensor, oracle: Tensor, allowed: float, *, name: str) -> None:
    """Raise AssertionError, saying where and how far, if a result leaves its budget.

    Args:
        actual: The result under test.
        oracle: The same in fp64. NaN and ±inf must be at the very same places.
        allowed: From :func:`budget`.
        name: What is being compared: "dq".
    """
    assert actual.shape == oracle.shape, (
        f"{name} has shape {tuple(actual.shape)}, expected {tuple(oracle.shape)}"
    )
    difference = _difference(actual, oracle)
    # "not <=" and not ">": a NaN budget must fail too.
    if difference.numel() == 0 or bool((difference <= allowed).all()):
        return
    flat = int(difference.argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), difference.shape))
    bad = int((~(difference <= allowed)).sum())
    raise AssertionError(
        f"{name}{list(index)} is {actual[index].item():.9g}, expected {oracle[index].item():.9g}: "
        f"off by {difference[index].item():.3g}, allowed {allowed:.3g}. "
        f"{bad} of {difference.numel()} elements are outside the budget"
    )


def _difference(actual: Tensor, oracle: Tensor) -> Tensor:
    if actual.shape != oracle.shape:
        raise ValueError(f"shapes differ: {tuple(actual.shape)} and {tuple(oracle.shape)}")
    actual, oracle = actual.detach().double(), oracle.detach().to(actual.device).double()
    difference = (actual - oracle).abs()
    same = (actual == oracle) | (actual.isnan() & oracle.isnan())
    difference = difference.masked_fill(same, 0.0)  # inf - inf is NaN, and is no difference
    return difference.masked_fill(difference.isnan(), math.inf)


# ---- poisoned memory -----------------------------------------------------------------------


class PoisonedView:
    """A tensor cut out of a larger one that is full of NaN.

    A kernel that reads outside the view brings a NaN into its result. One that writes outside
    wipes a NaN off the border, which :meth:`assert_border_untouched` finds.
    """

    def __init__(
        self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, border: int
    ) -> None:
        # The last dimension gets a border too, so rows are not contiguous with each other.
        sizes = [size + 2 * border for size in shape]
        self.parent = torch.full(sizes, math.nan, dtype=dtype, device=device)
        window = tuple(slice(border, border + size) for size in shape)
        self.view = self.parent[window]
        self._border = torch.ones(sizes, dtype=torch.bool, device=device)
        self._border[window] = False

    def assert_border_untouched(self, *, name: str) -> None:
        """Raise AssertionError if anything around the view has been written."""
        written = self._border & ~self.parent.isnan()
        count = int(written.sum())
        if count:
            place = [int(i) for i in written.nonzero()[0]]
            raise AssertionError(
                f"{count} elements outside {name} were written, the first at {place} of its "
                f"parent of shape {tuple(self.parent.shape)}"
            )


def poisoned_view(
    shape: Sequence[int],
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    border: int = 8,
) -> PoisonedView:
    """Make a view of ``shape``, itself still NaN, with a border of NaN on every side.

    Args:
        shape: Of the view.
        dtype: A floating dtype.
        device: Where.
        border: Width in elements, in every dimension. A multiple of 8 keeps 16-byte alignment in
            half precision.
    """
    return PoisonedView(shape, dtype, device, border)


def poisoned_copy(x: Tensor, *, border: int = 8) -> PoisonedView:
    """Make a poisoned view that holds a copy of ``x``."""
    poisoned = PoisonedView(x.shape, x.dtype, x.device, border)
    poisoned.view.copy_(x.detach())
    return poisoned
