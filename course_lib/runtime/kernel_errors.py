"""What can go wrong inside an interpreted kernel, as typed errors a learner can act on."""

from __future__ import annotations

__all__ = ["DataRace", "KernelError", "OutOfBounds", "UnsupportedDtype"]


class KernelError(RuntimeError):
    """A kernel failed under the interpreter.

    The message names the program, the kernel, and the line of source. ``__cause__`` is the
    original exception where there was one.

    Attributes:
        what: The failure in one clause, without place and advice.
        kernel: Name of the launched kernel.
        program: Grid index of the program that failed.
        tensor: Name of the kernel's tensor argument, where one is involved.
        line: Line number of the learner's source (a helper's line where a helper failed).
        source: Text of that line.
        advice: What to do about it.
    """

    def __init__(
        self,
        what: str,
        *,
        kernel: str = "",
        program: tuple[int, int, int] | None = None,
        tensor: str | None = None,
        line: int | None = None,
        source: str = "",
        advice: str = "",
    ) -> None:
        # `args` holds `what` alone, and the rest lies in `__dict__`: so the error pickles, which
        # a grader that runs kernels in a process of their own relies on.
        super().__init__(what)
        self.what = what
        self.kernel = kernel
        self.program = program
        self.tensor = tensor
        self.line = line
        self.source = source
        self.advice = advice

    def __str__(self) -> str:
        place = f"kernel `{self.kernel}`" if self.kernel else ""
        if self.line is not None:
            place += f", line {self.line}" if place else f"line {self.line}"
        lines = [self.what]
        if place:
            lines.append(f"  in {place}" + (f": {self.source}" if self.source else ""))
        if self.advice:
            lines.append(f"  {self.advice}")
        return "\n".join(lines)


class OutOfBounds(KernelError):
    """A program touched memory outside the tensor that its pointer came from."""


class DataRace(KernelError):
    """The result depends on the order in which programs, or lanes of one store, happen to run."""


class UnsupportedDtype(KernelError):
    """The interpreter cannot compute in this dtype, and would return wrong numbers silently."""
