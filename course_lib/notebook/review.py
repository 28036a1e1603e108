"""When a recall question comes back, and `course review`, which asks it in the terminal."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from course_lib.grading import progress
from course_lib.notebook.question import Asked, Question, questions_of

DAY = 86_400.0
REVIEW_AFTER = (1 * DAY, 7 * DAY, 30 * DAY)
"""Seconds until a question comes back, after its first, second and third right answer in a row."""


def next_review(history: Sequence[tuple[bool, float]], met: float = 0.0) -> float | None:
    """When a question is due again: the whole of the spacing.

    A right answer moves it from 1 to 7 to 30 days, and the fourth in a row retires it. A wrong
    answer starts again at 1 day. A right answer before its time changes nothing, so that asking
    oneself twice an evening does not count as remembering.

    Args:
        history: Answers so far, oldest first: right or not, and when (seconds since 1970).
        met: When the learner first met its matter.

    Returns:
        When it is due (a day after `met` where it was never asked), or None where it is retired.
    """
    if not history:
        return met + REVIEW_AFTER[0]
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
            if chapter.package not in begun:
                continue
            due = next_review(progress.recalls(question.id), begun[chapter.package])
            if due is not None:
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
        print_fn(asked.remark(answer).replace("**", ""))
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
