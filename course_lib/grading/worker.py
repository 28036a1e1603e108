"""Runs inside the sandbox: executes a submission's cells and calls its answers.

It does what frames on one socket ask for, and answers in frames. It holds no expected value, no
seed of a case, and no path that leads to one. The code it runs may take over this whole process;
then its frames are forged, and are judged like any others.
"""

from __future__ import annotations

import asyncio
import builtins
import ctypes
import inspect
import linecache
import mmap
import os
import platform
import random
import re
import resource
import signal
import socket
import sys
import types
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from course_lib.grading import seccomp, wire
from course_lib.grading.run import AnswerTodo, Ran, run_answer, text_of
from course_lib.runtime.kernel_errors import KernelError

CELL_FILE = "<cell {}>"
_CELL = re.compile(r"<cell (\d+)>")
_MAX_MESSAGE = 2000


def serve(sock: socket.socket) -> None:
    """Answer frames until the other side closes."""
    seccomp.install(memory_files=os.environ.get("CUDA_VISIBLE_DEVICES") != "")
    from course_lib import Inert  # type: ignore[attr-defined]  # the student's view of course_lib

    for number in (1, 2):
        # What a submission prints goes nowhere: nobody reads it, so nobody can be flooded.
        os.dup2(_null(), number)
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - a submission may draw from the old generator
    torch.manual_seed(0)
    notebook = _Notebook(Inert())
    wire.send(sock, {"hello": True})
    while True:
        try:
            header, blob = wire.receive(sock)
        except wire.Closed:
            return
        handler = getattr(notebook, f"on_{header['op']}")
        try:
            reply, out = handler(header, blob)
        except Exception as error:
            # What a submission patched may fail anywhere; that is its own answer, and no more.
            reply, out = {"error": describe(error)}, b""
        wire.send(sock, {"id": header["id"], **reply}, out)


def _null() -> int:
    return os.open(os.devnull, os.O_RDWR)


