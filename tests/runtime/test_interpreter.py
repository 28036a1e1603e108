"""The interpreter and its guards: the same kernel, run in Python, with every access checked."""

# A launch passes integers for `tl.constexpr` parameters, and options that are no parameters.
# pyright: reportArgumentType=false, reportCallIssue=false

import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch

from course_lib.runtime.interpreter import (
    DataRace,
    KernelError,
    OutOfBounds,
    UnsupportedDtype,
    interpret_everywhere,
    interpreted,
    interpreting,
)
from course_lib.runtime.tile import HAS_TRITON, tl, triton

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@triton.jit
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask)
    y = tl.load(y_ptr + offs, mask=mask)
    tl.store(out_ptr + offs, x + y, mask=mask)


@triton.jit
def square(x):
    return x * x


@triton.jit
def row_norm_kernel(x_ptr, out_ptr, stride, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row = tl.program_id(0)
    offs_d = tl.arange(0, BLOCK_D)
    x = tl.load(x_ptr + row * stride + offs_d, mask=offs_d < D, other=0.0)
    tl.store(out_ptr + row, tl.sqrt(tl.sum(square(x), axis=0)))


@triton.jit
def copy_kernel(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs + shift, mask=offs < n), mask=offs < n)


def copy(x, out, shift=0, n=None, block=16):
    n = out.numel() if n is None else n
    copy_kernel[(triton.cdiv(n, block),)](x, out, n, shift, BLOCK=block)


# Running.


def test_a_launch_computes():
    x, y, out = torch.randn(100), torch.randn(100), torch.full((100,), torch.nan)
    with interpreted() as run:
        add_kernel[(4,)](x, y, out, 100, BLOCK=32)
    torch.testing.assert_close(out, x + y, rtol=0, atol=0)
    assert [(launch.kernel, launch.grid) for launch in run.launches] == [("add_kernel", (4, 1, 1))]
    assert run.programs == 4


def test_keyword_launch_callable_grid_and_launch_options():
    x, out = torch.randn(70), torch.empty(70)
    with interpreted():
        add_kernel[lambda meta: (triton.cdiv(meta["n"], meta["BLOCK"]),)](
            x_ptr=x, y_ptr=x, out_ptr=out, n=70, BLOCK=64, num_warps=2, num_stages=1
        )
    torch.testing.assert_close(out, 2 * x)


def test_helpers_reductions_and_methods():
    x, out = torch.randn(5, 24), torch.empty(5)
    with interpreted():
        row_norm_kernel[(5,)](x, out, x.stride(0), D=24, BLOCK_D=32)
    torch.testing.assert_close(out, x.norm(dim=1))


@triton.jit
def methods_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr, x.sum(0))
    tl.store(out_ptr + 1, x.max(axis=0))
    tl.store(out_ptr + 2, x.to(tl.int32).argmax(0))


def test_methods_of_tensors():
    out = torch.empty(3)
    with interpreted():
        methods_kernel[(1,)](torch.arange(16.0), out, BLOCK=16)
    assert out.tolist() == [120, 15, 15]


@triton.jit
def combine_max_count(m, c, other_m, other_c):
    both = tl.maximum(m, other_m)
    return both, tl.where(m == both, c, 0) + tl.where(other_m == both, other_c, 0)


@triton.jit
def many_operations_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.cumsum(x, 0))
    tl.store(out_ptr + BLOCK + offs, tl.sort(x))
    largest, count = tl.reduce((x, tl.full([BLOCK], 1.0, tl.float32)), 0, combine_max_count)
    tl.store(out_ptr + 2 * BLOCK, largest)
    tl.store(out_ptr + 2 * BLOCK + 1, count)


def test_scan_sort_and_custom_reduction():
    x = torch.tensor([3.0, 1, 4, 1, 5, 9, 2, 9])
    out = torch.empty(18)
    with interpreted():
        many_operations_kernel[(1,)](x, out, BLOCK=8)
    torch.testing.assert_close(out[:8], x.cumsum(0))
    torch.testing.assert_close(out[8:16], x.sort().values)
    assert out[16:].tolist() == [9, 2]


