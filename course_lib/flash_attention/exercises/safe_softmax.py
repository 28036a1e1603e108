"""Exercises: where exp overflows in fp16, and the softmax that does not."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Case, Data, Exercise, Misconception, misconception

LARGEST_FP16 = 65504.0


def question(size: str, seed: int) -> Iterable[Case]:
    """There is one question, so there is one case."""
    yield Case("the largest fp16 number is 65,504", {})


def largest_exponent(data: Data) -> float:
    """The score whose exponential is the largest fp16 number."""
    return math.log(LARGEST_FP16)


def nearest_known(answer, data):
    """The answer; near a well-known wrong number that number, so that 88.7 is known as 88.72."""
    known = (
        (11.0, 10.6, 11.07),
        (11.0, 11.11, 11.4),
        (12.0, 11.4, 12.6),
        (88.72, 88.0, 89.5),
        (15.9993, 15.5, 16.5),
        (4.8163, 4.7, 5.0),
        (10.3972, 10.3, 10.5),
        (65504.0, 65000.0, 66000.0),
    )
    for number, low, high in known:
        if isinstance(answer, int | float) and low <= answer <= high:
            return number
    return answer


OVERFLOW_SCORE = Exercise(
    id="flash_attention.overflow_score",
    kind="answer",
    title="Predict: where does exp overflow?",
    task=(
        "The largest fp16 number is 65,504. Above which score `x` does `exp(x)` overflow to "
        "infinity in fp16? Two decimals; a hundredth off still passes. Commit to a number before "
        "you compute one."
    ),
    why="You see how few scores a softmax survives without its maximum subtracted.",
    points=1,
    minutes=2,
    difficulty=1,
    core=True,
    cases=question,
    harness=nearest_known,
    oracle=largest_exponent,
    # The last is the largest fp16 number whose exponential is finite in fp16.
    accepts=(math.log(LARGEST_FP16), 11.09, 11.0859375),
    misconceptions=(
        Misconception(
            "range of fp32",
            88.72,
            "How many bits has the exponent of an fp16 number: 8, or 5?",
            "This is what you get for fp32 and bf16, whose exponents have 8 bits.",
        ),
        Misconception(
            "base 2",
            15.9993,
            "You asked which power of 2 is 65,504. Which base does exp use?",
            "This is what you get when the logarithm is taken to base 2 instead of e.",
        ),
        Misconception(
            "base 10",
            4.8163,
            "You asked which power of 10 is 65,504. Which base does exp use?",
            "This is what you get when the logarithm is taken to base 10 instead of e.",
        ),
        Misconception(
            "the largest number itself",
            65504.0,
            "Is 65,504 the score, or its exponential?",
            "This is what you get when the limit of exp(x) is given instead of the limit of x.",
        ),
        Misconception(
            "exponent without fraction",
            10.3972,
            "The largest exponent is 15. How much does the fraction 1.999 add?",
            "This is what you get for 2**15: the largest fp16 number is nearly twice that.",
        ),
        Misconception(
            "not to two decimals",
            11.0,
            "Close: which x solves e^x = 65,504, to two decimals?",
            "This is what you get when the solution is rounded, or read off a table of exp.",
        ),
        Misconception(
            "first whole number that overflows",
            12.0,
            "exp(12) overflows. Does exp(11.5)?",
            "This is what you get when whole scores are tried: 11 is finite, 12 is not, and the "
            "limit lies between them.",
        ),
    ),
    hints=(
        "Which `x` solves exp(x) = 65,504? For comparison: exp(10) is 22,026 and exp(12) is "
        "162,755.",
        "Print `torch.tensor([10., 11., 12.]).half().exp()`. The answer lies between two of them.",
        "```python\noverflow_score = math.log(...)\n```",
    ),
    unlocks=("safe_softmax",),
    usual_failures=("gives the limit of fp32, 88.72", "takes log2 because 65,504 is almost 2**16"),
)


def cases(size: str, seed: int) -> Iterable[Case]:
    """Scores [M, N] in fp16."""
    generator = torch.Generator().manual_seed(seed)
    rows = 20.0 * torch.randn(5, 7, generator=generator)
    yield Case("one row: 12, 1, 0", {"scores": torch.tensor([[12.0, 1.0, 0.0]]).half()})
    yield Case(
        "two rows, 2,000 apart",
        {"scores": torch.tensor([[1000.0, 999.0], [-1000.0, -1001.0]]).half()},
    )
    yield Case("five rows of seven", {"scores": rows.half()})
    yield Case(
        "scores at both ends of fp16",
        {"scores": torch.tensor([[6e4, -6e4, 59968.0], [-6e4, -6e4, 3.0]]).half()},
        "awkward",
    )
    yield Case(
        "every score is far below zero", {"scores": (rows[:3] / 20 - 300.0).half()}, "awkward"
    )
    yield Case("70,001 equal scores", {"scores": torch.full([1, 70_001], 0.5).half()}, "awkward")
    yield Case("three rows of 300", {"scores": rows[:3].repeat(1, 43)[:, :300].half()}, "method")


def harness(answer, data):
    """Call the answer with the scores."""
    return answer(data["scores"])


def oracle(data: Data) -> torch.Tensor:
    """Each row's softmax in fp64."""
    return torch.softmax(data["scores"].double(), dim=-1)


def through_fp32(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide - wide.amax(dim=-1, keepdim=True))
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


