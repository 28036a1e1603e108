"""The help ladder, and the staff version."""

from __future__ import annotations

import inspect
import time
from pathlib import Path

import pytest

from course_lib.grading import help as course_help
from course_lib.grading import progress
from course_lib.grading.check import STAFF_MARK, check
from course_lib.grading.exercise import Exercise, UnknownExerciseError, find_exercise
from course_lib.grading.help import (
    SolutionClosedError,
    SolutionMissingError,
    hint,
    needed_above,
    next_rung,
    solution,
)
from course_lib.runtime.interpreter import interpreted
from course_lib.runtime.tile import HAS_TRITON

NAME = "online_softmax"


@pytest.fixture
def exercise() -> Exercise:
    return find_exercise(NAME)


def attempt(exercise: Exercise, status: str = "failed", times: int = 1) -> None:
    for _ in range(times):
        progress.record_attempt(exercise.id, status, "values", None)


def test_the_ladder_goes_up_one_rung_a_call_and_stays(exercise: Exercise) -> None:
    attempt(exercise, times=3)
    numbers = [hint(NAME).number for _ in range(6)]
    assert numbers == [1, 2, 3, 4, 4, 4]
    assert progress.rungs_shown(exercise.id) == 4


def test_each_rung_shows_its_own_hint_and_folds_the_earlier_ones(exercise: Exercise) -> None:
    rungs = [hint(NAME) for _ in range(3)]
    assert [rung.text for rung in rungs] == list(exercise.hints)
    assert rungs[2].earlier == exercise.hints[:2]
    assert "<details>" in rungs[2]._repr_html_()
    assert "<details>" not in rungs[0]._repr_html_()


def test_the_staff_version_waits_for_an_attempt(exercise: Exercise) -> None:
    rungs = [hint(NAME) for _ in range(5)]
    assert rungs[-1].number == 3
    assert "after your first `check`" in rungs[-1].note


def test_the_staff_version_waits_for_three_failures_or_the_minutes(exercise: Exercise) -> None:
    attempt(exercise, times=2)
    now = time.time()
    early = next_rung(exercise, 3, now)
    assert early.number == 3
    assert f"in {exercise.minutes} minutes, or after 1 more failed check." in early.note
    later = next_rung(exercise, 3, now + 60 * exercise.minutes + 1)
    assert later.number == 4
    attempt(exercise)
    third = next_rung(exercise, 3, now)
    assert third.number == 4
    assert f'{NAME} = solution("{NAME}").plug_in()' in third.text


def test_the_staff_version_is_open_after_a_pass(exercise: Exercise) -> None:
    attempt(exercise, "passed")
    assert next_rung(exercise, 3, time.time()).number == 4


def test_at_twice_the_minutes_it_says_move_on(exercise: Exercise) -> None:
    attempt(exercise)
    now = time.time()
    assert "Move on" not in str(next_rung(exercise, 1, now))
    assert "Move on" in str(next_rung(exercise, 1, now + 120 * exercise.minutes + 1))
    attempt(exercise, "passed")
    assert "Move on" not in str(next_rung(exercise, 1, now + 120 * exercise.minutes + 1))


def test_a_hint_takes_the_function_itself() -> None:
    def online_softmax(tiles):
        raise NotImplementedError

    assert hint(online_softmax).number == 1
    with pytest.raises(TypeError, match="name as text"):
        hint(3.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UnknownExerciseError, match="online_softmax"):
        hint("no_such_exercise")


def test_code_in_a_hint_is_shown_as_code(exercise: Exercise) -> None:
    html = next_rung(exercise, 2, time.time())._repr_html_()
    assert "<pre><code>" in html
    assert "```" not in html


# The staff version -------------------------------------------------------------------------------

