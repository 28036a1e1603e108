"""`course bench --compare`: what counts as a loss, and what the exit code says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from course_lib.authoring import bench as bench_module
from course_lib.authoring.bench import BenchError, bench, comparison, losses, read_results


def record(case: str, median: float, *, spread: float = 0.01, name: str = "ours", **more):
    seconds = {"median": median, "p20": median * (1 - spread), "p80": median * (1 + spread)}
    return {
        "case": case,
        "direction": "forward",
        "implementation": name,
        "seconds": seconds,
        "shape": {"T": 4},
        **more,
    }


def refused(case: str, reason: str, **more):
    found = record(case, 1.0, **more)
    del found["seconds"]
    return found | {"refused": reason}


def results(*records, **environment):
    return {
        "environment": {"device": "A", "date": "2026-01-01", "torch": "2.11"} | environment,
        "ops": {"op": {"records": list(records)}},
    }


def lost(before, after) -> list[str]:
    return [str(loss) for loss in losses(before, after)]


@pytest.mark.parametrize(
    ("ratio", "spread", "is_lost"),
    [
        (1.04, 0.001, False),  # apart, but little
        (1.06, 0.001, True),
        (1.06, 0.04, False),  # much, but within the spread
        (1.5, 0.3, False),
        (2.0, 0.3, True),
        (0.5, 0.01, False),  # faster
    ],
)
def test_a_loss_is_more_than_five_percent_and_beyond_the_spread(ratio, spread, is_lost):
    before = results(record("c", 1.0, spread=spread))
    after = results(record("c", ratio, spread=spread))
    assert lost(before, after) == ([f"op c forward ours: × {ratio:.2f}"] if is_lost else [])


def test_the_worst_comes_first_and_a_refusal_before_all():
    before = results(*(record(case, 1.0) for case in "abc"))
    after = results(record("a", 1.2), record("b", 1.7), refused("c", "out of memory"))
    assert lost(before, after) == [
        "op c forward ours: refused now, out of memory",
        "op b forward ours: × 1.70",
        "op a forward ours: × 1.20",
    ]


def test_what_was_refused_before_or_is_not_measured_now_is_no_loss():
    before = results(refused("a", "why"), refused("b", "why"), record("c", 1.0))
    after = results(record("a", 9.0), refused("b", "another reason"))
    assert lost(before, after) == []


def test_other_sizes_under_the_same_name_are_not_compared():
    before = results(record("a", 1.0), record("b", 1.0))
    after = results(record("a", 9.0, shape={"T": 8}), record("b", 1.0))
    assert lost(before, after) == []
    assert "not compared: 1 figures" in comparison(before, after)


def test_differences_of_device_and_versions_are_named():
    before = results(record("a", 1.0), driver="1")
    after = results(record("a", 1.0), device="B", torch="2.13", driver="1")
    lines = comparison(before, after).splitlines()
    assert "The devices differ: this is B." in lines
    assert "torch differs: 2.11 → 2.13." in lines
    assert not any("driver" in line for line in lines)


def run_bench(monkeypatch, tmp_path, before, after, *, code=0):
    """`course bench --compare`, with a run that writes `after`."""
    earlier = tmp_path / "benchmarks" / "recorded" / "earlier.json"
    earlier.parent.mkdir(parents=True, exist_ok=True)
    earlier.write_text(json.dumps(before))

    class Done:
        returncode = code

    def run(command, **options):
        assert command[:3] == [sys.executable, "-m", "benchmarks.run"]
        with open(command[command.index("--json") + 1], "w") as file:
            json.dump(after, file)
        return Done

    monkeypatch.setattr(bench_module.subprocess, "run", run)
    # A name beside the benchmarks is found from anywhere.
    return bench(tmp_path, ["op"], None, Path("recorded/earlier.json"), [])


def test_exit_code_is_one_when_ours_lost(monkeypatch, tmp_path, capsys):
    before = results(record("a", 1.0))
    assert run_bench(monkeypatch, tmp_path, before, results(record("a", 1.2))) == 1
    assert "op a forward ours: × 1.20" in capsys.readouterr().out
    assert run_bench(monkeypatch, tmp_path, before, results(record("a", 1.01))) == 0
    assert "Lost" not in capsys.readouterr().out


def test_exit_code_is_zero_for_a_peer_and_on_another_device(monkeypatch, tmp_path, capsys):
    peer = {"name": "sdpa_cudnn"}
    before = results(record("a", 1.0, **peer))
    assert run_bench(monkeypatch, tmp_path, before, results(record("a", 1.2, **peer))) == 0
    assert "op a forward sdpa_cudnn: × 1.20  (a peer, not ours)" in capsys.readouterr().out
    before, after = results(record("a", 1.0)), results(record("a", 1.2), device="B")
    assert run_bench(monkeypatch, tmp_path, before, after) == 0
    assert "op a forward ours: × 1.20" in capsys.readouterr().out


def test_a_run_that_failed_is_not_compared(monkeypatch, tmp_path, capsys):
    before = results(record("a", 1.0))
    assert run_bench(monkeypatch, tmp_path, before, results(record("a", 1.2)), code=3) == 3
    assert "Compared" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "spoilt",
    [
        {},
        [],
        {"environment": {}, "ops": {"op": {"records": [{"case": "a"}]}}},
        results({**record("a", 1.0), "seconds": {"median": "soon"}}),
        {**results(), "environment": None},
    ],
    ids=["empty", "a list", "no name", "no number", "no environment"],
)
def test_a_file_that_is_no_result_is_refused_before_the_run(tmp_path, spoilt):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(spoilt))
    with pytest.raises(BenchError, match="is not a file that --json wrote"):
        read_results(path)
