"""Exercise: find the bug. A row whose first tile is hidden turns into NaN."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Case, Data, Exercise, misconception

State = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NEVER = -math.inf


def cases(size: str, seed: int) -> Iterable[Case]:
    """Scores [M, N] with -inf where a key is hidden, values [N, D], and the tiles' widths."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    yield Case(
        "the row's first key is hidden",
        {
            "scores": torch.tensor([[NEVER, 1.0]]),
            "values": torch.tensor([[5.0], [7.0]]),
            "widths": [1, 1],
        },
    )
    yield Case(
        "nothing is hidden",
        {"scores": 3 * normal(2, 7), "values": normal(7, 3), "widths": [3, 3, 1]},
    )
    yield Case(
        "every key of the row is hidden",
        {
            "scores": torch.full([1, 2], NEVER),
            "values": torch.tensor([[5.0], [7.0]]),
            "widths": [1, 1],
        },
    )
    ladder = 3 * normal(5, 11)
    for row, first in enumerate((0, 4, 6, 9, 11)):
        ladder[row, :first] = NEVER
    yield Case(
        "five rows that begin to see at keys 0, 4, 6, 9, and never",
        {"scores": ladder, "values": normal(11, 2), "widths": [4, 3, 4]},
        "awkward",
    )
    late = 3 * normal(3, 10) - 40_000.0
    late[0, 5:] = NEVER
    late[1, :5] = NEVER
    yield Case(
        "scores near -40,000, a hidden tile first and a hidden tile last",
        {"scores": late, "values": normal(10, 3), "widths": [5, 5]},
        "awkward",
    )


def harness(answer, data):
    """Feed the tiles to the answer, one after another, from the empty state."""
    import torch

    rows, dim = data["scores"].shape[0], data["values"].shape[1]
    row_max = torch.full([rows], -float("inf"))
    row_sum, acc = torch.zeros(rows), torch.zeros(rows, dim)
    pairs = zip(
        data["scores"].split(data["widths"], dim=1),
        data["values"].split(data["widths"]),
        strict=True,
    )
    for scores, values in pairs:
        row_max, row_sum, acc = answer(row_max, row_sum, acc, scores.clone(), values.clone())
    return row_max, row_sum, acc


