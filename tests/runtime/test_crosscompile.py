"""Compiling for GPUs that are not here."""

import dataclasses
import importlib.util
import json
import sys
import textwrap

import pytest

from course_lib.runtime import crosscompile
from course_lib.runtime.crosscompile import (
    ARCHITECTURES,
    Compiled,
    CrossCompileUnavailable,
    Launch,
    check_launches,
    cross_compile,
    kernel_hash,
    launch_hash,
    read_table,
    write_table,
)
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.tile import HAS_TRITON, tl, triton

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")


@triton.jit
def double_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n
    tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=mask, other=0.0), mask=mask)


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    c_tile = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs))
    tl.store(c_ptr + offs, c_tile)


DOUBLE = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}
MATMUL = {"a_ptr": "*fp16", "b_ptr": "*fp16", "c_ptr": "*fp32"}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture(arch):
    result = cross_compile(matmul_kernel, MATMUL, {"BLOCK": 64}, arch=arch)
    assert result.arch == arch
    assert 16 < result.registers <= 255
    assert result.num_warps == 4
    assert result.fits
    assert f".target sm_{arch}" in result.ptx
    # Triton has no tensor-core path for the T4.
    assert result.has_mma == (arch >= 80)


def test_what_does_not_fit_is_seen():
    small = cross_compile(matmul_kernel, MATMUL, {"BLOCK": 128}, arch=89, num_warps=8)
    assert small.fits
    assert not dataclasses.replace(small, shared_bytes=100 * 1024).fits
    crowded = cross_compile(matmul_kernel, MATMUL, {"BLOCK": 128}, arch=80, num_warps=4)
    assert crowded.registers == 255
    assert crowded.spills > 0


def test_alignment_is_an_assumption_that_shows():
    aligned = cross_compile(double_kernel, DOUBLE, {"BLOCK": 1024}, arch=80)
    blind = cross_compile(double_kernel, DOUBLE, {"BLOCK": 1024}, arch=80, aligned=[])
    assert (
        "ld.global.v4"
        in cross_compile(
            double_kernel, DOUBLE, {"BLOCK": 1024}, arch=80, aligned=["x_ptr", "y_ptr", "n"]
        ).ptx
    )
    assert "ld.global.v4" not in blind.ptx
    assert aligned.spills == blind.spills == 0


def test_an_interpreted_run_changes_nothing():
    import torch

    before = cross_compile(double_kernel, DOUBLE, {"BLOCK": 32}, arch=90)
    x, y = torch.ones(20), torch.empty(20)
    with interpreted():
        double_kernel[(1,)](x, y, 20, BLOCK=32)  # pyright: ignore[reportArgumentType]
    assert (y == 2).all()
    double_kernel.hash = None  # make Triton look at the source again
    assert cross_compile(double_kernel, DOUBLE, {"BLOCK": 32}, arch=90) == before


def test_errors():
    with pytest.raises(ValueError, match=r"arch must be one of 75, 80, .* got 70"):
        cross_compile(double_kernel, DOUBLE, {"BLOCK": 32}, arch=70)
    partial = {k: v for k, v in DOUBLE.items() if k != "n"}
    with pytest.raises(ValueError, match=r"neither in signature nor in constexprs: \['n'\]"):
        cross_compile(double_kernel, partial, {"BLOCK": 32}, arch=80)
    with pytest.raises(ValueError, match=r"not an argument: \['BLOK'\]"):
        cross_compile(double_kernel, DOUBLE, {"BLOCK": 32, "BLOK": 1}, arch=80)


def test_without_triton(monkeypatch):
    monkeypatch.setattr(crosscompile, "HAS_TRITON", False)
    monkeypatch.setattr(crosscompile, "TRITON_MISSING", "No module named 'triton'")
    with pytest.raises(CrossCompileUnavailable, match="Triton cannot be imported here"):
        cross_compile(double_kernel, DOUBLE, {"BLOCK": 32}, arch=80)


def test_without_ptxas(monkeypatch):
    monkeypatch.setattr(crosscompile, "_ptxas", lambda arch: "/nowhere/ptxas")
    with pytest.raises(CrossCompileUnavailable, match="has no `ptxas` for sm_80"):
        cross_compile(double_kernel, DOUBLE, {"BLOCK": 32}, arch=80)


# ---- the gate ------------------------------------------------------------------------------


def launches(**changes):
    launch = Launch("double", double_kernel, DOUBLE, {"BLOCK": 32}, arch=80)
    return [dataclasses.replace(launch, **changes)]


def test_the_gate_compiles_once(tmp_path):
    path = tmp_path / "compiled.json"
    assert read_table(path) == {}
    first = check_launches(launches(), read_table(path))
    assert first.compiled == ["double"]
    assert not first.failures
    write_table(path, first.table)

    second = check_launches(launches(), read_table(path))
    assert second.compiled == []
    assert second.results == first.results
    assert check_launches(launches(), read_table(path), deep=True).compiled == ["double"]
    assert check_launches(launches(num_warps=8), read_table(path)).compiled == ["double"]


def test_the_gate_names_what_breaks(monkeypatch):
    bad = Compiled(80, 255, 24, 200_000, 4, has_mma=True, serialized=True)
    monkeypatch.setattr(crosscompile, "cross_compile", lambda *args, **kwargs: bad)
    failures = check_launches(launches()).failures
    assert failures == [
        "double: 200000 bytes of shared memory, sm_80 has 166912",
        "double: spills 24 bytes a thread, admitted are 0",
        "double: its wgmma instructions are serialized",
    ]
    assert len(check_launches(launches(admitted_spills=24)).failures) == 2


def test_the_gate_reports_what_does_not_compile():
    failures = check_launches(launches(constexprs={"BLOCK": 33})).failures
    assert len(failures) == 1
    assert failures[0].startswith("double: does not compile")


def test_two_launches_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two launches are named 'double'"):
        check_launches(launches() + launches())


def test_a_table_of_another_triton_counts_for_nothing(tmp_path):
    path = tmp_path / "compiled.json"
    path.write_text(json.dumps({"triton": "0.0.1", "launches": {"double": {}}}))
    assert read_table(path) == {}


KERNEL = '''
from course_lib.runtime.tile import tl, triton

FACTOR = tl.constexpr({factor})
UNUSED = tl.constexpr(3)


@triton.jit
def helper(x):
    return x {operation} FACTOR  {comment}


@triton.jit
def some_kernel(x_ptr, n):
    """{docstring}"""
    tl.store(x_ptr, helper(tl.load(x_ptr)))
'''


def kernel_of(tmp_path, *, factor=2, operation="*", comment="", docstring="Say."):
    text = KERNEL.format(factor=factor, operation=operation, comment=comment, docstring=docstring)
    name = f"kernel_{abs(hash(text))}"
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module.some_kernel


def test_the_hash_follows_code_and_not_comments(tmp_path):
    base = kernel_hash(kernel_of(tmp_path))
    assert kernel_hash(kernel_of(tmp_path, comment="# why")) == base
    assert kernel_hash(kernel_of(tmp_path, docstring="Say more.\n\n    Lines.")) == base
    assert kernel_hash(kernel_of(tmp_path, operation="+")) != base  # in a helper
    assert kernel_hash(kernel_of(tmp_path, factor=3)) != base  # in a constant
    assert launch_hash(launches()[0]) != launch_hash(launches(num_stages=2)[0])
