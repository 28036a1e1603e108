"""Run benchmarks and write what they found as JSON.

    python -m benchmarks.run [OP ...] [--device cuda|cpu] [--smoke] [--repeats N] [--json FILE]
                             [--cases=GLOB] [--skip=NAME,NAME]

An op is a file of this folder with two names: ``FLOP_FORMULA``, a sentence, and
``measure(device, *, repeats, smoke)``, which gives one record for each figure. It may take
``only``, a pattern of case names, and ``skip``, implementations to leave out. It may have
``judge(records, environment)``, which compares the records with each other and with the goals, and
``report(judged)``, which says that in words. A figure that the course quotes comes from
``benchmarks/recorded/``, where runs on real machines are kept.

The file is written anew after every case, so a run that is stopped keeps what it measured.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import environment, gpu_state

__all__ = ["as_text", "main", "ops", "run"]

HERE = Path(__file__).resolve().parent


def ops() -> list[str]:
    """Names of the benchmarks in this folder."""
    return sorted(path.stem for path in HERE.glob("*.py") if _is_op(path))


def _is_op(path: Path) -> bool:
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
    return {"FLOP_FORMULA", "measure"} <= names


def run(
    names: Sequence[str],
    *,
    device: torch.device,
    smoke: bool = False,
    repeats: int = 7,
    only: str | None = None,
    skip: Sequence[str] = (),
    on_change: Callable[[dict[str, Any]], None] = lambda document: None,
) -> dict[str, Any]:
    """Run the named benchmarks and collect one document.

    Args:
        names: Ops.
        device: Where.
        smoke: Small sizes.
        repeats: Calls measured.
        only: A glob of case names, for ops that know it.
        skip: Implementations that are left out, for ops that know it.
        on_change: Called with the document whenever there is a new case in it.
    """
    document: dict[str, Any] = {"environment": environment(device), "ops": {}}
    for name in names:
        module = importlib.import_module(f"benchmarks.{name}")
        options: dict[str, Any] = {} if only is None else {"only": only}
        options |= {"skip": skip} if skip else {}
        records: list[dict[str, Any]] = []
        document["ops"][name] = {"flop_formula": module.FLOP_FORMULA, "records": records}
        document["ops"][name] |= {"skipped": " ".join(skip)} if skip else {}
        print(f"{name}  ({module.FLOP_FORMULA})")
        for record in module.measure(device, repeats=repeats, smoke=smoke, **options):
            if records and records[-1]["case"] != record["case"]:
                on_change(document)
            records.append(record)
            print(line(record), flush=True)
        if hasattr(module, "judge"):
            judged = module.judge(records, document["environment"])
            document["ops"][name]["ratios"] = judged
            print(module.report(judged))
        state = gpu_state(device)
        document["environment"] |= {"after": state} if state else {}
        on_change(document)
    return document


def line(record: dict[str, Any]) -> str:
    """One record as text."""
    head = f"  {record['case']:34} {record['direction']:9} {record['implementation']:15} "
    if "refused" in record:
        return f"{head}refused: {record['refused']}"
    text = (
        f"{head}{record['seconds']['median'] * 1e3:10.3f} ms "
        f"{record['tflops_per_second']:9.3f} TFLOP/s "
        f"{record['peak_bytes'] / 2**20:10.1f} MiB"
    )
    if "kv_bytes_per_second" in record:
        text += f"  K/V {record['kv_bytes_per_second'] / 1e9:7.1f} GB/s"
        text += f"  {record['tokens_per_second']:9.0f} tokens/s"
    if record.get("host_bound"):
        text += "  (bound by the host's launches)"
    return text


def as_text(document: dict[str, Any]) -> str:
    """A document as JSON, one record a line, so that a change reads well in a diff."""

    def rows(records: list[dict[str, Any]]) -> str:
        return "[\n" + ",\n".join(f"    {json.dumps(each)}" for each in records) + "\n   ]"

    ops = []
    for name, op in document["ops"].items():
        parts = [
            f"   {json.dumps(key)}: {rows(value) if isinstance(value, list) else json.dumps(value)}"
            for key, value in op.items()
        ]
        ops.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    facts = json.dumps(document["environment"], indent=1).replace("\n", "\n ")
    return f'{{\n "environment": {facts},\n "ops": {{\n' + ",\n".join(ops) + "\n }\n}\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="course bench", description="Time the ops of the course.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"which: {', '.join(ops())}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--smoke", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--repeats", type=int, default=None, help="calls measured (20; CPU 3)")
    parser.add_argument("--cases", metavar="GLOB", help="only cases of such names: --cases='dec*'")
    parser.add_argument("--skip", metavar="NAMES", help="implementations to leave out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    options = parser.parse_args(argv)
    unknown = sorted(set(options.ops) - set(ops()))
    if unknown:
        parser.error(f"no such op: {', '.join(unknown)}; there are {', '.join(ops())}")
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    names = options.ops or ops()
    skip = options.skip.split(",") if options.skip else []
    for name in names:
        known = inspect.signature(importlib.import_module(f"benchmarks.{name}").measure).parameters
        for option, parameter in (("cases", "only"), ("skip", "skip")):
            if getattr(options, option) is not None and parameter not in known:
                parser.error(f"--{option}: {name} does not know it")
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: PyTorch sees no GPU here")

    def write(document: dict[str, Any]) -> None:
        if options.json is not None:
            options.json.write_text(as_text(document), encoding="utf-8")

    document = run(
        names,
        device=device,
        smoke=options.smoke,
        repeats=options.repeats or (20 if device.type == "cuda" else 3),
        only=options.cases,
        skip=skip,
        on_change=write,
    )
    if options.cases is not None and not any(op["records"] for op in document["ops"].values()):
        parser.error(f"--cases {options.cases!r} matches no case")
    if options.json is not None:
        print(f"wrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
