"""Exercise: write the test. Which of these online softmaxes are right?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from course_lib.grading.exercise import Case, Data, Exercise, Misconception, misconception

Statistics = tuple[torch.Tensor, torch.Tensor]
Implementation = Callable[[Iterator[torch.Tensor]], Statistics]

NEVER = -float("inf")
RIGHT = ("summed in base e", "summed in log space", "one score at a time", "in base 2")


def cases(size: str, seed: int) -> Iterable[Case]:
    """One case: in which order the implementations, which stand in the harness, come."""
    order = torch.randperm(len(LOOKS), generator=torch.Generator().manual_seed(seed)).tolist()
    yield Case("fourteen implementations, four of them right", {"order": order})


def harness(answer, data):
    """Hand each implementation to the learner's test, which sees neither its name nor its code."""
    import math

    import torch

    def textbook(tiles):
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            new_max = torch.maximum(row_max, tile.max())
            row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
            row_max = new_max
        return row_max, row_sum

    def log_space(tiles):
        row_max, log_sum = torch.tensor(-math.inf), torch.tensor(-math.inf)
        for tile in tiles:
            row_max = torch.maximum(row_max, tile.max())
            log_sum = torch.logaddexp(log_sum, torch.logsumexp(tile, 0))
        return row_max, torch.exp(log_sum - row_max)

    def one_by_one(tiles):
        row_max, row_sum = -math.inf, 0.0
        for tile in tiles:
            for score in tile.tolist():
                new_max = max(row_max, score)
                row_sum = row_sum * math.exp(row_max - new_max) + math.exp(score - new_max)
                row_max = new_max
        return torch.tensor(row_max), torch.tensor(row_sum)

    def scaled_down(tiles):
        # Base 2, with log2(e) folded into the scores; a little less exact.
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            scores = tile * math.log2(math.e)
            new_max = torch.maximum(row_max, scores.max())
            row_sum = row_sum * torch.exp2(row_max - new_max) + torch.exp2(scores - new_max).sum()
            row_max = new_max
        return row_max / math.log2(math.e), row_sum

    def local_maximum(tiles):
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            row_sum = row_sum * torch.exp(row_max - tile.max()) + torch.exp(tile - tile.max()).sum()
            row_max = tile.max()
        return row_max, row_sum

    def no_shift(tiles):
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            row_max = torch.maximum(row_max, tile.max())
            row_sum = row_sum + torch.exp(tile).sum()
        return row_max, row_sum * torch.exp(-row_max)

    def starts_at_zero(tiles):
        row_max, row_sum = torch.tensor(0.0), torch.tensor(0.0)
        for tile in tiles:
            new_max = torch.maximum(row_max, tile.max())
            row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
            row_max = new_max
        return row_max, row_sum

    def never_rescaled(tiles):
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            row_max = torch.maximum(row_max, tile.max())
            row_sum = row_sum + torch.exp(tile - row_max).sum()
        return row_max, row_sum

    def rescaled_once_too_often(tiles):
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            new_max = torch.maximum(row_max, tile.max())
            factor = torch.exp(row_max - new_max)
            row_sum = row_sum * factor * factor + torch.exp(tile - new_max).sum()
            row_max = new_max
        return row_max, row_sum

    def first_tile_twice(tiles):
        tiles = iter(tiles)
        first = next(tiles).clone()
        row_max, row_sum = first.max(), 2 * torch.exp(first - first.max()).sum()
        for tile in tiles:
            new_max = torch.maximum(row_max, tile.max())
            row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
            row_max = new_max
        return row_max, row_sum

    def last_tile_lost(tiles):
        every = [tile.clone() for tile in tiles]
        return textbook(every[:-1] or every)

    def lost_large_steps(tiles):
        # Rescales lazily, and drops the factor when the maximum rises by more than 8.
        row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
        for tile in tiles:
            new_max = torch.maximum(row_max, tile.max())
            factor = torch.exp(row_max - new_max)
            if math.exp(-8) > factor > 0:
                factor = torch.tensor(1.0)
            row_sum = row_sum * factor + torch.exp(tile - new_max).sum()
            row_max = new_max
        return row_max, row_sum

    def reads_twice(tiles):
        row_max = torch.stack([tile.max() for tile in tiles]).max()
        terms = [torch.exp(tile - row_max).sum() for tile in tiles]
        return row_max, torch.stack(terms).sum() if terms else torch.tensor(0.0)

    def fails_on_ragged_tiles(tiles):
        every = torch.stack([tile.clone() for tile in tiles])
        return every.max(), torch.exp(every - every.max()).sum()

    # Each with what it looks like from outside.
    implementations = {
        "its maximum is right, and its sum too large": first_tile_twice,
        "summed in base e": textbook,
        "right whenever the first tile holds the maximum": never_rescaled,
        "right when there is one tile": last_tile_lost,
        "in base 2": scaled_down,
        "right as soon as one score is positive": starts_at_zero,
        "right as long as every score is small": no_shift,
        "right when the tiles stand in a list": reads_twice,
        "one score at a time": one_by_one,
        "right when the last tile holds the maximum": local_maximum,
        "right when the maximum rises by less than 8 at a time": lost_large_steps,
        "raises when the tiles have different sizes": fails_on_ragged_tiles,
        "summed in log space": log_space,
        "right where the maximum never rises later on": rescaled_once_too_often,
    }

    def stranger(f):
        return lambda tiles: f(tiles)

    # A test that goes by the number of its call, and not by f, must not pass.
    functions, verdicts = list(implementations.values()), [""] * len(implementations)
    for i in data["order"]:
        verdict = answer(stranger(functions[i]))
        if str(verdict) not in ("True", "False", "tensor(True)", "tensor(False)"):
            raise TypeError(f"accepts_online_softmax returns True or False, and not {verdict!r}")
        verdicts[i] = "accepted" if verdict else "rejected"
    return tuple(verdicts)


