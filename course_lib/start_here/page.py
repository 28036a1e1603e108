"""What chapter 00 needs on its page beside the notebook tools that every chapter uses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from course_lib.notebook.cards import Card, emit, header, highlight, section
from course_lib.notebook.figures import source_card
from course_lib.runtime.tile import TritonUnavailable

__all__ = ["needs_triton", "solved", "without_end"]


@contextmanager
def needs_triton() -> Iterator[None]:
    """Go on where Triton has no wheel, after saying what would have been seen."""
    try:
        yield
    except TritonUnavailable:
        print(
            "This cell launches a kernel, and Triton is not available here (it has wheels for "
            "Linux only). Read on: the outputs in the published notebook are what it shows. To run "
            "it, open the notebook on Linux, in WSL 2 or on Colab."
        )


def without_end(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a GPU sees it: its first element, and whatever follows in memory.

    A pointer has a start and no end. Given this view, the guarded interpreter lets a kernel run
    on into the neighbouring tensor, as hardware does, so that the damage can be seen.

    Args:
        tensor: A contiguous view into a larger buffer.
    """
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((elements - tensor.storage_offset(),), (1,))


def solved(title: str, kernel: Any) -> None:
    """Show a kernel folded, as the solved neighbour of the next exercise.

    Args:
        title: What is solved.
        kernel: The kernel.
    """
    text = source_card(kernel).text
    _, _, code = text.partition("\n\n")
    body = f"<details><summary>Show the kernel</summary>{highlight(code)}</details>"
    emit(Card(f"{title}\n\n{text}", section("outcome", header("Solved", title), body)))
