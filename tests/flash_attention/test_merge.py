"""Merging partial attentions: forward and gradients against the fp64 oracle, and the interface."""

import functools
import itertools
import math

import pytest
import torch
from torch import Tensor

from course_lib.flash_attention import reference_attention
from course_lib.flash_attention.merge import (
    launch_merge_bwd,
    launch_merge_fwd,
    merge_attention_states,
)
from course_lib.flash_attention.merge_launches import merge_config
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.numerics import assert_within_budget, budget, poisoned_copy, poisoned_view
from course_lib.runtime.tile import HAS_TRITON
from tests.flash_attention.decode_harness import run_if

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")
IMPLEMENTATIONS = [pytest.param("triton", marks=needs_triton), "torch"]
NAMES = ("out", "lse", "douts", "dlses")


def definition(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The formula in plain PyTorch, differentiable, in the dtype of lses."""
    blind = lses == -math.inf
    empty = blind.all(dim=0)
    safe = lses.masked_fill(empty, 0.0)
    # Not torch.logsumexp: its backward is exp(lse - L), and far from zero L is a rounded number.
    top = safe.detach().amax(dim=0)
    sums = torch.exp(safe - top)
    weights = (sums / sums.sum(dim=0)).masked_fill(blind, 0.0)
    parts = outs.to(lses.dtype).masked_fill(blind[..., None], 0.0)
    out = (weights[..., None] * parts).sum(dim=0)
    return out.to(outs.dtype), (top + sums.sum(dim=0).log()).masked_fill(empty, -math.inf)


def states(
    S: int,
    rows: tuple[int, ...],
    D: int,
    dtype: torch.dtype = torch.float32,
    *,
    values: str = "normal",
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """outs, lses, dout and dlse. The output of a part that saw no key is NaN: nobody may read it.

    values: "normal"; "empty": a third of all parts saw no key, and every fourth row has none;
    "late_max", "early_max": the last or the first part has all the weight; "far": logsumexps around
    5000 and -5000; "heavy_tailed".
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    outs, lses, dout, dlse = normal(S, *rows, D), normal(S, *rows), normal(*rows, D), normal(*rows)
    lses = 2.0 * lses
    ramp = torch.linspace(0.0, 30.0, S, dtype=torch.float64).reshape(S, *[1] * len(rows))
    if values == "late_max":
        lses = lses + ramp
    elif values == "early_max":
        lses = lses - ramp
    elif values == "far":
        lses = lses + 5000.0 * normal(*rows).sign()
    elif values == "heavy_tailed":
        lses, outs = 10.0 * lses, outs * normal(S, *rows, 1).exp()
    elif values == "empty":
        lses = lses.masked_fill(torch.rand(lses.shape, generator=generator) < 0.3, -math.inf)
        lses.view(S, -1)[:, ::4] = -math.inf
    outs = outs.masked_fill((lses == -math.inf)[..., None], math.nan)
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return outs.to(dtype), lses.to(statistics), dout.to(dtype), dlse.to(statistics)


def forward_and_backward(function, outs, lses, dout, dlse) -> dict[str, Tensor]:
    """Outputs and gradients of sum(out * dout) + sum(lse * dlse), over rows that see a key."""
    outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
    out, lse = function(outs, lses)
    sees = lse.detach() != -math.inf
    loss = (out * dout).sum() + (torch.where(sees, lse, 0.0) * dlse).sum()
    grads = torch.autograd.grad(loss, (outs, lses))
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def assert_matches_definition(inputs, implementation: str) -> None:
    outs, lses, dout, _ = inputs
    oracle = forward_and_backward(definition, *(x.double() for x in inputs))
    reference = forward_and_backward(definition, *inputs)
    before = [x.clone() for x in inputs]

    op = functools.partial(merge_attention_states, implementation=implementation)
    actual = forward_and_backward(op, *inputs)

    # The parts are added up in an order that PyTorch does not share, which may cost one rounding of
    # the largest partial sum; and dlse is a difference of products of dO and O_s, of which one
    # rounding remains. fp64 is its own oracle, and has all its roundings to show.
    eps = torch.finfo(lses.dtype).eps / 2
    seen = outs.nan_to_num(0.0).double()
    largest = seen.abs().max().item() if seen.numel() else 0.0
    longest = [x.norm(dim=-1).max().item() if x.numel() else 0.0 for x in (seen, dout.double())]
    terms = eps * (1.0 + longest[0]) * (1.0 + longest[1])
    extra = {"out": eps * largest, "lse": 0.0, "douts": 0.0, "dlses": terms}
    for name, dtype in zip(NAMES, (outs.dtype, lses.dtype, outs.dtype, lses.dtype), strict=True):
        assert actual[name].dtype == dtype, name
        assert actual[name].is_contiguous(), name
        allowed = budget(reference[name], oracle[name], dtype)
        allowed += terms if dtype == torch.float64 else extra[name]
        assert_within_budget(actual[name], oracle[name], allowed, name=name)
    for x, y in zip(before, inputs, strict=True):
        assert torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)), "inputs changed"


