"""Every kernel with every configuration of the table compiles, fits, and does not spill."""

import pytest

from course_lib.flash_attention import launches
from course_lib.runtime.crosscompile import (
    ARCHITECTURES,
    CrossCompileUnavailable,
    check_launches,
    read_table,
)
from course_lib.runtime.tile import HAS_TRITON, triton

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")


def test_every_launch_compiles_within_its_limits(deep):
    table = read_table(launches.COMPILED_TABLE)
    if not table and not deep:
        pytest.skip(f"compiled.json is not for Triton {triton.__version__}: run with --deep")
    try:
        gate = check_launches(launches.LAUNCHES, table, deep=deep)
    except CrossCompileUnavailable as error:
        pytest.skip(str(error))
    assert not gate.failures, "\n".join(gate.failures)
    if not deep:
        assert not gate.compiled, (
            f"compiled.json is stale for {len(gate.compiled)} launches, which still pass. Run "
            "python -m course_lib.runtime.crosscompile course_lib.flash_attention.launches"
        )


def test_half_precision_uses_the_tensor_cores():
    table = read_table(launches.COMPILED_TABLE)
    if not table:
        pytest.skip(f"compiled.json is not for Triton {triton.__version__}")
    for launch in launches.LAUNCHES:
        half = launch.signature.get("q_ptr") in ("*fp16", "*bf16")
        if half and launch.arch >= 80:
            assert table[launch.name]["has_mma"], launch.name


def test_the_list_names_every_kernel_architecture_and_head_dimension():
    listed = {tuple(launch.name.split("/")[:3]) for launch in launches.LAUNCHES}
    for kernel in ("fwd", "bwd_dkdv", "bwd_dkdv_grouped", "bwd_dq"):
        for arch in ARCHITECTURES:
            for D in (16, 32, 64, 128, 256)[: 4 if arch == 75 else 5]:
                assert (kernel, f"sm_{arch}", f"d{D}") in listed