LOOKS = (
    "its maximum is right, and its sum too large",
    "summed in base e",
    "right whenever the first tile holds the maximum",
    "right when there is one tile",
    "in base 2",
    "right as soon as one score is positive",
    "right as long as every score is small",
    "right when the tiles stand in a list",
    "one score at a time",
    "right when the last tile holds the maximum",
    "right when the maximum rises by less than 8 at a time",
    "raises when the tiles have different sizes",
    "summed in log space",
    "right where the maximum never rises later on",
)
"""What each implementation looks like from outside, in the harness's order."""


def oracle(data: Data) -> tuple[str, ...]:
    """Which implementations are right."""
    return tuple("accepted" if look in RIGHT else "rejected" for look in LOOKS)


def _truth(scores: torch.Tensor) -> tuple[float, float]:
    scores = scores.double()
    return scores.max().item(), (scores - scores.max()).exp().sum().item()


def _agrees(f: Implementation, tiles: list[list[float]], tolerance: float = 1e-4) -> bool:
    """Whether f is right on these tiles, handed over as an iterator."""
    parts = [torch.tensor(tile) for tile in tiles]
    try:
        row_max, row_sum = (float(x) for x in f(iter(parts)))
    except Exception:
        return False
    true_max, true_sum = _truth(torch.cat(parts))
    close = abs(row_max - true_max) <= tolerance * max(1.0, abs(true_max))
    return close and abs(row_sum - true_sum) <= tolerance * true_sum


def chosen_rows(f: Implementation) -> bool:
    return (
        _agrees(f, [[1.0, 3.0], [0.5]])
        and _agrees(f, [[1.0, 0.5], [1.5, 4.0], [3.0]])
        and _agrees(f, [[0.0], [20.0]])
        and _agrees(f, [[-5.0, -7.0], [-6.0]])
        and _agrees(f, [[500.0, 501.0], [502.0, 1.0]])
        and _agrees(f, [[0.0, 1.0], [10.0, 10.0], [9.0]])
    )


