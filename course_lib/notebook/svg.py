"""A drawing made of a few SVG elements, which follows the theme of the page it stands on."""

from __future__ import annotations

from html import escape

from course_lib.notebook.palette import THEMED

FONT = "font-family: system-ui, -apple-system, 'Segoe UI', sans-serif"


class Svg:
    """A picture in user units, drawn back to front. Every method returns the picture itself.

    Colours are names of `palette.THEMED` ("ink", "blue", …).

    Args:
        width: Width in user units; the picture is scaled to its place.
        height: Height in user units.
        label: What a screen reader says for the picture as a whole.
    """

    def __init__(self, width: float, height: float, label: str) -> None:
        self.width, self.height, self.label = width, height, label
        self.parts: list[str] = []

    def rect(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "none",
        stroke: str = "none",
        opacity: float = 1.0,
        radius: float = 0.0,
        line: float = 1.0,
        tip: str = "",
    ) -> Svg:
        """A rectangle; `tip` shows on hover."""
        return self._add(
            f'<rect x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" '
            f'rx="{radius:.3g}" style="fill:{THEMED[fill]};stroke:{THEMED[stroke]};'
            f'stroke-width:{line:.3g};opacity:{opacity:.3g}">{_tip(tip)}</rect>'
        )

    def circle(
        self,
        x: float,
        y: float,
        r: float,
        *,
        fill: str = "ink",
        stroke: str = "none",
        tip: str = "",
    ) -> Svg:
        """A disc; `tip` shows on hover."""
        return self._add(
            f'<circle cx="{x:.4g}" cy="{y:.4g}" r="{r:.3g}" '
            f'style="fill:{THEMED[fill]};stroke:{THEMED[stroke]}">{_tip(tip)}</circle>'
        )

    def line(
        self,
        points: list[tuple[float, float]],
        *,
        stroke: str = "ink",
        line: float = 1.5,
        dash: str = "",
    ) -> Svg:
        """A line through the points; `dash` such as "4 3" so that lines differ without colour."""
        path = " ".join(f"{x:.4g},{y:.4g}" for x, y in points)
        return self._add(
            f'<polyline points="{path}" style="fill:none;stroke:{THEMED[stroke]};'
            f'stroke-width:{line:.3g};stroke-dasharray:{dash or "none"}"/>'
        )

    def text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float = 13,
        fill: str = "ink",
        anchor: str = "start",
        weight: int = 400,
        mono: bool = False,
    ) -> Svg:
        """Text whose baseline starts (or is centred, or ends) at the point."""
        family = "font-family: ui-monospace, 'DejaVu Sans Mono', monospace;" if mono else ""
        return self._add(
            f'<text x="{x:.4g}" y="{y:.4g}" text-anchor="{anchor}" '
            f'style="{family}fill:{THEMED[fill]};font-size:{size:.3g}px;font-weight:{weight}">'
            f"{escape(text)}</text>"
        )

    def _add(self, part: str) -> Svg:
        self.parts.append(part)
        return self

    def __str__(self) -> str:
        """The markup; standing alone it has a light background and light colours."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'role="img" aria-label="{escape(self.label, quote=True)}" '
            f'style="{FONT};max-width:100%;font-variant-numeric:tabular-nums">'
            + "".join(self.parts)
            + "</svg>"
        )


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""
