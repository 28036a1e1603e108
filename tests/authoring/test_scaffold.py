"""A scaffolded chapter is in the house's shape, and green as it stands."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.authoring.scaffold import FILES, ScaffoldError, new_chapter

COPIED = ("course_lib", "notebooks", "solutions", "exercises", "benchmarks", "tests")


@pytest.fixture
def clone(tmp_path: Path, root: Path) -> Path:
    """An empty repository with this one's settings for lint and types."""
    (tmp_path / "pyproject.toml").write_bytes((root / "pyproject.toml").read_bytes())
    return tmp_path


def test_files_are_complete_formatted_and_linted(clone: Path):
    written = new_chapter(clone, "99_zebra_stripes")
    assert len(written) == len(FILES)
    names = [str(path.relative_to(clone)) for path in written]
    assert "course_lib/zebra_stripes/exercises/first_step.py" in names
    assert "notebooks/src/99_zebra_stripes.py" in names
    assert not [path for path in written if "@" in path.read_text().replace("@triton", "").replace(
        "@pytest", "").replace("@staticmethod", "").replace("@misconception", "").replace(
        "@dataclass", "")]  # fmt: skip
    for command in (["check"], ["format", "--check"]):
        ruff = [sys.executable, "-m", "ruff", *command, *map(str, written)]
        done = subprocess.run(ruff, cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("slug", "says"),
    [
        ("zebra", "'zebra' is not a slug; expected NN_name"),
        ("3_zebra", "not a slug"),
        ("03_Zebra", "not a slug"),
        ("03_../../etc", "not a slug"),
        ("03_runtime", "'runtime' is the name of another part"),
        ("98_other", "Number 98 is taken by 98_zebra"),
        ("97_zebra", "course_lib/zebra/__init__.py exists already"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_written(clone: Path, slug: str, says: str):
    new_chapter(clone, "98_zebra")
    before = sorted(clone.rglob("*"))
    with pytest.raises(ScaffoldError, match=says):
        new_chapter(clone, slug)
    assert sorted(clone.rglob("*")) == before


@pytest.mark.slow
def test_a_new_chapter_is_green(clone: Path, root: Path):
    """It builds, and passes its own tests, the exercise tests and the house's."""
    for name in COPIED:
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, clone / name, ignore=skip)
    environment = {**os.environ, "PYTHONPATH": str(clone)}

    def run(*command: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=clone,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    run("course_lib.cli", "new-chapter", "99_zebra_stripes")
    run("course_lib.cli", "build", "99_zebra_stripes")
    tests = ["tests/zebra_stripes", "tests/exercises", "tests/meta", "tests/notebooks"]
    run("pytest", "-q", *tests, "-k", "zebra")
    run("benchmarks.run", "zebra_stripes", "--smoke", "--repeats", "1")