def test_kernels_may_close_over_their_surroundings():
    factor: tl.constexpr = tl.constexpr(3)

    @triton.jit
    def scale(x):
        return x * factor

    @triton.jit
    def scale_kernel(x_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(x_ptr + offs, scale(tl.load(x_ptr + offs)))

    x = torch.ones(8)
    with interpreted():
        scale_kernel[(1,)](x, BLOCK=8)
    assert x.tolist() == [3.0] * 8


def test_string_annotations_are_understood():
    # A kernel module may start with `from __future__ import annotations`.
    @triton.jit
    def fill_kernel(x_ptr, BLOCK: "tl.constexpr"):
        tl.store(x_ptr + tl.arange(0, BLOCK), 1.0)

    x = torch.zeros(8)
    with interpreted():
        fill_kernel[(1,)](x, BLOCK=8)
    assert x.sum() == 8


@triton.jit
def block_pointer_kernel(x_ptr, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    source = tl.make_block_ptr(
        x_ptr, (M, N), (N, 1), (tl.program_id(0) * BLOCK_M, 0), (BLOCK_M, BLOCK_N), (1, 0)
    )
    target = tl.make_block_ptr(
        out_ptr, (M, N), (N, 1), (tl.program_id(0) * BLOCK_M, 0), (BLOCK_M, BLOCK_N), (1, 0)
    )
    tile = tl.load(source, boundary_check=(0, 1), padding_option="zero")
    tl.store(target, tile * 2, boundary_check=(0, 1))


@triton.jit
def descriptor_kernel(x_desc, out_ptr, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    out_desc = tl.make_tensor_descriptor(out_ptr, [M, N], [N, 1], [BLOCK_M, BLOCK_N])
    row = tl.program_id(0) * BLOCK_M
    out_desc.store([row, 0], x_desc.load([row, 0]) * 2)


@pytest.mark.filterwarnings("ignore:tl.make_block_ptr is deprecated")
def test_block_pointers_and_descriptors():
    from triton.tools.tensor_descriptor import TensorDescriptor

    x = torch.randn(10, 12)
    by_block, by_descriptor = torch.empty(10, 12), torch.empty(10, 12)
    with interpreted(trace=True) as run:
        block_pointer_kernel[(3,)](x, by_block, 10, 12, BLOCK_M=4, BLOCK_N=16)
        descriptor_kernel[(3,)](
            TensorDescriptor.from_tensor(x, [4, 16]), by_descriptor, 10, 12, BLOCK_M=4, BLOCK_N=16
        )
    torch.testing.assert_close(by_block, 2 * x)
    torch.testing.assert_close(by_descriptor, 2 * x)
    assert run.bytes_by_tensor("load") == {"x": 2 * x.numel() * 4}


def test_views_share_a_storage():
    qkv = torch.randn(3, 40)
    expected = qkv[0] + qkv[1]
    with interpreted():
        add_kernel[(2,)](qkv[0], qkv[1], qkv[2], 40, BLOCK=32)
    torch.testing.assert_close(qkv[2], expected)


def test_empty_tensors_and_empty_grids():
    empty = torch.empty(0)
    with interpreted() as run:
        add_kernel[(1,)](empty, empty, empty, 0, BLOCK=16)
        add_kernel[(0,)](empty, empty, empty, 0, BLOCK=16)
    assert run.programs == 1
    with interpreted(), pytest.raises(OutOfBounds, match="`x` \\(0 elements"):
        copy(empty, torch.empty(3))


def test_tuples_none_and_bool_arguments():
    @triton.jit
    def tuple_kernel(pair, extra, double, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        value = tl.load(pair[0] + offs)
        if extra is None and double:
            value = value * 2
        tl.store(pair[1] + offs, value)

    x, out = torch.ones(8), torch.zeros(8)
    with interpreted(trace=True) as run:
        tuple_kernel[(1,)]((x, out), None, True, BLOCK=8)
    assert out.tolist() == [2.0] * 8
    assert set(run.bytes_by_tensor()) == {"pair[0]", "pair[1]"}


def test_reinterpreted_tensors():
    x, out = torch.randn(16, dtype=torch.float16), torch.empty(16, dtype=torch.int16)
    with interpreted():
        copy(triton.reinterpret(x, tl.int16), out)
    torch.testing.assert_close(out, x.view(torch.int16))


# One process, two ways to run a kernel.


def test_nothing_is_left_behind():
    names = set(globals())
    methods = dict(vars(tl))
    tensor = dict(vars(tl.tensor))
    core = dict(vars(tl.core))
    from triton.runtime.interpreter import InterpreterBuilder

    builder = dict(vars(InterpreterBuilder))
    with interpreted():
        row_norm_kernel[(1,)](torch.randn(1, 8), torch.empty(1), 8, D=8, BLOCK_D=8)
        with pytest.raises(KernelError):
            copy(torch.empty(3), torch.empty(3), shift=9)
    assert set(globals()) == names
    assert dict(vars(tl)) == methods
    assert dict(vars(tl.tensor)) == tensor
    assert dict(vars(tl.core)) == core
    assert dict(vars(InterpreterBuilder)) == builder


def cubin():
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(
        row_norm_kernel,
        signature={
            "x_ptr": "*fp32", "out_ptr": "*fp32", "stride": "i32",
            "D": "constexpr", "BLOCK_D": "constexpr",
        },
        constexprs={"D": 24, "BLOCK_D": 32},
    )  # fmt: skip
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]


def test_a_kernel_compiles_the_same_before_during_and_after(monkeypatch):
    # Without the disk cache, or the second compile would only read the first.
    monkeypatch.setattr("triton.knobs.compilation.always_compile", True)
    before = cubin()
    with interpreted():
        row_norm_kernel[(1,)](torch.randn(1, 24), torch.empty(1), 24, D=24, BLOCK_D=32)
        with pytest.raises(KernelError):
            copy(torch.empty(3), torch.empty(3), shift=9)
        during = cubin()
    assert before == during == cubin()


def test_blocks_nest_and_restore():
    from triton.runtime.jit import JITFunction

    compiled = JITFunction.run
    x, out = torch.randn(16), torch.empty(16)
    assert not interpreting()
    with interpreted() as outer:
        copy(x, out)
        with interpreted(trace=True) as inner:
            copy(x, out)
        copy(x, out)
        assert interpreting()
        with pytest.raises(ZeroDivisionError), interpreted():
            raise ZeroDivisionError
        assert interpreting()
    assert (len(outer.launches), len(inner.launches)) == (3, 1)
    assert outer.launches[1].accesses == []
    assert len(inner.launches[0].accesses) == 2
    assert JITFunction.run is compiled
    assert not interpreting()


def test_interpret_everywhere():
    out = torch.empty(16)
    interpret_everywhere()
    try:
        assert interpreting()
        copy(torch.arange(16.0), out)
        with interpreted() as run:
            copy(torch.arange(16.0), out)
    finally:
        interpret_everywhere(enabled=False)
    assert out.sum() == 120
    assert len(run.launches) == 1
    assert not interpreting()


def test_calling_a_kernel_from_the_host_is_refused():
    with interpreted(), pytest.raises(RuntimeError, match=r"launch it as square\[grid\]"):
        square(3)
    with pytest.raises(RuntimeError, match="outside of the scope of a kernel"):
        square(3)


def test_bad_launches():
    x = torch.empty(4)
    with interpreted() as run:
        with pytest.raises(TypeError, match="`copy_kernel` has no argument 'BLOK'"):
            copy_kernel[(1,)](x, x, 4, 0, BLOCK=4, BLOK=4)
        with pytest.raises(TypeError, match="missing a required argument: 'BLOCK'"):
            copy_kernel[(1,)](x, x, 4, 0)
        with pytest.raises(ValueError, match="1 to 3 dimensions"):
            copy_kernel[(1, 1, 1, 1)](x, x, 4, 0, BLOCK=4)
        with pytest.raises(ValueError, match="`x` has no memory"):
            copy_kernel[(1,)](x.to("meta"), x, 4, 0, BLOCK=4)
    assert run.launches == []


# Bounds.


def test_reading_past_the_end_names_everything():
    with interpreted(), pytest.raises(OutOfBounds) as caught:
        copy(torch.empty(100), torch.empty(128), block=64)
    error = caught.value
    assert "program (1, 0, 0) reads 28 elements past the end of `x`" in str(error)
    assert "first bad index 100" in str(error)
    assert "in kernel `copy_kernel`, line" in str(error)
    assert "tl.load(x_ptr + offs + shift" in error.source
    assert (error.kernel, error.program, error.tensor) == ("copy_kernel", (1, 0, 0), "x")
    assert isinstance(error.line, int)


def test_before_the_start_and_writes():
    with interpreted():
        with pytest.raises(OutOfBounds, match=r"reads 3 elements before the start of `x`"):
            copy(torch.empty(16), torch.empty(16), shift=-3)
        with pytest.raises(OutOfBounds, match=r"writes 6 elements past the end of `out`"):
            copy(torch.empty(16), torch.empty(10), n=16)


def test_an_overrun_is_not_hidden_by_the_tensor_around_a_view():
    parent = torch.zeros(64)
    with interpreted(), pytest.raises(OutOfBounds, match="6 elements past the end of `out`"):
        copy(torch.ones(16), parent[20:30], n=16)
    assert parent.sum() == 0


def test_the_gaps_of_a_strided_view():
    parent = torch.randn(4, 16)
    with interpreted(), pytest.raises(OutOfBounds, match="reads 12 elements in the gaps of `x`"):
        copy(parent[:, :10], torch.empty(32), block=32)
    # The transpose of a whole matrix has no gaps.
    out = torch.empty(64)
    with interpreted():
        copy(parent.T, out)
    torch.testing.assert_close(out, parent.reshape(-1))


def test_a_huge_offset_reaches_nothing():
    with interpreted():
        with pytest.raises(OutOfBounds, match="past the end of `x`"):
            copy(torch.empty(16), torch.empty(16), shift=2**33)
        with pytest.raises(OutOfBounds, match="belong to no tensor argument"):
            copy(torch.empty(16), torch.empty(16), shift=2**50)


@triton.jit
def two_tensors_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    pointers = tl.where(offs % 2 == 0, x_ptr + offs, y_ptr + offs)
    tl.store(out_ptr + offs, tl.load(pointers))


def test_one_tile_may_point_into_two_tensors():
    x, y, out = torch.zeros(8), torch.ones(8), torch.empty(8)
    with interpreted(trace=True) as run:
        two_tensors_kernel[(1,)](x, y, out, BLOCK=8)
    assert out.tolist() == [0, 1] * 4
    assert run.bytes_by_tensor("load") == {"x": 16, "y": 16}


def test_bounds_hold_without_guards():
    with interpreted(guard=False), pytest.raises(OutOfBounds):
        copy(torch.empty(16), torch.empty(10), n=16)


def test_outputs_before_an_error_stay():
    out = torch.zeros(32)
    with interpreted(), pytest.raises(OutOfBounds):
        copy(torch.ones(20), out)
    assert out.tolist() == [1.0] * 16 + [0.0] * 16


# Masked lanes.


@triton.jit
def masked_sum_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sum(tl.load(x_ptr + offs, mask=offs < n), axis=0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_masked_lanes_without_other_are_nan(dtype):
    out = torch.zeros(1, dtype=dtype)
    with interpreted():
        masked_sum_kernel[(1,)](torch.ones(10, dtype=dtype), out, 10, BLOCK=16)
    assert out.isnan().all()
    with interpreted(guard=False):
        masked_sum_kernel[(1,)](torch.ones(10, dtype=dtype), out, 10, BLOCK=16)
    assert out.item() == 10


def test_masked_integer_lanes_are_zero():
    out = torch.zeros(1, dtype=torch.int32)
    with interpreted():
        masked_sum_kernel[(1,)](torch.ones(10, dtype=torch.int32), out, 10, BLOCK=16)
    assert out.item() == 10


# Races.


@triton.jit
def same_place_kernel(out_ptr, scale):
    tl.store(out_ptr, tl.program_id(0) * scale)


@triton.jit
def shift_in_place_kernel(x_ptr, step, n):
    i = tl.program_id(0)
    value = tl.load(x_ptr + i + step, mask=(i + step < n) & (i + step >= 0), other=0.0)
    tl.store(x_ptr + i, value + 1)


@triton.jit
def histogram_kernel(x_ptr, counts_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    bins = tl.load(x_ptr + offs, mask=offs < n)
    tl.atomic_add(counts_ptr + bins, 1, mask=offs < n)


def test_two_programs_write_different_values():
    with interpreted(), pytest.raises(DataRace) as caught:
        same_place_kernel[(3,)](torch.zeros(1, dtype=torch.int32), 5)
    assert "program (1, 0, 0) writes 1 element of `out`" in str(caught.value)
    assert "which program (0, 0, 0) wrote with another value" in str(caught.value)
    assert "index 0" in str(caught.value)


def test_two_programs_may_write_the_same_value():
    with interpreted():
        same_place_kernel[(3,)](torch.ones(1, dtype=torch.int32), 0)


def test_read_after_write():
    with interpreted(), pytest.raises(DataRace, match=r"reads .*which program \(0, 0, 0\) wrote"):
        shift_in_place_kernel[(8,)](torch.zeros(8), -1, 8)


def test_write_after_read():
    with interpreted(), pytest.raises(DataRace, match=r"overwrites .*which program \(0, 0, 0\) re"):
        shift_in_place_kernel[(8,)](torch.zeros(8), 1, 8)


def test_write_after_read_is_seen_through_a_later_read_of_ones_own():
    @triton.jit
    def stencil_kernel(x_ptr, n):
        i = tl.program_id(0)
        right = tl.load(x_ptr + i + 1, mask=i + 1 < n, other=0.0)
        tl.store(x_ptr + i, tl.load(x_ptr + i) + right)

    with interpreted(), pytest.raises(DataRace, match="overwrites"):
        stencil_kernel[(4,)](torch.ones(4), 4)


def test_views_of_one_storage_race_with_each_other():
    parent = torch.zeros(20)
    with interpreted(), pytest.raises(DataRace, match="reads 4 elements of `x`"):
        copy(parent[:16], parent[4:], block=8)


def test_views_of_two_dtypes_race_by_bytes():
    @triton.jit
    def halves_kernel(wide_ptr, narrow_ptr):
        tl.store(narrow_ptr + 5 * tl.program_id(0), 1.0)
        tl.store(wide_ptr + 2 - tl.program_id(0) * 2, 1.0)

    wide = torch.zeros(4)
    with interpreted(), pytest.raises(DataRace, match=r"1 element of `narrow`, which program \(0"):
        halves_kernel[(2,)](wide, wide.view(torch.float16))


def test_in_place_by_one_owner_is_no_race():
    x = torch.ones(40)
    with interpreted():
        add_kernel[(3,)](x, x, x, 40, BLOCK=16)
    assert x.tolist() == [2.0] * 40


def test_lanes_of_one_store_that_disagree():
    @triton.jit
    def wrap_kernel(out_ptr, BLOCK: tl.constexpr):
        offs = tl.arange(0, BLOCK)
        tl.store(out_ptr + offs % 4, offs)

    with interpreted(), pytest.raises(DataRace, match="in one store"):
        wrap_kernel[(1,)](torch.zeros(8, dtype=torch.int32), BLOCK=8)


def test_atomics_are_no_race_among_themselves():
    x = torch.tensor([0, 1, 1, 3, 3, 3, 0, 2, 2, 1], dtype=torch.int32)
    counts = torch.zeros(4, dtype=torch.int32)
    with interpreted(trace=True) as run:
        histogram_kernel[(3,)](x, counts, 10, BLOCK=4)
    assert counts.tolist() == torch.bincount(x).tolist()
    assert run.bytes_by_tensor("atomic") == {"counts": 40}
    with interpreted(), pytest.raises(OutOfBounds, match="updates 3 elements past the end"):
        histogram_kernel[(1,)](torch.tensor([3, 4, 5, 6], dtype=torch.int32), counts, 4, BLOCK=4)


def test_atomics_race_with_plain_accesses():
    @triton.jit
    def mixed_kernel(total_ptr, out_ptr):
        tl.atomic_add(total_ptr, 1.0)
        tl.store(out_ptr + tl.program_id(0), tl.load(total_ptr))

    with interpreted(), pytest.raises(DataRace, match="several programs changed with an atomic"):
        mixed_kernel[(2,)](torch.zeros(1), torch.zeros(2))


def test_a_lock_protects():
    @triton.jit
    def locked_kernel(lock_ptr, total_ptr):
        while tl.atomic_cas(lock_ptr, 0, 1) == 1:
            pass
        tl.store(total_ptr, tl.load(total_ptr) + 1.0)
        tl.atomic_xchg(lock_ptr, 0)

    total = torch.zeros(1)
    with interpreted():
        locked_kernel[(5,)](torch.zeros(1, dtype=torch.int32), total)
    assert total.item() == 5


def test_without_guards_races_pass():
    out = torch.zeros(1, dtype=torch.int32)
    with interpreted(guard=False):
        same_place_kernel[(3,)](out, 5)
    assert out.item() == 10


# bfloat16.


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + offs)
    b = tl.load(b_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(a, b))


@triton.jit
def upcast_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    mask = offs < n
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, x * 1.001, mask=mask)


def test_bfloat16_arithmetic_is_refused():
    x = torch.ones(8, dtype=torch.bfloat16)
    with interpreted(), pytest.raises(UnsupportedDtype) as caught:
        add_kernel[(1,)](x, x, x, 8, BLOCK=8)
    assert "program (0, 0, 0)" in str(caught.value)
    assert ".to(tl.float32)" in str(caught.value)
    assert caught.value.source.startswith("tl.store(out_ptr + offs, x + y")


def test_bfloat16_reductions_and_atomics_are_refused():
    x = torch.ones(16, dtype=torch.bfloat16)
    with interpreted(), pytest.raises(UnsupportedDtype):
        masked_sum_kernel[(1,)](x, torch.zeros(1), 16, BLOCK=16)

    @triton.jit
    def atomic_kernel(x_ptr):
        tl.atomic_add(x_ptr, 1.0)

    with interpreted(), pytest.raises(UnsupportedDtype, match="atomic on bf16"):
        atomic_kernel[(1,)](x)


def test_bfloat16_conversions_round_to_nearest_even():
    x = torch.randn(1000, dtype=torch.bfloat16)
    out = torch.empty_like(x)
    with interpreted():
        upcast_kernel[(1,)](x, out, 1000, BLOCK=1024)
    torch.testing.assert_close(out, (x.float() * 1.001).bfloat16(), rtol=0, atol=0)


def test_bfloat16_dot_is_exact_in_its_products():
    a, b = (torch.randn(16, 16).bfloat16() for _ in range(2))
    out = torch.empty(16, 16)
    with interpreted():
        dot_kernel[(1,)](a, b, out, N=16)
    torch.testing.assert_close(out, a.float() @ b.float())


def test_every_bfloat16_conversion_agrees_with_torch():
    from course_lib.runtime.low_precision import bfloat16_from_float32, float32_from_bfloat16

    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    wide = float32_from_bfloat16(every.numpy())
    np.testing.assert_array_equal(wide, every.view(torch.bfloat16).float().numpy())
    special = [0.0, -0.0, 3.4e38, -3.4e38, 1e-45, float("inf"), float("nan"), 1 + 2**-8]
    values = torch.cat([torch.randn(10_000) * 1e3, torch.tensor(special)])
    ours = torch.from_numpy(bfloat16_from_float32(values.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(ours, values.bfloat16(), rtol=0, atol=0, equal_nan=True)


# Errors.


def test_an_unfinished_kernel_says_so():
    @triton.jit
    def todo_kernel(x_ptr):
        tl.static_assert(False, "TODO: keep a running maximum")

    with interpreted(), pytest.raises(KernelError, match="TODO: keep a running maximum") as caught:
        todo_kernel[(1,)](torch.empty(1))
    assert "static_assert" in caught.value.source


def test_the_root_cause_and_the_learners_line_come_through_helpers():
    @triton.jit
    def bad_helper(x):
        return np.exp(x) + missing_name  # noqa: F821  # pyright: ignore

    @triton.jit
    def outer_kernel(x_ptr):
        tl.store(x_ptr, bad_helper(tl.load(x_ptr)))

    with interpreted(), pytest.raises(KernelError) as caught:
        outer_kernel[(1,)](torch.zeros(1))
    assert caught.value.kernel == "outer_kernel"
    assert "np.exp(x)" in caught.value.source
    assert caught.value.__cause__ is not None


def test_a_missing_import_is_not_hidden():
    namespace: dict[str, Any] = {"triton": triton, "tl": tl}
    source = (
        "@triton.jit\ndef no_numpy_kernel(x_ptr):\n    x = tl.load(x_ptr)\n"
        "    tl.store(x_ptr, Callable)\n"
    )
    import linecache

    linecache.cache["<cell>"] = (len(source), None, source.splitlines(keepends=True), "<cell>")
    exec(compile(source, "<cell>", "exec"), namespace)
    names = set(namespace)
    for _ in range(2):
        with interpreted(), pytest.raises(KernelError, match="NameError: name 'Callable'") as error:
            namespace["no_numpy_kernel"][(1,)](torch.zeros(1))
    assert (error.value.line, error.value.source) == (4, "tl.store(x_ptr, Callable)")
    assert set(namespace) == names


def test_integer_overflow_and_device_assert():
    @triton.jit
    def overflow_kernel(x_ptr, stride):
        tl.store(x_ptr + (tl.program_id(0) + 2) * stride, 1.0)

    @triton.jit
    def assert_kernel(x_ptr):
        tl.device_assert(tl.load(x_ptr) > 0, "must be positive")

    with interpreted():
        with pytest.raises(KernelError, match=r"program \(0, 0, 0\): int32 overflow: `mul` gives"):
            overflow_kernel[(3,)](torch.zeros(1), 2**30)
        with pytest.raises(KernelError, match="must be positive"):
            assert_kernel[(1,)](torch.zeros(1))


def test_errors_pickle():
    error = OutOfBounds("reads", kernel="k", program=(1, 2, 3), tensor="x", line=4, source="s")
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert (copy.program, copy.tensor, copy.line) == ((1, 2, 3), "x", 4)


def test_a_gpu_would_not_warn():
    @triton.jit
    def divide_kernel(x_ptr):
        tl.store(x_ptr, tl.exp(tl.load(x_ptr)) / 0.0)

    x = torch.full((1,), 1000.0)
    with warnings.catch_warnings(), interpreted():
        warnings.simplefilter("error")
        divide_kernel[(1,)](x)
    assert x.isinf().all()


def test_a_dot_too_small_for_a_gpu_is_refused():
    with interpreted(), pytest.raises(KernelError, match="K >= 16"):
        dot_kernel[(1,)](torch.ones(8, 8), torch.ones(8, 8), torch.ones(8, 8), N=8)


# The trace.


@triton.jit
def tile_kernel(x_ptr, out_ptr, T, stride_b, stride_t, D: tl.constexpr, BLOCK: tl.constexpr):
    offs_t = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    offs_d = tl.arange(0, D)
    here = x_ptr + tl.program_id(1) * stride_b + offs_t[:, None] * stride_t + offs_d[None, :]
    x = tl.load(here, mask=offs_t[:, None] < T, other=0.0)
    tl.store(out_ptr + tl.program_id(1) * T + offs_t, tl.sum(x, axis=1), mask=offs_t < T)


def test_the_trace_knows_tiles():
    x, out = torch.randn(2, 10, 8), torch.empty(2, 10)
    with interpreted(trace=True) as run:
        tile_kernel[(3, 2)](x, out, 10, x.stride(0), x.stride(1), D=8, BLOCK=4)
    torch.testing.assert_close(out, x.sum(-1))
    assert run.programs == 6
    assert run.bytes_loaded == x.numel() * 4
    assert run.bytes_stored == out.numel() * 4
    assert run.bytes_by_tensor() == {"x": 640, "out": 80}

    (launch,) = run.launches
    assert launch.tensors["x"].shape == (2, 10, 8)
    last = launch.accesses[-2]
    assert (last.program, last.kind, last.tensor, last.shape) == ((2, 1, 0), "load", "x", (4, 8))
    assert (last.start, last.stop, last.elements, last.nbytes) == (144, 160, 16, 64)
    assert last.dtype == "fp32"
    assert launch.box(last) == (range(1, 2), range(8, 10), range(8))


def test_the_box_of_a_strided_view():
    parent = torch.randn(3, 12, 16)
    view, out = parent[1:, 1:11, 4:12], torch.empty(2, 10)
    with interpreted(trace=True) as run:
        tile_kernel[(3, 2)](view, out, 10, view.stride(0), view.stride(1), D=8, BLOCK=4)
    torch.testing.assert_close(out, view.sum(-1))
    (launch,) = run.launches
    assert [launch.box(a) for a in launch.accesses if a.kind == "load"] == [
        (range(b, b + 1), range(t, min(t + 4, 10)), range(8)) for t in (0, 4, 8) for b in (0, 1)
    ]


def test_fully_masked_accesses_cost_nothing():
    with interpreted(trace=True) as run:
        copy_kernel[(2,)](torch.ones(4), torch.zeros(4), 4, 0, BLOCK=4)
    empty = [a for a in run.launches[0].accesses if a.program == (1, 0, 0)]
    assert [(a.kind, a.start, a.stop, a.elements, a.nbytes) for a in empty] == [
        ("load", 0, 0, 0, 0),
        ("store", 0, 0, 0, 0),
    ]
    assert launch_box(run, empty[0]) == (range(0),)


def launch_box(run, access):
    return run.launches[0].box(access)


def test_an_untraced_run_does_not_pretend():
    with interpreted() as run:
        copy(torch.ones(4), torch.zeros(4))
    with pytest.raises(RuntimeError, match="trace=True"):
        _ = run.bytes_loaded


@pytest.mark.gpu
def test_cuda_tensors_are_copied_back():
    x = torch.randn(2, 50, device="cuda")
    out = torch.zeros(60, device="cuda")
    with interpreted():
        add_kernel[(2,)](x[0], x[1], out[5:55], 50, BLOCK=32)
    torch.testing.assert_close(out[5:55], x[0] + x[1])
    assert out[:5].sum() == out[55:].sum() == 0
