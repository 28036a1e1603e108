"""The learner's own copy of the notebooks.

`course lab` copies notebooks to `work/` and exercises to `work/exercises/`, only files that are not
there yet, and opens that. So tracked files stay clean, and a new release never meets a learner's
answers by accident: `course update` refreshes copies that nobody edited, and lays the new version
beside those that somebody did.

`work/.course.json` keeps, for each copy, the hash of the original it came from. Hashes are of
cell kinds and sources only: running a notebook is not an edit.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

STATE = ".course.json"
START = "00_start_here.ipynb"
# In the repository a notebook stands beside the folder of exercises; here it stands above it.
_LINKS = {
    "notebooks": (("](../exercises/", "](exercises/"),),
    "exercises": (("](../notebooks/", "](../"), ("](../solutions/", "](../../solutions/")),
}

What = Literal["new", "same", "refreshed", "beside", "already beside", "edited"]


class WorkspaceError(RuntimeError):
    """The learner's copy cannot be made or read. The message says which file and why."""


@dataclass(frozen=True)
class Change:
    """What happened, or would happen, to one of the learner's files.

    Attributes:
        name: Its path inside `work/`, such as "exercises/08_flash_attention.ipynb".
        what: "new": it was not there. "same": the original has not changed. "edited": the original
            has not changed and the learner's copy has. "refreshed": nobody edited the copy, so it
            is the new original now. "beside": it was edited, so the new original stands beside it.
            "already beside": and it stood there already.
        beside: The path of the file beside it, or "".
        cells: How many cells of the original differ from the one that was copied; None where it is
            not known.
    """

    name: str
    what: What
    beside: str = ""
    cells: int | None = None


def originals(kind: Literal["notebooks", "exercises"]) -> Path:
    """The folder of built notebooks or exercises: in the clone, or inside the installed wheel.

    Raises:
        WorkspaceError: If this installation has none.
    """
    package = Path(__file__).resolve().parents[1]
    for folder in (package / f"_{kind}", package.parent / kind):
        if folder.is_dir():
            return folder
    raise WorkspaceError(
        f"This installation of course_lib holds no {kind}: {package}. Install the course again."
    )


def workspace() -> Path:
    """Where the learner's copy is: `work/` in the clone, or in the current folder for a wheel."""
    root = Path(__file__).resolve().parents[2]
    return (root if (root / "pyproject.toml").is_file() else Path.cwd()) / "work"


def lay_out(work: Path) -> list[Change]:
    """Copy what is not there yet.

    Args:
        work: The learner's folder; is made.

    Returns:
        The files that were copied.
    """
    state = _State(work)
    changes = []
    for kind, original in _each_original():
        name = _name(kind, original)
        if not (work / name).exists():
            text = _read(kind, original)
            _write(work / name, text)
            state.remember(name, text)
            changes.append(Change(name, "new"))
    state.save()
    return changes


def update(work: Path) -> list[Change]:
    """Bring the originals of this release to the learner, and overwrite nothing that was edited.

    Args:
        work: The learner's folder.

    Returns:
        One change for each original.
    """
    state = _State(work)
    changes = []
    for kind, original in _each_original():
        name = _name(kind, original)
        text = _read(kind, original)
        changes.append(_update_one(work, state, name, text))
    state.save()
    return changes


def _update_one(work: Path, state: _State, name: str, text: str) -> Change:
    path = work / name
    fresh = cell_hashes(text)
    known = state.cells(name)
    if not path.exists():
        _write(path, text)
        state.remember(name, text)
        return Change(name, "new")
    mine = _mine(path)
    if mine == fresh:
        state.remember(name, text)
        return Change(name, "same")
    if known is not None and known == fresh:
        return Change(name, "edited")
    cells = None if known is None else _differing(known, fresh)
    if known is not None and mine == known:
        _write(path, text)
        state.remember(name, text)
        return Change(name, "refreshed", cells=cells)
    # Edited, or of unknown origin, or unreadable: it is the learner's, and stays.
    beside = name.removesuffix(".ipynb") + ".new.ipynb"
    if state.offered(name) == fresh:
        return Change(name, "already beside" if (work / beside).exists() else "edited", beside)
    _write(work / beside, text)
    state.offer(name, text)
    return Change(name, "beside", beside, cells)


def cell_hashes(text: str) -> list[str]:
    """One short hash a cell, of its kind and its source."""
    hashes = []
    for cell in json.loads(text)["cells"]:
        source = cell["source"]
        source = source if isinstance(source, str) else "".join(source)
        digest = hashlib.sha256(f"{cell['cell_type']}\n{source}".encode())
        hashes.append(digest.hexdigest()[:12])
    return hashes


def _mine(path: Path) -> list[str] | None:
    """The hashes of the learner's file; None where it is not a notebook any more."""
    try:
        return cell_hashes(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _differing(old: list[str], new: list[str]) -> int:
    """How many cells are new or changed, whatever their place."""
    return max(len(set(new) - set(old)), len(set(old) - set(new)))


def _each_original() -> Iterator[tuple[Literal["notebooks", "exercises"], Path]]:
    for kind in ("notebooks", "exercises"):
        for path in sorted(originals(kind).glob("*.ipynb")):
            yield kind, path


def _name(kind: str, original: Path) -> str:
    return original.name if kind == "notebooks" else f"exercises/{original.name}"


def _read(kind: str, original: Path) -> str:
    text = original.read_text(encoding="utf-8")
    for old, new in _LINKS[kind]:
        text = text.replace(old, new)
    return text


def _write(path: Path, text: str) -> None:
    """Write in one step: a full disk or a Ctrl-C leaves the old file or the new one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        raise WorkspaceError(f"Cannot write {path}: {error.strerror}.") from error


class _State:
    """`work/.course.json`. One that cannot be read counts as empty: nothing is overwritten."""

    def __init__(self, work: Path) -> None:
        self._path = work / STATE
        try:
            self._files: dict[str, Any] = json.loads(self._path.read_text())["files"]
        except (OSError, ValueError, KeyError, TypeError):
            self._files = {}

    def cells(self, name: str) -> list[str] | None:
        """The cells of the original that the copy came from."""
        return self._files.get(name, {}).get("cells")

    def offered(self, name: str) -> list[str] | None:
        """The cells of the last original that was laid beside the copy."""
        return self._files.get(name, {}).get("offered")

    def remember(self, name: str, text: str) -> None:
        self._files[name] = {"cells": cell_hashes(text)}

    def offer(self, name: str, text: str) -> None:
        self._files.setdefault(name, {})["offered"] = cell_hashes(text)

    def save(self) -> None:
        text = json.dumps({"files": self._files}, indent=1, sort_keys=True)
        _write(self._path, text + "\n")
