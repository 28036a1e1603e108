"""Masters: what an author edits. This module reads them and says what is wrong with them.

A master is a jupytext `py:percent` file. `notebooks/src/NN_slug.py` is a chapter,
`solutions/src/NN_slug.py` holds a chapter's exercises and their solutions. Beyond plain cells it
knows these marks on a cell's `# %%` line:

    tags=["setup"]          the first code cell: imports and `setup("slug")`; the build puts the
                            Colab bootstrap above it, as a folded cell
    tags=["outcome"]        the outcome of a prediction; its source is folded
    tags=["folded"]         any other cell whose source is folded
    tags=["solution"]       only in the solution notebook
    tags=["exercise"]       only in the exercise notebook
    card="name"             Markdown; becomes the card of that exercise (solution masters)
    exercise="name"         the learner's cell, with solution regions (solution masters)
    check="name"            the cell with its `check(...)` (solution masters)
    exercises="package"     Markdown; becomes the chapter's list of exercises (chapter masters)
"""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jupytext

from course_lib.authoring import regions
from course_lib.grading.exercise import Exercise, UnknownExerciseError, exercises_of

SLUG = re.compile(r"^\d\d_[a-z][a-z0-9_]*$")
TAGS = ("setup", "outcome", "folded", "solution", "exercise")
MARKS = ("card", "exercise", "check", "exercises")
MAX_LINES = 30  # of a chapter's cell: one idea
MAX_ANSWER_LINES = 90  # of an exercise's cell: a kernel and its launcher stand in one cell

Kind = Literal["chapter", "solution"]


class MasterError(ValueError):
    """Something is wrong with a master. The message names the file, the cell and the line."""

    def __init__(self, path: Path, cell: int | None, line: int | None, message: str) -> None:
        place = str(path)
        if line is not None:
            place += f":{line}"
        if cell is not None:
            place += f" (cell {cell})"
        super().__init__(f"{place}: {message}")


@dataclass(frozen=True)
class Cell:
    """One cell of a master.

    Attributes:
        index: Its place, counted from 1, as error messages name it.
        line: The file's line on which its text starts.
        kind: "code" or "markdown".
        source: Its text, without comment signs where it is Markdown.
        tags: Its tags.
        mark: One of `MARKS`, or "".
        name: The mark's value.
    """

    index: int
    line: int
    kind: str
    source: str
    tags: tuple[str, ...] = ()
    mark: str = ""
    name: str = ""


@dataclass(frozen=True)
class Master:
    """A master that was read.

    Attributes:
        path: Where it stands.
        slug: "08_flash_attention".
        kind: "chapter" or "solution".
        text: The whole file.
        cells: Its cells in order.
    """

    path: Path
    slug: str
    kind: Kind
    text: str
    cells: tuple[Cell, ...] = field(repr=False)

    @property
    def package(self) -> str:
        """The chapter's package name: "flash_attention"."""
        return self.slug.split("_", 1)[1]

    def error(self, cell: Cell | None, message: str, offset: int = 0) -> MasterError:
        """An error at a cell; `offset` counts lines from the cell's first."""
        if cell is None:
            return MasterError(self.path, None, None, message)
        return MasterError(self.path, cell.index, cell.line + offset, message)


def read_master(path: Path, kind: Kind) -> Master:
    """Read one master.

    Args:
        path: The file.
        kind: What it is a master of.

    Raises:
        MasterError: If it cannot be read as a master.
    """
    slug = path.stem
    if not SLUG.match(slug):
        raise MasterError(
            path, None, None, "A master is named NN_slug.py, like 08_flash_attention."
        )
    text = path.read_text(encoding="utf-8")
    notebook = jupytext.reads(text, fmt="py:percent")
    lines = text.splitlines()
    cells: list[Cell] = []
    cursor = 0
    for index, raw in enumerate(notebook.cells, start=1):
        start = _find_marker(lines, cursor)
        if start is None or any(line.strip() for line in _body(lines[cursor:start])):
            raise MasterError(path, index, cursor + 1, "Text stands before the first '# %%' line.")
        count = len(raw.source.splitlines())
        first = start + 1
        # jupytext drops blank lines above a cell's text, some versions all, some none.
        blank_above = raw.source.startswith("\n")
        while first < len(lines) and not lines[first].strip() and count and not blank_above:
            first += 1
        cursor = first + count if count else start + 1
        cells.append(_cell(path, index, first + 1 if count else start + 1, raw))
    return Master(path, slug, kind, text, tuple(cells))


