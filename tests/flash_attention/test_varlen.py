"""Packed batches: values and gradients, who sees whom, and what bad lengths are told."""

# q, k and v are unpacked from lists all over this file.
# pyright: reportCallIssue=false

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.flash_attention import flash_attention, flash_attention_varlen
from course_lib.flash_attention.band import Band
from course_lib.flash_attention.cases import (
    PACKED_CASES,
    PackedCase,
    make_packed_inputs,
    packed_cases,
)
from course_lib.flash_attention.cu_seqlens import Packing
from course_lib.flash_attention.fused import (
    launch_bwd_dkdv,
    launch_bwd_dq,
    launch_bwd_preprocess,
    launch_fwd,
)
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.numerics import poisoned_view
from course_lib.runtime.tile import HAS_TRITON
from tests.flash_attention.harness import assert_matches_oracle

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
TINY = [pytest.param(case, id=case.name) for case in packed_cases("tiny")]
SMALL = [pytest.param(case, id=case.name) for case in packed_cases("small")]
BY_NAME = {case.name: case for case in PACKED_CASES}


@needs_triton
@pytest.mark.parametrize("case", TINY)
def test_triton_fp32(case):
    with interpreted() as run:
        assert_matches_oracle(case, torch.float32, "triton")
    assert bool(run.launches) == (sum(case.lengths_q) > 0)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["packed_causal", "packed_grouped", "packed_late_max"])
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", TINY + SMALL)
def test_torch(case, dtype):
    assert_matches_oracle(case, dtype, "torch")


@pytest.mark.parametrize("causal", [False, True])
def test_torch_gradcheck(causal):
    case = PackedCase("x", "tiny", (3, 0, 4), 2, 1, 3, (2, 3, 5), causal=causal)
    x, (cu_q, cu_k) = make_packed_inputs(case, torch.float64), case.cu_seqlens()

    def outputs(q, k, v):
        out, lse = flash_attention_varlen(q, k, v, cu_q, cu_k, causal=causal, return_lse=True)
        return out, lse[lse != -math.inf]

    assert torch.autograd.gradcheck(outputs, [t.requires_grad_() for t in (x.q, x.k, x.v)])


# ---- which block works on which sequence -----------------------------------------------------


