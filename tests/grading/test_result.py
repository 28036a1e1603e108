"""A result is one text, whatever made it; what is not exactly a result is refused with a reason."""

from __future__ import annotations

import copy
import hashlib
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.grading.result import (
    EXERCISE_STATUSES,
    CaseResult,
    ExerciseResult,
    Finding,
    Graded,
    Result,
    ResultError,
    canonical,
    dumps,
    loads,
)

HASH = "0" * 63 + "a"


def exercise(name: str = "one", **changes) -> ExerciseResult:
    values = {
        "id": f"chapter.{name}",
        "score": 5,
        "max_score": 5,
        "status": "passed",
        "stage": "done",
        "feedback": "All cases pass.",
        "cases": [CaseResult("a late maximum", "values", "passed")],
        "findings": [Finding("library operator", "It may call `aten::_softmax`.", "cell 3")],
    }
    return ExerciseResult(**{**values, **changes})


def result(**changes) -> Result:
    exercises = [exercise(), exercise("two", status="failed", score=0, max_score=2.5)]
    values = {
        "sha256": HASH,
        "chapter": "chapter",
        "status": "graded",
        "exercises": exercises,
        "grader": "0.1.0+abc",
        "seed_id": "0123",
        "device": "cpu",
    }
    return Result(**{**values, **changes})


def graded(**changes) -> Graded:
    values = {
        "submission": "jane/08_a.ipynb",
        "student": "jane",
        "result": result(),
        "sandbox": "bwrap",
        "start": "warm",
        "engine": "local",
        "seconds": 3,
        "spent": {"overhead": 1, "learner": 1.5, "oracle": 0.5},
        "finished_at": "2026-01-01T00:00:00Z",
    }
    return Graded(**{**values, **changes})


def test_shape_of_the_file() -> None:
    """The names and their order are what other programs rely on."""
    data = json.loads(dumps(graded()))
    assert list(data) == [
        *("schema", "submission", "student", "sandbox", "start", "engine", "seconds", "spent"),
        *("finished_at", "address", "result"),
    ]
    assert list(data["result"]) == [
        *("sha256", "chapter", "status", "exercises", "grader", "seed_id", "device", "reason"),
        *("notes", "score", "max_score"),
    ]
    assert data["result"]["exercises"][1] == {
        "id": "chapter.two",
        "score": 0.0,
        "max_score": 2.5,
        "status": "failed",
        "stage": "done",
        "feedback": "All cases pass.",
        "cases": [{"name": "a late maximum", "stage": "values", "status": "passed", "message": ""}],
        "findings": [
            {
                "rule": "library operator",
                "message": "It may call `aten::_softmax`.",
                "where": "cell 3",
            }
        ],
    }
    assert (data["result"]["score"], data["result"]["max_score"]) == (5.0, 7.5)


def test_read_back() -> None:
    assert loads(dumps(graded())) == graded()
    assert loads(dumps(graded()).encode()) == graded()


def test_the_address_is_of_the_result_alone() -> None:
    other = graded(student="bob", seconds=100, engine="ray", finished_at="", start="cold")
    assert other.result.address == graded().result.address
    assert canonical(other.result.as_json()) == canonical(graded().result.as_json())


def test_the_text_that_is_hashed() -> None:
    """Any other program can compute the address: sorted names, no spaces, ASCII."""
    text = (
        '{"chapter":"c","device":"cpu","exercises":[],"grader":"g","max_score":0.0,"notes":'
        f'["\\u2260"],"reason":"","score":0.0,"seed_id":"s","sha256":"{HASH}","status":"graded"}}'
    )
    made = Result(HASH, "c", "graded", (), "g", "s", "cpu", notes=("≠",))
    assert canonical(made.as_json()) == text.encode()
    assert made.address == hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": "1" * 64},
        {"chapter": "other"},
        {"device": "cuda"},
        {"seed_id": "0124"},
        {"grader": "0.1.1"},
        {"notes": ("odd",)},
        {"exercises": [exercise()]},
        {"exercises": [exercise("two", status="failed", score=0, max_score=2.5), exercise()]},
        {"exercises": [exercise(feedback="Other.")]},
        {"exercises": [exercise(findings=())]},
    ],
)
def test_everything_in_the_result_enters_the_address(changes) -> None:
    assert result(**changes).address != result().address


def test_an_integer_and_a_float_have_one_text() -> None:
    one, other = exercise(score=5, max_score=5), exercise(score=5.0, max_score=5.0)
    results = [result(exercises=[each]) for each in (one, other)]
    assert results[0].address == results[1].address


