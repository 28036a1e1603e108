"""The judge: right answers pass, wrong ones fail with their own words, and nothing gets around it.

The children run for real, in the sandbox; the chapters' own answers are handed in as cells.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.grading import judge as judge_module
from course_lib.grading import session
from course_lib.grading.exercise import Exercise, chapter_of, chapters
from course_lib.grading.judge import Judge, Judged
from course_lib.grading.result import ExerciseResult
from course_lib.grading.sandbox import Sandbox, SandboxError
from course_lib.grading.submission import Submission, parse
from tests.grading.bwrap import bwrap_works

pytestmark = pytest.mark.skipif(not bwrap_works(), reason="bubblewrap cannot be used here")

SEED = b"a secret of 16 by"
ROOT = Path(__file__).parents[2]
RIGHT = "def warm_up(values):\n    return values + 1"


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    with Judge(secret_seed=SEED) as made:
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Less time for code that never ends."""
    monkeypatch.setattr(session, "CELL_SECONDS", 1.5)
    monkeypatch.setattr(session, "CALL_SECONDS", 1.5)


def grade(judge: Judge, *cells: str, chapter: str = "start_here") -> dict[str, ExerciseResult]:
    judged = judge.grade(Submission("test.ipynb", "0" * 64, tuple(cells)), chapter)
    assert [each.id for each in judged.exercises] == [
        each.id for each in chapter_of(chapter).exercises
    ]
    return {each.id.split(".")[1]: each for each in judged.exercises}


def warm_up(judge: Judge, *cells: str) -> ExerciseResult:
    return grade(judge, *cells)["warm_up"]


def from_file(judge: Judge, path: Path) -> Judged:
    submission = parse(path.name, path.read_bytes())
    assert submission.status == "readable", submission.reason
    return judge.grade(submission, path.stem.split("_", 1)[1])


# Whole notebooks.


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.package)
def test_solutions_earn_every_point_and_again_the_same(judge: Judge, chapter) -> None:
    path = ROOT / "solutions" / f"{chapter.slug}.ipynb"
    first, second = (from_file(judge, path) for _ in range(2))
    lost = [each for each in first.exercises if each.status != "passed"]
    assert not lost
    assert first.exercises == second.exercises
    assert second.seconds["oracle"] == 0.0, "expected values are computed once"


@pytest.mark.parametrize("chapter", chapters(), ids=lambda chapter: chapter.package)
def test_an_untouched_notebook_earns_nothing_and_is_told_so(judge: Judge, chapter) -> None:
    judged = from_file(judge, ROOT / "exercises" / f"{chapter.slug}.ipynb")
    assert {each.status for each in judged.exercises} == {"missing"}
    assert all(each.score == 0 for each in judged.exercises)


