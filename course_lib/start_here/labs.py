"""The lab of chapter 00: which program owns what, and how many lanes own nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from course_lib.notebook.lab import Lab, Slider
from course_lib.notebook.svg import Svg

LEFT, TOP, WIDTH, HEIGHT = 24.0, 34.0, 690.0, 190.0


@dataclass(frozen=True)
class Tiling:
    """A matrix of `rows` × `columns` under tiles of `tile_rows` × `tile_columns`."""

    rows: int
    columns: int
    tile_rows: int
    tile_columns: int

    @property
    def grid(self) -> tuple[int, int]:
        """Programs along each axis: the launch grid."""
        return -(-self.rows // self.tile_rows), -(-self.columns // self.tile_columns)

    def name_of(self, m: int, n: int) -> str:
        """A program as its kernel knows it: a number, or a pair where the grid has two axes."""
        return f"({m}, {n})" if min(self.grid) > 1 else f"{m + n}"

    @property
    def programs(self) -> int:
        """Programs in the grid."""
        return self.grid[0] * self.grid[1]

    @property
    def lanes(self) -> int:
        """Lanes of all programs."""
        return self.programs * self.tile_rows * self.tile_columns

    @property
    def idle(self) -> int:
        """Lanes that stand for no element: the mask switches them off."""
        return self.lanes - self.rows * self.columns


def compute_tiling(*, rows: int, columns: int, tile_rows: int, tile_columns: int) -> Tiling:
    """Cut a matrix into tiles."""
    return Tiling(rows, columns, tile_rows, tile_columns)


def draw_tiling(state: Tiling) -> Svg:
    """Tiles with their program ids; the matrix has a bold frame, and lanes outside are orange."""
    grid_m, grid_n = state.grid
    height, width = grid_m * state.tile_rows, grid_n * state.tile_columns
    dx, dy = min(WIDTH / width, 44.0), min(HEIGHT / height, 44.0)
    svg = Svg(740, TOP + height * dy + 34, "Tiles over a matrix, each with its program id")
    for m in range(grid_m):
        for n in range(grid_n):
            _tile(svg, state, m, n, dx, dy)
    right, bottom = LEFT + state.columns * dx, TOP + state.rows * dy
    svg.rect(LEFT, TOP, right - LEFT, bottom - TOP, stroke="ink", line=2)
    svg.text(LEFT, TOP - 10, f"x, {state.rows} × {state.columns}", weight=650)
    below = TOP + height * dy + 22
    if state.idle:
        svg.rect(LEFT, below - 11, 14, 14, fill="orange", opacity=0.32)
        svg.text(LEFT + 22, below, f"{state.idle:,} masked lanes, outside the bold frame", size=12)
    else:
        svg.text(LEFT, below, "Every lane has an element: nothing to mask.", size=12)
    return svg


def _tile(svg: Svg, state: Tiling, m: int, n: int, dx: float, dy: float) -> None:
    """One tile: the part inside the matrix, the part outside, and the program's id."""
    top, left = m * state.tile_rows, n * state.tile_columns
    inside_m = min(state.tile_rows, state.rows - top)
    inside_n = min(state.tile_columns, state.columns - left)
    x, y = LEFT + left * dx, TOP + top * dy
    width, height = state.tile_columns * dx, state.tile_rows * dy
    inside_w, inside_h = inside_n * dx, inside_m * dy
    label = state.name_of(m, n)
    tip = f"program {label}: {inside_m * inside_n} elements"
    if inside_w < width or inside_h < height:
        svg.rect(x, y, width, height, fill="paper", tip=tip)
        svg.rect(x, y, width, height, fill="orange", opacity=0.32, tip=tip)
        svg.rect(x, y, inside_w, inside_h, fill="paper", tip=tip)
    shade = 0.42 if (m + n) % 2 == 0 else 0.2
    svg.rect(x, y, inside_w, inside_h, fill="blue", opacity=shade, tip=tip)
    svg.rect(x, y, width, height, stroke="muted", line=0.8)
    size = min(13.0, height - 2, 1.6 * width / len(label))
    if size < 7:
        return
    # Beside the matrix's edge, not on it.
    roomy = inside_w > 0.7 * size * len(label), inside_h > 1.3 * size
    middle = x + (inside_w / 2 if roomy[0] else (inside_w + width) / 2)
    base = y + (inside_h / 2 if roomy[1] else (inside_h + height) / 2) + size / 3
    svg.text(middle, base, label, anchor="middle", size=size, mono=True)


