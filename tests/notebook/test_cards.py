"""Cards: safe markup, one style, a stable text."""

from __future__ import annotations

import re

import pytest

from course_lib.notebook.cards import (
    CARD_STYLE,
    Card,
    block_markdown,
    header,
    highlight,
    inline_markdown,
    pairs,
    plain_markdown,
    section,
)


def test_the_style_is_one_element_and_asks_nothing_from_outside() -> None:
    assert CARD_STYLE.startswith("<style>")
    assert CARD_STYLE.endswith("</style>")
    assert CARD_STYLE.count("<") == 2
    assert "http" not in CARD_STYLE
    assert "@import" not in CARD_STYLE
    assert len(CARD_STYLE) < 9_000
    assert CARD_STYLE.count("{") == CARD_STYLE.count("}")


@pytest.mark.parametrize("status", ["passed", "failed", "hint", "outcome", "predict", "recall"])
def test_the_style_knows_every_kind_of_card(status: str) -> None:
    assert re.search(rf"\.course-{status}\b", CARD_STYLE)


def test_raw_html_in_a_text_is_shown_and_not_interpreted() -> None:
    html = block_markdown("a <script>alert(1)</script> b\n\n<img src=x onerror=alert(1)>")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;script&gt;" in html


def test_a_link_cannot_run_a_script() -> None:
    assert "javascript:" not in inline_markdown("[x](javascript:alert(1))").lower()


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("`exp(x)` is *large*", "<code>exp(x)</code> is <em>large</em>"),
        ("**Next.** a < b", "<strong>Next.</strong> a &lt; b"),
        ("", ""),
    ],
)
def test_inline_markdown(text: str, html: str) -> None:
    assert inline_markdown(text) == html


def test_inline_markdown_keeps_several_paragraphs() -> None:
    assert inline_markdown("one\n\ntwo").count("<p>") == 2


def test_a_formula_stays_a_formula() -> None:
    assert "_i" in inline_markdown(r"the sum $\sum_i p_i x_i$ is")
    assert "<em>" not in inline_markdown(r"$a_i b_i$ and *not*".replace("*", ""))


def test_python_in_a_fence_is_coloured_and_the_rest_is_not() -> None:
    assert "<span" in block_markdown("```python\nfor x in y: pass\n```")
    assert "<span" not in block_markdown("```\nfor x in y: pass\n```")
    assert "&lt;b&gt;" in highlight("x = '<b>'")


def test_plain_markdown() -> None:
    assert plain_markdown("**a** `out.copy_(x)`: *b* 2*3*4") == "a out.copy_(x): b 2*3*4"
    assert plain_markdown("see [the chapter](../x.ipynb)") == "see the chapter"


def test_parts_escape_what_they_are_given() -> None:
    assert "<b>" not in header("<b>", "<b>", "<b>", "<b>")
    assert "<b>" not in pairs([("<b>", "")], "values")
    assert pairs([], "values") == ""
    assert section("failed", "x").endswith("<section class='course-card course-failed'>x</section>")


def test_a_card_always_has_a_plain_text() -> None:
    bundle = Card("text", "<p>html</p>", extra={"image/png": "…"})._repr_mimebundle_()
    assert bundle == {"text/plain": "text", "text/html": "<p>html</p>", "image/png": "…"}
    assert "text/html" not in Card("text")._repr_mimebundle_()
    assert repr(Card("text")) == "text"
