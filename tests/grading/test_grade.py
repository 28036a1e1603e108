"""`course grade`: a verdict for each submission, nothing lost, nothing graded twice."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from course_lib import cli
from course_lib.grading import grade as grading
from course_lib.grading import pool, seed
from course_lib.grading.exercise import chapter_of
from course_lib.grading.grade import GradeError, Line, Settings, grade, grader_version, write_whole
from course_lib.grading.pool import Outcome, StartError, Task
from course_lib.grading.result import Graded, loads
from course_lib.grading.seed import SeedError, folders_seed, read_seed, seed_id
from course_lib.grading.sources import find_submissions
from course_lib.grading.submission import parse
from tests.grading.fake_judge import SPENT, FakeJudge, points_of, verdict

ROOT = Path(__file__).parents[2]
SEED = bytes(range(32))
CHAPTER = chapter_of("start_here")
POINTS_BY_ID = points_of("start_here")
POINTS = sum(POINTS_BY_ID.values())


def notebook(text: str) -> bytes:
    source = f'setup("start_here")\n{text}'
    return json.dumps({"cells": [{"cell_type": "code", "source": source}]}).encode()


@pytest.fixture
def hand_in(tmp_path: Path) -> Callable[..., Path]:
    """Puts notebooks into the class's folder; their texts tell the fake judge what to do."""

    def put(**texts: str) -> Path:
        for student, text in texts.items():
            path = tmp_path / "class" / student / "a.ipynb"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(notebook(text) if text != "broken" else b"{")
        return tmp_path / "class"

    return put


class InProcess:
    """An engine without processes; it counts what it judged."""

    def __init__(self, judge: FakeJudge | None = None) -> None:
        self.judge, self.names = judge or FakeJudge(), []

    def __call__(self, tasks: Iterator[Task]) -> Iterator[Outcome]:
        for task in tasks:
            self.names.append(task.submission.name)
            judged = self.judge.grade(task.submission, task.chapter)
            level, start = self.judge.sandbox_level, self.judge.start
            yield Outcome(task, judged.exercises, level, start, 1.5, judged.seconds, judged.notes)


def within(line: Line, folder: Path) -> str:
    return file_of(line).relative_to(folder).as_posix()


def fake(**how) -> Callable[[], FakeJudge]:
    return functools.partial(FakeJudge, points=POINTS_BY_ID, **how)


def pooled(jobs: int = 1, **how) -> Callable[[Iterator[Task]], Iterator[Outcome]]:
    """The engine with processes."""
    return functools.partial(pool.run, make_judge=fake(**how), jobs=jobs)


def run(folder: Path, engine=None, students=None, tell=lambda *_: None, **changes) -> list[Line]:
    changes.setdefault("out", folder.parent / "out")
    chosen = Settings(seed=SEED, **changes)
    return grade(find_submissions([folder], students), chosen, engine or InProcess(), tell)


def file_of(line: Line) -> Path:
    assert line.file is not None
    return line.file


def grades(line: Line) -> Graded:
    assert line.graded is not None
    assert loads(file_of(line).read_bytes()) == line.graded
    return line.graded


# Results.


