"""Forward and every gradient against the fp64 oracle, in both implementations."""

import dataclasses
import functools
import math

import pytest
import torch

from course_lib.flash_attention import flash_attention, reference_attention
from course_lib.flash_attention.band import Band
from course_lib.flash_attention.cases import CASES, Case, cases, make_inputs
from course_lib.flash_attention.fused import (
    launch_bwd_dkdv,
    launch_bwd_dq,
    launch_bwd_preprocess,
    launch_fwd,
)
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.numerics import assert_within_budget, poisoned_copy, poisoned_view
from course_lib.runtime.tile import HAS_TRITON
from tests.flash_attention.harness import assert_matches_oracle, forward_and_backward

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
TINY = [pytest.param(case, id=case.name) for case in cases("tiny")]
SMALL = [pytest.param(case, id=case.name) for case in cases("small")]
BY_NAME = {case.name: case for case in CASES}


@needs_triton
@pytest.mark.parametrize("case", TINY)
def test_triton_fp32(case):
    with interpreted() as run:
        assert_matches_oracle(case, torch.float32, "triton")
    wants_kernels = case.B * case.Tq > 0
    assert bool(run.launches) == (wants_kernels or case.B * case.Tk > 0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["causal_more_keys", "grouped", "heavy_tailed", "padded_80"])
def test_triton_half(name, dtype):
    with interpreted():
        assert_matches_oracle(BY_NAME[name], dtype, "triton")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", SMALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_small(case, dtype):
    with interpreted():
        assert_matches_oracle(case, dtype, "triton")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 6))
@pytest.mark.parametrize("case", TINY)
def test_triton_more_seeds(case, seed):
    with interpreted():
        assert_matches_oracle(case, torch.float32, "triton", seed=seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TINY + SMALL)
def test_torch(case, dtype):
    assert_matches_oracle(case, dtype, "torch")


@pytest.mark.parametrize("case", TINY)
def test_torch_fp64(case):
    """In fp64 the oracle is the reference, so the yardstick is the rounding of fp64 itself."""
    x = make_inputs(case, torch.float64)
    options = {"causal": case.causal, "scale": case.scale, "return_lse": True}
    actual = forward_and_backward(
        functools.partial(flash_attention, implementation="auto", **options), x
    )
    oracle = forward_and_backward(functools.partial(reference_attention, **options), x)
    for name in oracle:
        finite = oracle[name][oracle[name].isfinite()].abs()
        largest = finite.max().item() if finite.numel() else 0.0
        assert actual[name].dtype == torch.float64
        assert_within_budget(actual[name], oracle[name], 1e-14 * (1.0 + 10 * largest), name=name)


@pytest.mark.parametrize(("Tq", "Tk"), [(3, 5), (5, 3)])
def test_torch_gradcheck(Tq, Tk):
    x = make_inputs(Case("x", "tiny", 1, 2, 1, Tq, Tk, 3), torch.float64)

    def outputs(q, k, v):
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True, implementation="torch")
        return out, lse[lse != -math.inf]

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in (x.q, x.k, x.v)])


@pytest.mark.parametrize("case", TINY)
def test_torch_in_many_blocks(case, monkeypatch):
    monkeypatch.setattr("course_lib.flash_attention.tiled.SCORE_ELEMENTS", 1)
    assert_matches_oracle(case, torch.float32, "torch")