def oracle(data: Data) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The state after all tiles at once, row by row over the keys that it sees."""
    scores, values = data["scores"].double(), data["values"].double()
    row_max = scores.amax(dim=1)
    row_sum = torch.zeros(scores.shape[0], dtype=torch.float64)
    acc = torch.zeros(scores.shape[0], values.shape[1], dtype=torch.float64)
    for i, row in enumerate(scores):
        seen = row > NEVER
        weights = (row[seen] - row_max[i]).exp()
        row_sum[i], acc[i] = weights.sum(), weights @ values[seen]
    return row_max, row_sum, acc


def measured_from_zero(row_max, row_sum, acc, scores, values) -> State:
    new_max = torch.maximum(row_max, scores.amax(dim=1))
    origin = torch.where(new_max == NEVER, 0.0, new_max)
    weights = torch.exp(scores - origin[:, None])
    rescale = torch.exp(row_max - origin)
    return new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None] + weights @ values


def hidden_set_to_zero(row_max, row_sum, acc, scores, values) -> State:
    new_max = torch.maximum(row_max, scores.amax(dim=1))
    weights = (scores - new_max[:, None]).exp().masked_fill(scores == NEVER, 0.0)
    rescale = (row_max - new_max).exp().masked_fill(row_max == NEVER, 0.0)
    return new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None] + weights @ values


def only_rows_that_see(row_max, row_sum, acc, scores, values) -> State:
    row_max, row_sum, acc = row_max.clone(), row_sum.clone(), acc.clone()
    for i, row in enumerate(scores):
        if row.max() == NEVER:
            continue
        new_max = torch.maximum(row_max[i], row.max())
        weights, rescale = torch.exp(row - new_max), torch.exp(row_max[i] - new_max)
        row_sum[i] = row_sum[i] * rescale + weights.sum()
        acc[i] = acc[i] * rescale + weights @ values
        row_max[i] = new_max
    return row_max, row_sum, acc


@misconception(
    "not repaired",
    question="Which two numbers does `row_max - new_max` subtract while a row has seen no key?",
    says="This is what you get while -inf - (-inf) is left, in the rescale or in the weights: it "
    "is NaN, and NaN stays.",
)
def not_repaired(row_max, row_sum, acc, scores, values) -> State:
    new_max = torch.maximum(row_max, scores.amax(dim=1))
    weights = torch.exp(scores - new_max[:, None])
    rescale = torch.exp(row_max - new_max)
    return new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None] + weights @ values


@misconception(
    "NaN weights replaced by 1",
    question="How much should a key weigh that the row must not see?",
    says="This is what you get when 0 takes the place of -inf - (-inf) before the exp: exp(0) is "
    "1, so hidden keys count in full.",
)
def hidden_counts_in_full(row_max, row_sum, acc, scores, values) -> State:
    new_max = torch.maximum(row_max, scores.amax(dim=1))
    weights = torch.exp((scores - new_max[:, None]).nan_to_num(0.0, neginf=NEVER))
    rescale = torch.exp((row_max - new_max).nan_to_num(0.0, neginf=NEVER))
    return new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None] + weights @ values


@misconception(
    "a large number instead of infinity",
    question="If -10,000 stands for hidden, which is larger: a hidden score, or a real one of "
    "-40,000?",
    says="This is what you get when -inf is replaced by a finite number: hidden keys weigh "
    "exp(0) = 1 where nothing else is seen.",
)
def finite_mask(row_max, row_sum, acc, scores, values) -> State:
    return not_repaired.wrong(row_max.clamp(min=-1e4), row_sum, acc, scores.clamp(min=-1e4), values)


@misconception(
    "tile skipped for all rows",
    question="One row sees nothing of this tile. Does that hold for the other rows?",
    says="This is what you get when a tile is skipped as soon as one of its rows is hidden.",
)
def tile_skipped(row_max, row_sum, acc, scores, values) -> State:
    if bool((scores.amax(dim=1) == NEVER).any()):
        return row_max, row_sum, acc
    return not_repaired.wrong(row_max, row_sum, acc, scores, values)


@misconception(
    "maximum at least zero",
    question="What does `row_max` say when every score of the row is negative?",
    says="This is what you get when the maximum is clamped at 0: no NaN, and a wrong statistic, "
    "which underflows when the scores are far below.",
)
def max_at_least_zero(row_max, row_sum, acc, scores, values) -> State:
    new_max = torch.maximum(row_max, scores.amax(dim=1)).clamp(min=0.0)
    weights = torch.exp(scores - new_max[:, None])
    rescale = torch.exp(row_max - new_max)
    return new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None] + weights @ values


@misconception(
    "state cleared by a hidden tile",
    question="A row has seen three keys, and then a tile of hidden ones. What should be left?",
    says="This is what you get when a row whose tile is hidden loses what it had gathered.",
)
def state_cleared(row_max, row_sum, acc, scores, values) -> State:
    new_max, new_sum, new_acc = measured_from_zero(row_max, row_sum, acc, scores, values)
    hidden = scores.amax(dim=1) == NEVER
    return (
        new_max,
        new_sum.masked_fill(hidden, 0.0),
        new_acc.masked_fill(hidden[:, None], 0.0),
    )


@misconception(
    "origin returned as maximum",
    question="You measure an empty row from 0. Is 0 its maximum, or is that still -inf?",
    says="This is what you get when the origin that replaces -inf is returned as well: measure "
    "from 0 where `new_max` is -inf, but return `new_max`.",
)
def origin_returned(row_max, row_sum, acc, scores, values) -> State:
    new_max = torch.maximum(row_max, scores.amax(dim=1))
    new_max = torch.where(new_max == NEVER, 0.0, new_max)
    weights = torch.exp(scores - new_max[:, None])
    rescale = torch.exp(row_max - new_max)
    return new_max, row_sum * rescale + weights.sum(1), acc * rescale[:, None] + weights @ values


EXERCISE = Exercise(
    id="flash_attention.take_tile",
    kind="function",
    title="Find the bug: the row that saw nothing",
    task=(
        "This step of an online softmax is right until a row meets a tile in which every key is "
        "hidden (score -inf) before it has seen any: then the row is NaN for ever. Repair it. An "
        "empty row keeps `row_max = -inf`, `row_sum = 0`, `acc = 0`."
    ),
    why="Causal masks and padding make such rows every day; every fast kernel has this guard.",
    points=3,
    minutes=5,
    difficulty=2,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    outputs=("row_max", "row_sum", "acc"),
    accepts=(measured_from_zero, hidden_set_to_zero, only_rows_that_see),
    misconceptions=(
        not_repaired,
        hidden_counts_in_full,
        finite_mask,
        tile_skipped,
        max_at_least_zero,
        state_cleared,
        origin_returned,
    ),
    hints=(
        "By hand: a row with scores -inf, then 1, one at a time. After the first, `row_max` and "
        "`new_max` are both -inf. What is their difference?",
        "Print `rescale` and `weights` after the first tile. They should be 0, since nothing was "
        "seen; which line makes them NaN?",
        "```python\nnew_max = torch.maximum(row_max, scores.amax(dim=1))\n"
        "origin = torch.where(new_max == -math.inf, ..., new_max)\n"
        "weights = torch.exp(scores - origin[:, None])\nrescale = torch.exp(...)\n```",
    ),
    unlocks=("merge_states", "flash_forward"),
    usual_failures=(
        "guards the rescale and leaves the weights NaN",
        "replaces -inf by -10,000, so that hidden keys count where nothing else is seen",
    ),
)