def test_any_text_can_be_written() -> None:
    """Names of files and messages of errors come from students: also halves of characters."""
    nasty = "\ud800 \x00 \x1b[31m \u2028 \U0001f600 </script>"
    again = loads(dumps(graded(student=nasty, result=result(notes=(nasty,)))))
    assert again.student == nasty
    assert again.result.notes == (nasty,)
    assert dumps(graded(student=nasty)).isascii()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: exercise(status="great"), "status is 'great'; expected one of passed, failed"),
        (lambda: exercise(score=4), "score of chapter.one is 4.0; 'passed' earns 5.0"),
        (lambda: exercise(status="failed"), "'failed' earns 0.0"),
        (lambda: exercise(score=float("nan")), "score is nan; expected a number"),
        (lambda: exercise(max_score=float("inf")), "max_score is inf"),
        (lambda: exercise(max_score=-1, score=-1), "score is -1; expected a number, 0 or more"),
        (lambda: exercise(score=True, max_score=True), "score is True"),
        (lambda: exercise(feedback=None), "feedback is a NoneType; expected text"),
        (lambda: exercise(cases="abc"), "cases is a str; expected a tuple"),
        (lambda: exercise(cases=[{}]), "cases holds a dict; expected CaseResult"),
        (lambda: result(sha256="zz"), "sha256 is 'zz'; expected 64 hexadecimal digits"),
        (lambda: result(sha256=HASH.upper()), "expected 64 hexadecimal digits"),
        (lambda: result(sha256=""), "sha256 is empty, and the submission is graded"),
        (lambda: result(status="unreadable"), "reason is '' and status 'unreadable'"),
        (lambda: result(reason="Odd."), "reason is 'Odd.' and status 'graded'"),
        (lambda: result(exercises=[exercise(), exercise()]), "chapter.one more than once"),
        (lambda: graded(result={}), "result is a dict; expected a Result"),
        (lambda: graded(spent={"overhead": 1}), "expected overhead, learner, oracle"),
        (lambda: graded(seconds="3"), "seconds is '3'; expected a number"),
    ],
)
def test_what_is_no_result_cannot_be_made(make, says: str) -> None:
    with pytest.raises(ResultError, match=r".") as caught:
        make()
    assert says in str(caught.value)


def edited(edit) -> str:
    data = copy.deepcopy(graded().as_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.update(schema=2), "schema is 2; this grader reads 1"),
        (lambda d: d.pop("schema"), "schema is None"),
        (lambda d: d.pop("student"), "the file lacks 'student'"),
        (lambda d: d.update(more=1), "the file has an unknown 'more'"),
        (lambda d: d["result"].pop("grader"), "result lacks 'grader'"),
        (lambda d: d["result"].update(x=1), "result has an unknown 'x'"),
        (lambda d: d["result"].update(exercises={}), "result.exercises is a dict; expected a list"),
        (lambda d: d["result"]["exercises"].append(3), "result.exercises[2] is a int"),
        (lambda d: d["result"]["exercises"][0].pop("stage"), "result.exercises[0] lacks 'stage'"),
        (
            lambda d: d["result"]["exercises"][1]["cases"][0].update(status="ok"),
            "result.exercises[1].cases[0]: status is 'ok'",
        ),
        (lambda d: d["result"].update(notes=None), "result.notes is a NoneType"),
        (lambda d: d["result"].update(score=7.5), "result.score is 7.5; its exercises add up"),
        (lambda d: d["result"].update(max_score=5), "result.max_score is 5"),
        (lambda d: d["result"].update(device="cuda"), "It was changed after it was written"),
        (lambda d: d.update(address=HASH), "It was changed after it was written"),
        (lambda d: d.update(spent=[]), "spent is []"),
    ],
)
def test_what_is_no_result_is_not_read(edit, says: str) -> None:
    with pytest.raises(ResultError, match=r".") as caught:
        loads(edited(edit))
    assert says in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "3", '"x"', "NaN", "[" * 100_000, b"\xff", '{"schema": 1}']
)
def test_what_is_no_json_object_is_not_read(text) -> None:
    with pytest.raises(ResultError):
        loads(text)


def test_not_a_number_is_not_read() -> None:
    with pytest.raises(ResultError, match="NaN is not a number"):
        loads(dumps(graded()).replace("3.0", "NaN", 1))
    with pytest.raises(ResultError, match="seconds is inf"):
        loads(dumps(graded()).replace("3.0", "1e999", 1))


def test_a_huge_file_is_not_read() -> None:
    with pytest.raises(ResultError, match="expected at most"):
        loads(b" " * (32 * 2**20 + 1))


texts = st.text(max_size=20)
points = st.integers(0, 100) | st.floats(0, 100)
cases = st.builds(CaseResult, texts, texts, st.sampled_from(EXERCISE_STATUSES), texts)
findings = st.builds(Finding, texts, texts, texts)


@st.composite
def some_exercise(draw, name: str) -> ExerciseResult:
    status, most = draw(st.sampled_from(EXERCISE_STATUSES)), draw(points)
    parts = draw(st.lists(cases, max_size=3)), draw(st.lists(findings, max_size=2))
    score = most if status == "passed" else 0
    return ExerciseResult(name, score, most, status, draw(texts), draw(texts), *parts)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_every_result_is_read_back_as_it_was(data) -> None:
    count = data.draw(st.integers(0, 3))
    exercises = [data.draw(some_exercise(f"c.{i}")) for i in range(count)]
    made = result(exercises=exercises, notes=tuple(data.draw(st.lists(texts, max_size=2))))
    again = loads(dumps(graded(result=made)))
    assert again.result == made
    assert again.result.address == made.address
