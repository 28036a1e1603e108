"""A live card of questions: real form elements, and replies that a screen reader announces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from course_lib.notebook.cards import block_markdown, inline_markdown
from course_lib.notebook.question import Asked

HERE = Path(__file__).parent
Answered = Callable[[int, Any], str]

_VIEW: type | None = None


def question_view(
    kind: str, title: str, verb: str, asked: Sequence[Asked], answered: Answered, note: str = ""
) -> Any:
    """A widget that asks questions.

    Args:
        kind: "predict" or "recall": the card's colour.
        title: The card's heading.
        verb: What the button says.
        asked: The questions.
        answered: Gets the question's index and the answer that was read; gives the reply in
            Markdown. An answer that cannot be read is replied to without it.
        note: Stands where the first question's reply will be; Markdown.

    Returns:
        The widget; None where there is no widget library.
    """
    global _VIEW
    if _VIEW is None:
        try:
            _VIEW = _make_view_class()
        except ImportError:
            return None
    spec = {"kind": kind, "title": title, "verb": verb, "questions": [_spec(a) for a in asked]}
    replies = [inline_markdown(note) if note else ""] + [""] * (len(asked) - 1)
    return _VIEW(list(asked), answered, spec=spec, replies=replies)


def _spec(asked: Asked) -> dict[str, Any]:
    choices = asked.question.choices or {}
    return {
        "prompt": block_markdown(asked.prompt),
        "choices": [[letter, inline_markdown(text)] for letter, text in choices.items()],
        "unit": asked.question.unit,
    }


def _make_view_class() -> type:
    import anywidget
    import traitlets

    class QuestionView(anywidget.AnyWidget):
        """Questions on a page. `replies` holds the HTML that stands below each of them."""

        _esm = HERE / "question_view.js"
        _css = HERE / "cards.css"
        spec = traitlets.Dict().tag(sync=True)
        replies = traitlets.List().tag(sync=True)

        def __init__(self, asked: list[Asked], answered: Answered, **traits: Any) -> None:
            self._asked, self._answered = asked, answered
            super().__init__(**traits)
            self.on_msg(lambda _view, message, _buffers: self.answer(**message))

        def answer(self, index: int, value: Any) -> None:
            """Take what was typed or chosen for one question, and reply."""
            try:
                reply = self._answered(index, self._asked[index].read(value))
            except ValueError as error:
                reply = str(error)
            replies = list(self.replies)
            replies[index] = inline_markdown(reply)
            self.replies = replies

    return QuestionView
