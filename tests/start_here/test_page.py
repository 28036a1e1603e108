"""The numbers that chapter 00 states, and what its page is made of."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
import torch

from course_lib import interpreted, progress
from course_lib.grading.exercise import chapters
from course_lib.notebook.recorded import recorded
from course_lib.runtime.interpreter import OutOfBounds
from course_lib.runtime.measure import Timing
from course_lib.runtime.tile import HAS_TRITON, TritonUnavailable, tl, triton
from course_lib.start_here.exercises import CHAPTER
from course_lib.start_here.labs import RUNGS, rung, who_owns_what
from course_lib.start_here.page import (
    ADDITION_TO_COPY,
    MAP,
    PRODUCT_TO_ADDITION,
    RECORDED,
    believed,
    map_card,
    needs_triton,
    solved,
    without_end,
)
from course_lib.start_here.questions import PREDICT

needs = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")


@triton.jit
def add_without_mask(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(y_ptr + offs))


def side_by_side() -> tuple[torch.Tensor, ...]:
    memory = torch.full((512,), 7.0)
    out, neighbour, x, y = (memory[i : i + 100] for i in (0, 100, 200, 300))
    x.copy_(torch.arange(100.0))
    y.copy_(1000 + torch.arange(100.0))
    return x, y, out, neighbour


@needs
def test_28_elements_of_the_neighbour_are_overwritten_and_the_answer_is_right() -> None:
    x, y, out, neighbour = side_by_side()
    with interpreted():
        add_without_mask[(2,)](without_end(x), without_end(y), without_end(out), BLOCK=64)
    assert torch.equal(out, x + y)
    assert int((neighbour != 7).sum()) == 28
    asked = next(question for question in PREDICT if question.name == "overwritten")
    assert asked.answer == 28


@needs
def test_the_guard_names_program_and_tensor() -> None:
    x, y, out, neighbour = side_by_side()
    with interpreted(), pytest.raises(OutOfBounds, match=r"program \(1, 0, 0\) reads 28 .* `x`"):
        add_without_mask[(2,)](x, y, out, BLOCK=64)
    assert torch.equal(neighbour, torch.full((100,), 7.0))


def test_the_tiling_counts_lanes() -> None:
    state = who_owns_what.state()
    assert (state.grid, state.lanes, state.idle) == ((3, 3), 1152, 591)
    assert "51 %" in who_owns_what.describe(state)
    insight = who_owns_what.state(**who_owns_what.insight_at)
    assert insight.idle / insight.lanes < 0.1


def test_every_tile_of_every_setting_can_be_drawn() -> None:
    for rows in (1, 17, 30):
        for columns in (1, 33, 128):
            for tile_rows in (1, 8, 16):
                picture = str(
                    who_owns_what.draw(
                        who_owns_what.state(rows=rows, columns=columns, tile_rows=tile_rows)
                    )
                )
                assert len(picture) < 250_000
                assert "nan" not in picture


def test_the_rungs_state_their_numbers() -> None:
    states = {number: who_owns_what.state(**values) for number, (*_, values) in RUNGS.items()}
    assert (states[1].programs, states[1].idle) == (2, 28)
    assert (states[2].grid, states[2].idle) == ((5, 1), 5)
    assert states[3].idle == 3 * 28
    assert (states[4].rows - 16) * (states[4].columns - 32) == 9
    assert who_owns_what.state(rows=1, columns=100, tile_rows=1, tile_columns=4).idle == 0
    assert rung(4).sentence.startswith("A matrix of 19 × 35")
    # As the kernel's `tl.program_id(0)` and the guard's errors count them.
    assert [states[1].name_of(0, n) for n in range(2)] == ["0", "1"]
    assert states[4].name_of(2, 1) == "(2, 1)"


def test_a_machine_without_triton_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with needs_triton():
        raise TritonUnavailable("missing")
    assert "Read on" in capsys.readouterr().out


def test_a_solved_kernel_is_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    from course_lib.start_here import kernels, page

    shown = []
    monkeypatch.setattr(page, "emit", shown.append)
    solved("Rung 2", kernels.row_sum_kernel)
    assert "<details>" in shown[0].html
    assert "<details open" not in shown[0].html
    assert "tl.sum" in shown[0].text


def timings(spread: float, **seconds: float) -> dict[str, Timing]:
    names = {"copy": 10e-3, "+ 1": 10e-3, "exp": 20e-3, "matmul": 30e-3} | seconds
    return {name: Timing(median, median, median * spread, 7) for name, median in names.items()}


def test_a_steady_machine_is_believed_even_when_it_disagrees() -> None:
    times = believed(timings(1.1, copy=20e-3, matmul=200e-3))
    assert times.here
    assert "0.50 × copy" in str(times.against_the_copy())
    assert "disagrees" in str(times.against_the_copy())
    assert "disagrees" in str(times.against_the_addition())
    assert "disagrees" not in str(believed(timings(1.1)).against_the_copy())


def test_an_unsteady_machine_is_not_believed_even_when_it_agrees() -> None:
    times = believed(timings(1.5))
    assert not times.here
    run = recorded(RECORDED)
    assert run is not None
    assert times.ms["copy"] == 1000 * run["seconds"]["copy"]["median"]
    assert "differ by 50 %" in times.origin


def test_the_recorded_run_says_what_the_text_says() -> None:
    times = believed(timings(9.0))
    assert ADDITION_TO_COPY[0] < times.of("+ 1", "copy") < ADDITION_TO_COPY[1]
    assert times.of("matmul", "+ 1") < PRODUCT_TO_ADDITION[1]
    assert round(times.of("exp", "copy")) in (2, 3)


def test_the_map_marks_what_is_planned() -> None:
    here = {chapter.slug.split("_")[0]: chapter for chapter in chapters()}
    lines = str(map_card()).splitlines()
    assert [line.split()[0] for line in lines] == [number for number, *_ in MAP]
    for line, (number, _, question, _) in zip(lines, MAP, strict=True):
        assert line.endswith("(planned)") == (number not in here)
        if number in here:
            assert question == here[number].title


def test_the_text_links_to_the_exercises_it_names(root) -> None:
    text = (root / "notebooks" / "src" / "00_start_here.py").read_text(encoding="utf-8")
    links = re.findall(r"\[exercise (\d)\]\(\.\./exercises/00_start_here\.ipynb#([^)]+)\)", text)
    assert [int(number) for number, _ in links] == [3, 4, 5, 6, 7, 8]
    for number, fragment in links:
        title = unquote(fragment).replace("-", " ")
        assert title == CHAPTER.exercises[int(number) - 1].title.replace("-", " ")


def test_the_stated_times_add_up() -> None:
    """An hour of exercises beside 40 minutes of reading; 1 to 6 fit into the two-hour road."""
    minutes = [exercise.minutes for exercise in CHAPTER.exercises]
    assert sum(minutes) == 60
    assert 40 + sum(minutes[:6]) + 45 <= 120


def test_progress_reads_well_without_styles() -> None:
    html = re.sub(r"<style>.*?</style>", "", progress().html, flags=re.DOTALL)
    words = " ".join(re.sub(r"<[^>]+>", "", html.replace("<br>", "\n")).split())
    assert "to do: Read a card, change one character, 0 of 1 points, 2 min, core" in words
    assert "memory? · 0 of" in words
