"""Predictions, outcomes and recall: what is shown, what is stored, what stays stable."""

from __future__ import annotations

import random
from typing import Any

import matplotlib.pyplot as plt
import pytest

from course_lib.grading import progress
from course_lib.grading.exercise import chapters
from course_lib.notebook import questions, session
from course_lib.notebook.question import Question, UnknownQuestionError, find_question, questions_of
from course_lib.notebook.questions import (
    outcome_card,
    predict,
    predict_card,
    recall_card,
    recall_questions,
    reveal,
)

CHOICE = Question(
    id="c.choice",
    prompt="Which of `a` and `b`?",
    choices={"a": "the *first*", "b": "the second"},
    answer="b",
    replies={"a": "Not the first. It never is."},
    reply="It was the second.",
)
NUMBER = Question(
    id="c.number",
    prompt="How many?",
    answer=10,
    unit="ms",
    tolerance=0.1,
    replies={"low": "More than that.", "high": "Less than that."},
    reply="Count them.",
)
DRAWN = Question(
    id="c.drawn",
    prompt="Twice {n:,}?",
    numbers=lambda rng: {"n": rng.randint(1000, 9999)},
    answer=lambda n: 2 * n,
    tolerance=0.0,
    reply="2 × {n} = {answer}.",
)
EVERY = [
    question
    for chapter in chapters()
    for kind in ("PREDICT", "RECALL")
    for question in questions_of(chapter.package, kind)
]


@pytest.fixture
def in_chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_chapter", "flash_attention")
    monkeypatch.setattr(questions, "_outcomes", {})


# The record --------------------------------------------------------------------------------------


def test_every_wrong_choice_needs_a_reply() -> None:
    with pytest.raises(ValueError, match=r"\['a'\] have no reply"):
        Question("c.q", "?", "b", {"a": "x", "b": "y"})
    with pytest.raises(ValueError, match="none of the choices"):
        Question("c.q", "?", "z", {"a": "x"}, {"a": "No. No."})
    with pytest.raises(ValueError, match=r"chapter\.name"):
        Question("q", "?", 1)


@pytest.mark.parametrize("typed", ["1,024", " 1024 ", "1024 ms", "1_024", "2048/2", "1.024e3"])
def test_numbers_are_read_as_people_type_them(typed: str) -> None:
    assert NUMBER.ask().read(typed) == 1024.0


@pytest.mark.parametrize("typed", ["", None, "many", "1/0", "nan?"])
def test_what_is_no_number_is_answered_kindly(typed: Any) -> None:
    with pytest.raises(ValueError, match="Type a number"):
        NUMBER.ask().read(typed)


def test_letters_are_read_in_either_case() -> None:
    assert CHOICE.ask().read("B)") == "b"
    with pytest.raises(ValueError, match="Choose one of a, b"):
        CHOICE.ask().read("c")


def test_a_number_is_right_within_its_tolerance() -> None:
    asked = NUMBER.ask()
    assert [asked.is_right(x) for x in (8.9, 9.0, 10, 11.0, 11.1)] == [
        False, True, True, True, False,
    ]  # fmt: skip
    assert asked.reply_to(2) == "More than that. Count them."
    assert asked.reply_to(20) == "Less than that. Count them."
    assert asked.reply_to(10) == "Count them."


def test_infinity_and_nan_are_wrong() -> None:
    assert not NUMBER.ask().is_right(NUMBER.ask().read("inf"))
    assert not NUMBER.ask().is_right(NUMBER.ask().read("nan"))


def test_numbers_are_fresh_with_a_generator_and_fixed_without() -> None:
    assert DRAWN.ask() == DRAWN.ask()
    assert len({DRAWN.ask(random.Random(seed)).answer for seed in range(5)}) > 1
    asked = DRAWN.ask(random.Random(1))
    assert asked.reply.endswith(f"= {asked.answer:,}.")


# The chapters' own questions ---------------------------------------------------------------------


def test_ids_are_unique_and_of_their_chapter() -> None:
    ids = [question.id for question in EVERY]
    assert len(set(ids)) == len(ids)
    for chapter in chapters():
        for kind in ("PREDICT", "RECALL"):
            for question in questions_of(chapter.package, kind):
                assert question.chapter == chapter.package


