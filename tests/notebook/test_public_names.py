"""`from course_lib import …`: the six names, and what importing them costs."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

import course_lib

NAMES = ["check", "hint", "interpreted", "progress", "setup", "solution"]


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_a_function_with_a_docstring(name: str) -> None:
    value = getattr(course_lib, name)
    assert callable(value)
    assert not isinstance(value, types.ModuleType)
    assert value.__doc__
    assert name in dir(course_lib)
    assert name in course_lib.__all__


def test_progress_stays_the_function_when_the_store_is_imported() -> None:
    from course_lib.grading import progress as store

    assert isinstance(store, types.ModuleType)
    assert callable(course_lib.progress)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        course_lib.no_such_name  # pyright: ignore  # noqa: B018


def test_importing_loads_nothing_and_taking_the_names_loads_no_plotting() -> None:
    heavy = ["matplotlib", "plotly", "ipywidgets", "anywidget", "IPython", "mistune"]
    code = (
        "import sys, course_lib\nassert 'torch' not in sys.modules\n"
        f"from course_lib import {', '.join(NAMES)}\n"
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
