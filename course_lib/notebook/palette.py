"""The course's colours: Okabe and Ito's colour-blind-safe set, darkened for text-sized marks.

Nothing in the course is told by colour alone. In a lab's picture a colour is a CSS variable with
one of these as its fallback, so that the picture follows JupyterLab's light or dark theme.
"""

INK = "#1f2328"
MUTED = "#59636e"
GRID = "#d1d9e0"
PAPER = "#ffffff"
BLUE = "#0067a5"
ORANGE = "#c45500"
GREEN = "#00795a"
RED = "#b3261e"
PURPLE = "#8a4b94"
SKY = "#3d9bd1"

CYCLE = (BLUE, ORANGE, GREEN, PURPLE, SKY, RED)

THEMED = {
    "ink": f"var(--course-ink, {INK})",
    "muted": f"var(--course-muted, {MUTED})",
    "grid": f"var(--course-grid, {GRID})",
    "paper": f"var(--course-paper, {PAPER})",
    "blue": f"var(--course-blue, {BLUE})",
    "orange": f"var(--course-orange, {ORANGE})",
    "green": f"var(--course-green, {GREEN})",
    "red": f"var(--course-red, {RED})",
    "purple": f"var(--course-purple, {PURPLE})",
    "sky": f"var(--course-sky, {SKY})",
    "none": "none",
}
"""Colours by name for `Svg`: each follows the theme, and falls back to the light one."""
