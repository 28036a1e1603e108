"""One interpreted launch: rewrite the kernel, patch ``triton.language``, run every program.

Triton's own ``GridExecutor`` does the same; this one leaves nothing behind. It adds no name to the
kernel's globals (Triton's adds 64, which hides a learner's missing import), keeps closures, and
restores ``triton.language`` to the last attribute, so that the same kernel still compiles.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import linecache
import sys
import types
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import numpy as np
import triton.runtime.interpreter as triton_interpreter
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDAOptions, min_dot_size
from triton.language.semantic import TritonSemantic
from triton.runtime.jit import JITFunction, get_jit_fn_file_line
from triton.tools.tensor_descriptor import TensorDescriptor

from course_lib.runtime import low_precision
from course_lib.runtime.guarded_memory import GuardedMemory
from course_lib.runtime.kernel_errors import KernelError
from course_lib.runtime.regions import Regions
from course_lib.runtime.tile import tl
from course_lib.runtime.trace import Launch, Run

__all__ = ["call_device_function", "launch"]

_SEMANTIC = "interpreter_semantic"
_builder = triton_interpreter.interpreter_builder
_Builder = triton_interpreter.InterpreterBuilder

# Rewritten functions, for as long as the originals live.
_rewritten: weakref.WeakKeyDictionary[Callable[..., Any], Callable[..., Any]] = (
    weakref.WeakKeyDictionary()
)
# Code of rewritten functions that a learner or an author wrote, to find the line to report. Keyed
# by id, since hashing a code object is slow; the value keeps the id from being reused.
_learner_code: dict[int, types.CodeType] = {}
_launching = False

# Options of a compiled launch, NVIDIA's and AMD's, that mean nothing here.
_LAUNCH_OPTIONS = frozenset(field.name for field in dataclasses.fields(CUDAOptions)) | {
    "waves_per_eu",
    "matrix_instr_nonkdim",
    "kpack",
    "instrumentation_mode",
}


def launch(
    kernel: JITFunction[Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    grid: Any,
    guard: bool,
    collectors: Sequence[Run],
) -> None:
    """Run every program of one launch.

    Args:
        kernel: What ``@triton.jit`` made.
        args: Positional arguments of the launch.
        kwargs: Keyword arguments of the launch, launch options such as ``num_warps`` included.
        grid: A tuple of one to three integers, or a function from the arguments to one.
        guard: See :func:`course_lib.runtime.interpreter.interpreted`.
        collectors: Runs that record this launch.

    Raises:
        KernelError: A program failed, or a guard refused what it did.
        TypeError: The arguments do not fit the kernel.
    """
    global _launching
    if _launching:
        raise RuntimeError(f"kernel `{kernel.__name__}` was launched from inside a kernel")

    arguments = _bind(kernel, args, kwargs)
    shape = _grid_shape(grid, arguments)
    record = Launch(kernel.__name__, shape)
    memory = GuardedMemory(
        kernel.__name__,
        guard=guard,
        learner_line=_line_of_caller,
        record=record.accesses.append if any(run.trace for run in collectors) else None,
    )
    names = _tensor_names(kernel.arg_names)
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    prepared = {
        name: value if name in constexprs else _prepare(value, names[name], memory.regions)
        for name, value in arguments.items()
    }
    record.tensors.update(memory.regions.infos())
    for run in collectors:
        # A run that is not traced counts launches only, even inside one that is.
        run.launches.append(record if run.trace else Launch(record.kernel, shape, record.tensors))

    for hook in kernel.pre_run_hooks:
        hook(*args, **kwargs)
    run_program = _rewrite(kernel)
    _launching = True
    try:
        with _patched_language(memory, guard=guard), _quiet_numpy():
            converted = {
                name: value if name in constexprs else triton_interpreter._implicit_cvt(value)
                for name, value in prepared.items()
            }
            _run_grid(kernel, run_program, converted, shape, memory)
    finally:
        _launching = False
        memory.regions.copy_back()


def call_device_function(
    function: JITFunction[Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Any:
    """Call a ``@triton.jit`` function from inside an interpreted kernel."""
    if not _launching:
        raise RuntimeError(
            f"`{function.__name__}` is a @triton.jit function: launch it as "
            f"{function.__name__}[grid](...), or call it from inside a kernel"
        )
    return _rewrite(function)(*args, **kwargs)


# Arguments.


def _bind(kernel: JITFunction[Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    own = {name: value for name, value in kwargs.items() if name in kernel.signature.parameters}
    unknown = kwargs.keys() - own.keys() - _LAUNCH_OPTIONS
    if unknown:
        raise TypeError(
            f"kernel `{kernel.__name__}` has no argument {', '.join(map(repr, sorted(unknown)))}; "
            f"it has {', '.join(kernel.arg_names)}"
        )
    try:
        bound = kernel.signature.bind(*args, **own)
    except TypeError as error:
        raise TypeError(f"kernel `{kernel.__name__}`: {error}") from None
    bound.apply_defaults()
    return dict(bound.arguments)


def _grid_shape(grid: Any, arguments: dict[str, Any]) -> tuple[int, int, int]:
    shape: Any = grid(arguments) if callable(grid) else grid
    shape = tuple(shape) if isinstance(shape, Sequence) else (shape,)
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"grid must have 1 to 3 dimensions, got {shape}")
    extents = [int(extent) for extent in shape]
    if min(extents) < 0:
        raise ValueError(f"grid must not be negative, got {shape}")
    x, y, z = extents + [1] * (3 - len(extents))
    return x, y, z


def _tensor_names(arguments: Sequence[str]) -> dict[str, str]:
    """Names to show: `x_ptr` is shown as `x`, unless the kernel has an `x` as well."""
    short = {name: name.removesuffix("_ptr").removesuffix("_desc") or name for name in arguments}
    taken = list(short.values())
    return {
        name: brief if brief == name or taken.count(brief) == 1 else name
        for name, brief in short.items()
    }


def _prepare(value: Any, name: str, regions: Regions) -> Any:
    """Make an argument ready for Triton's own conversion, with pointers for tensors."""
    if isinstance(value, tuple):
        parts = [_prepare(part, f"{name}[{i}]", regions) for i, part in enumerate(value)]
        return triton_interpreter._tuple_create(value, parts)
    if isinstance(value, TensorDescriptor):
        # A copy, not a new descriptor: its checks have run, and want a real tensor.
        descriptor = copy.copy(value)
        descriptor.base = regions.add(name, value.base)
        return descriptor
    if isinstance(value, bool):
        # Triton's conversion takes a bool for a 32-bit integer, and then refuses it.
        return tl.tensor(triton_interpreter.TensorHandle(np.array([value]), tl.int1), tl.int1)
    return regions.add(name, value) if hasattr(value, "data_ptr") else value


