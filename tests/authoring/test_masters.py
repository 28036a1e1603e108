"""What is wrong with a master is said with file, cell and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.authoring.masters import Kind, MasterError, lint_master, read_master

SETUP = '# %% tags=["setup"]\nfrom course_lib import setup\n\nsetup("small_chapter")\n'


def chapter(root: Path, text: str):
    path = root / "notebooks" / "src" / "01_small_chapter.py"
    path.write_text(text)
    return read_master(path, "chapter")


def solution(root: Path, change: tuple[str, str]):
    path = root / "solutions" / "src" / "01_small_chapter.py"
    text = path.read_text()
    assert change[0] in text
    path.write_text(text.replace(*change))
    return read_master(path, "solution")


def test_the_sample_masters_are_fine(small: Path):
    folders: list[tuple[str, Kind]] = [("notebooks", "chapter"), ("solutions", "solution")]
    for folder, kind in folders:
        master = read_master(small / folder / "src" / "01_small_chapter.py", kind)
        assert lint_master(master) == []


def test_cells_know_their_lines(small: Path):
    master = chapter(
        small,
        "# ---\n# jupyter:\n#   jupytext: {a: b}\n# ---\n\n"
        '# %% [markdown]\n# # T\n\n# %%\n"""\n# %% no cell\n"""\n'
        "a = 1\n\n\n# %%\nb = 2\n",
    )
    assert [(cell.line, cell.source.splitlines()[0]) for cell in master.cells] == [
        (7, "# T"),
        (10, '"""'),
        (17, "b = 2"),
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# %% [markdown]\n# # A\n#\n# # B\n", r"01_small_chapter.py:4 \(cell 1\): A second H1"),
        ("# %% [markdown]\n# # A\n# ### B\n", r":3 \(cell 1\): The heading jumps from H1 to H3"),
        ("# %% [markdown]\n# Text\n", "No H1"),
        ("# %%\n# %matplotlib inline\na = 1\n", r":2 \(cell 1\): A magic"),
        ("# %%\n# !ls\n", "A magic or a shell command"),
        ("# %%\n" + "a = 1\n" * 31, "31 lines; at most 30"),
        ("# %% [markdown]\n# # A\n", "No setup cell"),
        ("# %%\na = 1\n\n" + SETUP, "must be the first code cell"),
        (SETUP + "\n" + SETUP, "A second setup cell"),
        (SETUP.replace("small_chapter", "other"), "does not call"),
        ("# %%\n# BEGIN SOLUTION\na = 1\n# END SOLUTION\n", "stands outside a cell with exercise"),
        ('# %% [markdown] card="total"\n', "belongs in solutions/src/01_small_chapter.py"),
        ('# %% [markdown] exercises="other"\n# # A\n', "expected 'small_chapter'"),
    ],
)
def test_lint_of_chapters(small: Path, text: str, says: str):
    import re

    problems = lint_master(chapter(small, text))
    assert any(re.search(says, problem) for problem in problems), problems


def test_fenced_code_holds_no_headings(small: Path):
    text = "# %% [markdown]\n# # A\n# ```\n# # not a heading\n# #### nor this\n# ```\n\n" + SETUP
    assert lint_master(chapter(small, text)) == []


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('# %% tags=["raises-exception"]\na = 1\n', "raises-exception"),
        ('# %% tags=["setpu"]\na = 1\n', "Unknown tag 'setpu'"),
        ('# %% exrecise="total"\na = 1\n', "Unknown mark 'exrecise'"),
        ('# %% card="total"\na = 1\n', "is a markdown cell"),
        ('# %% exercise="total" check="total"\na = 1\n', "one mark"),
        ("a = 1\n\n# %%\nb = 1\n", "before the first"),
    ],
)
def test_unreadable_masters(small: Path, text: str, says: str):
    with pytest.raises(MasterError, match=says):
        chapter(small, text)


def test_masters_have_slug_names(tmp_path: Path):
    path = tmp_path / "flash.py"
    path.write_text("")
    with pytest.raises(MasterError, match="NN_slug"):
        read_master(path, "chapter")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            ("    # END SOLUTION\n    return", "    return"),
            r":\d+ \(cell 4\): '# BEGIN SOLUTION' w",
        ),
        (("# BEGIN SOLUTION\nplateau = 4.85\n# END SOLUTION", "plateau = 4.85"), "has no '# BEGIN"),
        (("plateau = 4.85", "plateaux = 4.85"), "does not define 'plateau'"),
        (('exercise="plateau"', 'exercise="plato"'), "No exercise is called 'plato'"),
        (('# %% check="plateau"', "# %%"), '0 cells with check="plateau"'),
        (("check(plateau=plateau)", "plateau"), "does not call check"),
        (("# STUB result = 0", "# STUB result ="), "The stub is not valid Python"),
    ],
)
def test_lint_of_solutions(small: Path, change: tuple[str, str], says: str):
    import re

    problems = lint_master(solution(small, change))
    assert any(re.search(says, problem) for problem in problems), problems
