"""The numbers that chapter 08 states, where they can be had without its notebook."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F

from course_lib.flash_attention import flash_attention, labs
from course_lib.notebook.recorded import excerpt_lines, recorded
from course_lib.runtime.tile import HAS_TRITON


def test_a_running_maximum_changes_as_often_as_the_harmonic_number() -> None:
    rows = torch.randn(2000, 8192, generator=torch.Generator().manual_seed(0))
    changes = (rows.cummax(dim=1).values.diff(dim=1) > 0).sum(dim=1) + 1
    assert changes.float().mean().item() == pytest.approx(9.59, abs=0.15)
    by_tile = rows.unflatten(1, (64, 128)).amax(dim=2)
    changes = (by_tile.cummax(dim=1).values.diff(dim=1) > 0).sum(dim=1) + 1
    assert changes.float().mean().item() == pytest.approx(4.7, abs=0.1)
    # Base 2, as in the kernels: a slack of 8 is a factor of 256.
    base_2 = by_tile * 1.4427
    assert (base_2.amax(dim=1) <= base_2[:, 0] + 8).all()


@pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
def test_the_kernel_is_more_exact_in_fp16_than_three_calls() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, 1024, 64, generator=generator).half() for _ in range(3))
    truth = torch.softmax(q.double() @ k.double().mT / 8, dim=-1) @ v.double()
    stored = torch.softmax(q @ k.mT / 8, dim=-1) @ v
    flash = labs.trace_forward(q, k, v, block_m=256, block_n=256)[1]
    errors = [(each.double() - truth).square().mean().sqrt().item() for each in (stored, flash)]
    assert 1.6 < errors[0] / errors[1] < 2.4


@pytest.mark.parametrize(("tiles", "share"), [(1, 1.0), (2, 0.50), (16, 0.06)])
def test_a_small_random_test_misses_a_missing_rescale(tiles: int, share: float) -> None:
    rows = torch.randn(20_000, 256, generator=torch.Generator().manual_seed(0)).double()
    row_max, wrong = rows[:, 0], torch.zeros(len(rows)).double()
    for part in rows.chunk(tiles, dim=1):
        row_max = torch.maximum(row_max, part.amax(dim=1))
        wrong += (part - row_max[:, None]).exp().sum(dim=1)
    right = (rows - row_max[:, None]).exp().sum(dim=1)
    found = torch.isclose(wrong, right, rtol=1e-9).double().mean().item()
    assert found == pytest.approx(share, abs=0.01)


def test_one_new_token_gets_the_oldest_value_from_sdpa() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 1, 64, generator=generator)
    k, v = torch.randn(2, 1, 1, 10, 64, generator=generator)
    assert torch.equal(F.scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, 0], v[0, 0, 0])
    ours = flash_attention(q, k, v, causal=True)
    assert torch.allclose(ours, F.scaled_dot_product_attention(q, k, v), atol=1e-6)


def test_bytes_of_the_puzzle() -> None:
    assert labs.naive_bytes(8192, 64, 4) == pytest.approx(1082e6, rel=1e-3)
    # Tiles of 128 query rows read K and V 64 times.
    assert labs.tiled_bytes(8192, 64, 4, 128) == (2 + 2 * 64) * 8192 * 64 * 4
    assert (
        labs.tiled_bytes(100, 16, 2, 64) == (2 + 2 * 2) * 100 * 16 * 2
    )  # the last block is ragged


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_tiling_breaks_even_at_half_the_head_dim_in_any_precision(itemsize, head_dim) -> None:
    naive, even = labs.attention_points(labs.PREFILL, 8192, head_dim, head_dim // 2, 1, itemsize)
    assert even.nbytes == pytest.approx(naive.nbytes, rel=0.02)


def test_a_merge_of_empty_parts_is_not_a_number() -> None:
    assert torch.softmax(torch.tensor([-torch.inf, -torch.inf]), dim=0).isnan().all()


def test_the_recorded_curve_is_complete() -> None:
    run = recorded("flash_attention_cpu")
    assert run is not None
    assert {"date", "torch", "device"} <= run["environment"].keys()
    best = {name: each["best"] for name, each in run["seconds"].items()}
    assert best["three calls"] > 1.3 * best["tile 512"]  # the puzzle's answer
    gap = best["three calls"] - best["tile 512"]
    assert best["three calls"] - best["into buffers"] > 0.75 * gap  # mostly fresh memory
    assert recorded("no_such_run") is None
    json.dumps(run)


def test_an_excerpt_finds_its_lines() -> None:
    first, last = excerpt_lines(labs.naive_bytes, "def naive_bytes", "return")
    assert first == 1
    assert last > first
    with pytest.raises(ValueError, match="no line with 'nowhere'"):
        excerpt_lines(labs.naive_bytes, "nowhere", "return")
    with pytest.raises(ValueError, match="after 'return'"):
        excerpt_lines(labs.naive_bytes, "return", "def naive")
