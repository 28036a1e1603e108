"""Chapter 00 in a real JupyterLab: it runs, its cards answer, its lab reaches its insight."""

from __future__ import annotations

import shutil

import pytest

SLUG = "00_start_here"


@pytest.fixture(scope="module")
def page(lab_address, root):
    from tests.browser.conftest import open_notebook

    address, folder = lab_address
    built = root / "notebooks" / f"{SLUG}.ipynb"
    if not built.is_file():
        pytest.skip(f"not built: ./course build {SLUG}")
    shutil.copy(built, folder / built.name)
    with open_notebook(address, built.name) as opened:
        opened.run_all(240)
        yield opened


def test_it_runs_without_a_red_cell_or_an_outside_request(page) -> None:
    assert page.errors() == []
    assert page.outside == []


def test_the_two_designed_failures_are_cards(page) -> None:
    cards = page.page.locator(".course-card.course-failed")
    assert cards.count() == 2
    # The text of a card that is scrolled out of sight is not laid out: read it as content.
    first, second = (" ".join((cards.nth(n).text_content() or "").split()) for n in (0, 1))
    assert "Read a card, change one character" in first
    assert "Rung 1: the mask" in second
    assert "past the end of x" in second


def test_a_prediction_gets_its_reply(page) -> None:
    card = page.page.locator(".course-predict").nth(1)
    card.scroll_into_view_if_needed()
    card.get_by_text("about 100 times as long").click()
    card.get_by_role("button", name="Commit").click()
    card.get_by_text("You predicted").wait_for(timeout=15_000)
    outcome = page.page.locator(".course-outcome").nth(1)
    outcome.locator("summary").click()
    outcome.get_by_text("That would be so if time went with operations").wait_for(timeout=15_000)


def test_the_lab_reaches_its_insight_by_keyboard(page) -> None:
    lab = page.lab("who_owns_what")
    lab.scroll_into_view_if_needed()
    for label in ("BLOCK_M", "BLOCK_N"):
        lab.get_by_label(label).focus()
        page.page.keyboard.press("Home")
    lab.get_by_text("(8 %) stand for no element").wait_for(timeout=15_000)


def test_each_rung_shows_its_own_picture(page) -> None:
    for number, lanes in ((1, "28 lanes"), (2, "5 lanes"), (3, "84 lanes"), (4, "487 lanes")):
        lab = page.lab(f"rung_{number}")
        lab.scroll_into_view_if_needed()
        lab.get_by_text(lanes).wait_for(timeout=15_000)
