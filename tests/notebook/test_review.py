"""When a question comes back, and the review in the terminal."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from course_lib.grading import progress
from course_lib.notebook.question import questions_of
from course_lib.notebook.review import DAY, next_review, review, review_times

RECALL = questions_of("start_here", "RECALL")


def test_right_answers_come_back_after_1_7_and_30_days_and_then_never() -> None:
    history, at = [], 0.0
    for wait in (1, 7, 30):
        history.append((True, at))
        assert next_review(history) == at + wait * DAY
        at += wait * DAY
    history.append((True, at))
    assert next_review(history) is None


def test_a_wrong_answer_starts_again() -> None:
    history = [(True, 0.0), (True, DAY), (False, 8 * DAY)]
    assert next_review(history) == 9 * DAY
    assert next_review([*history, (True, 9 * DAY)]) == 10 * DAY


def test_a_right_answer_before_its_time_changes_nothing() -> None:
    assert next_review([(True, 0.0), (True, 60.0), (True, 120.0)]) == DAY


def test_a_wrong_answer_counts_at_any_time() -> None:
    assert next_review([(True, 0.0), (False, 60.0)]) == 60.0 + DAY


def test_what_was_never_asked_is_due_a_day_after_it_was_met() -> None:
    assert next_review([], met=5 * DAY) == 6 * DAY


def test_a_retired_question_stays_retired() -> None:
    history = [(True, 0.0), (True, DAY), (True, 8 * DAY), (True, 38 * DAY), (False, 39 * DAY)]
    assert next_review(history) is None


# In the terminal ---------------------------------------------------------------------------------


def answering(*answers: str) -> Callable[[str], str]:
    waiting = iter(answers)

    def typed(_prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    return typed


def run_review(now: float, *answers: str) -> str:
    lines: list[str] = []
    assert review(answering(*answers), lines.append, now=now, rng=random.Random(0)) == 0
    return "\n".join(lines)


def begin(at: float = 0.0) -> None:
    progress.record_recall(RECALL[0].id, True, at=at)


def test_nothing_to_review_at_first() -> None:
    assert "Nothing to review yet" in run_review(0.0)


def test_it_says_when_the_next_question_comes() -> None:
    begin()
    assert "in 12 hours" in run_review(DAY / 2)
    assert "in less than an hour" in run_review(DAY - 60)


def test_questions_of_chapters_that_were_begun_are_due_a_day_later() -> None:
    begin()
    assert len(review_times()) == len(RECALL)
    assert all(question.chapter == "start_here" for _, question in review_times())
    assert f"{len(RECALL)} questions" in run_review(DAY + 1)


def test_answers_are_replied_to_and_stored() -> None:
    begin()
    now = 2 * DAY
    asked = [question.ask(random.Random(0)) for _, question in review_times()]
    out = run_review(now, str(asked[0].answer), "no number", "-7", "", "q")
    assert "✓ Right" in out
    assert "Type a number" in out
    assert "✗ It is" in out
    assert "1 of 2 remembered." in out
    assert progress.recalls(asked[0].question.id)[-1] == (True, now)
    assert progress.recalls(asked[1].question.id) == [(False, now)]
    assert progress.recalls(asked[2].question.id) == []


@pytest.mark.parametrize("stop", [(), ("q",), ("QUIT",)])
def test_end_of_input_ends_the_review(stop: tuple[str, ...]) -> None:
    begin()
    assert "0 of 0 remembered." in run_review(2 * DAY, *stop)


def test_ctrl_c_ends_the_review() -> None:
    begin()

    def interrupted(_prompt: str) -> str:
        raise KeyboardInterrupt

    lines: list[str] = []
    assert review(interrupted, lines.append, now=2 * DAY) == 0
    assert "remembered" in lines[-1]
