"""Exercise notebooks as a learner finds them: every check ends with "to do", and nothing breaks."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest

from course_lib.grading.exercise import chapters
from course_lib.notebook.run_checks import run_checks

ROOT = Path(__file__).parents[2]
SLUGS = [chapter.slug for chapter in chapters()]


@pytest.mark.parametrize("slug", SLUGS)
def test_every_check_is_to_do(slug: str, course_home: Path):
    path = ROOT / "exercises" / f"{slug}.ipynb"
    environment = {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    report = run_checks(path, env={**environment, "COURSE_HOME": str(course_home)})
    assert not report.stopped
    assert not report.errors
    expected = [e.id for chapter in chapters() if chapter.slug == slug for e in chapter.exercises]
    assert [result.id for result in report.results] == expected
    assert {result.status for result in report.results} == {"todo"}


@pytest.mark.parametrize("slug", SLUGS)
def test_every_solution_passes_as_it_was_built(slug: str):
    """The built outputs say so; that they are still true is what nbval runs for."""
    notebook = nbformat.read(ROOT / "solutions" / f"{slug}.ipynb", as_version=4)
    for cell in notebook.cells:
        if "check" in cell.metadata.get("course", {}):
            texts = [output.get("data", {}).get("text/plain", "") for output in cell.outputs]
            assert any(text.startswith("✓") for text in texts), f"{cell.id}: {texts}"


@pytest.mark.parametrize("slug", SLUGS)
def test_a_chapter_states_at_least_five_claims(slug: str):
    notebook = nbformat.read(ROOT / "notebooks" / f"{slug}.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    checked = [cell for cell in code if "NBVAL_CHECK_OUTPUT" in cell.source]
    assert len(checked) >= 5
    # nbval compares nothing where there is no output to compare with.
    assert all(cell.outputs for cell in checked)
