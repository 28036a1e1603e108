"""Solution regions: one text that holds an exercise and its solution.

    def online_softmax(x):
        \"\"\"Docstring: stays.\"\"\"
        # BEGIN SOLUTION
        # STUB raise NotImplementedError("online_softmax: one pass, no second read of x")
        ...the solution...
        # END SOLUTION

Lines `# STUB code` inside a region are what the learner finds there instead, at the same
indentation. A region without such lines gets a default. This module needs nothing but Python, so
that a notebook can open a solution where the authoring tools are not installed.
"""

from __future__ import annotations

import re
from pathlib import Path

BEGIN = "# BEGIN SOLUTION"
END = "# END SOLUTION"
STUB = re.compile(r"^(?P<indent>\s*)# STUB(?: (?P<code>.*))?$")


class RegionError(ValueError):
    """A region is unbalanced or out of place.

    Attributes:
        line: The line inside the text, counted from 1.
    """

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def has_region(source: str) -> bool:
    """Whether the text holds a solution region (even a broken one)."""
    return any(line.strip() in (BEGIN, END) for line in source.splitlines())


def solution_text(source: str) -> str:
    """The text with its solutions, without markers and stub lines.

    Args:
        source: A cell's text.

    Raises:
        RegionError: If the regions are unbalanced.
    """
    return _rewrite(source, None)


def stub_text(source: str, default: str) -> str:
    """The text as a learner finds it: each region replaced by its stub.

    Args:
        source: A cell's text.
        default: The stub of a region that has no `# STUB` lines.

    Raises:
        RegionError: If the regions are unbalanced.
    """
    return _rewrite(source, default)


def region_lines(source: str) -> list[str]:
    """The solution's own lines, stripped: what must not stand in a learner's notebook."""
    lines: list[str] = []
    inside = False
    for line in source.splitlines():
        text = line.strip()
        if text in (BEGIN, END):
            inside = text == BEGIN
        elif inside and text and not STUB.match(line):
            lines.append(text)
    return lines


def exercise_cell(master: str | Path, name: str) -> str | None:
    """The solved text of one exercise out of a solution master.

    Args:
        master: The master's path, such as `solutions/src/08_flash_attention.py`.
        name: The exercise's name.

    Returns:
        The cell's text with its solution, or None where the master has no such exercise.
    """
    marker = re.compile(rf'^# %%.*\bexercise="{re.escape(name)}"')
    found: list[str] | None = None
    for line in Path(master).read_text(encoding="utf-8").splitlines():
        if found is None:
            found = [] if marker.match(line) else None
        elif line.startswith("# %%"):
            break
        else:
            found.append(line)
    return None if found is None else solution_text("\n".join(found).strip("\n"))


def _rewrite(source: str, default: str | None) -> str:
    """Walk through the regions; keep the solutions where `default` is None, else the stubs."""
    out: list[str] = []
    begin: int | None = None
    indent = ""
    stub: list[str] = []
    has_solution = False
    for number, line in enumerate(source.splitlines(), start=1):
        text = line.strip()
        if text == BEGIN:
            if begin is not None:
                raise RegionError(number, f"'{BEGIN}' inside the region that line {begin} opened.")
            begin, stub, has_solution = number, [], False
            indent = line[: len(line) - len(line.lstrip())]
        elif text == END:
            if begin is None:
                raise RegionError(number, f"'{END}' without a '{BEGIN}' above it.")
            if not has_solution:
                raise RegionError(begin, "The region is empty: there is no solution in it.")
            if default is not None:
                out += stub or [indent + default]
            begin = None
        elif match := STUB.match(line):
            if begin is None:
                raise RegionError(number, "'# STUB' stands outside a solution region.")
            stub.append((match["indent"] + (match["code"] or "")).rstrip())
        elif begin is None:
            out.append(line)
        else:
            has_solution = has_solution or bool(text)
            if default is None:
                out.append(line)
    if begin is not None:
        raise RegionError(begin, f"'{BEGIN}' without an '{END}' below it.")
    return "\n".join(out)
