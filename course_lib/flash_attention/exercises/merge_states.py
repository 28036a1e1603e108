"""Exercise: two partial attentions become one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Case, Data, Exercise, misconception

Pair = tuple[torch.Tensor, torch.Tensor]
NEVER = -math.inf


def cases(size: str, seed: int) -> Iterable[Case]:
    """States: out [S, M, D] and lse [S, M] of S parts, merged one after another."""
    generator = torch.Generator().manual_seed(seed)

    def states(parts: int, rows: int, dim: int, spread: float = 2.0) -> Data:
        return {
            "out": torch.randn(parts, rows, dim, generator=generator),
            "lse": spread * torch.randn(parts, rows, generator=generator),
        }

    def with_empty(data: Data, empty: list[tuple[int, int]]) -> Data:
        for part, row in empty:
            data["out"][part, row] = 0.0
            data["lse"][part, row] = NEVER
        return data

    yield Case(
        "one row: the second part has three times the weight",
        {
            "out": torch.tensor([[[1.0]], [[5.0]]]),
            "lse": torch.tensor([[math.log(2.0)], [math.log(6.0)]]),
        },
    )
    yield Case("two parts, three rows", states(2, 3, 2))
    yield Case(
        "one part is empty",
        {"out": torch.tensor([[[7.0]], [[0.0]]]), "lse": torch.tensor([[2.0], [NEVER]])},
    )
    yield Case(
        "both parts are empty",
        {"out": torch.zeros(2, 1, 2), "lse": torch.full([2, 1], NEVER)},
    )
    many = with_empty(states(5, 3, 4), [(0, 0), (3, 0), (0, 1), (1, 1), (4, 2)])
    many_lse = many["lse"].clone()
    order = torch.randperm(5, generator=generator)
    yield Case("five parts, some empty", many, "awkward")
    yield Case(
        "the same five parts in another order",
        {"out": many["out"][order], "lse": many_lse[order]},
        "awkward",
    )
    yield Case("scores around 5,000 and -5,000", _far(states(3, 4, 2)), "awkward")


def _far(data: Data) -> Data:
    data["lse"][:, 0] += 5000.0
    data["lse"][:, 1] -= 5000.0
    data["lse"][1, 2] += 5000.0
    return data


def harness(answer, data):
    """Merge the parts one after another."""
    out, lse = data["out"][0], data["lse"][0]
    for next_out, next_lse in zip(data["out"][1:], data["lse"][1:], strict=True):
        out, lse = answer(out, lse, next_out, next_lse)
    return out, lse


def oracle(data: Data) -> Pair:
    """All parts at once: weights exp(lse - largest lse), row by row."""
    out, lse = data["out"].double(), data["lse"].double()
    merged = torch.zeros(out.shape[1:], dtype=torch.float64)
    total = torch.full(lse.shape[1:], NEVER, dtype=torch.float64)
    for row in range(lse.shape[1]):
        seen = lse[:, row] > NEVER
        if seen.any():
            top = lse[seen, row].max()
            weights = (lse[seen, row] - top).exp()
            merged[row] = weights @ out[seen, row] / weights.sum()
            total[row] = top + weights.sum().log()
    return merged, total


def shifted(out_a, lse_a, out_b, lse_b) -> Pair:
    top = torch.maximum(lse_a, lse_b)
    origin = torch.where(top == NEVER, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - origin), torch.exp(lse_b - origin)
    total = weight_a + weight_b
    divisor = torch.where(total == 0, 1.0, total)
    out = (weight_a[:, None] * out_a + weight_b[:, None] * out_b) / divisor[:, None]
    return out, origin + torch.log(total)


def sigmoid_of_the_difference(out_a, lse_a, out_b, lse_b) -> Pair:
    share_b = torch.sigmoid(lse_b - lse_a).nan_to_num(0.0)[:, None]
    return out_a + share_b * (out_b - out_a), torch.logaddexp(lse_a, lse_b)


def stacked(out_a, lse_a, out_b, lse_b) -> Pair:
    lse = torch.stack([lse_a, lse_b])
    total = torch.logsumexp(lse, dim=0)
    share = torch.where(lse == NEVER, 0.0, torch.exp(lse - total))
    return torch.einsum("sm,smd->md", share, torch.stack([out_a, out_b])), total


@misconception(
    "plain average",
    question="One part saw a thousand keys with high scores, the other one key. Same weight?",
    says="This is what you get when the two outputs are averaged: parts are weighed by exp(lse).",
)
def average(out_a, lse_a, out_b, lse_b) -> Pair:
    return (out_a + out_b) / 2, torch.logaddexp(lse_a, lse_b)


@misconception(
    "outputs added",
    question="Each output is already divided by its own sum. Can they be added as they are?",
    says="This is what you get when normalised outputs are added as if they were accumulators.",
)
def added(out_a, lse_a, out_b, lse_b) -> Pair:
    return out_a + out_b, torch.logaddexp(lse_a, lse_b)


@misconception(
    "weighed by lse",
    question="lse is the logarithm of a sum. Is the weight the logarithm, or the sum?",
    says="This is what you get when the outputs are weighed by lse instead of exp(lse).",
)
def weighed_by_lse(out_a, lse_a, out_b, lse_b) -> Pair:
    total = lse_a + lse_b
    out = (lse_a[:, None] * out_a + lse_b[:, None] * out_b) / total[:, None]
    return out, torch.logaddexp(lse_a, lse_b)


@misconception(
    "weights exchanged",
    question="When lse_b is much the larger, which output should be left?",
    says="This is what you get when each output is weighed by the other part's sum.",
)
def exchanged(out_a, lse_a, out_b, lse_b) -> Pair:
    out, lse = sigmoid_of_the_difference(out_b, lse_a, out_a, lse_b)
    return out, lse


@misconception(
    "maximum instead of the sum",
    question="Both parts have lse 0, so each sum is 1. What is the logarithm of the joint sum?",
    says="This is what you get when the larger lse is kept: the next merge weighs it too low.",
)
def lse_is_max(out_a, lse_a, out_b, lse_b) -> Pair:
    return shifted(out_a, lse_a, out_b, lse_b)[0], torch.maximum(lse_a, lse_b)


@misconception(
    "log-sum-exps added",
    question="Which operation on two sums does adding their logarithms perform?",
    says="This is what you get when the two lse are added, which multiplies the sums.",
)
def lse_added(out_a, lse_a, out_b, lse_b) -> Pair:
    return shifted(out_a, lse_a, out_b, lse_b)[0], lse_a + lse_b


@misconception(
    "empty with empty is NaN",
    question="What is `lse_a - top` when both parts are empty?",
    says="This is what you get when -inf is subtracted from -inf: two empty parts become NaN.",
)
def empty_is_nan(out_a, lse_a, out_b, lse_b) -> Pair:
    top = torch.maximum(lse_a, lse_b)
    weight_a, weight_b = torch.exp(lse_a - top), torch.exp(lse_b - top)
    total = weight_a + weight_b
    out = (weight_a[:, None] * out_a + weight_b[:, None] * out_b) / total[:, None]
    return out, top + torch.log(total)


@misconception(
    "no maximum subtracted",
    question="What is exp(5000)?",
    says="This is what you get when exp is taken of lse itself: it overflows, or vanishes.",
)
def not_shifted(out_a, lse_a, out_b, lse_b) -> Pair:
    weight_a, weight_b = torch.exp(lse_a), torch.exp(lse_b)
    total = weight_a + weight_b
    divisor = torch.where(total == 0, 1.0, total)
    out = (weight_a[:, None] * out_a + weight_b[:, None] * out_b) / divisor[:, None]
    return out, torch.log(total)


@misconception(
    "empty counts as one",
    question="You gave an empty part lse = 0. How many keys with score 0 is that?",
    says="This is what you get when lse = -inf is replaced by 0: an empty part then weighs as much "
    "as one key with score 0.",
)
def empty_counts(out_a, lse_a, out_b, lse_b) -> Pair:
    return shifted(
        out_a, lse_a.masked_fill(lse_a == NEVER, 0.0), out_b, lse_b.masked_fill(lse_b == NEVER, 0.0)
    )


@misconception(
    "both parts empty",
    question="What is softmax of (-inf, -inf), and which 0 / 0 is in it?",
    says="This is what you get when the shares are softmax(lse), or exp(lse - L): right as long as "
    "one part saw a key, and NaN where both are empty.",
)
def softmax_of_two_infinities(out_a, lse_a, out_b, lse_b) -> Pair:
    share = torch.softmax(torch.stack([lse_a, lse_b]), dim=0)
    out = share[0][:, None] * out_a + share[1][:, None] * out_b
    return out, torch.logaddexp(lse_a, lse_b)


@misconception(
    "emptiness asked of all rows at once",
    question="In one row both parts are empty, in the next only one is. Which branch do you take?",
    says="This is what you get when one `if` decides for all rows whether a part is empty: rows "
    "differ, so each needs its own `torch.where`.",
)
def checked_all_at_once(out_a, lse_a, out_b, lse_b) -> Pair:
    if bool((lse_a == NEVER).all()):
        return out_b, lse_b
    if bool((lse_b == NEVER).all()):
        return out_a, lse_a
    return softmax_of_two_infinities.wrong(out_a, lse_a, out_b, lse_b)


@misconception(
    "NaN replaced in lse too",
    question="Two empty parts make an empty part. Is the lse of an empty part 0?",
    says="This is what you get when NaN becomes 0 in both outputs: right for out, but lse = 0 is a "
    "part that saw one key with score 0.",
)
def nan_replaced_in_lse(out_a, lse_a, out_b, lse_b) -> Pair:
    out, lse = empty_is_nan.wrong(out_a, lse_a, out_b, lse_b)
    return out.nan_to_num(0.0), torch.where(lse.isnan(), 0.0, lse)


@misconception(
    "maximum not added back",
    question="Your sum was measured from `top`. From where is the lse measured that you return?",
    says="This is what you get when log(total) is returned without the maximum that was subtracted "
    "before.",
)
def origin_not_added_back(out_a, lse_a, out_b, lse_b) -> Pair:
    out, lse = shifted(out_a, lse_a, out_b, lse_b)
    top = torch.maximum(lse_a, lse_b)
    return out, lse - torch.where(top == NEVER, 0.0, top)


@misconception(
    "not divided by the joint sum",
    question="What do the two weights of a row add up to?",
    says="This is what you get when the outputs are weighed by exp(lse - maximum) and the result "
    "is not divided by the sum of the weights.",
)
def not_divided(out_a, lse_a, out_b, lse_b) -> Pair:
    top = torch.maximum(lse_a, lse_b)
    origin = torch.where(top == NEVER, 0.0, top)
    weight_a, weight_b = torch.exp(lse_a - origin), torch.exp(lse_b - origin)
    out = weight_a[:, None] * out_a + weight_b[:, None] * out_b
    return out, origin + torch.log(weight_a + weight_b)


@misconception(
    "weights without an axis for D",
    question="A weight is [M] and an output [M, D]. Along which axis is the weight laid?",
    says="This is what you get when `[:, None]` is missing: M weights meet D columns.",
)
def no_axis_for_d(out_a, lse_a, out_b, lse_b) -> Pair:
    lse = torch.logaddexp(lse_a, lse_b)
    return torch.exp(lse_a - lse) * out_a + torch.exp(lse_b - lse) * out_b, lse


EXERCISE = Exercise(
    id="flash_attention.merge_states",
    kind="function",
    title="Merge two partial attentions",
    task=(
        "The same queries attended to two disjoint sets of keys. Each part gives its normalised "
        "output and its log-sum-exp. Return both for the union of the keys. A part that saw no key "
        "has `out = 0`, `lse = -inf` and changes nothing; two such parts make another."
    ),
    why="This merge is what lets many programs share one long row: split-KV, ring attention.",
    points=5,
    minutes=14,
    difficulty=2,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    outputs=("out", "lse"),
    accepts=(shifted, sigmoid_of_the_difference, stacked),
    misconceptions=(
        average,
        added,
        weighed_by_lse,
        exchanged,
        lse_is_max,
        lse_added,
        empty_is_nan,
        not_shifted,
        empty_counts,
        softmax_of_two_infinities,
        checked_all_at_once,
        nan_replaced_in_lse,
        origin_not_added_back,
        not_divided,
        no_axis_for_d,
    ),
    hints=(
        "Re-read the solved example above this card. By hand: sums 2 and 6 (lse is their "
        "logarithm), outputs 1 and 5. The joint sum is 8. What is the output? Then an empty part: "
        "its sum is 0. And two of them: which 0 / 0 or -inf - (-inf) does your code compute?",
        "Print the two weights divided by their sum: they are shares, at least 0, and add up to 1 "
        "in every row that saw a key. Then merge in the other order: nothing may change.",
        "```python\ntop = torch.maximum(lse_a, lse_b)\n"
        "origin = torch.where(top == -math.inf, ..., top)\n"
        "weight_a, weight_b = torch.exp(...), torch.exp(...)\ntotal = ...\n"
        "out = (weight_a[:, None] * out_a + ...) / ...\nreturn out, origin + torch.log(total)\n```",
    ),
    unlocks=("split_decode",),
    usual_failures=(
        "averages the outputs",
        "gets NaN from two empty parts, and looks for it in the outputs instead of the weights",
    ),
)
