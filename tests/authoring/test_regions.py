"""One text, two readings: the solution and the stub."""

from __future__ import annotations

import pytest

from course_lib.authoring.regions import (
    RegionError,
    exercise_cell,
    region_lines,
    solution_text,
    stub_text,
)

TEXT = '''\
def f(x):
    """Keep me."""
    # BEGIN SOLUTION
    # STUB a = ...  # first blank
    # STUB
    # STUB     deeper
    y = x + 1

    z = 2 * y
    # END SOLUTION
    return z'''


def test_solution_has_no_markers_and_no_stub():
    assert solution_text(TEXT) == (
        'def f(x):\n    """Keep me."""\n    y = x + 1\n\n    z = 2 * y\n    return z'
    )


def test_stub_lines_keep_indentation_and_depth():
    assert stub_text(TEXT, "raise X").splitlines()[2:6] == [
        "    a = ...  # first blank",
        "",
        "        deeper",
        "    return z",
    ]


def test_region_without_stub_lines_gets_the_default_at_its_indentation():
    text = "if a:\n        # BEGIN SOLUTION\n        b = 1\n        # END SOLUTION"
    assert stub_text(text, "raise X") == "if a:\n        raise X"


def test_two_regions_get_their_own_stubs():
    text = (
        "# BEGIN SOLUTION\n# STUB a = ...\na = 1\n# END SOLUTION\nb = 2\n"
        "# BEGIN SOLUTION\nc = 3\n# END SOLUTION"
    )
    assert stub_text(text, "pass") == "a = ...\nb = 2\npass"
    assert solution_text(text) == "a = 1\nb = 2\nc = 3"


@pytest.mark.parametrize(
    ("text", "line", "says"),
    [
        ("a\n# END SOLUTION", 2, "without a '# BEGIN SOLUTION'"),
        ("# BEGIN SOLUTION\na", 1, "without an '# END SOLUTION'"),
        ("# BEGIN SOLUTION\na\n# BEGIN SOLUTION\n# END SOLUTION", 3, "line 1 opened"),
        ("a\n# STUB pass", 2, "outside a solution region"),
        ("a\n# BEGIN SOLUTION\n# STUB pass\n# END SOLUTION", 2, "empty"),
    ],
)
@pytest.mark.parametrize("reading", ["solution", "stub"])
def test_broken_regions_name_their_line(text: str, line: int, says: str, reading: str):
    with pytest.raises(RegionError, match=says) as caught:
        solution_text(text) if reading == "solution" else stub_text(text, "pass")
    assert caught.value.line == line


def test_region_lines_are_the_solution_alone():
    assert region_lines(TEXT) == ["y = x + 1", "z = 2 * y"]


def test_exercise_cell_finds_one_solved_cell(tmp_path):
    master = tmp_path / "01_a.py"
    master.write_text(f'# %% exercise="f"\n{TEXT}\n\n\n# %% exercise="ff"\nother = 1\n')
    assert exercise_cell(master, "f") == solution_text(TEXT)
    assert exercise_cell(master, "g") is None