# Source.


def _rewrite(function: JITFunction[Any]) -> Callable[..., Any]:
    """The Python function to run: assignments make Triton tensors, as they do when compiled."""
    original = function.fn
    if original not in _rewritten:
        _rewritten[original] = _make_rewritten(function)
    return _rewritten[original]


def _make_rewritten(function: JITFunction[Any]) -> Callable[..., Any]:
    original = function.fn
    file, line = get_jit_fn_file_line(function)
    tree = ast.parse(function.src)
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    triton_interpreter.ASTTransformer().visit(tree)

    # Only the code object is wanted, so nothing of the signature must be evaluated again.
    definition.decorator_list = []
    definition.returns = None
    parameters = definition.args
    for argument in [*parameters.posonlyargs, *parameters.args, *parameters.kwonlyargs]:
        argument.annotation = None
    parameters.defaults = []
    parameters.kw_defaults = [None] * len(parameters.kwonlyargs)

    # Inside a factory, the semantic object and the kernel's own closure are free variables, and
    # the kernel's globals stay as the learner left them.
    captured: dict[str, types.CellType] = dict(
        zip(original.__code__.co_freevars, original.__closure__ or (), strict=True)
    )
    captured[_SEMANTIC] = types.CellType(triton_interpreter.interpreter_semantic)
    factory = ast.parse(f"def factory({', '.join(captured)}): pass")
    outer = factory.body[0]
    assert isinstance(outer, ast.FunctionDef)
    ast.increment_lineno(tree, line - 1)
    outer.body = [definition]
    ast.fix_missing_locations(factory)

    code = compile(factory, file, "exec")
    for name in ("factory", definition.name):
        code = next(
            constant
            for constant in code.co_consts
            if isinstance(constant, types.CodeType) and constant.co_name == name
        )
    # `__module__` is None for code run by a bare exec.
    if not (original.__module__ or "").startswith("triton."):
        _learner_code[id(code)] = code
    rewritten = types.FunctionType(
        code,
        original.__globals__,
        original.__name__,
        original.__defaults__,
        tuple(captured[name] for name in code.co_freevars),
    )
    rewritten.__kwdefaults__ = original.__kwdefaults__
    return rewritten


