"""One submission in its child: cells run in order, answers called, all within limits.

A cell that ends or hangs the child is left out, and the child started anew without it. An answer
that ends or hangs it costs that answer; the next one meets a fresh child.
"""

from __future__ import annotations

import math
import re
import resource
import time
from typing import Any

from course_lib.grading import wire
from course_lib.grading.cells import Cell
from course_lib.grading.run import Ran, Usage
from course_lib.grading.sandbox import MIB, TREE_LIMIT, Child, Sandbox, SandboxError
from course_lib.runtime.interpreter import DataRace, KernelError, OutOfBounds, UnsupportedDtype

CELL_SECONDS = 30.0
"""Processor seconds that one cell may take; twice as long by the clock."""
CALL_SECONDS = 20.0
"""The same for one call of an answer."""
ALL_SECONDS = 600.0
"""Seconds by the clock for all code of one submission."""
LARGEST_ANSWER = 64 * MIB
"""Bytes of tensors that one answer may return."""
MOST_DROPPED = 8
"""Cells that may end or hang the child before the rest is given up."""
MEMORY_SLACK = 192 * MIB
"""Allowed beyond the budget of a memory case, over what a child holds before any code ran: for the
notebook's own imports and variables. Measured: the solutions of chapter 08 hold 60 MiB."""

_IDENTIFIER = re.compile(r"[A-Za-z_]\w{0,59}", re.ASCII)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]{6,}")
_KERNEL_ERRORS = {
    each.__name__: each for each in (KernelError, OutOfBounds, DataRace, UnsupportedDtype)
}


class Fault(Exception):
    """The child did not answer as it should, and is gone.

    Attributes:
        status: "timeout", "memory" or "error".
    """

    def __init__(self, status: str, message: str) -> None:
        super().__init__(message)
        self.status = status


class RemoteError(Exception):
    """An exception of the child. Instances are of subclasses named like the original type.

    Attributes:
        place: Number of the cell and of the line in it that it passed last, or None.
        out_of_memory: Whether memory was refused.
    """

    place: tuple[int, int] | None = None
    out_of_memory = False


