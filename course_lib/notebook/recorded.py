"""Figures that were measured earlier, and parts of the course's own source."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parent.parent
PLACES = (PACKAGE / "_recorded", PACKAGE.parent / "benchmarks" / "recorded")
"""In an installed wheel, and in a clone."""


def recorded(name: str) -> dict[str, Any] | None:
    """A recorded benchmark, or None where this installation has none of that name.

    Args:
        name: The file's name without ".json".
    """
    for place in PLACES:
        file = place / f"{name}.json"
        if file.exists():
            return json.loads(file.read_text(encoding="utf-8"))
    return None


def recorded_on(document: dict[str, Any]) -> str:
    """Device, versions and date of a recorded run, in a few words."""
    facts = document["environment"]
    return f"{facts['device']}, torch {facts['torch']}, {facts['date']}"


def excerpt(obj: Any, first: str, last: str) -> None:
    """Show a part of an object's source: from a line that contains a text to one with another.

    Line numbers move whenever a file is edited; what a line says moves with it.

    Args:
        obj: A function, class or kernel of the course.
        first: A text in the first line to show.
        last: A text in the last line; the first such line at or after `first`.

    Raises:
        ValueError: If one of the texts is not there.
    """
    from course_lib.notebook.figures import source

    source(obj, excerpt_lines(obj, first, last))


def excerpt_lines(obj: Any, first: str, last: str) -> tuple[int, int]:
    """The lines that `excerpt` shows, counted from the object's first line as 1."""
    target = obj
    while hasattr(target, "fn") and not inspect.isroutine(target):
        target = target.fn
    lines = inspect.getsourcelines(target)[0]
    start = next((n for n, line in enumerate(lines, 1) if first in line), None)
    if start is None:
        raise ValueError(f"{target.__name__} has no line with {first!r}.")
    stop = next((n for n, line in enumerate(lines, 1) if n >= start and last in line), None)
    if stop is None:
        raise ValueError(f"{target.__name__} has no line with {last!r} after {first!r}.")
    return start, stop
