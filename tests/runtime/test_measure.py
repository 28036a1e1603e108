"""Memory, saved tensors, time, FLOPs and the roofline, on sizes that can be told by hand."""

import time
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from course_lib.runtime.measure import (
    count_flops,
    measure_memory,
    roofline,
    saved_for_backward,
    time_interleaved,
)

KIB = 1024


def kib(n):
    """A float32 tensor of n KiB."""
    return torch.zeros(n * KIB // 4)


# Memory.


def test_inputs_views_and_in_place_cost_nothing():
    x = kib(4)
    with measure_memory() as memory:
        x.view(2, -1).t()[1:].add_(1)
        x.mul_(2)
    assert (memory.live_bytes, memory.peak_bytes, memory.largest_op) == (0, 0, None)


def test_peak_is_what_lives_at_once():
    x = kib(4)
    with measure_memory() as memory:
        y = x + 1
        y = y * 2  # while this runs, both values of y live
        for _ in range(5):
            y = y.exp()
    assert memory.peak_bytes == 8 * KIB
    assert memory.live_bytes == 4 * KIB
    del y
    assert memory.live_bytes == 0


def test_views_keep_a_storage_counted_once():
    x = kib(4)
    with measure_memory() as memory:
        rows = (x + 1).view(4, -1)[1]
        again = rows.reshape(-1)
    assert memory.live_bytes == 4 * KIB
    del rows
    assert memory.live_bytes == 4 * KIB
    del again
    assert memory.live_bytes == 0


def test_the_largest_storage_and_the_operators():
    a, b = torch.ones(8, 64), torch.ones(64, 32)
    with measure_memory() as memory:
        (a @ b).softmax(-1).sum()
        torch.outer(a[0], b[:, 0])
    assert memory.largest_bytes == 64 * 64 * 4
    assert memory.largest_shape == (64, 64)
    assert memory.largest_op == "aten::mul"
    assert memory.ops["aten::_softmax"] == 1
    assert memory.ops["aten::mm"] == 1


def test_autograd_keeps_tensors_until_backward():
    x = kib(4).requires_grad_()
    with measure_memory() as memory:
        y = x.exp().exp().sum()
        after_forward = memory.live_bytes
        y.backward()
        del y
    assert after_forward == 8 * KIB + 4
    assert memory.live_bytes == 4 * KIB  # x.grad
    assert memory.ops["aten::mul"] == 2


def test_checkpointing_lowers_the_peak():
    layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(8))
    x = torch.randn(256, 32)

    def peak(run):
        with measure_memory() as memory:
            y = x
            for layer in layers:
                y = run(layer, y)
            y.sum().backward()
        return memory.peak_bytes

    plain = peak(lambda layer, y: layer(y))
    saving = peak(lambda layer, y: checkpoint(layer, y, use_reentrant=False))
    assert saving < 0.7 * plain


def test_out_and_resize_grow_a_storage():
    with measure_memory() as memory:
        target = torch.empty(0)
        torch.add(torch.ones(256), 1, out=target)
        assert memory.live_bytes == 1 * KIB
    del target
    assert memory.live_bytes == 0


def test_nothing_is_kept_alive():
    x = kib(4)
    with measure_memory() as memory:
        y = x + 1
        reference = weakref.ref(y)
        del y
        assert reference() is None
    assert memory.live_bytes == 0


