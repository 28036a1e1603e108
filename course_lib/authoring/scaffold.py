"""`course new-chapter`: every file of a chapter, in the shape of chapter 08, green as it stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TEMPLATES = Path(__file__).resolve().parent / "templates"
SLUG = re.compile(r"(\d\d)_([a-z][a-z0-9]*(?:_[a-z0-9]+)*)")
# Names that course_lib uses for something else.
TAKEN = ("runtime", "notebook", "grading", "authoring", "cli", "course_lib", "tests", "benchmarks")

# Template → where it goes.
FILES = {
    "package__init__.py": "course_lib/@PACKAGE@/__init__.py",
    "reference.py": "course_lib/@PACKAGE@/reference.py",
    "cases.py": "course_lib/@PACKAGE@/cases.py",
    "kernels.py": "course_lib/@PACKAGE@/kernels.py",
    "ops.py": "course_lib/@PACKAGE@/ops.py",
    "labs.py": "course_lib/@PACKAGE@/labs.py",
    "questions.py": "course_lib/@PACKAGE@/questions.py",
    "exercises__init__.py": "course_lib/@PACKAGE@/exercises/__init__.py",
    "first_step.py": "course_lib/@PACKAGE@/exercises/first_step.py",
    "notebook.py": "notebooks/src/@SLUG@.py",
    "solution.py": "solutions/src/@SLUG@.py",
    "test_correctness.py": "tests/@PACKAGE@/test_correctness.py",
    "benchmark.py": "benchmarks/@PACKAGE@.py",
}


class ScaffoldError(ValueError):
    """The chapter cannot be made. The message says why; nothing was written."""


def new_chapter(root: Path, slug: str) -> list[Path]:
    """Write a chapter's files.

    Args:
        root: The repository.
        slug: Such as "03_receptive_field".

    Returns:
        The files, in the order in which an author meets them.

    Raises:
        ScaffoldError: If the slug is none, or its number, its package or a file is taken.
    """
    match = SLUG.fullmatch(slug)
    if match is None:
        raise ScaffoldError(
            f"{slug!r} is not a slug; expected NN_name, such as 03_receptive_field."
        )
    number, package = match.groups()
    if package in TAKEN:
        raise ScaffoldError(f"{package!r} is the name of another part of the course.")
    for path in sorted((root / "notebooks" / "src").glob(f"{number}_*.py")):
        raise ScaffoldError(f"Number {number} is taken by {path.stem}.")
    title = package.replace("_", " ").capitalize()
    values = {
        "@SLUG@": slug,
        "@NUMBER@": number,
        "@PACKAGE@": package,
        "@CLASS@": package.title().replace("_", ""),
        "@TITLE@": title,
    }
    targets = {name: root / _fill(where, values) for name, where in FILES.items()}
    for path in (*targets.values(), root / "course_lib" / f"{package}.py"):
        if path.exists():
            raise ScaffoldError(f"{path.relative_to(root)} exists already.")
    for name, path in targets.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        text = (TEMPLATES / f"{name}.template").read_text(encoding="utf-8")
        path.write_text(_fill(text, values), encoding="utf-8")
    _tidy(root, list(targets.values()))
    return list(targets.values())


def _tidy(root: Path, paths: list[Path]) -> None:
    """Sort imports and break lines: both depend on the chapter's name."""
    ruff = [sys.executable, "-m", "ruff"]
    for command in (["check", "-q", "--fix", "--select=I,RUF022"], ["format", "-q"]):
        subprocess.run([*ruff, *command, *map(str, paths)], cwd=root, check=False)


def _fill(text: str, values: dict[str, str]) -> str:
    for key, value in values.items():
        text = text.replace(key, value)
    return text
