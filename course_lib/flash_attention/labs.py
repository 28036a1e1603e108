"""The labs of chapter 08: the tile walker, online softmax on your own numbers, the roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from unittest.mock import patch

import torch

from course_lib.notebook.lab import Choice, Lab, Numbers, Slider, Steps, Toggle
from course_lib.notebook.svg import Svg
from course_lib.notebook.trace_viewer import (
    Box,
    Frame,
    Walk,
    bytes_text,
    counted,
    draw_frame,
    draw_meter,
    span_text,
    walk_of,
)
from course_lib.runtime.measure import roofline
from course_lib.runtime.tile import HAS_TRITON
from course_lib.runtime.trace import Access, AccessKind, Launch, TensorInfo

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
            upper, lower = min(y(score), y(0)), max(y(score), y(0))
            svg.rect(
                x + 2,
                upper,
                bar - 4,
                max(lower - upper, 1.5),
                fill="blue" if seen else "paper",
                opacity=1.0 if now or not seen else 0.35,
                stroke="blue" if seen else "muted",
                radius=2,
                tip=f"score {score:g}",
            )
            above = score >= 0
            svg.text(x + bar / 2, upper - 6 if above else lower + 15, f"{score:g}", anchor="middle")
            x += bar
        if seen:
            svg.line(
                [(start, y(step.max_after)), (x, y(step.max_after))], stroke="orange", dash="5 3"
            )
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


# --- The tile walker -------------------------------------------------------------------------

TOKENS, HEAD_DIM = 256, 64
QUERY_OUTER, KEY_OUTER = "queries outside (FA2)", "keys outside (FA1)"
SHOWN = ("q", "k", "v", "o")
FLOAT_BYTES = 4


def naive_bytes(n: int, d: int, itemsize: int) -> int:
    """Bytes that the three library calls move for one head.

    Q, K and V are read and O is written once; the n × n scores are written, read, written again
    as probabilities, and read again.
    """
    return (4 * n * d + 4 * n * n) * itemsize


def tiled_bytes(n: int, d: int, itemsize: int, block_m: int) -> int:
    """Bytes that the tiled forward moves for one head, without a mask and without a cache.

    Q is read and O written once; K and V are read once for each block of queries.
    """
    walks = math.ceil(n / block_m)
    return (2 * n * d + walks * 2 * n * d) * itemsize


def walker_inputs(tokens: int = TOKENS, head_dim: int = HEAD_DIM) -> tuple[torch.Tensor, ...]:
    """Q, K and V of one head, [1, 1, tokens, head_dim], the same every time."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(1, 1, tokens, head_dim, generator=generator) for _ in range(3))
    return q, k, v


def trace_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    block_m: int,
    block_n: int,
    causal: bool = False,
) -> tuple[Launch, torch.Tensor, torch.Tensor]:
    """Run the course's forward kernel in the interpreter with these tiles, and keep its trace.

    Args:
        q: [B, Hq, Tq, D] on the CPU, fp32 or fp16.
        k: [B, Hkv, Tk, D].
        v: [B, Hkv, Tk, D].
        block_m: Queries a tile, 16 at least.
        block_n: Keys a tile, 16 at least.
        causal: Whether a query sees only the keys before it.

    Returns:
        The launch with its accesses, the output, and the row logsumexp.

    Raises:
        TritonUnavailable: If Triton cannot be imported here.
    """
    from course_lib.flash_attention import flash_attention
    from course_lib.flash_attention.launches import INTERPRETED, LaunchConfig
    from course_lib.runtime.interpreter import interpreted

    tiles = {"fwd": LaunchConfig(block_m, block_n, num_warps=4, num_stages=1)}
    with patch.dict(INTERPRETED, tiles), interpreted(trace=True) as run:
        out, lse = flash_attention(q, k, v, causal=causal, return_lse=True, implementation="triton")
    return run.launches[0], out, lse


