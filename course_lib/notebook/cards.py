"""The course's cards: one look, readable without it, and a stable plain text for each."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from html import escape
from typing import Any

CARD_STYLE = """<style>
.course-card {
  --course-ink: var(--jp-content-font-color1, var(--vscode-editor-foreground, var(--colab-primary-text-color, #1f2328)));
  --course-muted: var(--jp-content-font-color2, var(--vscode-descriptionForeground, #59636e));
  --course-line: var(--jp-border-color2, var(--vscode-widget-border, #d1d9e0));
  --course-paper: var(--jp-layout-color1, var(--vscode-editor-background, #fff));
  --course-tint: var(--jp-layout-color2, var(--vscode-textCodeBlock-background, #f3f5f7));
  --course-rule: var(--course-line);
  box-sizing: border-box; max-width: 46rem; margin: .5rem 0; padding: 1rem 1.35rem 1.1rem;
  color: var(--course-ink); background: var(--course-paper);
  border: 1px solid var(--course-line); border-left: 3px solid var(--course-rule);
  border-radius: 6px; font: 14px/1.55 var(--jp-content-font-family, system-ui, sans-serif);
  font-variant-numeric: tabular-nums;
}
</style>"""


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

    display(card, display_id=display_id) if display_id else display(card)


def section(status: str, header: str, body: str) -> str:
    """The markup of a card: style, header line and body."""
    return (
        f"{CARD_STYLE}<section class='course-card course-{status}'>"
        f"<header>{header}</header>{body}</section>"
    )


@cache
def _markdown() -> Any:
    import mistune

    return mistune.create_markdown(escape=True, plugins=["strikethrough", "table", "math"])


def block_markdown(text: str) -> str:
    """Markdown as HTML blocks. Raw HTML in the text is shown, not interpreted."""
    return str(_markdown()(text))


def inline_markdown(text: str) -> str:
    """Markdown as HTML without a paragraph around it, for the middle of a sentence."""
    html = block_markdown(text).strip()
    one = re.fullmatch(r"<p>(.*?)</p>", html, flags=re.DOTALL)
    return one[1] if one and "<p>" not in one[1] else html


__all__ = ["CARD_STYLE", "Card", "block_markdown", "emit", "escape", "inline_markdown", "section"]