@pytest.mark.parametrize("question", EVERY, ids=lambda question: question.id)
def test_a_question_answers_itself_and_replies_to_the_rest(question: Question) -> None:
    for seed in range(20):
        asked = question.ask(random.Random(seed))
        assert asked.is_right(asked.read(str(asked.answer)))
        assert "{" not in asked.prompt + asked.reply
        assert asked.reply, "the reply says why"
        if question.choices is None:
            assert asked.answer > 0
            assert set(question.replies) == {"low", "high"}
            assert not asked.is_right(asked.answer * 2)
            assert not asked.is_right(asked.answer / 2)
        else:
            wrong = set(question.choices) - {asked.answer}
            assert set(question.replies) == wrong


@pytest.mark.parametrize(
    "question", [q for q in EVERY if q.choices], ids=lambda question: question.id
)
def test_a_wrong_choice_gets_two_sentences(question: Question) -> None:
    for letter, reply in question.replies.items():
        plain = reply.replace("torch.", "torch ").replace("e.g.", "eg")
        sentences = [part for part in plain.rstrip(".").split(". ") if part]
        assert len(sentences) == 2, f"{question.id} {letter}: {reply}"


# Predict -----------------------------------------------------------------------------------------


def test_a_prediction_is_found_by_its_name(in_chapter: None) -> None:
    assert find_question("puzzle").id == "flash_attention.puzzle"
    assert find_question("start_here.slowest").chapter == "start_here"
    with pytest.raises(UnknownQuestionError, match=r"'nothing'.*'puzzle'"):
        predict("nothing")


def test_a_prediction_needs_a_chapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_chapter", None)
    with pytest.raises(UnknownQuestionError, match="setup"):
        find_question("puzzle")


def test_the_card_has_a_widget_a_static_form_and_a_stable_text() -> None:
    first = predict_card(CHOICE)._repr_mimebundle_()
    progress.record_prediction(CHOICE.id, "a")
    second = predict_card(CHOICE)._repr_mimebundle_()
    assert set(first) == {
        "application/vnd.jupyter.widget-view+json", "text/html", "text/plain",
    }  # fmt: skip
    assert first["text/plain"] == second["text/plain"]
    assert first["text/html"] == second["text/html"]
    assert "a) the *first*" in first["text/plain"]
    assert "<em>first</em>" in first["text/html"]
    assert "It was the second" not in str(first["text/html"]) + first["text/plain"]


def test_committing_stores_the_prediction_and_says_so() -> None:
    view = predict_card(CHOICE).widget
    assert progress.last_prediction(CHOICE.id) is None
    view.answer(0, "")
    assert view.replies == ["Choose one of a, b."]
    assert progress.last_prediction(CHOICE.id) is None
    view.answer(0, "a")
    assert progress.last_prediction(CHOICE.id) == "a"
    assert "You predicted" in view.replies[0]
    assert "second" not in view.replies[0], "the reply must not give the answer away"


def test_an_earlier_prediction_is_remembered_and_an_outdated_one_ignored() -> None:
    progress.record_prediction(CHOICE.id, "a")
    assert "Last time" in predict_card(CHOICE).widget.replies[0]
    progress.record_prediction(CHOICE.id, "z")
    assert predict_card(CHOICE).widget.replies == [""]


def test_the_widget_answers_messages_of_the_front_end() -> None:
    view = predict_card(NUMBER).widget
    view._handle_custom_msg({"index": 0, "value": "12 ms"}, [])
    assert progress.last_prediction(NUMBER.id) == "12.0"


def test_without_widgets_the_static_card_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.notebook import question_view

    def missing() -> type:
        raise ImportError("no anywidget")

    monkeypatch.setattr(question_view, "_VIEW", None)
    monkeypatch.setattr(question_view, "_make_view_class", missing)
    assert set(predict_card(CHOICE)._repr_mimebundle_()) == {"text/html", "text/plain"}


# Reveal ------------------------------------------------------------------------------------------


def test_an_outcome_is_folded_and_its_text_does_not_know_the_learner() -> None:
    texts, htmls = set(), set()
    for predicted in (None, "a", "b", "z"):
        card = outcome_card(CHOICE, "3.6 times", predicted)
        texts.add(card.text)
        htmls.add(card.html)
        assert "<details><summary>Outcome</summary>" in card.html
        assert "<details open" not in card.html
    assert texts == {"Outcome. Measured: 3.6 times"}
    assert len(htmls) == 3