def test_every_submission_has_a_result(hand_in, tmp_path: Path) -> None:
    folder = hand_in(jane="good", bob="bad", amy="broken")
    (folder / "eve").mkdir()
    (folder / "eve" / "b.ipynb").write_text('{"cells": [{"cell_type": "code", "source": "x"}]}')
    told = []
    lines = run(folder, tell=lambda line, count: told.append((line.source.name, count)))
    amy, bob, eve, jane = map(grades, lines)
    assert [line.source.name for line in lines] == [
        *("amy/a.ipynb", "bob/a.ipynb", "eve/b.ipynb", "jane/a.ipynb")
    ]
    assert sorted(told) == sorted(told, key=lambda each: each[0])
    assert [count for _, count in sorted(told, key=lambda each: each[1])] == [1, 2, 3, 4]

    assert (jane.result.score, jane.result.max_score) == (POINTS, POINTS)
    assert jane.result.exercises == verdict(POINTS_BY_ID, passed=True)
    assert (jane.student, jane.submission) == ("jane", "jane/a.ipynb")
    assert (jane.sandbox, jane.start, jane.engine) == ("bwrap", "warm", "local")
    assert (jane.seconds, jane.spent) == (1.5, SPENT)
    assert jane.finished_at.endswith("Z")
    assert jane.result.seed_id == seed_id(SEED)
    assert jane.result.grader == grader_version()

    assert (bob.result.score, bob.result.max_score) == (0, POINTS)

    # Of the chapter nothing is known.
    for graded, status in ((amy, "unreadable"), (eve, "no_chapter")):
        assert graded.result.status == status
        assert graded.result.reason
        assert (graded.result.exercises, graded.sandbox) == ((), "none")


def test_an_unreadable_one_of_a_known_chapter_misses_every_exercise(hand_in) -> None:
    (line,) = run(hand_in(amy="broken"), chapter=CHAPTER)
    result = grades(line).result
    assert [each.id for each in result.exercises] == [each.id for each in CHAPTER.exercises]
    assert {each.status for each in result.exercises} == {"missing"}
    assert {each.feedback for each in result.exercises} == {result.reason}
    assert (result.score, result.max_score) == (0, POINTS)


def test_the_chapter_that_is_asked_for_counts(hand_in) -> None:
    other = chapter_of("flash_attention")
    judge = FakeJudge(points=points_of("flash_attention"))
    (line,) = run(hand_in(jane="good"), InProcess(judge), chapter=other)
    assert grades(line).result.chapter == "flash_attention"


def test_a_verdict_that_is_not_whole_is_the_graders_failure(hand_in) -> None:
    jane, bob = run(hand_in(bob="good short", jane="good"))[::-1]
    assert jane.graded is not None
    assert bob.graded is None
    assert "The judge answered for" in bob.failure


def test_results_have_the_same_bytes_from_any_engine(hand_in, tmp_path: Path) -> None:
    folder = hand_in(jane="good", bob="bad", amy="broken")
    ways = [InProcess(), InProcess(), pooled(jobs=2)]
    runs = [run(folder, engine, out=tmp_path / str(n)) for n, engine in enumerate(ways)]
    texts = [[json.dumps(grades(line).result.as_json()) for line in lines] for lines in runs]
    assert texts[0] == texts[1] == texts[2]
    names = [[within(line, tmp_path / str(n)) for line in lines] for n, lines in enumerate(runs)]
    assert names[0] == names[1] == names[2]


def test_notes_of_the_reader_and_of_the_judge(hand_in) -> None:
    folder = hand_in(jane="x")
    content = json.loads(notebook("good odd"))
    content["cells"].append(None)
    (folder / "jane" / "a.ipynb").write_text(json.dumps(content))
    for engine in (InProcess(), pooled()):
        (line,) = run(folder, engine, again=True)
        assert grades(line).result.notes == (
            "Left out, since they hold no text: cells 2.",
            "Cell 1 is odd.",
        )
    (line,) = run(folder)
    assert line.reused


def test_names_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "class.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in (
            "../../evil.ipynb",
            "..\\x\\evil.ipynb",
            "/etc/evil.ipynb",
            "a/" * 90 + "b.ipynb",
        ):
            archive.writestr(name, notebook("good"))
    for line in run(path, out=tmp_path / "out"):
        assert line.file is not None
        assert line.file.resolve().is_relative_to(tmp_path / "out" / "results")
        grades(line)


# Again.


