"""The library behind "From Threshold to FlashAttention".

A notebook needs six names from here:

    setup("flash_attention")     first cell: what this machine can do, and which chapter this is
    check(online_softmax)        run an answer and say what happened
    hint("online_softmax")       the next rung of the help ladder
    solution("online_softmax")   the staff version, after an attempt
    progress()                   every chapter and every point
    with interpreted(): ...      run Triton kernels in Python, with guards, on any machine

Each chapter is a package of its own (`course_lib.flash_attention`, …). Importing `course_lib` or
a chapter's package needs torch (and Triton where there is one), and loads no plotting and no
widgets.

Glossary. These names mean the same thing in every chapter:

    B, H, T, D          batch, heads, tokens (positions), head dimension; tensors are [B, H, T, D]
    T_q, T_k            tokens of the queries and of the keys, where they differ
    H_q, H_kv           heads of the queries and of the keys and values (grouped-query attention)
    M, N, K             rows, columns and inner extent of a matrix product [M, K] @ [K, N]
    C, V                channels; vocabulary size or number of classes
    BLOCK_M, BLOCK_N    rows and columns of a tile, known at compile time
    BLOCK_D             D rounded up to a power of two
    pid, pid_m          index of a program (and along rows): which tile it owns
    offs_m, offs_n      offsets (indices) of a tile's rows and columns, [BLOCK_M] and [BLOCK_N]
    mask_m, mask_n      which of these offsets lie inside the tensor
    q_ptr, out_ptr      pointer to a tensor's first element
    stride_qt           elements between neighbours of q along T, and so on for each tensor and axis
    q_tile, k_tile      the part of a tensor that is on chip
    row_max, row_sum    running maximum of each row, and running sum of exp(score - row_max)
    acc                 accumulator on chip, always fp32
    lse                 log-sum-exp of a row: row_max + log(row_sum)
    scale               factor on the scores, 1/sqrt(D) unless said otherwise
    cu_seqlens          cumulative sequence lengths, int32 [number of sequences + 1], from 0
    grad_out, dq, dk    gradient that arrives, and gradients of the inputs

Sizes in the text are bytes unless a unit is given; 1 MB is 10**6 bytes, 1 MiB is 2**20.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from course_lib._version import __version__

if TYPE_CHECKING:
    from course_lib.grading.check import check
    from course_lib.grading.help import hint, solution
    from course_lib.notebook.progress_card import progress
    from course_lib.notebook.session import setup
    from course_lib.runtime.interpreter import interpreted

__all__ = ["__version__", "check", "hint", "interpreted", "progress", "setup", "solution"]

# Where each name lives. They are looked up on first use: importing a chapter for its kernels must
# not pay for grading, plotting or widgets.
_HOMES = {
    "setup": "course_lib.notebook.session",
    "check": "course_lib.grading.check",
    "hint": "course_lib.grading.help",
    "solution": "course_lib.grading.help",
    "progress": "course_lib.notebook.progress_card",
    "interpreted": "course_lib.runtime.interpreter",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
