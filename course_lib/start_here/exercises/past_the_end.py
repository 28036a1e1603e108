"""Exercise: how many lanes of a launch lie past the end of the tensor."""

from __future__ import annotations

from collections.abc import Iterable

from course_lib.grading.exercise import Case, Data, Exercise, Misconception

N, BLOCK = 1000, 128


def cases(size: str, seed: int) -> Iterable[Case]:
    """One launch."""
    yield Case(f"n = {N:,} and BLOCK = {BLOCK}", {"n": N, "BLOCK": BLOCK})


def oracle(data: Data) -> float:
    """Count the lanes that no element stands behind."""
    programs = 0
    while programs * data["BLOCK"] < data["n"]:
        programs += 1
    lanes = range(programs * data["BLOCK"])
    return float(sum(lane >= data["n"] for lane in lanes))


EXERCISE = Exercise(
    id="start_here.past_the_end",
    kind="answer",
    title="Past the end",
    task=(
        "The kernel of the chapter, without a mask, adds two tensors of 1,000 elements with `BLOCK "
        "= 128` on the grid "
        "`(triton.cdiv(1000, 128),)`. How many elements past the end of `out` does it write?"
    ),
    why="You can say what a missing mask destroys before you run it.",
    points=1,
    minutes=2,
    difficulty=1,
    core=True,
    cases=cases,
    oracle=oracle,
    accepts=(24.0, 24),
    misconceptions=(
        Misconception(
            "the remainder",
            104,
            "1,000 is 7 × 128 and 104. Are those 104 lanes the ones inside the tensor, or outside?",
            "This is what you get when you count the last program's lanes that have an element, "
            "not those without.",
        ),
        Misconception(
            "programs instead of elements",
            8,
            "What does `triton.cdiv(1000, 128)` count?",
            "This is what you get when you answer with the number of programs.",
        ),
        Misconception(
            "rounded down",
            0,
            "With 7 programs, which elements would nobody compute?",
            "This is what you get when `cdiv` is taken for `//`: seven programs stay inside, and "
            "miss 104 elements.",
        ),
        Misconception(
            "the chapter's numbers",
            28,
            "Which n and which BLOCK belong to 28?",
            "This is the answer for n = 100 and BLOCK = 64.",
        ),
    ),
    hints=(
        "Re-read *One kernel*. By hand: n = 5 and BLOCK = 4. Two programs have eight lanes; how "
        "many too many?",
        "Print `triton.cdiv(1000, 128) * 128`.",
        "```python\npast_the_end = triton.cdiv(..., ...) * ... - ...\n```",
    ),
    unlocks=("masked_add",),
    usual_failures=("counts the lanes inside the tensor in the last program",),
)