def test_what_is_graded_is_not_graded_again(hand_in) -> None:
    folder = hand_in(jane="good", bob="bad", amy="broken")
    # Read before the second run: amy's file is written anew, with another time in its envelope.
    first = [grades(line).result for line in run(folder)]
    again = InProcess()
    second = run(folder, again)
    assert again.names == []
    assert first == [grades(line).result for line in second]
    assert [line.reused for line in second] == [False, True, True]  # amy's costs nothing to read
    forced = InProcess()
    run(folder, forced, again=True)
    assert forced.names == ["bob/a.ipynb", "jane/a.ipynb"]


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": bytes(32)},
        {"device": "cuda"},
        {"chapter": chapter_of("flash_attention")},
    ],
)
def test_what_was_graded_otherwise_is_graded_again(hand_in, changes) -> None:
    folder = hand_in(jane="good")
    (before,) = run(folder)
    settings = Settings(**{"out": folder.parent / "out", "seed": SEED, **changes})
    package = settings.chapter.package if settings.chapter else "start_here"
    engine = InProcess(FakeJudge(points=points_of(package)))
    (after,) = grade(find_submissions([folder]), settings, engine)
    assert engine.names == ["jane/a.ipynb"]
    assert before.file != after.file
    assert file_of(before).exists(), "the earlier result stands"


def test_a_result_in_the_wrong_place_does_not_count(hand_in) -> None:
    """A whole and sound file, but of another submission: somebody copied it."""
    folder = hand_in(jane="good", bob="bad")
    bob, jane = run(folder)
    file_of(bob).write_bytes(file_of(jane).read_bytes())
    engine = InProcess()
    bob, _ = run(folder, engine)
    assert engine.names == ["bob/a.ipynb"]
    assert grades(bob).result.score == 0


def test_another_grader_grades_again(hand_in, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hand_in(jane="good")
    run(folder)
    monkeypatch.setattr(grading, "grader_version", lambda: "0.0.0+other")
    engine = InProcess()
    run(folder, engine)
    assert engine.names == ["jane/a.ipynb"]


def test_a_new_version_is_graded_and_the_old_result_stands(hand_in) -> None:
    folder = hand_in(jane="bad")
    (before,) = run(folder)
    (after,) = run(hand_in(jane="good"))
    assert (grades(before).result.score, grades(after).result.score) == (0, POINTS)
    (back,) = run(hand_in(jane="bad"))
    assert back.reused
    assert back.file == before.file


def forged(text: bytes) -> bytes:
    """Points that were not earned, with sums that hold."""
    data = json.loads(text)
    result = data["result"]
    for each in result["exercises"]:
        each.update(status="passed", score=each["max_score"])
    result["score"] = result["max_score"]
    return json.dumps(data).encode()


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"null", lambda t: t[:-9], forged])
def test_a_damaged_result_is_graded_again(hand_in, damage) -> None:
    folder = hand_in(jane="bad")
    (line,) = run(folder)
    file_of(line).write_bytes(damage(file_of(line).read_bytes()))
    engine = InProcess()
    (after,) = run(folder, engine)
    assert engine.names == ["jane/a.ipynb"]
    assert grades(after).result.score == 0
    assert after.file == line.file


def test_another_list_of_students_changes_the_envelope_alone(hand_in) -> None:
    folder = hand_in(s1="good")
    (before,) = run(folder)
    engine = InProcess()
    (after,) = run(folder, engine, students={"s1": "Jane Doe"})
    assert engine.names == []
    assert grades(after).student == "Jane Doe"
    assert after.file == before.file
    assert before.graded is not None
    assert grades(after).result == before.graded.result


def test_a_result_from_a_weak_sandbox_counts_only_where_it_is_allowed(hand_in) -> None:
    folder = hand_in(jane="good")
    run(folder, InProcess(FakeJudge(level="rlimits")), allow_weak=True)
    engine = InProcess()
    (line,) = run(folder, engine, allow_weak=True)
    assert engine.names == []
    assert grades(line).sandbox == "rlimits"
    (line,) = run(folder, engine)
    assert engine.names == ["jane/a.ipynb"]
    assert grades(line).sandbox == "bwrap"


