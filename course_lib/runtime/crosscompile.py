"""Compile Triton kernels for NVIDIA GPUs on a machine that has none.

Triton's wheel carries the whole compiler, NVIDIA's assembler ``ptxas`` included, so a laptop can
ask what a kernel will cost on a GPU it has never seen: registers a thread, bytes spilled to slow
memory, shared memory a block, and whether the tensor cores are used. What it cannot tell is time.

Three layers:

* :func:`cross_compile` compiles one kernel for one architecture and returns :class:`Compiled`.
* :class:`Launch` names one thing that an op may launch. A chapter lists all of them in
  ``course_lib/<chapter>/launches.py`` as ``LAUNCHES``, with ``COMPILED_TABLE`` beside it.
* :func:`check_launches` is the gate: every launch compiles, fits into shared memory, spills no
  more than it admits, and keeps Hopper's matrix products asynchronous. The results are kept in a
  small JSON file by a hash of kernel source, configuration and Triton version, so that only what
  changed is compiled again.

To bring a chapter's table up to date::

    python -m course_lib.runtime.crosscompile course_lib.flash_attention.launches
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from course_lib.runtime.tile import HAS_TRITON, TRITON_MISSING, triton

__all__ = [
    "ARCHITECTURES",
    "SHARED_MEMORY",
    "Compiled",
    "CrossCompileUnavailable",
    "GateReport",
    "Launch",
    "check_launches",
    "cross_compile",
    "kernel_hash",
    "launch_hash",
    "read_table",
]

#: Shared memory that one block may use, in bytes, by compute capability (75 is sm_75, and so on).
SHARED_MEMORY = {
    75: 64 * 1024,  # T4
    80: 163 * 1024,  # A100
    86: 99 * 1024,  # A10, RTX 30
    89: 99 * 1024,  # L4, RTX 40
    90: 227 * 1024,  # H100, H200
    100: 227 * 1024,  # B200
}
ARCHITECTURES = tuple(SHARED_MEMORY)

# Tensor-core instructions in PTX: Ampere's, Hopper's, Blackwell's.
_TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")


class CrossCompileUnavailable(RuntimeError):
    """Triton or its assembler is missing on this machine."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said about one kernel on one architecture."""

    arch: int  #: compute capability, 90 for sm_90
    registers: int  #: 32-bit registers a thread; 255 is the most there is
    spills: int  #: bytes a thread spills to local memory (the stores)
    shared_bytes: int  #: shared memory a block
    num_warps: int  #: warps a block; more than asked for where the compiler specialises warps
    has_mma: bool  #: whether any tensor-core instruction was emitted
    serialized: bool  #: whether ptxas made Hopper's asynchronous products wait for each other
    ptx: str = dataclasses.field(default="", repr=False, compare=False)  #: for the curious

    @property
    def fits(self) -> bool:
        """Whether the shared memory fits on this architecture."""
        return self.shared_bytes <= SHARED_MEMORY[self.arch]


