"""Masters become notebooks.

    notebooks/src/NN_slug.py   → notebooks/NN_slug.ipynb    executed, with outputs
    solutions/src/NN_slug.py   → solutions/NN_slug.ipynb    executed, with outputs
                               → exercises/NN_slug.ipynb    stubs, not executed

A build is deterministic up to what cells print: cell ids come from slug and index, volatile
metadata is dropped, and nothing is executed again unless its master changed. `check` compares
without executing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from course_lib._version import __version__
from course_lib.authoring import regions
from course_lib.authoring.bootstrap import bootstrap_text, colab_badge
from course_lib.authoring.cards import card_markdown, list_markdown
from course_lib.authoring.masters import (
    Cell,
    Kind,
    Master,
    MasterError,
    default_stub,
    lint_master,
    read_master,
)
from course_lib.authoring.paths import settings
from course_lib.grading.exercise import exercises_of

Target = Literal["chapter", "solution", "exercise"]

# Raise it when the build writes something else for the same master in a way that `check` cannot
# see in the cells, such as another treatment of outputs.
BUILD_VERSION = 2
MAX_BYTES = 1_500_000
CELL_TIMEOUT = 300
FOLDERS: dict[Target, str] = {
    "chapter": "notebooks",
    "solution": "solutions",
    "exercise": "exercises",
}
SOURCES: dict[Kind, str] = {"chapter": "notebooks/src", "solution": "solutions/src"}
# What a linter or a type checker is told in a master says nothing to a learner.
_PRAGMA = re.compile(r"[ \t]*# (?:noqa\b|fmt: |type: ignore|pyright: )[^\n]*", re.MULTILINE)
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
SOLUTION_NOTE = (
    "> **These are the solutions.** Each is the idea in its smallest honest form; `course_lib` "
    "holds the tuned version. The notebook to write in is [here](../exercises/{slug}.ipynb)."
)


class BuildError(RuntimeError):
    """A build could not be finished. The message says where and why, line by line."""


class UnknownSlugError(BuildError):
    """No chapter has the slug that was given."""


@dataclass(frozen=True)
class Stale:
    """A built file that no longer fits its master.

    Attributes:
        path: The built file, relative to the repository.
        why: One clause.
        slug: What to build.
    """

    path: str
    why: str
    slug: str


def find_masters(root: Path, slugs: Iterable[str] = ()) -> list[Path]:
    """The masters of these slugs, or all masters, in order.

    Args:
        root: The repository.
        slugs: Such as "08_flash_attention", or the package name "flash_attention".

    Raises:
        UnknownSlugError: If a slug has no master.
    """
    masters = [path for folder in SOURCES.values() for path in sorted((root / folder).glob("*.py"))]
    slugs = list(slugs)
    if not slugs:
        return masters
    chosen: list[Path] = []
    for slug in slugs:
        match = [path for path in masters if slug in (path.stem, path.stem[3:])]
        if not match:
            known = ", ".join(sorted({path.stem for path in masters})) or "none yet"
            raise UnknownSlugError(f"There is no master for {slug!r}. Masters: {known}.")
        chosen += [path for path in match if path not in chosen]
    return chosen


def targets_of(kind: Kind) -> tuple[Target, ...]:
    """What a master becomes."""
    return ("chapter",) if kind == "chapter" else ("exercise", "solution")


def kind_of(path: Path) -> Kind:
    """Whether a master is a chapter or holds solutions: its folder says."""
    return "chapter" if path.parent.parent.name == "notebooks" else "solution"


def generate(master: Master, target: Target, repository: str = "") -> NotebookNode:
    """The notebook of a master, not executed.

    Args:
        master: A master without problems.
        target: Which of its notebooks.
        repository: Where the course lives, for Colab; may be empty.

    Raises:
        MasterError: If a cell cannot be turned into the target.
    """
    records = {exercise.name: exercise for exercise in _records(master)}
    numbers = {name: number for number, name in enumerate(records, start=1)}
    cells: list[NotebookNode] = []
    for cell in master.cells:
        if cell.tags and (set(cell.tags) & {"solution", "exercise"}) - {target}:
            continue
        source = cell.source
        if cell.mark == "card":
            source = card_markdown(records[cell.name], numbers[cell.name])
        elif cell.mark == "exercises":
            listing = list_markdown(list(records.values()), f"../exercises/{master.slug}.ipynb")
            source = f"{source}\n\n{listing}".strip()
        elif cell.mark == "exercise":
            try:
                if target == "solution":
                    source = regions.solution_text(source)
                else:
                    source = regions.stub_text(source, default_stub(records[cell.name]))
            except regions.RegionError as error:
                raise master.error(cell, str(error), error.line - 1) from None
        elif "setup" in cell.tags:
            # A cell of its own, folded: of no interest outside Colab.
            cells.append(_bootstrap_cell(f"{master.slug}-{len(cells):03d}", repository))
        if cell.kind == "code":
            source = _PRAGMA.sub("", source)
        if not cells:
            source = _with_header(source, master, target, repository)
        new = new_code_cell if cell.kind == "code" else new_markdown_cell
        cells.append(
            new(source, id=f"{master.slug}-{len(cells):03d}", metadata=_cell_metadata(cell))
        )
    notebook = new_notebook(cells=cells)
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
            "course": {"source_hash": source_hash(master), "course_lib": __version__},
        }
    )
    return notebook


def _records(master: Master) -> list[Any]:
    marked = any(cell.mark for cell in master.cells)
    return exercises_of(master.package) if marked else []


def _bootstrap_cell(cell_id: str, repository: str) -> NotebookNode:
    metadata = {"jupyter": {"source_hidden": True}}
    return new_code_cell(bootstrap_text(repository), id=cell_id, metadata=metadata)


def _with_header(source: str, master: Master, target: Target, repository: str) -> str:
    """The title cell with what stands below the title: the badge, and what a solution is."""
    badge = colab_badge(repository, f"{FOLDERS[target]}/{master.slug}.ipynb")
    note = SOLUTION_NOTE.format(slug=master.slug) if target == "solution" else ""
    title, _, rest = source.partition("\n")
    return "\n\n".join(part for part in (title, badge, note, rest.strip("\n")) if part)


def _cell_metadata(cell: Cell) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    if {"outcome", "folded"} & set(cell.tags):
        metadata["jupyter"] = {"source_hidden": True}
    if cell.mark in ("exercise", "check"):
        metadata["course"] = {cell.mark: cell.name}
    return metadata


def source_hash(master: Master) -> str:
    """What a built notebook remembers of its master."""
    digest = hashlib.sha256()
    digest.update(f"build {BUILD_VERSION}\n".encode())
    digest.update(master.text.encode())
    return digest.hexdigest()[:16]


def execute(notebook: NotebookNode, source: str) -> None:
    """Run a notebook in a fresh kernel on the CPU, and keep its outputs.

    Args:
        notebook: Is changed in place.
        source: What to call it in an error.

    Raises:
        BuildError: If a cell fails or runs longer than `CELL_TIMEOUT` seconds.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    with tempfile.TemporaryDirectory(prefix="course-build-") as folder:
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            resources={"metadata": {"path": _made(folder, "cwd")}},
            store_widget_state=False,
            record_timing=False,
            coalesce_streams=True,
        )
        try:
            # The kernel's own warnings on stderr are not the author's.
            client.execute(env=kernel_environment(folder), stderr=subprocess.DEVNULL)
        except CellExecutionError as error:
            where = _failed_cell(notebook)
            trace = "\n".join(_plain(str(error)).rstrip().splitlines()[-25:])
            raise BuildError(f"{source}: {where} failed.\n{trace}") from None
        except CellTimeoutError:
            where = _failed_cell(notebook)
            raise BuildError(f"{source}: {where} ran longer than {CELL_TIMEOUT} s.") from None
        except DeadKernelError:
            raise BuildError(f"{source}: the kernel died (out of memory?).") from None


