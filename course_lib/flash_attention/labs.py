"""The labs of chapter 08: the tile walker, online softmax on your own numbers, the roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from course_lib.notebook.lab import Lab, Numbers, Slider, Steps, Toggle
from course_lib.notebook.svg import Svg

# --- Online softmax --------------------------------------------------------------------------


@dataclass(frozen=True)
class TileStep:
    """What one tile does to the running statistics."""

    scores: list[float]
    max_before: float
    max_after: float
    factor: float
    sum_after: float


@dataclass(frozen=True)
class OnlineSoftmax:
    """A row of scores taken tile by tile, up to and with the tile `at`."""

    tiles: list[TileStep]
    at: int
    forget: bool
    rescales: int
    true_sum: float

    @property
    def steps(self) -> int:
        """How many tiles there are."""
        return len(self.tiles)

    @property
    def error(self) -> float:
        """Relative error of the sum after the last tile; 0 when it is only round-off."""
        error = abs(self.tiles[-1].sum_after / self.true_sum - 1)
        return 0.0 if error < 1e-12 else error


def compute_online_softmax(
    *, scores: list[float], block: int, forget: bool, tile: int
) -> OnlineSoftmax:
    """Run the recurrence over `scores` in tiles of `block`; `forget` leaves the rescale out."""
    steps: list[TileStep] = []
    row_max, row_sum = -math.inf, 0.0
    for start in range(0, len(scores), block):
        part = list(scores[start : start + block])
        new_max = max(row_max, *part)
        factor = math.exp(row_max - new_max)
        old = row_sum if forget else row_sum * factor
        row_sum = old + sum(math.exp(score - new_max) for score in part)
        steps.append(TileStep(part, row_max, new_max, factor, row_sum))
        row_max = new_max
    every = torch.tensor(scores, dtype=torch.float64)
    return OnlineSoftmax(
        tiles=steps,
        at=min(tile, len(steps) - 1),
        forget=forget,
        rescales=sum(step.factor < 1 for step in steps[1:]),
        true_sum=float((every - every.max()).exp().sum()),
    )


def draw_online_softmax(state: OnlineSoftmax) -> Svg:
    """Bars for the scores, a line for the running maximum, and under each tile what it did."""
    every = [score for step in state.tiles for score in step.scores]
    low, high = min(0.0, *every), max(0.0, *every)
    top, base, left, width = 34.0, 178.0, 30.0, 680.0
    gap = 14.0
    bar = (width - gap * (state.steps - 1)) / len(every)

    def y(value: float) -> float:
        return base - (value - low) / ((high - low) or 1.0) * (base - top)

    svg = Svg(740, 292, "Scores in tiles, with the running maximum and sum after each tile")
    x = left
    for index, step in enumerate(state.tiles):
        seen, now = index <= state.at, index == state.at
        start = x
        for score in step.scores:
            fill = "blue" if now else "sky" if seen else "none"
            upper, lower = min(y(score), y(0)), max(y(score), y(0))
            svg.rect(
                x + 2,
                upper,
                bar - 4,
                max(lower - upper, 1.5),
                fill=fill,
                stroke="blue" if seen else "muted",
                radius=2,
                tip=f"score {score:g}",
            )
            above = score >= 0
            svg.text(x + bar / 2, upper - 6 if above else lower + 15, f"{score:g}", anchor="middle")
            x += bar
        if seen:
            svg.line([(start, y(step.max_after)), (x, y(step.max_after))], stroke="orange", dash="5 3")
        _tile_note(svg, (start + x) / 2, step, index, seen, now, state.forget)
        x += gap
    svg.line([(left, y(0)), (left + width, y(0))], stroke="grid", line=1)
    return svg


def _tile_note(
    svg: Svg, x: float, step: TileStep, index: int, seen: bool, now: bool, forget: bool
) -> None:
    ink = "ink" if now else "muted"
    weight = 650 if now else 400
    svg.text(x, 218, f"tile {index + 1}", anchor="middle", fill=ink, weight=weight)
    if not seen:
        svg.text(x, 238, "not read yet", anchor="middle", fill="muted", size=12)
        return
    svg.text(x, 238, f"max {step.max_after:g}", anchor="middle", fill="orange", size=12)
    times = "old sum kept" if forget else f"old sum × {step.factor:.3g}"
    svg.text(x, 255, times if index else "first tile", anchor="middle", fill=ink, size=12)
    svg.text(x, 273, f"sum {step.sum_after:.4g}", anchor="middle", fill=ink, weight=weight)


def describe_online_softmax(state: OnlineSoftmax) -> str:
    """The state in words."""
    step = state.tiles[state.at]
    scores = ", ".join(f"{score:g}" for score in step.scores)
    if state.at == 0:
        change = f"The running maximum starts at {step.max_after:g}"
    elif step.factor < 1:
        times = "is not rescaled" if state.forget else f"is multiplied by {step.factor:.3g}"
        change = (
            f"The maximum rises from {step.max_before:g} to {step.max_after:g}, "
            f"and the old sum {times}"
        )
    else:
        change = f"The maximum stays {step.max_after:g}, so nothing is rescaled"
    risen = "once" if state.rescales == 1 else f"{state.rescales} times"
    return (
        f"Tile {state.at + 1} of {state.steps} brings {scores}. {change}; "
        f"the sum is now {step.sum_after:.4g}. Over the whole row the maximum rises {risen} "
        f"after the first tile, and the final sum has a relative error of {state.error:.2g}."
    )


online_softmax_lab = Lab(
    name="online_softmax_lab",
    title="Online softmax on your own numbers",
    task=(
        "Switch “forget to rescale” on, then find an order of the numbers in which the mistake "
        "does no harm."
    ),
    insight=(
        "Sorted downwards, the maximum arrives in the first tile, nothing is ever rescaled, and "
        "the bug has an error of 0. So a test of an online softmax must bring its maximum late."
    ),
    controls=(
        Numbers("scores", "Scores", start=(1.0, 0.5, 3.0, -1.0, 2.0, 4.0), most=12),
        Slider("block", "Tile size", values=(1, 2, 3, 4, 6), start=2),
        Toggle("forget", "Forget to rescale"),
        Steps("tile", "Tile"),
    ),
    compute=compute_online_softmax,
    draw=draw_online_softmax,
    describe=describe_online_softmax,
    insight_at={"scores": (4.0, 3.0, 2.0, 1.0, 0.5, -1.0), "forget": True, "tile": 2},
)
