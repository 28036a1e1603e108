"""Run one answer on one set of data, and keep what it returned, raised, printed and used.

The same code runs in a learner's notebook and in the sandboxed child of the official grade, so a
student meets the same guards in both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from course_lib.grading.compare import copy_data, same_data
from course_lib.grading.exercise import Data
from course_lib.grading.isolation import isolated
from course_lib.runtime.kernel_errors import KernelError


class AnswerTodo(Exception):
    """The answer is still the stub."""


@dataclass(frozen=True)
class Usage:
    """What one call used.

    Attributes:
        peak_bytes: Most bytes alive at one time in tensors made during the call.
        largest_bytes: Bytes of the largest tensor made during the call.
        largest_shape: Its shape.
        ops: How often each operator ran.
        launches: Kernels launched; None where launches were not watched.
        bytes_moved: Bytes that these loaded and stored; 0 where accesses were not traced.
    """

    peak_bytes: int = 0
    largest_bytes: int = 0
    largest_shape: tuple[int, ...] = ()
    ops: dict[str, int] = field(default_factory=dict)
    launches: int | None = None
    bytes_moved: int = 0


@dataclass(frozen=True)
class Ran:
    """What an answer did with one set of data.

    Attributes:
        value: What the harness returned.
        error: What it raised instead.
        changed: Name of an input that it changed.
        usage: What it used, where that was measured.
        printed: The end of what it printed.
    """

    value: Any = None
    error: Exception | None = None
    changed: str | None = None
    usage: Usage | None = None
    printed: str = ""


def run_answer(
    harness: Callable[[Any, Data], Any],
    answer: Any,
    data: Data,
    *,
    name: str,
    kernel: bool = False,
    metered: bool = False,
    trace: bool = False,
    seed: int = 0,
) -> Ran:
    """Run an answer through its exercise's harness, on a copy of the data.

    Args:
        harness: The exercise's.
        answer: What the learner defined.
        data: The case's data; it stays as it is.
        name: The exercise's name, by which its stub is known.
        kernel: Run kernels under the guarded interpreter: on a GPU an access out of bounds would
            end the process.
        metered: Measure memory and operators.
        trace: Measure the traffic of kernels as well.
        seed: For random numbers that the answer may draw.

    Raises:
        AnswerTodo: If the answer is still the stub.
    """
    own = copy_data(data)
    # Imported here and not above: both bring Triton, which a child need not wait for in vain.
    guards: Any = contextlib.nullcontext()
    if kernel:
        from course_lib.runtime.interpreter import interpreted

        guards = interpreted(trace=trace)
    meter: Any = contextlib.nullcontext()
    if metered:
        from course_lib.runtime.measure import measure_memory

        meter = measure_memory()
    with isolated(seed) as printed, guards as launches:
        try:
            with meter as memory:
                value = harness(answer, own)
        except (Exception, SystemExit) as error:
            if says_todo(error, name):
                raise AnswerTodo from error
            kept = error if isinstance(error, Exception) else RuntimeError("it called exit()")
            return Ran(error=kept, printed=str(printed))
    changed = next((each for each in data if not same_data(data[each], own[each])), None)
    usage = None
    if memory is not None:
        usage = Usage(
            memory.peak_bytes,
            memory.largest_bytes,
            tuple(memory.largest_shape),
            dict(memory.ops),
            None if launches is None else len(launches.launches),
            launches.bytes_loaded + launches.bytes_stored if launches and trace else 0,
        )
    return Ran(value, None, changed, usage, str(printed))


def says_todo(raised: BaseException, name: str) -> bool:
    """Whether the error is that of an untouched stub, and not of the learner's own code."""
    error: BaseException | None = raised
    while error is not None:
        text = text_of(error)
        unwritten = isinstance(error, NotImplementedError)
        if unwritten and (not text or text.startswith(name)):
            return True
        if isinstance(error, KernelError | AssertionError) and "TODO" in text:
            return True
        error = error.__cause__
    return False


def text_of(error: BaseException) -> str:
    """An error's message; a stand-in where asking for it raises another error."""
    try:
        return str(error).strip()
    except Exception:
        return "(its message cannot be shown)"