def test_identical_submissions_are_graded_once(hand_in) -> None:
    folder = hand_in(amy="good", bob="bad", eve="good", jane="good")
    engine = InProcess()
    lines = run(folder, engine)
    assert engine.names == ["amy/a.ipynb", "bob/a.ipynb"]
    assert [line.same_as for line in lines] == ["", "", "amy/a.ipynb", "amy/a.ipynb"]
    amy, _, eve, jane = map(grades, lines)
    assert amy.result == eve.result == jane.result
    assert (eve.student, eve.start, eve.seconds) == ("eve", "copied", 0)


def test_identical_submissions_in_a_pool(hand_in) -> None:
    """The copies come while the first one is still being judged."""
    folder = hand_in(amy="good", bob="good", eve="good")
    lines = run(folder, pooled(jobs=2, slow=0.3))
    assert [line.same_as for line in lines] == ["", "amy/a.ipynb", "amy/a.ipynb"]


# Nothing is lost.


def test_a_result_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "deep" / "a.json"
    write_whole(file, "old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="No space"):
                write_whole(file, "new")
        assert file.read_text() == "old"
    write_whole(file, "new")
    assert file.read_text() == "new"


def test_a_result_that_cannot_be_written_stops_the_run(hand_in, monkeypatch) -> None:
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(grading, "write_whole", fail)
    with pytest.raises(GradeError, match=r"results.*cannot be written: No space left on device"):
        run(hand_in(jane="good"))


KILLED = """
import functools, sys
from pathlib import Path
from course_lib.grading import pool
from course_lib.grading.grade import Settings, grade
from course_lib.grading.sources import find_submissions
from tests.grading.fake_judge import FakeJudge, points_of

if __name__ == "__main__":
    folder, out, traces = map(Path, sys.argv[1:])
    make = functools.partial(FakeJudge, traces=traces, slow=0.2, points=points_of("start_here"))
    engine = functools.partial(pool.run, make_judge=make, jobs=2)
    grade(find_submissions([folder]), Settings(out, bytes(32)), engine)
"""


def test_a_killed_run_goes_on_where_it_stopped(hand_in, tmp_path: Path) -> None:
    # Different texts, or they would be one submission.
    folder = hand_in(**{f"s{number:02}": f"good {number}" for number in range(12)})
    script, traces = tmp_path / "script.py", tmp_path / "traces"
    script.write_text(KILLED)
    traces.mkdir()
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out"), str(traces)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def graded() -> int:
        return len(list((tmp_path / "out").glob("results/*/[!.]*.json")))

    process = subprocess.Popen(command, env=environment)
    while graded() < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = graded()
    assert 3 <= before < 12
    # The workers notice that nobody listens any more.
    until = time.monotonic() + 20
    while len(list(traces.glob("left.*"))) < 2:
        assert time.monotonic() < until, "a worker outlives the run"
        time.sleep(0.05)
    judged = len(list(traces.glob("s*")))
    subprocess.run(command, env=environment, check=True)
    assert graded() == 12
    # What had no result yet was judged again: at most what the workers had in hand.
    assert len(list(traces.glob("s*"))) == judged + 12 - before
    for file in (tmp_path / "out").glob("results/*/[!.]*.json"):
        assert loads(file.read_bytes()).result.score == POINTS


# The pool.


def task(text: str, name: str = "x.ipynb") -> Task:
    return Task(parse(name, notebook(text)), "start_here")


def outcomes(texts: list[str], jobs: int = 2, longest: float = 60, **how) -> dict[str, Outcome]:
    tasks = (task(text, f"{number}.ipynb") for number, text in enumerate(texts))
    make = fake(**how)
    done = list(pool.run(tasks, make, jobs, longest=longest))
    assert len(done) == len(texts)
    return {texts[int(each.task.submission.name[0])]: each for each in done}


def children() -> list[str]:
    """Processes that this one has started and that live."""
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "args="], capture_output=True)
    return [line for line in found.stdout.decode().splitlines() if "spawn_main" in line]


