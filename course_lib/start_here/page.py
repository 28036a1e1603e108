"""What chapter 00 needs on its page beside the notebook tools that every chapter uses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from course_lib.notebook.cards import Card, block_markdown, emit, header, highlight, section
from course_lib.notebook.figures import source_card
from course_lib.notebook.palette import BLUE, GRID, INK, ORANGE, SKY
from course_lib.notebook.progress_card import progress_data
from course_lib.notebook.recorded import recorded, recorded_on
from course_lib.runtime.measure import Timing
from course_lib.runtime.tile import TritonUnavailable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Times",
    "believed",
    "course_map",
    "needs_triton",
    "operations_and_times",
    "solved",
    "walk_along_k",
    "without_end",
]

# Number, subject, question, what it builds on. Whether a chapter is here, the course itself knows.
MAP = (
    ("00", "kernels and memory", "What does a kernel do with memory?", ""),
    ("01", "bias, thresholds, ROC", "Who chooses the threshold?", ""),
    ("02", "self-supervision, mutual information", "How many nats can a batch see?", ""),
    ("03", "receptive fields", "Why 483, and why 427?", ""),
    ("04", "softmax with a margin", "Where exactly is the border between two faces?", ""),
    ("05", "upsampling", "Who drew the checkerboard?", ""),
    ("06", "gradient checkpointing", "Pay with time, not memory", ""),
    ("07", "packing of sequences", "Half of your batch is nothing", "08, as a black box"),
    ("08", "FlashAttention", "Why is the exact answer cheaper?", "00"),
    ("09", "memory of a training run", "", "06"),
    ("10", "a face recognition system", "", "03, 04"),
    ("11", "a vision-language model", "", "05, 06, 07, 08"),
)


@contextmanager
def needs_triton() -> Iterator[None]:
    """Go on where Triton has no wheel, after saying what would have been seen."""
    try:
        yield
    except TritonUnavailable:
        print(
            "This cell launches a kernel, and Triton is not available here (it has wheels for "
            "Linux only). Read on: the outputs in the published notebook are what it shows. To run "
            "it, open the notebook on Linux, in WSL 2 or on Colab."
        )


def course_map() -> None:
    """Show every chapter: its subject, its question, what it builds on, and whether it is here."""
    emit(map_card())


def map_card() -> Card:
    """The card that `course_map` shows."""
    here = {each["slug"].split("_")[0]: each["slug"] for each in progress_data()["chapters"]}
    head = ["| chapter | subject | its question | builds on | |", "|:--|:--|:--|:--|:--|"]
    text, table = [], head
    for number, subject, question, builds_on in MAP:
        state = "" if number in here else "*planned*"
        link = f"[{number}]({here[number]}.ipynb)" if number in here else number
        table.append(f"| {link} | {subject} | {question} | {builds_on} | {state} |")
        after = f"; builds on {builds_on}" if builds_on else ""
        planned = "" if number in here else " (planned)"
        text.append(f"{number} {subject}: {question or 'no question yet'}{after}{planned}")
    body = block_markdown("\n".join(table))
    return Card("\n".join(text), section("outcome", header("The course"), body))


def without_end(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as a GPU sees it: its first element, and whatever follows in memory.

    A pointer has a start and no end. Given this view, the guarded interpreter lets a kernel run
    on into the neighbouring tensor, as hardware does, so that the damage can be seen.

    Args:
        tensor: A contiguous view into a larger buffer.
    """
    elements = tensor.untyped_storage().nbytes() // tensor.element_size()
    return tensor.as_strided((elements - tensor.storage_offset(),), (1,))


def solved(title: str, kernel: Any) -> None:
    """Show a kernel folded, as the solved neighbour of the next exercise.

    Args:
        title: What is solved.
        kernel: The kernel.
    """
    text = source_card(kernel).text
    _, _, code = text.partition("\n\n")
    body = f"<details><summary>Show the kernel</summary>{highlight(code)}</details>"
    emit(Card(f"{title}\n\n{text}", section("outcome", header("Solved", title), body)))


# What takes the time: how a measurement is believed, and its picture.

MOST_SPREAD = 1.35
"""80th over 20th percentile of repeats of one call, at most, for a time to be believed."""

MILLION_OPERATIONS = {"copy": 0, "+ 1": 20, "exp": 240, "matmul": 2147}  # exp: about a dozen each

RECORDED = "start_here_cpu"

# What the two predictions say, as ratios: from, to.
ADDITION_TO_COPY = (0.75, 1.25)
PRODUCT_TO_ADDITION = (0.0, 10.0)


