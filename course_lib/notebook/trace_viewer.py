"""A lab for any traced kernel: what each program reads and writes, tile by tile and byte by byte.

with interpreted(trace=True) as run:
    my_kernel[grid](...)
trace_viewer(run.launches[0], kernel=my_kernel)
"""

from __future__ import annotations

import inspect
import linecache
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

from course_lib.notebook.lab import Lab, Steps
from course_lib.notebook.svg import Svg
from course_lib.runtime.trace import Access, Launch

MOST_BOXES = 256
"""Separate tiles drawn in one tensor; where a kernel touched more, their bounding box is drawn."""

Box = tuple[int, int, int, int]
"""First row, row past the last, first column, column past the last."""


@dataclass(frozen=True)
class Walk:
    """A launch as a sequence of accesses, with running totals.

    Attributes:
        launch: What was traced.
        accesses: Its accesses in the order in which they happened.
    """

    launch: Launch
    accesses: tuple[Access, ...]

    @cached_property
    def read(self) -> list[int]:
        """Bytes read up to and with each access; atomics read and write."""
        return list(accumulate(a.nbytes * (a.kind != "store") for a in self.accesses))

    @cached_property
    def written(self) -> list[int]:
        """Bytes written up to and with each access."""
        return list(accumulate(a.nbytes * (a.kind != "load") for a in self.accesses))

    @cached_property
    def boxes(self) -> list[Box]:
        """Where each access lies in its tensor, seen as a matrix."""
        return [_matrix_box(self.launch, access) for access in self.accesses]

    @cached_property
    def first_of_program(self) -> list[int]:
        """For each access, where the accesses of its program begin."""
        firsts: list[int] = []
        for index, access in enumerate(self.accesses):
            same = index > 0 and self.accesses[index - 1].program == access.program
            firsts.append(firsts[-1] if same else index)
        return firsts


def walk_of(launch: Launch) -> Walk:
    """A traced launch, ready to be stepped through.

    Raises:
        ValueError: If nothing was recorded.
    """
    if not launch.accesses:
        raise ValueError(
            f"{launch.kernel} has no recorded access: launch it inside "
            "`with interpreted(trace=True) as run:` and pass run.launches[0]."
        )
    return Walk(launch, tuple(launch.accesses))


def matrix_shape(shape: Sequence[int]) -> tuple[int, int]:
    """A tensor's shape as rows and columns: leading dimensions are stacked, a vector stands up."""
    shape = shape[_leading_ones(shape) :]
    if len(shape) < 2:
        return (math.prod(shape), 1)
    return (math.prod(shape[:-1]), shape[-1])


def _leading_ones(shape: Sequence[int]) -> int:
    """How many dimensions of extent 1 a shape begins with; the last dimension is never counted."""
    count = 0
    while count < len(shape) - 1 and shape[count] == 1:
        count += 1
    return count


def _matrix_box(launch: Launch, access: Access) -> Box:
    shape = launch.tensors[access.tensor].shape
    skip = _leading_ones(shape)
    shape, ranges = shape[skip:], launch.box(access)[skip:]
    if access.elements == 0 or not ranges:
        return (0, 0, 0, 0)
    if len(shape) == 1:
        return (ranges[0].start, ranges[0].stop, 0, 1)
    first = last = 0
    for extent, part in zip(shape[:-1], ranges[:-1], strict=True):
        first, last = first * extent + part.start, last * extent + part.stop - 1
    return (first, last + 1, ranges[-1].start, ranges[-1].stop)


# --- Drawing: shared with the labs of a chapter ----------------------------------------------


@dataclass(frozen=True)
class Frame:
    """Where a tensor is drawn. `across` lays its rows along x instead of down the page."""

    x: float
    y: float
    width: float
    height: float
    shape: tuple[int, int]
    across: bool = False

    def rect(self, box: Box) -> tuple[float, float, float, float]:
        """The place of a box: x, y, width, height."""
        rows, columns = (max(1, extent) for extent in self.shape)
        r0, r1, c0, c1 = box[0] / rows, box[1] / rows, box[2] / columns, box[3] / columns
        if self.across:
            r0, r1, c0, c1 = c0, c1, r0, r1
        width, height = (c1 - c0) * self.width, (r1 - r0) * self.height
        return self.x + c0 * self.width, self.y + r0 * self.height, max(width, 2), max(height, 2)