def test_a_worker_that_dies_stumbles_or_hangs_is_replaced(tmp_path: Path) -> None:
    texts = ["good", "die", "raise", "hang", "good, die once", "bad", "good too"]
    done = outcomes(texts, traces=tmp_path, longest=3)
    assert {text: bool(each.failure) for text, each in done.items()} == {
        "good": False,
        "die": True,
        "raise": True,
        "hang": True,
        "good, die once": False,
        "bad": False,
        "good too": False,
    }
    assert done["die"].failure == "The grader's worker died (exit code 9)."
    assert done["raise"].failure.startswith(
        "The grader stumbled: ValueError: this one confuses me (fake_judge.py:"
    )
    assert done["hang"].failure == "The grader's worker did not answer any more."
    assert done["good, die once"].exercises == verdict(POINTS_BY_ID, passed=True)
    tries = [len(list(tmp_path.glob(f"{number}.ipynb.*"))) for number in range(len(texts))]
    assert tries == [1, 2, 2, 2, 2, 1, 1]
    assert children() == []


def test_what_a_worker_says_of_a_verdict() -> None:
    (done,) = outcomes(["good"], jobs=1).values()
    assert (done.sandbox, done.start, done.spent) == ("bwrap", "warm", SPENT)
    assert 0 < done.seconds < 60


def test_no_more_workers_than_jobs_and_no_task_before_its_time(tmp_path: Path) -> None:
    taken = []

    def tasks() -> Iterator[Task]:
        for number in range(6):
            taken.append(number)
            yield task("good", f"{number}.ipynb")

    make = fake(traces=tmp_path)
    for count, _ in enumerate(pool.run(tasks(), make, 2), 1):
        assert len(taken) <= count + 2
    assert len(list(tmp_path.glob("entered.*"))) == 2
    assert len(list(tmp_path.glob("left.*"))) == 2


def test_one_submission_needs_one_worker(tmp_path: Path) -> None:
    outcomes(["good"], jobs=8, traces=tmp_path)
    assert len(list(tmp_path.glob("entered.*"))) == 1


def test_who_stops_early_leaves_nothing_running(tmp_path: Path) -> None:
    make = fake(traces=tmp_path)
    started = pool.run((task(text, text) for text in ("good", "hang", "bad")), make, 2)
    assert next(started).task.submission.name == "good"
    started.close()
    assert children() == []
    assert len(list(tmp_path.glob("left.*"))) == len(list(tmp_path.glob("entered.*")))


@pytest.mark.parametrize(
    ("at_start", "says"),
    [
        ("raise", "no sandbox here; apt-get install bubblewrap"),
        ("die", r"The grader's worker died \(exit code 7\)"),
    ],
)
def test_no_judge_can_be_started(at_start: str, says: str) -> None:
    make = fake(at_start=at_start)
    with pytest.raises(StartError, match=says):
        list(pool.run(iter([task("good")]), make, 2))
    assert children() == []


def test_nothing_to_do() -> None:
    assert list(pool.run(iter([]), fake(), 2)) == []


# The seed.


def test_the_seed_is_secret_and_stays(tmp_path: Path) -> None:
    first = folders_seed(tmp_path)
    assert len(first) == 32
    assert stat.S_IMODE((tmp_path / "seed").stat().st_mode) == 0o600
    assert folders_seed(tmp_path) == first
    (tmp_path / "other").mkdir()
    assert folders_seed(tmp_path / "other") != first
    assert [each.name for each in tmp_path.iterdir() if each.is_file()] == ["seed"]