@dataclasses.dataclass(frozen=True)
class Launch:
    """One kernel with one configuration on one architecture: something that an op may launch.

    Args:
        name: Unique in the chapter, readable in a report: ``fwd/sm_90/d128/bf16/causal``.
        kernel: The ``@triton.jit`` function.
        signature: Type of every argument that is not a constexpr, by name: ``*bf16``, ``i32``.
        constexprs: Value of every ``tl.constexpr`` argument, by name.
        arch: Compute capability, 90 for sm_90.
        num_warps: Warps a block.
        num_stages: Depth of the software pipeline.
        aligned: Arguments that are multiples of 16 (pointers: of 16 bytes), as Triton's launcher
            would find out. None means every pointer.
        admitted_spills: Bytes a thread that may spill.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    arch: int
    num_warps: int = 4
    num_stages: int = 3
    aligned: Sequence[str] | None = None
    admitted_spills: int = 0


def cross_compile(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any] | None = None,
    *,
    arch: int,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: Sequence[str] | None = None,
) -> Compiled:
    """Compile a Triton kernel for an architecture that need not be in this machine.

    Args:
        kernel: A ``@triton.jit`` function.
        signature: Type of every argument that is not a constexpr, by name: ``*bf16`` is a pointer
            to bf16, then ``i32``, ``i64``, ``fp32``, ...
        constexprs: Value of every ``tl.constexpr`` argument, by name.
        arch: Compute capability: 75, 80, 86, 89, 90 or 100.
        num_warps: Warps a block.
        num_stages: Depth of the software pipeline.
        aligned: Arguments that are known to be multiples of 16 (for a pointer: of 16 bytes).
            None means every pointer, which is what PyTorch's allocator gives.

    Returns:
        Registers a thread, bytes spilled, shared memory in bytes, and whether the tensor cores
        are used. About a second; a repeated call is answered from Triton's cache.

    Raises:
        CrossCompileUnavailable: Without Triton, or without the ``ptxas`` of its wheel.
        ValueError: For an unknown architecture, or an argument that is neither in ``signature``
            nor in ``constexprs``.
    """
    _require_compiler(arch)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constexprs = dict(constexprs or {})
    names = list(kernel.arg_names)
    missing = [name for name in names if name not in signature and name not in constexprs]
    unknown = [name for name in (*signature, *constexprs) if name not in names]
    if missing or unknown:
        raise ValueError(
            f"kernel `{kernel.__name__}` takes {names}; "
            f"neither in signature nor in constexprs: {missing}; not an argument: {unknown}"
        )
    if aligned is None:
        aligned = [name for name, kind in signature.items() if kind.startswith("*")]

    full_signature = {n: "constexpr" if n in constexprs else signature[n] for n in names}
    source = ASTSource(
        kernel,
        full_signature,
        constexprs={(names.index(name),): value for name, value in constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    ptx = compiled.asm["ptx"]
    log = _assembler_log(ptx, arch)
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spills is None:
        raise RuntimeError(f"cannot read what ptxas said of `{kernel.__name__}`:\n{log}")
    return Compiled(
        arch=arch,
        registers=int(registers.group(1)),
        spills=int(spills.group(1)),
        shared_bytes=int(compiled.metadata.shared),
        num_warps=int(compiled.metadata.num_warps),
        has_mma=_TENSOR_CORE.search(ptx) is not None,
        serialized="wgmma.mma_async instructions are serialized" in log,
        ptx=ptx,
    )


# ---- the gate ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class GateReport:
    """What :func:`check_launches` found."""

    results: dict[str, Compiled]  #: by launch name
    compiled: list[str]  #: names that had to be compiled
    failures: list[str]  #: one readable line for each launch that breaks a rule
    table: dict[str, Any]  #: what to write back, see :func:`write_table`


def check_launches(
    launches: Iterable[Launch],
    table: Mapping[str, Any] | None = None,
    *,
    deep: bool = False,
    report: Callable[[str], None] | None = None,
) -> GateReport:
    """Compile what changed, and hold every launch to shared memory and admitted spills.

    Args:
        launches: What the ops of a chapter may launch.
        table: Results of an earlier run, from :func:`read_table`.
        deep: Compile everything, whatever the table says.
        report: Called with one line for each compile.

    Raises:
        CrossCompileUnavailable: Something has to be compiled and there is no compiler.
        ValueError: Two launches have one name.
    """
    table = dict(table or {})
    results: dict[str, Compiled] = {}
    compiled: list[str] = []
    failures: list[str] = []
    for launch in launches:
        if launch.name in results:
            raise ValueError(f"two launches are named {launch.name!r}")
        digest = launch_hash(launch)
        entry = table.get(launch.name)
        if not deep and entry is not None and entry["hash"] == digest:
            result = Compiled(arch=launch.arch, **{k: entry[k] for k in _RECORDED})
        else:
            compiled.append(launch.name)
            try:
                result = cross_compile(
                    launch.kernel,
                    launch.signature,
                    launch.constexprs,
                    arch=launch.arch,
                    num_warps=launch.num_warps,
                    num_stages=launch.num_stages,
                    aligned=launch.aligned,
                )
            except CrossCompileUnavailable:
                raise
            except Exception as error:  # the compiler raises many types, and each is a finding
                first_line = str(error).strip().splitlines()[:1]
                failures.append(
                    f"{launch.name}: does not compile: {type(error).__name__} {first_line}"
                )
                continue
            if report is not None:
                report(f"{launch.name}: {result}")
        results[launch.name] = result
        failures.extend(_broken_rules(launch, result))
    fresh = {
        launch.name: {
            "hash": launch_hash(launch),
            **{key: getattr(results[launch.name], key) for key in _RECORDED},
        }
        for launch in launches
        if launch.name in results
    }
    return GateReport(results, compiled, failures, fresh)


_RECORDED = ("registers", "spills", "shared_bytes", "num_warps", "has_mma", "serialized")


def _broken_rules(launch: Launch, result: Compiled) -> list[str]:
    broken = []
    if not result.fits:
        broken.append(
            f"{launch.name}: {result.shared_bytes} bytes of shared memory, "
            f"sm_{launch.arch} has {SHARED_MEMORY[launch.arch]}"
        )
    if result.spills > launch.admitted_spills:
        broken.append(
            f"{launch.name}: spills {result.spills} bytes a thread, "
            f"admitted are {launch.admitted_spills}"
        )
    if result.serialized:
        broken.append(f"{launch.name}: its wgmma instructions are serialized")
    return broken


def read_table(path: Path) -> dict[str, Any]:
    """Read the entries of a table that this version of Triton wrote; none if another did."""
    if not path.exists():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["launches"] if document["triton"] == triton.__version__ else {}


def write_table(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table, one launch a line, so that a change reads well in a diff."""
    lines = [f"    {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table)]
    path.write_text(
        "{\n"
        f'  "triton": {json.dumps(triton.__version__)},\n'
        '  "launches": {\n' + ",\n".join(lines) + "\n  }\n}\n",
        encoding="utf-8",
    )


def launch_hash(launch: Launch) -> str:
    """A hash that changes when the compiled code could: source, configuration, Triton version."""
    configuration = (
        sorted(launch.signature.items()),
        sorted((name, repr(value)) for name, value in launch.constexprs.items()),
        launch.arch,
        launch.num_warps,
        launch.num_stages,
        None if launch.aligned is None else sorted(launch.aligned),
        triton.__version__,
    )
    text = kernel_hash(launch.kernel) + repr(configuration)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def kernel_hash(kernel: Any) -> str:
    """Hash a kernel's code, its helpers' code and the constants they read; comments do not count.

    Triton has such a hash too, but it changes with the line a kernel begins on.
    """
    parts: list[str] = []
    seen: set[int] = set()

    def visit(function: Any) -> None:
        if id(function) in seen:
            return
        seen.add(id(function))
        python_function = function.fn
        tree = ast.parse(textwrap.dedent(inspect.getsource(python_function)))
        definition = tree.body[0]
        assert isinstance(definition, ast.FunctionDef)
        if ast.get_docstring(definition) is not None:
            definition.body = definition.body[1:]
        parts.append(ast.dump(definition))
        used = sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)})
        for name in used:
            value = python_function.__globals__.get(name)
            if hasattr(value, "fn") and hasattr(value, "arg_names"):
                visit(value)
            elif isinstance(value, int | float | str):
                parts.append(f"{name}={value!r}")
            elif type(value).__name__ == "constexpr":
                parts.append(f"{name}={value.value!r}")

    visit(kernel)
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