SIZES = [
    # Tiles hold 2, 8 or 32 parts, and with them 64, 16 or 4 rows of 16 elements.
    pytest.param(1, (5,), 16, id="one_part"),
    pytest.param(2, (64,), 16, id="block_of_rows"),
    pytest.param(2, (63,), 16, id="block_less_one"),
    pytest.param(2, (65,), 16, id="block_plus_one"),
    pytest.param(3, (2, 3, 7), 24, id="three_parts"),
    pytest.param(8, (17,), 16, id="block_of_parts"),
    pytest.param(7, (15,), 16, id="parts_less_one"),
    pytest.param(9, (5,), 16, id="parts_plus_one"),
    pytest.param(32, (3, 2), 32, id="large_block_of_parts"),
    pytest.param(33, (7,), 16, id="two_blocks_of_parts"),
    pytest.param(70, (1,), 72, id="three_blocks_of_parts"),
    pytest.param(3, (11,), 72, id="padded_72"),
    pytest.param(5, (4,), 80, id="padded_80"),
    pytest.param(4, (5,), 128, id="wide_128"),
    pytest.param(3, (6,), 256, id="wide_256"),
    pytest.param(3, (), 16, id="no_axes"),
    pytest.param(3, (0, 4), 16, id="no_rows"),
]
VALUES = ["empty", "late_max", "early_max", "far", "heavy_tailed"]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("S", "rows", "D"), SIZES)
def test_sizes(S, rows, D, implementation):
    with run_if(implementation):
        assert_matches_definition(states(S, rows, D), implementation)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("S", [4, 35])
def test_values(S, values, dtype, implementation):
    with run_if(implementation):
        assert_matches_definition(states(S, (3, 7), 24, dtype, values=values), implementation)


@pytest.mark.parametrize("values", ["normal", *VALUES])
def test_fp64(values):
    assert_matches_definition(states(5, (3, 7), 6, torch.float64, values=values), "auto")


