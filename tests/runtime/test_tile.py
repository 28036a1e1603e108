"""The door to Triton: the real thing, and the stand-in where there is none."""

# The stand-in is not the Triton that the type checker knows.
# pyright: reportIndexIssue=false

import subprocess
import sys
import textwrap

import pytest

from course_lib.runtime import tile
from course_lib.runtime.tile import TritonUnavailable, stand_ins


@pytest.fixture
def triton_and_tl():
    return stand_ins("No module named 'triton'")


def test_a_kernel_module_imports_without_triton():
    # A fresh process in which the import is blocked: the honest way to see what a Mac sees.
    program = textwrap.dedent("""
        import sys
        sys.modules["triton"] = None
        from course_lib.runtime.tile import HAS_TRITON, triton, tl

        LOG2E: tl.constexpr = tl.constexpr(1.44)

        @triton.jit
        def helper(x, BLOCK: tl.constexpr, dtype: tl.constexpr = tl.float32):
            return x

        @triton.autotune(configs=[triton.Config({"BLOCK": 8}, num_warps=4)], key=["n"])
        @triton.heuristics({"EVEN": lambda args: True})
        @triton.jit(do_not_specialize=["n"])
        def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
            tl.store(y_ptr, tl.load(x_ptr))

        assert not HAS_TRITON
        try:
            copy_kernel[(triton.cdiv(5, 2),)](1, 2, 3, BLOCK=8)
        except RuntimeError as error:
            print(error)
    """)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "kernel `copy_kernel` was launched" in run.stdout
    assert "pip install triton" in run.stdout


def test_launching_and_calling_raise(triton_and_tl):
    triton, tl = triton_and_tl

    @triton.jit
    def double(x):
        """Twice."""
        return tl.dot(x, x)

    assert double.__name__ == "double"
    assert double.__doc__ == "Twice."
    with pytest.raises(TritonUnavailable, match="`double` was launched"):
        double[(1,)](0)
    with pytest.raises(TritonUnavailable, match="`double` was called"):
        double(0)
    with pytest.raises(TritonUnavailable, match=r"`tl\.dot` was called"):
        double.fn(0)


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 1000, 1024, 1025])
def test_integer_helpers_agree_with_triton(triton_and_tl, n):
    if not tile.HAS_TRITON:
        pytest.skip("needs Triton to compare with")
    triton, _ = triton_and_tl
    assert triton.cdiv(n, 3) == tile.triton.cdiv(n, 3)
    assert triton.next_power_of_2(n) == tile.triton.next_power_of_2(n)


def test_names_answer_inspection_honestly(triton_and_tl):
    _, tl = triton_and_tl
    assert not hasattr(tl, "__wrapped__")
    assert "not installed" in repr(tl.float32)
    assert tl.constexpr(tl.constexpr(3)).value == 3
