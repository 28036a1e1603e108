"""Every attack of the catalogue, in a real notebook and through the whole of `course grade`.

Many stand in one notebook, one in each exercise. The other exercises must keep their points, and
the host must be as it was. Two secret seeds by default, twenty with `--deep`.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from course_lib.grading.cells import read_cells
from course_lib.grading.result import Graded
from course_lib.grading.rules import Notebook as Text
from tests.grading.attacks.catalogue import ATTACKS, SUCCEED, Attack, probing
from tests.grading.bwrap import bwrap_works
from tests.grading.honest.notebooks import ROOT, SLUG, Notebook
from tests.grading.honest.test_honest import grade_all

KEPT = ("overflow_score", "safe_softmax", "take_tile", "merge_states", "bytes_moved")
KEPT += ("useless_tile", "one_pass_variance", "causal_tiles", "two_new_tokens")
"""Solved wherever no attack stands; quick to judge."""
MOST = 5
"""Attacks in one notebook, so that most of its exercises are honest."""
SLOW = ("torch.testing", "@triton.jit", "first_tile_wins", "100_000")
"""In worked cells that no answer needs, and that every restart of a notebook runs again."""

pytestmark = pytest.mark.skipif(not bwrap_works(), reason="needs bubblewrap")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seed" in metafunc.fixturenames:
        count = 20 if metafunc.config.getoption("--deep", default=False) else 2
        metafunc.parametrize("seed", range(count))


def notebooks(attacks: list[Attack]) -> list[list[Attack]]:
    """Attacks in as few notebooks as hold them: one in an exercise, `MOST` in a notebook."""
    found: list[list[Attack]] = []
    for each in attacks:
        for group in found:
            crowded = len(group) == MOST or each.alone or group[0].alone
            if not crowded and each.exercise not in {other.exercise for other in group}:
                group.append(each)
                break
        else:
            found.append([each])
    return found


def write(folder: Path, student: str, attacks: list[Attack]) -> Path:
    """Hand in a notebook in which these attacks stand, and everything in `KEPT` is solved."""
    attacked = {each.exercise: each for each in attacks}
    notebook = Notebook().drop(*SLOW).solve(*(each for each in KEPT if each not in attacked))
    places = {"ROOT": ROOT, "SEED_FILE": folder / "out" / "seed", "CLASS": folder / "class"}
    places["MARK"] = folder / "mark"
    for each in attacks:
        texts = [each.answer, each.before]
        for name, path in places.items():
            texts = [text.replace(name, str(path)) for text in texts]
        notebook.write(each.exercise, texts[0])
        if each.before:
            notebook.first(texts[1])
    # For the attack that looks for what others left.
    stash = f"from pathlib import Path\nstash = Path.cwd() / 'stash-{student}'\n"
    notebook.first(f"{stash}for each in (stash, Path('/dev/shm') / stash.name):\n    each.touch()")
    path = folder / "class" / student / f"{SLUG}.ipynb"
    path.parent.mkdir(parents=True)
    path.write_bytes(notebook.bytes())
    return path


def what_is_wrong(graded: Graded, attacks: list[Attack]) -> list[str]:
    """Sentences on what an attack won, cost the others, or hid."""
    wrong = []
    attacked = {each.exercise: each for each in attacks}
    for got in graded.result.exercises:
        name = got.id.split(".")[1]
        said = f"{got.status}, {got.score} points: {got.feedback} {got.findings}"
        # One cell that replaces a part of the course makes every answer of its notebook suspect.
        rules = {finding.rule for finding in got.findings} - {"looks around"}
        if name not in attacked:
            spoilt = any(each.spoils for each in attacks)
            if name in KEPT and not spoilt and (got.status, rules) != ("passed", set()):
                wrong.append(f"{name}, an honest one beside {list(attacked)}, is {said}")
            continue
        each = attacked[name]
        if got.status not in each.status or (got.score and "passed" not in each.status):
            wrong.append(f"“{each.name}” is {said}")
        if rules != each.findings:
            wrong.append(f"“{each.name}” has other findings: {said}")
    return wrong


def test_no_attack_earns_points_or_costs_others_theirs(seed: int, tmp_path: Path) -> None:
    groups = notebooks([each for each in ATTACKS if each.name not in SUCCEED])
    written = {}
    for number, group in enumerate(groups):
        path = write(tmp_path, f"attacker_{number:02}", group)
        written[path] = path.read_bytes()
    victim = write(tmp_path, "victim", [])
    written[victim] = victim.read_bytes()
    graded = grade_all(tmp_path, seed)
    wrong = {
        number: sentences
        for number, group in enumerate(groups)
        if (sentences := what_is_wrong(graded[f"attacker_{number:02}"], group))
    }
    assert not wrong, "\n".join(each for sentences in wrong.values() for each in sentences)
    assert not what_is_wrong(graded["victim"], [])
    assert not (tmp_path / "mark").exists(), "something ran or wrote outside the sandbox"
    assert not (tmp_path / "class" / "planted").exists()
    assert not (ROOT / "planted").exists()
    assert all(path.read_bytes() == data for path, data in written.items())


def test_a_probe_that_finds_something_would_be_seen(tmp_path: Path) -> None:
    """The other test's eyes: with a probe that always finds, every probing attack passes."""
    before = len(ATTACKS)
    for name in ("safe_softmax", "take_tile", "merge_states", "one_pass_variance"):
        probing(f"finds in {name}", "-", name, "return True")
    found = ATTACKS[before:]
    del ATTACKS[before:]
    write(tmp_path, "lucky", found)
    wrong = what_is_wrong(grade_all(tmp_path, 0)["lucky"], found)
    assert len(wrong) == len(found), wrong
    assert all("is passed" in sentence for sentence in wrong)


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(each, id=each.name, marks=pytest.mark.xfail(strict=True, reason=why))
        for each in ATTACKS
        if (why := SUCCEED.get(each.name))
    ],
)
def test_what_still_succeeds(attack: Attack, tmp_path: Path) -> None:
    write(tmp_path, "winner", [attack])
    wrong = what_is_wrong(grade_all(tmp_path, 0)["winner"], [attack])
    assert not wrong, wrong


@pytest.mark.parametrize(
    "attack", [pytest.param(each, id=each.name) for each in ATTACKS if each.name in SUCCEED]
)
def test_what_still_succeeds_is_pointed_out(attack: Attack) -> None:
    cells = read_cells([attack.before, attack.answer])
    assert Text(cells).looks_around(attack.exercise) is not None
