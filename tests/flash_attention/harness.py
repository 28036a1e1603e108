"""Run an implementation on a case, forward and backward, and judge it against the fp64 oracle."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from course_lib.flash_attention import (
    flash_attention,
    flash_attention_varlen,
    reference_attention,
    reference_attention_varlen,
)
from course_lib.flash_attention.cases import (
    Case,
    Inputs,
    PackedCase,
    make_inputs,
    make_packed_inputs,
)
from course_lib.runtime.numerics import assert_within_budget, budget

NAMES = ("out", "lse", "dq", "dk", "dv")


def forward_and_backward(function, inputs: Inputs) -> dict[str, Tensor]:
    """Outputs and gradients of sum(out * dout) + sum(lse * dlse), over rows that see a key."""
    q, k, v = (x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v))
    out, lse = function(q, k, v)
    sees = lse.detach() != -math.inf
    loss = (out * inputs.dout).sum() + (torch.where(sees, lse, 0.0) * inputs.dlse).sum()
    dq, dk, dv = torch.autograd.grad(loss, (q, k, v))
    return dict(zip(NAMES, (out.detach(), lse.detach(), dq, dk, dv), strict=True))


def draw(case: Case | PackedCase, dtype: torch.dtype, *, device: str = "cpu", seed: int = 0):
    """The inputs of either kind of case."""
    make = make_packed_inputs if isinstance(case, PackedCase) else make_inputs
    return make(case, dtype, device=device, seed=seed)  # pyright: ignore[reportArgumentType]


def attention_of(case: Case | PackedCase, implementation: str | None, device: str = "cpu"):
    """A function of q, k and v: the op in one implementation, or the reference for None."""
    options = {"causal": case.causal, "window_size": case.window_size, "scale": case.scale}
    options["return_lse"] = True
    if implementation is not None:
        options["implementation"] = implementation
    if isinstance(case, PackedCase):
        function = flash_attention_varlen if implementation else reference_attention_varlen
        cu_q, cu_k = case.cu_seqlens(device)
        return lambda q, k, v: function(q, k, v, cu_q, cu_k, **options)
    function = flash_attention if implementation else reference_attention
    return functools.partial(function, **options)


@functools.lru_cache(maxsize=8)
def expected(
    case: Case | PackedCase, dtype: torch.dtype, seed: int, device: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The oracle's results for a case as drawn in `dtype`, and the budget of each."""
    inputs = draw(case, dtype, device=device, seed=seed)
    exact = Inputs(*(x.double() for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)))
    attention = attention_of(case, None, device)
    oracle = forward_and_backward(attention, exact)
    reference = forward_and_backward(attention, inputs)
    extra = roundings_of_fp32(exact, case, oracle, dtype)
    budgets = {
        name: budget(reference[name], oracle[name], torch.float32 if name == "lse" else dtype)
        + extra[name]
        for name in NAMES
    }
    return oracle, budgets


def roundings_of_fp32(
    inputs: Inputs, case: Case | PackedCase, oracle: dict[str, Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """What a tiled algorithm owes to fp32, apart from what plain PyTorch owes to the dtype.

    * A score is a sum of D products, in an order that PyTorch's own product does not share: one
      rounding of its largest partial sum, at most |q| |k|. It moves a probability in proportion.
    * L is rounded when it is saved and when it is turned to base 2, and so are all probabilities
      that the backward makes from it. Plain PyTorch saves P instead.
    * dS = P * (dP - delta) is a difference of two numbers that are equal where one key has all the
      weight, and one rounding of them remains.

    In half precision all of this is small beside one rounding of the output.
    """

    def largest(x: Tensor) -> float:
        x = x[x.isfinite()].abs()
        return x.max().item() if x.numel() else 0.0

    def longest(x: Tensor) -> float:
        return largest(x.norm(dim=-1))

    one_rounding = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    scale = case.scale or case.D**-0.5
    score = one_rounding * scale * longest(inputs.q) * longest(inputs.k)
    probability = score + one_rounding * 2.0 * largest(oracle["lse"])
    difference = one_rounding * scale * longest(inputs.dout) * longest(inputs.v)
    return {
        "out": score * largest(inputs.v),
        "lse": score,
        "dq": probability * largest(oracle["dq"]) + difference * largest(inputs.k),
        "dk": probability * largest(oracle["dk"]) + difference * largest(inputs.q),
        "dv": probability * largest(oracle["dv"]),
    }


def assert_matches_oracle(
    case: Case | PackedCase,
    dtype: torch.dtype,
    implementation: str,
    *,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Outputs, gradients, their dtypes, and that the inputs are as they were."""
    oracle, budgets = expected(case, dtype, seed, device)
    inputs = draw(case, dtype, device=device, seed=seed)
    before = [x.clone() for x in (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)]

    actual = forward_and_backward(attention_of(case, implementation, device), inputs)

    for name in NAMES:
        wanted = torch.float32 if name == "lse" and dtype != torch.float64 else dtype
        assert actual[name].dtype == wanted, name
        assert_within_budget(actual[name], oracle[name], budgets[name], name=name)
    after = (inputs.q, inputs.k, inputs.v, inputs.dout, inputs.dlse)
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "inputs changed"