def kernel_environment(folder: str) -> dict[str, str]:
    """The environment of a kernel that must give the same outputs on every machine.

    Args:
        folder: A temporary folder; the learner's own data stays out of reach.
    """
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "COURSE_HOME": _made(folder, "home"),
        "IPYTHONDIR": _made(folder, "ipython"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONHASHSEED": "0",
        "OMP_NUM_THREADS": "2",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        "JUPYTER_PLATFORM_DIRS": "1",
        "JUPYTER_PREFER_ENV_PATH": "1",
    }


def _made(folder: str, name: str) -> str:
    path = Path(folder) / name
    path.mkdir(exist_ok=True)
    return str(path)


def _failed_cell(notebook: NotebookNode) -> str:
    """The cell that failed or ran last, by its id and first line."""
    last = None
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if any(output.output_type == "error" for output in cell.outputs):
            last = cell
            break
        if cell.source.strip() and cell.execution_count is None:
            last = cell
            break
        last = cell
    if last is None:
        return "a cell"
    lines = last.source.strip().splitlines()
    return f"cell {last.id} ({lines[0] if lines else 'empty'!r})"


def _plain(text: str) -> str:
    """Without terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def strip_volatile(notebook: NotebookNode) -> None:
    """Drop from an executed notebook what changes from run to run and nobody reads."""
    notebook.metadata.pop("widgets", None)
    notebook.metadata["language_info"] = {"name": "python"}
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        for output in cell.get("outputs", []):
            output.pop("transient", None)
            data = output.get("data", {})
            # A widget view without its state is only an error message, so where the output has
            # another form the view goes: every front end then shows the picture until the cell
            # is run.
            if WIDGET_VIEW in data and len(data) > 1:
                del data[WIDGET_VIEW]
                output["metadata"].pop(WIDGET_VIEW, None)


def dumps(notebook: NotebookNode) -> str:
    """The file's text: sorted, indented by one, with a newline at its end."""
    nbformat.validate(notebook)
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


