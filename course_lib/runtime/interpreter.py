"""Run Triton kernels in Python, with guards, on any machine.

``with interpreted():`` makes every ``@triton.jit`` launch inside it run under Triton's
interpreter, one program after another, on the CPU. Nothing sets ``TRITON_INTERPRET``, which would
split the process in two worlds: here the same kernel object is interpreted inside the block and
compiled outside it.

The guards are on by default. Numbers alone cannot show these bugs, since programs that run one
after another give the right answer despite a race, and memory past the end of a tensor is often
zero:

* an access outside the tensor raises :class:`OutOfBounds`;
* programs that depend on each other's order raise :class:`DataRace`;
* masked lanes of a float load without ``other`` are NaN, as a GPU promises nothing about them;
* integers that overflow (masked lanes included), ``tl.device_assert``, and ``tl.dot`` tiles too
  small for a GPU raise :class:`KernelError`;
* arithmetic in bfloat16 and fp8 raises :class:`UnsupportedDtype`.

Outputs that were stored before an error stay stored, as on a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from course_lib.runtime.kernel_errors import (
    DataRace,
    KernelError,
    OutOfBounds,
    UnsupportedDtype,
)
from course_lib.runtime.tile import HAS_TRITON, TRITON_MISSING, TritonUnavailable
from course_lib.runtime.trace import Access, Launch, Run, TensorInfo

__all__ = [
    "Access",
    "DataRace",
    "KernelError",
    "Launch",
    "OutOfBounds",
    "Run",
    "TensorInfo",
    "UnsupportedDtype",
    "interpret_everywhere",
    "interpreted",
    "interpreting",
]

# Open `interpreted` blocks, the innermost last. One list for all threads, not one a thread:
# autograd runs the backward of CUDA tensors in a thread of its own, and it must be interpreted too.
_runs: list[Run] = []
_everywhere = False
_compiled_methods: tuple[Any, Any] | None = None
# The interpreter patches `triton.language` for the time of a launch, so launches take turns.
_launch_lock = threading.RLock()


@contextmanager
def interpreted(*, guard: bool = True, trace: bool = False) -> Iterator[Run]:
    """Interpret every kernel launch inside the block.

    Blocks nest: the innermost one decides on guards, and each one collects the launches inside it.

    Args:
        guard: Check for races, refuse what the interpreter computes wrongly, and poison masked
            lanes. Bounds are checked in any case, since an access out of bounds would corrupt
            this process. False is for kernels whose programs talk to each other on purpose, such
            as "the last program to arrive sums up": the race check cannot follow that. (Updates
            under an ``atomic_cas`` / ``atomic_xchg`` lock are understood.)
        trace: Record every access to memory in ``run.launches[i].accesses``.

    Yields:
        The :class:`Run`, filled as launches happen.

    Raises:
        TritonUnavailable: Triton cannot be imported here.
    """
    _require_triton()
    run = Run(guard=guard, trace=trace)
    _runs.append(run)
    _sync_patch()
    try:
        yield run
    finally:
        # By identity: two fresh runs compare equal.
        _runs[:] = [other for other in _runs if other is not run]
        _sync_patch()


def interpret_everywhere(*, enabled: bool = True) -> None:
    """Interpret every launch of this process from now on, with guards.

    A notebook's ``setup()`` calls this on a machine without a GPU, so that a learner's launch
    just works. Launches are not collected; an ``interpreted`` block inside still collects its own.

    Args:
        enabled: False returns to compiled launches.

    Raises:
        TritonUnavailable: Triton cannot be imported here.
    """
    global _everywhere
    _require_triton()
    _everywhere = enabled
    _sync_patch()


def interpreting() -> bool:
    """Whether a kernel launched now would be interpreted."""
    return _everywhere or bool(_runs)


def _require_triton() -> None:
    if not HAS_TRITON:
        raise TritonUnavailable(
            f"the interpreter is a part of Triton, which cannot be imported here "
            f"({TRITON_MISSING}). Use Linux, WSL 2, Colab or a container."
        )


def _sync_patch() -> None:
    """Replace or restore the two methods of ``JITFunction`` that decide how a kernel runs."""
    global _compiled_methods
    from triton.runtime import jit

    kernels: Any = jit.JITFunction
    if interpreting() and _compiled_methods is None:
        _compiled_methods = kernels.run, kernels.__call__
        kernels.run, kernels.__call__ = _interpreted_run, _interpreted_call
    elif not interpreting() and _compiled_methods is not None:
        kernels.run, kernels.__call__ = _compiled_methods
        _compiled_methods = None


def _interpreted_run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    if warmup:
        return
    from course_lib.runtime import executor

    with _launch_lock:
        runs = list(_runs)
        executor.launch(
            kernel,
            args,
            kwargs,
            grid=grid,
            guard=runs[-1].guard if runs else True,
            collectors=runs,
        )


def _interpreted_call(function: Any, *args: Any, **kwargs: Any) -> Any:
    from course_lib.runtime import executor

    return executor.call_device_function(function, args, kwargs)
