"""`course check NOTEBOOK` tells what each check said, and never changes the file."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from course_lib import cli
from course_lib.notebook.run_checks import Report, Result, run_checks, table

# Stands for course_lib in the kernel, so that these tests depend on no real exercise.
FAKE = """\
from types import SimpleNamespace as S

def check(answer):
    exercise = S(id="c.f", title="Adding", points=3)
    try:
        status = "passed" if answer(1) == 2 else "failed"
    except NotImplementedError:
        status = "todo"
    return S(exercise=exercise, status=status, message="Off by one.", case="one" )
"""


@pytest.fixture
def write(tmp_path: Path):
    package = tmp_path / "fake" / "course_lib"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)

    def write(*sources: str) -> tuple[Path, dict[str, str]]:
        path = tmp_path / "01_a.ipynb"
        nbformat.write(new_notebook(cells=[new_code_cell(s) for s in sources]), path)
        return path, {"PYTHONPATH": str(tmp_path / "fake")}

    return write


def test_verdicts_errors_and_exit_code(write):
    path, env = write(
        "from course_lib import check",
        "def f(x):\n    return x",
        "check(f)",
        "1 / 0",
        "def f(x):\n    return x + 1",
        "check(f)",
    )
    before = path.read_bytes()
    report = run_checks(path, env=env)
    # The last verdict on an exercise counts.
    assert report.results == [Result("c.f", "Adding", 3, "passed", "Off by one.", "one")]
    assert report.errors == [(4, "ZeroDivisionError: division by zero")]
    assert report.exit_code == 1
    assert path.read_bytes() == before


def test_stubs_are_no_failure(write):
    path, env = write(
        "from course_lib import check\ndef f(x):\n    raise NotImplementedError('todo')",
        "check(f)",
        "f(1)",
    )
    report = run_checks(path, env=env)
    assert [result.status for result in report.results] == ["todo"]
    assert report.exit_code == 0


def test_a_dead_kernel_is_said(write):
    path, env = write("import os", "os._exit(1)", "1")
    report = run_checks(path, env=env)
    assert "kernel died" in report.stopped
    assert report.exit_code == 1


def test_table():
    report = Report([Result("c.f", "Adding", 3, "failed", "Off by one.", "one")], [(4, "E: x")])
    assert table(report).splitlines() == [
        "✗ Adding  not yet  0 of 3",
        "    Off by one. (one)",
        "✗ cell 4 raised E: x",
        "0 of 3 points",
    ]
    assert table(Report()) == "No check ran in this notebook."


def test_a_broken_notebook_is_named(tmp_path: Path, capsys):
    path = tmp_path / "broken.ipynb"
    path.write_text('{"cells": [')
    assert cli.main(["check", str(path)]) == 2
    assert f"{path} is not a notebook" in capsys.readouterr().err
