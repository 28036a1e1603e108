"""Questions in a real JupyterLab: by keyboard alone, with an immediate reply."""

from __future__ import annotations

import nbformat

from tests.browser.conftest import open_notebook

CELLS = (
    'from course_lib import setup\nsetup("flash_attention")',
    "from course_lib.notebook.questions import predict, recall, reveal",
    'predict("one_new_token")',
    'reveal("one_new_token", "v[0]")',
    'recall("flash_attention")',
)


def test_a_prediction_is_made_by_keyboard_and_rewrites_the_outcome(lab_address) -> None:
    address, root = lab_address
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, root / "questions.ipynb")
    with open_notebook(address, "questions.ipynb") as lab:
        lab.run_all()
        page = lab.page
        card = page.locator(".course-predict.course-live")
        card.locator("input[type=radio]").first.focus()
        for key in ("Space", "ArrowDown", "ArrowDown", "Tab", "Enter"):
            page.keyboard.press(key)
        card.get_by_text("You predicted").wait_for()
        assert "c)" in card.locator(".course-reply").inner_text()
        outcome = page.locator(".course-outcome")
        assert not outcome.get_by_text("You predicted").is_visible()
        outcome.locator("summary").click()
        outcome.get_by_text("You predicted").wait_for()

        recall = page.locator(".course-recall.course-live")
        recall.scroll_into_view_if_needed()
        assert recall.locator("form").count() == 3
        field = recall.locator("input[type=text]").first
        field.fill("-1")
        field.press("Enter")
        recall.get_by_text("It is").first.wait_for()
        assert lab.errors() == []
        assert lab.outside == []