# ---- the assembler -------------------------------------------------------------------------


def _require_compiler(arch: int) -> None:
    if arch not in SHARED_MEMORY:
        known = ", ".join(str(a) for a in ARCHITECTURES)
        raise ValueError(f"arch must be one of {known} (90 is sm_90), got {arch!r}")
    if not HAS_TRITON:
        raise CrossCompileUnavailable(
            f"Triton cannot be imported here ({TRITON_MISSING}), so nothing can be compiled. "
            "Triton has wheels for Linux; on macOS and Windows use a container, WSL 2 or Colab."
        )
    try:
        path = _ptxas(arch)
    except (RuntimeError, OSError) as error:
        path = None
        detail = f" ({error})"
    else:
        detail = ""
    if path is None or not Path(path).exists():
        raise CrossCompileUnavailable(
            f"this Triton {triton.__version__} has no `ptxas` for sm_{arch}{detail}; "
            "the wheel from PyPI carries it: `pip install triton`"
        )


def _ptxas(arch: int) -> str:
    from triton import knobs

    tool = knobs.nvidia.ptxas_blackwell if arch >= 100 else knobs.nvidia.ptxas
    return tool.path


@functools.cache
def _ptxas_options(path: str) -> tuple[str, ...]:
    # Triton passes this where its ptxas knows it; without it the figures would differ.
    usage = subprocess.run([path, "--help"], capture_output=True, text=True, check=False).stdout
    return ("--regAllocOptLevel=2",) if "regAllocOptLevel" in usage else ()


def _assembler_log(ptx: str, arch: int) -> str:
    path = _ptxas(arch)
    target = f"sm_{arch}a" if arch >= 90 else f"sm_{arch}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        flags = ["-v", "-lineinfo", *_ptxas_options(path), f"--gpu-name={target}"]
        run = subprocess.run(
            [path, *flags, str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=False,
        )
    log = run.stderr + run.stdout
    if run.returncode != 0:
        raise RuntimeError(f"ptxas for sm_{arch} failed:\n{log}")
    return log


_LAUNCHES_A_SAVE = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Compile what changed in the given modules, and write their tables."""
    parser = argparse.ArgumentParser(prog="python -m course_lib.runtime.crosscompile")
    parser.add_argument("modules", nargs="+", help="course_lib.<chapter>.launches")
    parser.add_argument("--deep", action="store_true", help="compile everything again")
    options = parser.parse_args(argv)
    status = 0
    for name in options.modules:
        module = importlib.import_module(name)
        path, launches = Path(module.COMPILED_TABLE), list(module.LAUNCHES)
        table = {} if options.deep else read_table(path)
        # Written every few launches, so that a run that is interrupted goes on where it was.
        for start in range(0, len(launches), _LAUNCHES_A_SAVE):
            part = check_launches(launches[start : start + _LAUNCHES_A_SAVE], table, report=print)
            table |= part.table
            write_table(path, table)
        gate = check_launches(launches, table)
        write_table(path, gate.table)
        print(f"{name}: {len(gate.results)} of {len(launches)} launches compile")
        for failure in gate.failures:
            status = 1
            print(f"  {failure}")
    return status


if __name__ == "__main__":
    sys.exit(main())
