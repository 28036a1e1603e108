"""What the machine can do, and how it is told."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from course_lib.runtime import device
from course_lib.runtime.device import (
    DeviceReport,
    Gpu,
    Missing,
    capability,
    default_device,
    device_report,
    supports_triton,
)

LAPTOP = DeviceReport(
    python="3.12.1",
    torch="2.13.0",
    triton="3.7.1",
    gpu=None,
    gpu_count=0,
    kernels="interpreted",
    cpu_count=1,
    ram_bytes=16 << 30,
    disk_free_bytes=99 << 30,
    missing=(),
)


@pytest.fixture
def fresh_report():
    """Reports are cached: forget the one a test has bent, before and after."""
    caches = (device.device_report, device._capability)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def a_gpu(monkeypatch, fresh_report):
    def install(major, minor):
        properties = SimpleNamespace(name="Tesla", major=major, minor=minor, total_memory=15 << 30)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (major, minor))

    return install


def test_the_report_of_this_machine():
    report = device_report()
    assert report is device_report()
    assert report.torch == torch.__version__
    assert report.cpu_count >= 1
    assert report.disk_free_bytes > 0
    assert 2 <= len(report.lines()) <= 3
    json.dumps(dataclasses.asdict(report))


def test_a_laptop_in_two_lines():
    assert LAPTOP.lines() == [
        "Python 3.12.1, PyTorch 2.13.0, Triton 3.7.1, 1 CPU core, 16 GiB memory, 99 GiB free disk",
        "No GPU: Triton kernels run on the CPU under the interpreter, right but slow.",
    ]


def test_what_is_missing_takes_the_third_line():
    report = dataclasses.replace(
        LAPTOP, triton=None, ram_bytes=None, kernels="unavailable",
        missing=(Missing("Triton", "no kernel cell runs"), Missing("gcc", "no launch")),
    )  # fmt: skip
    assert len(report.lines()) == 3
    assert "Triton" not in report.lines()[0]
    assert report.lines()[2] == "Missing: Triton (no kernel cell runs); gcc (no launch)"


def test_a_gpu_machine(a_gpu):
    a_gpu(9, 0)
    report = device_report()
    assert report.gpu == Gpu("Tesla", (9, 0), 15 << 30)
    assert report.lines()[1].startswith("GPU: 2 x Tesla (sm_90, 15 GiB): Triton kernels are comp")
    assert default_device() == torch.device("cuda")
    assert capability("cuda") == capability("cuda:1") == (9, 0)


@pytest.mark.skipif(not device.HAS_TRITON, reason="needs Triton")
@pytest.mark.parametrize(
    ("found", "any_kernel", "dot_kernel"),
    [((7, 0), False, False), ((7, 5), True, False), ((8, 0), True, True), ((10, 0), True, True)],
)
def test_a_t4_runs_triton_but_not_its_dots(a_gpu, found, any_kernel, dot_kernel):
    a_gpu(*found)
    assert supports_triton("cuda") is any_kernel
    assert supports_triton("cuda", dot_heavy=True) is dot_kernel
    assert device_report().kernels == ("compiled" if any_kernel else "interpreted")


def test_the_cpu_has_no_capability():
    assert capability("cpu") is None
    assert not supports_triton("cpu")
    assert not supports_triton(torch.device("cpu"), dot_heavy=True)


def test_a_gpu_that_lies_idle_is_reported(monkeypatch, fresh_report):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "_has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", None)
    (idle, *_) = device_report().missing
    assert "built for CPUs only" in idle.cost
    assert default_device() == torch.device("cpu")


def test_nothing_is_asked_at_import():
    program = (
        "import torch; torch.cuda.is_available = None; torch.cuda.device_count = None;"
        "import course_lib.runtime.device, course_lib.runtime.interpreter;"
        "import course_lib.runtime.measure, course_lib.runtime.tile;"
        "course_lib.runtime.tile.HAS_TRITON and __import__('course_lib.runtime.executor');"
        "assert not torch.cuda.is_initialized()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
