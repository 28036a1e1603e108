"""Masters become notebooks, and a stale notebook is named."""

from __future__ import annotations

import json
from pathlib import Path

import nbformat
import pytest

from course_lib.authoring import build as builder
from course_lib.authoring.bootstrap import bootstrap_text, colab_badge
from course_lib.authoring.build import BuildError, build, check, find_masters
from course_lib.authoring.cards import anchor

SLUG = "01_small_chapter"


def read(root: Path, folder: str):
    return nbformat.read(root / folder / f"{SLUG}.ipynb", as_version=4)


def test_chapter_is_executed_folded_and_clean(built: Path):
    notebook = read(built, "notebooks")
    assert [cell.id for cell in notebook.cells] == [f"{SLUG}-{i:03d}" for i in range(7)]
    bootstrap, first, _, outcome = notebook.cells[1:5]
    assert bootstrap.source == bootstrap_text("")
    assert bootstrap.metadata == {"jupyter": {"source_hidden": True}}
    assert first.source.startswith("import json")
    assert outcome.metadata == {"jupyter": {"source_hidden": True}}
    assert outcome.outputs[0].text == "gpus: ''\nhome has 0 files\n"
    assert notebook.cells[5].outputs[0].data == {"text/plain": "42"}
    assert set(notebook.metadata) == {"kernelspec", "language_info", "course"}
    assert notebook.metadata.language_info == {"name": "python"}
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    listing = notebook.cells[6].source
    assert "../exercises/01_small_chapter.ipynb#The-total-of-it" in listing
    assert listing.index("**Core**") < listing.index("**Stretch**")


def test_solution_and_exercise_come_from_one_master(built: Path):
    solution, exercise = read(built, "solutions"), read(built, "exercises")
    solved = "\n".join(cell.source for cell in solution.cells)
    given = "\n".join(cell.source for cell in exercise.cells)
    assert "result += one_value" in solved
    assert "SOLUTION" not in solved
    assert "STUB" not in solved
    assert "result += one_value" not in given
    assert 'raise NotImplementedError("total: add them in a loop")' in given
    assert "plateau = ...  # your answer" in given
    assert "4.85" not in given
    assert "Only here" in solved
    assert "Only here" not in given
    assert "These are the solutions" in solution.cells[0].source
    assert "These are the solutions" not in exercise.cells[0].source
    assert all(not cell.get("outputs") for cell in exercise.cells)
    assert [cell.metadata.get("course") for cell in exercise.cells[3:6]] == [
        None,
        {"exercise": "total"},
        {"check": "total"},
    ]
    card = exercise.cells[3].source
    assert card.startswith("## The total of it\n\n**Exercise 1, core** · write a function: `total`")
    assert "difficulty ●●○○○ (2 of 5)" in card


def test_a_second_build_does_nothing_and_a_forced_one_writes_the_same(built: Path):
    before = {path: path.read_bytes() for path in built.glob("*/*.ipynb")}
    assert len(before) == 3
    assert build(built, say=lambda line: None) == []
    assert len(build(built, [SLUG], say=lambda line: None)) == 3
    assert {path: path.read_bytes() for path in built.glob("*/*.ipynb")} == before


def test_check_names_what_is_stale(built: Path, capsys: pytest.CaptureFixture[str]):
    assert check(built) == []
    assert builder.main(built, [], check_only=True) == 0

    master = built / "notebooks" / "src" / f"{SLUG}.py"
    master.write_text(master.read_text().replace("A puzzle", "A riddle"))
    assert [(each.path, each.why) for each in check(built)] == [
        (f"notebooks/{SLUG}.ipynb", "its master changed")
    ]
    assert builder.main(built, [], check_only=True) == 1
    out = capsys.readouterr().out
    assert f"stale: notebooks/{SLUG}.ipynb (its master changed)" in out
    assert f"Run: ./course build {SLUG}" in out


@pytest.mark.parametrize("folder", ["notebooks", "solutions", "exercises"])
def test_check_sees_an_edit_by_hand(built: Path, folder: str):
    path = built / folder / f"{SLUG}.ipynb"
    data = json.loads(path.read_text())
    data["cells"][-1]["source"] = "edited by hand"
    path.write_text(json.dumps(data))
    assert [(e.path, e.why) for e in check(built)] == [
        (f"{folder}/{SLUG}.ipynb", "its cells are not what the build writes today")
    ]