def trace_key_outer(*, block_m: int, block_n: int, causal: bool = False) -> Launch:
    """The same inputs through the kernel with the other loop order."""
    from course_lib.flash_attention.loop_order import key_outer_fwd_kernel
    from course_lib.runtime.interpreter import interpreted

    q, k, v = walker_inputs()
    out, row_max, row_sum = torch.empty_like(q), torch.empty(TOKENS), torch.empty(TOKENS)
    with interpreted(trace=True) as run:
        key_outer_fwd_kernel[(1,)](
            *(q, k, v, out, row_max, row_sum),
            *(TOKENS, math.log2(math.e) / math.sqrt(HEAD_DIM)),
            CAUSAL=causal,
            D=HEAD_DIM,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
        )
    return run.launches[0]


@lru_cache(maxsize=64)
def walk_forward(block_m: int, block_n: int, causal: bool, order: str) -> Walk:
    """The tile walker's trace: the kernel's own, or the expected one where there is no Triton."""
    if not HAS_TRITON:
        return Walk(*expected_walk(block_m, block_n, causal, order))
    if order == KEY_OUTER:
        return walk_of(trace_key_outer(block_m=block_m, block_n=block_n, causal=causal))
    q, k, v = walker_inputs()
    return walk_of(trace_forward(q, k, v, block_m=block_m, block_n=block_n, causal=causal)[0])


