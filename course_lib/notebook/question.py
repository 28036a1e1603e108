"""The record of a question, and where a chapter's questions are found."""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

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
            reply = reply.format(**numbers, answer=number_text(answer))
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
        return f"{number_text(answer)} {self.question.unit}".strip()

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

    def remark(self, answer: Any) -> str:
        """The immediate reply to an answer: whether it is right, what is, and why. Markdown."""
        if self.is_right(answer):
            return f"✓ **Right: {self.answer_text}.** {self.reply}"
        return f"✗ **It is {self.answer_text}.** {self.reply_to(answer)}"


def number_text(value: Any) -> str:
    """A number for a reader: thousands separated, four digits where it is not whole."""
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