def random_rows(f: Implementation) -> bool:
    """Many rows of several characters; the tiles of each are ragged."""
    generator = torch.Generator().manual_seed(0)
    for level in (-300.0, -10.0, 0.0, 10.0, 300.0):
        for spread in (0.3, 3.0, 12.0):
            scores = spread * torch.randn(23, generator=generator) + level
            for order in (scores, scores.sort().values, scores.flip(0)):
                if not _agrees(f, [t.tolist() for t in order.split([5, 1, 7, 7, 3])], 1e-3):
                    return False
    return True


def _only(*rows: list[list[float]], tolerance: float = 1e-4):
    def accepts(f: Implementation) -> bool:
        return all(_agrees(f, row, tolerance) for row in rows)

    return accepts


@misconception(
    "compared exactly",
    question="Two right implementations add up in different orders. Are their last bits equal?",
    says="This is what you get when results are compared with ==: rounding differs between right "
    "implementations, so that most or all of them are rejected.",
)
def exactly(f: Implementation) -> bool:
    return _only(
        [[1.0, 3.0], [0.5]], [[0.1, 0.2], [4.7, 4.0], [3.3]], [[-5.1], [-7.3, -6.2]], tolerance=0.0
    )(f)


@misconception(
    "only the maximum tested",
    question="f returns two numbers. Which of them did you look at?",
    says="This is what you get when the sum is never compared.",
)
def only_the_maximum(f: Implementation) -> bool:
    tiles = [torch.tensor([1.0, 0.5]), torch.tensor([4.0]), torch.tensor([-3.0, 2.0])]
    try:
        return abs(float(f(iter(tiles))[0]) - 4.0) < 1e-4
    except Exception:
        return False


@misconception(
    "errors not caught",
    question="What does your test return for an implementation that raises?",
    says="This is what you get when an implementation's exception ends your test: a test says "
    "False.",
)
def not_caught(f: Implementation) -> bool:
    for tiles in ([[1.0, 3.0], [0.5]], [[0.0], [20.0]], [[-5.0, -7.0], [-6.0]]):
        parts = [torch.tensor(tile) for tile in tiles]
        row_max, row_sum = f(iter(parts))
        true_max, true_sum = _truth(torch.cat(parts))
        if abs(row_max - true_max) > 1e-3 or abs(row_sum - true_sum) > 1e-3:
            return False
    return chosen_rows(f)


@misconception(
    "a list instead of a stream",
    question="Can a stream of tiles be read twice? Can the list that you handed over?",
    says="This is what you get when f is given a list: an implementation that reads it twice looks "
    "right.",
)
def handed_a_list(f: Implementation) -> bool:
    def on_list(tiles: Iterator[torch.Tensor]) -> Statistics:
        return f(list(tiles))  # type: ignore[arg-type]

    return chosen_rows(on_list)


@misconception(
    "scores that are not finite",
    question="The contract says that every score is finite. Do all of your rows keep to it?",
    says="This is what you get when a row holds -inf: an implementation may rely on finite scores, "
    "and right ones are then rejected.",
)
def hidden_scores(f: Implementation) -> bool:
    return chosen_rows(f) and _agrees(f, [[NEVER, NEVER], [1.0, 2.0]])


@misconception(
    "random rows only",
    question="Are the scores of your random rows ever all negative, above 89, or 8 apart at once?",
    says="This is what you get when every row is drawn from one normal distribution: a maximum "
    "that starts at 0, an exp without a shift and a lost large step look right.",
)
def few_random_rows(f: Implementation) -> bool:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20, 23, generator=generator)
    return all(_agrees(f, [t.tolist() for t in row.split([5, 1, 7, 7, 3])]) for row in rows)


