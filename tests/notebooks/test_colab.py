"""The first cell on Colab: it installs the course, and leaves torch alone."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path

import pytest

from course_lib.authoring.bootstrap import SMALL_PACKAGES, bootstrap_text

ROOT = Path(__file__).parents[2]


def python_in(folder: Path, code: str, *options: str, **environment: str):
    """Run code by this Python in a folder, with nothing of this repository on its path."""
    names = ("PYTHONPATH", "PYTHONSTARTUP")
    clean = {key: value for key, value in os.environ.items() if key not in names}
    return subprocess.run(
        [sys.executable, "-P", *options, "-c", code],
        cwd=folder,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_elsewhere_it_does_nothing(tmp_path: Path):
    done = python_in(tmp_path, bootstrap_text("") + "\nprint('on')")
    assert (done.stdout, done.stderr) == ("on\n", "")


def test_it_installs_nothing_that_belongs_to_the_host():
    text = bootstrap_text("https://github.com/owner/name")
    assert not {"torch", "triton", "numpy"} & set(SMALL_PACKAGES)
    assert '"--no-deps"' in text
    assert len(text.splitlines()) <= 24


def test_without_a_wheel_it_says_what_to_do(tmp_path: Path):
    _imitate_colab(tmp_path)
    code = bootstrap_text("").replace('not find_spec("course_lib")', "True")
    done = python_in(tmp_path, code, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "Upload course_lib-….whl in the Files panel" in done.stderr


def test_it_takes_the_repository_where_there_is_one(tmp_path: Path):
    _imitate_colab(tmp_path)
    address = "https://github.com/owner/name"
    code = "import subprocess\nsubprocess.run = lambda command, check: print(command)\n"
    code += bootstrap_text(address).replace('not find_spec("course_lib")', "True")
    done = python_in(tmp_path, code, PYTHONPATH=str(tmp_path))
    assert f"'--no-deps', 'git+{address}'" in done.stdout, done.stderr


def _imitate_colab(folder: Path) -> None:
    package = folder / "google" / "colab"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "-w",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("course_lib-*.whl"))


@pytest.mark.slow
def test_the_wheel_carries_everything(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "course_lib/_notebooks/00_start_here.ipynb",
        "course_lib/_exercises/00_start_here.ipynb",
        "course_lib/_solutions/00_start_here.py",
        "course_lib/notebook/lab_settings/overrides.json",
        "course_lib/notebook/lab.js",
    ):
        assert wanted in names
    assert not [n for n in names if "/src/" in n or n.startswith(("tests", "work", "benchmarks"))]


@pytest.mark.slow
def test_colab(wheel: Path, tmp_path: Path):
    """A venv without course_lib, with the packages of this one: Colab's situation."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=True)
    python = home / "bin" / "python"
    site = next((home / "lib").glob("python*/site-packages"))
    # Everything of this environment is visible, but not this clone: an editable install hangs on
    # a .pth file, and a path in a .pth file does not read the .pth files behind it.
    here = Path(str(metadata.distribution("torch").locate_file(""))).resolve()
    (site / "host.pth").write_text(f"{here}\n")
    _imitate_colab(site)
    content = tmp_path / "content"
    content.mkdir()
    (content / wheel.name).write_bytes(wheel.read_bytes())
    cell = bootstrap_text("") + textwrap.dedent(
        """
        import torch, course_lib
        from course_lib import setup
        setup("start_here")
        print("from", course_lib.__file__)
        print("torch", torch.__version__, torch.__file__)
        """
    )
    environment = {"COURSE_HOME": str(tmp_path / "home"), "MPLBACKEND": "agg"}
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    for _ in range(2):
        # The second time the course is there and nothing is installed.
        done = subprocess.run(
            [python, "-c", cell],
            cwd=content,
            env={**clean, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert f"from {site}" in done.stdout
        assert f"torch {metadata.version('torch')} {here}" in done.stdout
    assert not list(site.glob("torch*")), "torch was installed again"
    assert not list(site.glob("numpy*")), "numpy was installed again"