def test_gradcheck():
    outs, lses, _, _ = states(4, (3,), 2, torch.float64)
    assert torch.autograd.gradcheck(
        merge_attention_states, (outs.requires_grad_(), lses.requires_grad_())
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_attention_over_pieces_is_attention_over_all(implementation):
    """What it is for: pieces of unequal length, one of them empty, and the gradient through all."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 3, 5, 16), (2, 3, 41, 16), (2, 3, 41, 16)]
    q, k, v = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
    edges = [0, 7, 7, 30, 41]
    pieces = [slice(a, b) for a, b in itertools.pairwise(edges)]

    def merged(q, k, v):
        parts = [reference_attention(q, k[:, :, p], v[:, :, p], return_lse=True) for p in pieces]
        outs, lses = zip(*parts, strict=True)
        if implementation == "triton":
            outs, lses = [x.float() for x in outs], [x.float() for x in lses]
        return merge_attention_states(outs, lses, implementation=implementation)

    results = []
    for function in (functools.partial(reference_attention, return_lse=True), merged):
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        with run_if(implementation):
            out, lse = function(*inputs)
            loss = out.double().square().sum() + lse.double().sin().sum()
            results.append((out.double(), lse.double(), *torch.autograd.grad(loss, inputs)))
    tolerance = 1e-5 if implementation == "triton" else 1e-12
    torch.testing.assert_close(results[1], results[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_any_order_and_any_grouping(implementation):
    outs, lses, _, _ = states(6, (4, 5), 16, values="empty")
    exact = definition(outs.double(), lses.double())
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))

    def merge(outs, lses):
        return merge_attention_states(outs, lses, implementation=implementation)

    with run_if(implementation):
        permuted = merge(outs[order], lses[order])
        left, right = merge(outs[:2], lses[:2]), merge(outs[2:], lses[2:])
        grouped = merge(*zip(left, right, strict=True))
        alone = merge(outs[3:4], lses[3:4])
    for actual in (permuted, grouped):
        torch.testing.assert_close(actual, exact, check_dtype=False, atol=1e-6, rtol=1e-6)
    seen = lses[3] != -math.inf
    assert torch.equal(alone[0][seen], outs[3][seen])
    assert torch.equal(alone[1], lses[3])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_without_keys(implementation):
    outs, lses, dout, dlse = states(5, (4, 6), 16, values="empty")
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    blind = lses.detach() == -math.inf
    empty = blind.all(dim=0)
    assert empty.any()
    assert (blind & ~empty).any()
    # Even a gradient that arrives at L = -inf, which nothing moves, stays harmless: a function of
    # L often has NaN there.
    dout[empty], dlse[empty] = math.nan, math.nan
    with run_if(implementation):
        out, lse = merge_attention_states(outs, lses, implementation=implementation)
        douts, dlses = torch.autograd.grad((out, lse), (outs, lses), (dout, dlse))
    assert (out[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    assert (douts[blind] == 0).all()
    assert (dlses[blind] == 0).all()
    assert all(x.isfinite().all() for x in (out, douts, dlses, lse[~empty]))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_parts(implementation):
    outs, lses, dout, dlse = states(0, (5,), 16)
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    with run_if(implementation):
        out, lse = merge_attention_states(outs, lses, implementation=implementation)
        douts, dlses = torch.autograd.grad((out, lse), (outs, lses), (dout, dlse))
    assert torch.equal(out, torch.zeros(5, 16))
    assert torch.equal(lse, torch.full((5,), -math.inf))
    assert douts.shape == (0, 5, 16)
    assert dlses.shape == (0, 5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_logsumexp_spoils_its_own_row_alone(bad, implementation):
    outs, lses, _, _ = states(4, (6,), 16)
    lses[2, 3] = bad
    with run_if(implementation):
        out, lse = merge_attention_states(outs, lses, implementation=implementation)
    assert out[3].isnan().all()
    assert not lse[3].isfinite()
    others = [0, 1, 2, 4, 5]
    assert out[others].isfinite().all()
    assert lse[others].isfinite().all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("layout", ["bthd", "offset", "expanded", "last_stride", "lses_last"])
def test_layouts(layout, implementation):
    rows = (7,) if layout == "last_stride" else (2, 5, 7)
    outs, lses, dout, dlse = states(3, rows, 24)
    view_outs, view_lses = outs, lses
    if layout == "bthd":  # axes that cannot be flattened
        view_outs = outs.transpose(1, 2).contiguous().transpose(1, 2)
    elif layout == "offset":
        parent = torch.full((outs.numel() + 3,), math.nan)
        view_outs = parent[3:].view(outs.shape).copy_(outs)
    elif layout == "expanded":  # one output for all parts
        view_outs = outs[:1].expand(3, -1, -1, -1, -1)
        outs = view_outs.contiguous()
    elif layout == "last_stride":
        view_outs = outs.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        view_lses = lses.movedim(0, -1).contiguous().movedim(-1, 0)
    assert (view_outs.stride(), view_lses.stride()) != (outs.stride(), lses.stride()) or (
        view_outs.data_ptr() % 16
    )
    op = functools.partial(merge_attention_states, implementation=implementation)
    with run_if(implementation):
        straight = forward_and_backward(op, outs, lses, dout, dlse)
        viewed = forward_and_backward(op, view_outs, view_lses, dout, dlse)
    for name in NAMES:
        assert torch.equal(straight[name], viewed[name]), name


@needs_triton
@pytest.mark.parametrize(("S", "N", "D"), [(2, 61, 24), (5, 19, 72), (35, 3, 40)])
def test_kernels_stay_inside_their_tensors(S, N, D):
    outs, lses, dout, dlse = states(S, (N,), D)
    # The parts may have any strides. The rest is contiguous, so its parent is flat.
    parts = poisoned_copy(outs)
    flat = {"lses": lses, "dout": dout, "dlse": dlse}
    flat = {name: poisoned_copy(x.reshape(-1)) for name, x in flat.items()}
    sizes = {"out": (N, D), "lse": (N,), "douts": (S, N, D), "dlses": (S, N)}
    results = {name: poisoned_view((math.prod(s),), torch.float32) for name, s in sizes.items()}
    view = {name: results[name].view.view(size) for name, size in sizes.items()}
    given = flat["lses"].view.view(S, N)

    with interpreted():
        launch_merge_fwd(parts.view, given, view["out"], view["lse"])
        upstream = (flat["dout"].view.view(N, D), flat["dlse"].view)
        launch_merge_bwd(parts.view, given, *upstream, view["douts"], view["dlses"])

    for name, poisoned in {"outs": parts, **flat, **results}.items():
        poisoned.assert_border_untouched(name=name)
        assert not poisoned.view.isnan().any(), name
    op = functools.partial(merge_attention_states, implementation="triton")
    with interpreted():
        expected = forward_and_backward(op, outs, lses, dout, dlse)
    assert all(torch.equal(view[name], expected[name]) for name in NAMES)


@needs_triton
def test_parts_are_read_once_and_a_part_without_keys_not_at_all():
    """The bytes that the docstring counts, from the interpreter's record of every access."""
    S, N, D = 5, 6, 32
    outs, lses, dout, dlse = states(S, (N,), D)
    lses[1] = -math.inf
    outs, lses = outs.requires_grad_(), lses.requires_grad_()
    with interpreted(trace=True) as run:
        out, lse = merge_attention_states(outs, lses, implementation="triton")
        torch.autograd.grad((out, lse), (outs, lses), (dout, dlse))
    for launch in run.launches:
        read = sum(a.nbytes for a in launch.accesses if a.tensor == "outs" and a.kind == "load")
        assert read == (S - 1) * N * D * 4


@needs_triton
def test_a_merge_of_few_rows_reads_all_parts_at_once():
    for S in (1, 2, 3, 8, 9, 32, 33, 1000):
        for D in (16, 72, 128, 256):
            config = merge_config(S, D)
            assert min(S, 32) <= config.BLOCK_S <= 32
            assert config.BLOCK_M >= 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_equal_to_the_bit(implementation):
    op = functools.partial(merge_attention_states, implementation=implementation)
    with run_if(implementation):
        first, second = (forward_and_backward(op, *states(9, (7,), 16)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("wanted", ["outs", "lses"])
def test_gradient_of_one_input_only(wanted, implementation):
    outs, lses, dout, dlse = states(3, (5,), 16)
    op = functools.partial(merge_attention_states, implementation=implementation)
    tensors = {"outs": outs, "lses": lses}
    tensors[wanted] = tensors[wanted].detach().requires_grad_()
    with run_if(implementation):
        out, lse = op(tensors["outs"], tensors["lses"])
        [grad] = torch.autograd.grad((out, lse), tensors[wanted], (dout, dlse))
        everything = forward_and_backward(op, outs, lses, dout, dlse)
    assert torch.equal(grad, everything[f"d{wanted}"])


def test_differentiable_once():
    outs, lses, dout, _ = states(3, (5,), 16)
    outs = outs.requires_grad_()
    out, _ = merge_attention_states(outs, lses)
    [grad] = torch.autograd.grad(out, outs, dout.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match=r"no autograd formula|not.* implemented"):
        torch.autograd.grad(grad.sum(), dout)


# ---- the interface -------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sequences(implementation):
    outs, lses, _, _ = states(3, (5,), 16)
    with run_if(implementation):
        stacked = merge_attention_states(outs, lses, implementation=implementation)
        for kind in (list, tuple):
            parts = merge_attention_states(kind(outs), kind(lses), implementation=implementation)
            assert all(torch.equal(x, y) for x, y in zip(stacked, parts, strict=True))


def test_messages():
    outs, lses = torch.zeros(3, 5, 16), torch.zeros(3, 5)
    merge: object = merge_attention_states

    def refuses(error, message, outs=outs, lses=lses, **options):
        with pytest.raises(error, match=message):
            merge(outs, lses, **options)  # pyright: ignore[reportCallIssue]

    refuses(
        ValueError, r"lses must have the shape of outs .* \(3, 5\), got \(3, 4\)", lses=lses[:, 1:]
    )
    refuses(ValueError, r"outs must be \[S, ..., D\] .* got shape \(16,\)", outs=torch.zeros(16))
    refuses(ValueError, r"outs must be .* got shape \(3, 5, 0\)", outs=torch.zeros(3, 5, 0))
    refuses(TypeError, r"outs must be fp16, .* got torch.int64", outs=outs.long())
    refuses(TypeError, r"lses must be torch.float32 where .* got torch.float16", lses=lses.half())
    refuses(TypeError, r"lses must be torch.float64 where .* got torch.float32", outs=outs.double())
    refuses(TypeError, r"outs must be a torch.Tensor, or a list .* got float", outs=1.0)
    refuses(TypeError, r"outs must be a dense", outs=outs.to_sparse())
    refuses(TypeError, r"lses\[1\] must be a torch.Tensor, got int", lses=[lses[0], 1])
    refuses(ValueError, r"outs must have at least one part .* got none", outs=[])
    refuses(
        ValueError,
        r"outs\[0\] has shape \(5, 16\), outs\[1\] \(4, 16\)",
        outs=[outs[0], outs[0, 1:]],
    )
    refuses(
        ValueError,
        r"lses\[0\] has dtype .*lses\[2\] torch.float64",
        lses=[*lses[:2], lses[0].double()],
    )
    refuses(ValueError, r"lses must be on the device of outs, cpu, got meta", lses=lses.to("meta"))
    refuses(ValueError, r"one of \('auto', 'triton', 'torch'\), got 'x'", implementation="x")


@needs_triton
def test_triton_runs_triton_or_raises():
    outs, lses = torch.zeros(3, 5, 16), torch.zeros(3, 5)
    with pytest.raises(RuntimeError, match=r'"triton" needs CUDA tensors, got device cpu'):
        merge_attention_states(outs, lses, implementation="triton")
    with interpreted() as run:
        with pytest.raises(TypeError, match=r"outs must be fp16, bf16 or fp32 .* torch.float64"):
            merge_attention_states(outs.double(), lses.double(), implementation="triton")
        with pytest.raises(ValueError, match=r"outs must have a head dimension of 16 to 256 .* 8"):
            merge_attention_states(outs[..., :8], lses, implementation="triton")
        assert not run.launches
        merge_attention_states(outs[..., :8], lses)
        merge_attention_states(outs, lses)
        assert not run.launches
        merge_attention_states(outs, lses, implementation="triton")
        assert len(run.launches) == 1


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(implementation, requires_grad):
    outs, lses, dout, dlse = states(3, (2, 5), 16)
    outs, lses = (x.requires_grad_(requires_grad) for x in (outs, lses))
    ops = torch.ops.course_lib
    with run_if(implementation):
        torch.library.opcheck(ops.merge_attention_states_fwd, (outs, lses, implementation))
        saved = (outs.detach(), lses.detach(), dout, dlse, implementation)
        torch.library.opcheck(ops.merge_attention_states_bwd, saved)


@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
@pytest.mark.parametrize("sequence", [False, True])
def test_compile_fullgraph(implementation, sequence):
    torch._dynamo.reset()

    def step(outs, lses):
        if sequence:
            outs, lses = outs.unbind(), lses.unbind()
        out, lse = merge_attention_states(outs, lses, implementation=implementation)
        return (2.0 * out).sin() + lse[..., None]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = []
    with run_if(implementation):
        for function in (step, compiled):
            outs, lses, dout, _ = states(3, (2, 5), 16)
            inputs = (outs.requires_grad_(), lses.requires_grad_())
            result = function(*inputs)
            results.append((result, *torch.autograd.grad(result, inputs, dout)))
    torch.testing.assert_close(results[1], results[0])