@needs_triton
@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([0, 0, 1, 2, 31, 32, 33, 63, 64, 65, 130]), max_size=9))
def test_every_row_is_written_once(lengths):
    """Any lengths: each sequence equals a call of its own, to the bit."""
    case = PackedCase("x", "tiny", tuple(lengths), 1, 1, 16, causal=True)
    x, (cu, _) = make_packed_inputs(case, torch.float32), case.cu_seqlens()
    with interpreted() as run:
        out, lse = flash_attention_varlen(
            x.q, x.k, x.v, cu, causal=True, return_lse=True, implementation="triton"
        )
    if sum(lengths):
        # Blocks of 64 queries, and no more than one idle program a sequence.
        needed = sum(-(-length // 64) for length in lengths)
        assert needed <= run.launches[0].grid[0] <= needed + len(lengths)
    for begin, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        q, k, v = (t[begin:end].transpose(0, 1)[None] for t in (x.q, x.k, x.v))
        with interpreted():
            alone = flash_attention(q, k, v, causal=True, return_lse=True, implementation="triton")
        assert torch.equal(out[begin:end].transpose(0, 1)[None], alone[0])
        assert torch.equal(lse[begin:end].transpose(0, 1)[None], alone[1])


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_sequences_do_not_see_each_other(implementation):
    """Change one sequence wholly: no output and no gradient of another moves by a single bit."""
    case = BY_NAME["packed_causal"]
    x, (cu, _) = make_packed_inputs(case, torch.float32), case.cu_seqlens()
    rows = slice(int(cu[1]), int(cu[2]))
    results = []
    for change in (0.0, 5.0):
        leaves = [t.clone() for t in (x.q, x.k, x.v)]
        dout = x.dout.clone()
        for t in (*leaves, dout):
            t[rows] += change
        leaves = [t.requires_grad_() for t in leaves]
        with interpreted():
            out = flash_attention_varlen(*leaves, cu, causal=True, implementation=implementation)
            results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    for before, after in zip(*results, strict=True):
        others = torch.ones(len(before), dtype=torch.bool)
        others[rows] = False
        assert torch.equal(before[others], after[others])
        assert not torch.equal(before[rows], after[rows])


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_the_future_does_not_leak(implementation):
    case = BY_NAME["packed_more_keys"]
    x, (cu_q, cu_k) = make_packed_inputs(case, torch.float32), case.cu_seqlens()
    changed = int(cu_k[1]) + 30  # key 30 of 41, of the sequence with 40 queries
    first = int(cu_q[1]) + 29  # the first query that sees it: one key stands before the diagonal
    k, v = x.k.clone(), x.v.clone()
    k[changed] += 3.0
    v[changed] -= 2.0
    with interpreted():
        before, after = (
            flash_attention_varlen(x.q, *kv, cu_q, cu_k, causal=True, implementation=implementation)
            for kv in ((x.k, x.v), (k, v))
        )
    assert torch.equal(before[:first], after[:first])
    last = int(cu_q[2])
    assert not torch.isclose(before[first:last], after[first:last]).all(dim=-1).any()
    assert torch.equal(before[last:], after[last:])


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_a_packed_batch_of_equal_lengths_is_a_batch(implementation):
    B, T, H, D = 3, 40, 2, 16
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, T, H, D, generator=generator) for _ in range(3))
    cu = torch.arange(0, B * T + 1, T, dtype=torch.int32)
    with interpreted():
        packed, packed_lse = flash_attention_varlen(
            *(x.flatten(0, 1) for x in (q, k, v)),
            cu,
            causal=True,
            return_lse=True,
            implementation=implementation,
        )
        batch, batch_lse = flash_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            causal=True,
            return_lse=True,
            implementation=implementation,
        )
    assert torch.equal(packed.view(B, T, H, D), batch.transpose(1, 2))
    assert torch.equal(packed_lse.view(B, T, H), batch_lse.transpose(1, 2))


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_no_sequences_at_all(implementation):
    q, k, v = (t.requires_grad_() for t in packed(total=0))
    with interpreted():
        out = flash_attention_varlen(q, k, v, int32(0), implementation=implementation)
        grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(t.shape == (0, 2, 16) for t in (out, *grads))