class _Notebook:
    """The namespace of one notebook, and what can be asked of it."""

    def __init__(self, inert: Any) -> None:
        self.module = types.ModuleType("__main__")
        self.names = self.module.__dict__
        self.names.update(display=inert, get_ipython=lambda: inert, In=[], Out={})
        self.names["__builtins__"] = builtins
        sys.modules["__main__"] = self.module

    def on_cell(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Execute one cell."""
        name, source = CELL_FILE.format(header["index"]), header["source"]
        # Triton, inspect and tracebacks read a function's source from here.
        lines = source.splitlines(keepends=True)
        linecache.cache[name] = (len(source), None, lines, name)
        try:
            # PyCF_ALLOW_TOP_LEVEL_AWAIT, as in a notebook.
            code = compile(source, name, "exec", flags=0x2000, dont_inherit=True)
            if code.co_flags & inspect.CO_COROUTINE:
                asyncio.run(eval(code, self.names))
            else:
                exec(code, self.names)
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            return {"error": describe(error)}, b""
        return {"ok": True}, b""

    def on_describe(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Say what some names are: callables by name, plain values by value."""
        found = {name: self.names[name] for name in header["names"] if name in self.names}
        safe = {name: _small(value) for name, value in found.items()}
        tree, out = wire.pack(safe)
        return {"values": tree}, out

    def on_call(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Call an answer through its harness on the data that was sent."""
        name = header["name"]
        harness, data = _harness(header), wire.unpack(header["data"], blob)
        if header["idle"]:
            harness = _without_kernels(harness)
        try:
            ran = run_answer(
                harness,
                self.names[name],
                data,
                name=name,
                kernel=header["interpreted"],
                metered=header["metered"],
                trace=header["trace"],
                seed=header["seed"],
            )
        except AnswerTodo:
            return {"todo": True}, b""
        return _reply(ran)

    def on_compile(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Compile the kernels that an answer launches, for a GPU that need not be here."""
        from course_lib.grading.compiles import first_compile_error
        from course_lib.grading.isolation import isolated

        data = wire.unpack(header["data"], blob)
        try:
            with isolated(header["seed"]):
                problem = first_compile_error(_harness(header), self.names[header["name"]], data)
        except Exception as error:
            return {"error": describe(error)}, b""
        return {"problem": problem if problem is None else problem[:_MAX_MESSAGE]}, b""

    def on_probe(self, header: dict[str, Any], blob: bytes) -> tuple[dict[str, Any], bytes]:
        """Try to get out. Asked once, before any submission, by the grader's self-test."""
        return {"escaped": _escapes(SimpleNamespace(**header["targets"]))}, b""


def _small(value: Any) -> Any:
    """A value as an answer may be: not megabytes of it."""
    if isinstance(value, torch.Tensor):
        return wire.plain(value) if value.numel() <= 1024 else wire.Opaque.named("torch", "Tensor")
    return value


def _harness(header: dict[str, Any]) -> Callable[[Any, Any], Any]:
    source, name = header["harness"], header["harness_name"]
    namespace: dict[str, Any] = {"__name__": "harness"}
    future = 0x1000000  # annotations are text: the names in them need not exist here
    exec(compile(source, "<harness>", "exec", flags=future, dont_inherit=True), namespace)
    return namespace[name]


def _without_kernels(harness: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The harness, with kernel launches that do nothing: what is right then came from elsewhere."""

    def idle(answer: Any, data: Any) -> Any:
        from triton.runtime.jit import JITFunction

        kernels: Any = JITFunction
        run = kernels.run
        kernels.run = lambda *args, **kwargs: None
        try:
            return harness(answer, data)
        finally:
            kernels.run = run

    return idle


def _reply(ran: Ran) -> tuple[dict[str, Any], bytes]:
    reply: dict[str, Any] = {"printed": ran.printed[-_MAX_MESSAGE:]}
    if ran.error is not None:
        return {**reply, "error": describe(ran.error)}, b""
    try:
        tree, blob = wire.pack(wire.plain(ran.value))
    except (wire.WireError, RuntimeError) as error:
        return {**reply, "error": describe(error)}, b""
    reply.update(value=tree, changed=ran.changed)
    if (usage := ran.usage) is not None:
        reply["usage"] = {
            "peak_bytes": usage.peak_bytes,
            "largest_bytes": usage.largest_bytes,
            "largest_shape": list(usage.largest_shape),
            "ops": usage.ops,
            "launches": usage.launches,
            "bytes_moved": usage.bytes_moved,
        }
    return reply, blob


def describe(error: BaseException) -> dict[str, Any]:
    """An exception as plain data: its type, its message, and the submission's line it passed."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if match := _CELL.fullmatch(trace.tb_frame.f_code.co_filename):
            line = [int(match[1]), trace.tb_lineno]
        trace = trace.tb_next
    if isinstance(error, SyntaxError) and (match := _CELL.fullmatch(str(error.filename))):
        line = [int(match[1]), error.lineno or 0]
    found: dict[str, Any] = {
        "type": type(error).__name__,
        "message": text_of(error)[:_MAX_MESSAGE],
        "line": line,
        "memory": _is_memory(error),
    }
    if isinstance(error, KernelError):
        found["kernel"] = {
            "what": str(error.what)[:_MAX_MESSAGE],
            "program": None if error.program is None else list(error.program),
            "line": error.line,
            "source": str(error.source)[:300],
            "advice": str(error.advice)[:500],
        }
    return found


def _is_memory(error: BaseException) -> bool:
    text = text_of(error)
    out = ("can't allocate memory", "Cannot allocate memory", "out of memory", "std::bad_alloc")
    return isinstance(error, MemoryError) or any(each in text for each in out)


# The self-test: what must not be possible here.


def _escapes(targets: SimpleNamespace) -> list[str]:
    """Everything that a submission must not be able to do, and could."""
    tried: list[tuple[str, Callable[[], Any]]] = [
        ("read a planted file", lambda: Path(targets.secret).read_text()),
        *((f"list {path}", lambda path=path: os.listdir(path)) for path in targets.absent),
        ("connect to a socket of the host", lambda: _connect(targets.address)),
        ("connect to a network", lambda: _connect(["192.0.2.1", 80])),
        ("write beside the interpreter", lambda: Path(sys.prefix, "planted").touch()),
        ("write into /", lambda: Path("/planted").touch()),
        ("write into /dev", lambda: Path("/dev/planted").touch()),
        ("write into course_lib", lambda: Path(__file__).with_name("planted.py").touch()),
        ("become root", lambda: os.setuid(0)),
        ("allocate past the limit", lambda: _map(targets.bytes, mmap.MAP_PRIVATE)),
        ("share memory past the limit", lambda: _map(targets.bytes, mmap.MAP_SHARED)),
        (
            "write a file past the limit",
            lambda: _fill(f"{os.environ['TMPDIR']}/planted", targets.file),
        ),
        ("raise a limit", lambda: _raise_limit(targets.bytes)),
        ("see other processes", _sees_others),
        ("start processes past the limit", lambda: _forks(targets.processes)),
    ]
    if targets.calls:
        tried.append(("make a user namespace", _user_namespace))
    if targets.memory_files:
        tried.append(("hold memory in a file", lambda: os.memfd_create("planted")))
    escaped = []
    for what, attempt in tried:
        try:
            attempt()
        except (OSError, MemoryError, ValueError, OverflowError):
            continue
        escaped.append(what)
    return escaped


def _connect(address: list[Any]) -> None:
    with socket.socket() as sock:
        sock.settimeout(1)
        sock.connect(tuple(address))


def _map(size: int, kind: int) -> None:
    # Never touched: where nothing limits it, the machine must not suffer.
    mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS).close()


def _fill(path: str, size: int) -> None:
    chunk = bytes(1 << 20)
    try:
        with open(path, "wb") as file:
            for _ in range(size >> 20):
                file.write(chunk)
    finally:
        os.unlink(path)


def _raise_limit(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (2 * size, 2 * size))


def _sees_others() -> None:
    seen = {int(name) for name in os.listdir("/proc") if name.isdigit()}
    if seen <= {os.getpid()}:
        raise OSError("nobody else is here")


def _forks(most: int) -> None:
    children = []
    try:
        for _ in range(most):
            child = os.fork()
            if child == 0:
                try:
                    signal.pause()
                finally:
                    os._exit(0)
            children.append(child)
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def _user_namespace() -> None:
    # By `clone`, which no filter can refuse without refusing every fork.
    clone = {"x86_64": 56, "aarch64": 220}[platform.machine()]
    child = ctypes.CDLL(None).syscall(clone, 0x10000000 | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    if child < 0:
        raise OSError("refused")
    os.waitpid(child, 0)