# The patch.


@contextmanager
def _patched_language(memory: GuardedMemory, *, guard: bool) -> Iterator[None]:
    """Let ``triton.language`` compute with numpy, on guarded memory, for one launch."""
    # Triton patches the language modules that it finds in a kernel's globals. Naming both here
    # serves every kernel and helper, however they import them.
    every_module = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = triton_interpreter._patch_lang(every_module)
    saved_options, saved_functions = _builder.options, dict(_builder.codegen_fns)
    try:
        _patch_methods_of_tensor(scope.set_attr)
        _patch_memory(scope.set_attr, memory)
        _patch_integer_overflow(scope.set_attr, guard=guard)
        low_precision.patch(scope.set_attr, refuse=guard)
        # Triton's builds a table of all types on every call; it is asked several times an operator.
        scope.set_attr(triton_interpreter, "_get_np_dtype", _numpy_dtype)
        if guard:
            # Turns on tl.device_assert.
            _builder.options = dataclasses.replace(saved_options, debug=True)
            # The interpreter multiplies tiles of any size, tensor cores do not.
            _builder.codegen_fns["min_dot_size"] = min_dot_size(GPUTarget("cuda", 80, 32))
        yield
    finally:
        _builder.options = saved_options
        _builder.codegen_fns.clear()
        _builder.codegen_fns.update(saved_functions)
        scope.restore()


def _patch_methods_of_tensor(set_attr: Callable[[object, str, object], None]) -> None:
    """Make ``x.sum(0)`` pass ``x``: the compiler binds such methods itself, Python does not."""
    for name, member in list(vars(tl.tensor).items()):
        if isinstance(member, JITFunction):
            set_attr(tl.tensor, name, _as_method(member))


def _as_method(function: JITFunction[Any]) -> Callable[..., Any]:
    return lambda self, *args, **kwargs: function(self, *args, **kwargs)


def _patch_memory(set_attr: Callable[[object, str, object], None], memory: GuardedMemory) -> None:
    rmw, cas = _Builder.create_atomic_rmw, _Builder.create_atomic_cas

    def create_masked_load(
        self: Any, ptrs: Any, mask: Any, other: Any, cache_modifier: Any, eviction_policy: Any,
        is_volatile: Any,
    ) -> Any:  # fmt: skip
        return memory.load(ptrs, mask, other)

    def create_masked_store(
        self: Any, ptrs: Any, value: Any, mask: Any, cache_modifier: Any, eviction_policy: Any
    ) -> None:
        memory.store(ptrs, value, mask)

    def create_atomic_rmw(self: Any, *args: Any) -> Any:
        return memory.atomic_rmw(functools.partial(rmw, self), *args)

    def create_atomic_cas(self: Any, *args: Any) -> Any:
        return memory.atomic_cas(functools.partial(cas, self), *args)

    # Plain, block-pointer and descriptor accesses, gather and scatter all end in these four.
    for method in (create_masked_load, create_masked_store, create_atomic_rmw, create_atomic_cas):
        set_attr(_Builder, method.__name__, method)