def half_terms_fp32_sum(scores: torch.Tensor) -> torch.Tensor:
    terms = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
    return (terms / terms.sum(dim=-1, keepdim=True, dtype=torch.float32)).half()


def row_by_row(scores: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(scores)
    for i, row in enumerate(scores.float()):
        log_sum = row.max() + (row - row.max()).exp().sum().log()
        out[i] = torch.exp(row - log_sum).half()
    return out


@misconception(
    "no maximum subtracted",
    question="What is exp(12) in fp16, and what is infinity divided by infinity?",
    says="This is what you get when exp is taken of the scores themselves: 12 already overflows.",
)
def naive(scores: torch.Tensor) -> torch.Tensor:
    terms = torch.exp(scores)
    return terms / terms.sum(dim=-1, keepdim=True)


@misconception(
    "more range instead of a shift",
    question="fp32 moves the limit from 11.09 to 88.72. What if a score is 1,000?",
    says="This is what you get when the scores go to fp32 and no maximum is subtracted.",
)
def only_fp32(scores: torch.Tensor) -> torch.Tensor:
    terms = torch.exp(scores.float())
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


@misconception(
    "maximum of the whole matrix",
    question="Your shift is one number. What is left of a row that lies 2,000 below it?",
    says="This is what you get when one maximum serves all rows: low rows become 0 / 0.",
)
def global_max(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide - wide.max())
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


@misconception(
    "maximum of each column",
    question="Along which dimension does a row's maximum run?",
    says="This is what you get when the maximum is taken over dimension 0.",
)
def column_max(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide - wide.amax(dim=0, keepdim=True))
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


@misconception(
    "scores clamped",
    question="After the clamp, are 12 and 13 still different scores?",
    says="This is what you get when large scores are cut off at 11: they all become equal.",
)
def clamped(scores: torch.Tensor) -> torch.Tensor:
    terms = torch.exp(scores.float().clamp(max=11.0))
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


@misconception(
    "scores divided by their maximum",
    question="A softmax is unchanged when a constant is added to every score. And when they are "
    "all divided by one?",
    says="This is what you get when the scores are divided by the maximum instead of shifted.",
)
def divided_by_max(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide / wide.amax(dim=-1, keepdim=True))
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


@misconception(
    "sum in fp16",
    question="Every term is at most 1. How large can the sum of 70,001 of them be?",
    says="This is what you get when the sum stays in fp16: more than 65,504 terms overflow it.",
)
def half_sum(scores: torch.Tensor) -> torch.Tensor:
    terms = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return terms / terms.sum(dim=-1, keepdim=True)


@misconception(
    "not divided by the sum",
    question="What must the entries of each row of a softmax add up to?",
    says="This is what you get when the shifted exponentials are returned without the division.",
)
def undivided(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    return torch.exp(wide - wide.amax(dim=-1, keepdim=True)).half()


@misconception(
    "left in fp32",
    question="Which dtype did the scores come in, and which does the task ask you to return?",
    says="This is what you get when the result of the fp32 computation is not brought back to "
    "fp16.",
)
def left_in_fp32(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide - wide.amax(dim=-1, keepdim=True))
    return terms / terms.sum(dim=-1, keepdim=True)


@misconception(
    "one sum for all rows",
    question="What does each row of your output add up to: 1, or less?",
    says="This is what you get when the terms are divided by the sum of the whole matrix.",
)
def sum_of_everything(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide - wide.amax(dim=-1, keepdim=True))
    return (terms / terms.sum()).half()


@misconception(
    "maximum without its axis",
    question="The maxima have shape [M]. Along which axis of [M, N] are they laid when you "
    "subtract them?",
    says="This is what you get without `keepdim=True`: the maxima of the rows are subtracted from "
    "the columns.",
)
def maximum_without_its_axis(scores: torch.Tensor) -> torch.Tensor:
    wide = scores.float()
    terms = torch.exp(wide - wide.amax(dim=-1))
    return (terms / terms.sum(dim=-1, keepdim=True)).half()


SAFE_SOFTMAX = Exercise(
    id="flash_attention.safe_softmax",
    kind="function",
    title="A softmax that cannot overflow",
    task=(
        "Return the softmax of each row of `scores`. They are fp16: compute in fp32, and return "
        "fp16. It must be finite and right for every finite row, however large its scores are and "
        "however many it has."
    ),
    why="The maximum of a row, which you need here, is the first of the two softmax statistics.",
    points=2,
    minutes=9,
    difficulty=1,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(through_fp32, half_terms_fp32_sum, row_by_row),
    misconceptions=(
        naive,
        only_fp32,
        global_max,
        column_max,
        clamped,
        divided_by_max,
        half_sum,
        undivided,
        left_in_fp32,
        sum_of_everything,
        maximum_without_its_axis,
    ),
    hints=(
        "By hand: scores 12, 1, 0. Subtract 12 from each. The weights are exp(0), exp(-11), "
        "exp(-12), divided by their sum. Nothing is larger than 1.",
        "Print the largest term before you sum: it must be exactly 1 in every row. Then print the "
        "sum and its dtype.",
        "```python\nwide = scores.float()\nterms = torch.exp(wide - ...)\n"
        "return (terms / ...).half()"
        "\n```",
    ),
    forbids=("aten::_softmax", "aten::_log_softmax", "aten::logsumexp"),
    unlocks=("online_softmax",),
    usual_failures=(
        "subtracts the maximum of the whole matrix",
        "keeps the sum in fp16",
    ),
)
