"""What a student handed in, as text.

Nothing of it is trusted: it is never imported, unpickled, evaluated or parsed as Python here.
Whatever the bytes are, reading them gives a `Submission`; where it cannot be used, its status is
"unreadable" and its reason says why, in words for the student and for the instructor.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from course_lib.grading.exercise import Chapter

LARGEST_FILE = 32 * 2**20
"""Most bytes in one notebook, outputs included."""
LARGEST_CODE = 2 * 2**20
"""Most characters in all code cells of a notebook together."""
MOST_CELLS = 5_000
MOST_VALUES = 2_000_000
"""Most values in the JSON of a notebook. A value takes up to a hundred times its text in memory."""

_SETUP_CALL = re.compile(r"""^[ \t]*setup\([ \t]*(['"])([a-z][a-z0-9_]{0,60})\1""", re.MULTILINE)
_CELL_ID = re.compile(r"(\d\d_[a-z][a-z0-9_]{0,60})-\d{3}", re.ASCII)
_PERCENT = re.compile(r"^#[ \t]*%%(?P<title>.*)$", re.MULTILINE)
_MOST_GUESSES = 20


class UnreadableError(Exception):
    """Why one submission cannot be read. Its text is the reason that is reported."""


@dataclass(frozen=True)
class Submission:
    r"""What one student handed in for one chapter.

    All but the name depends on the bytes alone.

    Attributes:
        name: Where it was found, for people.
        sha256: Of its bytes, or "" where they could not be read.
        cells: The text of its code cells, in order, with newlines as "\n".
        guesses: Which chapters it names, the best guess first: in calls of `setup`, then in the
            ids of its cells. Nothing says that such a chapter exists.
        status: "readable" or "unreadable".
        reason: Why it is unreadable, or "".
        notes: What was odd and did no harm.
    """

    name: str
    sha256: str
    cells: tuple[str, ...] = ()
    guesses: tuple[str, ...] = ()
    status: str = "readable"
    reason: str = ""
    notes: tuple[str, ...] = ()

    def chapter(self, chapters: Iterable[Chapter]) -> Chapter | None:
        """Which of these chapters it is of: by what it says, else by its file's name."""
        known = list(chapters)
        for guess in self.guesses:
            for chapter in known:
                if guess in (chapter.package, chapter.slug):
                    return chapter
        # A file that was renamed keeps the slug somewhere: "doe_1234_08_flash_attention-1.ipynb".
        stem = PurePosixPath(self.name).stem.lower()
        return next((chapter for chapter in known if chapter.slug in stem), None)


def parse(name: str, data: bytes) -> Submission:
    """Read a notebook, or a script in percent format, from its bytes. Never raises.

    Args:
        name: Its name; one that ends in ".py" may be a script.
        data: Its bytes, whatever they are.
    """
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        text = _decoded(data)
        if name.lower().endswith(".py") and not text.lstrip().startswith("{"):
            cells, ids, notes = _script_cells(text), [], []
        else:
            cells, ids, notes = _notebook_cells(_notebook(text))
        _check_amount(cells)
    except UnreadableError as error:
        return Submission(name, sha256, status="unreadable", reason=str(error))
    cells = [_clean(cell) for cell in cells]
    guesses = [match.group(2) for cell in cells for match in _SETUP_CALL.finditer(cell)]
    guesses += [match.group(1) for each in ids if (match := _CELL_ID.fullmatch(each))]
    unique = tuple(dict.fromkeys(guesses))[:_MOST_GUESSES]
    return Submission(name, sha256, tuple(cells), unique, notes=tuple(notes))


def check_size(size: int) -> None:
    """Refuse what is larger than `LARGEST_FILE`.

    Raises:
        UnreadableError: If it is.
    """
    if size > LARGEST_FILE:
        raise UnreadableError(
            f"It has {size:,} bytes; at most {LARGEST_FILE:,} are read. Clear the outputs of all "
            "cells, save, and hand it in again."
        )


def _decoded(data: bytes) -> str:
    check_size(len(data))
    if not data.strip(b" \t\r\n\0"):
        raise UnreadableError("The file is empty. Was the upload finished?")
    # Notepad on Windows writes UTF-16 where it is told to write "Unicode".
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UnreadableError(
            f"It is not text in UTF-8: byte {error.object[error.start]:#04x} at position "
            f"{error.start:,}. Download the notebook again from where it was written."
        ) from None


def _notebook(text: str) -> dict[str, Any]:
    values = sum(text.count(sign) for sign in ",[{")
    if values > MOST_VALUES:
        raise UnreadableError(
            f"It holds about {values:,} values; at most {MOST_VALUES:,} are read. Clear the "
            "outputs of all cells, save, and hand it in again."
        )
    try:
        notebook = json.loads(text)
    except json.JSONDecodeError as error:
        raise UnreadableError(
            f"It is not a notebook: its JSON breaks in line {error.lineno:,}, column "
            f"{error.colno:,} ({error.msg}). Was the upload cut short?"
        ) from None
    except (RecursionError, ValueError, MemoryError):
        # Lists in lists in lists, or a number of thousands of digits: nothing that Jupyter writes.
        raise UnreadableError("It is not a notebook: its JSON cannot be taken in.") from None
    if not isinstance(notebook, dict):
        raise UnreadableError(
            f"It is not a notebook: its JSON is a {type(notebook).__name__}; expected an object."
        )
    return notebook


def _notebook_cells(notebook: dict[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """The code cells' text, every cell's id, and notes."""
    texts, ids, broken = [], [], []
    for number, cell in enumerate(_cells(notebook), 1):
        if not isinstance(cell, dict):
            broken.append(number)
            continue
        if isinstance(cell.get("id"), str):
            ids.append(cell["id"])
        kind = cell.get("cell_type")
        if kind is None and ("outputs" in cell or "execution_count" in cell):
            kind = "code"
        if kind != "code":
            continue
        source = cell.get("source", cell.get("input"))
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if isinstance(source, str):
            texts.append(source)
        else:
            broken.append(number)
    notes = []
    if broken:
        shown = ", ".join(map(str, broken[:10])) + (", …" if len(broken) > 10 else "")
        notes.append(f"Left out, since they hold no text: cells {shown}.")
    return texts, ids, notes


def _cells(notebook: dict[str, Any]) -> list[Any]:
    cells = notebook.get("cells")
    if isinstance(cells, list):
        return cells
    # Format 3, of before 2015, keeps them in worksheets.
    sheets = notebook.get("worksheets")
    if not isinstance(sheets, list):
        raise UnreadableError("It is not a notebook: it has no list of cells.")
    lists = [sheet.get("cells") for sheet in sheets if isinstance(sheet, dict)]
    return [cell for each in lists if isinstance(each, list) for cell in each]


def _script_cells(text: str) -> list[str]:
    """The code cells of a script in percent format; all of it where it has no `# %%`."""
    marks = list(_PERCENT.finditer(text))
    ends = [*(mark.start() for mark in marks), len(text)]
    cells = [text[: ends[0]]]
    for mark, end in zip(marks, ends[1:], strict=True):
        if "[markdown]" not in mark["title"] and "[raw]" not in mark["title"]:
            cells.append(text[mark.end() : end])
    return [cell.strip("\r\n") for cell in cells if cell.strip()]


def _check_amount(cells: list[str]) -> None:
    if not any(cell.strip() for cell in cells):
        raise UnreadableError("It has no code cell with text in it.")
    for what, amount, most in (
        ("code cells", len(cells), MOST_CELLS),
        ("characters of code", sum(map(len, cells)), LARGEST_CODE),
    ):
        if amount > most:
            raise UnreadableError(f"It has {amount:,} {what}; at most {most:,} are graded.")


def _clean(cell: str) -> str:
    """One kind of newline, and halves of characters replaced: they cannot be encoded."""
    text = cell.replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
