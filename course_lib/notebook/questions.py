"""Predict before you look; recall before you forget.

A chapter's questions stand in `course_lib/<chapter>/questions.py`: `PREDICT` is asked before the
chapter's results, `RECALL` in later chapters and by `course review`. Run-all never waits for an
answer, and nothing here is graded.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from html import escape
from typing import TYPE_CHECKING, Any

from course_lib.grading import progress
from course_lib.notebook.cards import (
    CARD_STYLE,
    Card,
    block_markdown,
    emit,
    header,
    inline_markdown,
    pairs,
    plain_markdown,
    section,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DAY = 86_400.0
REVIEW_AFTER = (1 * DAY, 7 * DAY, 30 * DAY)
"""Seconds until a question comes back, after its first, second and third right answer in a row."""

Numbers = dict[str, Any]


class UnknownQuestionError(LookupError):
    """No question has the name that was given."""


@dataclass(frozen=True)
class Question:
    """A question with a number or a letter as its answer.

    Attributes:
        id: "chapter.name".
        prompt: Markdown. With `numbers`, a format string over their names.
        answer: The letter, the number, or a function of the drawn numbers.
        choices: Letter and text; None where the answer is a number.
        replies: For each wrong letter, two sentences to who chose it. For a number, "low" and
            "high" where there is something to say about that side.
        unit: Follows the number ("ms", "MB").
        tolerance: Largest relative error of a right number.
        numbers: Draws fresh numbers.
        reply: Why the answer is what it is, for everyone. With `numbers`, a format string over
            their names and `answer`.
    """

    id: str
    prompt: str
    answer: Any
    choices: Mapping[str, str] | None = None
    replies: Mapping[str, str] = field(default_factory=dict)
    unit: str = ""
    tolerance: float = 0.02
    numbers: Callable[[random.Random], Numbers] | None = None
    reply: str = ""

    def __post_init__(self) -> None:
        if "." not in self.id:
            raise ValueError(f"The id {self.id!r} must be 'chapter.name'.")
        if self.choices is not None:
            wrong = [letter for letter in self.choices if letter != self.answer]
            missing = [letter for letter in wrong if not self.replies.get(letter)]
            if not callable(self.answer) and self.answer not in self.choices:
                raise ValueError(f"{self.id}: the answer {self.answer!r} is none of the choices.")
            if missing and not callable(self.answer):
                raise ValueError(f"{self.id}: the choices {missing} have no reply.")

    @property
    def chapter(self) -> str:
        """The chapter's package name."""
        return self.id.split(".")[0]

    @property
    def name(self) -> str:
        """The id without its chapter."""
        return self.id.split(".")[1]

    def ask(self, rng: random.Random | None = None) -> Asked:
        """The question with its numbers drawn. Without a generator they are always the same."""
        numbers = self.numbers(rng or random.Random(self.id)) if self.numbers else {}
        answer = self.answer(**numbers) if callable(self.answer) else self.answer
        prompt, reply = self.prompt, self.reply
        if self.numbers:
            prompt = prompt.format(**numbers)
            reply = reply.format(**numbers, answer=_number_text(answer))
        return Asked(self, prompt, answer, reply)


@dataclass(frozen=True)
class Asked:
    """A question as it is put to someone: its numbers are drawn."""

    question: Question
    prompt: str
    answer: Any
    reply: str

    @property
    def answer_text(self) -> str:
        """The right answer in words."""
        return self.says(self.answer)

    def says(self, answer: Any) -> str:
        """An answer in words: the choice's text, or the number with its unit."""
        if self.question.choices is not None:
            return f"{answer}) {self.question.choices[answer]}"
        return f"{_number_text(answer)} {self.question.unit}".strip()

    def read(self, typed: Any) -> Any:
        """What someone typed, as a letter or a number.

        Raises:
            ValueError: If it is neither; the message says what is wanted.
        """
        text = str(typed).strip() if typed is not None else ""
        if self.question.choices is not None:
            letter = text.lower().rstrip(").")
            if letter not in self.question.choices:
                raise ValueError(f"Choose one of {', '.join(self.question.choices)}.")
            return letter
        unit = self.question.unit
        text = text.removesuffix(unit).strip() if unit else text
        text = text.replace(",", "").replace("_", "").replace(" ", "")
        try:
            return float(Fraction(text)) if "/" in text else float(text)
        except (ValueError, ZeroDivisionError):
            raise ValueError("Type a number, such as 0.25, 1/4 or 2.5e-1.") from None

    def is_right(self, answer: Any) -> bool:
        """Whether an answer that was read is right."""
        if self.question.choices is not None:
            return answer == self.answer
        return abs(answer - self.answer) <= self.question.tolerance * abs(self.answer) + 1e-12

    def reply_to(self, answer: Any) -> str:
        """What to say to someone who gave this answer, beside whether it is right."""
        question = self.question
        if question.choices is not None:
            key = answer
        else:
            key = "" if self.is_right(answer) else "low" if answer < self.answer else "high"
        own = "" if self.is_right(answer) else question.replies.get(key, "")
        return " ".join(part for part in (own, self.reply) if part)