EXERCISE = Exercise(
    id="flash_attention.accepts_online_softmax",
    kind="function",
    title="Write the test: which online softmax is right?",
    task=(
        "Write `accepts_online_softmax(f)`: True where `f` is a right online softmax, False where "
        "it is not. `f(tiles)` takes an iterator of 1-D fp32 tensors (not empty, of any sizes, "
        "every score finite), which can be read once, and returns the maximum and the sum "
        "of `exp(score - maximum)`. "
        "Fourteen unlabelled implementations wait; four of them are right. A right one may round "
        "differently in the fifth digit. A wrong one may also raise."
    ),
    why=(
        "A small random test is not enough: with one tile a missing rescale never shows, and with "
        "two it hides in half of the rows. You know now which rows find such mistakes."
    ),
    outputs=tuple(f"Your verdict on “{look}”" for look in LOOKS),
    points=4,
    minutes=20,
    difficulty=3,
    core=False,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(chosen_rows, random_rows),
    misconceptions=(
        Misconception(
            "one tile",
            _only([[0.3, 2.0, 1.0]], [[-5.0, -7.0]], [[500.0, 501.0]]),
            "In a row of one tile, is anything ever rescaled?",
            "This is what you get when every tested row is a single tile: nothing is rescaled.",
        ),
        Misconception(
            "maximum always first",
            _only([[4.0, 3.0], [2.0, 1.0], [0.5]], [[-5.0], [-7.0, -6.0]], [[500.0], [3.0, 2.0]]),
            "In which of your rows does the maximum change after the first tile?",
            "This is what you get when every row falls: a missing rescale is then exact.",
        ),
        Misconception(
            "only small scores",
            _only(
                [[1.0, 3.0], [0.5]],
                [[0.0, 1.0], [1.5, 4.0], [3.0]],
                [[0.0], [20.0]],
                [[-5.0], [-7.0, -6.0]],
            ),
            "exp(89) overflows in fp32. Do any of your rows come near?",
            "This is what you get when no score is large: an exp without a shift looks right.",
        ),
        Misconception(
            "only rows with a positive score",
            _only(
                [[1.0, 3.0], [0.5]],
                [[0.0], [20.0]],
                [[500.0, 501.0], [502.0, 1.0]],
                [[1.0, 0.5], [1.5, 4.0], [3.0]],
            ),
            "What would an implementation return whose maximum starts at 0?",
            "This is what you get when no row is negative throughout: a maximum that starts at 0 "
            "looks right.",
        ),
        Misconception(
            "only small steps",
            _only(
                [[1.0, 3.0], [0.5]],
                [[-5.0, -7.0], [-6.0]],
                [[500.0, 501.0], [502.0, 1.0]],
                [[1.0, 0.5], [1.5, 4.0], [3.0]],
            ),
            "By how much does the maximum rise at most in your rows?",
            "This is what you get when the maximum never rises by more than 8 at once.",
        ),
        Misconception(
            "loose tolerance",
            _only(
                [[1.0, 3.0], [0.5]],
                [[0.0], [20.0]],
                [[-5.0, -7.0], [-6.0]],
                [[500.0, 501.0], [502.0, 1.0]],
                tolerance=0.5,
            ),
            "By how much, in per cent, may the sum be off before your test says no?",
            "This is what you get when half of the sum is allowed as error.",
        ),
        only_the_maximum,
        exactly,
        not_caught,
        handed_a_list,
        hidden_scores,
        few_random_rows,
        Misconception(
            "accepts everything",
            lambda f: True,
            "Did your test call f at all?",
            "This is what you get when nothing is tested.",
        ),
    ),
    hints=(
        "Re-read the misconceptions of the chapter. Try your test on your own "
        "`online_softmax`, and "
        "on a copy without the rescale. Which row tells them apart: 3, 1 or 1, 3?",
        "Print what `f` returns, beside the truth in fp64, for one row of each kind: rising, "
        "falling, all negative, around 500, one that jumps by 20.",
        "```python\nfor tiles in (...):\n    parts = [torch.tensor(tile) for tile in tiles]\n"
        "    try:\n"
        "        row_max, row_sum = f(iter(parts))\n    except Exception:\n        return ...\n"
        "    scores = torch.cat(parts).double()\n    if ...:\n        return False\n"
        "return True\n```",
    ),
    usual_failures=(
        "tests random rows only, which miss a missing rescale in half of the two-tile rows",
        "compares with == and rejects right implementations",
    ),
)
