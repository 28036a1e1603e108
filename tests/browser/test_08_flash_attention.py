"""Chapter 08 in a real JupyterLab: each lab is moved to its insight, and says so."""

from __future__ import annotations

import nbformat
import pytest

NAME = "labs_of_08.ipynb"
CELLS = (
    "from course_lib.flash_attention import labs\nlabs.tile_walker()",
    "labs.online_softmax_lab()",
    "labs.roofline_lab()",
    "from course_lib.notebook.trace_viewer import trace_viewer\n"
    "trace_viewer(labs.walk_forward(64, 64, False, labs.QUERY_OUTER).launch)",
)


@pytest.fixture(scope="module")
def page(lab_address):
    from tests.browser.conftest import open_notebook

    address, folder = lab_address
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(notebook, folder / NAME)
    with open_notebook(address, NAME) as opened:
        opened.run_all()
        yield opened


def shown(page, name: str):
    """The lab with this name, in view."""
    lab = page.lab(name)
    lab.wait_for(timeout=60_000)
    lab.scroll_into_view_if_needed()
    return lab


def says(lab, text: str) -> None:
    """Wait until the lab's sentence contains a text."""
    lab.locator(".course-lab-sentence").get_by_text(text).wait_for(timeout=20_000)


def test_the_tile_walker_shows_that_block_m_halves_the_bytes(page) -> None:
    lab = shown(page, "tile_walker")
    says(lab, "reads 590 kB")
    lab.get_by_label("BLOCK_N").focus()
    page.page.keyboard.press("End")
    says(lab, "rows 128–255")  # the second tile of 128 keys
    says(lab, "reads 590 kB")
    lab.get_by_label("BLOCK_M").focus()
    page.page.keyboard.press("End")
    says(lab, "reads 328 kB")
    lab.get_by_label("Loop order").select_option(label="keys outside (FA1)")
    says(lab, "K and V each read once")


def test_the_online_softmax_lab_hides_its_bug_when_sorted(page) -> None:
    lab = shown(page, "online_softmax_lab")
    lab.get_by_label("Forget to rescale").check()
    field = lab.get_by_label("Scores", exact=True)
    field.fill("4, 3, 2, 1, 0.5, -1")
    field.press("Enter")
    says(lab, "the final sum has a relative error of 0.")


def test_the_roofline_finds_the_tile_that_saves_nothing(page) -> None:
    lab = shown(page, "roofline_lab")
    lab.get_by_label("Head dim d").focus()
    page.page.keyboard.press("ArrowRight")
    lab.get_by_label("BLOCK_M").focus()
    page.page.keyboard.press("ArrowLeft")
    says(lab, "it saves nothing")
    lab.get_by_label("Phase").select_option(label="generation: one new token")
    says(lab, "4 operations a byte")


def test_the_trace_viewer_steps_through_a_launch(page) -> None:
    lab = shown(page, "trace_viewer")
    says(lab, "Program 0 of 4 reads q at rows 0–63")
    lab.get_by_role("button", name="One step forward").click()
    says(lab, "reads k at rows 0–63")
    lab.get_by_label("Access", exact=True).focus()
    page.page.keyboard.press("End")
    says(lab, "So far 590 kB read and 66.6 kB written")


def test_nothing_failed_and_nothing_was_asked_of_the_network(page) -> None:
    assert page.errors() == []
    assert page.outside == []
