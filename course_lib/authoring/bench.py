"""`course bench`: run the benchmarks of the repository, and compare with an earlier run."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Key(NamedTuple):
    """What names a figure."""

    op: str
    case: str
    direction: str
    implementation: str

    def __str__(self) -> str:
        return " ".join(self)


class Loss(NamedTuple):
    """A figure that became worse, and how."""

    key: Key
    what: str

    @property
    def ours(self) -> bool:
        """Whether it is of an implementation of the course; else the machine or PyTorch changed."""
        return self.key.implementation.startswith("ours")

    def __str__(self) -> str:
        return f"{self.key}: {self.what}" + ("" if self.ours else "  (a peer, not ours)")


#: A median that is longer by more than this part is a loss, where also the spreads lie apart.
LOSS = 0.05

# Facts of an environment that can explain a difference.
_FACTS = ("device", "driver", "torch", "triton", "cuda", "cudnn", "python")


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
        compare: An earlier file of results to compare with, or None. `recorded/NAME.json` is also
            looked for in `benchmarks`.
        more: Further arguments of `benchmarks/run.py`.

    Returns:
        The exit code of the run; 1 also where the comparison found that a case of ours lost, on
        the device of the earlier run. On another device a loss says nothing, and is only named.

    Raises:
        BenchError: If a file cannot be used.
    """
    # Before the run, which takes minutes.
    earlier = read_results(_find(root, compare)) if compare else None
    if out is not None and not out.resolve().parent.is_dir():
        raise BenchError(f"--json {out}: there is no folder {out.resolve().parent}")
    with tempfile.TemporaryDirectory(prefix="course-bench-") as folder:
        path = out.resolve() if out else Path(folder) / "results.json"
        command = [sys.executable, "-m", "benchmarks.run", *ops, *more, "--json", str(path)]
        code = subprocess.run(command, cwd=root, check=False).returncode
        if code != 0 or earlier is None:
            return code
        results = read_results(path)
    print(comparison(earlier, results))
    lost = losses(earlier, results)
    if lost:
        print(f"Lost more than {LOSS:.0%}, beyond the spread:")
        print("\n".join(f"  {loss}" for loss in lost))
    return int(any(loss.ours for loss in lost) and not _devices_differ(earlier, results))


def _find(root: Path, path: Path) -> Path:
    beside = root / "benchmarks" / path
    return beside if not path.exists() and beside.exists() else path


def read_results(path: Path) -> dict[str, Any]:
    """A file of results.

    Raises:
        BenchError: If it is not one.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        for record in _records(results).values():
            if "refused" not in record:
                _ = [float(record["seconds"][key]) for key in ("median", "p20", "p80")]
        _ = results["environment"].get("device")
    except OSError as error:
        raise BenchError(f"--compare {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise BenchError(f"--compare {path} is not a file that --json wrote") from None
    return results


def comparison(before: dict[str, Any], after: dict[str, Any]) -> str:
    """How times changed, one line for each figure that both have."""
    was, now = before["environment"], after["environment"]
    lines = [f"Compared with {was.get('device', '?')}, {was.get('date', 'no date')}:"]
    if _devices_differ(before, after):
        lines.append(f"The devices differ: this is {now.get('device', '?')}.")
    for fact in _FACTS[1:]:
        if was.get(fact) != now.get(fact):
            lines.append(f"{fact} differs: {was.get(fact)} → {now.get(fact)}.")
    pairs = _pairs(before, after)
    lines += [
        f"  {key!s:70} {old['seconds']['median'] * 1e3:9.3f} → "
        f"{new['seconds']['median'] * 1e3:9.3f} ms  × {_ratio(old, new):.2f}  {_word(old, new)}"
        for key, (old, new) in pairs.items()
    ]
    old, new = _records(before), _records(after)
    resized = [key for key in new if key in old and _sizes(new[key]) != _sizes(old[key])]
    if resized:
        lines.append(f"  Of other sizes than before, and not compared: {len(resized)} figures.")
    if not pairs:
        lines.append("  No figure is in both.")
    return "\n".join(lines)


def losses(before: dict[str, Any], after: dict[str, Any]) -> list[Loss]:
    """What became slower by more than 5 %, beyond both spreads, or is refused now; worst first."""
    old, new = _records(before), _records(after)
    slower = {
        key: _ratio(was, now)
        for key, (was, now) in _pairs(before, after).items()
        if _ratio(was, now) > 1 + LOSS and _word(was, now) == "slower"
    }
    refused = [
        Loss(key, f"refused now, {now['refused']}")
        for key, now in new.items()
        if "refused" in now and key in old and "refused" not in old[key]
    ]
    by_ratio = sorted(slower, key=lambda key: -slower[key])
    return refused + [Loss(key, f"× {slower[key]:.2f}") for key in by_ratio]


def _devices_differ(before: dict[str, Any], after: dict[str, Any]) -> bool:
    was, now = (results["environment"].get("device", "?") for results in (before, after))
    return was != now


def _pairs(before: dict[str, Any], after: dict[str, Any]) -> dict[Key, tuple[Record, Record]]:
    """Records measured in both, of the same sizes: a case may keep its name and change."""
    old, new = _records(before), _records(after)
    return {
        key: (old[key], now)
        for key, now in new.items()
        if key in old
        and not any("refused" in record for record in (old[key], now))
        and _sizes(old[key]) == _sizes(now)
    }


def _sizes(record: Record) -> list[Any]:
    return [record.get(size) for size in ("shape", "dtype", "causal", "window_size")]


def _ratio(was: Record, now: Record) -> float:
    return now["seconds"]["median"] / was["seconds"]["median"]


def _word(was: Record, now: Record) -> str:
    # Only what lies outside both spreads is worth a word.
    old, new = was["seconds"], now["seconds"]
    apart = new["p20"] > old["p80"] or new["p80"] < old["p20"]
    return ("slower" if _ratio(was, now) > 1 else "faster") if apart else "same"


def _records(results: dict[str, Any]) -> dict[Key, Record]:
    return {
        Key(name, record["case"], record["direction"], record["implementation"]): record
        for name, op in results["ops"].items()
        for record in op["records"]
    }
