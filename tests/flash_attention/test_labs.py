"""The labs of chapter 08: their numbers, their words, and that the traces are the kernels' own."""

from __future__ import annotations

import dataclasses
import itertools
import math
import xml.etree.ElementTree as ET

import pytest
import torch

from course_lib.flash_attention import labs, reference_attention
from course_lib.notebook import trace_viewer
from course_lib.runtime.tile import HAS_TRITON
from course_lib.runtime.trace import Access, Launch, TensorInfo

LABS = [labs.tile_walker, labs.online_softmax_lab, labs.roofline_lab]
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton cannot be imported here")


def options(control):
    """Values of a control that a test tries: all that are few, the ends of a sequence."""
    spec = control.spec()
    return {
        "slider": lambda: spec["values"],
        "choice": lambda: [each for each in spec["options"] if each != labs.THIS_MACHINE],
        "toggle": lambda: [False, True],
        "numbers": lambda: [control.start, [0.0], [3.0, 3.0, -2.0]],
        "steps": lambda: [0, 5, 10**6],
    }[spec["kind"]]()


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_every_control_draws_and_describes(lab) -> None:
    for control in lab.controls:
        for value in options(control):
            state = lab.state(**{control.name: value})
            ET.fromstring(str(lab.draw(state)))
            assert lab.describe(state).endswith(".")
    assert lab.describe(lab.state(**lab.insight_at)) != lab.describe(lab.state())


@pytest.mark.parametrize("lab", LABS, ids=lambda lab: lab.name)
def test_nothing_is_drawn_outside_the_picture(lab) -> None:
    picture = lab.draw(lab.state(**lab.insight_at))
    for rect in ET.fromstring(str(picture)).iter("{http://www.w3.org/2000/svg}rect"):
        x, y, width, height = (float(rect.get(key)) for key in ("x", "y", "width", "height"))
        assert x >= 0
        assert y >= 0
        assert x + width <= picture.width + 0.5
        assert y + height <= picture.height + 0.5


# --- The tile walker -------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize(
    ("block_m", "block_n", "causal", "order"),
    [
        *itertools.product((64,), (128,), (False, True), (labs.QUERY_OUTER, labs.KEY_OUTER)),
        (128, 32, True, labs.QUERY_OUTER),
        (32, 64, True, labs.KEY_OUTER),
    ],
)
def test_the_walk_that_stands_in_equals_the_trace(block_m, block_n, causal, order) -> None:
    live = labs.walk_forward(block_m, block_n, causal, order)
    launch, accesses = labs.expected_walk(block_m, block_n, causal, order)
    assert [dataclasses.replace(access, line=0) for access in live.accesses] == list(accesses)
    assert live.launch.tensors == launch.tensors
    assert live.launch.grid == launch.grid


@needs_triton
@pytest.mark.parametrize("causal", [False, True])
def test_both_loop_orders_compute_attention(causal) -> None:
    inputs = labs.walker_inputs()
    truth = reference_attention(*(x.double() for x in inputs), causal=causal)
    _, out, lse = labs.trace_forward(*inputs, block_m=128, block_n=128, causal=causal)
    assert (out - truth).abs().max() < 1e-5
    assert lse.shape == (1, 1, labs.TOKENS)

    from course_lib.flash_attention.loop_order import key_outer_fwd_kernel
    from course_lib.runtime.interpreter import interpreted

    other, statistics = torch.empty_like(inputs[0]), torch.empty(2, labs.TOKENS)
    scale = math.log2(math.e) / math.sqrt(labs.HEAD_DIM)
    with interpreted():
        key_outer_fwd_kernel[(1,)](
            *inputs, other, *statistics, labs.TOKENS, scale, causal, labs.HEAD_DIM, 64, 128
        )
    assert (other - truth).abs().max() < 1e-5


def test_block_n_changes_no_byte_and_block_m_halves_the_walks() -> None:
    def read(**changes):
        return labs.tile_walker.state(**changes).walk.read[-1]

    inputs = labs.TOKENS * labs.HEAD_DIM * 4
    assert read(block_n=32) == read(block_n=64) == read(block_n=128)
    assert read(block_m=64) - inputs == 2 * (read(block_m=128) - inputs)
    assert labs.tile_walker.state(block_m=32).kv_reads == 8
    other = {"order": labs.KEY_OUTER}
    assert read(block_n=32, **other) > 1.8 * read(block_n=64, **other)
    assert labs.tile_walker.state(**other).kv_reads == 1


@needs_triton
def test_the_running_statistics_end_in_the_kernels_logsumexp() -> None:
    for causal in (False, True):
        state = labs.tile_walker.state(block_m=128, causal=causal, step=10**6)
        inputs = labs.walker_inputs()
        lse = labs.trace_forward(*inputs, block_m=128, block_n=64, causal=causal)[2][0, 0]
        assert math.isclose(
            state.row_max[-1] + math.log(state.row_sum[-1]), lse[state.row].item(), rel_tol=1e-5
        )


