"""`course test`: its stages, their summaries, its exit code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from course_lib.authoring.stages import Plan, Stage, plan, run


def stage(name: str, code: str = "", **more) -> Stage:
    return Stage(name, [[sys.executable, "-c", code]], **{"module": "sys", **more})


def test_stages(root: Path):
    names = [each.name for each in plan(root, args=[]).stages]
    assert names == ["ruff", "types", "build", "unit tests", "notebooks", "exercises", "browser"]
    fast = [each.name for each in plan(root, fast=True, args=[]).stages]
    assert fast == names[:4]
    deep = plan(root, deep=True, args=[])
    assert "--deep" in deep.stages[3].commands[0]


def test_pytest_arguments_run_pytest_alone(root: Path):
    only = plan(root, deep=True, args=["-m", "gpu"])
    assert [each.name for each in only.stages] == ["pytest"]
    assert only.stages[0].commands[0][2:] == ["pytest", "--deep", "-m", "gpu"]
    assert not only.hide_gpus


def test_a_failure_stops_nothing_and_decides_the_exit_code(tmp_path: Path, capfd):
    code = run(Plan(tmp_path, [stage("one"), stage("two", "exit(3)"), stage("three")]))
    out = capfd.readouterr().out
    assert code == 1
    assert "two: failed in" in out
    assert "three: passed in" in out
    assert "1 failed, 2 passed in" in out


def test_stages_have_a_home_of_their_own_and_no_gpu(tmp_path: Path, capfd, course_home: Path):
    code = "import os; print(os.environ['COURSE_HOME'], repr(os.environ['CUDA_VISIBLE_DEVICES']))"
    assert run(Plan(tmp_path, [stage("one", code)])) == 0
    out = capfd.readouterr().out
    assert "course-test-" in out
    assert "''" in out
    assert str(course_home) not in out


@pytest.mark.parametrize(
    ("ci", "outcome", "code"), [("", "browser: skipped", 0), ("true", "browser: failed", 1)]
)
def test_without_chromium(tmp_path: Path, capfd, monkeypatch, ci: str, outcome: str, code: int):
    monkeypatch.setenv("CI", ci)
    browser = stage("browser", needs=("Chromium", None, "chromium"))
    assert run(Plan(tmp_path, [browser])) == code
    out = capfd.readouterr().out
    assert outcome in out
    assert "apt-get install chromium" in out


def test_a_missing_package_is_named(tmp_path: Path, capfd):
    assert run(Plan(tmp_path, [stage("types", module="no_such_package")])) == 1
    assert "pip install -c constraints.txt -e '.[wild,dev]'" in capfd.readouterr().out
