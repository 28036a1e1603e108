"""Help with an exercise: hints one at a time, and the staff version when its time has come."""

from __future__ import annotations

import ast
import builtins
import linecache
import re
import symtable
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_lib.grading import progress
from course_lib.grading.exercise import Exercise, chapter_of, find_exercise

STAFF_RUNG = 4
FAILURES_FOR_STAFF = 3


class SolutionClosedError(RuntimeError):
    """The solution was used before its exercise was attempted."""


class SolutionMissingError(LookupError):
    """This installation has no solution for the exercise."""


# The ladder ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rung:
    """What the help ladder says now.

    Attributes:
        exercise: The exercise.
        number: 1 to 3: the record's hints; 4: the staff version.
        text: Markdown.
        note: What comes next, and when; Markdown.
        earlier: The rungs below, shown folded.
    """

    exercise: Exercise
    number: int
    text: str
    note: str
    earlier: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The card as plain text."""
        head = f"Hint {self.number} of {STAFF_RUNG}: {self.exercise.title}"
        return "\n".join(part for part in (head, self.text, self.note) if part)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from course_lib.notebook.cards import block_markdown, header, section

        folded = ""
        if self.earlier:
            items = "".join(f"<li>{block_markdown(text)}</li>" for text in self.earlier)
            word = "hint" if len(self.earlier) == 1 else "hints"
            folded = f"<details><summary>Earlier {word}</summary><ol>{items}</ol></details>"
        note = f"<div class='course-quiet'>{block_markdown(self.note)}</div>" if self.note else ""
        return section(
            "hint",
            header(f"Hint {self.number} of {STAFF_RUNG}", self.exercise.title),
            block_markdown(self.text),
            note,
            folded,
        )


def hint(name: str | Callable[..., Any]) -> Rung:
    """The next hint for an exercise. Each call goes one rung up; the last one stays.

    Where to re-read and the case at pencil size; an invariant to print; the skeleton with blanks.
    The fourth rung is the staff version, for going on with what builds on it. It opens after an
    attempt, when the card's minutes are over or three checks in a row have failed.

    Args:
        name: The exercise's name, or the function itself.

    Raises:
        UnknownExerciseError: If no exercise has this name.
    """
    exercise = _exercise(name)
    rung = next_rung(exercise, progress.rungs_shown(exercise.id), time.time())
    progress.record_hint(exercise.id, rung.number)
    return rung


def next_rung(exercise: Exercise, shown: int, now: float) -> Rung:
    """The rung that follows the `shown` ones."""
    number = min(shown + 1, STAFF_RUNG)
    waiting = _staff_opens(exercise, now)
    if number == STAFF_RUNG and waiting:
        number = STAFF_RUNG - 1
    if number < STAFF_RUNG:
        text = exercise.hints[number - 1]
        note = waiting if number == STAFF_RUNG - 1 else ""
    else:
        text, note = _staff_text(exercise), ""
    if _move_on(exercise, now):
        note = (
            f"You have given this twice its {exercise.minutes} minutes. Move on, and come back "
            "with fresh eyes."
        )
    return Rung(exercise, number, text, note, exercise.hints[: number - 1])


def _staff_opens(exercise: Exercise, now: float) -> str:
    """When the staff version opens, as a sentence; empty where it is open."""
    standing = progress.standing(exercise.id)
    if not standing.attempts:
        return "The next rung is the staff version. It opens after your first `check`."
    minutes = exercise.minutes - _minutes(exercise, now)
    failures = FAILURES_FOR_STAFF - standing.failures_in_a_row
    if minutes <= 0 or failures <= 0 or standing.status == "passed":
        return ""
    wait, unit = max(1, round(minutes)), "minute" if round(minutes) <= 1 else "minutes"
    checks = "check" if failures == 1 else "checks"
    return (
        f"The next rung is the staff version. It opens in {wait} {unit}, "
        f"or after {failures} more failed {checks}."
    )


def _staff_text(exercise: Exercise) -> str:
    name = exercise.name
    return (
        "Plug in the staff version, and go on with what builds on it. It earns no points; your "
        "own version does, whenever it passes.\n\n"
        f'```python\n{name} = solution("{name}").plug_in()\n```'
    )


def _minutes(exercise: Exercise, now: float) -> float:
    """Minutes of work on an exercise until now; a long pause counts as half an hour."""
    standing = progress.standing(exercise.id)
    if standing.last_at is None:
        return 0.0
    return standing.minutes + min(max(now - standing.last_at, 0.0), progress.LONGEST_PAUSE) / 60


def _move_on(exercise: Exercise, now: float) -> bool:
    passed = progress.standing(exercise.id).status == "passed"
    return not passed and _minutes(exercise, now) >= 2 * exercise.minutes


def _exercise(name: str | Callable[..., Any]) -> Exercise:
    from course_lib.notebook.session import current_chapter

    text = name if isinstance(name, str) else getattr(name, "__name__", None)
    if not text:
        raise TypeError(f"Give the exercise's name as text; this was {name!r}.")
    return find_exercise(text, current_chapter())


# The staff version -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Solution:
    """The staff version of one exercise. Jupyter shows its source.

    Attributes:
        exercise: The exercise.
        source: Its text, or "" while it is closed.
    """

    exercise: Exercise
    source: str

    def plug_in(self) -> Any:
        """The staff version itself, to go on with: a function, a class, or the value.

        It runs in a namespace of its own. A function checks like any other answer, and the check
        says that it earns no points.

        Raises:
            SolutionClosedError: If the exercise was not attempted yet.
        """
        if not self.source:
            raise SolutionClosedError(self._closed())
        from course_lib.grading.check import STAFF_MARK

        value = run_solution(self.exercise)
        if callable(value):
            setattr(value, STAFF_MARK, True)
        return value

    def _closed(self) -> str:
        name = self.exercise.name
        return f"The solution of {name} opens after your first check of it that ran your code."

    def __str__(self) -> str:
        """The card as plain text."""
        if not self.source:
            return self._closed()
        return f"Solution: {self.exercise.title}\n\n{self.source}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from course_lib.notebook.cards import header, highlight, inline_markdown, section

        name = self.exercise.name
        if not self.source:
            body = f"<p>It opens after your first check of <code>{name}</code>.</p>"
            return section("todo", header("Closed", self.exercise.title), body)
        use = f'`{name} = solution("{name}").plug_in()` goes on with it, without points.'
        return section(
            "solution",
            header("Solution", self.exercise.title),
            highlight(self.source),
            f"<p class='course-quiet'>{inline_markdown(use)}</p>",
        )


def solution(name: str | Callable[..., Any]) -> Solution:
    """The staff version of an exercise. It opens after the first attempt.

    Args:
        name: The exercise's name, or the function itself.

    Raises:
        UnknownExerciseError: If no exercise has this name.
        SolutionMissingError: If this installation has no solutions.
    """
    exercise = _exercise(name)
    if not progress.standing(exercise.id).attempts:
        return Solution(exercise, "")
    return Solution(exercise, solution_cell(exercise))


def solution_master(exercise: Exercise) -> Path:
    """The file with a chapter's solutions: in the clone, or inside an installed package.

    Raises:
        SolutionMissingError: If there is none.
    """
    name = f"{chapter_of(exercise.chapter).slug}.py"
    package = Path(__file__).resolve().parents[1]
    for folder in (package / "_solutions", package.parent / "solutions" / "src"):
        if (folder / name).is_file():
            return folder / name
    raise SolutionMissingError(f"This installation has no solutions of {exercise.chapter}.")


def solution_cell(exercise: Exercise) -> str:
    """The text of the exercise's cell in the master, with its solution.

    Raises:
        SolutionMissingError: If the master is missing or has no such cell.
    """
    from course_lib.authoring.regions import exercise_cell

    master = solution_master(exercise)
    text = exercise_cell(master, exercise.name)
    if text is None:
        raise SolutionMissingError(f"{master.name} has no cell for {exercise.name}.")
    return text


def run_solution(exercise: Exercise) -> Any:
    """Run the staff version, with what its cell needs from the cells above, and return it.

    Raises:
        SolutionMissingError: If it cannot be found.
    """
    cell = solution_cell(exercise)
    text = f"{needed_above(_code_above(exercise), cell)}\n{cell}\n"
    # Triton reads a kernel's source through linecache, as it does for a notebook's cells.
    filename = f"<solution {exercise.id}>"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": f"solution_{exercise.name}"}
    exec(compile(text, filename, "exec"), namespace)
    return namespace[exercise.name]


def _code_above(exercise: Exercise) -> str:
    """All code of the master above the exercise's cell, other exercises with their solutions."""
    from course_lib.authoring.regions import solution_text

    text = solution_master(exercise).read_text(encoding="utf-8")
    parts = re.split(r"(?m)^# %%(.*)\n", text)
    code = []
    for mark, body in zip(parts[1::2], parts[2::2], strict=True):
        if re.search(rf'\bexercise="{re.escape(exercise.name)}"', mark):
            break
        if "[markdown]" not in mark:
            code.append(solution_text(body))
    return "\n".join(code)