def _find_marker(lines: list[str], cursor: int) -> int | None:
    for number in range(cursor, len(lines)):
        if lines[number].startswith("# %%"):
            return number
    return None


def _body(lines: list[str]) -> list[str]:
    """The lines without jupytext's header."""
    if lines and lines[0].strip() == "# ---":
        for number, line in enumerate(lines[1:], start=1):
            if line.strip() == "# ---":
                return lines[number + 1 :]
    return lines


def _cell(path: Path, index: int, line: int, raw: Any) -> Cell:
    metadata = dict(raw.metadata)
    tags = tuple(metadata.pop("tags", ()))
    metadata.pop("lines_to_next_cell", None)
    marks = {key: metadata.pop(key) for key in MARKS if key in metadata}
    if raw.cell_type not in ("code", "markdown"):
        raise MasterError(path, index, line, f"Cells are code or markdown, not {raw.cell_type}.")
    if metadata:
        raise MasterError(
            path, index, line, f"Unknown mark {next(iter(metadata))!r}; known: {', '.join(MARKS)}."
        )
    for tag in tags:
        if tag == "raises-exception":
            raise MasterError(
                path, index, line, "The tag 'raises-exception' hides cells that stopped raising."
            )
        if tag not in TAGS:
            raise MasterError(path, index, line, f"Unknown tag {tag!r}; known: {', '.join(TAGS)}.")
    if len(marks) > 1:
        raise MasterError(path, index, line, f"A cell has one mark, not {' and '.join(marks)}.")
    mark, name = next(iter(marks.items()), ("", ""))
    wanted = {"card": "markdown", "exercises": "markdown", "exercise": "code", "check": "code"}
    if mark and raw.cell_type != wanted[mark]:
        raise MasterError(path, index, line, f"A cell with {mark}=… is a {wanted[mark]} cell.")
    return Cell(index, line, raw.cell_type, raw.source, tags, mark, name)


def lint_master(master: Master) -> list[str]:
    """Everything that is wrong with a master, one message each; empty where it is fine."""
    problems: list[MasterError] = []
    problems += _lint_prose(master)
    problems += _lint_code(master)
    problems += _lint_setup(master)
    problems += _lint_exercises(master)
    return [str(problem) for problem in problems]


def _lint_prose(master: Master) -> list[MasterError]:
    problems = []
    level = 0
    titles = 0
    for cell in master.cells:
        if cell.kind != "markdown":
            continue
        if cell.mark == "card":
            # The generated card starts with a heading of the second level.
            level = 2
            continue
        for offset, depth in _headings(cell.source):
            titles += depth == 1
            if depth == 1 and titles > 1:
                problems.append(master.error(cell, "A second H1; a notebook has one.", offset))
            if depth > level + 1:
                problems.append(
                    master.error(cell, f"The heading jumps from H{level} to H{depth}.", offset)
                )
            level = depth
        if cell.mark == "exercises" and cell.name != master.package:
            problems.append(
                master.error(cell, f"exercises={cell.name!r}; expected {master.package!r}.")
            )
        problems += _too_long(master, cell, MAX_LINES)
    if titles == 0:
        problems.append(master.error(None, "No H1: the first cell holds the title, '# Title'."))
    return problems


def _headings(source: str) -> list[tuple[int, int]]:
    """The (line, level) of each heading, code fences left out."""
    found = []
    fence = ""
    for offset, line in enumerate(source.splitlines()):
        if match := re.match(r"\s*(```+|~~~+)", line):
            if not fence:
                fence = match[1]
            elif match[1].startswith(fence):
                fence = ""
        elif not fence and (match := re.match(r"(#{1,6})\s+\S", line)):
            found.append((offset, len(match[1])))
    return found


