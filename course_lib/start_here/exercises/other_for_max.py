"""Exercise: what a masked lane should hold before a maximum."""

from __future__ import annotations

from collections.abc import Iterable

from course_lib.grading.exercise import Case, Data, Exercise, Misconception

ROW = [-3.0, -5.0, -4.0]
FILLS = {"a": 0.0, "b": float("-inf"), "c": float("nan"), "d": 1e-6}


def cases(size: str, seed: int) -> Iterable[Case]:
    """One row of three in four lanes."""
    yield Case("the row -3, -5, -4 in four lanes", {"row": ROW, "lanes": 4})


def oracle(data: Data) -> str:
    """Try every fill value: right are those that change neither the maximum nor the sum."""
    import math

    def statistics(values: list[float]) -> tuple[float, float]:
        top = max(values)
        return top, sum(math.exp(value - top) for value in values)

    right = [
        letter
        for letter, fill in FILLS.items()
        if not math.isnan(fill) and statistics([*data["row"], fill]) == statistics(data["row"])
    ]
    return right[0]


EXERCISE = Exercise(
    id="start_here.other_for_max",
    kind="choice",
    title="What a masked lane should hold",
    task=(
        "A kernel loads the row −3, −5, −4 into four lanes with `tl.load(…, mask=offs < 3, "
        "other=?)`, takes `tl.max`, "
        "subtracts it, takes `tl.exp` and `tl.sum`. Which `other` gives the softmax of the three "
        "numbers?"
    ),
    why="The neutral element depends on the operation, and a softmax has two of them in a row.",
    points=1,
    minutes=2,
    difficulty=2,
    core=True,
    cases=cases,
    oracle=oracle,
    accepts=("b", "b"),
    misconceptions=(
        Misconception(
            "zero before a maximum",
            "a",
            "What is the largest of −3, −5, −4 and 0?",
            "With 0 the maximum is 0, and exp(0 − 0) = 1 enters the sum: a fourth score that was "
            "never there.",
        ),
        Misconception(
            "no value",
            "c",
            "What is NaN plus anything?",
            "Leaving `other` out is like this: nothing is promised about the lane, and one NaN "
            "spoils the whole sum.",
        ),
        Misconception(
            "a small number",
            "d",
            "Is a small positive number smaller than −3?",
            "Small is not neutral: every score of this row is negative, so 1e-6 becomes the "
            "maximum.",
        ),
    ),
    choices={
        "a": "`0.0`",
        "b": '`float("-inf")`',
        "c": "None is needed: masked lanes do not take part in `tl.max` and `tl.sum`.",
        "d": "`1e-6`",
    },
    hints=(
        "Re-read *Rung 3*. Compute both statistics by hand for each choice: first the maximum, "
        "then the sum.",
        "The right value leaves the maximum alone, and its exponential leaves the sum alone.",
        "```python\nmax(-3, -5, -4, ...) == -3  and  exp(... - (-3)) == 0\n```",
    ),
    unlocks=("row_softmax",),
    usual_failures=("takes 0 over from the sum of rung 2",),
)