def build(
    root: Path,
    slugs: Iterable[str] = (),
    *,
    say: Callable[[str], None] = print,
) -> list[Path]:
    """Build what is stale, or the named chapters whether stale or not.

    Args:
        root: The repository.
        slugs: Chapters to build in any case; none for all stale ones.
        say: Gets one line a file.

    Returns:
        The files that were written.

    Raises:
        BuildError: If a master has problems or a cell fails; other chapters are built first.
    """
    slugs = list(slugs)
    repository = settings(root).get("repository", "")
    stale = None if slugs else {each.path for each in check(root)}
    written: list[Path] = []
    errors: list[str] = []
    for path in find_masters(root, slugs):
        kind = kind_of(path)
        try:
            master = read_master(path, kind)
            problems = [_relative(root, problem) for problem in lint_master(master)]
            if problems:
                raise BuildError("\n".join(problems))
            for target in targets_of(kind):
                out = root / FOLDERS[target] / f"{master.slug}.ipynb"
                if stale is not None and _name(root, out) not in stale:
                    continue
                start = time.perf_counter()
                _build_one(root, master, target, out, repository)
                seconds = time.perf_counter() - start
                size = out.stat().st_size / 1000
                say(f"{_name(root, out)}  {size:.0f} kB  {seconds:.1f} s")
                written.append(out)
        except (BuildError, MasterError) as error:
            errors.append(_relative(root, str(error)))
    if errors:
        raise BuildError("\n".join(errors))
    return written


def _build_one(root: Path, master: Master, target: Target, out: Path, repository: str) -> None:
    notebook = generate(master, target, repository)
    if target != "exercise":
        execute(notebook, _name(root, master.path))
        strip_volatile(notebook)
    text = dumps(notebook)
    if len(text.encode()) > MAX_BYTES:
        raise BuildError(
            f"{_name(root, master.path)}: the built notebook has {len(text.encode()):,} bytes; "
            f"at most {MAX_BYTES:,}. Largest cell: {_largest_cell(notebook)}."
        )
    out.parent.mkdir(exist_ok=True)
    # A build that is stopped half-way must not leave half a notebook.
    partial = out.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(out)


