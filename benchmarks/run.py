"""Run benchmarks and write what they found as JSON.

    python -m benchmarks.run [OP ...] [--device cuda|cpu] [--smoke] [--repeats N] [--json FILE]

An op is a file of this folder with two names: ``FLOP_FORMULA``, a sentence, and
``measure(device, *, repeats, smoke)``, which returns one record for each figure. A figure that the
course quotes comes from ``benchmarks/recorded/``, where runs on real machines are kept.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from course_lib.runtime.tile import HAS_TRITON, triton

HERE = Path(__file__).resolve().parent


def ops() -> list[str]:
    """Names of the benchmarks in this folder."""
    return sorted(
        path.stem for path in HERE.glob("*.py") if path.stem != "run" and path.stem[0] != "_"
    )


def cpu_name() -> str:
    """The processor as Linux names it, else as Python does."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = (line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    return next(named, platform.processor() or platform.machine())


def environment(device: torch.device) -> dict[str, Any]:
    """What a reader has to know to judge a figure."""
    facts: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__ if HAS_TRITON else None,
        "device": cpu_name(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def run(
    names: Sequence[str], *, device: torch.device, smoke: bool = False, repeats: int = 7
) -> dict[str, Any]:
    """Run the named benchmarks and collect one document."""
    document: dict[str, Any] = {"environment": environment(device), "ops": {}}
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        document["ops"][name] = {
            "flop_formula": module.FLOP_FORMULA,
            "records": module.measure(device, repeats=repeats, smoke=smoke),
        }
    return document


def table(document: dict[str, Any]) -> str:
    """The records as text, one line each."""
    lines = []
    for name, op in document["ops"].items():
        lines.append(f"{name}  ({op['flop_formula']})")
        for record in op["records"]:
            lines.append(
                f"  {record['case']:28} {record['direction']:9} {record['implementation']:12} "
                f"{record['seconds']['median'] * 1e3:10.3f} ms "
                f"{record['tflops_per_second']:9.3f} TFLOP/s "
                f"{record['peak_bytes'] / 2**20:10.1f} MiB"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="course bench", description="Time the ops of the course.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which: {', '.join(ops())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=None, help="calls measured (20; CPU 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.ops) - set(ops()))
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(ops())}")
    device = torch.device(options.device)
    repeats = options.repeats or (20 if device.type == "cuda" else 3)
    document = run(options.ops or ops(), device=device, smoke=options.smoke, repeats=repeats)
    print(table(document))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
