"""Decoding and merging, compiled, on a GPU: the cases of the interpreted tests and larger ones."""

import functools

import pytest
import torch

from course_lib.flash_attention import decode, flash_attention
from course_lib.flash_attention.decode import flash_attention_decode
from course_lib.flash_attention.merge import merge_attention_states
from tests.flash_attention.decode_harness import (
    CASES,
    LARGE,
    DecodeCase,
    assert_matches_oracle,
    make,
)
from tests.flash_attention.test_merge import (
    NAMES,
    VALUES,
    assert_matches_definition,
    forward_and_backward,
    states,
)

pytestmark = pytest.mark.gpu

ALL = [pytest.param(case, id=case.name) for case in (*CASES, *LARGE)]
HALF = [torch.bfloat16, torch.float16]


# ---- decoding ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_triton(case, dtype):
    assert_matches_oracle(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_torch(case, dtype):
    assert_matches_oracle(case, dtype, "torch", device="cuda")


@pytest.mark.parametrize("splits", [1, 2, 7, 64, 300])
def test_any_number_of_splits(splits):
    case = next(case for case in LARGE if case.name == "speculative_large")
    assert_matches_oracle(case, torch.bfloat16, "triton", device="cuda", splits=splits)


def test_auto_runs_triton_where_it_is_fast(monkeypatch):
    calls = []
    launch = decode.launch_decode
    monkeypatch.setattr(decode, "launch_decode", lambda *a: (calls.append(a), launch(*a)))
    flash_attention_decode(*make(CASES[0], torch.float16, device="cuda"))
    assert len(calls) == (torch.cuda.get_device_capability() >= (8, 0))


def test_two_runs_are_equal_to_the_bit():
    case = LARGE[0]
    runs = [
        flash_attention_decode(
            *make(case, torch.bfloat16, device="cuda"), return_lse=True, implementation="triton"
        )
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_a_captured_graph_follows_the_lengths():
    """One graph serves every step: lengths are data, and are not looked at while it is captured."""
    case = DecodeCase("x", 2, 8, 2, 1, 1000, 64, lengths=(10, 900))
    whole = DecodeCase("x", 2, 8, 2, 1, 1000, 64)
    q, k, v, _ = make(whole, torch.float16, device="cuda")
    lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
    step = functools.partial(flash_attention_decode, implementation="triton")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # compiles, which a capture must not
        step(q, k, v, lengths)
    torch.cuda.current_stream().wait_stream(side)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(q, k, v, lengths)
    for values in ((10, 900), (11, 901), (0, 1000), (999, 1)):
        lengths.copy_(torch.tensor(values, dtype=torch.int32))
        graph.replay()
        assert torch.equal(out, step(q, k, v, lengths))


def test_offsets_past_two_to_the_31():
    """The last sequence, and its last key, lie more than 2^31 elements after the first."""
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    k = torch.zeros(2, 1, 2**24 + 3, 128, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros_like(k)
    q = torch.zeros(2, 4, 1, 128, dtype=torch.bfloat16, device="cuda")
    q[-1] = 1.0
    k[-1, -1, -1] = 2.0  # only the very last key of the last sequence has weight
    v[-1, -1, -1] = 3.0
    out = flash_attention_decode(q, k, v, scale=1.0, implementation="triton")
    assert (out[1] == 3.0).all()
    assert (out[0] == 0.0).all()


def test_the_cache_is_not_copied():
    """A cache of [B, T, H, D], as most models keep it, is read where it lies."""
    B, T, D = 4, 16384, 128
    k, v = (torch.randn(B, T, 8, D, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    q = torch.randn(B, 32, 1, D, dtype=torch.bfloat16, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    flash_attention_decode(q, k.transpose(1, 2), v.transpose(1, 2), implementation="triton")
    assert torch.cuda.max_memory_allocated() - before < k.nbytes / 10


def test_it_is_what_flash_attention_gives_for_the_last_query():
    k, v = (torch.randn(2, 2, 3001, 128, dtype=torch.float16, device="cuda") for _ in range(2))
    q = torch.randn(2, 8, 3001, 128, dtype=torch.float16, device="cuda")
    whole = flash_attention(q, k, v, causal=True)
    last = flash_attention_decode(q[:, :, -1:], k, v)
    torch.testing.assert_close(last, whole[:, :, -1:], atol=2e-3, rtol=2e-3)


def test_compile_fullgraph():
    case = next(case for case in LARGE if case.name == "lengths_large")
    x = make(case, torch.bfloat16, device="cuda")
    compiled = torch.compile(flash_attention_decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*x), flash_attention_decode(*x))


# ---- merging -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("values", ["normal", *VALUES])
@pytest.mark.parametrize(
    ("S", "rows", "D"),
    [(2, (2, 8, 1001), 128), (5, (333,), 72), (16, (3, 77), 64), (32, (65,), 256), (131, (7,), 80)],
)
def test_merge(S, rows, D, values, dtype):
    inputs = [x.cuda() for x in states(S, rows, D, dtype, values=values)]
    assert_matches_definition(inputs, "triton")


def test_two_merges_are_equal_to_the_bit():
    inputs = [x.cuda() for x in states(40, (1001,), 128, torch.bfloat16)]
    op = functools.partial(merge_attention_states, implementation="triton")
    first, second = (forward_and_backward(op, *inputs) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_parts_past_two_to_the_31():
    """The last part begins more than 2^31 elements after the first."""
    if torch.cuda.get_device_properties(0).total_memory < 20 * 2**30:
        pytest.skip("needs 20 GB of GPU memory")
    S, N, D = 5, 2**22 + 3, 128
    outs = torch.zeros(S, N, D, dtype=torch.bfloat16, device="cuda")
    lses = torch.full((S, N), -torch.inf, device="cuda")
    outs[-1, -1] = 3.0
    lses[-1, -1] = 1.0
    out, lse = merge_attention_states(outs, lses, implementation="triton")
    assert (out[-1] == 3.0).all()
    assert lse[-1] == 1.0
    assert (out[:-1] == 0.0).all()
