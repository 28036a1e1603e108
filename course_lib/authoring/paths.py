"""Where things stand in the repository."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any


class NoRepositoryError(RuntimeError):
    """A command that edits the repository was used where there is none."""


def repository_root() -> Path:
    """The clone that this `course_lib` stands in.

    Raises:
        NoRepositoryError: If it was installed from a wheel.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").is_file() or not (root / "solutions" / "src").is_dir():
        raise NoRepositoryError(
            "This command works on a clone of the course, and course_lib is installed from a "
            f"wheel here ({root}). Clone the repository and use ./course in it."
        )
    return root


def settings(root: Path) -> dict[str, Any]:
    """The `[tool.course]` table of pyproject.toml."""
    with (root / "pyproject.toml").open("rb") as file:
        return tomllib.load(file).get("tool", {}).get("course", {})
