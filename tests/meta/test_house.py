"""The house keeps its own rules: names, directions of import, weight of import, clean text."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib.authoring.regions import region_lines, stub_text
from course_lib.grading.exercise import chapters

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "course_lib"
CHAPTERS = {chapter.package: chapter.slug for chapter in chapters()}
HEAVY = ["matplotlib", "plotly", "ipywidgets", "anywidget", "IPython", "sklearn", "transformers"]
FLOORS = ("runtime", "notebook", "grading", "authoring")


def imports_of(path: Path) -> set[str]:
    """Every `course_lib` module that a file imports, also inside functions, not for typing only."""
    found = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name for name in found if name.startswith("course_lib.")}


def part_of(module: str) -> str:
    """The part of the house that a module belongs to: "runtime", "flash_attention", …"""
    return module.split(".")[1]


SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "templates" not in path.parts)


@pytest.mark.parametrize("slug", CHAPTERS.values())
def test_a_chapter_has_one_name_everywhere(slug: str) -> None:
    package = slug.split("_", 1)[1]
    for place in (
        f"notebooks/src/{slug}.py",
        f"notebooks/{slug}.ipynb",
        f"solutions/src/{slug}.py",
        f"solutions/{slug}.ipynb",
        f"exercises/{slug}.ipynb",
        f"course_lib/{package}/__init__.py",
        f"course_lib/{package}/exercises/__init__.py",
        f"tests/{package}",
    ):
        assert (ROOT / place).exists(), f"{place} is missing"


def test_no_file_of_a_chapter_that_does_not_exist() -> None:
    for folder in ("notebooks", "notebooks/src", "solutions", "solutions/src", "exercises"):
        for path in (ROOT / folder).glob("[0-9]*"):
            assert path.stem in CHAPTERS.values(), f"{path} belongs to no chapter"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0]
    modules = imports_of(path)
    parts = {part_of(module) for module in modules} - {here}
    if here == "runtime":
        assert not parts, f"runtime is the ground floor, and imports {parts}"
    if here in CHAPTERS:
        if path.name in ("labs.py", "page.py"):
            allowed = {"runtime", "notebook", *CHAPTERS}
        elif path.name == "questions.py":
            allowed = {"notebook"}
        elif "exercises" in path.parts:
            allowed = {"runtime", "grading"}
            wrong = [m for m in modules if part_of(m) == "grading" and "exercise" not in m]
            assert not wrong, f"an exercise needs the record alone, and imports {wrong}"
        else:
            allowed = {"runtime", *CHAPTERS}
        assert parts <= allowed, f"imports {parts - allowed}"
    if here in FLOORS:
        assert not parts & set(CHAPTERS), f"names the chapters {parts & set(CHAPTERS)}"
    labs = [module for module in modules if module.endswith(".labs")]
    assert not labs, f"only notebooks and tests import labs, and this imports {labs}"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def in_fresh_python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("package", ["course_lib", *(f"course_lib.{name}" for name in CHAPTERS)])
def test_importing_is_light(package: str) -> None:
    code = f"import torch, sys\nimport {package}\nprint([m for m in {HEAVY} if m in sys.modules])"
    assert in_fresh_python(code) == "[]"


def test_importing_is_fast() -> None:
    """At most 0.3 s over `import torch`, the best of three since a machine may be busy."""
    code = (
        "import torch, time\nstart = time.perf_counter()\n"
        "import course_lib, course_lib.flash_attention\nprint(time.perf_counter() - start)"
    )
    assert min(float(in_fresh_python(code)) for _ in range(3)) <= 0.3


def tracked_text() -> list[Path]:
    """Every text file that git tracks."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    suffixes = {".py", ".md", ".toml", ".yml", ".txt", ".ipynb", ".js", ".css", ".json", ""}
    return [ROOT / name for name in names if name and Path(name).suffix in suffixes]


def test_no_path_of_a_machine_and_no_secret_place() -> None:
    # Not within a longer path: /proc/self/root/ names no machine.
    bad = re.compile(r"(?<!\w)/(?:work/|root/|home/[a-z]+/|tmp/pip|Users/[a-z]+/)")
    allowed = {Path(__file__)}
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in tracked_text()
        if path not in allowed and path.is_file()
        for match in [bad.search(path.read_text(errors="replace"))]
        if match
    ]
    assert not found


@pytest.mark.parametrize("slug", CHAPTERS.values())
def test_no_solution_text_in_the_exercises(slug: str) -> None:
    """No line of a solution, long enough to be one, stands in the generated exercise notebook."""
    exercise = (ROOT / f"exercises/{slug}.ipynb").read_text()
    master = (ROOT / f"solutions/src/{slug}.py").read_text()
    # What one exercise hands over, broken code or a skeleton, may stand in another's solution.
    given = stub_text(master, default="")
    for text in region_lines(master):
        if len(text) < 25 or text.startswith("#") or text in given:
            continue
        escaped = text.replace("\\", "\\\\").replace('"', '\\"')
        assert escaped not in exercise, f"solution text in exercises/{slug}.ipynb: {text}"
