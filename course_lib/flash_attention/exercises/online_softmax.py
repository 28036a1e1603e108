"""Exercise: the two statistics of a softmax, from tiles that are seen once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception

Tiles = Iterator[torch.Tensor]


def cases(size: str, seed: int) -> Iterable[Case]:
    """Scores [N] fp32 and the sizes of the tiles that they arrive in."""
    generator = torch.Generator().manual_seed(seed)

    def scores(n: int, spread: float = 3.0) -> torch.Tensor:
        return spread * torch.randn(n, generator=generator)

    yield Case(
        "three scores, the largest second",
        {"scores": torch.tensor([1.0, 3.0, 0.0]), "sizes": [1, 1, 1]},
    )
    yield Case("one tile", {"scores": scores(7), "sizes": [7]})
    yield Case(
        "the maximum arrives in the second tile of three",
        {"scores": torch.tensor([1.0, 0.5, 4.0, 2.0, 3.0, -1.0]), "sizes": [2, 2, 2]},
    )
    yield Case(
        "every score is negative", {"scores": scores(11) - 50.0, "sizes": [4, 4, 3]}, "awkward"
    )
    yield Case(
        "scores up to 10,000, rising",
        {"scores": scores(13, 3e3).sort().values.clamp(-1e4, 1e4), "sizes": [5, 5, 3]},
        "awkward",
    )
    yield Case(
        "the maximum arrives first",
        {"scores": scores(13).sort(descending=True).values, "sizes": [5, 5, 3]},
        "awkward",
    )
    n, tile = (1500, 64) if size == "small" else (150_000, 4096)
    sizes = [tile] * (n // tile) + [n % tile]
    yield Case(f"{n:,} scores in tiles of {tile}", {"scores": scores(n), "sizes": sizes}, "method")


def harness(answer, data):
    """Hand the scores over tile by tile, in one buffer that is overwritten, as on a chip."""
    import torch

    def tiles():
        buffer = torch.empty(max(data["sizes"]))
        for part in data["scores"].split(data["sizes"]):
            tile = buffer[: part.numel()]
            tile.copy_(part)
            yield tile
            buffer.fill_(float("nan"))

    return answer(tiles())


def oracle(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Both statistics of all the scores at once, in fp64."""
    scores = data["scores"].double()
    return scores.max(), (scores - scores.max()).exp().sum()