def test_each_prediction_gets_its_own_reply() -> None:
    wrong = outcome_card(CHOICE, 1, "a").html
    assert "Not the first" in wrong
    assert "The answer is b) the second" in wrong
    right = outcome_card(CHOICE, 1, "b").html
    assert "That is what happened" in right
    assert "Not the first" not in right
    unknown = outcome_card(CHOICE, 1, None).html
    assert "Not the first" in unknown
    assert "It was the second." in wrong
    assert "It was the second." in right


@pytest.mark.parametrize(
    ("predicted", "words"),
    [("100", "off by a factor of 10"), ("9", "10% too low"), ("13", "30% too high"), ("-3", "is")],
)
def test_a_number_is_held_against_what_was_measured(predicted: str, words: str) -> None:
    question = Question("c.q", "?", 50, unit="ms", tolerance=0.05, reply="So.")
    html = outcome_card(question, 10.0, predicted).html
    assert words in html
    assert "10 ms" in html


def test_several_measured_values_stand_in_rows() -> None:
    card = outcome_card(CHOICE, {"three calls": "0.61 s", "loop": 0.17}, None)
    assert card.text == "Outcome. three calls: 0.61 s; loop: 0.17"
    assert card.html.count("<dt>") == 2


def test_a_late_prediction_rewrites_the_outcome(
    in_chapter: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[str, str]] = []
    monkeypatch.setattr(questions, "emit", lambda card, display_id: shown.append((card.html, "")))
    monkeypatch.setattr(
        "IPython.display.update_display",
        lambda card, display_id: shown.append((card.html, display_id)),
    )
    reveal("puzzle", 3.6)
    view = predict_card(find_question("puzzle")).widget
    view.answer(0, "a")
    (before, _), (after, where) = shown
    assert "You predicted" not in before
    assert "You predicted" in after
    assert where == "course-outcome-flash_attention.puzzle"


def test_a_figure_in_an_outcome_needs_its_text(in_chapter: None) -> None:
    fig, _ = plt.subplots()
    with pytest.raises(ValueError, match="alt"):
        reveal("puzzle", 1, fig)
    reveal("puzzle", 1, fig, alt="A picture.")
    assert questions._outcome_now("flash_attention.puzzle").html.count('alt="A picture."') == 1


# Recall ------------------------------------------------------------------------------------------


def test_recall_asks_about_earlier_chapters_only() -> None:
    chosen = recall_questions("flash_attention")
    assert len(chosen) == 3
    assert len({question.id for question in chosen}) == 3
    assert all(question.chapter == "start_here" for question in chosen)
    assert recall_questions("flash_attention") == chosen


def test_the_first_chapter_has_nothing_to_recall() -> None:
    card = recall_card("start_here")
    assert card.widget is None
    assert "Nothing to recall" in card.text


def test_recall_is_stable_in_print_and_fresh_in_the_widget() -> None:
    cards = [recall_card("flash_attention") for _ in range(6)]
    assert len({card.text for card in cards}) == 1
    assert len({card.html for card in cards}) == 1
    assert len({str(card.widget.spec) for card in cards}) > 1
    assert cards[0].html.count("<details>") == 3


def test_recall_replies_at_once_and_stores_the_first_answer() -> None:
    view = recall_card("flash_attention").widget
    question = recall_questions("flash_attention")[0]
    view.answer(0, "-1")
    assert "✗" in view.replies[0]
    right = view._asked[0].answer
    view.answer(0, str(right))
    assert "✓" in view.replies[0]
    assert [correct for correct, _ in progress.recalls(question.id)] == [False]
    assert view.replies[1:] == ["", ""]


def test_in_a_notebook_each_call_is_one_output_and_small() -> None:
    """Through a real kernel: what a built notebook stores, and what nbconvert makes of it."""
    import nbformat
    from nbclient import NotebookClient
    from nbconvert import HTMLExporter

    cells = [
        'from course_lib import setup\nsetup("flash_attention")',
        "from course_lib.notebook.questions import predict, recall, reveal",
        'predict("puzzle")',
        'reveal("puzzle", "3.6 times")',
        'recall("flash_attention")',
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    NotebookClient(notebook, timeout=60, store_widget_state=False).execute()
    outputs = [cell.outputs for cell in notebook.cells]
    assert [len(each) for each in outputs] == [1, 0, 1, 1, 1]
    assert all(len(str(each[0])) < 25_000 for each in outputs if each)
    page, _ = HTMLExporter(template_name="lab").from_notebook_node(notebook)
    assert "Commit to an answer before you read on." in page
    assert "<summary>Outcome</summary>" in page
