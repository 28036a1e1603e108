"""`course bench`: run the benchmarks of the repository, and compare with an earlier run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

Key = tuple[str, str, str, str]


class BenchError(ValueError):
    """The arguments cannot be used. The message names which one and why."""


def bench(
    root: Path, ops: list[str], out: Path | None, compare: Path | None, more: list[str]
) -> int:
    """Run benchmarks.

    Args:
        root: The repository.
        ops: Which; none for all.
        out: Where to write the results as JSON, or None.
        compare: An earlier file of results to compare with, or None.
        more: Further arguments of `benchmarks/run.py`.

    Returns:
        The exit code of the run.

    Raises:
        BenchError: If a file cannot be used.
    """
    # Before the run, which takes minutes.
    earlier = read_results(compare) if compare else None
    if out is not None and not out.resolve().parent.is_dir():
        raise BenchError(f"--json {out}: there is no folder {out.resolve().parent}")
    with tempfile.TemporaryDirectory(prefix="course-bench-") as folder:
        path = out.resolve() if out else Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.run", *ops, *more, "--json", str(path)]
        code = subprocess.run(command, cwd=root, check=False).returncode
        if code == 0 and earlier is not None:
            print(comparison(earlier, read_results(path)))
    return code


def read_results(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        BenchError: If it is not one.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        _records(results)
    except OSError as error:
        raise BenchError(f"--compare {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BenchError(f"--compare {path} is not a file that --json wrote") from None
    return results


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How times changed, one line for each figure that both have."""
    devices = [results["environment"].get("device", "?") for results in (before, after)]
    lines = [f"Compared with {devices[0]}, {before['environment'].get('date', 'no date')}:"]
    if devices[0] != devices[1]:
        lines.append(f"The devices differ: this is {devices[1]}.")
    old, new = _records(before), _records(after)
    for key in new:
        if key not in old:
            continue
        was, now = old[key]["seconds"], new[key]["seconds"]
        ratio = now["median"] / was["median"]
        # Only what lies outside both spreads is worth a word.
        apart = now["p20"] > was["p80"] or now["p80"] < was["p20"]
        word = ("slower" if ratio > 1 else "faster") if apart else "same"
        lines.append(
            f"  {' '.join(key):70} {was['median'] * 1e3:9.3f} → {now['median'] * 1e3:9.3f} ms "
            f" × {ratio:.2f}  {word}"
        )
    if not set(old) & set(new):
        lines.append("  No figure is in both.")
    return "\n".join(lines)


def _records(results: dict[str, Any]) -> dict[Key, dict[str, Any]]:
    return {
        (name, record["case"], record["direction"], record["implementation"]): record
        for name, op in results["ops"].items()
        for record in op["records"]
    }