def test_check_sees_a_changed_card(built: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("course_lib.authoring.build.card_markdown", lambda *_: "## Another card")
    assert {each.path for each in check(built)} == {
        f"solutions/{SLUG}.ipynb",
        f"exercises/{SLUG}.ipynb",
    }


def test_check_sees_missing_orphaned_unreadable_and_unexecuted_files(built: Path):
    (built / "notebooks" / f"{SLUG}.ipynb").unlink()
    (built / "exercises" / f"{SLUG}.ipynb").write_text("{")
    (built / "exercises" / "09_gone.ipynb").write_text("{}")
    path = built / "solutions" / f"{SLUG}.ipynb"
    data = json.loads(path.read_text())
    data["cells"][1]["execution_count"] = None
    path.write_text(json.dumps(data))
    whys = {each.path: each.why for each in check(built)}
    assert whys[f"notebooks/{SLUG}.ipynb"] == "it is not built yet"
    assert "not a readable notebook" in whys[f"exercises/{SLUG}.ipynb"]
    assert "no master" in whys["exercises/09_gone.ipynb"]
    assert "was not executed" in whys[f"solutions/{SLUG}.ipynb"]


def test_a_failing_cell_is_named_and_nothing_is_written(small: Path):
    master = small / "notebooks" / "src" / f"{SLUG}.py"
    master.write_text(master.read_text().replace("6 * 7", "assert 6 * 7 == 43, 'not so'"))
    with pytest.raises(BuildError, match=rf"src/{SLUG}.py: cell {SLUG}-005 .*failed") as caught:
        build(small, say=lambda line: None)
    assert "AssertionError: not so" in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not (small / "notebooks" / f"{SLUG}.ipynb").exists()


def test_problems_of_a_master_stop_its_build(small: Path):
    master = small / "solutions" / "src" / f"{SLUG}.py"
    master.write_text(master.read_text().replace("    # END SOLUTION\n", "", 1))
    with pytest.raises(BuildError, match=rf"^solutions/src/{SLUG}.py:\d+ \(cell 4\)"):
        build(small, [SLUG], say=lambda line: None)


def test_a_notebook_that_is_too_large_is_refused(small: Path):
    master = small / "notebooks" / "src" / f"{SLUG}.py"
    master.write_text(master.read_text().replace("6 * 7", "'x' * 1_600_000"))
    with pytest.raises(BuildError, match=f"at most 1,500,000. Largest cell: {SLUG}-005"):
        build(small, [SLUG], say=lambda line: None)


def test_slugs_choose_masters(small: Path):
    assert len(find_masters(small)) == 2
    assert find_masters(small, ["small_chapter"]) == find_masters(small, [SLUG])
    with pytest.raises(BuildError, match=r"no master for 'other'. Masters: 01_small_chapter"):
        find_masters(small, ["other"])
    assert builder.main(small, ["other"], check_only=False) == 2


def test_widget_view_goes_where_a_picture_stays():
    view = {builder.WIDGET_VIEW: {"model_id": "1"}, "text/plain": "a lab", "image/png": "aGk="}
    alone = {builder.WIDGET_VIEW: {"model_id": "1"}}
    outputs = [
        nbformat.v4.new_output("display_data", data=dict(data), metadata={})
        for data in (view, alone)
    ]
    cell = nbformat.v4.new_code_cell("lab", outputs=outputs)
    notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"widgets": {}})
    builder.strip_volatile(notebook)
    assert set(cell.outputs[0].data) == {"text/plain", "image/png"}
    assert set(cell.outputs[1].data) == {builder.WIDGET_VIEW}
    assert "widgets" not in notebook.metadata


def test_repository_stamps_badge_and_bootstrap(small: Path):
    address = "https://github.com/owner/name"
    (small / "pyproject.toml").write_text(f'[tool.course]\nrepository = "{address}"\n')
    build(small, say=lambda line: None)
    notebook = read(small, "notebooks")
    badge = "colab.research.google.com/github/owner/name/blob/main/notebooks/01_small_chapter.ipynb"
    assert badge in notebook.cells[0].source
    assert f'repository = "{address}"' in notebook.cells[1].source
    assert check(small) == []


def test_badge_needs_github():
    assert colab_badge("", "notebooks/a.ipynb") == ""
    with pytest.raises(ValueError, match=r"expected https://github.com/owner/name"):
        colab_badge("https://example.org/owner/name", "notebooks/a.ipynb")


def test_anchor_is_the_heading_with_dashes():
    assert anchor("Softmax, `one pass`") == "Softmax%2C-one-pass"
