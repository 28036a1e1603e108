"""Exercise: one character, so that the first check can be read without a kernel in the way."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from course_lib.grading.exercise import Case, Data, Exercise, misconception


def cases(size: str, seed: int) -> Iterable[Case]:
    """A few values, of one and of two dimensions."""
    generator = torch.Generator().manual_seed(seed)
    yield Case("three values", {"values": torch.tensor([0.0, 1.0, 2.5])})
    yield Case("a matrix", {"values": torch.randn(3, 5, generator=generator)})
    yield Case("one value", {"values": torch.randn(1, generator=generator) - 4.0}, "awkward")
    yield Case("whole numbers", {"values": torch.tensor([7, -1, 0])}, "awkward")


def oracle(data: Data) -> torch.Tensor:
    """The values and one, in fp64."""
    return data["values"].double() + 1.0


def plus_one(values: torch.Tensor) -> torch.Tensor:
    return values + 1


def plus_ones(values: torch.Tensor) -> torch.Tensor:
    return torch.add(values, torch.ones_like(values))


@misconception(
    "minus for plus",
    question="For the value 0, is your result above or below 0?",
    says="This is what you get when 1 is taken away instead of added.",
)
def minus_one(values: torch.Tensor) -> torch.Tensor:
    return values - 1


@misconception(
    "values returned unchanged",
    question="Does `values + 1` on a line of its own change `values`?",
    says="This is what you get when the sum is computed and not returned.",
)
def unchanged(values: torch.Tensor) -> torch.Tensor:
    return values.clone()


@misconception(
    "multiplied by 1",
    question="Your result for 0 is 0. Which operation leaves 0 as it is?",
    says="This is what you get when the values are doubled: for 1 that looks like adding 1.",
)
def doubled(values: torch.Tensor) -> torch.Tensor:
    return values * 2


@misconception(
    "only the first value",
    question="Which of the values did your code touch?",
    says="This is what you get when 1 is added to `values[0]` alone.",
)
def first_only(values: torch.Tensor) -> torch.Tensor:
    result = values.clone()
    result[0] += 1
    return result


@misconception(
    "fractions dropped",
    question="What became of the .5 in 2.5?",
    says="This is what you get when the values pass through an integer type.",
)
def through_integers(values: torch.Tensor) -> torch.Tensor:
    return (values.long() + 1).to(values.dtype)


@misconception(
    "1 added twice",
    question="How often is 1 added to each value: once in the loop, and once more after it?",
    says="This is what you get when 1 is added in two places.",
)
def plus_two(values: torch.Tensor) -> torch.Tensor:
    return values + 2


EXERCISE = Exercise(
    id="start_here.warm_up",
    kind="function",
    title="Read a card, change one character",
    task=(
        "Return every value plus 1, as a new tensor. In the chapter this function is handed over "
        "with one wrong "
        "character. If you passed it there, skip it."
    ),
    why="You know how to read a verdict card, so that later a card speaks about your kernel and "
    "not about itself.",
    points=1,
    minutes=2,
    difficulty=1,
    core=True,
    cases=cases,
    oracle=oracle,
    accepts=(plus_one, plus_ones),
    misconceptions=(minus_one, unchanged, doubled, first_only, through_integers, plus_two),
    hints=(
        "The card shows the case: the values 0, 1, 2.5. What should become of 0?",
        "Print `warm_up(torch.zeros(1))`. It must be 1.",
        "```python\nreturn values ... 1\n```",
    ),
    unlocks=("masked_add",),
    usual_failures=("changes `values` in place with `+=`", "ran the check before the changed cell"),
)