def draw_frame(
    svg: Svg,
    frame: Frame,
    earlier: Iterable[Box] = (),
    mine: Iterable[Box] = (),
    now: Box | None = None,
    stores: bool = False,
    tip: str = "",
) -> None:
    """One tensor: what earlier programs touched, what this one did, and the present access.

    Args:
        svg: The picture.
        frame: Where.
        earlier: Boxes of earlier programs.
        mine: Boxes of the present program before this step.
        now: The present access, where it is in this tensor.
        stores: Whether the present access writes. It is drawn with a double outline.
        tip: Shown on hover.
    """
    svg.rect(frame.x, frame.y, frame.width, frame.height, fill="paper", stroke="muted", tip=tip)
    for box in _few(earlier):
        svg.rect(*frame.rect(box), fill="grid", opacity=0.55)
    for box in _few(mine):
        svg.rect(*frame.rect(box), fill="sky", opacity=0.45, stroke="paper", line=0.6)
    if now is not None and now[1] > now[0]:
        x, y, width, height = frame.rect(now)
        colour = "orange" if stores else "blue"
        svg.rect(x, y, width, height, fill=colour, stroke="ink", line=1.4)
        if stores and min(width, height) > 8:
            svg.rect(x + 3, y + 3, width - 6, height - 6, stroke="paper", line=1.4)
    svg.rect(frame.x, frame.y, frame.width, frame.height, stroke="muted")


def _few(boxes: Iterable[Box]) -> list[Box]:
    unique = [box for box in dict.fromkeys(boxes) if box[1] > box[0]]
    if len(unique) <= MOST_BOXES:
        return unique
    low, high = (list(zip(*unique, strict=True))[i] for i in (0, 1))
    left, right = (list(zip(*unique, strict=True))[i] for i in (2, 3))
    return [(min(low), max(high), min(left), max(right))]


def draw_meter(
    svg: Svg,
    x: float,
    y: float,
    width: float,
    label: str,
    value: float,
    total: float,
    scale: float,
    fill: str = "blue",
) -> None:
    """A bar of bytes: filled up to now, outlined up to the total, in units of `scale` bytes.

    Args:
        svg: The picture.
        x: Left edge.
        y: Baseline of the label; the bar lies below it.
        width: What `scale` bytes are wide.
        label: Said above the bar, left.
        value: Bytes so far.
        total: Bytes in the end.
        scale: Bytes that fill the width.
        fill: The bar's colour.
    """
    svg.text(x, y, label, size=12.5)
    text = bytes_text(total) if value >= total else f"{bytes_text(value)} of {bytes_text(total)}"
    svg.text(x + width, y, text, size=12.5, anchor="end", weight=600)
    svg.rect(x, y + 7, width, 11, fill="grid", opacity=0.35, radius=3)
    svg.rect(x, y + 7, max(2.0, width * total / scale), 11, stroke=fill, radius=3)
    svg.rect(x, y + 7, max(2.0, width * value / scale), 11, fill=fill, radius=3)