def test_a_step_never_reads_ahead() -> None:
    first = labs.tile_walker.state(step=0)
    assert first.tiles == ()
    assert "has seen no key yet" in labs.tile_walker.describe(first)
    last = labs.tile_walker.state(step=10**6)
    assert last.at == last.steps - 1
    assert len(last.tiles) == (labs.TOKENS // 64) ** 2


def test_the_insight_of_the_tile_walker_is_said() -> None:
    text = labs.tile_walker.describe(labs.tile_walker.state(**labs.tile_walker.insight_at))
    assert "reads 328 kB" in text
    assert "K and V each read 2 times" in text


# --- The roofline ----------------------------------------------------------------------------


def test_intensity_is_query_rows_for_each_load_in_16_bits() -> None:
    for block_m in (16, 64, 256):
        naive, tiled = labs.attention_points(labs.PREFILL, 131_072, 64, block_m, 1, 2)
        assert math.isclose(tiled.intensity, block_m, rel_tol=0.02)
        assert math.isclose(naive.intensity, 64 / 2, rel_tol=0.02)
    for group in (1, 8):
        tiled = labs.attention_points(labs.DECODE, 8192, 128, 64, group, 2)[1]
        assert math.isclose(tiled.intensity, group, rel_tol=0.02)


def test_a_tile_that_saves_nothing() -> None:
    state = labs.roofline_lab.state(**labs.roofline_lab.insight_at)
    assert round(state.tiled.nbytes / 1e6) == 541
    assert round(state.naive.nbytes / 1e6) == 545
    assert "it saves nothing" in labs.roofline_lab.describe(state)


def test_naive_decode_without_groups_copies_nothing() -> None:
    naive, tiled = labs.attention_points(labs.DECODE, 4096, 64, 64, 1, 2)
    assert naive.nbytes - tiled.nbytes == 4 * 4096 * 2  # the scores, four times


def test_the_peaks_are_those_of_datasheets() -> None:
    ridges = {name: round(each.flops / each.bandwidth) for name, each in labs.DEVICES.items()}
    assert ridges == {"T4": 203, "L4": 403, "A100 80 GB": 153, "H100": 295, "H200": 206}
    assert all("NVIDIA" in each.source for each in labs.DEVICES.values())
    assert all("datasheet" in each.source for each in labs.DEVICES.values())


def test_this_machine_is_measured_in_float32() -> None:
    state = labs.roofline_lab.state(device=labs.THIS_MACHINE)
    assert state.device.itemsize == 4
    assert 1e9 < state.device.flops < 1e14
    assert "32 bits" in labs.roofline_lab.describe(state)


# --- The trace viewer ------------------------------------------------------------------------


def vector_launch() -> Launch:
    info = TensorInfo((100,), (1,), "float32", 4)
    accesses = [
        Access((0, 0, 0), "load", "x", 0, 64, 64, 256, (64,), 12, "fp32"),
        Access((0, 0, 0), "store", "y", 0, 64, 64, 256, (64,), 13, "fp32"),
        Access((1, 0, 0), "load", "x", 64, 100, 36, 144, (64,), 12, "fp32"),
        Access((1, 0, 0), "atomic", "y", 0, 0, 0, 0, (64,), 13, "fp32"),
    ]
    return Launch("add_one", (2, 1, 1), {"x": info, "y": info}, accesses)


def test_the_viewer_says_who_touches_what() -> None:
    lab = trace_viewer.trace_lab(vector_launch(), {"x": "input", "y": "output"})
    assert lab.describe(lab.state(step=0)) == (
        "Program 0 of 2 reads input at elements 0–63: 256 bytes (line 12). So far 256 bytes read "
        "and 0 bytes written, of 400 bytes and 256 bytes."
    )
    assert "updates nothing of output: every lane is masked" in lab.describe(lab.state(step=9))
    for step in range(4):
        ET.fromstring(str(lab.draw(lab.state(step=step))))


def test_the_viewer_compares_and_quotes() -> None:
    launch = labs.walk_forward(64, 64, False, labs.QUERY_OUTER).launch
    lab = trace_viewer.trace_lab(
        launch, ["k", "o"], kernel=labs.compute_roofline, beside=launch, beside_name="ours"
    )
    text = lab.describe(lab.state(step=1))
    assert "reads k at rows 0–63, columns 0–63: 16,384 bytes" in text
    assert "; ours moves 656 kB in all." in text
    ET.fromstring(str(lab.draw(lab.state(step=1))))


def test_the_viewer_refuses_what_it_cannot_show() -> None:
    with pytest.raises(ValueError, match="no recorded access"):
        trace_viewer.trace_lab(Launch("k", (1, 1, 1)))
    with pytest.raises(ValueError, match="no tensor 'z'"):
        trace_viewer.trace_lab(vector_launch(), ["z"])


def test_many_tiles_become_one_box_and_many_programs_a_bar() -> None:
    info = TensorInfo((4000, 8), (8, 1), "float32", 4)
    accesses = [
        Access((i, 0, 0), "load", "x", 8 * i, 8 * i + 8, 8, 32, (8,), 1, "fp32")
        for i in range(4000)
    ]
    lab = trace_viewer.trace_lab(Launch("rows", (4000, 1, 1), {"x": info}, accesses))
    picture = str(lab.draw(lab.state(step=3999)))
    assert picture.count("<rect") < 60
    assert "row 3,999, columns 0–7" in lab.describe(lab.state(step=3999))


def test_leading_dimensions_are_stacked() -> None:
    info = TensorInfo((2, 3, 10, 4), (120, 40, 4, 1), "float32", 4)
    access = Access((0, 0, 0), "load", "x", 160, 180, 20, 80, (5, 4), 1, "fp32")
    walk = trace_viewer.walk_of(Launch("k", (1, 1, 1), {"x": info}, [access]))
    assert trace_viewer.matrix_shape(info.shape) == (60, 4)
    assert walk.boxes == [(40, 45, 0, 4)]


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (256, "256 bytes"),
        (16_384, "16.4 kB"),
        (999_600, "1 MB"),
        (1.31e6, "1.31 MB"),
    ],
)
def test_bytes_in_words(count, text) -> None:
    assert trace_viewer.bytes_text(count) == text