def expected_walk(
    block_m: int, block_n: int, causal: bool, order: str
) -> tuple[Launch, tuple[Access, ...]]:
    """The accesses that the kernels must make, written down from the loops alone.

    It stands in for the trace where Triton cannot be imported; a test holds the two equal.
    """
    queries, keys = range(0, TOKENS, block_m), range(0, TOKENS, block_n)
    accesses: list[Access] = []

    def touch(program: int, kind: AccessKind, tensor: str, start: int, rows: int) -> None:
        wide = HEAD_DIM if tensor in SHOWN else 1
        shape = (rows, HEAD_DIM) if tensor in SHOWN else (rows,)
        nbytes = rows * wide * 4
        first, past = start * wide, (start + rows) * wide
        accesses.append(
            Access(
                (program, 0, 0), kind, tensor, first, past, rows * wide, nbytes, shape, 0, "fp32"
            )
        )

    if order == QUERY_OUTER:
        # A causal grid starts with the last block of queries, which has the most keys.
        for program, m in enumerate(reversed(queries) if causal else queries):
            touch(program, "load", "q", m, block_m)
            for n in keys:
                if not causal or n < m + block_m:
                    touch(program, "load", "k", n, block_n)
                    touch(program, "load", "v", n, block_n)
            touch(program, "store", "o", m, block_m)
            touch(program, "store", "lse", m, block_m)
    else:
        statistics = ("row_max", "row_sum")
        for n in keys:
            touch(0, "load", "k", n, block_n)
            touch(0, "load", "v", n, block_n)
            for m in range(n // block_m * block_m if causal else 0, TOKENS, block_m):
                touch(0, "load", "q", m, block_m)
                for name in (*statistics, "o") if n else ():
                    touch(0, "load", name, m, block_m)
                for name in ("o", *statistics):
                    touch(0, "store", name, m, block_m)

    matrix = TensorInfo(
        (1, 1, TOKENS, HEAD_DIM), (TOKENS * HEAD_DIM,) * 2 + (HEAD_DIM, 1), "float32", 4
    )
    if order == QUERY_OUTER:
        row = TensorInfo((1, 1, TOKENS), (TOKENS, TOKENS, 1), "float32", 4)
        tensors = {**dict.fromkeys(SHOWN, matrix), "lse": row}
        launch = Launch("flash_attention_fwd_kernel", (len(queries), 1, 1), tensors, accesses)
    else:
        row = TensorInfo((TOKENS,), (1,), "float32", 4)
        tensors = {**dict.fromkeys(SHOWN, matrix), "row_max": row, "row_sum": row}
        launch = Launch("key_outer_fwd_kernel", (1, 1, 1), tensors, accesses)
    return launch, tuple(accesses)


@dataclass(frozen=True)
class TileWalk:
    """The walk up to and with the access `at`.

    Attributes:
        walk: All accesses.
        at: The present one.
        block_m: Queries a tile.
        block_n: Keys a tile.
        causal: Whether a mask hides later keys.
        order: Which loop is outside.
        tiles: Tiles of scores computed so far, the last one being the present one; none while a
            program has only loaded its queries.
        row: The query whose statistics are shown: the last one of the present block.
        row_max: Its running maximum after each tile of keys so far.
        row_sum: Its running sum after each tile of keys so far.
    """

    walk: Walk
    at: int
    block_m: int
    block_n: int
    causal: bool
    order: str
    tiles: tuple[tuple[int, int], ...]
    row: int
    row_max: tuple[float, ...]
    row_sum: tuple[float, ...]

    @property
    def steps(self) -> int:
        """How many accesses there are."""
        return len(self.walk.accesses)

    @property
    def kv_reads(self) -> float:
        """How often the whole of K is read, on average over its rows."""
        read = sum(a.nbytes for a in self.walk.accesses if a.tensor == "k")
        return read / (TOKENS * HEAD_DIM * FLOAT_BYTES)

    @property
    def naive(self) -> int:
        """Bytes that the three library calls move on the same inputs."""
        return naive_bytes(TOKENS, HEAD_DIM, FLOAT_BYTES)


def compute_tile_walk(
    *, block_m: int, block_n: int, causal: bool, order: str, step: int
) -> TileWalk:
    """Go `step` accesses into the trace, and take the statistics that the kernel has by then."""
    walk = walk_forward(block_m, block_n, causal, order)
    at = min(step, len(walk.accesses) - 1)
    query = key = 0
    tiles: list[tuple[int, int]] = []
    for access, box in zip(walk.accesses[: at + 1], walk.boxes, strict=False):
        if access.tensor == "q":
            query = box[0]
        elif access.tensor == "k":
            key = box[0]
        # The scores of a tile are known as soon as the second of its two factors is there.
        if access.tensor == ("k" if order == QUERY_OUTER else "q"):
            tiles.append((query, key))
    row = query + block_m - 1
    seen = [n for m, n in tiles if m == query]
    maxima, sums = _row_statistics(row, seen, block_n, causal)
    return TileWalk(
        walk, at, block_m, block_n, causal, order, tuple(tiles), row, tuple(maxima), tuple(sums)
    )


def _row_statistics(
    row: int, starts: list[int], block_n: int, causal: bool
) -> tuple[list[float], list[float]]:
    q, k, _ = walker_inputs()
    scores = (q[0, 0, row] @ k[0, 0].T).double() / math.sqrt(HEAD_DIM)
    row_max, row_sum = -math.inf, 0.0
    maxima, sums = [], []
    for start in starts:
        part = scores[start : min(start + block_n, row + 1 if causal else TOKENS)]
        new_max = max(row_max, float(part.max()) if len(part) else -math.inf)
        row_sum = row_sum * math.exp(row_max - new_max) + float((part - new_max).exp().sum())
        row_max = new_max
        maxima.append(row_max)
        sums.append(row_sum)
    return maxima, sums


SIDE = 208.0  # of the square of scores, in user units


def draw_tile_walk(state: TileWalk) -> Svg:
    """Q, K, V and O around the square of scores; on the right the statistics and the bytes."""
    walk, access = state.walk, state.walk.accesses[state.at]
    svg = Svg(740, 366, "The tiles of Q, K, V and O around the square of scores")
    left, top, thick, gap = 76.0, 76.0, 42.0, 12.0
    shape = (TOKENS, HEAD_DIM)
    frames = {
        "q": Frame(left - gap - thick, top, thick, SIDE, shape),
        "k": Frame(left, top - gap - thick, SIDE, thick, shape, across=True),
        "v": Frame(left, top + SIDE + gap, SIDE, thick, shape, across=True),
        "o": Frame(left + SIDE + gap, top, thick, SIDE, shape),
    }
    start = walk.first_of_program[state.at]
    pairs = list(zip(walk.accesses, walk.boxes, strict=True))
    on_chip = _on_chip(state)
    for name, frame in frames.items():
        draw_frame(
            svg,
            frame,
            (box for a, box in pairs[:start] if a.tensor == name),
            (box for a, box in pairs[start : state.at] if a.tensor == name),
            walk.boxes[state.at] if access.tensor == name else None,
            stores=access.kind == "store",
            tip=f"{name.upper()}: {TOKENS} × {HEAD_DIM} float32",
        )
        if name in on_chip and access.tensor != name:
            svg.rect(*frame.rect(on_chip[name]), stroke="blue", line=2.2)
    _draw_scores(svg, state, left, top)
    svg.text(left - gap - thick / 2, top - 8, "Q", anchor="middle", weight=650)
    svg.text(left - 8, top - gap - thick / 2 + 5, "K", anchor="end", weight=650)
    svg.text(left - 8, top + SIDE + gap + thick / 2 + 5, "V", anchor="end", weight=650)
    svg.text(left + SIDE + gap + thick / 2, top - 8, "O", anchor="middle", weight=650)
    _draw_numbers(svg, state, 374, 356)
    return svg


def _on_chip(state: TileWalk) -> dict[str, Box]:
    """The tiles that the present program holds without reading them again."""
    held: dict[str, Box] = {}
    start = state.walk.first_of_program[state.at]
    for index in range(start, state.at + 1):
        name = state.walk.accesses[index].tensor
        if name in ("q", "k", "v"):
            held[name] = state.walk.boxes[index]
            if name == "k":
                held.pop("v", None)
    return held


def _draw_scores(svg: Svg, state: TileWalk, left: float, top: float) -> None:
    unit = SIDE / TOKENS
    svg.rect(left, top, SIDE, SIDE, fill="paper", tip="the scores: never stored")
    for index, (m, n) in enumerate(state.tiles):
        x, y = left + n * unit, top + m * unit
        width, height = state.block_n * unit, state.block_m * unit
        if index == len(state.tiles) - 1:
            svg.rect(x, y, width, height, fill="purple", stroke="ink", line=1.4)
        else:
            svg.rect(x, y, width, height, fill="purple", opacity=0.22, stroke="paper", line=0.8)
    svg.line(
        [
            (left, top),
            (left + SIDE, top),
            (left + SIDE, top + SIDE),
            (left, top + SIDE),
            (left, top),
        ],
        stroke="muted",
        line=1,
        dash="4 4",
    )
    if state.causal:
        svg.line([(left, top), (left + SIDE, top + SIDE)], stroke="ink", line=1.2)
    if not state.tiles:
        svg.text(left + SIDE / 2, top + SIDE / 2, "scores: never", anchor="middle", fill="muted")
        svg.text(left + SIDE / 2, top + SIDE / 2 + 17, "stored", anchor="middle", fill="muted")


def _draw_numbers(svg: Svg, state: TileWalk, x: float, width: float) -> None:
    walk, access = state.walk, state.walk.accesses[state.at]
    box = walk.boxes[state.at]
    verb = "writes" if access.kind == "store" else "reads"
    name = _TENSOR_NAMES.get(access.tensor, access.tensor)
    svg.text(x, 22, f"{_who(state)} {verb}", weight=650, size=14)
    svg.text(x, 42, f"{name}, rows {span_text(box[0], box[1])}", fill="muted")

    svg.text(x, 74, f"Query {state.row}, tile by tile", size=12.5, weight=600)
    if state.row_max:
        _draw_statistics(svg, state, x, 84, width, 106)
        svg.text(x, 214, f"– –  running maximum {state.row_max[-1]:.3f}", fill="orange", size=12.5)
        svg.text(
            x + width,
            214,
            f"running sum {state.row_sum[-1]:.2f}  ●",
            anchor="end",
            fill="blue",
            size=12.5,
        )
    else:
        svg.text(x, 98, "no key seen: maximum −∞, sum 0", size=12.5, fill="muted")

    read, written = walk.read, walk.written
    total = read[-1] + written[-1]
    scale = max(total, state.naive)
    so_far = read[state.at] + written[state.at]
    draw_meter(svg, x, 256, width, "this walk", so_far, total, scale)
    draw_meter(svg, x, 302, width, "three library calls", state.naive, state.naive, scale, "muted")
    svg.text(x, 350, f"K and V are each read {_times(state.kv_reads)}", size=12.5, fill="muted")


def _draw_statistics(
    svg: Svg, state: TileWalk, x: float, y: float, width: float, height: float
) -> None:
    tiles = TOKENS // state.block_n
    slot = width / tiles
    highest = max(*state.row_sum, 1.0) * 1.15
    svg.line([(x, y + height), (x + width, y + height)], stroke="grid", line=1)
    spread = max(1.0, max(state.row_max) - min(state.row_max))
    points = []
    for index, (high, total) in enumerate(zip(state.row_max, state.row_sum, strict=True)):
        middle = x + slot * (index + 0.5)
        bar = max(2.0, height * 0.72 * total / highest)
        last = index == len(state.row_max) - 1
        svg.rect(
            middle - min(slot * 0.3, 16),
            y + height - bar,
            min(slot * 0.6, 32),
            bar,
            fill="blue" if last else "sky",
            radius=2,
            tip=f"tile {index + 1}: maximum {high:.3f}, sum {total:.2f}",
        )
        level = y + 8 + (max(state.row_max) - high) / spread * height * 0.3
        points += [(middle - slot * 0.5, level), (middle + slot * 0.5, level)]
    svg.line(points, stroke="orange", line=2, dash="5 3")


_TENSOR_NAMES = {
    "q": "Q",
    "k": "K",
    "v": "V",
    "o": "O",
    "lse": "the row logsumexp",
    "row_max": "the running maxima",
    "row_sum": "the running sums",
}


def _who(state: TileWalk) -> str:
    programs = state.walk.launch.programs
    if programs == 1:
        return "The one program"
    return f"Program {state.walk.accesses[state.at].program[0] + 1} of {programs}"


def _times(number: float) -> str:
    if number == 1:
        return "once"
    return f"{number:g} times" if number == int(number) else f"{number:.3g} times on average"


def describe_tile_walk(state: TileWalk) -> str:
    """The state in words."""
    walk, access = state.walk, state.walk.accesses[state.at]
    first, past = walk.boxes[state.at][:2]
    verb = "writes" if access.kind == "store" else "reads"
    name = _TENSOR_NAMES.get(access.tensor, access.tensor)
    if state.row_max:
        statistics = (
            f"After {counted(len(state.row_max), 'tile')} of keys, query {state.row} has running "
            f"maximum {state.row_max[-1]:.3f} and running sum {state.row_sum[-1]:.2f}."
        )
    else:
        statistics = f"Query {state.row} has seen no key yet."
    read, written = walk.read, walk.written
    return (
        f"{_who(state)} {verb} {name}, rows {span_text(first, past)}. {statistics} "
        f"So far {bytes_text(read[state.at] + written[state.at])} have moved. In the end this "
        f"walk reads {bytes_text(read[-1])} and writes {bytes_text(written[-1])}, with K and V "
        f"each read {_times(state.kv_reads)}; the three calls move {bytes_text(state.naive)}."
    )


tile_walker = Lab(
    name="tile_walker",
    title="Tile walker: the kernel’s own trace",
    task=(
        "Change the two tile sizes. Which of them changes the bytes, and which does not? Then put "
        "the keys outside and ask again."
    ),
    insight=(
        "BLOCK_N changes no byte: it only slices the walk over K and V. BLOCK_M decides how many "
        "walks there are, so doubling it halves what is read of K and V. With the keys outside it "
        "is BLOCK_N that counts, and the unfinished outputs go through memory as well: what stays "
        "on the chip decides what is paid."
    ),
    controls=(
        Slider("block_m", "BLOCK_M", values=(32, 64, 128), start=64, unit=" queries"),
        Slider("block_n", "BLOCK_N", values=(32, 64, 128), start=64, unit=" keys"),
        Choice("order", "Loop order", options=(QUERY_OUTER, KEY_OUTER), start=QUERY_OUTER),
        Toggle("causal", "Causal"),
        Steps("step", "Access", start=4),
    ),
    compute=compute_tile_walk,
    draw=draw_tile_walk,
    describe=describe_tile_walk,
    insight_at={"block_m": 128},
)


# --- The roofline ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Device:
    """What a machine can do at most.

    Attributes:
        flops: Operations a second in matrix products of this precision.
        bandwidth: Bytes a second from its main memory.
        itemsize: Bytes a number.
        source: Where the two figures come from.
    """

    flops: float
    bandwidth: float
    itemsize: int
    source: str


THIS_MACHINE = "this machine"
DEVICES = {
    "T4": Device(65e12, 320e9, 2, "NVIDIA T4 datasheet, fp16"),
    "L4": Device(121e12, 300e9, 2, "NVIDIA L4 datasheet, dense bf16"),
    "A100 80 GB": Device(312e12, 2039e9, 2, "NVIDIA A100 datasheet, SXM, dense bf16"),
    "H100": Device(989e12, 3350e9, 2, "NVIDIA H100 datasheet, SXM, dense bf16"),
    "H200": Device(989e12, 4800e9, 2, "NVIDIA H200 datasheet, SXM, dense bf16"),
}
"""Peaks as their maker publishes them. Real kernels stay below both."""


@lru_cache(maxsize=1)
def measured_device() -> Device:
    """This machine in float32: its fastest matrix product and its fastest copy, a moment ago."""
    peak = roofline()
    return Device(peak.flops_per_second, peak.bytes_per_second, 4, "measured just now, float32")


@dataclass(frozen=True)
class Point:
    """One way to compute attention, as the roofline sees it.

    Attributes:
        name: What it is.
        flops: Operations for one head (one group of heads in generation).
        nbytes: Bytes from and to main memory, no cache assumed.
    """

    name: str
    flops: float
    nbytes: float

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.nbytes

    def seconds(self, device: Device) -> float:
        """The least time that the device's two limits allow."""
        return max(self.flops / device.flops, self.nbytes / device.bandwidth)


@dataclass(frozen=True)
class RooflineState:
    """Two ways to compute the same attention on one device."""

    device_name: str
    device: Device
    phase: str
    tokens: int
    head_dim: int
    block_m: int
    group: int
    naive: Point
    tiled: Point

    @property
    def ridge(self) -> float:
        """Operations a byte from which on arithmetic is the limit."""
        return self.device.flops / self.device.bandwidth


PREFILL, DECODE = "prefill: all tokens", "generation: one new token"


def attention_points(
    phase: str, tokens: int, head_dim: int, block_m: int, group: int, itemsize: int
) -> tuple[Point, Point]:
    """The naive and the tiled way, with bytes and operations counted for one head.

    Prefill: `tokens` queries meet `tokens` keys. Generation: one token's `group` query heads meet
    `tokens` cached keys that they share; the naive way first copies K and V for each of them.
    """
    if phase == PREFILL:
        flops = 4 * tokens * tokens * head_dim
        return (
            Point("three calls", flops, naive_bytes(tokens, head_dim, itemsize)),
            Point("tiled", flops, tiled_bytes(tokens, head_dim, itemsize, block_m)),
        )
    flops = 4 * group * tokens * head_dim
    rows, scores, cache = 2 * group * head_dim, 4 * group * tokens, 2 * tokens * head_dim
    # Repeating K and V reads the cache, writes a copy for each query head, and reads the copies.
    copies = 0 if group == 1 else cache + group * cache
    return (
        Point("three calls", flops, (rows + scores + copies + group * cache) * itemsize),
        Point("tiled", flops, (rows + cache) * itemsize),
    )


def compute_roofline(
    *, device: str, phase: str, tokens: int, head_dim: int, block_m: int, group: int
) -> RooflineState:
    """Count both ways and put them under the device's roof."""
    machine = measured_device() if device == THIS_MACHINE else DEVICES[device]
    points = attention_points(phase, tokens, head_dim, block_m, group, machine.itemsize)
    return RooflineState(device, machine, phase, tokens, head_dim, block_m, group, *points)


LEFT, RIGHT, TOP, BOTTOM = 48.0, 712.0, 34.0, 266.0
LOW, HIGH = -1.0, 4.0  # of the horizontal axis, powers of ten


def draw_roofline(state: RooflineState) -> Svg:
    """Attainable speed against operations a byte, both on logarithmic axes."""
    svg = Svg(740, 310, "Roofline: attainable speed against operations a byte")
    device = state.device
    ceiling = math.ceil(math.log10(device.flops) + 0.15)
    floor = ceiling - 5

    def x(intensity: float) -> float:
        return LEFT + (math.log10(intensity) - LOW) / (HIGH - LOW) * (RIGHT - LEFT)

    def y(speed: float) -> float:
        share = (math.log10(speed) - floor) / (ceiling - floor)
        return BOTTOM - max(0.0, share) * (BOTTOM - TOP)

    for power in range(int(LOW), int(HIGH) + 1):
        svg.line([(x(10**power), TOP), (x(10**power), BOTTOM)], stroke="grid", line=0.8)
        svg.text(
            x(10**power), BOTTOM + 17, f"{10**power:,g}", anchor="middle", fill="muted", size=12
        )
    for power in range(floor, ceiling + 1):
        svg.line([(LEFT, y(10**power)), (RIGHT, y(10**power))], stroke="grid", line=0.8)
        label = _speed(10**power).removesuffix("FLOP/s")
        svg.text(LEFT - 7, y(10**power) + 4, label, anchor="end", fill="muted", size=12)
    svg.text(RIGHT, BOTTOM + 36, "operations a byte (FLOP/byte)", anchor="end", size=12.5)
    svg.text(LEFT - 38, TOP - 16, "operations a second (FLOP/s), at best", size=12.5)

    start = max(10**LOW, 10**floor / device.bandwidth)
    ridge, roof = x(state.ridge), y(device.flops)
    low = (x(start), y(start * device.bandwidth))
    svg.line([low, (ridge, roof), (RIGHT, roof)], line=2.2)
    svg.line([(ridge, roof), (ridge, BOTTOM)], stroke="muted", dash="2 4")
    svg.text(ridge + 6, BOTTOM - 8, f"ridge {state.ridge:.0f}", fill="muted", size=12)
    svg.text(RIGHT - 4, roof - 8, "limit: arithmetic", anchor="end", fill="muted", size=12)
    svg.text(low[0] + 26, low[1] + 12, "limit: memory", fill="muted", size=12)

    for point, colour, side in ((state.naive, "orange", -1), (state.tiled, "blue", 1)):
        speed = point.flops / point.seconds(device)
        px, py = x(point.intensity), y(speed)
        svg.line([(px, py), (px, BOTTOM)], stroke=colour, line=1.2, dash="1 4")
        tip = (
            f"{point.name}: {point.intensity:.3g} operations a byte, "
            f"{bytes_text(point.nbytes)}, at best {_speed(speed)}"
        )
        if side < 0:
            svg.rect(px - 6, py - 6, 12, 12, fill=colour, stroke="paper", tip=tip)
        else:
            svg.circle(px, py, 7, fill=colour, stroke="paper", tip=tip)
        _point_label(svg, px, py, point, colour, side)
    return svg


def _point_label(svg: Svg, x: float, y: float, point: Point, colour: str, side: int) -> None:
    """Name and intensity of a point: above the roof for the naive one, below it for the tiled."""
    width = 104.0
    if side < 0:
        # Left of the point the roof is lower; at the edge of the picture there is room above only.
        left, base = (x - 12 - width, y - 26) if x - width > LEFT + 12 else (LEFT + 4, y - 66)
        base = max(base, 16)
        anchor, edge = ("end", left + width) if left > LEFT + 4 else ("start", left)
    else:
        left, base = min(x + 12, RIGHT - width), min(y + 22, BOTTOM - 30)
        anchor, edge = "start", left
    svg.rect(left, base - 13, width, 34, fill="paper", opacity=0.85)
    svg.text(edge, base, point.name, fill=colour, anchor=anchor, weight=650)
    text = f"{point.intensity:.3g} a byte"
    svg.text(edge, base + 16, text, fill=colour, anchor=anchor, size=12)


def _speed(flops: float) -> str:
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if flops >= size * 0.9995:
            return f"{flops / size:.3g} {unit}FLOP/s"
    return f"{flops:.3g} FLOP/s"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def describe_roofline(state: RooflineState) -> str:
    """The state in words."""
    naive, tiled = state.naive, state.tiled
    rows = state.block_m if state.phase == PREFILL else state.group
    bits = 8 * state.device.itemsize
    what = (
        f"{state.tokens:,} queries and keys"
        if state.phase == PREFILL
        else f"one new token, {counted(state.group, 'query head')} for {state.tokens:,} cached keys"
    )
    limit = "arithmetic" if tiled.intensity >= state.ridge else "memory"
    gain = naive.seconds(state.device) / tiled.seconds(state.device)
    verdict = f"is at best {gain:.2g} times as fast"
    if gain < 1.1:
        verdict = "saves nothing" if gain < 1.02 else "saves next to nothing"
    return (
        f"{state.device_name}, {bits} bits, {what}, head dimension {state.head_dim}. "
        f"The three calls move {bytes_text(naive.nbytes)} and do {naive.intensity:.3g} operations "
        f"a byte. Tiled, with {counted(rows, 'query row')} for each load of K and V, it is "
        f"{bytes_text(tiled.nbytes)} and {tiled.intensity:.3g} operations a byte; its limit is "
        f"{limit} (ridge at {state.ridge:.0f}), and it {verdict}: "
        f"{_time(naive.seconds(state.device))} against {_time(tiled.seconds(state.device))} a head."
    )


roofline_lab = Lab(
    name="roofline_lab",
    title="The one-number roofline",
    task=(
        "Set d = 128. Which BLOCK_M makes tiling useless? Then switch to generation: which control "
        "is left that moves the blue point?"
    ),
    insight=(
        "In 16 bits the tiled way does about as many operations a byte as there are query rows for "
        "each load of K and V: BLOCK_M in prefill, the group size in generation. The three calls "
        "do about d/2. So with d = 128 and BLOCK_M = 64 tiling saves nothing: tiling is not the "
        "idea, reuse is."
    ),
    controls=(
        Choice("device", "Device", options=(*DEVICES, THIS_MACHINE), start="A100 80 GB"),
        Choice("phase", "Phase", options=(PREFILL, DECODE), start=PREFILL),
        Slider("tokens", "Tokens N", values=(256, 1024, 4096, 8192, 32768, 131072), start=8192),
        Slider("head_dim", "Head dim d", values=(32, 64, 128, 256), start=64),
        Slider("block_m", "BLOCK_M", values=(16, 32, 64, 128, 256), start=128, unit=" rows"),
        Slider("group", "GQA group", values=(1, 2, 4, 8, 16), start=4, unit=" heads"),
    ),
    compute=compute_roofline,
    draw=draw_roofline,
    describe=describe_roofline,
    insight_at={"head_dim": 128, "block_m": 64},
)
