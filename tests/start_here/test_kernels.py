"""The five kernels of chapter 00 compute what they say, on ragged and strided tensors."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from course_lib import interpreted
from course_lib.runtime.tile import HAS_TRITON, triton
from course_lib.start_here import kernels

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")

GENERATOR = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    with interpreted():
        yield


def scores(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR)


@pytest.mark.parametrize("n", [1, 64, 100])
def test_add(n: int) -> None:
    x, y, out = scores(n), scores(n), torch.empty(n)
    kernels.add_kernel[(triton.cdiv(n, 64),)](x, y, out, n, BLOCK=64)
    assert torch.equal(out, x + y)


@pytest.mark.parametrize("n", [1, 7, 16])
def test_row_sum_and_row_softmax(n: int) -> None:
    x, total, out = scores(5, 19)[:, :n], torch.empty(5), torch.empty(5, n)
    block = triton.next_power_of_2(n)
    kernels.row_sum_kernel[(5,)](x, total, n, x.stride(0), BLOCK_N=block)
    kernels.row_softmax_kernel[(5,)](x, out, n, x.stride(0), out.stride(0), BLOCK_N=block)
    torch.testing.assert_close(total, x.sum(1))
    torch.testing.assert_close(out, x.softmax(1))


def test_copy_of_a_transposed_matrix() -> None:
    x, out = scores(35, 19).t(), torch.empty(19, 35)
    kernels.copy_kernel[(3, 3)](x, out, 19, 35, *x.stride(), *out.stride(), BLOCK_M=8, BLOCK_N=16)
    assert torch.equal(out, x)


def test_ragged_matmul() -> None:
    a, b, out = scores(21, 37).half(), scores(37, 50).half(), torch.empty(21, 50)
    kernels.matmul_kernel[(2, 2)](
        a, b, out, 21, 50, 37, *a.stride(), *b.stride(), *out.stride(),
        BLOCK_M=16, BLOCK_N=32, BLOCK_K=16,
    )  # fmt: skip
    want = a.double() @ b.double()
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)


def test_a_tile_twice_as_large_reads_half_the_bytes() -> None:
    a, b, out = scores(64, 64).half(), scores(64, 64).half(), torch.empty(64, 64)
    read = []
    for block in (16, 32, 64):
        with interpreted(trace=True) as run:
            kernels.matmul_kernel[(64 // block, 64 // block)](
                a, b, out, 64, 64, 64, *a.stride(), *b.stride(), *out.stride(),
                BLOCK_M=block, BLOCK_N=block, BLOCK_K=16,
            )  # fmt: skip
        read.append(run.bytes_loaded)
    assert read == [65_536, 32_768, 16_384]
