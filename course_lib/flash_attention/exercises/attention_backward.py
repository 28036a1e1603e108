"""Exercise: the gradients of attention from the output and one number a row."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, Misconception, misconception

Gradients = tuple[torch.Tensor, ...]


def cases(size: str, seed: int) -> Iterable[Case]:
    """Inputs q [M, D], k and v [N, D], what the forward saved, and grad_out [M, D]."""
    generator = torch.Generator().manual_seed(seed)

    def data(
        rows: int, keys: int, dim: int, block: int, spread: float = 1.0, twins: bool = False
    ) -> Data:
        q = spread * torch.randn(rows, dim, generator=generator)
        k, v = torch.randn(2, keys, dim, generator=generator)
        if twins:
            # Every key has a near twin. Otherwise large scores leave one key a probability of 1,
            # and gradients that are all 0.
            k[1::2] = k[: keys // 2 * 2 : 2] + 0.02 * k[1::2]
        grad_out = torch.randn(rows, dim, generator=generator)
        scores = q.double() @ k.double().T / math.sqrt(dim)
        return {
            "q": q,
            "k": k,
            "v": v,
            "out": (torch.softmax(scores, dim=1) @ v.double()).float(),
            "lse": torch.logsumexp(scores, dim=1).float(),
            "grad_out": grad_out,
            "block": block,
        }

    yield Case("2 queries, 3 keys, D = 2", data(2, 3, 2, 3))
    yield Case("6 queries, 4 keys, blocks of 2", data(6, 4, 5, 2))
    yield Case("ragged: 5 queries, 7 keys, blocks of 3", data(5, 7, 3, 3, 3.0), "awkward")
    yield Case("scores up to 100", data(4, 10, 6, 4, 40.0, twins=True), "awkward")
    rows, keys = (200, 310) if size == "small" else (6000, 7000)
    yield Case(f"{rows:,} queries, {keys:,} keys", data(rows, keys, 16, 32), "method")


def harness(answer, data):
    """Call the answer with what the forward saved."""
    return answer(*data.values())


def oracle(data: Data) -> Gradients:
    """Autograd through the whole matrix, in fp64."""
    q, k, v = (data[name].double().requires_grad_() for name in "qkv")
    out = torch.softmax(q @ k.T / math.sqrt(q.shape[1]), dim=1) @ v
    return torch.autograd.grad(out, (q, k, v), data["grad_out"].double())


def over_keys(q, k, v, out, lse, grad_out, block: int) -> Gradients:
    scale = 1 / math.sqrt(q.shape[1])
    delta = (grad_out * out).sum(1, keepdim=True)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for j in range(0, k.shape[0], block):
        keys = slice(j, j + block)
        probs = torch.exp(scale * q @ k[keys].T - lse[:, None])
        dv[keys] = probs.T @ grad_out
        dscores = probs * (grad_out @ v[keys].T - delta)
        dq += scale * dscores @ k[keys]
        dk[keys] = scale * dscores.T @ q
    return dq, dk, dv


def over_queries(q, k, v, out, lse, grad_out, block: int) -> Gradients:
    scale = q.shape[1] ** -0.5
    dqs, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for q_tile, o_tile, lse_tile, do_tile in zip(
        *(x.split(block) for x in (q, out, lse, grad_out)), strict=True
    ):
        probs = torch.einsum("md,nd->mn", q_tile * scale, k).sub_(lse_tile[:, None]).exp_()
        dprobs = torch.einsum("md,nd->mn", do_tile, v)
        dscores = probs * (dprobs - torch.einsum("md,md->m", do_tile, o_tile)[:, None]) * scale
        dqs.append(dscores @ k)
        dk.addmm_(dscores.T, q_tile)
        dv.addmm_(probs.T, do_tile)
    return torch.cat(dqs), dk, dv


def in_base_2(q, k, v, out, lse, grad_out, block: int) -> Gradients:
    """As a kernel does it: log2(e) folded into the scale, tiles of queries and keys."""
    scale, log2_e = q.shape[1] ** -0.5, math.log2(math.e)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, q.shape[0], block):
        rows = slice(i, i + block)
        delta = (grad_out[rows] * out[rows]).sum(1)
        for j in range(0, k.shape[0], block):
            keys = slice(j, j + block)
            scores = (q[rows] * (scale * log2_e)) @ k[keys].T
            probs = torch.exp2(scores - (lse[rows] * log2_e)[:, None])
            dv[keys] += probs.T @ grad_out[rows]
            dscores = probs * (grad_out[rows] @ v[keys].T - delta[:, None])
            dq[rows] += dscores @ k[keys]
            dk[keys] += dscores.T @ q[rows]
    return dq * scale, dk * scale, dv


def _wrong(
    delta=lambda grad_out, out, v: (grad_out * out).sum(1, keepdim=True),
    delta_of_tile=None,
    scale_scores: bool = True,
    scale_q: bool = True,
    scale_k: bool = True,
    base_2: bool = False,
    dv_from_dscores: bool = False,
    overwrite_dq: bool = False,
    no_probs: bool = False,
    twice: bool = False,
    softmax_of_block: bool = False,
    use_lse: bool = True,
    sign: float = 1.0,
):
    """The first accepted answer with one thing wrong."""

    def answer(q, k, v, out, lse, grad_out, block: int) -> Gradients:
        scale = 1 / math.sqrt(q.shape[1])
        rows = delta(grad_out, out, v)
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for j in range(0, k.shape[0], block):
            keys = slice(j, j + block)
            scores = (scale if scale_scores else 1.0) * q @ k[keys].T
            scores = scores - lse[:, None] if use_lse else scores
            probs = torch.exp2(scores) if base_2 else torch.exp(scores)
            if softmax_of_block:
                probs = torch.softmax(scores, dim=1)
            dprobs = grad_out @ v[keys].T
            here = rows if delta_of_tile is None else delta_of_tile(probs, dprobs)
            dscores = sign * (dprobs - here) * (1.0 if no_probs else probs)
            dv[keys] = (dscores if dv_from_dscores else probs).T @ grad_out
            part = (scale if scale_q else 1.0) * dscores @ k[keys]
            dq = part if overwrite_dq else dq + part
            dk[keys] = (scale if scale_k else 1.0) * dscores.T @ (scale * q if twice else q)
        return dq, dk, dv

    return answer


@misconception(
    "a number a row, laid along the keys",
    question="`lse` and delta hold one number for each query. Which axis of a [M, block] tile is "
    "that?",
    says="This is what you get when `[:, None]` or `keepdim=True` is missing: [M] is laid along "
    "the keys.",
)
def laid_along_the_keys(q, k, v, out, lse, grad_out, block: int) -> Gradients:
    return _wrong(delta=lambda grad_out, out, v: (grad_out * out).sum(1))(
        q, k, v, out, lse, grad_out, block
    )


@misconception(
    "dk and dv overwritten",
    question="Every block of queries contributes to every dk and dv. Where do the earlier ones go?",
    says="This is what you get when the loop runs over the queries, and dk and dv are assigned "
    "instead of added to.",
)
def keys_overwritten(q, k, v, out, lse, grad_out, block: int) -> Gradients:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for i in range(0, q.shape[0], block):
        rows = slice(i, i + block)
        parts = (q[rows], k, v, out[rows], lse[rows], grad_out[rows])
        dq[rows], dk, dv = over_keys(*parts, block)
    return dq, dk, dv


@misconception(
    "whole matrix by autograd",
    question="How large is the matrix that autograd keeps between forward and backward?",
    says="This is what you get when the forward runs again under autograd: right, and it stores "
    "the matrix that the forward avoided.",
)
def by_autograd(q, k, v, out, lse, grad_out, block: int) -> Gradients:
    with torch.enable_grad():
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        probs = torch.exp(q @ k.T / math.sqrt(q.shape[1]) - lse[:, None])
        again = (probs / probs.sum(1, keepdim=True)) @ v
        return torch.autograd.grad(again, (q, k, v), grad_out)


EXERCISE = Exercise(
    id="flash_attention.attention_backward",
    kind="function",
    title="The backward pass",
    task=(
        "Return `(dq, dk, dv)` for `out = softmax(q kᵀ / sqrt(D)) v`, from what the forward saved: "
        "`out` and the row logsumexp `lse`. Recompute the probabilities `block` keys (or queries) "
        "at a time: no tensor may be larger than a block of scores or an input."
    ),
    why="Training with long sequences hangs on this: N numbers are saved instead of N × N.",
    points=8,
    minutes=35,
    difficulty=5,
    core=False,
    cases=cases,
    harness=harness,
    oracle=oracle,
    outputs=("dq", "dk", "dv"),
    accepts=(over_keys, over_queries, in_base_2),
    misconceptions=(
        Misconception(
            "delta missing",
            _wrong(delta=lambda grad_out, out, v: 0.0),
            "Add a constant to all scores of a row: the softmax does not change. What must the "
            "row of dS add up to?",
            "This is what you get when dS = P · dP: the term rowsum(dO · O) is missing, so rows of "
            "dS do not sum to 0.",
        ),
        Misconception(
            "delta summed over one block",
            _wrong(delta_of_tile=lambda probs, dprobs: (probs * dprobs).sum(1, keepdim=True)),
            "The sum over P · dP runs over all keys. How many of them are in this block?",
            "This is what you get when delta is summed from one block's P · dP instead of all keys "
            "(rowsum(dO · O) is that sum).",
        ),
        Misconception(
            "delta is the mean",
            _wrong(delta=lambda grad_out, out, v: (grad_out * out).mean(1, keepdim=True)),
            "Is dO · O a scalar product or an average?",
            "This is what you get when the row's products are averaged over D instead of summed.",
        ),
        Misconception(
            "scale missing in dq and dk",
            _wrong(scale_q=False, scale_k=False),
            "S is 1/sqrt(D) times q kᵀ. What does the chain rule do with that factor?",
            "This is what you get when 1/sqrt(D) is used for the scores and not for the gradients.",
        ),
        Misconception(
            "scale missing in dk",
            _wrong(scale_k=False),
            "dq has a factor 1/sqrt(D). Why would dk have none?",
            "This is what you get when only dq is multiplied by 1/sqrt(D).",
        ),
        Misconception(
            "scale missing in the scores",
            _wrong(scale_scores=False),
            "Do the rows of your P add up to 1?",
            "This is what you get when P is recomputed from unscaled scores: its rows do not add "
            "up to 1.",
        ),
        Misconception(
            "wrong base",
            _wrong(base_2=True),
            "lse is a natural logarithm. Which exponential undoes it?",
            "This is what you get with exp2 of scores that were not multiplied by log2(e).",
        ),
        Misconception(
            "dv from dS",
            _wrong(dv_from_dscores=True),
            "O = P V. Which matrix does V meet in the forward pass?",
            "This is what you get when dv is computed from dS instead of P.",
        ),
        Misconception(
            "softmax's derivative forgotten",
            _wrong(no_probs=True),
            "If a key has probability 0, how much can its score matter?",
            "This is what you get when dS = dP - delta, without the factor P.",
        ),
        Misconception(
            "dq overwritten",
            _wrong(overwrite_dq=True),
            "Every block of keys contributes to every dq. Where do the earlier ones go?",
            "This is what you get when dq is assigned in each block instead of added to.",
        ),
        Misconception(
            "scale twice in dk",
            _wrong(twice=True),
            "Your q has been multiplied by the scale already. What does `scale * dscores.T @ q` "
            "do?",
            "This is what you get when dk is made from the scaled q and multiplied by 1/sqrt(D) "
            "once more.",
        ),
        Misconception(
            "softmax of each block",
            _wrong(softmax_of_block=True),
            "Over how many keys does a row of your P add up to 1: those of a block, or all?",
            "This is what you get when each block has a softmax of its own; exp(score - lse) knows "
            "all keys.",
        ),
        Misconception(
            "lse not subtracted",
            _wrong(use_lse=False),
            "What do the rows of your P add up to?",
            "This is what you get when P is exp(score) without the row's lse.",
        ),
        Misconception(
            "sign of dS",
            _wrong(sign=-1.0),
            "A score rises, and so does its own probability. Which sign has dP in dS?",
            "This is what you get with P · (delta - dP).",
        ),
        laid_along_the_keys,
        keys_overwritten,
        by_autograd,
    ),
    hints=(
        "Re-read the solved example above this card: one row, three keys. With P = (.5, .25, .25) "
        "and dP = (4, 0, 0), delta is 2. What is dS?",
        "Print `dscores.sum(1)` over all blocks: 0 in every row, up to rounding. Then "
        "`probs.sum(1)`: 1 in every row.",
        "```python\ndelta = ...\nfor j in range(0, N, block):\n"
        "    probs = torch.exp(... - lse[:, None])\n"
        "    dv[keys] = ...\n    dprobs = ...\n    dscores = probs * (...)\n    dq += ...\n"
        "    dk[keys] = ...\n```",
    ),
    budget=Budget(
        largest_tensor=lambda data: (
            4
            * max(
                data["q"].numel(),
                data["k"].numel(),
                data["block"] * max(data["q"].shape[0], data["k"].shape[0]),
            )
        ),
    ),
    usual_failures=(
        "leaves out delta, or sums it over one block only",
        "multiplies dq by the scale and forgets dk",
    ),
)
