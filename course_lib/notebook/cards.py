"""The course's cards: one look, readable without it, and a stable plain text for each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from typing import Any


def _style_element() -> str:
    css = Path(__file__).with_name("cards.css").read_text(encoding="utf-8")
    css = re.sub(r"/\*.*?\*/", "", css, flags=re.DOTALL)
    return "<style>" + " ".join(css.split()) + "</style>"


CARD_STYLE = _style_element()
"""The style of every card. Each card carries it, so that any output can be shown on its own."""


@dataclass
class Card:
    """Something to show in a cell's output.

    Attributes:
        text: Its plain text. It is stable: the same in every run and on every machine.
        html: What a notebook shows instead.
        widget: A live widget that a running notebook shows instead of the HTML.
        extra: More representations by MIME type.
    """

    text: str
    html: str = ""
    widget: Any = field(default=None, repr=False)
    extra: dict[str, Any] = field(default_factory=dict, repr=False)

    def __repr__(self) -> str:
        return self.text

    def _repr_mimebundle_(self, **_kwargs: Any) -> dict[str, Any]:
        data: dict[str, Any] = {}
        if self.widget is not None:
            bundle = self.widget._repr_mimebundle_() or {}
            data.update(bundle[0] if isinstance(bundle, tuple) else bundle)
        data.update(self.extra)
        data["text/plain"] = self.text
        if self.html:
            data["text/html"] = self.html
        return data


def emit(card: Card, display_id: str | None = None) -> None:
    """Show a card here and now; with a `display_id`, it can be replaced later."""
    from IPython.display import display

    if display_id is None:
        display(card)
    else:
        display(card, display_id=display_id)


def header(word: str, title: str = "", aside: str = "", sign: str = "") -> str:
    """A card's first line. Everything is plain text and is escaped.

    Args:
        word: What kind of card, or the status, in its colour.
        title: What it is about.
        aside: A quiet remark at the right.
        sign: A sign before the word, which screen readers skip since the word says the same.
    """
    mark = f"<span aria-hidden='true'>{escape(sign)}</span> " if sign else ""
    # The colon parts the two where a front end drops the style of an untrusted notebook.
    colon = ":" if title else ""
    parts = [f"<span class='course-word'>{mark}{escape(word)}{colon}</span>"]
    if title:
        parts.append(f"<span class='course-title'>{escape(title)}</span>")
    if aside:
        parts.append(f"<span class='course-aside'>{escape(aside)}</span>")
    return f"<header>{' '.join(parts)}</header>"


def section(kind: str, *parts: str) -> str:
    """A card's markup.

    Args:
        kind: "passed", "failed", "todo", "hint", "predict", "outcome", … : the rule's colour.
        *parts: HTML.
    """
    return f"{CARD_STYLE}<section class='course-card course-{kind}'>{''.join(parts)}</section>"


def pairs(rows: list[tuple[str, str]], kind: str) -> str:
    """Labels and values, aligned. Values are HTML.

    Args:
        rows: (label, value).
        kind: "values" for data in fixed width, "advice" for sentences.
    """
    if not rows:
        return ""
    items = "".join(f"<dt>{escape(label)}</dt><dd>{value}</dd>" for label, value in rows)
    return f"<dl class='course-{kind}'>{items}</dl>"


@cache
def _markdown() -> Any:
    import mistune

    class Renderer(mistune.HTMLRenderer):
        def block_code(self, code: str, info: str | None = None) -> str:
            return highlight(code) if info == "python" else super().block_code(code, info)

    # Raw HTML in a text is shown as it stands. A formula stays as it is: JupyterLab sets it.
    return mistune.create_markdown(
        renderer=Renderer(escape=True), plugins=["strikethrough", "table", "math"]
    )


def block_markdown(text: str) -> str:
    """Markdown as HTML blocks. Raw HTML in the text is shown, not interpreted."""
    return str(_markdown()(text))


def inline_markdown(text: str) -> str:
    """Markdown as HTML without a paragraph around it; several paragraphs stay paragraphs."""
    html = block_markdown(text).strip()
    one = re.fullmatch(r"<p>(.*?)</p>", html, flags=re.DOTALL)
    return one[1] if one and "<p>" not in one[1] else html


def plain_markdown(text: str) -> str:
    """Markdown as one line of plain text: without backticks, emphasis and links' addresses."""
    text = re.sub(r"\[([^\]]+)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`([^`]*)`", r"\1", text)
    return " ".join(re.sub(r"(?<!\w)\*{1,2}([^*\s][^*]*)\*{1,2}(?!\w)", r"\1", text).split())


def highlight(code: str) -> str:
    """Python source as HTML, coloured by the theme of the page."""
    from pygments import highlight as colour
    from pygments.formatters import HtmlFormatter
    from pygments.lexers import PythonLexer

    spans = colour(code.strip("\n"), PythonLexer(stripnl=False), HtmlFormatter(nowrap=True))
    return f"<pre><code>{spans.rstrip()}</code></pre>"