@needs_triton
@pytest.mark.parametrize("name", ["causal_more_queries", "padded_72", "grouped"])
def test_kernels_stay_inside_their_tensors(name):
    case = BY_NAME[name]
    x = make_inputs(case, torch.float32)
    scale, band = case.D**-0.5, Band.of(case.causal, case.window_size)
    q, k, v, dout = (poisoned_copy(t) for t in (x.q, x.k, x.v, x.dout))
    out, dq = (poisoned_view(x.q.shape, torch.float32) for _ in range(2))
    dk, dv = (poisoned_view(x.k.shape, torch.float32) for _ in range(2))
    # Row statistics are contiguous, so theirs is a flat parent.
    rows = case.B * case.Hq * case.Tq
    lse, delta = (poisoned_view((rows,), torch.float32) for _ in range(2))
    lse_view, delta_view = (s.view.view(case.B, case.Hq, case.Tq) for s in (lse, delta))
    views = (q.view, k.view, v.view)

    with interpreted():
        launch_fwd(*views, out.view, lse_view, band, scale)
        launch_bwd_preprocess(out.view, dout.view, x.dlse, delta_view)
        saved = (dout.view, lse_view, delta_view)
        launch_bwd_dkdv(*views, *saved, dk.view, dv.view, band, scale)
        launch_bwd_dq(*views, *saved, dq.view, band, scale)

    named = {"q": q, "k": k, "v": v, "dout": dout, "out": out, "lse": lse, "delta": delta}
    named |= {"dq": dq, "dk": dk, "dv": dv}
    for name, poisoned in named.items():
        poisoned.assert_border_untouched(name=name)
        assert not poisoned.view.isnan().any(), name
    with interpreted():
        expected = flash_attention(x.q, x.k, x.v, causal=case.causal, implementation="triton")
    assert torch.equal(out.view, expected)


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_future_does_not_leak(implementation):
    """Change one key and value: no query before it moves by a single bit."""
    case = Case("x", "tiny", 1, 2, 1, 70, 101, 16, causal=True)
    x = make_inputs(case, torch.float32)
    changed = 60
    k, v = x.k.clone(), x.v.clone()
    k[:, :, changed] += 3.0
    v[:, :, changed] -= 2.0
    with interpreted():
        options = {"causal": True, "return_lse": True, "implementation": implementation}
        before = flash_attention(x.q, x.k, x.v, **options)
        after = flash_attention(x.q, k, v, **options)
    first = changed - (case.Tk - case.Tq)
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[:, :, :first], b[:, :, :first])
        assert not torch.isclose(a[:, :, first:], b[:, :, first:]).all(dim=-1).all()


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_two_runs_are_equal_to_the_bit(implementation):
    results = []
    for _ in range(2):
        x = make_inputs(Case("x", "tiny", 1, 2, 1, 65, 67, 16), torch.float32)
        q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
        with interpreted():
            out = flash_attention(q, k, v, causal=True, implementation=implementation)
            results.append((out, *torch.autograd.grad(out, (q, k, v), x.dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_queries_without_keys(implementation):
    case = BY_NAME["causal_more_queries"]
    blind = case.Tq - case.Tk
    x = make_inputs(case, torch.float32)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    with interpreted():
        out, lse = flash_attention(
            q, k, v, causal=True, return_lse=True, implementation=implementation
        )
        # Even a gradient that arrives at L = -inf, which no probability moves, stays harmless.
        dq, dk, dv = torch.autograd.grad((out, lse), (q, k, v), (x.dout, x.dlse))
    assert (out[:, :, :blind] == 0).all()
    assert (lse[:, :, :blind] == -math.inf).all()
    assert (dq[:, :, :blind] == 0).all()
    assert all(g.isfinite().all() for g in (dq, dk, dv))


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("wanted", ["q", "k", "v", "kv"])
def test_gradient_of_some_inputs_only(implementation, wanted):
    x = make_inputs(BY_NAME["block_plus_one"], torch.float32)
    options = {"causal": True, "implementation": implementation}

    def gradients(names):
        tensors = {n: getattr(x, n).detach().requires_grad_(n in names) for n in "qkv"}
        out = flash_attention(tensors["q"], tensors["k"], tensors["v"], **options)
        return torch.autograd.grad(out, [tensors[n] for n in names], x.dout)

    with interpreted():
        everything = dict(zip("qkv", gradients("qkv"), strict=True))
        some = gradients(wanted)
    for name, grad in zip(wanted, some, strict=True):
        assert torch.equal(grad, everything[name])


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_gradient_of_the_logsumexp_alone(implementation):
    x = make_inputs(BY_NAME["plain"], torch.float32)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    with interpreted():
        _, lse = flash_attention(q, k, v, return_lse=True, implementation=implementation)
        dq, dk, dv = torch.autograd.grad(lse, (q, k, v), x.dlse)
    scores = q.double() @ k.double().transpose(-2, -1) / 4.0
    expected = torch.autograd.grad(scores.logsumexp(-1), (q, k), x.dlse.double())
    torch.testing.assert_close((dq, dk), expected, check_dtype=False)
    assert (dv == 0).all()


@needs_triton
def test_a_short_row_in_a_wide_tensor():
    """Strides that do not divide by 16 bytes, rows that overlap, heads that share memory."""
    base = torch.randn(400, generator=torch.Generator().manual_seed(0))
    windows = base.as_strided((1, 2, 40, 16), (0, 100, 1, 1))  # a sliding window: stride_t = 1
    case = dataclasses.replace(BY_NAME["plain"], Tq=40, Tk=40)
    with interpreted():
        out = flash_attention(windows, windows, windows, implementation="triton")
        copies = windows.contiguous()
        assert torch.equal(out, flash_attention(copies, copies, copies, implementation="triton"))
    assert out.shape == (case.B, case.Hq, case.Tq, case.D)