def describe_tiling(state: Tiling) -> str:
    """The state in words."""
    grid_m, grid_n = state.grid
    share = 100 * state.idle / state.lanes
    grid = f"{grid_m} × {grid_n}, which is" if min(state.grid) > 1 else "one axis:"
    programs = "1 program" if state.programs == 1 else f"{state.programs:,} programs"
    return (
        f"A matrix of {state.rows} × {state.columns} in tiles of {state.tile_rows} × "
        f"{state.tile_columns} needs a grid of {grid} {programs} "
        f"with {state.lanes:,} lanes. {state.idle:,} lanes ({share:.0f} %) stand for no "
        f"element and are masked."
    )


who_owns_what = Lab(
    name="who_owns_what",
    title="Which program owns what",
    task=(
        "Half of the lanes do nothing here. Leave the matrix as it is, and bring them below 10 % "
        "with the tiles alone."
    ),
    insight=(
        "A tile is paid for whole, whether its lanes have elements or not, and a matrix just wider "
        "than a multiple of the tile is the dearest. Small tiles waste few lanes; rung 5 shows "
        "what they cost instead."
    ),
    controls=(
        Slider("rows", "Rows of x", values=(1, 2, 3, 5, 7, 8, 16, 17, 19, 30), start=17),
        Slider(
            "columns", "Columns of x", values=(1, 3, 7, 8, 16, 20, 33, 35, 64, 100, 128), start=33
        ),
        Slider("tile_rows", "BLOCK_M", values=(1, 2, 4, 8, 16), start=8),
        Slider("tile_columns", "BLOCK_N", values=(4, 8, 16, 32, 64, 128), start=16),
    ),
    compute=compute_tiling,
    draw=draw_tiling,
    describe=describe_tiling,
    insight_at={"tile_rows": 1, "tile_columns": 4},
)

# For each rung: what stands above the lab, what to find out in it, and where it opens.
RUNGS: dict[int, tuple[str, str, str, dict[str, int]]] = {
    1: (
        "Rung 1: a program owns a piece of a vector",
        "Find a BLOCK_N for which 100 elements need no mask at all.",
        "BLOCK_N = 4 divides 100, and needs 25 programs of four lanes. A GPU works with 32 lanes "
        "at a time, so the mask is the better bargain.",
        {"rows": 1, "columns": 100, "tile_rows": 1, "tile_columns": 64},
    ),
    2: (
        "Rung 2: a program owns a row",
        "Widen the rows to 16. What becomes of the grid while BLOCK_N stays 8?",
        "Two programs would share a row, and neither could sum it alone: BLOCK_N must be at least "
        "the width of a row, or the program must loop.",
        {"rows": 5, "columns": 7, "tile_rows": 1, "tile_columns": 8},
    ),
    3: (
        "Rung 3: a program owns a row, and reads it once",
        "How many of the 128 lanes of each program hold -inf here?",
        "28 of 128. They cost time as the others do, and exp(-inf) = 0 keeps them out of the sum.",
        {"rows": 3, "columns": 100, "tile_rows": 1, "tile_columns": 128},
    ),
    4: (
        "Rung 4: a program owns a tile",
        "Which program owns the fewest elements, and how many?",
        "Program (2, 2) in the corner: 3 rows and 3 columns, 9 elements for 128 lanes.",
        {"rows": 19, "columns": 35, "tile_rows": 8, "tile_columns": 16},
    ),
}


def rung(number: int) -> Any:
    """Show the lab at one of the rungs 1 to 4."""
    title, task, insight, values = RUNGS[number]
    name = f"rung_{number}"
    return replace(who_owns_what, name=name, title=title, task=task, insight=insight)(**values)
