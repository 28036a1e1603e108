"""The learner's copy: laid out once, never overwritten, brought up to date beside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from course_lib.notebook import workspace as ws


def notebook(*sources: str) -> str:
    cells = [
        {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "id": f"c{i}"}
        for i, source in enumerate(sources)
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


@pytest.fixture
def release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A release with one chapter and its exercises."""
    root = tmp_path / "release"
    for kind, text in (
        ("notebooks", notebook("# [Go](../exercises/01_a.ipynb#X)", "b")),
        ("exercises", notebook("# [Back](../notebooks/01_a.ipynb)", "stub")),
    ):
        (root / kind).mkdir(parents=True)
        (root / kind / "01_a.ipynb").write_text(text)
    monkeypatch.setattr(ws, "originals", lambda kind: root / kind)
    return root


def whats(changes: list[ws.Change]) -> dict[str, str]:
    return {change.name: change.what for change in changes}


def test_lay_out_copies_what_is_not_there_and_mends_links(release: Path, tmp_path: Path):
    work = tmp_path / "work"
    assert whats(ws.lay_out(work)) == {"01_a.ipynb": "new", "exercises/01_a.ipynb": "new"}
    assert "](exercises/01_a.ipynb#X)" in (work / "01_a.ipynb").read_text()
    assert "](../01_a.ipynb)" in (work / "exercises" / "01_a.ipynb").read_text()
    (work / "01_a.ipynb").write_text("mine")
    assert ws.lay_out(work) == []
    assert (work / "01_a.ipynb").read_text() == "mine"


def test_update_without_news(release: Path, tmp_path: Path):
    work = tmp_path / "work"
    ws.lay_out(work)
    assert set(whats(ws.update(work)).values()) == {"same"}
    (work / "01_a.ipynb").write_text(notebook("mine"))
    assert whats(ws.update(work))["01_a.ipynb"] == "edited"


def test_running_a_notebook_is_no_edit(release: Path, tmp_path: Path):
    work = tmp_path / "work"
    ws.lay_out(work)
    path = work / "exercises" / "01_a.ipynb"
    data = json.loads(path.read_text())
    data["cells"][1] |= {"outputs": [{"output_type": "stream"}], "source": ["stub"]}
    path.write_text(json.dumps(data))
    (release / "exercises" / "01_a.ipynb").write_text(notebook("new", "stub"))
    (change,) = [c for c in ws.update(work) if c.name.startswith("exercises")]
    assert (change.what, change.cells) == ("refreshed", 1)
    assert "new" in path.read_text()


def test_edited_work_stays_and_the_news_stand_beside_it_once(release: Path, tmp_path: Path):
    work = tmp_path / "work"
    ws.lay_out(work)
    mine = work / "exercises" / "01_a.ipynb"
    mine.write_text(notebook("my answer", "more"))
    (release / "exercises" / "01_a.ipynb").write_text(notebook("new", "stub"))
    (change,) = [c for c in ws.update(work) if c.name.startswith("exercises")]
    assert change == ws.Change("exercises/01_a.ipynb", "beside", "exercises/01_a.new.ipynb", 1)
    assert "my answer" in mine.read_text()
    assert "new" in (work / "exercises" / "01_a.new.ipynb").read_text()
    assert whats(ws.update(work))["exercises/01_a.ipynb"] == "already beside"
    # Whoever has merged the two and deleted the new one is left in peace.
    (work / "exercises" / "01_a.new.ipynb").unlink()
    assert whats(ws.update(work))["exercises/01_a.ipynb"] == "edited"


@pytest.mark.parametrize("state", [None, "{", "[]"])
def test_a_lost_record_overwrites_nothing(release: Path, tmp_path: Path, state: str | None):
    work = tmp_path / "work"
    ws.lay_out(work)
    (work / ws.STATE).unlink() if state is None else (work / ws.STATE).write_text(state)
    (work / "01_a.ipynb").write_text(notebook("perhaps mine"))
    assert whats(ws.update(work))["01_a.ipynb"] == "beside"
    assert "perhaps mine" in (work / "01_a.ipynb").read_text()


def test_a_file_that_is_no_notebook_stays(release: Path, tmp_path: Path):
    work = tmp_path / "work"
    ws.lay_out(work)
    (work / "01_a.ipynb").write_text("<<<<<<< conflict")
    (release / "notebooks" / "01_a.ipynb").write_text(notebook("new"))
    assert whats(ws.update(work))["01_a.ipynb"] == "beside"
    assert (work / "01_a.ipynb").read_text() == "<<<<<<< conflict"


def test_a_new_chapter_arrives(release: Path, tmp_path: Path):
    work = tmp_path / "work"
    ws.lay_out(work)
    (release / "notebooks" / "02_b.ipynb").write_text(notebook("hello"))
    assert whats(ws.update(work))["02_b.ipynb"] == "new"


def test_a_folder_that_cannot_be_written_is_named(release: Path, tmp_path: Path):
    (tmp_path / "work").write_text("a file")
    with pytest.raises(ws.WorkspaceError, match=r"Cannot write .*work"):
        ws.lay_out(tmp_path / "work")


def test_this_installation_has_originals():
    assert ws.originals("notebooks").is_dir()
