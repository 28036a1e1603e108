"""Exercise: what a masked lane should hold before a product of 1 − p."""

from __future__ import annotations

import math
from collections.abc import Iterable

from course_lib.grading.exercise import Case, Data, Exercise, Misconception

ROW = [0.5, 0.25, 0.2]
FILLS = {"a": 1.0, "b": 0.0, "c": float("-inf"), "d": float("nan")}


def cases(size: str, seed: int) -> Iterable[Case]:
    """One row of three in four lanes."""
    yield Case("p = 0.5, 0.25, 0.2 in four lanes", {"p": ROW, "lanes": 4})


def oracle(data: Data) -> str:
    """Run the four lanes with every fill; right is the one that leaves the result alone."""

    def none_happens(lanes: list[float]) -> float:
        return math.prod(1.0 - p for p in lanes)

    want = none_happens(data["p"])
    return next(
        letter for letter, fill in FILLS.items() if none_happens([*data["p"], fill]) == want
    )


EXERCISE = Exercise(
    id="start_here.other_for_product",
    kind="choice",
    title="What a masked lane should hold",
    task=(
        "Events happen with the probabilities p = 0.5, 0.25 and 0.2; none of them happens with "
        "(1 − 0.5) · (1 − 0.25) · (1 − 0.2) = 0.3. A kernel loads the three numbers into four "
        "lanes, `p = tl.load(p_ptr + offs, mask=offs < 3, other=?)`, computes `q = 1 - p`, and "
        "multiplies the four lanes of `q` with each other. Which `other`, and for which reason?"
    ),
    why="You can find the neutral element of an operation that no chapter showed you, and follow "
    "it back to the load.",
    points=1,
    minutes=3,
    difficulty=2,
    core=True,
    cases=cases,
    oracle=oracle,
    accepts=("b", "b"),
    misconceptions=(
        Misconception(
            "neutral in the wrong place",
            "a",
            "If the fourth lane of `p` holds 1, what does the fourth lane of `q` hold?",
            "1 is neutral for the product, but the product is taken of q. A p of 1 becomes a q of "
            "0, and the whole result is 0.",
        ),
        Misconception(
            "the fill of a maximum",
            "c",
            "What is 1 − (−∞), and what is 0.3 times that?",
            "Minus infinity is neutral for a maximum. Here it becomes a factor of infinity.",
        ),
        Misconception(
            "masked lanes left out of a reduction",
            "d",
            "The mask belongs to the load. Does the product know of it?",
            "A mask switches off the access to memory, and nothing else: the lane is still there, "
            "with whatever value it has. The guard makes that NaN.",
        ),
    ),
    choices={
        "a": "`1.0`, because multiplying by 1 changes nothing.",
        "b": "`0.0`, because an event that never happens changes nothing.",
        "c": '`float("-inf")`, because it is smaller than every probability.',
        "d": "None: a masked lane takes no part in what follows.",
    },
    hints=(
        'Re-read *Rung 2*, from "And what does a masked lane hold?" By hand: compute q for the '
        "fourth lane, once for each choice, then multiply all four.",
        "Go backwards. Which q leaves a product alone? Which p gives that q?",
        "```python\n0.5 * 0.75 * 0.8 * (1 - ...) == 0.5 * 0.75 * 0.8\n```",
    ),
    unlocks=("row_softmax",),
    usual_failures=("takes the neutral element of the product, and forgets the subtraction",),
)
