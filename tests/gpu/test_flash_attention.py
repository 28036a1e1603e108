"""FlashAttention compiled, on a GPU: the cases of the interpreted tests and larger ones."""

import pytest
import torch

from course_lib.flash_attention import flash_attention, flash_attention_varlen
from course_lib.flash_attention.band import EVERYTHING
from course_lib.flash_attention.cases import (
    CASES,
    PACKED_CASES,
    Case,
    PackedCase,
    make_inputs,
    make_packed_inputs,
)
from course_lib.flash_attention.fused import launch_fwd
from course_lib.runtime.numerics import poisoned_copy, poisoned_view
from tests.flash_attention.harness import assert_matches_oracle

pytestmark = pytest.mark.gpu

ALL = [pytest.param(case, id=case.name) for case in (*CASES, *PACKED_CASES)]
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("case", ALL)
def test_triton(case, dtype):
    assert_matches_oracle(case, dtype, "triton", device="cuda")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", ALL)
def test_torch(case, dtype):
    assert_matches_oracle(case, dtype, "torch", device="cuda")


def test_auto_runs_triton_where_it_is_fast(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "course_lib.flash_attention.fused.launch_fwd",
        lambda *args: (calls.append(args), launch_fwd(*args)),
    )
    x = make_inputs(Case("x", "tiny", 1, 1, 1, 40, 40, 64), torch.float16, device="cuda")
    flash_attention(x.q, x.k, x.v)
    assert len(calls) == (torch.cuda.get_device_capability() >= (8, 0))


def test_two_runs_are_equal_to_the_bit():
    case = Case("x", "large", 2, 16, 4, 2049, 2049, 128, causal=True)
    results = []
    for _ in range(2):
        x = make_inputs(case, torch.bfloat16, device="cuda")
        q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
        out = flash_attention(q, k, v, causal=True, implementation="triton")
        results.append((out, *torch.autograd.grad(out, (q, k, v), x.dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_packed_batch_of_equal_lengths_is_a_batch():
    B, T = 5, 777
    case = PackedCase("x", "large", (T,) * B, 8, 2, 128, causal=True)
    x, (cu_seqlens, _) = make_packed_inputs(case, torch.bfloat16, device="cuda"), case.cu_seqlens()
    options = {"causal": True, "implementation": "triton"}
    packed = flash_attention_varlen(x.q, x.k, x.v, cu_seqlens.cuda(), **options)
    batch = flash_attention(
        *(t.unflatten(0, (B, T)).transpose(1, 2) for t in (x.q, x.k, x.v)), **options
    )
    assert torch.equal(packed.unflatten(0, (B, T)), batch.transpose(1, 2))


def test_packed_lengths_are_read_once_and_not_while_a_graph_is_captured():
    case = PackedCase("x", "large", (100, 0, 513), 4, 4, 64, causal=True)
    x, (cu, _) = make_packed_inputs(case, torch.bfloat16, device="cuda"), case.cu_seqlens("cuda")
    flash_attention_varlen(x.q, x.k, x.v, cu, causal=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager = flash_attention_varlen(x.q, x.k, x.v, cu, causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    fresh, graph = cu.clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = flash_attention_varlen(x.q, x.k, x.v, fresh, causal=True)
    graph.replay()
    assert torch.equal(captured, eager)


@pytest.mark.parametrize("D", [64, 72, 128])
def test_the_border_stays_untouched(D):
    x = make_inputs(Case("x", "tiny", 2, 4, 2, 333, 257, D), torch.bfloat16, device="cuda")
    q, k, v = (poisoned_copy(t) for t in (x.q, x.k, x.v))
    out = poisoned_view(x.q.shape, torch.bfloat16, device="cuda")
    lse = poisoned_view((2 * 4 * 333,), torch.float32, device="cuda")
    launch_fwd(q.view, k.view, v.view, out.view, lse.view.view(2, 4, 333), EVERYTHING, D**-0.5)
    for name, poisoned in {"q": q, "k": k, "v": v, "out": out, "lse": lse}.items():
        poisoned.assert_border_untouched(name=name)
        assert not poisoned.view.isnan().any(), name


def test_offsets_past_two_to_the_31():
    """The last head begins more than 2^31 elements after the first."""
    heads, T, D = 5, 2**22 + 3, 128
    if torch.cuda.get_device_properties(0).total_memory < 30 * 2**30:
        pytest.skip("needs 30 GB of GPU memory")
    k = torch.zeros(1, heads, T, D, dtype=torch.bfloat16, device="cuda")
    v = torch.zeros_like(k)
    q = torch.zeros(1, heads, 3, D, dtype=torch.bfloat16, device="cuda")
    q[:, -1] = 1.0
    k[:, -1, -1] = 2.0  # only the very last key of the last head has weight
    v[:, -1, -1] = 3.0
    out = flash_attention(q, k, v, scale=1.0, implementation="triton")
    assert (out[:, -1] == 3.0).all()
    assert (out[:, :-1] == 0.0).all()


def test_memory_is_linear_in_the_length():
    peaks = []
    for T in (4096, 8192):
        x = make_inputs(Case("x", "large", 1, 8, 8, T, T, 64), torch.bfloat16, device="cuda")
        q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = flash_attention(q, k, v, implementation="triton")
        torch.autograd.grad(out, (q, k, v), x.dout)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del x, q, k, v, out
    assert peaks[1] < 2.2 * peaks[0]


def test_compile_fullgraph():
    x = make_inputs(Case("x", "tiny", 1, 4, 2, 130, 130, 64), torch.bfloat16, device="cuda")

    def step(q, k, v):
        return flash_attention(2.0 * q, k, v, causal=True).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x.q, x.k, x.v), step(x.q, x.k, x.v))
