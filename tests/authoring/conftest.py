"""A small repository with one chapter, so that these tests depend on no real chapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from course_lib.grading.exercise import Exercise

CHAPTER = """\
# %% [markdown]
# # How fast is a sum?
#
# A puzzle.

# %% tags=["setup"]
import json  # noqa: F401
import os

SETUP = 'setup("small_chapter")'

# %% [markdown]
# ## A measurement

# %% tags=["outcome"]
# NBVAL_CHECK_OUTPUT
print("gpus:", repr(os.environ["CUDA_VISIBLE_DEVICES"]))
print("home has", len(os.listdir(os.environ["COURSE_HOME"])), "files")

# %%
6 * 7

# %% [markdown] exercises="small_chapter"
# ## Exercises
"""

SOLUTION = '''\
# %% [markdown]
# # Exercises: how fast is a sum?

# %% tags=["setup"]
SETUP = 'setup("small_chapter")'


def check(*answers, **named):
    return "checked"


# %% [markdown] card="total"

# %% exercise="total"
def total(values):
    """Add the values up."""
    # BEGIN SOLUTION
    # STUB result = 0
    # STUB raise NotImplementedError("total: add them in a loop")
    result = 0
    for one_value in values:
        result += one_value
    # END SOLUTION
    return result


# %% check="total"
check(total)

# %% [markdown] card="plateau"

# %% exercise="plateau"
# BEGIN SOLUTION
plateau = 4.85
# END SOLUTION

# %% check="plateau"
check(plateau=plateau)

# %% [markdown] tags=["solution"]
# Only here: why it works.
'''


def _record(name: str, kind: Any, core: bool) -> Exercise:
    return Exercise(
        id=f"small_chapter.{name}",
        kind=kind,
        title=f"The {name} of it",
        task="Do it.",
        why="You can do it afterwards.",
        points=3,
        minutes=10,
        difficulty=2,
        core=core,
        cases=lambda size, seed: [],
        oracle=lambda data: 0,
        accepts=(1, 2),
        misconceptions=(),
        hints=("a", "b", "c"),
        unlocks=("plateau",) if core else (),
    )


RECORDS = [_record("total", "function", True), _record("plateau", "answer", False)]


def _write(root: Path) -> None:
    (root / "pyproject.toml").write_text('[tool.course]\nrepository = ""\n')
    for folder, text in (("notebooks", CHAPTER), ("solutions", SOLUTION)):
        path = root / folder / "src" / "01_small_chapter.py"
        path.parent.mkdir(parents=True)
        path.write_text(text)


def _exercises_of(package: str) -> list[Exercise]:
    assert package == "small_chapter"
    return RECORDS


def _install(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("build", "masters"):
        monkeypatch.setattr(f"course_lib.authoring.{module}.exercises_of", _exercises_of)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of a repository whose one chapter is 01_small_chapter, not built."""
    _write(tmp_path)
    _install(monkeypatch)
    return tmp_path


@pytest.fixture(scope="session")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("built")
    _write(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _install(monkeypatch)
        from course_lib.authoring.build import build

        build(root, say=lambda line: None)
    return root


@pytest.fixture
def built(small: Path, built_once: Path) -> Path:
    """The same repository, built (once a session: each build starts two kernels)."""
    shutil.copytree(built_once, small, dirs_exist_ok=True)
    return small
