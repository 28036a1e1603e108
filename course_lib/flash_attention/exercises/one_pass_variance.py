"""Exercise: transfer. The same trick for another reduction: mean and variance in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch

from course_lib.grading.exercise import Budget, Case, Data, Exercise, misconception

Tiles = Iterator[torch.Tensor]
Moments = tuple[torch.Tensor | float, torch.Tensor | float]


def cases(size: str, seed: int) -> Iterable[Case]:
    """Numbers [N] fp32 and the sizes of the tiles that they arrive in."""
    generator = torch.Generator().manual_seed(seed)

    def normal(n: int) -> torch.Tensor:
        return torch.randn(n, generator=generator)

    yield Case("1, 2 and then 6", {"x": torch.tensor([1.0, 2.0, 6.0]), "sizes": [2, 1]})
    yield Case("tiles of 5, 1 and 3", {"x": 3 * normal(9) + 1, "sizes": [5, 1, 3]})
    yield Case("one number", {"x": torch.tensor([4.0]), "sizes": [1]}, "awkward")
    yield Case("all numbers equal", {"x": torch.full([7], 2.5), "sizes": [3, 4]}, "awkward")
    yield Case(
        "500 numbers around 1,000", {"x": normal(500) + 1000, "sizes": [150, 7, 343]}, "awkward"
    )
    n, tile = (900, 64) if size == "small" else (1_000_000, 4096)
    sizes = [tile] * (n // tile) + [n % tile]
    yield Case(
        f"{n:,} numbers in tiles of {tile}", {"x": normal(n) + 500, "sizes": sizes}, "method"
    )


def harness(answer, data):
    """Hand the numbers over tile by tile, in one buffer that is overwritten."""
    import torch

    def tiles():
        buffer = torch.empty(max(data["sizes"]))
        for part in data["x"].split(data["sizes"]):
            tile = buffer[: part.numel()]
            tile.copy_(part)
            yield tile
            buffer.fill_(float("nan"))

    return answer(tiles())


def oracle(data: Data) -> Moments:
    """Both moments of all the numbers at once, in fp64."""
    x = data["x"].double()
    return x.mean(), ((x - x.mean()) ** 2).mean()


def pairwise_merge(tiles: Tiles) -> Moments:
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        n, tile_mean = tile.numel(), tile.mean()
        tile_squares = ((tile - tile_mean) ** 2).sum()
        total, delta = count + n, tile_mean - mean
        mean = mean + delta * (n / total)
        squares = squares + tile_squares + delta**2 * (count * n / total)
        count = total
    return mean, squares / count


def one_number_at_a_time(tiles: Tiles) -> Moments:
    """Rounds after every number, so it is the least exact."""
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        for x in tile:
            count += 1
            delta = x - mean
            mean = mean + delta / count
            squares = squares + delta * (x - mean)
    return mean, squares / count


def measured_from_the_first(tiles: Tiles) -> Moments:
    """A shift by any number near the mean makes the plain sums harmless."""
    origin, count, total, squares = torch.tensor(0.0), 0, 0.0, 0.0
    for tile in tiles:
        origin = origin if count else tile[0].clone()
        moved = tile - origin
        count, total, squares = count + len(tile), total + moved.sum(), squares + (moved**2).sum()
    return origin + total / count, squares / count - (total / count) ** 2


@misconception(
    "difference of large numbers",
    question="Around 1,000 the mean of x² is near 1,000,000. What is left of it in fp32 after you "
    "subtract another 1,000,000?",
    says="This is what you get from the mean of x² minus the square of the mean: two large numbers "
    "whose difference fp32 cannot hold.",
)
def cancelled(tiles: Tiles) -> Moments:
    count, total, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        count, total, squares = count + len(tile), total + tile.sum(), squares + (tile**2).sum()
    return total / count, squares / count - (total / count) ** 2


@misconception(
    "tiles weigh the same",
    question="One tile holds two numbers, another one. Should their means count the same?",
    says="This is what you get when the tiles' means are averaged without their sizes.",
)
def unweighted(tiles: Tiles) -> Moments:
    pairs = [(tile.mean(), tile.var(correction=0)) for tile in tiles]
    return sum(p[0] for p in pairs) / len(pairs), sum(p[1] for p in pairs) / len(pairs)


@misconception(
    "distance between tiles forgotten",
    question="Two tiles of equal numbers, 0 and 10: each has variance 0. And together?",
    says="This is what you get when only the variances inside the tiles are added up; the term "
    "with the square of the distance between their means is missing.",
)
def within_only(tiles: Tiles) -> Moments:
    count, total, squares = 0, 0.0, 0.0
    for tile in tiles:
        count, total = count + len(tile), total + tile.sum()
        squares = squares + ((tile - tile.mean()) ** 2).sum()
    return total / count, squares / count


@misconception(
    "squares around the running mean",
    question="The mean moves with every tile. Were the earlier squares taken around this one?",
    says="This is what you get when each tile's squares are taken around the mean so far, and the "
    "old squares are not corrected.",
)
def around_running_mean(tiles: Tiles) -> Moments:
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        mean = (mean * count + tile.sum()) / (count + len(tile))
        count += len(tile)
        squares = squares + ((tile - mean) ** 2).sum()
    return mean, squares / count


@misconception(
    "divided by N - 1",
    question="Does the task ask for the variance of these numbers, or for an estimate from a "
    "sample?",
    says="This is what you get when the sum of squares is divided by N - 1 instead of N.",
)
def sample_variance(tiles: Tiles) -> Moments:
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        n, tile_mean = tile.numel(), tile.mean()
        total, delta = count + n, tile_mean - mean
        squares = squares + ((tile - tile_mean) ** 2).sum() + delta**2 * (count * n / total)
        mean, count = mean + delta * (n / total), total
    return mean, squares / (count - 1)


@misconception(
    "old and new mean confused",
    question="`delta` is a distance between two means. Have you already moved one of them?",
    says="This is what you get when the mean is updated before `delta` is taken for the squares.",
)
def mean_updated_first(tiles: Tiles) -> Moments:
    count, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)
    for tile in tiles:
        n, tile_mean = tile.numel(), tile.mean()
        total = count + n
        mean = mean + (tile_mean - mean) * (n / total)
        delta = tile_mean - mean
        squares = squares + ((tile - tile_mean) ** 2).sum() + delta**2 * (count * n / total)
        count = total
    return mean, squares / count


@misconception(
    "standard deviation",
    question="What is the unit of your second output: that of x, or that of x²?",
    says="This is what you get when the root of the variance is returned.",
)
def deviation(tiles: Tiles) -> Moments:
    mean, variance = pairwise_merge(tiles)
    return mean, variance.sqrt()  # pyright: ignore[reportAttributeAccessIssue]


@misconception(
    "tiles kept",
    question="How much memory would this take for a billion numbers?",
    says="This is what you get when the tiles are copied and joined: right, but not in one pass "
    "over a stream.",
)
def kept(tiles: Tiles) -> Moments:
    x = torch.cat([tile.clone() for tile in tiles])
    return x.mean(), x.var(correction=0)


EXERCISE = Exercise(
    id="flash_attention.one_pass_variance",
    kind="function",
    title="Transfer: mean and variance in one pass",
    task=(
        "`tiles` yields N numbers a tile at a time, in one fp32 buffer that is overwritten. Return "
        "their mean and their variance (divided by N) after one pass, in fp32, also when the "
        "numbers lie around 1,000 with variance 1. Which state is enough, and how do two "
        "states merge?"
    ),
    why="The pattern is general: find the state that merges, and any reduction can be tiled.",
    points=4,
    minutes=16,
    difficulty=3,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    outputs=("mean", "variance"),
    accepts=(pairwise_merge, one_number_at_a_time, measured_from_the_first),
    misconceptions=(
        cancelled,
        unweighted,
        within_only,
        around_running_mean,
        sample_variance,
        mean_updated_first,
        deviation,
        kept,
    ),
    hints=(
        "By hand: tiles (1, 2) and (6). Their means are 1.5 and 6, their sums of squared "
        "distances .5 and 0. Of all three: mean 3, sum of squared distances 14. What made 13.5?",
        "Carry the count, the mean, and the sum of squared distances from the mean. Print the "
        "third after each tile: it never falls, and adding 1,000 to every number leaves it alone.",
        "```python\ncount, mean, squares = 0, torch.tensor(0.0), torch.tensor(0.0)\n"
        "for tile in tiles:\n    delta = tile.mean() - mean\n    total = count + len(tile)\n"
        "    squares = squares + ... + delta**2 * ...\n    mean = mean + delta * ...\n"
        "    count = total\nreturn mean, squares / count\n```",
    ),
    budget=Budget(
        peak_bytes=lambda data: 6 * 4 * max(data["sizes"]),
        largest_tensor=lambda data: 4 * max(data["sizes"]),
    ),
    usual_failures=(
        "carries the sums of x and x², which cancel in fp32",
        "forgets the term with the distance between the means",
    ),
)