MASTER = '''# %% [markdown]
# # Title with `online_softmax`

# %% tags=["setup"]
import math

import torch

from course_lib import check, setup
from course_lib.runtime.tile import tl, triton

setup("flash_attention")
raise RuntimeError("the setup cell must not run")

# %% [markdown] card="first"

# %% exercise="first"
def first(x):
    """Docstring."""
    # BEGIN SOLUTION
    # STUB raise NotImplementedError("first")
    return FACTOR * x
    # END SOLUTION

# %% check="first"
check(first)

# %%
FACTOR = 2.0
print(first(1.0))

# %% exercise="online_softmax"
@triton.jit
def double_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    # BEGIN SOLUTION
    # STUB tl.static_assert(False, "TODO")
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, 2 * tl.load(x_ptr + offs))
    # END SOLUTION


def online_softmax(x):
    out = torch.empty_like(x)
    double_kernel[(1,)](x, out, BLOCK=16)
    # BEGIN SOLUTION
    return out, first(1.0), math.pi
    # END SOLUTION

# %% check="online_softmax"
check(online_softmax)
'''


@pytest.fixture
def master(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "08_flash_attention.py"
    path.write_text(MASTER)
    monkeypatch.setattr(course_help, "solution_master", lambda exercise: path)
    return path


def test_a_solution_opens_after_an_attempt(exercise: Exercise, master: Path) -> None:
    closed = solution(NAME)
    assert "opens after your first check" in str(closed)
    assert "return out" not in closed._repr_html_()
    with pytest.raises(SolutionClosedError):
        closed.plug_in()
    attempt(exercise, "todo")
    assert solution(NAME).source == ""
    attempt(exercise)
    opened = solution(NAME)
    assert "return out, first(1.0), math.pi" in str(opened)
    assert "BEGIN SOLUTION" not in str(opened)
    assert "STUB" not in str(opened)


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_the_staff_version_runs_with_what_it_needs_and_nothing_else(
    exercise: Exercise, master: Path
) -> None:
    import torch

    attempt(exercise)
    staff = solution(NAME).plug_in()
    assert getattr(staff, STAFF_MARK)
    # Triton and a traceback find its source.
    assert "double_kernel[(1,)]" in inspect.getsource(staff)
    x = torch.arange(16.0)
    with interpreted():
        out, doubled, pi = staff(x)
    assert torch.equal(out, 2 * x)
    assert (doubled, round(pi, 2)) == (2.0, 3.14)


def test_a_number_plugs_in_as_its_value(
    exercise: Exercise, master: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master.write_text(
        '# %% exercise="online_softmax"\n# BEGIN SOLUTION\n# STUB online_softmax = ...\n'
        "online_softmax = 4.85\n# END SOLUTION\n"
    )
    attempt(exercise)
    assert solution(NAME).plug_in() == 4.85


def test_only_what_is_needed_is_taken_from_above() -> None:
    above = (
        "import math\nimport os\nsetup('x')\nif True:\n    tau = 2 * math.pi\n"
        "@decorated\ndef decorated_helper():\n    return tau\ndef decorated(f): return f\n"
        "print('demo')\nunused = 1\ntau += 0\nfor n in range(3):\n    print(n)\n"
    )
    kept = needed_above(above, "def answer():\n    n = 1\n    return decorated_helper() + n")
    assert kept.splitlines()[0] == "import math"
    assert "@decorated\ndef decorated_helper" in kept
    assert "tau += 0" in kept
    for line in ("import os", "setup(", "demo", "unused", "for n"):
        assert line not in kept


def test_a_missing_solution_says_so(exercise: Exercise, master: Path) -> None:
    attempt(exercise)
    master.write_text("# %%\nx = 1\n")
    with pytest.raises(SolutionMissingError, match="no cell for online_softmax"):
        solution(NAME)


def test_the_real_staff_version_passes_its_check_without_points(exercise: Exercise) -> None:
    attempt(exercise)
    verdict = check(solution(NAME).plug_in())
    assert verdict.status == "passed"
    assert verdict.staff
    assert progress.standing(exercise.id).status == "failed"
