"""Predict before you look; recall before you forget.

A chapter's questions stand in `course_lib/<chapter>/questions.py`: `PREDICT` is asked before the
chapter's results, `RECALL` in later chapters and by `course review`. Run-all never waits for an
answer, and nothing here is graded.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from course_lib.grading import progress
from course_lib.notebook.cards import (
    Card,
    block_markdown,
    emit,
    header,
    inline_markdown,
    pairs,
    section,
)
from course_lib.notebook.question import (
    Asked,
    Numbers,
    Question,
    UnknownQuestionError,
    find_question,
    number_text,
    questions_of,
)
from course_lib.notebook.question_view import question_view
from course_lib.notebook.review import review

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Numbers",
    "Question",
    "UnknownQuestionError",
    "find_question",
    "predict",
    "questions_of",
    "recall",
    "reveal",
    "review",
]


def predict(name: str) -> None:
    """Show a prediction: the learner commits to a choice or a number before the result.

    Args:
        name: The question's name in this chapter's `PREDICT`.

    Raises:
        UnknownQuestionError: If there is none.
    """
    emit(predict_card(find_question(name)))


def predict_card(question: Question) -> Card:
    """The card that `predict` shows: a widget, with a static form and a stable text."""
    asked = question.ask()
    lines = [f"Predict: {asked.prompt}"]
    static = block_markdown(asked.prompt)
    if question.choices is not None:
        lines += [f"  {letter}) {text}" for letter, text in question.choices.items()]
        items = "".join(
            f"<li><b>{escape(letter)})</b> {inline_markdown(text)}</li>"
            for letter, text in question.choices.items()
        )
        static += f"<ul class='course-choices'>{items}</ul>"
    static += "<p class='course-quiet'>Commit to an answer before you read on.</p>"
    return Card(
        "\n".join(lines), section("predict", header("Predict"), static), _predict_widget(asked)
    )


def _predict_widget(asked: Asked) -> Any:
    question = asked.question

    def committed(_index: int, answer: Any) -> str:
        progress.record_prediction(question.id, str(answer))
        _refresh_outcome(question.id)
        return f"You predicted **{asked.says(answer)}**. Now open the outcome below."

    before = _stored(asked, progress.last_prediction(question.id))
    note = ""
    if before is not None:
        note = (
            f"Last time you predicted **{asked.says(before)}**. You can commit to another answer."
        )
    return question_view("predict", "Predict", "Commit", [asked], committed, note)


def _stored(asked: Asked, predicted: str | None) -> Any:
    """A stored prediction as an answer; None where there is none to this form of the question."""
    try:
        return asked.read(predicted) if predicted is not None else None
    except ValueError:
        return None


def reveal(
    name: str,
    measured: str | float | Mapping[str, Any],
    figure: Figure | None = None,
    alt: str | None = None,
) -> None:
    """Show the outcome of a prediction, folded, so that a built notebook does not tell it.

    If the learner commits after this cell ran (run-all never waits), the outcome is rewritten
    with the reply to their prediction.

    Args:
        name: The question's name.
        measured: What this notebook measured: a number in the question's unit, a sentence, or
            several of them by label. Round it, so that the text is the same on every machine.
        figure: A matplotlib figure to show inside. It is closed.
        alt: What the figure shows.

    Raises:
        UnknownQuestionError: If there is no such question.
        ValueError: If a figure comes without alternative text.
    """
    question = find_question(name)
    picture = ""
    if figure is not None:
        from course_lib.notebook.figures import figure_html

        picture = figure_html(figure, alt or "")
    _outcomes[question.id] = (question, measured, picture)
    emit(_outcome_now(question.id), display_id=_outcome_display(question.id))


# What each outcome of this process showed, so that a later prediction can be answered in it.
_outcomes: dict[str, tuple[Question, Any, str]] = {}


def _outcome_display(question_id: str) -> str:
    return f"course-outcome-{question_id}"


def _outcome_now(question_id: str) -> Card:
    question, measured, picture = _outcomes[question_id]
    return outcome_card(question, measured, progress.last_prediction(question_id), picture)


def _refresh_outcome(question_id: str) -> None:
    if question_id in _outcomes:
        from IPython.display import update_display

        update_display(_outcome_now(question_id), display_id=_outcome_display(question_id))


def outcome_card(
    question: Question, measured: Any, predicted: str | None, picture: str = ""
) -> Card:
    """The card that `reveal` shows. Its plain text does not depend on what was predicted."""
    asked = question.ask()
    if isinstance(measured, Mapping):
        rows = {str(label): _with_unit(value, question) for label, value in measured.items()}
    else:
        rows = {"Measured": _with_unit(measured, question)}
    table = pairs([(label, inline_markdown(value)) for label, value in rows.items()], "measured")
    if question.choices is None and isinstance(measured, int | float):
        asked = Asked(question, asked.prompt, float(measured), asked.reply)
    body = (
        f"<details><summary>Outcome</summary>{table}"
        f"{_answer_to(asked, predicted)}{picture}</details>"
    )
    text = "; ".join(f"{label}: {value}" for label, value in rows.items())
    return Card(f"Outcome. {text}", section("outcome", body))


def _answer_to(asked: Asked, predicted: str | None) -> str:
    """The part of an outcome that speaks to the learner."""
    question = asked.question
    answer = _stored(asked, predicted)
    if answer is not None:
        right = asked.is_right(answer)
        verdict = "That is what happened." if right else _how_far(asked, answer)
        yours = f"<p><b>You predicted</b> {inline_markdown(asked.says(answer))}. {verdict}</p>"
        return yours + block_markdown(asked.reply_to(answer))
    if question.choices is None:
        return block_markdown(asked.reply)
    lines = f"<p><b>The answer</b> {inline_markdown(asked.answer_text)}</p>"
    lines += block_markdown(asked.reply)
    items = "".join(
        f"<li><b>{escape(letter)})</b> {inline_markdown(text)}</li>"
        for letter, text in question.replies.items()
    )
    return f"{lines}<p>If you chose otherwise:</p><ul class='course-choices'>{items}</ul>"


def _how_far(asked: Asked, answer: Any) -> str:
    if asked.question.choices is not None:
        return f"The answer is {inline_markdown(asked.answer_text)}."
    want = asked.answer
    if want * answer > 0:
        ratio = max(want / answer, answer / want)
        if ratio >= 2:
            return f"That is off by a factor of {ratio:,.3g}."
        side = "too low" if abs(answer) < abs(want) else "too high"
        return f"That is {abs(answer / want - 1):.0%} {side}."
    return f"The answer is {escape(asked.answer_text)}."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _with_unit(value: Any, question: Question) -> str:
    if not _is_number(value):
        return str(value)
    return f"{number_text(value)} {question.unit}".strip()


def recall(chapter: str, count: int = 3) -> None:
    """Ask questions from earlier chapters, with fresh numbers and an immediate reply.

    Args:
        chapter: The chapter that they open.
        count: How many, at most.

    Raises:
        UnknownExerciseError: If there is no such chapter.
    """
    emit(recall_card(chapter, count))


def recall_questions(chapter: str, count: int = 3) -> list[Question]:
    """The questions that open a chapter: always the same ones, from as many chapters as can be."""
    from course_lib.grading.exercise import chapter_of, chapters

    slug = chapter_of(chapter).slug
    earlier = [each.package for each in chapters() if each.slug < slug]
    rng = random.Random(chapter)
    piles = []
    for package in reversed(earlier):
        pile = list(questions_of(package, "RECALL"))
        rng.shuffle(pile)
        piles.append(pile)
    chosen: list[Question] = []
    while len(chosen) < count and any(piles):
        chosen += [pile.pop() for pile in piles if pile]
    return chosen[:count]


def recall_card(chapter: str, count: int = 3) -> Card:
    """The card that `recall` shows. Its static form has the same numbers in every build."""
    chosen = recall_questions(chapter, count)
    if not chosen:
        text = "Nothing to recall yet: this is where the course begins."
        return Card(text, section("recall", header("Recall"), f"<p>{text}</p>"))
    lines, static = ["Recall"], ""
    for number, question in enumerate(chosen, start=1):
        asked = question.ask()
        lines.append(f"  {number}. {asked.prompt}")
        static += f"<div class='course-question'>{block_markdown(asked.prompt)}"
        if question.choices is not None:
            lines += [f"     {letter}) {text}" for letter, text in question.choices.items()]
            static += "".join(
                f"<p>{escape(letter)}) {inline_markdown(text)}</p>"
                for letter, text in question.choices.items()
            )
        static += (
            f"<details><summary>Answer</summary><p><b>{inline_markdown(asked.answer_text)}</b></p>"
            f"{block_markdown(asked.reply)}</details></div>"
        )
    return Card(
        "\n".join(lines), section("recall", header("Recall"), static), _recall_widget(chosen)
    )


def _recall_widget(chosen: Sequence[Question]) -> Any:
    rng = random.SystemRandom()
    asked = [question.ask(rng) for question in chosen]
    recorded: set[int] = set()

    def answered(index: int, answer: Any) -> str:
        right = asked[index].is_right(answer)
        if index not in recorded:
            # Only the first answer says what was remembered.
            recorded.add(index)
            progress.record_recall(asked[index].question.id, right)
        return asked[index].remark(answer)

    return question_view("recall", "Recall", "Answer", asked, answered)