def _largest_cell(notebook: NotebookNode) -> str:
    return max(notebook.cells, key=lambda cell: len(json.dumps(cell))).id


def check(root: Path, slugs: Iterable[str] = ()) -> list[Stale]:
    """What is stale, without executing anything.

    A built notebook is stale where its master's hash changed, where its cells are not what the
    build writes today (another card, another bootstrap, an edit by hand), where it was not
    executed, or where its master is gone.

    Args:
        root: The repository.
        slugs: Chapters to look at; none for all.

    Raises:
        UnknownSlugError: If a slug has no master.
    """
    slugs = list(slugs)
    repository = settings(root).get("repository", "")
    stale: list[Stale] = []
    expected: set[Path] = set()
    for path in find_masters(root, slugs):
        kind = kind_of(path)
        outs: dict[Target, Path] = {
            target: root / FOLDERS[target] / f"{path.stem}.ipynb" for target in targets_of(kind)
        }
        expected |= set(outs.values())
        try:
            master = read_master(path, kind)
            problems = lint_master(master)
            if problems:
                raise BuildError(problems[0])
            for target, out in outs.items():
                why = _why_stale(generate(master, target, repository), target, out)
                if why:
                    stale.append(Stale(_name(root, out), why, master.slug))
        except (MasterError, BuildError) as error:
            why = _relative(root, str(error))
            stale += [Stale(_name(root, out), why, path.stem) for out in outs.values()]
    if not slugs:
        for folder in FOLDERS.values():
            for out in sorted((root / folder).glob("*.ipynb")):
                if out not in expected:
                    stale.append(Stale(_name(root, out), "it has no master: delete it", out.stem))
    return stale


def _why_stale(fresh: NotebookNode, target: Target, out: Path) -> str:
    """Why a built file does not fit, or "" where it does."""
    if not out.is_file():
        return "it is not built yet"
    try:
        built = nbformat.reads(out.read_text(encoding="utf-8"), as_version=4)
        cells = [(cell.id, cell.cell_type, _text(cell.source)) for cell in built.cells]
        metadata = [dict(cell.metadata) for cell in built.cells]
        stamp = built.metadata.get("course", {}).get("source_hash")
    except (ValueError, KeyError, AttributeError) as error:
        return f"it is not a readable notebook ({type(error).__name__})"
    if stamp != fresh.metadata["course"]["source_hash"]:
        return "its master changed"
    if target == "exercise":
        # Everything but the release that wrote it must be what the build writes today.
        fresh.metadata["course"]["course_lib"] = built.metadata["course"].get("course_lib")
        same = out.read_text(encoding="utf-8") == dumps(fresh)
        return "" if same else "its cells are not what the build writes today"
    wanted = [(cell.id, cell.cell_type, cell.source) for cell in fresh.cells]
    if cells != wanted or metadata != [dict(cell.metadata) for cell in fresh.cells]:
        return "its cells are not what the build writes today"
    for cell in built.cells:
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            return f"its cell {cell.id} was not executed"
    return ""


def _text(source: str | list[str]) -> str:
    return source if isinstance(source, str) else "".join(source)


def _name(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _relative(root: Path, text: str) -> str:
    return text.replace(f"{root}{os.sep}", "")


def main(root: Path, slugs: list[str], check_only: bool) -> int:
    """`course build [SLUG…] [--check]`. Returns the exit code."""
    try:
        if not check_only:
            written = build(root, slugs, say=lambda line: print(line, flush=True))
            if not written:
                print("Everything is up to date.")
            return 0
        stale = check(root, slugs)
    except BuildError as error:
        print(f"course build: {error}", file=sys.stderr)
        return 2 if isinstance(error, UnknownSlugError) else 1
    for each in stale:
        print(f"stale: {each.path} ({each.why})")
    if stale:
        slugs = sorted({each.slug for each in stale if "delete it" not in each.why})
        if slugs:
            print(f"Run: ./course build {' '.join(slugs)}")
        return 1
    print("Every built notebook fits its master.")
    return 0