def _lint_code(master: Master) -> list[MasterError]:
    problems = []
    for cell in master.cells:
        if cell.kind != "code":
            continue
        for offset, line in enumerate(cell.source.splitlines()):
            if re.match(r"\s*(%{1,2}[a-zA-Z]|![a-zA-Z/.]|\?)", line):
                problems.append(
                    master.error(cell, f"A magic or a shell command ({line.strip()!r}).", offset)
                )
        answer = cell.mark == "exercise"
        problems += _too_long(master, cell, MAX_ANSWER_LINES if answer else MAX_LINES)
        if not answer and regions.has_region(cell.source):
            problems.append(
                master.error(cell, 'A solution region stands outside a cell with exercise="…".')
            )
    return problems


def _too_long(master: Master, cell: Cell, limit: int) -> list[MasterError]:
    count = len(cell.source.splitlines())
    return [master.error(cell, f"{count} lines; at most {limit}.")] if count > limit else []


def _lint_setup(master: Master) -> list[MasterError]:
    code = [cell for cell in master.cells if cell.kind == "code"]
    setups = [cell for cell in code if "setup" in cell.tags]
    if not setups:
        return [master.error(None, 'No setup cell: the first code cell is `# %% tags=["setup"]`.')]
    if len(setups) > 1:
        return [master.error(setups[1], "A second setup cell.")]
    if setups[0] is not code[0]:
        return [master.error(setups[0], "The setup cell must be the first code cell.")]
    call = f'setup("{master.package}")'
    if call not in setups[0].source:
        return [master.error(setups[0], f"The setup cell does not call {call}.")]
    return []


def _lint_exercises(master: Master) -> list[MasterError]:
    marked = [cell for cell in master.cells if cell.mark in ("card", "exercise", "check")]
    if master.kind == "chapter":
        return [
            master.error(cell, f"{cell.mark}=… belongs in solutions/src/{master.slug}.py.")
            for cell in marked
        ]
    try:
        records = {exercise.name: exercise for exercise in exercises_of(master.package)}
    except UnknownExerciseError as error:
        return [master.error(None, str(error))]
    expected = list(records)
    problems = []
    for mark in ("card", "exercise", "check"):
        names = [cell.name for cell in marked if cell.mark == mark]
        for cell in marked:
            if cell.mark == mark and cell.name not in expected:
                known = ", ".join(expected)
                problems.append(
                    master.error(cell, f"No exercise is called {cell.name!r}; there are: {known}.")
                )
        for name in expected:
            if names.count(name) != 1:
                problems.append(
                    master.error(
                        None, f'{names.count(name)} cells with {mark}="{name}"; expected 1.'
                    )
                )
        if sorted(names) == sorted(expected) and names != expected:
            problems.append(
                master.error(None, f"The {mark} cells stand in another order than the records.")
            )
    for name in expected:
        order = [cell.mark for cell in marked if cell.name == name]
        if sorted(order) == ["card", "check", "exercise"] and order != [
            "card",
            "exercise",
            "check",
        ]:
            problems.append(master.error(None, f"{name}: the order is card, exercise, check."))
    for cell in marked:
        if cell.mark == "exercise" and cell.name in records:
            problems += _lint_answer(master, cell, records[cell.name])
        elif cell.mark == "check" and not re.search(r"\bcheck\(", cell.source):
            problems.append(master.error(cell, "The check cell does not call check(…)."))
    return problems


def _lint_answer(master: Master, cell: Cell, record: Exercise) -> list[MasterError]:
    if not regions.has_region(cell.source):
        return [master.error(cell, f"The exercise has no '{regions.BEGIN}' region.")]
    try:
        texts = {
            "solution": regions.solution_text(cell.source),
            "stub": regions.stub_text(cell.source, default_stub(record)),
        }
    except regions.RegionError as error:
        return [master.error(cell, str(error), error.line - 1)]
    for what, text in texts.items():
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            return [master.error(cell, f"The {what} is not valid Python: {error.msg}.")]
        if what == "solution" and cell.name not in _defined(tree):
            return [master.error(cell, f"The {what} does not define {cell.name!r} at top level.")]
    return []


def _defined(tree: ast.Module) -> set[str]:
    """The names that a cell binds at top level."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                names |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}
    return names


def default_stub(exercise: Exercise) -> str:
    """The stub of a region without `# STUB` lines."""
    if exercise.kind in ("answer", "choice"):
        return f"{exercise.name} = ...  # your answer"
    return f'raise NotImplementedError("{exercise.name}: your code goes here")'