def test_the_seed_of_another_folder(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    first = folders_seed(one)
    assert folders_seed(other, one / "seed") == first
    assert folders_seed(other, one / "seed") == first
    shutil.rmtree(one)
    one.mkdir()
    folders_seed(one)
    with pytest.raises(SeedError, match="was begun with another seed"):
        folders_seed(one, other / "seed")


def test_two_runs_draw_one_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other run writes between the look and the writing of this one."""
    theirs = bytes(range(32))
    really_write = seed._write

    def slowly(file: Path, mine: bytes) -> None:
        really_write(file, theirs)
        really_write(file, mine)

    monkeypatch.setattr(seed, "_write", slowly)
    assert folders_seed(tmp_path) == theirs


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "holds 0 bytes of a seed; expected 64 hexadecimal digits"),
        (b"12", "holds 1 bytes of a seed"),
        (b"hello", "holds no seed; expected 64 hexadecimal digits"),
        (b"\xff", "holds no seed"),
    ],
)
def test_what_is_no_seed(tmp_path: Path, text: bytes, says: str) -> None:
    (tmp_path / "seed").write_bytes(text)
    with pytest.raises(SeedError, match=says):
        read_seed(tmp_path / "seed")
    with pytest.raises(SeedError, match="No such file"):
        read_seed(tmp_path / "none")


def test_the_name_of_a_seed_does_not_give_it_away() -> None:
    assert seed_id(SEED) != seed_id(bytes(32))
    assert SEED.hex()[:8] not in seed_id(SEED)


# The command.


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, hand_in, tmp_path: Path, capsys):
    """Runs `course grade` with the fake judge; gives exit code, stdout and stderr."""
    asked = {}

    def engine(device, allow_weak, secret_seed, jobs):
        asked.update(device=device, allow_weak=allow_weak, seed=secret_seed, jobs=jobs)
        return InProcess()

    monkeypatch.setattr(pool, "local_engine", engine)

    def run(*arguments: object) -> tuple[int, str, str]:
        code = cli.main(["grade", "--out", str(tmp_path / "out"), *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    run.asked = asked
    return run


def test_the_table(command, hand_in, tmp_path: Path) -> None:
    folder = hand_in(jane="good", bob="bad", amy="broken", eve="good")
    code, out, err = command(folder)
    assert code == 0
    rows = out.splitlines()
    assert rows[0].split() == ["student", "submission", "chapter", "points"]
    assert rows[1].startswith("amy      amy/a.ipynb")
    assert "0 of 0; It is not a notebook: its JSON breaks" in rows[1]
    assert rows[2].endswith(f"start_here  0 of {POINTS}")
    assert rows[3].endswith(f"start_here  {POINTS} of {POINTS}")
    assert rows[4].endswith("; the same file as eve/a.ipynb")
    assert rows[-2:] == [
        "4 submissions: 3 graded, 1 unreadable.",
        f"Results: {tmp_path / 'out' / 'results'}",
    ]
    assert "[1/4] amy/a.ipynb: 0 of 0" in err
    assert "[4/4] " in err


def test_data(command, hand_in, tmp_path: Path) -> None:
    folder = hand_in(s1="good", s2="bad", s3="broken")
    # The third one is not listed, and what it is called is no proof of whose it is.
    (tmp_path / "list.csv").write_text("submission,student\ns1,Jane\ns2,Bob\ns9,Amy\ns8,s3\n")
    code, out, _ = command(folder, "--json", "--students", tmp_path / "list.csv")
    data = json.loads(out)
    assert code == 0
    assert data["counts"] == {"graded": 2, "unreadable": 1}
    assert (data["absent"], data["unlisted"]) == (["Amy", "s3"], ["s3/a.ipynb"])
    assert (data["seed_id"], data["grader"]) == (
        seed_id(read_seed(tmp_path / "out" / "seed")),
        grader_version(),
    )
    jane = data["submissions"][0]
    graded = loads(Path(jane["file"]).read_bytes())
    assert jane["student"] == graded.student == "Jane"
    assert jane["address"] == graded.result.address
    assert (jane["score"], jane["max_score"], jane["findings"]) == (POINTS, POINTS, 0)
    assert (jane["spent"], jane["start"], jane["sandbox"]) == (SPENT, "warm", "bwrap")


def test_what_is_asked_for_reaches_the_engine(command, hand_in, tmp_path: Path) -> None:
    command(hand_in(jane="good"), "--jobs", 3, "--allow-weak-sandbox")
    key = read_seed(tmp_path / "out" / "seed")
    assert command.asked == {"device": "cpu", "allow_weak": True, "seed": key, "jobs": 3}


def test_a_failure_of_the_grader_is_said_and_the_others_stand(
    command, hand_in, monkeypatch
) -> None:
    folder = hand_in(jane="good", bob="raise", amy="bad")
    with monkeypatch.context() as patch:
        patch.setattr(pool, "local_engine", lambda *_: pooled())
        code, out, err = command(folder)
    assert code == 3
    assert "THE GRADER FAILED: The grader stumbled: ValueError" in out
    assert "3 submissions: 2 graded." in out
    assert "The grader failed on 1. Run the same command again: what is graded stands." in out
    assert "bob/a.ipynb: THE GRADER FAILED" in err
    # Mended, the same command grades only what is left.
    hand_in(bob="good")
    code, out, _ = command(folder, "--json")
    assert code == 0
    assert [each["reused"] for each in json.loads(out)["submissions"]] == [True, False, True]


def test_a_weak_sandbox_is_said(command, hand_in, monkeypatch) -> None:
    make = fake(level="rlimits")
    monkeypatch.setattr(
        pool, "local_engine", lambda *_: functools.partial(pool.run, make_judge=make, jobs=1)
    )
    code, out, _ = command(hand_in(jane="good"), "--allow-weak-sandbox")
    assert code == 0
    assert "sandbox rlimits" in out
    assert "Not official: code ran in a weak sandbox (rlimits)" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere: No such file"),
        (["FOLDER", "--chapter", "nothing"], "There is no chapter 'nothing'"),
        (["FOLDER", "--students", "none.csv"], "none.csv: No such file"),
        (["FOLDER", "--seed-file", "none"], "none: No such file"),
        (["FOLDER", "--device", "cuda"], "--device cuda: torch finds no NVIDIA GPU here"),
        (["FOLDER", "--out", "/dev/null/out"], "--out /dev/null/out: Not a directory"),
    ],
)
def test_unusable_arguments(command, hand_in, arguments, says: str) -> None:
    folder = str(hand_in(jane="good"))
    code, out, err = command(*(folder if each == "FOLDER" else each for each in arguments))
    assert (code, out) == (2, "")
    assert says in err


def test_both_names_of_a_chapter(command, hand_in) -> None:
    for name in ("start_here", "00_start_here"):
        code, out, _ = command(hand_in(jane="good"), "--chapter", name)
        assert code == 0
        assert "start_here" in out


@pytest.mark.parametrize("jobs", ["0", "-1", "x", "2.5", "99999"])
def test_unusable_jobs(command, hand_in, jobs: str) -> None:
    with pytest.raises(SystemExit) as caught:
        command(hand_in(jane="good"), "--jobs", jobs)
    assert caught.value.code == 2


def test_no_judge_is_an_unusable_argument(command, hand_in, monkeypatch) -> None:
    make = fake(at_start="raise")
    monkeypatch.setattr(
        pool, "local_engine", lambda *_: functools.partial(pool.run, make_judge=make, jobs=1)
    )
    folder = hand_in(jane="good")
    code, _, err = command(folder)
    assert code == 2
    assert "apt-get install bubblewrap A self-check can do without: --allow-weak-sandbox." in err
    code, _, err = command(folder, "--allow-weak-sandbox")
    assert code == 2
    assert "A self-check" not in err


def test_ctrl_c_ends_the_workers_and_keeps_what_is_graded(hand_in, tmp_path: Path) -> None:
    folder = hand_in(**{f"s{number}": f"good {number}" for number in range(9)})
    script, traces = tmp_path / "script.py", tmp_path / "traces"
    script.write_text(KILLED)
    traces.mkdir()
    command = [sys.executable, str(script), str(folder), str(tmp_path / "out"), str(traces)]
    process = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL
    )
    while len(list((tmp_path / "out").glob("results/*/[!.]*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) != 0
    assert len(list(traces.glob("left.*"))) == 2