def bytes_text(count: float) -> str:
    """Bytes in words, in powers of a thousand: "16.4 kB"."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"


def span_text(first: int, past: int) -> str:
    """A half-open range in words: "64–127", or "5" for a single one."""
    return f"{first:,}" if past - first == 1 else f"{first:,}–{past - 1:,}"


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 byte", "2 bytes"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


# --- The lab ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class TraceState:
    """A launch up to and with the access `at`."""

    walk: Walk
    at: int
    names: dict[str, str]
    lines: dict[int, str] = field(default_factory=dict)
    beside: tuple[str, int] | None = None

    @property
    def steps(self) -> int:
        """How many accesses there are."""
        return len(self.walk.accesses)

    @property
    def access(self) -> Access:
        """The present access."""
        return self.walk.accesses[self.at]


def trace_viewer(
    launch: Launch,
    tensors: Sequence[str] | Mapping[str, str] | None = None,
    *,
    kernel: Any = None,
    beside: Launch | None = None,
    beside_name: str = "course_lib’s kernel",
) -> Any:
    """Show a lab that steps through a traced launch.

    Args:
        launch: From `run.launches`, traced with `interpreted(trace=True)`.
        tensors: Which arguments to draw and in which order; a mapping also names them
            ({"a": "A, left factor"}). All of them by default.
        kernel: The kernel, so that the source line of each access can be quoted.
        beside: Another traced launch whose bytes are shown beside these.
        beside_name: What to call it.

    Raises:
        ValueError: If the launch was not traced, or has no such tensor.
    """
    return trace_lab(launch, tensors, kernel=kernel, beside=beside, beside_name=beside_name)()


def trace_lab(
    launch: Launch,
    tensors: Sequence[str] | Mapping[str, str] | None = None,
    *,
    kernel: Any = None,
    beside: Launch | None = None,
    beside_name: str = "course_lib’s kernel",
) -> Lab:
    """The lab that `trace_viewer` shows. See there for the arguments."""
    walk = walk_of(launch)
    names = _names(launch, tensors)
    lines = _source_lines(kernel) if kernel is not None else {}
    other = None
    if beside is not None:
        compared = walk_of(beside)
        other = (beside_name, compared.read[-1] + compared.written[-1])

    def compute(*, step: int) -> TraceState:
        return TraceState(walk, min(step, len(walk.accesses) - 1), names, lines, other)

    return Lab(
        name="trace_viewer",
        title=f"What {launch.kernel} does to memory",
        task=(
            "Step through the launch. Which tile is read more than once, and which program does it?"
        ),
        insight=(
            "Every byte is counted where the kernel asks for it. A tile that several programs "
            "read is counted each time: on a GPU a cache may answer the later requests, but only "
            "fewer requests are sure to be cheaper."
        ),
        controls=(Steps("step", "Access"),),
        compute=compute,
        draw=draw_trace,
        describe=describe_trace,
        insight_at={"step": len(walk.accesses) - 1},
    )


def _names(launch: Launch, tensors: Sequence[str] | Mapping[str, str] | None) -> dict[str, str]:
    if tensors is None:
        return {name: name for name in launch.tensors}
    wanted = dict(tensors) if isinstance(tensors, Mapping) else {name: name for name in tensors}
    missing = [name for name in wanted if name not in launch.tensors]
    if missing:
        known = ", ".join(launch.tensors)
        raise ValueError(f"{launch.kernel} has no tensor {missing[0]!r}. It has: {known}.")
    return wanted


def _source_lines(kernel: Any) -> dict[int, str]:
    target = kernel
    while hasattr(target, "fn"):
        target = target.fn
    try:
        file = inspect.getsourcefile(target) or ""
    except TypeError:
        return {}
    return {n: text.strip() for n, text in enumerate(linecache.getlines(file), start=1)}


def draw_trace(state: TraceState) -> Svg:
    """The tensors side by side, the programs as a strip, the bytes as bars."""
    walk, access = state.walk, state.access
    svg = Svg(740, 372, "The kernel's tensors, with the tile of the present access lit")
    program = _program_number(walk.launch, access)
    svg.text(10, 22, f"program {_program_text(walk.launch, access)}", weight=650, size=14)
    svg.text(730, 22, f"{walk.launch.programs:,} programs", anchor="end", fill="muted", size=12.5)
    _draw_strip(svg, program, walk.launch.programs)

    start = walk.first_of_program[state.at]
    for name, frame in _frames(walk.launch, state.names).items():
        pairs = list(zip(walk.accesses, walk.boxes, strict=True))
        here = access.tensor == name
        info = walk.launch.tensors[name]
        draw_frame(
            svg,
            frame,
            (box for a, box in pairs[:start] if a.tensor == name),
            (box for a, box in pairs[start : state.at] if a.tensor == name),
            walk.boxes[state.at] if here else None,
            stores=access.kind != "load",
            tip=f"{name}: {list(info.shape)} {info.dtype}",
        )
        middle = frame.x + frame.width / 2
        svg.text(middle, 254, state.names[name], anchor="middle", weight=600)
        shape = " × ".join(f"{extent}" for extent in info.shape) or "scalar"
        svg.text(middle, 270, shape, anchor="middle", fill="muted", size=11)
        if here:
            word = {"load": "read", "store": "written", "atomic": "atomic"}[access.kind]
            colour = "blue" if access.kind == "load" else "orange"
            svg.text(middle, 72, word, anchor="middle", fill=colour, size=12, weight=650)

    total = walk.read[-1] + walk.written[-1]
    scale = max(total, state.beside[1] if state.beside else 0, 1)
    so_far = walk.read[state.at] + walk.written[state.at]
    draw_meter(svg, 10, 302, 720, "bytes moved by this kernel", so_far, total, scale)
    if state.beside:
        name, amount = state.beside
        draw_meter(svg, 10, 342, 720, f"bytes moved by {name}", amount, amount, scale, "muted")
    return svg


def _draw_strip(svg: Svg, program: int, programs: int) -> None:
    """The grid of programs as a strip; past some number the squares merge into a bar."""
    width = 720 / programs
    if width >= 4:
        for index in range(programs):
            fill = "blue" if index == program else "sky" if index < program else "none"
            svg.rect(10 + index * width, 32, width - 1, 10, fill=fill, stroke="muted", line=0.7)
        return
    svg.rect(10, 32, 720, 10, stroke="muted")
    svg.rect(10, 32, 720 * (program + 1) / programs, 10, fill="sky")
    svg.rect(10 + 720 * program / programs, 30, 3, 14, fill="blue")


def _frames(launch: Launch, names: Mapping[str, str]) -> dict[str, Frame]:
    """A place for each tensor: heights and widths grow with the logarithm of the extents."""
    shapes = {name: matrix_shape(launch.tensors[name].shape) for name in names}
    slot = 720 / max(1, len(shapes))

    def length(extent: int, most: float) -> float:
        largest = max(max(shape) for shape in shapes.values())
        return most * max(0.12, math.log2(1 + extent) / math.log2(1 + max(largest, 1)))

    frames = {}
    for index, (name, shape) in enumerate(shapes.items()):
        width, height = length(shape[1], min(slot - 26, 150)), length(shape[0], 158)
        x = 10 + slot * (index + 0.5) - width / 2
        frames[name] = Frame(x, 80 + (158 - height) / 2, width, height, shape)
    return frames


def _program_number(launch: Launch, access: Access) -> int:
    x, y, z = access.program
    return x + launch.grid[0] * (y + launch.grid[1] * z)


def _program_text(launch: Launch, access: Access) -> str:
    """A program's index without the grid's dimensions of size 1."""
    kept = max([1] + [axis + 1 for axis, extent in enumerate(launch.grid) if extent > 1])
    return f"{access.program[0]}" if kept == 1 else str(access.program[:kept])


def describe_trace(state: TraceState) -> str:
    """The state in words."""
    walk, access = state.walk, state.access
    verb = {"load": "reads", "store": "writes", "atomic": "updates"}[access.kind]
    who = f"Program {_program_text(walk.launch, access)} of {walk.launch.programs:,}"
    name = state.names.get(access.tensor, access.tensor)
    r0, r1, c0, c1 = walk.boxes[state.at]
    if access.elements == 0:
        what = f"{who} {verb} nothing of {name}: every lane is masked"
    else:
        matrix = matrix_shape(walk.launch.tensors[access.tensor].shape)[1] > 1
        rows = "row" if matrix else "element"
        where = f"{rows if r1 - r0 == 1 else rows + 's'} {span_text(r0, r1)}"
        if matrix:
            where += f", columns {span_text(c0, c1)}"
        what = f"{who} {verb} {name} at {where}: {counted(access.nbytes, 'byte')}"
    line = f" (line {access.line})" if access.line else ""
    quoted = state.lines.get(access.line, "")
    quote = f": {quoted}" if quoted else ""
    so_far = (
        f"So far {bytes_text(walk.read[state.at])} read and "
        f"{bytes_text(walk.written[state.at])} written, of "
        f"{bytes_text(walk.read[-1])} and {bytes_text(walk.written[-1])}"
    )
    other = ""
    if state.beside:
        other = f"; {state.beside[0]} moves {bytes_text(state.beside[1])} in all"
    return f"{what}{line}{quote}. {so_far}{other}."