def _number_text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e6 else f"{value:.4g}"


def questions_of(package: str, kind: str) -> tuple[Question, ...]:
    """A chapter's questions: `kind` is "PREDICT" or "RECALL". Empty where it has none."""
    name = f"course_lib.{package}.questions"
    if importlib.util.find_spec(name) is None:
        return ()
    return tuple(getattr(importlib.import_module(name), kind, ()))


def find_question(name: str) -> Question:
    """The prediction called `name`: "chapter.name", or a bare name of the present chapter.

    Raises:
        UnknownQuestionError: If there is none; the message lists those there are.
    """
    from course_lib.notebook.session import current_chapter

    chapter = name.split(".")[0] if "." in name else current_chapter()
    if chapter is None:
        raise UnknownQuestionError(
            f"Which chapter's question is {name!r}? Call setup(...) first, or write chapter.name."
        )
    known = questions_of(chapter, "PREDICT")
    for question in known:
        if name in (question.id, question.name):
            return question
    names = ", ".join(repr(question.name) for question in known) or "none"
    raise UnknownQuestionError(f"{chapter} has no prediction {name!r}. It has: {names}.")


# Predictions -----------------------------------------------------------------------------------


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
    try:
        import ipywidgets as widgets
    except ImportError:
        return None
    question = asked.question
    head = widgets.HTML(_widget_head("Predict", asked.prompt))
    row, box = _answer_field(widgets, asked)
    button = widgets.Button(description="Commit", button_style="")
    status = widgets.HTML()
    button.add_class("course-button")
    before = progress.last_prediction(question.id)
    if before is not None:
        with _tolerant():
            box.value = before if question.choices is not None else _number_text(float(before))
            status.value = _status(
                f"Last time you predicted **{asked.says(asked.read(before))}**. "
                "You can commit to another answer."
            )

    def commit(_button: Any) -> None:
        try:
            answer = asked.read(box.value)
        except ValueError as error:
            status.value = _status(str(error))
            return
        progress.record_prediction(question.id, str(answer))
        status.value = _status(
            f"You predicted **{asked.says(answer)}**. Now open the outcome below."
        )
        _refresh_outcome(question.id)

    button.on_click(commit)
    return _widget_card(widgets, "predict", [head, row, button, status])


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
    if question.choices is None and _is_number(measured):
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
    try:
        answer = asked.read(predicted) if predicted is not None else None
    except ValueError:
        # The choices have changed since the prediction was stored.
        answer = None
    if answer is not None:
        right = asked.is_right(answer)
        verdict = "That is what happened." if right else _how_far(asked, answer)
        yours = f"<p><b>You predicted</b> {inline_markdown(asked.says(answer))} {verdict}</p>"
        return yours + block_markdown(asked.reply_to(answer))
    if question.choices is None:
        return block_markdown(asked.reply)
    lines = f"<p><b>The answer</b> {inline_markdown(asked.answer_text)}</p>"
    lines += block_markdown(asked.reply)
    items = "".join(
        f"<li><b>{escape(letter)})</b> {inline_markdown(text)}</li>"
        for letter, text in question.replies.items()
    )
    return f"{lines}<p>To who chose otherwise:</p><ul class='course-choices'>{items}</ul>"


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
    return f"{_number_text(value)} {question.unit}".strip()


# Recall ----------------------------------------------------------------------------------------


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
    try:
        import ipywidgets as widgets
    except ImportError:
        return None
    rng = random.SystemRandom()
    blocks = []
    for number, question in enumerate(chosen, start=1):
        blocks += _recall_block(widgets, question.ask(rng), number)
    head = widgets.HTML(_widget_head("Recall", ""))
    return _widget_card(widgets, "recall", [head, *blocks])


def _recall_block(widgets: Any, asked: Asked, number: int) -> list[Any]:
    prompt = widgets.HTML(f"<div class='course-question'>{block_markdown(asked.prompt)}</div>")
    row, box = _answer_field(widgets, asked)
    button = widgets.Button(description="Answer", tooltip=f"Answer question {number}")
    button.add_class("course-button")
    status = widgets.HTML()
    recorded: list[bool] = []

    def answered(_button: Any) -> None:
        try:
            answer = asked.read(box.value)
        except ValueError as error:
            status.value = _status(str(error))
            return
        right = asked.is_right(answer)
        if not recorded:
            # Only the first answer says what was remembered.
            recorded.append(right)
            progress.record_recall(asked.question.id, right)
        status.value = _status(recall_reply(asked, answer), "passed" if right else "failed")

    button.on_click(answered)
    return [prompt, row, button, status]


def recall_reply(asked: Asked, answer: Any) -> str:
    """The immediate reply to an answer, as Markdown."""
    if asked.is_right(answer):
        return f"✓ **Right: {asked.answer_text}.** {asked.reply}"
    return f"✗ **It is {asked.answer_text}.** {asked.reply_to(answer)}"


# Review ----------------------------------------------------------------------------------------


