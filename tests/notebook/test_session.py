"""The first cell of a notebook."""

from __future__ import annotations

import subprocess
import sys

import pytest

from course_lib import setup
from course_lib.grading.exercise import UnknownExerciseError
from course_lib.notebook import session
from course_lib.runtime.interpreter import interpret_everywhere, interpreting
from course_lib.runtime.tile import HAS_TRITON


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(session, "_chapter", None)
    monkeypatch.delenv("MATPLOTLIBRC", raising=False)
    yield
    if HAS_TRITON:
        interpret_everywhere(enabled=False)


def test_setup_remembers_the_chapter_and_reports_in_three_lines(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert session.current_chapter() is None
    assert setup("flash_attention") is None
    assert session.current_chapter() == "flash_attention"
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 3
    assert "PyTorch" in lines[0]


def test_setup_names_the_chapters_there_are() -> None:
    with pytest.raises(UnknownExerciseError, match=r"'flash_atention'.*'flash_attention'"):
        setup("flash_atention")
    assert session.current_chapter() is None


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
def test_without_a_gpu_kernels_are_interpreted_from_here_on() -> None:
    assert not interpreting()
    setup("flash_attention")
    assert interpreting()


def test_setup_seeds_nothing() -> None:
    import random

    import torch

    before = torch.get_rng_state(), random.getstate()
    setup("flash_attention")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_matplotlib_gets_the_style_where_it_is_loaded_already() -> None:
    import matplotlib as mpl

    with mpl.rc_context():
        mpl.rcParams["axes.spines.top"] = True
        setup("flash_attention")
        assert mpl.rcParams["axes.spines.top"] is False


def test_matplotlib_gets_the_style_later_and_is_not_loaded_for_it() -> None:
    code = (
        "import sys\nfrom course_lib import setup\nsetup('flash_attention')\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\nprint(matplotlib.rcParams['axes.spines.top'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
    assert done.stderr == ""