# ---- memory ----------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("name", ["packed_more_queries", "packed_no_keys", "packed_window"])
def test_kernels_stay_inside_their_tensors(name):
    case = BY_NAME[name]
    x, scale = make_packed_inputs(case, torch.float32), case.D**-0.5
    band, packing = Band.of(case.causal, case.window_size), Packing(*case.cu_seqlens())

    def poisoned(like):
        """[1, H, total, D] inside a larger tensor that is NaN around it, as packed rows lie."""
        view = poisoned_view(like.shape, torch.float32)
        return view, view.view.transpose(0, 1)[None]

    (out, out_4d), (dq, dq_4d) = poisoned(x.q), poisoned(x.q)
    (dk, dk_4d), (dv, dv_4d) = poisoned(x.k), poisoned(x.v)
    lse, delta = (poisoned_view((case.Hq * len(x.q),), torch.float32) for _ in range(2))
    lse_3d, delta_3d = (s.view.view(1, case.Hq, len(x.q)) for s in (lse, delta))
    q, k, v, dout = (t.transpose(0, 1)[None] for t in (x.q, x.k, x.v, x.dout))
    dlse = x.dlse.transpose(0, 1)[None].contiguous()

    with interpreted():
        launch_fwd(q, k, v, out_4d, lse_3d, band, scale, packing)
        launch_bwd_preprocess(out_4d, dout, dlse, delta_3d)
        saved = (dout, lse_3d, delta_3d)
        launch_bwd_dkdv(q, k, v, *saved, dk_4d, dv_4d, band, scale, packing)
        launch_bwd_dq(q, k, v, *saved, dq_4d, band, scale, packing)

    named = {"out": out, "lse": lse, "delta": delta, "dq": dq, "dk": dk, "dv": dv}
    for name, tensor in named.items():
        tensor.assert_border_untouched(name=name)
        assert not tensor.view.isnan().any(), name


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
def test_views_of_one_projection(implementation):
    """q, k and v as slices of one [total, heads, D], as a fused projection leaves them."""
    case = BY_NAME["packed_grouped"]
    x, (cu, _) = make_packed_inputs(case, torch.float32), case.cu_seqlens()
    qkv = torch.cat([x.q, x.k, x.v], dim=1)
    slices = qkv.split([case.Hq, case.Hkv, case.Hkv], dim=1)
    assert not slices[1].is_contiguous()
    with interpreted():
        of_slices = flash_attention_varlen(*slices, cu, implementation=implementation)
        of_copies = flash_attention_varlen(x.q, x.k, x.v, cu, implementation=implementation)
    assert of_slices.is_contiguous()
    assert torch.equal(of_slices, of_copies)


# ---- bad input -------------------------------------------------------------------------------


def packed(total=10, heads=2, D=16):
    return [torch.zeros(total, heads, D) for _ in range(3)]


def int32(*numbers):
    return torch.tensor(numbers, dtype=torch.int32)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 10]), TypeError, r"cu_seqlens_q must be int32, got torch.int64"),
        ([0, 10], TypeError, r"cu_seqlens_q must be a torch.Tensor, got list"),
        (int32(0, 10).to("meta"), ValueError, r"cu_seqlens_q .* device of q, cpu, got meta"),
        (int32(0, 10)[None], ValueError, r"shape \[sequences \+ 1\], got shape \(1, 2\)"),
        (int32(), ValueError, r"shape \[sequences \+ 1\], got shape \(0,\)"),
        (int32(1, 10), ValueError, r"cu_seqlens_q must begin with 0, got 1"),
        (int32(0, 7, 6, 10), ValueError, r"must not decrease, got 7 and then 6 at position 2"),
        (int32(0, 4, 9), ValueError, r"must end with the number of rows, 10, got 9"),
        (int32(0, 4, 11), ValueError, r"must end with the number of rows, 10, got 11"),
        (int32(0), ValueError, r"must end with the number of rows, 10, got 0"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, error, message):
    with pytest.raises(error, match=message):
        flash_attention_varlen(*packed(), cu_seqlens)


def test_bad_cu_seqlens_of_the_keys():
    cu = int32(0, 4, 10)
    with pytest.raises(ValueError, match=r"cu_seqlens_k must not decrease, got 12 and then 10"):
        flash_attention_varlen(*packed(), cu, int32(0, 12, 10))
    with pytest.raises(ValueError, match=r"of the same length, got 3 and 2 numbers"):
        flash_attention_varlen(*packed(), cu, int32(0, 10))
    with pytest.raises(TypeError, match=r"cu_seqlens_k must be int32, got torch.float32"):
        flash_attention_varlen(*packed(), cu, cu.float())


def test_numbers_are_read_once_and_again_after_a_change(monkeypatch):
    cu = int32(0, 4, 10)
    reads = []
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (reads.append(t is cu), tolist(t))[1])
    from course_lib.flash_attention.cu_seqlens import check_values

    for _ in range(3):
        check_values("cu_seqlens_q", cu, 10)
    assert sum(reads) == 1
    with pytest.raises(ValueError, match="must end with the number of rows, 11, got 10"):
        check_values("cu_seqlens_q", cu, 11)
    cu[1] = 12
    with pytest.raises(ValueError, match="must not decrease, got 12 and then 10"):
        check_values("cu_seqlens_q", cu, 10)
    with torch.inference_mode():
        flash_attention_varlen(*packed(), int32(0, 10))


