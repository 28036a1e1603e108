"""The command: its verbs, its errors, and how fast it answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from course_lib import __version__, cli

VERBS = [
    *("lab", "update", "check", "progress", "review", "doctor", "test", "build", "bench"),
    *("new-chapter", "version"),
]


def test_version(capsys):
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{__version__}\n"


def test_help_names_every_verb_and_loads_nothing_heavy():
    code = (
        "import sys; from course_lib import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'jupytext', 'nbformat', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    for verb in VERBS:
        assert f"    {verb}" in done.stdout


def test_no_verb_prints_help(capsys):
    assert cli.main([]) == 2
    assert "new-chapter" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lba"], "invalid choice: 'lba'"),
        (["lab", "--port", "0"], "'0' is not a port; expected 1 to 65535"),
        (["doctor", "--jsno"], "doctor does not know --jsno"),
        (["check"], "NOTEBOOK"),
    ],
)
def test_bad_arguments(arguments: list[str], says: str, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["check", "nowhere.ipynb"], "there is no file nowhere.ipynb"),
        (["check", __file__], "is not a notebook"),
        (["build", "99_nothing"], "There is no master for '99_nothing'. Masters: 00_start_here"),
        (["bench", "--compare", "nowhere.json"], "--compare nowhere.json: No such file"),
        (["bench", "--compare", __file__], "is not a file that --json wrote"),
        (["bench", "--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["new-chapter", "Bad"], "'Bad'"),
    ],
)
def test_unusable_values(arguments: list[str], says: str, capsys):
    assert cli.main(arguments) == 2
    assert says in capsys.readouterr().err


def test_doctor(capsys):
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert code == (0 if report["ready"] else 1)
    found = {finding["what"]: finding for finding in report["findings"]}
    assert {"Python", "PyTorch", "GPU", "Triton", "memory", "disk"} <= set(found)
    assert all(f["remedy"] for f in found.values() if f["level"] == "missing")
    cli.main(["doctor"])
    assert "PyTorch" in capsys.readouterr().out


def test_doctor_says_how_to_install_what_is_missing(monkeypatch):
    from course_lib.notebook import doctor

    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    remedies = {finding.what: finding.remedy for finding in doctor.examine()}
    assert remedies["Chromium"].endswith("chromium")
    assert remedies["bubblewrap"].endswith("bubblewrap")
    assert doctor._disk(5).level == "missing"
    assert doctor._memory(2**30).level == "missing"


def test_progress(capsys, course_home: Path):
    assert cli.main(["progress", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["points"] == 0
    assert data["store"].startswith(str(course_home))
    assert cli.main(["progress"]) == 0
    assert "0 of" in capsys.readouterr().out


def test_review_with_nothing_due(capsys):
    assert cli.main(["review"]) == 0
    assert "Nothing" in capsys.readouterr().out


def test_comparison_says_what_changed():
    from course_lib.authoring.bench import comparison

    def results(device: str, *medians: float):
        records = [
            {
                "case": f"c{i}",
                "direction": "forward",
                "implementation": "ours",
                "seconds": {"median": m, "p20": m * 0.9, "p80": m * 1.1},
            }
            for i, m in enumerate(medians)
        ]
        return {
            "environment": {"device": device, "date": "2026-01-01"},
            "ops": {"op": {"records": records}},
        }

    lines = comparison(results("A", 1.0, 1.0, 1.0), results("B", 1.05, 2.0, 0.5)).splitlines()
    assert "The devices differ: this is B." in lines
    assert [line.split()[-1] for line in lines[2:]] == ["same", "slower", "faster"]
    assert "No figure is in both" in comparison(results("A"), results("A", 1.0))