def test_the_body_of_a_custom_operator_is_seen():
    @torch.library.custom_op("course_test_measure::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        big = x.repeat(100)
        return big[: x.numel()] + big[: x.numel()]

    x = kib(1)
    with measure_memory() as memory:
        y = twice(x)
    assert memory.largest_bytes == 100 * KIB
    assert memory.largest_op == "aten::repeat"
    assert memory.ops["course_test_measure::twice"] == 1
    assert memory.live_bytes == 1 * KIB
    assert y.shape == x.shape


def test_measures_nest():
    with measure_memory() as outer:
        first = kib(2)
        with measure_memory() as inner:
            second = first + 1
    assert (inner.live_bytes, outer.live_bytes) == (2 * KIB, 4 * KIB)
    del first, second


# Saved for backward.


def test_saved_tensors_are_counted_by_storage():
    x = kib(4).requires_grad_()
    with saved_for_backward(x) as saved:
        y = x * x  # saves x twice
        z = y.exp()  # saves its output
    assert [(t.nbytes, t.is_input) for t in saved.tensors] == [(4 * KIB, True), (4 * KIB, False)]
    assert saved.total_bytes == 8 * KIB
    assert saved.activation_bytes == 4 * KIB
    z.sum().backward()
    torch.testing.assert_close(x.grad, torch.zeros_like(x))


def test_parameters_of_a_module_are_inputs():
    layer = nn.Linear(16, 16)
    x = torch.randn(4, 16, requires_grad=True)
    with saved_for_backward(layer, x) as saved:
        layer(x).relu()
    assert saved.activation_bytes == 4 * 16 * 4
    assert {t.shape for t in saved.tensors if t.is_input} == {(4, 16), (16, 16)}


def test_saved_tensors_are_let_go():
    x = kib(4).requires_grad_()
    with saved_for_backward():
        y = x.exp()
        output = weakref.ref(y)
        del y
    assert output() is None


def test_saving_changes_no_gradient_not_even_the_second():
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with saved_for_backward(x):
        assert torch.autograd.gradgradcheck(lambda t: (t.exp() * t).tanh(), (x,))


# Time.


def test_a_slower_function_takes_longer():
    calls = []
    timings = time_interleaved(
        {
            "short": lambda: (calls.append("short"), time.sleep(0.001)),
            "long": lambda: (calls.append("long"), time.sleep(0.01)),
        },
        repeats=4,
        warmup=1,
    )
    assert calls == ["short", "long"] + ["short", "long", "long", "short"] * 2
    assert timings["long"].median > timings["short"].median
    assert timings["long"].n == 4
    assert timings["long"].p20 <= timings["long"].median <= timings["long"].p80


def test_threads_are_restored():
    before = torch.get_num_threads()
    seen = []
    time_interleaved({"f": lambda: seen.append(torch.get_num_threads())}, repeats=1, threads=2)
    assert seen == [2, 2]
    with pytest.raises(ZeroDivisionError):
        time_interleaved({"f": lambda: 1 / 0}, repeats=1, threads=2)
    assert torch.get_num_threads() == before
    with pytest.raises(ValueError, match="repeats=0"):
        time_interleaved({"f": lambda: None}, repeats=0)


# Work.


def test_flops_of_a_matrix_product_and_its_backward():
    a, b = torch.ones(4, 8, requires_grad=True), torch.ones(8, 16, requires_grad=True)
    assert count_flops(lambda: a @ b) == 2 * 4 * 8 * 16
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 4 * 8 * 16


def test_roofline_is_quick_and_sensible():
    start = time.perf_counter()
    roof = roofline()
    assert time.perf_counter() - start < 2
    assert 1e8 < roof.bytes_per_second < 1e13
    assert 1e8 < roof.flops_per_second < 1e16
    assert roof.attainable(roof.ridge) == pytest.approx(roof.flops_per_second)
    assert roof.attainable(roof.ridge / 2) == pytest.approx(roof.flops_per_second / 2)
    assert roof.seconds(nbytes=roof.bytes_per_second, flops=0) == pytest.approx(1)


@pytest.mark.gpu
def test_a_gpu_is_timed_and_measured():
    a = torch.randn(4096, 4096, device="cuda")
    timings = time_interleaved({"mm": lambda: a @ a, "add": lambda: a + a}, device="cuda")
    assert timings["mm"].median > timings["add"].median > 0
    roof = roofline("cuda")
    assert roof.bytes_per_second > 1e11
    with measure_memory() as memory:
        x = a.clone().requires_grad_()
        x.exp().sum().backward()
    assert memory.peak_bytes >= 3 * a.numel() * 4
