"""Figures that everyone can read."""

from __future__ import annotations

import base64
import io
import re
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from course_lib.notebook import palette
from course_lib.notebook.cards import Card
from course_lib.notebook.figures import (
    MOST_BYTES,
    STYLE_FILE,
    explore_card,
    figure_card,
    show,
    source,
    source_card,
    style,
)
from course_lib.runtime.tile import HAS_TRITON, tl, triton


def a_figure(**options: Any) -> Figure:
    fig, ax = plt.subplots(**options)
    ax.plot([1, 2, 3], label="a line")
    ax.legend()
    return fig


def png_of(card: Card) -> bytes:
    match = re.search(r"data:image/png;base64,([^\"]+)", card.html)
    assert match
    return base64.b64decode(match[1])


@pytest.mark.parametrize("alt", ["", "   ", "\n", None])
def test_empty_alternative_text_is_refused_with_the_reason(alt: Any) -> None:
    fig = a_figure()
    with pytest.raises(ValueError, match="screen reader"):
        figure_card(fig, alt)
    plt.close(fig)


def test_a_figure_is_a_figure_element_with_its_text() -> None:
    card = figure_card(a_figure(), 'It "rises"\nfrom 1 to 3.', "From `1` to *3*.")
    assert card.html.startswith("<figure")
    assert 'alt="It &quot;rises&quot;\nfrom 1 to 3."' in card.html
    assert "<figcaption>From <code>1</code> to <em>3</em>.</figcaption>" in card.html
    assert card.text == 'It "rises" from 1 to 3.'
    assert card._repr_mimebundle_()["text/plain"] == card.text


def test_a_figure_is_closed_once_shown() -> None:
    before = plt.get_fignums()
    figure_card(a_figure(), "a line")
    assert plt.get_fignums() == before


def test_a_figure_is_crisp_and_small() -> None:
    with style():
        card = figure_card(a_figure(), "a line")
    png = png_of(card)
    picture = Image.open(io.BytesIO(png))
    width = int(re.search(r'width="(\d+)"', card.html)[1])  # pyright: ignore
    assert picture.width == pytest.approx(2 * width, abs=1)
    assert len(png) < 30_000


def test_the_same_figure_gives_the_same_bytes() -> None:
    assert png_of(figure_card(a_figure(), "x")) == png_of(figure_card(a_figure(), "x"))


def test_a_dense_figure_still_fits_in_a_notebook() -> None:
    generator = np.random.default_rng(0)
    fig, axes = plt.subplots(1, 2, figsize=(8, 4))
    for ax in axes:
        ax.scatter(*generator.normal(size=(2, 4000)), c=generator.random(4000), s=8, alpha=0.5)
    assert len(png_of(figure_card(fig, "many points"))) <= MOST_BYTES


def test_a_figure_without_pyplot_works() -> None:
    fig = Figure(figsize=(3, 2))
    fig.subplots().plot([1, 2])
    assert png_of(figure_card(fig, "a line"))


def test_style_is_for_the_block_and_takes_changes() -> None:
    before = mpl.rcParams["axes.spines.top"], mpl.rcParams["font.size"]
    with style(font_size=20):
        assert mpl.rcParams["axes.spines.top"] is False
        assert mpl.rcParams["font.size"] == 20
    assert (mpl.rcParams["axes.spines.top"], mpl.rcParams["font.size"]) == before


def test_the_style_has_the_colours_of_the_palette() -> None:
    params = mpl.rc_params_from_file(STYLE_FILE, use_default_template=False)
    assert tuple(params["axes.prop_cycle"].by_key()["color"]) == palette.CYCLE
    assert params["grid.color"] == palette.GRID
    assert params["text.color"] == palette.INK
    assert params["axes.edgecolor"] == palette.MUTED


def test_show_displays_one_output(capsys: pytest.CaptureFixture[str]) -> None:
    # Without a notebook the text is what is left.
    show(a_figure(), alt="a line from 1 to 3")
    assert capsys.readouterr().out.strip() == "a line from 1 to 3"


def test_explore_carries_plotly_a_still_and_the_text_in_one_bundle() -> None:
    import plotly.graph_objects as go

    fig = go.Figure(go.Scatter(x=np.arange(3), y=np.arange(3)))
    bundle = explore_card(fig, a_figure(), "three points")._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "text/html", "text/plain"}
    spec = bundle["application/vnd.plotly.v1+json"]
    assert spec["layout"]["template"]["layout"]["colorway"] == list(palette.CYCLE)
    assert bundle["text/html"].startswith("<figure")
    assert bundle["text/plain"] == "three points"
    with pytest.raises(ValueError, match="alt"):
        explore_card(fig, a_figure(), "")


def test_source_shows_a_function_with_its_place() -> None:
    card = source_card(style)
    markdown = card._repr_mimebundle_()["text/markdown"]
    assert "`course_lib/notebook/figures.py`, lines " in markdown
    assert "```python\n@contextmanager\ndef style(" in markdown
    assert "def style(" in card.text
    assert "```" not in card.text


def test_source_shows_some_lines() -> None:
    card = source_card(style, lines=(2, 3))
    assert len(card.text.splitlines()) == 4
    with pytest.raises(ValueError, match="has lines 1 to"):
        source_card(style, lines=(2, 3000))
    with pytest.raises(TypeError, match="no Python source"):
        source(3)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_source_unwraps_kernels() -> None:
    @triton.jit
    def small_kernel(x_ptr, BLOCK: tl.constexpr):  # pyright: ignore
        tl.store(x_ptr, BLOCK)

    tuned = triton.heuristics({"BLOCK": lambda args: 1})(small_kernel)
    for kernel in (small_kernel, tuned):
        text = source_card(kernel).text
        assert "@triton.jit\ndef small_kernel" in text
