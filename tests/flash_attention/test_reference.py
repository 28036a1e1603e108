"""The definition itself, against algorithms that share nothing with it."""

import math

import pytest
import torch
import torch.nn.functional as F

from course_lib.flash_attention import reference_attention
from course_lib.flash_attention.band import Band
from course_lib.flash_attention.cases import Case, cases, make_inputs


def one_query_at_a_time(q, k, v, *, causal, scale, window_size=(-1, -1)):
    """Attention in Python floats: no masks, no matrices, only the keys a query may see."""
    B, Hq, Tq, _ = q.shape
    Hkv, Tk = k.shape[1:3]
    out = torch.zeros_like(q)
    lse = torch.full((B, Hq, Tq), -math.inf, dtype=q.dtype)
    for b in range(B):
        for h in range(Hq):
            for i in range(Tq):
                own = i + Tk - Tq
                left, right = window_size
                first = max(own - left, 0) if left >= 0 else 0
                last = min(Tk, own + 1 + right) if right >= 0 else Tk
                last = min(last, own + 1) if causal else last
                kv = h * Hkv // Hq
                scores = [
                    scale * math.fsum((q[b, h, i] * k[b, kv, j]).tolist())
                    for j in range(first, last)
                ]
                if not scores:
                    continue
                top = max(scores)
                total = math.fsum(math.exp(s - top) for s in scores)
                lse[b, h, i] = top + math.log(total)
                for j, s in enumerate(scores, start=first):
                    out[b, h, i] += math.exp(s - top) / total * v[b, kv, j]
    return out, lse


@pytest.mark.parametrize(
    ("Hq", "Hkv", "Tq", "Tk", "causal", "window_size"),
    [
        (1, 1, 5, 7, False, (-1, -1)),
        (2, 1, 5, 3, True, (-1, -1)),
        (4, 2, 3, 6, True, (-1, -1)),
        (3, 3, 4, 4, True, (1, -1)),
        (1, 1, 6, 9, False, (2, 1)),
        (1, 1, 9, 4, False, (3, -1)),
        (1, 1, 4, 9, False, (-1, 2)),
        (1, 1, 4, 4, False, (0, 0)),
    ],
)
def test_against_one_query_at_a_time(Hq, Hkv, Tq, Tk, causal, window_size):
    x = make_inputs(Case("x", "tiny", 2, Hq, Hkv, Tq, Tk, 4), torch.float64)
    options = {"causal": causal, "window_size": window_size, "scale": 0.6}
    out, lse = reference_attention(x.q, x.k, x.v, return_lse=True, **options)
    slow_out, slow_lse = one_query_at_a_time(x.q, x.k, x.v, **options)
    torch.testing.assert_close(out, slow_out, rtol=0, atol=1e-14)
    torch.testing.assert_close(lse, slow_lse, rtol=0, atol=1e-14)


def test_against_sdpa_where_the_alignments_agree():
    x = make_inputs(Case("x", "tiny", 2, 4, 2, 31, 31, 8), torch.float64)
    ours = reference_attention(x.q, x.k, x.v, causal=True)
    theirs = F.scaled_dot_product_attention(x.q, x.k, x.v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-13)


def test_the_mask_is_aligned_at_the_bottom_right():
    assert Band(-1, 0).visible(2, 4).tolist() == [[True, True, True, False], [True] * 4]
    assert Band(-1, 0).visible(3, 2).tolist() == [[False, False], [True, False], [True, True]]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("Tq", "Tk"), [(3, 4), (4, 3)])
def test_gradcheck(causal, Tq, Tk):
    x = make_inputs(Case("x", "tiny", 1, 2, 1, Tq, Tk, 3), torch.float64)
    inputs = [t.requires_grad_() for t in (x.q, x.k, x.v)]

    def outputs(q, k, v):
        out, lse = reference_attention(q, k, v, causal=causal, return_lse=True)
        return out, lse[lse != -math.inf]

    assert torch.autograd.gradcheck(outputs, inputs)


def test_queries_without_keys_have_zero_output_and_zero_gradient():
    x = make_inputs(Case("x", "tiny", 1, 1, 1, 5, 3, 4), torch.float64)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    out, lse = reference_attention(q, k, v, causal=True, return_lse=True)
    assert (out[:, :, :2] == 0).all()
    assert (lse[:, :, :2] == -math.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[:, :, 2:].sum(), (q, k, v))
    assert all(g.isfinite().all() for g in grads)
    assert (grads[0][:, :, :2] == 0).all()


def test_no_keys_at_all():
    x = make_inputs(Case("x", "tiny", 1, 2, 1, 5, 0, 4), torch.float64)
    out, lse = reference_attention(x.q, x.k, x.v, return_lse=True)
    assert out.shape == (1, 2, 5, 4)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_case_flops_count_visible_pairs():
    for case in cases("tiny"):
        left, right = case.window_size
        pairs = 0
        for i in range(case.Tq):
            for j in range(case.Tk):
                ahead = j - (i + case.Tk - case.Tq)
                late = (case.causal and ahead > 0) or (right >= 0 and ahead > right)
                pairs += not late and not (left >= 0 and -ahead > left)
        assert case.flops() == 4 * case.B * case.Hq * pairs * case.D, case.name