def _patch_integer_overflow(
    set_attr: Callable[[object, str, object], None], *, guard: bool
) -> None:
    """Check for overflow in numpy, at a tenth of the cost of Triton's own check.

    Triton builds the check of every integer operator from five others, and builds it even where
    nobody looks at the result.
    """
    operations = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

    def check(self: Any, lhs: Any, rhs: Any, binary_op: Callable[..., Any]) -> None:
        dtype = lhs.type.scalar
        if not guard or dtype.int_bitwidth >= 64:
            return
        operation = operations[binary_op.__name__]
        exact = operation(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        if exact.size == 0:
            return
        low, high = int(exact.min()), int(exact.max())
        if low < dtype.get_int_min_value() or high > dtype.get_int_max_value():
            value = high if high > dtype.get_int_max_value() else low
            raise KernelError(
                f"{dtype} overflow: `{binary_op.__name__}` gives {value}",
                advice="Convert to 64 bits before multiplying, as in "
                "tl.program_id(0).to(tl.int64) * stride.",
            )

    set_attr(TritonSemantic, "binary_op_sanitize_overflow_impl", check)


_pointer_dtype = np.dtype(np.uint64)
_scalar_dtype = functools.cache(triton_interpreter._get_np_dtype)


def _numpy_dtype(dtype: Any) -> np.dtype:
    # Pointer types have no hash.
    scalar = dtype.scalar
    return _pointer_dtype if scalar.is_ptr() else _scalar_dtype(scalar)


@contextmanager
def _quiet_numpy() -> Iterator[None]:
    """A GPU does not warn about overflow to infinity or a maximum over NaN."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # Triton 3.6 turns arrays of one element into loop bounds; NumPy before 2.4 allows it.
        warnings.filterwarnings("ignore", "Conversion of an array with ndim", DeprecationWarning)
        yield


# Programs and their errors.


def _run_grid(
    kernel: JITFunction[Any],
    run_program: Callable[..., Any],
    arguments: dict[str, Any],
    grid: tuple[int, int, int],
    memory: GuardedMemory,
) -> None:
    _builder.set_grid_dim(*grid)
    for program in np.ndindex(*grid):
        _builder.set_grid_idx(*program)
        memory.start_program(program, grid)
        try:
            run_program(**arguments)
        except Exception as error:
            _raise_kernel_error(error, kernel.__name__, program)


def _raise_kernel_error(error: Exception, kernel: str, program: tuple[int, ...]) -> NoReturn:
    x, y, z = program
    line, source = _line_of_error(error)
    if isinstance(error, KernelError):
        if error.program is None:
            # Raised where the place is not known.
            error.what = f"program {program}: {error.what}"
            error.kernel, error.program = kernel, (x, y, z)
            error.line, error.source = line, source
        raise error.with_traceback(None) from error.__cause__
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause)
    # A failed assertion, as in an unfinished exercise, says all in its message.
    if not isinstance(cause, AssertionError) or not text:
        text = f"{type(cause).__name__}: {text}"
    raise KernelError(
        f"program {program}: {text}", kernel=kernel, program=(x, y, z), line=line, source=source
    ) from cause


def _line_of_caller() -> tuple[int | None, str]:
    """Line and text of the innermost learner's function now running."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if id(frame.f_code) in _learner_code:
            return frame.f_lineno, _source(frame.f_code.co_filename, frame.f_lineno)
        frame = frame.f_back
    return None, ""


def _line_of_error(error: BaseException) -> tuple[int | None, str]:
    """Line and text of the innermost learner's function that the error went through."""
    place: tuple[int | None, str] = None, ""
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if id(code) in _learner_code:
            place = trace.tb_lineno, _source(code.co_filename, trace.tb_lineno)
        trace = trace.tb_next
    return place


def _source(file: str, line: int) -> str:
    return linecache.getline(file, line).strip()