def next_review(history: Sequence[tuple[bool, float]]) -> float | None:
    """When a question is due again: the whole of the spacing.

    A right answer moves it from 1 to 7 to 30 days, and the fourth in a row retires it. A wrong
    answer starts again at 1 day. A right answer before its time changes nothing, so that asking
    oneself twice an evening does not count as remembering.

    Args:
        history: Answers so far, oldest first: right or not, and when (seconds since 1970).

    Returns:
        When it is due (0 where it was never asked), or None where it is retired.
    """
    step, due = 0, 0.0
    for correct, at in history:
        if not correct:
            step, due = 0, at + REVIEW_AFTER[0]
        elif at >= due:
            if step == len(REVIEW_AFTER):
                return None
            due = at + REVIEW_AFTER[step]
            step += 1
    return due


def review_times() -> list[tuple[float, Question]]:
    """Every question of the chapters that the learner has begun, by when it is due."""
    from course_lib.grading.exercise import chapters

    begun = progress.chapters_begun()
    times = []
    for chapter in chapters():
        for question in questions_of(chapter.package, "RECALL"):
            history = progress.recalls(question.id)
            due = next_review(history)
            if due is not None and (history or chapter.package in begun):
                times.append((due, question))
    return sorted(times, key=lambda pair: pair[0])


def review(
    input_fn: Callable[[str], str] = input,
    print_fn: Callable[[str], Any] = print,
    now: float | None = None,
    rng: random.Random | None = None,
) -> int:
    """Ask the questions that are due, in a terminal (`course review`).

    Args:
        input_fn: Shows a prompt and gives what was typed. End of input ends the review.
        print_fn: Shows a line.
        now: Seconds since 1970; default: the clock.
        rng: Draws the numbers; default: fresh ones.

    Returns:
        The exit status, 0.
    """
    now = time.time() if now is None else now
    times = review_times()
    due = [question for at, question in times if at <= now]
    if not due:
        print_fn(_nothing_due(times, now))
        return 0
    noun = "question" if len(due) == 1 else "questions"
    print_fn(f"{len(due)} {noun} to recall. Enter alone skips one; q ends.")
    right = answered = 0
    for number, question in enumerate(due, start=1):
        asked = question.ask(rng or random.SystemRandom())
        print_fn(f"\n{number}. {asked.prompt}")
        for letter, text in (question.choices or {}).items():
            print_fn(f"   {letter}) {text}")
        answer = _typed(asked, input_fn, print_fn)
        if answer is _STOP:
            break
        if answer is _SKIP:
            continue
        correct = asked.is_right(answer)
        progress.record_recall(question.id, correct, at=now)
        answered, right = answered + 1, right + correct
        print_fn(recall_reply(asked, answer).replace("**", ""))
    print_fn(f"\n{right} of {answered} remembered.")
    return 0


_STOP, _SKIP = object(), object()


def _typed(asked: Asked, input_fn: Callable[[str], str], print_fn: Callable[[str], Any]) -> Any:
    """What someone answers in the terminal; asks again until it can be read."""
    while True:
        try:
            text = input_fn("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return _STOP
        if text.lower() in ("q", "quit"):
            return _STOP
        if not text:
            return _SKIP
        try:
            return asked.read(text)
        except ValueError as error:
            print_fn(str(error))


def _nothing_due(times: Sequence[tuple[float, Question]], now: float) -> str:
    if not times:
        return "Nothing to review yet. Questions come here from the chapters you have begun."
    days = (times[0][0] - now) / DAY
    when = "in less than an hour" if days < 1 / 24 else f"in {max(1, round(days * 24))} hours"
    if days >= 2:
        when = f"in {round(days)} days"
    return f"Nothing is due. The next question comes {when}."


# Widgets ---------------------------------------------------------------------------------------


def _answer_field(widgets: Any, asked: Asked) -> tuple[Any, Any]:
    """The row to show, and the widget in it whose value is the answer."""
    question = asked.question
    if question.choices is not None:
        # A radio button's label is plain text.
        options = [
            (f"{letter}) {plain_markdown(text)}", letter)
            for letter, text in question.choices.items()
        ]
        box = widgets.RadioButtons(options=options, index=None)
        box.layout.width = "auto"
        return box, box
    box = widgets.Text(placeholder="a number")
    box.layout.width = "12rem"
    if not question.unit:
        return box, box
    return widgets.HBox([box, widgets.HTML(f"<span>{escape(question.unit)}</span>")]), box


def _widget_head(title: str, prompt: str) -> str:
    return CARD_STYLE + header(title) + (block_markdown(prompt) if prompt else "")


def _widget_card(widgets: Any, status: str, children: list[Any]) -> Any:
    box = widgets.VBox(children)
    for name in ("course-card", f"course-{status}", "course-live"):
        box.add_class(name)
    return box


def _status(markdown: str, kind: str = "") -> str:
    return (
        f"<div role='status' class='course-status course-{kind}'>{inline_markdown(markdown)}</div>"
    )


def _tolerant() -> Any:
    import contextlib

    # A stored prediction may be of an older version of the question.
    import traitlets

    return contextlib.suppress(ValueError, traitlets.TraitError)