def rescaling(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        new_max = torch.maximum(row_max, tile.max())
        row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
        row_max = new_max
    return row_max, row_sum


def log_space(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    """Carries the logarithm of the sum; slower, and a little less exact."""
    row_max, log_sum = torch.tensor(-math.inf), torch.tensor(-math.inf)
    for tile in tiles:
        row_max = torch.maximum(row_max, tile.max())
        log_sum = torch.logaddexp(log_sum, (tile - tile.max()).exp().sum().log() + tile.max())
    return row_max, (log_sum - row_max).exp()


def one_score_at_a_time(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = -math.inf, 0.0
    for tile in tiles:
        for score in tile.tolist():
            if score > row_max:
                row_sum *= math.exp(row_max - score)
                row_max = score
            row_sum += math.exp(score - row_max)
    return torch.tensor(row_max), torch.tensor(row_sum)


@misconception(
    "sum not rescaled",
    question="Your old sum was made of exp(score - old maximum). What must it be multiplied by "
    "when the maximum changes?",
    says="This is what you get when the running sum is not rescaled after a new maximum.",
)
def not_rescaled(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        row_max = torch.maximum(row_max, tile.max())
        row_sum = row_sum + torch.exp(tile - row_max).sum()
    return row_max, row_sum


@misconception(
    "rescaled backwards",
    question="When the maximum rises, does the old sum get larger or smaller?",
    says="This is what you get when the factor is exp(new - old) instead of exp(old - new).",
)
def rescaled_backwards(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        new_max = torch.maximum(row_max, tile.max())
        factor = torch.exp(new_max - row_max) if row_max.isfinite() else 1.0
        row_sum = row_sum * factor + torch.exp(tile - new_max).sum()
        row_max = new_max
    return row_max, row_sum


@misconception(
    "maximum of the last tile",
    question="What happens to your maximum when the next tile holds only smaller scores?",
    says="This is what you get when the tile's maximum replaces the running maximum.",
)
def max_of_last_tile(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        new_max = tile.max()
        row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
        row_max = new_max
    return row_max, row_sum


@misconception(
    "maximum starts at zero",
    question="What is the maximum of no scores at all, so that any score is larger?",
    says="This is what you get when the running maximum starts at 0 instead of -inf.",
)
def max_starts_at_zero(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        new_max = torch.maximum(row_max, tile.max())
        row_sum = row_sum * torch.exp(row_max - new_max) + torch.exp(tile - new_max).sum()
        row_max = new_max
    return row_max, row_sum


@misconception(
    "no maximum subtracted",
    question="What is exp(100) in fp32?",
    says="This is what you get when exp is taken of the scores themselves: the sum overflows.",
)
def no_maximum_subtracted(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        row_max = torch.maximum(row_max, tile.max())
        row_sum = row_sum + torch.exp(tile).sum()
    return row_max, row_sum


@misconception(
    "local sums added",
    question="Two tiles have different maxima. Are their sums of exponentials in the same unit?",
    says="This is what you get when each tile is summed relative to its own maximum.",
)
def local_sums_added(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        row_max = torch.maximum(row_max, tile.max())
        row_sum = row_sum + torch.exp(tile - tile.max()).sum()
    return row_max, row_sum


@misconception(
    "new terms rescaled too",
    question="Which terms are still relative to the old maximum: all of them, or only those from "
    "before this tile?",
    says="This is what you get when the factor multiplies the new tile's terms as well.",
)
def new_terms_rescaled_too(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)
    for tile in tiles:
        new_max = torch.maximum(row_max, tile.max())
        old_max = row_max if row_max.isfinite() else new_max
        row_sum = (row_sum + torch.exp(tile - new_max).sum()) * torch.exp(old_max - new_max)
        row_max = new_max
    return row_max, row_sum


@misconception(
    "all tiles kept",
    question="How much memory would this take for a row of a million scores?",
    says="This is what you get when the tiles are copied and joined: correct, and exactly what we "
    "wanted to avoid.",
)
def all_tiles_kept(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.cat([tile.clone() for tile in tiles])
    return scores.max(), (scores - scores.max()).exp().sum()


@misconception(
    "tiles listed",
    question="What stands in the buffer of the first tile by the time you read the last one?",
    says="This is what you get when the tiles are collected in a list: they share one buffer, "
    "which has been overwritten.",
)
def tiles_listed(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.cat(list(tiles))
    return scores.max(), (scores - scores.max()).exp().sum()


EXERCISE = Exercise(
    id="flash_attention.online_softmax",
    kind="function",
    title="Online softmax",
    task=(
        "`tiles` yields the scores a tile at a time. On a chip the next tile lands where the last "
        "one lay, and so it is here: once you ask for the next tile, the old one is overwritten "
        "with NaN (so `list(tiles)` holds nothing useful). Return the maximum of all scores and "
        "the sum of `exp(score - maximum)`, after one pass."
    ),
    why="This recurrence is why attention can be computed without its N × N matrix.",
    points=5,
    minutes=10,
    difficulty=2,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    outputs=("row_max", "row_sum"),
    accepts=(rescaling, log_space, one_score_at_a_time),
    misconceptions=(
        not_rescaled,
        rescaled_backwards,
        max_of_last_tile,
        max_starts_at_zero,
        no_maximum_subtracted,
        local_sums_added,
        new_terms_rescaled_too,
        all_tiles_kept,
        tiles_listed,
    ),
    hints=(
        "Re-read the solved example above this card. By hand: scores 1, 3, 0, one at a time. After "
        "the first: maximum 1, sum 1. After the second the maximum is 3. What is the sum now?",
        "Print `row_sum * exp(row_max)` after each tile. It must equal the plain sum of "
        "`exp(score)` so far, whatever the maximum is.",
        "```python\nrow_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)\n"
        "for tile in tiles:\n    new_max = ...\n"
        "    row_sum = row_sum * ... + ...\n    row_max = new_max\nreturn row_max, row_sum\n```",
    ),
    budget=Budget(
        peak_bytes=lambda data: 6 * 4 * max(data["sizes"]),
        largest_tensor=lambda data: 4 * max(data["sizes"]),
    ),
    forbids=("aten::logsumexp", "aten::_softmax"),
    unlocks=("take_tile", "merge_states", "tiled_attention"),
    usual_failures=(
        "returns the probabilities instead of the two statistics",
        "starts the maximum at the first tile and then adds that tile twice",
    ),
)
