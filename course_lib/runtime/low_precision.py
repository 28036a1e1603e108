"""bfloat16 under the interpreter: exact where it can be, refused where it would be wrong.

Triton's interpreter keeps bfloat16 and fp8 as raw bits in unsigned integers, and computes with
those integers: 2.5 + 2.0 gives -2.9e-39. So the rule is:

* moving (load, store, where, reshape) and converting bfloat16 is exact, rounded to nearest even;
* ``tl.dot`` of bfloat16 tiles is exact in its products and accumulates in float32;
* every other computation, and every reduction, is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.runtime.interpreter as triton_interpreter
from triton._C.libtriton import ir

from course_lib.runtime.kernel_errors import UnsupportedDtype
from course_lib.runtime.tile import tl

TensorHandle = triton_interpreter.TensorHandle
_Builder = triton_interpreter.InterpreterBuilder

__all__ = ["bfloat16_from_float32", "float32_from_bfloat16", "patch"]


def float32_from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16 bits (uint16) to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bfloat16_from_float32(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16 bits (uint16), to nearest, ties to even."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    # Half of the last kept place, less one if that place is even: carries exactly when it should.
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def patch(set_attr: Callable[[object, str, object], None], *, refuse: bool) -> None:
    """Correct the conversions and ``tl.dot``, and refuse the rest.

    Args:
        set_attr: Sets an attribute for the time of the launch.
        refuse: Raise :class:`UnsupportedDtype` on arithmetic; otherwise leave it as Triton has it.
    """
    convert, float_to_float, dot = _Builder.cast_impl, _Builder.create_fp_to_fp, _Builder.create_dot

    def cast_impl(self: Any, source: Any, target_type: Any) -> Any:
        if _is_bfloat16(source.dtype) or _is_bfloat16(target_type):
            return _cast(source, target_type)
        return convert(self, source, target_type)

    def create_fp_to_fp(self: Any, source: Any, target_type: Any, rounding_mode: Any) -> Any:
        truncates = rounding_mode == ir.ROUNDING_MODE.RTZ
        is_bfloat16 = _is_bfloat16(source.dtype) or _is_bfloat16(target_type)
        is_fp8 = source.dtype.scalar.is_fp8() or target_type.scalar.is_fp8()
        if is_bfloat16 and not is_fp8 and not truncates:
            return _cast(source, target_type)
        return float_to_float(self, source, target_type, rounding_mode)

    def create_dot(self: Any, a: Any, b: Any, accumulator: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), accumulator, *options)

    def get_bf16(self: Any, value: float) -> Any:
        return TensorHandle(bfloat16_from_float32(np.array([value])), tl.bfloat16)

    set_attr(_Builder, "cast_impl", cast_impl)
    set_attr(_Builder, "create_fp_to_fp", create_fp_to_fp)
    set_attr(_Builder, "create_dot", create_dot)
    set_attr(_Builder, "get_bf16", get_bf16)
    if refuse:
        _patch_refusals(set_attr)


def _patch_refusals(set_attr: Callable[[object, str, object], None]) -> None:
    def refusing(name: str) -> Callable[..., Any]:
        original = getattr(_Builder, name)

        def checked(self: Any, first: Any, *rest: Any, **options: Any) -> Any:
            if _is_raw_bits(first.dtype):
                _refuse(first.dtype)
            return original(self, first, *rest, **options)

        return checked

    # All binary and unary operators end in the first two.
    for name in ("binary_op", "unary_op", "create_clampf", "create_fma", "create_erf",
                 "create_rsqrt", "create_idiv"):  # fmt: skip
        set_attr(_Builder, name, refusing(name))

    # Reductions and scans go past the builder; all of them check their tensors first.
    interface = triton_interpreter.ReduceScanOpInterface
    check_tensor = interface.check_tensor

    def checked_tensors(self: Any, tensors: Any) -> None:
        check_tensor(self, tensors)
        for tensor in tensors:
            if _is_raw_bits(tensor.dtype):
                _refuse(tensor.dtype)

    set_attr(interface, "check_tensor", checked_tensors)


def _is_bfloat16(dtype: Any) -> bool:
    return dtype.scalar.is_bf16()


def _is_raw_bits(dtype: Any) -> bool:
    scalar = dtype.scalar
    return scalar.is_bf16() or scalar.is_fp8()


def _cast(source: Any, target_type: Any) -> Any:
    data = float32_from_bfloat16(source.data) if _is_bfloat16(source.dtype) else source.data
    target = target_type.scalar
    if target.is_bf16():
        data = bfloat16_from_float32(data)
    return TensorHandle(data.astype(triton_interpreter._get_np_dtype(target), copy=False), target)


def _widened(operand: Any) -> Any:
    if _is_bfloat16(operand.dtype):
        return TensorHandle(float32_from_bfloat16(operand.data), tl.float32)
    return operand


def _refuse(dtype: Any) -> None:
    raise UnsupportedDtype(
        f"this computes in {dtype.scalar}, which the interpreter holds as raw bits: the result "
        "would be wrong",
        advice="Convert after the load, x = tl.load(...).to(tl.float32), compute in float32, and "
        "let the store convert back. (tl.dot takes bfloat16 as it is.)",
    )
