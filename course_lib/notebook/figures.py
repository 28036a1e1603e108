"""Figures that everyone can read: with alternative text, in either theme, without a live kernel."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_lib.notebook.cards import Card, emit, inline_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("course.mplstyle")
MOST_BYTES = 60_000
"""A picture's size in a notebook, at most where it can be: 1.5 MB hold a chapter."""

# (pixels per figure pixel, colours), best first. The first that fits is taken.
_QUALITIES = ((2.0, 256), (2.0, 32), (1.0, 64), (1.0, 16))
_PAPER = (
    "margin:.5rem 0;padding:12px 14px;max-width:760px;box-sizing:border-box;"
    "background:#ffffff;color:#1f2328;border:1px solid #d1d9e0;border-radius:6px"
)


def use_style() -> None:
    """Make the course's style the default of matplotlib in this process."""
    import matplotlib as mpl

    mpl.rcParams.update(mpl.rc_params_from_file(STYLE_FILE, use_default_template=False))


@contextmanager
def style(**changes: Any) -> Iterator[None]:
    """The course's style inside a `with` block.

    Args:
        **changes: Further rcParams, with `_` for the dots that Python does not allow.
    """
    import matplotlib as mpl

    named = {key.replace(".", "_"): key for key in mpl.rcParams}
    extra: Any = {named.get(key, key): value for key, value in changes.items()}
    with mpl.rc_context(fname=STYLE_FILE, rc=extra):
        yield


def show(fig: Figure, alt: str, caption: str = "") -> None:
    """Show a matplotlib figure, with a text for those who cannot see it, and close it.

    Args:
        fig: The figure.
        alt: What the figure shows, in a sentence or two: the finding, not "a plot of x and y".
        caption: A line of Markdown below it.

    Raises:
        ValueError: If `alt` is empty.
    """
    emit(figure_card(fig, alt, caption))


def figure_card(fig: Figure, alt: str, caption: str = "") -> Card:
    """The card that `show` shows."""
    return Card(_said(alt), figure_html(fig, alt, caption))


def figure_html(fig: Figure, alt: str, caption: str = "") -> str:
    """A figure as `<figure><img alt>`, and close it. See `show`."""
    _said(alt)
    png, width = _png(fig)
    _close(fig)
    below = f"<figcaption>{inline_markdown(caption)}</figcaption>" if caption else ""
    data = base64.b64encode(png).decode()
    return (
        f'<figure class="course-figure" style="{_PAPER}"><img alt="{escape(alt, quote=True)}" '
        f'width="{width}" style="max-width:100%;height:auto;display:block" '
        f'src="data:image/png;base64,{data}">{below}</figure>'
    )


def explore(fig: Any, still: Figure, alt: str) -> None:
    """Show a plotly figure to move about in, with a still picture where plotly cannot run.

    One output carries both. JupyterLab and VS Code show the plotly figure, which needs no kernel
    and no network; GitHub, Colab, nbconvert and a screen reader get the still and its text.

    Args:
        fig: The plotly figure.
        still: The same picture from matplotlib. It is closed.
        alt: What it shows, in a sentence or two.

    Raises:
        ValueError: If `alt` is empty.
    """
    emit(explore_card(fig, still, alt))


def explore_card(fig: Any, still: Figure, alt: str) -> Card:
    """The card that `explore` shows."""
    import plotly.graph_objects as go

    styled = go.Figure(fig)
    # Assigned, since an update would merge it into plotly's own template.
    styled.layout.template = _plotly_template()
    spec = json.loads(styled.to_json() or "{}")
    spec["config"] = {"displaylogo": False, "responsive": True}
    return Card(_said(alt), figure_html(still, alt), extra={"application/vnd.plotly.v1+json": spec})


def _plotly_template() -> dict[str, Any]:
    """The course's style for plotly; like the stills it is a light card in either theme."""
    from course_lib.notebook.palette import CYCLE, GRID, INK, MUTED, PAPER

    axis = {"gridcolor": GRID, "linecolor": MUTED, "showline": True, "zeroline": False}
    return {
        "layout": {
            "colorway": list(CYCLE),
            "font": {"color": INK, "family": "system-ui, sans-serif", "size": 13},
            "height": 380,
            "hovermode": "closest",
            "margin": {"l": 64, "r": 24, "t": 48, "b": 52},
            "paper_bgcolor": PAPER,
            "plot_bgcolor": PAPER,
            "title": {"x": 0.02, "font": {"size": 15}},
            "xaxis": axis,
            "yaxis": axis,
        }
    }


def source(obj: Any, lines: tuple[int, int] | None = None) -> None:
    """Show the source of a function, class or kernel of the course.

    Args:
        obj: The object; kernels and their autotuned or heuristic wrappers are unwrapped.
        lines: First and last line to show, counted from the object's first line as 1.

    Raises:
        TypeError: If it has no Python source.
        ValueError: If the lines are not in it.
    """
    emit(source_card(obj, lines))


def source_card(obj: Any, lines: tuple[int, int] | None = None) -> Card:
    """The card that `source` shows. It is Markdown: every front end colours it in its own theme."""
    import inspect
    import textwrap

    target = inspect.unwrap(obj)
    while hasattr(target, "fn") and not inspect.isroutine(target):
        target = target.fn
    try:
        code, first = inspect.getsourcelines(target)
        where = inspect.getsourcefile(target) or ""
    except (TypeError, OSError) as error:
        raise TypeError(f"{obj!r} has no Python source to show.") from error
    if lines is not None:
        start, stop = lines
        if not 1 <= start <= stop <= len(code):
            raise ValueError(f"lines={lines}: {target.__name__} has lines 1 to {len(code)}.")
        code, first = code[start - 1 : stop], first + start - 1
    text = textwrap.dedent("".join(code)).rstrip()
    place = f"{_short(where)}, lines {first}–{first + len(code) - 1}"
    markdown = f"`{_short(where)}`, lines {first}–{first + len(code) - 1}\n\n```python\n{text}\n```"
    return Card(f"{place}\n\n{text}", extra={"text/markdown": markdown})


def _short(path: str) -> str:
    parts = Path(path).parts
    return (
        "/".join(parts[parts.index("course_lib") :]) if "course_lib" in parts else Path(path).name
    )


def _said(alt: str) -> str:
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(
            "alt is empty. Say in a sentence what the figure shows: a screen reader reads it in "
            "the figure's place, and it is what remains where pictures are not loaded."
        )
    return " ".join(alt.split())


def _close(fig: Figure) -> None:
    import sys

    # A figure made without pyplot has nothing to close, and must not cause its import.
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close(fig)


def _png(fig: Figure) -> tuple[bytes, int]:
    """A PNG small enough for a notebook, and the width at which to show it (CSS pixels)."""
    from PIL import Image

    png, width = b"", 0
    rendered: dict[float, Any] = {}
    for scale, colours in _QUALITIES:
        if scale not in rendered:
            buffer = io.BytesIO()
            # No software name: the same figure gives the same bytes under another matplotlib.
            fig.savefig(
                buffer,
                format="png",
                dpi=100 * scale,
                bbox_inches="tight",
                pad_inches=0.04,
                metadata={"Software": None},
            )
            rendered[scale] = Image.open(buffer).convert("RGB")
        picture = rendered[scale]
        buffer = io.BytesIO()
        picture.quantize(colours, dither=Image.Dither.NONE).save(
            buffer, format="PNG", optimize=True
        )
        png, width = buffer.getvalue(), round(picture.width / scale)
        if len(png) <= MOST_BYTES:
            break
    return png, width
