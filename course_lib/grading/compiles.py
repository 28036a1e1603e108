"""Whether a learner's kernels compile for a GPU, asked on a machine that may have none.

The interpreter runs more than a GPU does: a Python `raise`, a list, a tile of 48 rows, or 300 KB
of shared memory are all fine there. So the last stage of a kernel's check compiles every launch
that the answer makes, in this process and for one architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from course_lib.grading.exercise import Data
from course_lib.runtime.tile import HAS_TRITON

Harness = Callable[[Any, Data], Any]

ARCHITECTURE = 80
"""Compute capability compiled for: the A100, and the oldest one with everything we teach."""

# What the compiler said about a kernel with given types and constants: a sentence, or None.
_verdicts: dict[tuple[str, ...], str | None] = {}


@dataclass(frozen=True)
class LaunchSeen:
    """One launch: the kernel, and what the compiler has to know about its arguments."""

    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for two launches that compile to the same code."""
        return (
            self.kernel.cache_key,
            repr(sorted(self.signature.items())),
            repr(sorted((name, repr(value)) for name, value in self.constexprs.items())),
            f"{self.num_warps}, {self.num_stages}",
        )


def first_compile_error(harness: Harness, answer: Any, data: Data) -> str | None:
    """Compile every kernel that an answer launches, and return what is wrong with the first.

    Args:
        harness: The exercise's, which runs the answer.
        answer: The learner's host function.
        data: One case's data. The answer has passed this case already.

    Returns:
        One line with the compiler's message and the learner's line of source, or None where every
        launch compiles, and where there is no compiler.
    """
    if not HAS_TRITON:
        return None
    from course_lib.runtime.crosscompile import CrossCompileUnavailable

    try:
        for launch in _launches(harness, answer, data):
            if launch.key not in _verdicts:
                _verdicts[launch.key] = _compile_error(launch)
            if _verdicts[launch.key] is not None:
                return _verdicts[launch.key]
    except CrossCompileUnavailable:
        pass
    return None


def _launches(harness: Harness, answer: Any, data: Data) -> list[LaunchSeen]:
    """Run the answer under the interpreter and note every launch that can be compiled."""
    from course_lib.runtime.interpreter import interpreted

    seen: list[LaunchSeen] = []
    with interpreted(), _noting_launches(seen):
        harness(answer, data)
    return seen


@contextlib.contextmanager
def _noting_launches(seen: list[LaunchSeen]) -> Iterator[None]:
    """Note every launch inside the block, and let it run as it would have."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def noting_run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        if (launch := _seen(kernel, args, kwargs)) is not None:
            seen.append(launch)
        return run(kernel, *args, grid=grid, warmup=warmup, **kwargs)

    JITFunction.run = noting_run  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        JITFunction.run = run


def _seen(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LaunchSeen | None:
    """The types and constants of a launch; None where an argument has no simple type."""
    own = {name: value for name, value in kwargs.items() if name in kernel.arg_names}
    try:
        bound = kernel.signature.bind(*args, **own)
    except TypeError:
        return None  # the launch itself says so
    bound.apply_defaults()
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    for parameter in kernel.params:
        value = bound.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            constexprs[parameter.name] = getattr(value, "value", value)
        elif (kind := _type_of(value)) is not None:
            signature[parameter.name] = kind
        else:
            return None
    return LaunchSeen(
        kernel, signature, constexprs, kwargs.get("num_warps", 4), kwargs.get("num_stages", 3)
    )


_DTYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}


def _type_of(value: Any) -> str | None:
    """Triton's name for an argument's type, such as `*fp32` or `i32`."""
    if isinstance(value, torch.Tensor):
        name = _DTYPES.get(value.dtype)
        return f"*{name}" if name else None
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32" if isinstance(value, float) else None


def _compile_error(launch: LaunchSeen) -> str | None:
    """Compile one launch; what is wrong with it in one line, or None."""
    from course_lib.runtime.crosscompile import (
        SHARED_MEMORY,
        CrossCompileUnavailable,
        cross_compile,
    )

    try:
        compiled = cross_compile(
            launch.kernel,
            launch.signature,
            launch.constexprs,
            arch=ARCHITECTURE,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )
    except CrossCompileUnavailable:
        raise
    except Exception as error:  # the compiler raises many types, and each is a finding
        return _one_line(launch.kernel, error)
    if not compiled.fits:
        return (
            f"`{launch.kernel.__name__}` needs {compiled.shared_bytes:,} bytes of shared "
            f"memory for "
            f"one block; an A100 has {SHARED_MEMORY[ARCHITECTURE]:,}. Use smaller tiles."
        )
    return None


def _one_line(kernel: Any, error: BaseException) -> str:
    """The compiler's innermost message, with the innermost line that the learner wrote."""
    written = _sources(kernel)
    place, message = "", ""
    here: BaseException | None = error
    while here is not None:
        node, source = getattr(here, "node", None), getattr(here, "src", None)
        line = getattr(node, "lineno", 0)
        if source in written and 0 < line <= len(source.splitlines()):
            place = f" in `{source.splitlines()[line - 1].strip()}`"
        text = getattr(here, "error_message", None) or (str(here) if node is None else "")
        message = _first_line(text) or message
        here = here.__cause__
    message = message or f"{type(error).__name__} without a message"
    return f"kernel `{kernel.__name__}`{place}: {message.rstrip('.')}."


def _sources(kernel: Any) -> set[str]:
    """The source of a kernel and of the device functions beside it, but not Triton's own."""
    beside = kernel.fn.__globals__.values()
    functions = [value for value in beside if type(value) is type(kernel)]
    return {kernel.src, *(each.src for each in functions)}


def _first_line(text: Any) -> str:
    lines = [line.strip() for line in str(text or "").splitlines() if line.strip()]
    return lines[0][:300] if lines else ""