class Session:
    """One submission's child and its restarts; a context manager.

    Args:
        sandbox: Where children come from.
        cells: The submission's.

    Attributes:
        learner_seconds: Time waited for the child's answers.
        failed: What went wrong in cells, by their number.
        dropped: Numbers of cells that ended or hung the child.
        answered: Calls that the present child has answered.
    """

    def __init__(self, sandbox: Sandbox, cells: list[Cell]) -> None:
        self._sandbox = sandbox
        self._cells = cells
        self._child: Child | None = None
        self._asked = 0
        self._ends = time.monotonic() + ALL_SECONDS
        self.learner_seconds = 0.0
        self.failed: dict[int, str] = {}
        self.dropped: dict[int, str] = {}
        self.answered = 0

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    def end(self) -> None:
        """Stop the child, if there is one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def values(self, names: list[str]) -> dict[str, Any]:
        """What the notebook's top level holds under some names; functions as stand-ins.

        Raises:
            Fault: If the child is gone.
        """
        reply, blob = self._ask({"op": "describe", "names": names}, b"", CALL_SECONDS)
        values = self._unpacked(reply.get("values"), blob)
        if not isinstance(values, dict) or not set(values) <= set(names):
            raise self._broken()
        return values

    def call(self, request: dict[str, Any], data: Any, *, patience: float = 1.0) -> Ran:
        """Call an answer on fresh data.

        Args:
            request: What `worker.on_call` reads.
            data: The case's data.
            patience: How many times `CALL_SECONDS` it may take.

        Raises:
            Fault: If the child is gone.
            LookupError: If the answer is still its stub.
        """
        tree, blob = wire.pack(data)
        reply, out = self._ask(
            {"op": "call", "data": tree, **request}, blob, patience * CALL_SECONDS
        )
        self.answered += 1
        if reply.get("todo") is True:
            raise LookupError("the answer is still its stub")
        if "error" in reply:
            return Ran(error=self._error(reply["error"]))
        changed = reply.get("changed")
        if changed is not None and changed not in data:
            raise self._broken()
        usage = self._usage(reply.get("usage")) if request["metered"] else None
        return Ran(self._unpacked(reply.get("value"), out), None, changed, usage)

    def compile_error(self, request: dict[str, Any], data: Any) -> str | None:
        """What a GPU's compiler says against an answer's kernels, or None.

        Raises:
            Fault: If the child is gone.
        """
        tree, blob = wire.pack(data)
        header = {"op": "compile", "data": tree, **request}
        reply, _ = self._ask(header, blob, 3 * CALL_SECONDS)
        if "error" in reply:
            return str(self._error(reply["error"]))
        problem = reply.get("problem")
        return None if problem is None else _text(problem, 500)

    def limit_memory(self, budget: int) -> None:
        """From outside, allow the child a budget beyond what it held before any code ran.

        Whatever else it started is ended, and it can start nothing more. This cannot be undone.

        Raises:
            Fault: If the child is gone.
        """
        if self._child is None:
            self._start()
        child = self._child
        assert child is not None
        try:
            child.limit(resource.RLIMIT_NPROC, 0)
            child.end_others()
            data, space = child.baseline
            child.limit(resource.RLIMIT_DATA, data + budget + MEMORY_SLACK)
            child.limit(resource.RLIMIT_AS, space + budget + 4 * MEMORY_SLACK)
        except SandboxError:
            raise self._gone() from None

    # The child.

    def _start(self) -> None:
        """Start a child and run the cells; those that end it are left out of the next try."""
        while True:
            if time.monotonic() > self._ends:
                raise Fault("timeout", f"All code together took over {ALL_SECONDS:.0f} seconds.")
            self._child = self._sandbox.child()
            self.failed, self.answered = {}, 0
            if self._run_cells():
                return

    def _run_cells(self) -> bool:
        for cell in self._cells:
            if cell.number in self.dropped or not cell.python.strip():
                continue
            if len(self.dropped) > MOST_DROPPED:
                self.failed[cell.number] = "was not run: too many cells end or hang the notebook"
                continue
            request = {"op": "cell", "index": cell.number, "source": cell.python}
            try:
                reply, _ = self._ask(request, b"", CELL_SECONDS)
            except Fault as fault:
                self.dropped[cell.number] = str(fault)
                return False
            if "error" in reply:
                error = self._error(reply["error"])
                self.failed[cell.number] = f"raised {type(error).__name__}"
        return True

    def _ask(
        self, request: dict[str, Any], blob: bytes, seconds: float
    ) -> tuple[dict[str, Any], bytes]:
        """Send a request and wait for its answer, within limits of time and memory."""
        if self._child is None:
            self._start()
        child = self._child
        assert child is not None
        self._asked += 1
        began = time.monotonic()
        deadline = min(began + 2 * seconds, self._ends)
        looked, spent = began, math.nan

        def watch() -> None:
            nonlocal looked, spent
            if time.monotonic() - looked < 0.2:
                return
            looked = time.monotonic()
            if math.isnan(spent):
                # Looking costs more than most answers take, so only long ones are looked at.
                spent = child.cpu_seconds()
            if child.resident() > TREE_LIMIT:
                raise Fault("memory", f"It used more than {TREE_LIMIT // MIB:,} MiB of memory.")
            if child.cpu_seconds() - spent > seconds:
                raise TimeoutError

        try:
            child.sock.settimeout(2 * seconds)
            wire.send(child.sock, {"id": self._asked, **request}, blob)
            reply, out = wire.receive(
                child.sock, deadline=deadline, watch=watch, max_blob=LARGEST_ANSWER
            )
        except TimeoutError:
            self.end()
            raise Fault("timeout", f"It did not end within {seconds:.0f} seconds.") from None
        except wire.Closed:
            raise self._gone() from None
        except wire.WireError:
            raise self._broken() from None
        except Fault:
            self.end()
            raise
        finally:
            self.learner_seconds += time.monotonic() - began
        if reply.get("id") != self._asked:
            raise self._broken()
        return reply, out

    def _gone(self) -> Fault:
        how = self._child.how_it_ended() if self._child is not None else ""
        self.end()
        return Fault("error", f"It ended the notebook's process{f': {how}' if how else ''}.")

    def _broken(self) -> Fault:
        self.end()
        return Fault("error", "What came back is not what a notebook's process sends.")

    # What came back, of which nothing is believed before it was looked at.

    def _unpacked(self, tree: Any, blob: bytes) -> Any:
        try:
            return wire.unpack(tree, blob, strict=True)
        except wire.WireError:
            raise self._broken() from None

    def _usage(self, said: Any) -> Usage:
        numbers = ("peak_bytes", "largest_bytes", "bytes_moved")
        if not isinstance(said, dict) or not all(_is_count(said.get(each)) for each in numbers):
            raise self._broken()
        shape, ops, launches = said.get("largest_shape"), said.get("ops"), said.get("launches")
        if not isinstance(shape, list) or len(shape) > 16 or not all(map(_is_count, shape)):
            raise self._broken()
        if launches is not None and not _is_count(launches):
            raise self._broken()
        if not isinstance(ops, dict) or not all(map(_is_count, ops.values())):
            raise self._broken()
        return Usage(
            said["peak_bytes"],
            said["largest_bytes"],
            tuple(shape),
            {_text(name, 80): count for name, count in ops.items()},
            launches,
            said["bytes_moved"],
        )

    def _error(self, said: Any) -> Exception:
        if not isinstance(said, dict):
            raise self._broken()
        kind = said.get("type")
        kind = kind if isinstance(kind, str) and _IDENTIFIER.fullmatch(kind) else "Exception"
        message = _text(said.get("message"), 2000)
        kernel = said.get("kernel")
        if kind in _KERNEL_ERRORS and isinstance(kernel, dict):
            program, line = kernel.get("program"), kernel.get("line")
            where: Any = None
            if isinstance(program, list) and len(program) == 3 and all(map(_is_count, program)):
                where = tuple(program)
            return _KERNEL_ERRORS[kind](
                _text(kernel.get("what"), 500),
                program=where,
                line=line if _is_count(line) else None,
                source=_text(kernel.get("source"), 200),
                advice=_text(kernel.get("advice"), 300),
            )
        error = type(kind, (RemoteError,), {})(message)
        line = said.get("line")
        if isinstance(line, list) and len(line) == 2 and all(map(_is_count, line)):
            error.place = (line[0], line[1])
        error.out_of_memory = said.get("memory") is True
        return error


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _text(value: Any, most: int) -> str:
    """Text of the child as it may be shown: short, printable, and the same in every run."""
    if not isinstance(value, str):
        return ""
    shown = "".join(each if each.isprintable() or each == "\n" else "�" for each in value[:most])
    return _ADDRESS.sub("0x…", shown)