def test_bad_tensors_and_options():
    q, k, v = packed()
    cu = int32(0, 10)
    with pytest.raises(ValueError, match=r"q must have 3 dimensions \[total, H, D\], got shape"):
        flash_attention_varlen(q[None], k, v, cu)
    with pytest.raises(ValueError, match=r"same length, got 10 keys and 9 values"):
        flash_attention_varlen(q, k, v[:9], cu)
    with pytest.raises(ValueError, match=r"heads of q must be a multiple .* got 2 and 3"):
        flash_attention_varlen(q, *(torch.zeros(10, 3, 16) for _ in range(2)), cu)
    with pytest.raises(TypeError, match=r"v must have the dtype of q"):
        flash_attention_varlen(q, k, v.half(), cu)
    for bad in ((1, 2, 3), 5, (1.0, 2), (True, 1), None):
        with pytest.raises(TypeError, match=r"window_size must be a pair of ints"):
            flash_attention_varlen(q, k, v, cu, window_size=bad)  # pyright: ignore
    with pytest.raises(ValueError, match=r"window_size must have sides of 0 or more, or -1"):
        flash_attention_varlen(q, k, v, cu, window_size=(-2, 0))
    with pytest.raises(ValueError, match=r"window_size must have sides of 0 or more, or -1"):
        flash_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)), window_size=(3, -5))
    if HAS_TRITON:
        with pytest.raises(RuntimeError, match=r'"triton" needs CUDA tensors, got device cpu'):
            flash_attention_varlen(q, k, v, cu, implementation="triton")


# ---- torch.library and torch.compile -------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("implementation", ["torch", "triton"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(implementation, requires_grad):
    case = dataclasses.replace(BY_NAME["packed_causal"], lengths_q=(5, 0, 9))
    x, (cu_q, cu_k) = make_packed_inputs(case, torch.float32), case.cu_seqlens()
    q, k, v = (t.requires_grad_(requires_grad) for t in (x.q, x.k, x.v))
    options = (-1, 0, 0.25, implementation)
    with interpreted():
        torch.library.opcheck(
            torch.ops.course_lib.flash_attention_varlen_fwd, (q, k, v, cu_q, cu_k, *options)
        )
        out, lse = torch.ops.course_lib.flash_attention_varlen_fwd(q, k, v, cu_q, cu_k, *options)
        saved = [t.detach() for t in (q, k, v, cu_q, cu_k, out, lse)]
        torch.library.opcheck(
            torch.ops.course_lib.flash_attention_varlen_bwd,
            (*saved, x.dout, x.dlse.T.contiguous(), *options),
        )


@needs_triton
@pytest.mark.parametrize("implementation", ["auto", "triton"])
def test_compile_fullgraph(implementation):
    case = BY_NAME["packed_blocks"]
    x, (cu, _) = make_packed_inputs(case, torch.float32), case.cu_seqlens()

    def step(q, k, v, cu):
        out, lse = flash_attention_varlen(
            2.0 * q, k, v, cu, causal=True, return_lse=True, implementation=implementation
        )
        return (out + lse[..., None]).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with interpreted():
        results = []
        for function in (step, compiled):
            q, k, v = (t.detach().requires_grad_() for t in (x.q, x.k, x.v))
            out = function(q, k, v, cu)
            results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_reference_and_op_have_one_signature():
    import inspect

    from course_lib.flash_attention import reference_attention_varlen

    ours = inspect.signature(flash_attention_varlen).parameters
    reference = inspect.signature(reference_attention_varlen).parameters
    assert list(ours)[:-1] == list(reference)
    assert all(ours[name].kind == reference[name].kind for name in reference)