@dataclass(frozen=True)
class Times:
    """Times of the four calls in milliseconds, and where they come from.

    Attributes:
        ms: Milliseconds by name: "copy", "+ 1", "exp", "matmul".
        origin: "measured here", or which recorded run this is and why it is shown.
        here: Whether this machine measured them.
    """

    ms: Mapping[str, float]
    origin: str
    here: bool

    def of(self, name: str, base: str) -> float:
        """How many times as long one call takes as another."""
        return self.ms[name] / self.ms[base]

    def against_the_copy(self) -> dict[str, str]:
        """The outcome of the first prediction, as rows of a card."""
        ratio = self.of("+ 1", "copy")
        rows = {"+ 1": f"{ratio:.2f} × copy", "exp": f"{self.of('exp', 'copy'):.1f} × copy"}
        return {**rows, "Times": self.origin, **self._remark(ratio, *ADDITION_TO_COPY)}

    def against_the_addition(self) -> dict[str, str]:
        """The outcome of the second prediction, as rows of a card."""
        operations = MILLION_OPERATIONS["matmul"] / MILLION_OPERATIONS["+ 1"]
        ratio = self.of("matmul", "+ 1")
        rows = {"Operations": f"{operations:.0f} × those of `+ 1`", "Time": f"{ratio:.1f} × `+ 1`"}
        return {**rows, "Times": self.origin, **self._remark(ratio, *PRODUCT_TO_ADDITION)}

    def _remark(self, ratio: float, low: float, high: float) -> dict[str, str]:
        if low <= ratio <= high:
            return {}
        return {
            "But": "**this machine disagrees** with the answer below, and its repeats agree with "
            "each other. Other programs may share its memory: run the measurement again. If it "
            "stays, believe your machine, and look for the reason."
        }


def believed(timings: Mapping[str, Timing]) -> Times:
    """These times where the machine repeats itself, and a recorded run where it does not.

    The decision looks at how much repeats of one call differ, never at which call is faster.

    Args:
        timings: From `time_interleaved`.
    """
    spread = max(timing.p80 / timing.p20 for timing in timings.values())
    ms = {name: 1000 * timing.median for name, timing in timings.items()}
    if spread <= MOST_SPREAD:
        return Times(ms, "measured here", here=True)
    busy = f"This machine is too busy now: repeats of one call differ by {100 * (spread - 1):.0f} %"
    run = recorded(RECORDED)
    if run is None:
        return Times(ms, f"measured here. {busy}", here=True)
    ms = {name: 1000 * timing["median"] for name, timing in run["seconds"].items()}
    return Times(ms, f"recorded ({recorded_on(run)}). {busy}", here=False)


def operations_and_times(times: Times) -> Figure:
    """Two bar charts side by side: what each call computes, and what it takes."""
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 2, figsize=(7.2, 2.3), sharey=True)
    units = ("million operations", "milliseconds")
    for axis, unit, values in zip(axes, units, (MILLION_OPERATIONS, times.ms), strict=True):
        axis.barh(list(values), list(values.values()), color=ORANGE if axis is axes[0] else BLUE)
        for row, value in enumerate(values.values()):
            axis.text(value, row, f" {value:.0f}", va="center")
        axis.set(xlabel=unit, xlim=(0, 1.2 * max(values.values())))
    axes[1].set_title("measured here" if times.here else "a recorded run", fontsize=9)
    axes[0].invert_yaxis()
    return fig


def walk_along_k() -> Figure:
    """One program of a matrix product: its tile of the output and its two bands, step by step."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    fig, axis = plt.subplots(figsize=(7.2, 3.6))
    for k in range(4):
        for x, y in ((k, 2), (7, 8 - k)):
            fill = ORANGE if k == 1 else GRID
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=fill, edgecolor="white"))
            ink = "white" if k == 1 else INK
            axis.text(x + 0.5, y + 0.5, f"{k}", ha="center", va="center", color=ink)
    for name, x, y in (("b  [K, N]", 5, 5), ("a  [M, K]", 0, 0), ("out  [M, N]", 5, 0)):
        axis.add_patch(Rectangle((x, y), 4, 4, facecolor="none", edgecolor=INK, lw=1.4))
        axis.text(x, y + 4.15, name)
    axis.add_patch(Rectangle((7, 2), 1, 1, facecolor=SKY, edgecolor=BLUE))
    axis.text(7.5, 2.5, "acc", ha="center", va="center")
    steps = (
        "Program (1, 2) takes steps 0 to 3.\nIn step 1:\n\n1. load tile 1 of a's band\n"
        "2. load tile 1 of b's band\n3. acc = tl.dot(a, b, acc)\n\nAfter step 3: store acc."
    )
    axis.text(10.4, 5.2, steps, va="center")
    axis.set(xlim=(-0.2, 18), ylim=(-0.3, 9.8), aspect="equal")
    axis.axis("off")
    return fig
