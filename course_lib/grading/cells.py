"""A submission's cells as Python text: what IPython would make of them, decided in the grader.

The child executes exactly the text that is made here, so that the rules, which read the same text,
and the execution never see two different programs. Text is only read: nothing is run.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from dataclasses import dataclass

MOST_SPECIAL_LINES = 50
"""IPython's rewriting takes a pass over the cell for each special line."""
MOST_REWRITTEN = 60_000
"""Characters of a cell that is rewritten at all."""

_TRANSPARENT = ("time", "timeit", "capture", "prun")
_SPECIAL_LINE = re.compile(r"^\s*[%!?]|=\s*[%!]|\?\s*$", re.MULTILINE)
_TIMED_LINE = re.compile(r"^(\s*)%(?:time|timeit|prun)[ \t]+(?!-)(?=\S)", re.MULTILINE)
_CELL_MAGIC = re.compile(r"\s*%%(\w+)[^\n]*\n?")


@dataclass(frozen=True)
class Cell:
    """One code cell.

    Attributes:
        number: Its place among the code cells, from 1.
        text: What the student wrote.
        python: What is executed; "" for a cell of another language.
        tree: Of `python`, or None where it is no Python.
        note: What was done to it, or what is wrong with it, or "".
    """

    number: int
    text: str
    python: str
    tree: ast.Module | None
    note: str = ""

    def line(self, number: int) -> str:
        """The text of one executed line; "" where there is none."""
        lines = self.python.splitlines()
        return lines[number - 1].strip() if 0 < number <= len(lines) else ""


def read_cells(texts: tuple[str, ...]) -> list[Cell]:
    """Make every code cell executable text."""
    return [_read(number, text) for number, text in enumerate(texts, 1)]


def _read(number: int, text: str) -> Cell:
    tree, problem = _parse(text)
    if tree is not None:
        return Cell(number, text, text, tree)
    if match := _CELL_MAGIC.match(text):
        if match[1] not in _TRANSPARENT:
            return Cell(number, text, "", ast.Module([], []), f"%%{match[1]} is not run")
        # A blank line in its place keeps the numbers of the lines.
        text = "\n" * match[0].count("\n") + text[match.end() :]
    python = _rewritten(_TIMED_LINE.sub(r"\1", text))
    tree, again = _parse(python)
    if tree is None:
        return Cell(number, text, text, None, problem or again)
    return Cell(number, text, python, tree)


def _rewritten(text: str) -> str:
    """What IPython makes of its own notation; the text itself where it is too much of it."""
    text = textwrap.dedent(text) if text[:1] in " \t" else text
    special = len(_SPECIAL_LINE.findall(text))
    if not special or special > MOST_SPECIAL_LINES or len(text) > MOST_REWRITTEN:
        return text
    try:
        from IPython.core.inputtransformer2 import TransformerManager

        return TransformerManager().transform_cell(text)
    except Exception:
        # Not installed, or the text is made to break it: then it is no Python.
        return text


def _parse(text: str) -> tuple[ast.Module | None, str]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # As in a notebook, `await` may stand at top level.
            tree = compile(text, "<cell>", "exec", ast.PyCF_ONLY_AST | 0x2000, dont_inherit=True)
    except SyntaxError as error:
        return None, f"line {error.lineno}: {error.msg}"
    except (ValueError, RecursionError, MemoryError, OverflowError):
        return None, "it cannot be parsed"
    assert isinstance(tree, ast.Module)
    return tree, ""
