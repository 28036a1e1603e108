"""Notebooks as honest learners hand them in: exercises/08 with answers, and their habits.

An answer is an accepted answer of the exercise's record, as text, with all that it needs from the
record's module. So a notebook here is code that a learner could have written, and no more.
"""

from __future__ import annotations

import ast
import inspect
import json
import sys
from pathlib import Path
from typing import Any

from course_lib.grading.exercise import exercises_of

ROOT = Path(__file__).parents[3]
SLUG, PACKAGE = "08_flash_attention", "flash_attention"
RECORDS = {exercise.name: exercise for exercise in exercises_of(PACKAGE)}
# What no cell of a notebook would import, and no accepted answer needs.
_OF_THE_RECORD = ("course_lib.grading", "__future__", "course_lib.flash_attention")


def accepted(name: str, variant: int = 0) -> str:
    """An accepted answer to an exercise as a cell's text: imports, helpers, the answer.

    Args:
        name: The exercise.
        variant: Which of its accepted answers; the last one where there are fewer.
    """
    exercise = RECORDS[name]
    if exercise.kind in ("answer", "choice"):
        return f"{name} = {exercise.accepts[min(variant, len(exercise.accepts) - 1)]!r}"
    answer: Any = exercise.accepts[min(variant, len(exercise.accepts) - 1)]
    module = sys.modules[answer.__module__]
    own = next(each for each, value in vars(module).items() if value is answer)
    parts = _needed(inspect.getsource(module), own)
    if own != name:
        parts.append(f"{name} = {own}")
    return "\n\n".join(parts)


def _needed(text: str, name: str) -> list[str]:
    """The top-level statements of a module that `name` is made of, in their order."""
    lines = text.splitlines()
    statements = ast.parse(text).body
    makers: dict[str, ast.stmt] = {}
    for statement in statements:
        for each in _defines(statement):
            makers[each] = statement
    wanted, waiting = set(), [name]
    while waiting:
        statement = makers.get(waiting.pop())
        if statement is None or statement in wanted:
            continue
        wanted.add(statement)
        waiting += [node.id for node in ast.walk(statement) if isinstance(node, ast.Name)]
    parts = []
    for statement in statements:
        if statement in wanted and not _is_the_records(statement):
            starts = [statement, *getattr(statement, "decorator_list", [])]
            first = min(each.lineno for each in starts)
            parts.append("\n".join(lines[first - 1 : statement.end_lineno]))
    return parts


def _defines(statement: ast.stmt) -> list[str]:
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return [statement.name]
    if isinstance(statement, ast.Assign):
        return [target.id for target in statement.targets if isinstance(target, ast.Name)]
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return [(alias.asname or alias.name).split(".")[0] for alias in statement.names]
    return []


def _is_the_records(statement: ast.stmt) -> bool:
    module = statement.module if isinstance(statement, ast.ImportFrom) else None
    return module is not None and module.startswith(_OF_THE_RECORD)


class Notebook:
    """exercises/08, to be changed and written."""

    def __init__(self) -> None:
        path = ROOT / "exercises" / f"{SLUG}.ipynb"
        self.content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))

    @property
    def cells(self) -> list[dict[str, Any]]:
        """The cells."""
        return self.content["cells"]

    def at(self, name: str, what: str = "exercise") -> int:
        """Where the cell of an exercise stands, or its check."""
        return next(
            number
            for number, cell in enumerate(self.cells)
            if cell["metadata"].get("course", {}).get(what) == name
        )

    def write(self, name: str, text: str) -> Notebook:
        """Replace a stub by a text."""
        self.cells[self.at(name)]["source"] = text
        return self

    def solve(self, *names: str, variant: int = 0) -> Notebook:
        """Replace stubs by accepted answers; without names, all of them."""
        for name in names or RECORDS:
            self.write(name, accepted(name, variant))
        return self

    def insert(self, at: int, text: str, kind: str = "code") -> Notebook:
        """Put a cell before the one at this place; at -1, behind all others."""
        cell = {"cell_type": kind, "metadata": {}, "source": text}
        if kind == "code":
            cell |= {"outputs": [], "execution_count": None}
        self.cells.insert(at if at >= 0 else len(self.cells), cell)
        return self

    def drop(self, *texts: str) -> Notebook:
        """Delete the worked cells that hold one of these texts."""
        self.content["cells"] = [
            cell
            for cell in self.cells
            if cell["metadata"].get("course")
            or not any(text in "".join(cell["source"]) for text in texts)
        ]
        return self

    def first(self, text: str) -> Notebook:
        """Put a cell behind the one with the imports and `setup`."""
        setup = next(n for n, cell in enumerate(self.cells) if "setup(" in "".join(cell["source"]))
        return self.insert(setup + 1, text)

    def last(self, text: str) -> Notebook:
        """Put a cell behind all others."""
        return self.insert(-1, text)

    def bytes(self) -> bytes:
        """As it is handed in."""
        return json.dumps(self.content).encode()