def needed_above(above: str, cell: str) -> str:
    """The statements of `above` that `cell` needs: imports, functions and constants it names.

    Demonstrations, checks and the call of `setup` are left out, so that plugging in an answer
    runs nothing else of its notebook.
    """
    lines = above.splitlines()
    statements = ast.parse(above).body
    texts = [_text_of(statement, lines) for statement in statements]
    needed = _free_names(cell)
    kept: set[int] = set()
    # A function may use a name that is defined below it, so go round until nothing is added.
    while more := {
        number
        for number, statement in enumerate(statements)
        if number not in kept and _binds(statement) & needed
    }:
        kept |= more
        needed |= set().union(*(_free_names(texts[number]) for number in more))
    return "\n".join(texts[number] for number in sorted(kept))


def _text_of(statement: ast.stmt, lines: list[str]) -> str:
    decorators = getattr(statement, "decorator_list", [])
    first = min([statement.lineno, *(each.lineno for each in decorators)])
    return "\n".join(lines[first - 1 : statement.end_lineno])


def _free_names(text: str) -> set[str]:
    """The names that a text takes from outside; a function's own variables are not among them."""
    top = symtable.symtable(text, "solution", "exec")
    bound = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned()}
    bound |= {symbol.get_name() for symbol in top.get_symbols() if symbol.is_imported()}
    used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    inner = list(top.get_children())
    while inner:
        table = inner.pop()
        used |= {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
        inner += table.get_children()
    return used - bound - set(dir(builtins))


def _binds(statement: ast.stmt) -> set[str]:
    """The names that a top-level statement defines."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import | ast.ImportFrom):
        return {(alias.asname or alias.name).split(".")[0] for alias in statement.names}
    found: set[str] = set()
    for child in ast.iter_child_nodes(statement):
        if isinstance(child, ast.stmt):
            found |= _binds(child)
        elif isinstance(child, ast.expr):
            stored = (n for n in ast.walk(child) if isinstance(n, ast.Name))
            found |= {n.id for n in stored if isinstance(n.ctx, ast.Store)}
    return found
