"""`course test`: every check that CI runs, stage by stage, each with one closing line.

A stage that fails does not stop the next ones. A stage that needs Chromium is skipped
where that is missing, with the line that installs it; under `CI=true` that is a failure.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from course_lib.notebook.doctor import find_chromium

NBVAL = (
    "--nbval-lax",
    "--nbval-current-env",
    "--nbval-cell-timeout=180",
    "--nbval-sanitize-with=tests/notebooks/sanitize.cfg",
    "--dist=loadfile",
)
INSTALL_DEV = "pip install -c constraints.txt -e '.[wild,dev]'"


@dataclass
class Stage:
    """One stage.

    Attributes:
        name: As the summary calls it.
        commands: Its commands; it passes where all of them end with 0.
        module: The package that it needs.
        needs: A program that it needs: (name, path or None, apt package).
        outcome: "passed", "failed" or "skipped", once it ran.
        why: For "failed" and "skipped", where there is more to say than its output did.
        seconds: How long it ran.
    """

    name: str
    commands: list[list[str]]
    module: str
    needs: tuple[str, str | None, str] | None = None
    outcome: str = ""
    why: str = ""
    seconds: float = 0.0


@dataclass
class Plan:
    """What to run: see `plan`."""

    root: Path
    stages: list[Stage]
    hide_gpus: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def plan(root: Path, *, fast: bool = False, deep: bool = False, args: list[str]) -> Plan:
    """The stages of one `course test`.

    Args:
        root: The repository.
        fast: Without running notebooks and browsers.
        deep: With the heavy variants.
        args: Arguments for pytest; with any, only pytest runs.
    """
    python = [sys.executable, "-m"]
    more = ["--deep"] if deep else []
    if args:
        return Plan(root, [Stage("pytest", [[*python, "pytest", *more, *args]], "pytest")], False)
    pytest = [*python, "pytest", "-q", *more]
    workers = f"-n{min(2, os.cpu_count() or 1)}"
    stages = [
        Stage(
            "ruff",
            [[*python, "ruff", "check", "."], [*python, "ruff", "format", "--check", "."]],
            "ruff",
        ),
        Stage("types", [[*python, "basedpyright", "--pythonpath", sys.executable]], "basedpyright"),
        Stage("build", [[*python, "course_lib.cli", "build", "--check"]], "jupytext"),
        Stage(
            "unit tests",
            [
                [
                    *pytest,
                    workers,
                    "--dist=loadgroup",
                    "tests",
                    "--ignore=tests/browser",
                    "--ignore=tests/notebooks",
                ]
            ],
            "pytest",
        ),
    ]
    if not fast:
        notebooks = [*python, "pytest", "-q", *NBVAL, workers, "notebooks", "solutions"]
        stages += [
            Stage("notebooks", [notebooks], "nbval"),
            Stage("exercises", [[*pytest, workers, "tests/notebooks"]], "nbclient"),
            Stage(
                "browser",
                [[*pytest, "tests/browser"]],
                "playwright",
                needs=("Chromium", find_chromium(), "chromium"),
            ),
        ]
    return Plan(root, stages)


def run(plan: Plan) -> int:
    """Run the stages and print their summaries.

    Returns:
        0 where none failed, else 1.
    """
    start = time.perf_counter()
    in_ci = os.environ.get("CI", "").lower() in ("1", "true")
    with tempfile.TemporaryDirectory(prefix="course-test-", ignore_cleanup_errors=True) as folder:
        environment = {
            **os.environ,
            "COURSE_HOME": str(Path(folder) / "home"),
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
            # Kernels of notebooks find this clone, wherever they run.
            "PYTHONPATH": os.pathsep.join(
                [str(plan.root), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        if plan.hide_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        for stage in plan.stages:
            _line(stage.name)
            _run_stage(stage, plan.root, environment, in_ci)
            words = f"{stage.name}: {stage.outcome} in {stage.seconds:.2f}s"
            _line(f"{words} ({stage.why})" if stage.why else words)
    return _summary(plan.stages, time.perf_counter() - start)


def _run_stage(stage: Stage, root: Path, environment: dict[str, str], in_ci: bool) -> None:
    start = time.perf_counter()
    lacks = stage.needs is not None and stage.needs[1] is None
    if importlib.util.find_spec(stage.module) is None:
        stage.outcome, stage.why = "failed", f"no {stage.module}: {INSTALL_DEV}"
        return
    if lacks and stage.needs is not None:
        name, _, package = stage.needs
        reason = f"no {name}: apt-get install {package}"
        stage.outcome = "failed" if in_ci else "skipped"
        stage.why = f"CI must not skip; {reason}" if in_ci else reason
        return
    codes = [
        subprocess.run(command, cwd=root, env=environment, check=False).returncode
        for command in stage.commands
    ]
    stage.seconds = time.perf_counter() - start
    stage.outcome = "failed" if any(codes) else "passed"
    if 5 in codes:
        stage.why = "pytest found no tests"


def _line(text: str) -> None:
    width = min(shutil.get_terminal_size().columns, 100)
    print(f" {text} ".center(width, "="), flush=True)


def _summary(stages: list[Stage], seconds: float) -> int:
    print()
    _line("course test: summary")
    for stage in stages:
        why = f"  {stage.why}" if stage.why else ""
        print(f"{stage.outcome.upper():8} {stage.name:12} {stage.seconds:7.1f} s{why}")
    counts = {
        outcome: sum(stage.outcome == outcome for stage in stages)
        for outcome in ("failed", "passed", "skipped")
    }
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count)
    _line(f"{text} in {seconds:.2f}s")
    return 1 if counts["failed"] else 0
