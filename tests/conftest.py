"""What every test shares: options, hidden GPUs, and a COURSE_HOME of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep",
        action="store_true",
        default=False,
        help="run the heavy variants too: more seeds, every compile, fresh environments",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports torch: only a run that asks for the GPU may see one. So the same
    # tests give the same answers on a laptop and on a GPU machine.
    expression = config.getoption("markexpr", default="") or ""
    asks_for_gpu = "gpu" in expression and "not gpu" not in expression
    if not asks_for_gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Code that runs at import time of a test module must not find the developer's own progress
    # either, so a directory is set here already; each test then gets its own below.
    if "PYTEST_XDIST_WORKER" not in os.environ or "COURSE_HOME" not in os.environ:
        os.environ["COURSE_HOME"] = tempfile.mkdtemp(prefix="course-home-")
    os.environ.setdefault("MPLBACKEND", "agg")
    # Jupyter asks for this; without it every kernel start warns.
    os.environ.setdefault("JUPYTER_PLATFORM_DIRS", "1")
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deep = config.getoption("--deep")
    has_gpu: bool | None = None
    for item in items:
        if "slow" in item.keywords and not deep:
            item.add_marker(pytest.mark.skip(reason="slow: runs with --deep"))
        if "gpu" in item.keywords:
            if has_gpu is None:
                has_gpu = _has_gpu()
            if not has_gpu:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU: pytest -m gpu"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.fixture(autouse=True)
def course_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the test a COURSE_HOME of its own, empty."""
    home = tmp_path_factory.mktemp("course_home")
    monkeypatch.setenv("COURSE_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def deep(request: pytest.FixtureRequest) -> bool:
    """Whether the run asked for the heavy variants (`--deep`)."""
    return bool(request.config.getoption("--deep"))


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


def pytest_report_header(config: pytest.Config) -> str:
    gpus = "visible" if os.environ.get("CUDA_VISIBLE_DEVICES", "x") else "hidden"
    return f"course: GPUs {gpus}, deep={config.getoption('--deep')}"
