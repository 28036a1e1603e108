"""Odd but honest submissions get exactly what they deserve, through the whole of `course grade`.

Two secret seeds by default, twenty with `--deep`.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

import pytest

from course_lib.grading import pool
from course_lib.grading.grade import Line, Settings, grade
from course_lib.grading.judge import Judge
from course_lib.grading.result import Graded, Result, canonical
from course_lib.grading.sources import find_submissions
from tests.grading.bwrap import bwrap_works
from tests.grading.honest.habits import HABITS, Habit
from tests.grading.honest.notebooks import PACKAGE, RECORDS

LIMIT = 5.0
"""Seconds for a cell and for a call here, in place of many more: endless ones are among these."""

pytestmark = pytest.mark.skipif(not bwrap_works(), reason="needs bubblewrap")


def quick_judge(secret_seed: bytes) -> Judge:
    """A judge that does not wait long for what never ends. Called in a worker's own process."""
    from course_lib.grading import session

    session.CELL_SECONDS = session.CALL_SECONDS = LIMIT
    return Judge(secret_seed=secret_seed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        count = 20 if metafunc.config.getoption("--deep", default=False) else 2
        metafunc.parametrize("seed", range(count))


def grade_all(folder: Path, seed: int, *, backwards: bool = False) -> dict[str, Graded]:
    """What is in `folder`/class, graded under one secret seed: by student."""
    secret = hashlib.sha256(b"honest %d" % seed).digest()
    make = functools.partial(quick_judge, secret)
    engine = functools.partial(pool.run, make_judge=make, jobs=1)
    sources = find_submissions([folder / "class"])

    def no_failure(line: Line, _count: int) -> None:
        assert not line.failure, f"{line.source.name}: {line.failure}"

    settings = Settings(folder / "out", secret)
    lines = grade(sources[::-1] if backwards else sources, settings, engine, no_failure)
    return {line.source.student: line.graded for line in lines if line.graded}


def test_each_gets_what_it_deserves(seed: int, tmp_path: Path) -> None:
    """All of them in one run: a sandbox and the expected values are made once."""
    for habit in HABITS:
        habit.write(tmp_path / "class")
    graded = grade_all(tmp_path, seed)
    wrong = {habit.name: what_is_wrong(graded[habit.name].result, habit) for habit in HABITS}
    assert not {name: sentences for name, sentences in wrong.items() if sentences}
    assert_nothing_hidden_is_said(graded["wrong_in_four_ways"].result)


def what_is_wrong(result: Result, habit: Habit) -> list[str]:
    """How a result differs from the one that the habit deserves."""
    got = {each.id.split(".")[1]: each for each in result.exercises}
    want = dict.fromkeys(RECORDS, ("missing", ""))
    want |= dict.fromkeys(habit.passes, ("passed", "")) | habit.fails
    wrong = [
        f"{name} is {each.status}: {each.feedback}"
        for name, each in got.items()
        if each.status != want[name][0] or want[name][1] not in each.feedback
    ]
    if (result.status, result.chapter, list(got)) != ("graded", PACKAGE, list(RECORDS)):
        wrong.append(f"{result.status} as {result.chapter}: {result.reason}")
    if result.score != sum(RECORDS[name].points for name in habit.passes):
        wrong.append(f"{result.score} points")
    findings = {name: {each.rule for each in exercise.findings} for name, exercise in got.items()}
    if {name: rules for name, rules in findings.items() if rules} != {
        name: {rule} for name, rule in habit.findings.items()
    }:
        wrong.append(f"findings {findings}")
    wrong += [
        f"no note has “{part}”: {result.notes}"
        for part in habit.notes
        if not any(part in note for note in result.notes)
    ]
    return wrong


def assert_nothing_hidden_is_said(result: Result) -> None:
    """Feedback goes from friend to friend, so it holds no data of a case."""
    texts = [case.message for each in result.exercises for case in each.cases]
    assert len([text for text in texts if text]) >= 3
    assert not [text for text in texts if "tensor(" in text or len(text) > 1000]


def test_graded_again_it_has_the_same_bytes(tmp_path: Path) -> None:
    """In a fresh sandbox, in another order, by another process: the same address."""
    names = {"everything_solved", "wrong_in_four_ways", "a_cell_that_kills_the_kernel"}
    runs = []
    for folder in (tmp_path / "one", tmp_path / "other"):
        for habit in HABITS:
            if habit.name in names:
                habit.write(folder / "class")
        runs.append(grade_all(folder, 0, backwards=bool(runs)))
    for name in names:
        one, other = (run[name].result for run in runs)
        assert canonical(one.as_json()) == canonical(other.as_json())
        assert one.address == other.address