def test_cold_children_give_the_same_grade(judge: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    path = ROOT / "solutions" / "00_start_here.ipynb"
    warm = from_file(judge, path)
    monkeypatch.setattr(judge._sandbox, "start", "cold")
    cold = from_file(judge, path)
    assert warm.exercises == cold.exercises


# The answers of the records, right and wrong.

EVERY = [
    # That right answers pass, the solutions show; the records' own follow with --deep.
    pytest.param(each, kind, id=f"{each.id}-{kind}", marks=[pytest.mark.slow] * (kind == "right"))
    for chapter in chapters()
    for each in chapter.exercises
    for kind in ("right", "wrong")
]


def handed_in(exercise: Exercise, which: str) -> str:
    """A cell in which an answer of the record stands under the exercise's name."""
    source = inspect.getsource(inspect.getmodule(exercise.oracle))
    find = f"next(e for e in list(globals().values()) if getattr(e, 'id', 0) == {exercise.id!r})"
    return f"{source}\n\n{exercise.name} = {find}.{which}\n"


@pytest.mark.parametrize(("exercise", "kind"), EVERY)
def test_answers_of_the_record_are_judged_as_what_they_are(
    judge: Judge, exercise: Exercise, kind: str, deep: bool
) -> None:
    """One of each by default; all with --deep."""
    count = len(exercise.accepts if kind == "right" else exercise.misconceptions)
    for index in range(count) if deep else [sum(exercise.id.encode()) % count]:
        which = f"accepts[{index}]" if kind == "right" else f"misconceptions[{index}].wrong"
        result = grade(judge, handed_in(exercise, which), chapter=exercise.chapter)[exercise.name]
        if kind == "right":
            assert result.status == "passed", f"{which}: {result}"
        else:
            assert result.status != "passed", which
            assert result.score == 0


# Cells.


def test_cells_run_like_a_notebook_and_each_on_its_own(judge: Judge) -> None:
    cells = [
        "import torch\nfrom course_lib import check, hint, progress, setup, solution\n"
        "from course_lib.runtime.tile import tl, triton\nsetup('start_here')",
        "raise RuntimeError('an experiment')",
        "def f(:",
        "%matplotlib inline\n!ls\nfiles = !ls\none = 1\n%time two = 2",
        "%%bash\nexit 1",
        "import asyncio\nawait asyncio.sleep(0)",
        "assert one == 1 and two == 2\n%%time".replace("\n%%time", ""),
        "def warm_up(values):\n    return values + one",
        "check(warm_up)\nhint('warm_up')\nprogress()\nsolution('warm_up').plug_in()\ndisplay(one)",
    ]
    judged = judge.grade(Submission("x", "0" * 64, tuple(cells)), "start_here")
    assert judged.exercises[0].status == "passed"
    assert judged.notes == (
        "Cell 3: line 1: invalid syntax.",
        "Cell 5: %%bash is not run.",
    )


def test_the_last_definition_counts_and_the_report_says_so(judge: Judge) -> None:
    result = warm_up(judge, RIGHT, "def warm_up(values):\n    return values * 2")
    assert result.status == "failed"
    assert [each.rule for each in result.findings] == ["defined twice"]
    assert "cell 2" in result.findings[0].where
    assert warm_up(judge, "def warm_up(values):\n    return values", RIGHT).status == "passed"


@pytest.mark.parametrize(
    "cell",
    [
        "import os\nos._exit(0)",
        "import ctypes\nctypes.string_at(0)",
        "while True: pass",
        "import time\ntime.sleep(1000)",
        "import os\nfor fd in range(3, 100):\n    try: os.close(fd)\n    except OSError: pass",
    ],
    ids=["exit", "segfault", "loop", "sleep", "closed"],
)
def test_a_cell_that_ends_or_hangs_the_notebook_is_left_out(
    judge: Judge, impatient: None, cell: str
) -> None:
    judged = judge.grade(Submission("x", "0" * 64, (cell, RIGHT)), "start_here")
    assert judged.exercises[0].status == "passed"
    assert [note.split(":")[0] for note in judged.notes] == ["Cell 1 was left out"]


def test_a_definition_that_was_lost_is_named(judge: Judge) -> None:
    assert "Nothing is called `warm_up`" in warm_up(judge, "x = 1").feedback
    lost = warm_up(judge, f"undefined_name\n{RIGHT}")
    assert lost.status == "missing"
    assert "Cell 1, which defines it, raised NameError." in lost.feedback


# Answers.

ANSWERS = {
    "nan": ("return values * float('nan')", "failed"),
    "zeros": ("return values * 0", "failed"),
    "wrong dtype": ("return values.double() + 1", "failed"),
    "broadcastable": ("return (values + 1)[None]", "failed"),
    "nothing": ("pass", "failed"),
    "text": ("return 'right'", "failed"),
    "numpy": ("return (values + 1).numpy()", "failed"),
    "input changed": ("values += 1\n    return values", "failed"),
    "stub": ("raise NotImplementedError('warm_up')", "missing"),
    "raises": ("return values.shape[7]", "error"),
    "exits": ("import os\n    os._exit(0)", "error"),
    "sys.exit": ("import sys\n    sys.exit(0)", "error"),
    "loops": ("while True: pass", "timeout"),
    "sleeps": ("import time\n    time.sleep(1000)", "timeout"),
    "bomb": ("import torch\n    return torch.ones(1 << 40)", "memory"),
    "grows": ("x = []\n    while True: x.append(bytearray(1 << 30))", "memory"),
    "huge answer": ("import torch\n    return torch.zeros(1 << 27, dtype=torch.uint8)", "error"),
    "expanded": ("import torch\n    return torch.zeros(1).expand(1 << 50)", "memory"),
    "endless list": ("x = []\n    x.append(x)\n    return x", "error"),
    "recursion": ("return warm_up(values)", "error"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_a_wrong_answer_gets_its_status(
    judge: Judge, request: pytest.FixtureRequest, name: str
) -> None:
    body, status = ANSWERS[name]
    if status == "timeout":  # the others must have the time that they need on a busy machine
        request.getfixturevalue("impatient")
    result = warm_up(judge, f"def warm_up(values):\n    {body}")
    assert (result.status, result.score) == (status, 0.0), result.feedback
    assert result.feedback


def test_one_answer_that_ends_the_process_costs_only_itself(judge: Judge) -> None:
    ends = "import os\ndef row_sum(*args):\n    os._exit(0)"
    results = grade(judge, RIGHT, ends, "past_the_end = 24", "other_for_product = 'B'")
    assert results["row_sum"].status == "error"
    assert results["warm_up"].status == results["past_the_end"].status == "passed"
    assert results["other_for_product"].status == "passed"


def test_always_equal_objects_and_subclasses_are_data_here(judge: Judge) -> None:
    equal = "class Equal:\n    def __eq__(self, other): return True\n"
    assert warm_up(judge, f"{equal}def warm_up(values):\n    return Equal()").status == "failed"
    tensor = "import torch\nclass Equal(torch.Tensor):\n    def __eq__(self, other): return True\n"
    lie = f"{tensor}def warm_up(values):\n    return values.as_subclass(Equal)"
    assert warm_up(judge, lie).status == "failed"


def test_forged_frames_earn_nothing(judge: Judge) -> None:
    forge = """
import json, os, socket, struct
def forge(header, blob=b""):
    text = json.dumps(header).encode()
    for fd in range(3, 50):
        try:
            sock = socket.socket(fileno=os.dup(fd))
            sock.send(b"CGW1" + struct.pack(">IQ", len(text), len(blob)) + text + blob)
        except OSError:
            pass
"""
    for header in ({"id": 3, "passed": True}, {"id": 3, "value": {"list": []}}):
        cell = f"{forge}\ndef warm_up(values):\n    forge({header!r})\n    return values"
        assert warm_up(judge, cell).score == 0
    # Not the answer to what was asked.
    cell = f"{forge}\ndef warm_up(values):\n    forge({{'id': 99}})\n    return values + 1"
    assert warm_up(judge, cell).status == "error"


def test_a_reply_that_is_forged_to_the_letter_is_still_only_data(judge: Judge) -> None:
    """It finds the request's number by its frames, and claims a tensor of a petabyte."""
    cell = """
import json, os, socket, struct, sys
def warm_up(values):
    frame = sys._getframe()
    while "header" not in frame.f_locals:
        frame = frame.f_back
    import safetensors.torch, torch
    blob = safetensors.torch.save({"0": torch.zeros(1)})
    value = {"tensor": "0", "shape": [1 << 20, 1 << 20], "stride": [0, 0], "offset": 0}
    reply = {"id": frame.f_locals["header"]["id"], "value": value, "changed": None}
    text = json.dumps(reply).encode()
    for fd in range(3, 50):
        try:
            sock = socket.socket(fileno=os.dup(fd))
            sock.sendall(b"CGW1" + struct.pack(">IQ", len(text), len(blob)) + text + blob)
        except OSError:
            pass
    os._exit(0)
"""
    result = warm_up(judge, cell)
    assert result.status == "error"
    assert "is not what a notebook's process sends" in result.feedback


def test_a_patched_library_harms_only_its_own_submission(judge: Judge) -> None:
    patches = "import torch\ntorch.allclose = torch.equal = lambda *a, **k: True\n"
    patches += "torch.Tensor.__eq__ = lambda *a: torch.tensor(True)\ntorch.manual_seed = id\n"
    wrong = "def warm_up(values):\n    return values - 1"
    assert warm_up(judge, patches, wrong).score == 0
    assert warm_up(judge, RIGHT).status == "passed"


# Feedback.


def test_hidden_cases_tell_the_kind_and_never_the_value(judge: Judge) -> None:
    """The first case of this exercise is the same for every seed, the second is not."""
    shown = warm_up(judge, "def warm_up(values):\n    return values - 1")
    assert "should be 1" in shown.feedback
    assert "minus for plus" in shown.feedback
    hidden = "def warm_up(values):\n    if values.ndim == 1: return values + 1\n    "
    wrong = warm_up(judge, f"{hidden}return values - 1")
    assert wrong.feedback.startswith("“a matrix”: Its values are wrong.")
    leak = warm_up(judge, f"{hidden}raise ValueError(values.tolist())")
    assert "It raised ValueError. Cell 1, line 3" in leak.feedback
    assert not any(digit in leak.feedback.split("`")[0].split("line")[0] for digit in "23456789")
    named = warm_up(
        judge, f"{hidden}raise type('E' + str(values[0, 0].item()), (Exception,), {{}})"
    )
    assert "It raised Exception." in named.feedback


def test_addresses_and_colours_do_not_reach_the_report(judge: Judge) -> None:
    cell = "def warm_up(values):\n    raise ValueError(f'\\x1b[31m {object()} \\0')"
    feedback = warm_up(judge, cell).feedback
    assert "0x…" in feedback
    assert feedback.isprintable()


# Rules.

ATTENTION = """
import math, torch
def tiled_attention(q, k, v, block_m, block_n):
    return {}
"""


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("torch.nn.functional.scaled_dot_product_attention(q, k, v)", "forbidden"),
        ("torch.softmax(q @ k.T / math.sqrt(q.shape[1]), 1) @ v", "forbidden"),
        ("(q @ k.T / math.sqrt(q.shape[1])).softmax(1) @ v", "forbidden"),
        ("getattr(torch, 'soft' + 'max')(q @ k.T / math.sqrt(q.shape[1]), 1) @ v", "failed"),
    ],
)
def test_a_forbidden_operator_is_named_in_the_text_or_seen_in_the_child(
    judge: Judge, body: str, status: str
) -> None:
    result = grade(judge, ATTENTION.format(body), chapter="flash_attention")["tiled_attention"]
    assert result.status == status, result.feedback
    assert "aten::" in result.feedback
    assert result.findings


def test_a_kernel_exercise_needs_a_kernel_that_does_the_work(judge: Judge) -> None:
    by_torch = "import torch\ndef row_sum(x, out):\n    out.copy_(x.sum(1))"
    assert grade(judge, by_torch)["row_sum"].status == "forbidden"
    idle = """
import torch
from course_lib.runtime.tile import tl, triton
@triton.jit
def nothing(x_ptr, out_ptr, BLOCK: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr) * 0)
def row_sum(x, out):
    nothing[(1,)](x, out, BLOCK=16)
    out.copy_(x.sum(1))
"""
    result = grade(judge, idle)["row_sum"]
    assert result.status == "forbidden", result
    assert "even when its kernels do nothing" in result.feedback


def test_out_of_bounds_is_seen(judge: Judge) -> None:
    past = """
from course_lib.runtime.tile import tl, triton
@triton.jit
def add(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.load(x_ptr + offs) + tl.load(y_ptr + offs))
def masked_add(x, y, out):
    add[(triton.cdiv(x.numel(), 64),)](x, y, out, BLOCK=64)
"""
    result = grade(judge, past)["masked_add"]
    assert result.status == "error"
    assert result.stage == "values"


# Memory.

# Both are right, and look alike from inside a process that was told to lie about its memory.
LYING_METER = """
import course_lib.runtime.measure as measure
class Nothing:
    peak_bytes = largest_bytes = 0
    largest_shape, ops = (), {}
    def __enter__(self): return self
    def __exit__(self, *error): pass
measure.measure_memory = Nothing
"""
WHOLE_MATRIX = """
import math, torch
def tiled_attention(q, k, v, block_m, block_n):
    scores = q @ k.T / math.sqrt(q.shape[1])
    weights = torch.exp(scores - scores.amax(1, keepdim=True))
    return weights @ v / weights.sum(1, keepdim=True)
"""


def test_memory_is_limited_from_outside_whatever_the_child_says(judge: Judge) -> None:
    result = grade(judge, LYING_METER, WHOLE_MATRIX, chapter="flash_attention")["tiled_attention"]
    assert result.status == "memory", result
    assert result.cases[-1].name == "9,000 queries, 7,000 keys"
    # Memory that was set aside before does not help, nor do helpers.
    hoard = "hoard = bytearray(1 << 30)\nimport os\nif os.fork() == 0:\n    import time\n"
    hoard += "    time.sleep(1000)"
    spend = WHOLE_MATRIX.replace("    scores", "    global hoard\n    hoard = None\n    scores", 1)
    again = grade(judge, LYING_METER, hoard, spend, chapter="flash_attention")["tiled_attention"]
    assert again.status == "memory", again


HELPER = """
import os, pickle, struct
ours, theirs = os.pipe(), os.pipe()
def write(fd, value):
    data = pickle.dumps(value)
    os.write(fd, struct.pack("Q", len(data)))
    while data:
        data = data[os.write(fd, data):]
def read(fd):
    size, data = struct.unpack("Q", os.read(fd, 8))[0], b""
    while len(data) < size:
        data += os.read(fd, size - len(data))
    return pickle.loads(data)
if os.fork() == 0:
    while True:
        write(theirs[1], whole_matrix(*read(ours[0])))
def tiled_attention(*arguments):
    write(ours[1], arguments)
    return read(theirs[0])
"""


def test_a_helper_process_that_has_more_memory_does_not_help(judge: Judge, impatient: None) -> None:
    cells = WHOLE_MATRIX.replace("tiled_attention", "whole_matrix"), HELPER
    result = grade(judge, *cells, chapter="flash_attention")["tiled_attention"]
    assert [each.status for each in result.cases[:-1]] == ["passed"] * (len(result.cases) - 1)
    assert result.cases[-1].name == "9,000 queries, 7,000 keys", result
    assert result.status != "passed"


def test_an_honest_meter_is_believed_against_oneself(judge: Judge) -> None:
    result = grade(judge, WHOLE_MATRIX, chapter="flash_attention")["tiled_attention"]
    assert (result.status, result.stage) == ("failed", "method")
    assert "budget" in result.feedback


# The judge itself.


def test_inputs_depend_on_the_secret_and_not_on_the_submission(judge: Judge) -> None:
    exercise = chapter_of("start_here").exercises[0]
    cases = judge._truth(exercise).cases
    with pytest.raises(ValueError, match="16 bytes"):
        Judge(secret_seed=b"short")
    other = judge_module.hmac.new(SEED, b"x", "sha256").digest()
    assert other != SEED
    assert judge._number("a") == judge._number("a") != judge._number("b")
    assert judge._truth(exercise).cases is cases


def test_expected_values_are_computed_after_the_answer_came(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    really_call, really_expect = session.Session.call, judge_module.expected_of
    monkeypatch.setattr(judge, "_truths", {})

    def call(self, *args, **kwargs):
        ran = really_call(self, *args, **kwargs)
        order.append("answer")
        return ran

    def expect(exercise, case, seed):
        order.append("expected")
        return really_expect(exercise, case, seed)

    monkeypatch.setattr(session.Session, "call", call)
    monkeypatch.setattr(judge_module, "expected_of", expect)
    assert warm_up(judge, RIGHT).status == "passed"
    cases = len(judge._truth(chapter_of("start_here").exercises[0]).cases)
    assert order == ["answer", "expected"] * cases


def test_no_seed_of_the_cases_reaches_the_child(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    really_send = session.wire.send

    def send(sock, header, blob=b""):
        sent.append(json.dumps(header))
        really_send(sock, header, blob)

    monkeypatch.setattr(session.wire, "send", send)
    warm_up(judge, RIGHT)
    seed = judge._truth(chapter_of("start_here").exercises[0]).seed
    assert sent
    assert not any(str(seed) in text for text in sent)
    assert not any(SEED.decode() in text for text in sent)


def test_what_the_grader_spends_is_reported(judge: Judge) -> None:
    judged = judge.grade(Submission("x", "0" * 64, (RIGHT,)), "start_here")
    assert set(judged.seconds) == {"overhead", "learner", "oracle"}
    assert all(value >= 0 for value in judged.seconds.values())
    assert judge.sandbox_level == "bwrap"
    assert judge.start == ("cold" if judge.why_cold else "warm")


def test_a_sandbox_that_breaks_is_the_graders_failure(
    judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self):
        raise SandboxError("no more children")

    monkeypatch.setattr(Sandbox, "child", broken)
    with pytest.raises(SandboxError, match="no more children"):
        warm_up(judge, RIGHT)
