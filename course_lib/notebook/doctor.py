"""`course doctor`: what this machine can do, and what to do about what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from course_lib.runtime.device import device_report

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
ENOUGH_MEMORY = 4 * 2**30
ENOUGH_DISK = 2**30
Level = Literal["ok", "optional", "missing"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        what: The thing.
        level: "ok"; "optional": the course works without it; "missing": it does not.
        says: What was found.
        remedy: What to do; empty where there is nothing to do.
    """

    what: str
    level: Level
    says: str
    remedy: str = ""


def find_chromium() -> str | None:
    """The path of a Chromium that browser tests can use."""
    return next(filter(None, map(shutil.which, CHROMIUM)), None)


def examine() -> list[Finding]:
    """Look at this machine."""
    report = device_report()
    findings = [
        Finding("Python", "ok", report.python),
        Finding("PyTorch", "ok", report.torch),
        _gpu(report),
        _triton(report),
        _memory(report.ram_bytes),
        _disk(report.disk_free_bytes),
        _packages(),
        _program(
            "Chromium",
            find_chromium(),
            "the browser tests of ./course test need it; learning does not",
            "chromium",
        ),
        _program(
            "bubblewrap",
            shutil.which("bwrap"),
            "the sandbox of the official grade needs it; learning does not",
            "bubblewrap",
        ),
    ]
    for missing in report.missing:
        if missing.what not in ("Triton", "GPU"):
            findings.append(Finding(missing.what, "optional", missing.cost, missing.remedy))
    return findings


def _gpu(report: Any) -> Finding:
    if report.gpu is None:
        says = "none: kernels run in the interpreter, right but slow"
        return Finding("GPU", "optional", says)
    count = f"{report.gpu_count} × " if report.gpu_count > 1 else ""
    memory = report.gpu.memory_bytes / 2**30
    return Finding("GPU", "ok", f"{count}{report.gpu.name} ({report.gpu.arch}, {memory:.0f} GiB)")


def _triton(report: Any) -> Finding:
    if report.triton:
        return Finding("Triton", "ok", f"{report.triton}, kernels are {report.kernels}")
    why = next((m for m in report.missing if m.what == "Triton"), None)
    if platform.system() != "Linux":
        remedy = "use Linux, WSL 2, or Colab for the kernel cells"
    else:
        remedy = why.remedy if why else "pip install -c constraints.txt triton"
    return Finding("Triton", "missing", why.cost if why else "no kernel cell runs", remedy)


def _memory(ram: int | None) -> Finding:
    if ram is None:
        return Finding("memory", "ok", "the system does not say")
    says = f"{ram / 2**30:.0f} GiB"
    if ram < ENOUGH_MEMORY:
        return Finding("memory", "missing", says, "chapters use up to 4 GiB; close other programs")
    return Finding("memory", "ok", says)


def _disk(free: int) -> Finding:
    says = f"{free / 2**30:.0f} GiB free"
    if free < ENOUGH_DISK:
        return Finding("disk", "missing", f"{free / 2**20:.0f} MiB free", "free at least 1 GiB")
    return Finding("disk", "ok", says)


def _packages() -> Finding:
    """The packages that a notebook's page needs, beyond torch."""
    from importlib.util import find_spec

    needed = ("matplotlib", "ipywidgets", "anywidget", "plotly", "jupyterlab", "nbclient")
    absent = [name for name in needed if find_spec(name) is None]
    if absent:
        remedy = f"pip install -c constraints.txt {' '.join(absent)}"
        return Finding(
            "notebook packages", "missing", f"not installed: {', '.join(absent)}", remedy
        )
    return Finding("notebook packages", "ok", "all there")


def _program(what: str, path: str | None, cost: str, package: str) -> Finding:
    if path:
        return Finding(what, "ok", path)
    if Path("/usr/bin/apt-get").exists():
        sudo = "" if hasattr(os, "geteuid") and os.geteuid() == 0 else "sudo "
        return Finding(what, "optional", f"none: {cost}", f"{sudo}apt-get install {package}")
    return Finding(what, "optional", f"none: {cost}", f"install the package {package}")


def as_json(findings: list[Finding]) -> dict[str, Any]:
    """The report as data."""
    ready = all(finding.level != "missing" for finding in findings)
    return {"ready": ready, "findings": [asdict(finding) for finding in findings]}


def as_text(findings: list[Finding]) -> str:
    """The report for a terminal."""
    signs = {"ok": "✓", "optional": "·", "missing": "✗"}
    width = max(len(finding.what) for finding in findings)
    lines = []
    for finding in findings:
        lines.append(f"{signs[finding.level]} {finding.what:{width}}  {finding.says}")
        if finding.remedy:
            lines.append(f"  {'':{width}}  → {finding.remedy}")
    missing = [finding.what for finding in findings if finding.level == "missing"]
    if missing:
        lines.append(f"Missing: {', '.join(missing)}.")
    else:
        lines.append("Ready to learn. Lines with · are optional.")
    return "\n".join(lines)
