"""The progress card: as HTML, as text, as data; with any state of the store."""

from __future__ import annotations

import json
import time

import pytest

from course_lib import progress
from course_lib.grading import progress as store
from course_lib.grading.exercise import Exercise, chapters, find_exercise
from course_lib.notebook.progress_card import progress_data


def every() -> list[Exercise]:
    return [exercise for chapter in chapters() for exercise in chapter.exercises]


def passed(*names: str) -> None:
    for name in names:
        store.record_attempt(find_exercise(name).id, "passed", "done", None)


def test_an_empty_store_shows_every_exercise_and_where_to_begin() -> None:
    data = progress_data()
    assert data["points"] == 0
    assert data["max_points"] == sum(exercise.points for exercise in every())
    assert [c["slug"] for c in data["chapters"]] == [chapter.slug for chapter in chapters()]
    first = next(exercise for exercise in every() if exercise.core)
    assert data["next"] == first.id
    text = str(progress())
    for exercise in every():
        assert exercise.title in text
    assert json.loads(json.dumps(data)) == data


def test_points_and_status_follow_the_record() -> None:
    exercise = find_exercise("online_softmax")
    store.record_attempt(exercise.id, "failed", "values", None)
    assert progress_data()["points"] == 0
    passed("online_softmax")
    store.record_attempt(exercise.id, "failed", "values", None)
    data = progress_data()
    assert data["points"] == exercise.points
    card = progress()
    assert f"✓ {exercise.title}: passed, {exercise.points} of {exercise.points} points" in str(card)
    assert f"{exercise.points} of {data['max_points']} points" in card.html


def test_next_stays_in_the_chapter_and_prefers_core() -> None:
    passed("online_softmax")
    chapter = next(c for c in chapters() if c.package == "flash_attention")
    rest = [e for e in chapter.exercises if e.core and e.name != "online_softmax"]
    following = progress_data()["next"]
    if rest:
        assert following == rest[0].id
    for exercise in rest:
        passed(exercise.id)
    after = find_exercise(progress_data()["next"])
    elsewhere = [e for e in every() if e.core and e.chapter != "flash_attention"]
    assert after.core == bool(elsewhere)


def test_an_exercise_that_resists_does_not_hold_up_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = find_exercise(progress_data()["next"])
    for at in (0.0, 120.0 * first.minutes + 1):
        monkeypatch.setattr(time, "time", lambda at=at: at)
        store.record_attempt(first.id, "failed", "values", None)
    assert progress_data()["next"] != first.id


def test_everything_done_says_so() -> None:
    passed(*(exercise.id for exercise in every()))
    data = progress_data()
    assert data["points"] == data["max_points"]
    assert data["next"] is None
    assert "Every exercise has passed." in str(progress())


def test_due_questions_are_counted() -> None:
    store.record_recall("start_here.bytes_of_add", True, at=0.0)
    assert progress_data()["review_due"] > 0
    assert "course review" in str(progress())


def test_status_is_told_by_a_word_and_not_by_colour_alone() -> None:
    passed("online_softmax")
    html = progress().html
    assert "passed" in html
    assert "to do" in html
    assert html.count("aria-hidden='true'>✓") == 1


def test_a_store_that_cannot_be_read_still_shows_the_card() -> None:
    store.store_path().mkdir(parents=True)
    with pytest.warns(UserWarning, match="could not be read"):
        card = progress()
    assert "0 of" in str(card)


def test_a_damaged_store_is_named_and_the_card_is_shown() -> None:
    store.home().mkdir(parents=True, exist_ok=True)
    store.store_path().write_bytes(b"garbage" * 1000)
    with pytest.warns(UserWarning, match="damaged-"):
        card = progress()
    assert "0 of" in str(card)
