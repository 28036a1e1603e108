"""The first cell of every notebook: which chapter this is, and what this machine can do."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_STYLE_FILE = Path(__file__).with_name("course.mplstyle")
_chapter: str | None = None


def setup(chapter: str) -> None:
    """Begin a notebook: remember its chapter and say what this machine can do.

    It prints at most three lines, which differ from machine to machine; nothing else of a notebook
    should, so a comparison of outputs leaves this cell out. On a machine without a GPU, kernels
    run in Triton's interpreter from here on. Matplotlib gets the course's style when it is first
    used. No random seed is set: every experiment makes its own `torch.Generator`, so that cells
    can be run again in any order.

    Args:
        chapter: The chapter's package name, such as "flash_attention".

    Raises:
        UnknownExerciseError: If there is no such chapter; the message lists those there are.
    """
    global _chapter
    from course_lib.grading.exercise import chapter_of

    chapter_of(chapter)
    _chapter = chapter
    _style_matplotlib()
    _interpret_without_gpu()
    from course_lib.runtime.device import device_report

    print("\n".join(device_report().lines()))


def current_chapter() -> str | None:
    """The chapter that `setup` named, or None before it."""
    return _chapter


def _style_matplotlib() -> None:
    """Give matplotlib the course's style, now or when it is imported."""
    if "matplotlib" in sys.modules:
        from course_lib.notebook.figures import use_style

        use_style()
    else:
        # Matplotlib reads this variable at import, so a notebook without figures never loads it.
        os.environ["MATPLOTLIBRC"] = str(_STYLE_FILE)


def _interpret_without_gpu() -> None:
    import torch

    from course_lib.runtime.tile import HAS_TRITON

    if HAS_TRITON and not torch.cuda.is_available():
        from course_lib.runtime.interpreter import interpret_everywhere

        interpret_everywhere()
