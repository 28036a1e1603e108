"""The four times of chapter 00: copy, + 1 and exp of 20 million numbers, and a matrix product.

    python -m benchmarks._start_here_cpu [--json FILE]

One thread, float32, in turns, outputs that exist already; the calls are those of the notebook.
The notebook shows this run where the learner's machine is too busy to be measured.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.machine import environment
from course_lib.runtime.measure import Timing, time_interleaved

RECORDED = Path(__file__).resolve().parent / "recorded" / "start_here_cpu.json"


def measure(repeats: int) -> dict[str, Timing]:
    """Seconds of each call."""
    x, out = torch.rand(20_000_000), torch.empty(20_000_000)
    a, b, product = torch.rand(1024, 1024), torch.rand(1024, 1024), torch.empty(1024, 1024)
    calls = {
        "copy": lambda: out.copy_(x),
        "+ 1": lambda: torch.add(x, 1, out=out),
        "exp": lambda: torch.exp(x, out=out),
        "matmul": lambda: torch.mm(a, b, out=product),
    }
    return time_interleaved(calls, repeats=repeats, threads=1)


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser(description="The four times of chapter 00.")
    parser.add_argument("--json", type=Path, default=RECORDED)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    facts = environment(torch.device("cpu"))
    facts["device"] += ", 1 thread"
    seconds = {name: asdict(timing) for name, timing in measure(options.repeats).items()}
    document = {"environment": facts, "dtype": "float32", "seconds": seconds}
    options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
