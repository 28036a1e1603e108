"""Attacks on the grade. Each stands in one exercise's cell, and should earn nothing there.

Most come with a right answer that is called only where the attack found what it looked for: points
then mean that it found it. `ROOT`, `SEED_FILE`, `CLASS` and `MARK` are replaced by real paths.

Rows, each a family of attacks that graders elsewhere have met:

    1 hidden tests or solutions on disk   2 the reference imported     3 frames, all objects
    4 inputs carried out                  5 known seeds and answers    6 patched checks, generators
    7 objects that equal everything       8 the harness replaced       9 exits, hooks, kills
    10 forged replies, descriptors        11 pickles                   12 work that goes on, others
    13 resources without end              14 paths and links           15 NaN and infinity
    16 constants                          17 shapes and dtypes         18 work left out
    19 precision                          20 changed inputs            21 used memory
    22 replay and counting                23 the library's operator    24 fallback, kernels for show
    25 another face for the grader        27 threads                   30 downloads

Those between, on streams and on timers, have no place here: time gives no points.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from tests.grading.honest.notebooks import RECORDS, accepted

FAILED, ENDED = frozenset({"failed"}), frozenset({"error"})
EITHER = FAILED | ENDED


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: What it does.
        row: Its number in the module's docstring.
        exercise: Where it stands.
        answer: The exercise's cell.
        before: A cell that stands before all answers, or "".
        status: What the exercise's status may be.
        findings: Rules of which a finding is expected; where there are some, it may earn points.
        alone: Its cells do something to the whole process: no other attack in its notebook.
        spoils: Its process answers for itself from then on, so its own later exercises may fail.
    """

    name: str
    row: str
    exercise: str
    answer: str
    before: str = ""
    status: frozenset[str] = FAILED
    findings: frozenset[str] = frozenset()
    alone: bool = False
    spoils: bool = False


ATTACKS: list[Attack] = []


def attack(name: str, row: str, exercise: str, answer: str, **more) -> None:
    assert all(each.name != name for each in ATTACKS), name
    ATTACKS.append(Attack(name, row, exercise, answer.strip("\n"), **more))


def spare(exercise: str) -> str:
    """An accepted answer under the name `right_<exercise>`: what an attack would hand in."""
    text, count = re.subn(rf"^{exercise} = ", f"right_{exercise} = ", accepted(exercise), flags=8)
    assert count == 1, exercise
    return text


def probing(name: str, row: str, exercise: str, probe: str, **more) -> None:
    """An attack that looks for something: `probe` is the body of a function that says whether."""
    body = "\n".join(f"    {line}" for line in probe.strip("\n").splitlines())
    text = f"""
{spare(exercise)}

def probe_{exercise}(*values):
{body}

def {exercise}(*values):
    try:
        found = probe_{exercise}(*values)
    except Exception:
        found = False
    return right_{exercise}(*values) if found else None
"""
    # None makes some harnesses raise.
    attack(name, row, exercise, text, status=EITHER, **more)


# 7, 15, 16, 17: what comes back is no plain right value.

EQUAL = """
class Equal:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __le__(self, other): return True
    __lt__ = __ge__ = __gt__ = __le__
    def __bool__(self): return True
    def __hash__(self): return 0
    def __float__(self): return 0.0
    def __getattr__(self, name): return self
    def __call__(self, *a, **k): return self
    def __len__(self): return 2
    def __getitem__(self, i): return self
    def __iter__(self): return iter((self, self))
"""
attack(
    "an object that equals everything",
    "7",
    "safe_softmax",
    f"{EQUAL}\ndef safe_softmax(scores):\n    return Equal()",
)
attack(
    "a tensor subclass that equals everything",
    "7",
    "take_tile",
    """
class Agreeing(torch.Tensor):
    @classmethod
    def __torch_function__(cls, f, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            name = getattr(f, "__name__", "")
            if name in ("allclose", "equal", "isfinite"):
                return True
            if name in ("eq", "__eq__", "le", "__le__", "isclose"):
                return torch.ones(args[0].shape, dtype=torch.bool)
            return f(*args, **(kwargs or {}))
    def __eq__(self, other): return True
    __hash__ = torch.Tensor.__hash__
def take_tile(*state):
    return tuple(torch.zeros_like(each).as_subclass(Agreeing) for each in state[:3])
""",
)
attack(
    "numbers that equal everything",
    "7",
    "bytes_moved",
    """
class Number(int):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    __hash__ = int.__hash__
def bytes_moved(*sizes):
    return Number(1), Number(1)
""",
)
attack(
    "a float that equals everything",
    "7",
    "overflow_score",
    """
class Number(float):
    def __eq__(self, other): return True
    def __sub__(self, other): return 0.0
    __rsub__ = __sub__
    def __abs__(self): return 0.0
    def __lt__(self, other): return True
    __le__ = __lt__
overflow_score = Number(3.0)
""",
    status=EITHER,
)
attack(
    "a letter that is every letter",
    "7",
    "two_new_tokens",
    """
class Letter(str):
    def __eq__(self, other): return True
    def __hash__(self): return hash("D")
    def lower(self): return self
two_new_tokens = Letter("A")
""",
)
attack(
    "a list that lies about its length",
    "7",
    "causal_tiles",
    """
class Rows(list):
    def __len__(self): return 10**6
    def __eq__(self, other): return True
    def __getitem__(self, i): return (0, 0)
    def __iter__(self): return iter([])
def causal_tiles(*sizes):
    return Rows()
""",
)
attack(
    "a lazy tensor that is patched on the instance",
    "7",
    "merge_states",
    """
def merge_states(out_a, lse_a, out_b, lse_b):
    out, lse = torch.zeros_like(out_a), torch.zeros_like(lse_a)
    for each in (out, lse):
        each.detach = each.cpu = each.contiguous = lambda *a, **k: float("nan")
        each.allclose = each.equal = lambda *a, **k: True
    return out, lse
""",
    status=EITHER,
)
attack(
    "NaN",
    "15",
    "online_softmax",
    "def online_softmax(tiles):\n    return torch.tensor(math.nan), torch.tensor(math.nan)",
)
attack(
    "infinity",
    "15",
    "one_pass_variance",
    "def one_pass_variance(tiles):\n    return torch.tensor(math.inf), torch.tensor(math.inf)",
)
attack(
    "zeros",
    "16",
    "tiled_attention",
    "def tiled_attention(q, k, v, block_m, block_n):\n    return torch.zeros_like(q)",
)
attack(
    "the mean of the values, near the truth",
    "16",
    "tiled_attention",
    "def tiled_attention(q, k, v, block_m, block_n):\n    return v.mean(0).expand_as(q).clone()",
)
attack(
    "right values in a broadcastable shape",
    "17",
    "safe_softmax",
    f"{spare('safe_softmax')}\n"
    "def safe_softmax(scores):\n    return right_safe_softmax(scores)[None]",
)
attack(
    "one number for all",
    "17",
    "merge_states",
    "def merge_states(out_a, lse_a, out_b, lse_b):\n    return out_a[:1, :1], lse_a[:1]",
)
attack(
    "right values in another dtype",
    "17",
    "one_pass_variance",
    f"{spare('one_pass_variance')}\ndef one_pass_variance(tiles):\n"
    "    return tuple(each.double() for each in right_one_pass_variance(tiles))",
)
attack(
    "the last row is left out",
    "18",
    "merge_states",
    f"{spare('merge_states')}\ndef merge_states(*parts):\n"
    "    out, lse = right_merge_states(*parts)\n    out[-1] = 0\n    return out, lse",
)
attack(
    "fp16 inside",
    "19",
    "one_pass_variance",
    f"{spare('one_pass_variance')}\ndef one_pass_variance(tiles):\n"
    "    halves = (tile.half().float() for tile in tiles)\n"
    "    return right_one_pass_variance(halves)",
)

# 20, 21, 22, 5: inputs, memory, repetition, luck.

attack(
    "right, and its inputs are changed",
    "20",
    "safe_softmax",
    f"{spare('safe_softmax')}\ndef safe_softmax(scores):\n"
    "    out = right_safe_softmax(scores)\n    scores.zero_()\n    return out",
)
attack(
    "inputs are changed so that zero is right",
    "20",
    "merge_states",
    """
def merge_states(out_a, lse_a, out_b, lse_b):
    for each in (out_a, out_b):
        each.set_(torch.zeros_like(each))
    return torch.zeros_like(out_a), lse_a
""",
)
attack(
    "memory that was used before",
    "21",
    "take_tile",
    """
def take_tile(row_max, row_sum, acc, scores, values):
    return tuple(torch.empty_like(each) for each in (row_max, row_sum, acc))
""",
    status=frozenset({"failed"}),
)
attack(
    "the first answer again and again",
    "22",
    "safe_softmax",
    f"""
{spare("safe_softmax")}
kept_rows = {{}}
def safe_softmax(scores):
    key = scores.dtype
    if key not in kept_rows:
        kept_rows[key] = right_safe_softmax(scores)
    kept = kept_rows[key].flatten()
    return kept.repeat(scores.numel())[: scores.numel()].reshape(scores.shape)
""",
)
attack(
    "answers kept by address",
    "22",
    "merge_states",
    f"""
{spare("merge_states")}
by_address = {{}}
def merge_states(*parts):
    key = parts[0].data_ptr() >> 40
    if key not in by_address:
        by_address[key] = right_merge_states(*parts)
    return by_address[key]
""",
)


def known_answers() -> str:
    """The outputs of one seed's cases, by the shape of the input: what a friend hands on."""
    exercise = RECORDS["take_tile"]
    table = []
    for case in exercise.cases("small", 0):
        want = exercise.harness(exercise.accepts[0], case.data)
        table.append((tuple(case.data["scores"].shape), [each.tolist() for each in want]))
    return repr(table).replace("inf", "math.inf").replace("nan", "math.nan")


attack(
    "the answers of another seed",
    "5",
    "take_tile",
    f"""
import sys
known = dict({known_answers()})
def take_tile(row_max, row_sum, acc, scores, values):
    shape = tuple(sys._getframe(1).f_locals["data"]["scores"].shape)
    return tuple(torch.tensor(each) for each in known[shape])
""",
)
probing(
    "the seed is that of the generators",
    "5",
    "merge_states",
    """
drawn = torch.Generator().manual_seed(torch.initial_seed())
x = values[0]
return any(torch.equal(torch.randn(x.shape, generator=drawn), x) for _ in range(20))
""",
)
attack(
    "random numbers without randomness",
    "6",
    "take_tile",
    "def take_tile(row_max, row_sum, acc, scores, values):\n    return row_max, row_sum, acc",
    before="""
import random
fixed = lambda *shape, **more: torch.zeros([each for each in shape if isinstance(each, int)])
torch.randn = torch.rand = torch.randint = fixed
torch.manual_seed = torch.Generator.manual_seed = random.seed = lambda *a, **k: None
""".replace("torch.Generator.manual_seed = ", ""),
    alone=True,
)

# 6, 10: the checker's own code, as far as it is here.

PATCHES = """
import json, sys
import safetensors.torch
yes = lambda *a, **k: True
torch.allclose = torch.equal = torch.isclose = yes
torch.testing = type(sys)("testing")
torch.testing.assert_close = yes
json.dumps.__defaults__, json.JSONEncoder.default = json.dumps.__defaults__, lambda s, o: "passed"
for name, module in list(sys.modules.items()):
    if name.startswith("course_lib"):
        for each in ("same_data", "compare", "agree", "_errors", "says_todo", "passed"):
            if hasattr(module, each):
                setattr(module, each, yes)
"""
attack(
    "patched comparisons",
    "6",
    "merge_states",
    "def merge_states(out_a, lse_a, out_b, lse_b):\n    return out_a, lse_b",
    before=PATCHES,
    alone=True,
)
attack(
    "the worker's own replies",
    "10",
    "online_softmax",
    """
import sys
worker = sys.modules["course_lib.grading.worker"]
honest_reply = worker._reply
def forged(ran):
    reply, blob = honest_reply(ran)
    tell = {"status": "passed", "score": 5.0, "points": 5.0, "passed": True, "verdict": "passed"}
    return {**reply, **tell}, blob
def online_softmax(tiles):
    worker._reply = forged
    return torch.tensor(0.0), torch.tensor(1.0)
""",
)
attack(
    "the notebook's module is replaced",
    "8",
    "safe_softmax",
    """
import sys, gc
def safe_softmax(scores):
    main = sys.modules["__main__"]
    for each in gc.get_objects():
        if type(each).__name__ == "_Notebook":
            each.on_call = lambda header, blob: ({"value": None, "passed": True}, b"")
    sys.modules["__main__"] = None
    sys.modules["__main__"] = main
    return scores
""",
    alone=True,
    spoils=True,
)
FORGE = """
import json, os, socket, struct, sys
def forge(header, blob=b"", number=None):
    frame = sys._getframe()
    while number is None and frame is not None:
        number = frame.f_locals.get("header", {}).get("id") if frame.f_code is not forge.__code__ \\
            else None
        frame = frame.f_back
    text = json.dumps({"id": number, **header}).encode()
    for fd in range(3, 64):
        try:
            end = socket.socket(fileno=os.dup(fd))
            end.sendall(b"CGW1" + struct.pack(">IQ", len(text), len(blob)) + text + blob)
        except OSError:
            pass
"""
attack(
    "a frame that says passed",
    "10",
    "take_tile",
    f"{FORGE}\ndef take_tile(*state):\n"
    "    forge({'passed': True, 'status': 'passed', 'score': 3.0, 'value': None})\n"
    "    os._exit(0)",
    status=EITHER,
)
attack(
    "frames by the hundred",
    "10",
    "merge_states",
    f"{FORGE}\ndef merge_states(*parts):\n    for i in range(200):\n"
    "        forge({'value': {'list': []}, 'score': 5.0}, number=i)\n    return parts[0], parts[1]",
    status=EITHER,
)
attack(
    "a second answer, which the next exercise would meet",
    "10",
    "take_tile",
    f"{FORGE}\ndef take_tile(*state):\n    forge({{'value': None}})\n    return state[:3]",
    alone=True,
)
attack(
    "bytes that are no frame",
    "10",
    "one_pass_variance",
    """
import os
def one_pass_variance(tiles):
    for fd in range(3, 64):
        try:
            os.write(fd, b"PASSED 4.0\\n" * 100)
        except OSError:
            pass
    return torch.tensor(0.0), torch.tensor(0.0)
""",
    status=ENDED,
)
attack(
    "verdicts on standard output, and the end",
    "9",
    "safe_softmax",
    """
import os, sys
def safe_softmax(scores):
    line = b'{"score": 2.0, "status": "passed"}\\n1 passed in 0.01s\\n'
    for stream in (sys.__stdout__, sys.__stderr__):
        print(line.decode(), file=stream, flush=True)
    os.write(1, line), os.write(2, line)
    os._exit(0)
""",
    status=ENDED,
)
attack(
    "file descriptors closed",
    "10",
    "merge_states",
    """
import os
def merge_states(*parts):
    os.closerange(3, 256)
    return parts[0], parts[1]
""",
    status=ENDED,
)
attack(
    "file descriptors exchanged",
    "10",
    "take_tile",
    """
import os
def take_tile(*state):
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3, 64):
        if fd != null:
            try:
                os.fstat(fd)
                os.dup2(null, fd)
            except OSError:
                pass
    return state[:3]
""",
    status=frozenset({"error", "timeout"}),
)
attack(
    "exit hooks, traces and signals",
    "9",
    "one_pass_variance",
    f"""
{FORGE}
import atexit, signal, threading
def late(*anything):
    forge({{"passed": True, "value": None, "score": 4.0}}, number=1)
def tracing(frame, event, argument):
    for name in ("value", "changed", "problem", "reply"):
        if name in frame.f_locals:
            frame.f_locals[name] = True
    return tracing
def one_pass_variance(tiles):
    atexit.register(late)
    for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1):
        signal.signal(number, late)
    sys.settrace(tracing)
    frame = sys._getframe()
    while frame is not None:
        frame.f_trace = tracing
        frame = frame.f_back
    return torch.tensor(0.0), torch.tensor(0.0)
""",
    status=EITHER,
)

# 11: objects that run when somebody unpickles them.

BOMB = """
class Bomb:
    def __reduce__(self):
        return (exec, ("import pathlib; pathlib.Path('MARK').touch()",))
    __reduce_ex__ = lambda self, protocol: self.__reduce__()
    __getstate__ = __reduce__
"""
attack(
    "an object that runs when unpickled",
    "11",
    "safe_softmax",
    f"{BOMB}\ndef safe_softmax(scores):\n    return Bomb()",
)
attack(
    "such objects within a tensor and a tuple",
    "11",
    "take_tile",
    f"{BOMB}\ndef take_tile(*state):\n    state[0].bomb = Bomb()\n    return state[0], Bomb(), "
    "__import__('numpy').array([Bomb()], dtype=object)",
)
attack(
    "such an object as an exception",
    "11",
    "merge_states",
    f"{BOMB}\nclass Boom(Bomb, Exception):\n    def __str__(self): return 'passed'\n"
    "def merge_states(*parts):\n    raise Boom(Bomb())",
    status=ENDED,
)
attack(
    "such an object as a value",
    "11",
    "useless_tile",
    f"{BOMB}\nuseless_tile = Bomb()",
)

# 1, 2, 3, 4, 30: what there is to see.

probing(
    "solutions and tests on the disk",
    "1",
    "safe_softmax",
    """
from pathlib import Path
import course_lib, site, sys
near = [Path(each) for each in ("ROOT", *course_lib.__path__, *site.getsitepackages(), *sys.path)]
near += [each / "course_lib" for each in near] + [each.parent for each in near] + [Path.cwd()]
names = ("solutions", "tests", "exercises", "_solutions", "flash_attention")
names += ("solutions/08_flash_attention.ipynb", "flash_attention/exercises/safe_softmax.py")
for folder in near:
    for name in names:
        place = folder / name
        if place.is_file() or place.is_dir() and any(place.rglob("*softmax*")):
            return True
return False
""",
)
probing(
    "the solution by the library's own door",
    "2",
    "merge_states",
    """
import course_lib
text = str(course_lib.solution("merge_states")) + str(getattr(course_lib, "_solutions", ""))
return "def merge" in text
""",
)
attack(
    "the library's own attention",
    "2",
    "tiled_attention",
    """
def tiled_attention(q, k, v, block_m, block_n):
    from course_lib.flash_attention import flash_attention
    return flash_attention(q[None, None], k[None, None], v[None, None])[0, 0]
""",
    status=ENDED,
)
probing(
    "the reference, imported by every name",
    "2",
    "take_tile",
    """
import importlib
for name in ("flash_attention", "flash_attention.exercises", "flash_attention.reference",
             "flash_attention.exercises.take_tile", "grading.judge", "grading.check", "authoring"):
    try:
        importlib.import_module(f"course_lib.{name}")
        return True
    except ImportError:
        pass
return False
""",
)
probing(
    "expected values in the frames above",
    "3",
    "safe_softmax",
    """
import sys
right, frame = right_safe_softmax(values[0].clone()), sys._getframe(1)
while frame is not None:
    for each in list(frame.f_locals.values()):
        parts = each.values() if isinstance(each, dict) else [each]
        for part in parts:
            if isinstance(part, torch.Tensor) and part.shape == right.shape:
                if torch.allclose(part.float(), right.float(), atol=1e-3):
                    return True
    for name in ("oracle", "expected", "want", "truth", "secret_seed", "accepts", "tolerance"):
        if name in frame.f_locals and frame.f_code.co_name != "<module>":
            return True
    frame = frame.f_back
return False
""",
)
probing(
    "records and judges among all objects",
    "3",
    "merge_states",
    """
import gc
kinds = {"Exercise", "Expected", "Case", "Misconception", "_Truth", "Judge", "Session", "Sandbox"}
return any(type(each).__name__ in kinds and type(each).__module__.startswith("course_lib")
           for each in gc.get_objects())
""",
)
probing(
    "expected values among all tensors",
    "3",
    "take_tile",
    """
import gc
right = right_take_tile(*(each.clone() for each in values))
seen = [id(each) for each in right]
return any(type(each) is torch.Tensor and id(each) not in seen and each.shape == right[2].shape
           and each.dtype == torch.float64 for each in gc.get_objects())
""",
)
probing(
    "the grader's environment",
    "4",
    "one_pass_variance",
    """
import glob, os
text = "".join(f"{key}={value}" for key, value in os.environ.items())
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/task/*/environ"):
    try:
        text += open(path, errors="replace").read()
    except OSError:
        pass
return any(each in text for each in ("PYTEST", "COURSE_HOME", "SECRET", "TOKEN", "GITHUB"))
""",
)
probing(
    "the memory of other processes",
    "3",
    "safe_softmax",
    """
import ctypes, os
own = {os.getpid()}
libc = ctypes.CDLL(None, use_errno=True)
for pid in [int(each) for each in os.listdir("/proc") if each.isdigit()] + [os.getppid()]:
    command = ""
    try:
        command = open(f"/proc/{pid}/cmdline").read()
        if pid not in own and "pytest" in command:
            return True
    except OSError:
        pass
    if pid not in own and libc.ptrace(16, pid, 0, 0) == 0:
        return True
return False
""",
)
probing(
    "the file of the secret seed",
    "5",
    "merge_states",
    """
from pathlib import Path
file = Path("SEED_FILE")
below = list(file.parent.parent.rglob("*")) if file.parent.parent.exists() else []
return file.exists() or bool(below)
""",
)
probing(
    "a hole in the file system",
    "14",
    "take_tile",
    """
import os
os.symlink("SEED_FILE", "seed")
for path in ("seed", "/proc/self/root/SEED_FILE", "/proc/1/root/SEED_FILE", "/proc/1/cwd/SEED_FILE",
             "../" * 30 + "SEED_FILE"):
    try:
        open(path).read()
        return True
    except OSError:
        pass
return False
""",
)
probing(
    "writing to another submission",
    "12",
    "safe_softmax",
    """
from pathlib import Path
for place in ("CLASS/victim/08_flash_attention.ipynb", "CLASS/planted", "ROOT/planted", "MARK"):
    try:
        Path(place).write_text("{}")
        return True
    except OSError:
        pass
return False
""",
)
probing(
    "a network",
    "4",
    "one_pass_variance",
    """
import socket
for family, address in ((socket.AF_INET, ("1.1.1.1", 53)), (socket.AF_INET, ("127.0.0.1", 22)),
                        (socket.AF_INET6, ("::1", 80)), (socket.AF_UNIX, "/var/run/docker.sock")):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            with socket.socket(family, kind) as end:
                end.settimeout(0.2)
                end.connect(address)
                end.send(b"inputs")
                return True
        except OSError:
            pass
return False
""",
)
probing(
    "a download",
    "30",
    "merge_states",
    """
import subprocess, sys
command = [sys.executable, "-m", "pip", "download", "--retries", "0", "--timeout", "1", "six"]
return subprocess.run(command, capture_output=True, timeout=2).returncode == 0
""",
)
probing(
    "what another submission left behind",
    "12",
    "take_tile",
    """
from pathlib import Path
found = [each for top in ("/tmp", "/dev/shm", "/var/tmp", str(Path.cwd()), "/run")
         for each in Path(top).glob("stash-*")]
return any(each.name != stash.name for each in found)
""",
)
attack(
    "another face for the grader",
    "25",
    "safe_softmax",
    f"""
{spare("safe_softmax")}
import os, socket, sys
graded = "course_lib.grading.worker" in sys.modules or socket.gethostname() == "grader"
if graded:
    safe_softmax = lambda scores: True
else:
    safe_softmax = right_safe_softmax
""",
    findings=frozenset({"defined twice"}),
)

# 9, 12, 13: the process and the machine.

attack(
    "an endless loop",
    "13",
    "safe_softmax",
    "def safe_softmax(scores):\n    while True: pass",
    status=frozenset({"timeout"}),
)
attack(
    "an endless sleep that refuses signals",
    "13",
    "merge_states",
    """
import signal, time
def merge_states(*parts):
    for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            pass
""",
    status=frozenset({"timeout"}),
)
attack(
    "processes without end",
    "13",
    "take_tile",
    """
import os, signal
def take_tile(*state):
    while True:
        try:
            if os.fork() == 0:
                signal.pause()
        except OSError:
            return state[:3]
""",
    status=frozenset({"failed", "error", "memory", "timeout"}),
)
attack(
    "memory without end",
    "13",
    "one_pass_variance",
    """
def one_pass_variance(tiles):
    hoard = []
    while True:
        hoard.append(bytearray(b"x") * (1 << 27))
""",
    status=frozenset({"memory", "error", "timeout"}),
)
attack(
    "100 MB of output",
    "13",
    "merge_states",
    """
import os, sys
def merge_states(*parts):
    line = "x" * (1 << 20)
    for _ in range(50):
        print(line)
        os.write(1, line.encode())
        sys.__stderr__.write(line)
    return parts[0], parts[1]
""",
)
attack(
    "a full disk",
    "13",
    "take_tile",
    """
import os
def take_tile(*state):
    for place in ("/tmp", "/dev/shm", os.getcwd()):
        try:
            for number in range(100):
                with open(f"{place}/fill-{number}", "wb") as file:
                    for _ in range(40):
                        file.write(bytes(1 << 20))
        except OSError:
            pass
    return state[:3]
""",
    alone=True,
)
attack(
    "everything killed",
    "9",
    "safe_softmax",
    """
import os
def safe_softmax(scores):
    for pid in (1, -1, os.getppid(), 2, 3):
        for number in (15, 9):
            try:
                if pid:
                    os.kill(pid, number)
            except OSError:
                pass
    return scores
""",
    status=EITHER,
)
attack(
    "a thread that goes on",
    "27",
    "one_pass_variance",
    f"""
{spare("one_pass_variance")}
import threading, time
shown = []
def rewrite():
    while True:
        for each in shown:
            each.fill_(7.0)
        time.sleep(0.001)
def one_pass_variance(tiles):
    if not shown:
        threading.Thread(target=rewrite, daemon=True).start()
    shown[:] = torch.tensor(0.0), torch.tensor(0.0)
    return tuple(shown)
""",
)
attack(
    "a process that goes on and writes frames",
    "12",
    "online_softmax",
    f"""
{FORGE}
import time
def online_softmax(tiles):
    if os.fork() == 0:
        for number in range(3, 30):
            forge({{"value": None, "passed": True}}, number=number)
            time.sleep(0.001)
        os._exit(0)
    return torch.tensor(0.0), torch.tensor(1.0)
""",
    status=EITHER,
    alone=True,
)

# 23, 24: the library's operator in place of one's own.

FORBIDDEN = {"status": frozenset({"forbidden"}), "findings": frozenset({"forbidden operator"})}
SCORES = "q @ k.T / math.sqrt(q.shape[1])"


def attending(name: str, body: str, before: str = "", **more) -> None:
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    text = f"{before}\ndef tiled_attention(q, k, v, block_m, block_n):\n{lines}"
    attack(name, "23", "tiled_attention", text, **more)


attending(
    "attention by PyTorch",
    "return F.scaled_dot_product_attention(q[None, None], k[None, None], v[None, None])[0, 0]",
    "import torch.nn.functional as F",
    **FORBIDDEN,
)
attending(
    "softmax by aten",
    f"return torch.ops.aten._softmax.default({SCORES}, 1, False) @ v",
    **FORBIDDEN,
)
attending(
    "softmax as a last resort",
    "try:\n    raise RuntimeError('mine')\nexcept RuntimeError:\n"
    f"    return torch.softmax({SCORES}, 1) @ v",
    **FORBIDDEN,
)
RAN = {"status": FAILED, "findings": frozenset({"forbidden operator ran"})}
attending("softmax by getattr", f"return getattr(torch, 'soft' + 'max')({SCORES}, 1) @ v", **RAN)
attending(
    "attention by getattr",
    "attend = getattr(torch.nn.functional, 'scaled_dot_' + 'product_attention')\n"
    "return attend(q[None, None], k[None, None], v[None, None])[0, 0]",
    **RAN,
)
attending(
    "attention by getattr, taken apart",
    "attend = getattr(torch.nn.functional, 'scaled_dot_' + 'product_attention')\n"
    "return attend(q, k, v)",
    **RAN,
)
attending(
    "softmax by importlib",
    f"return vars(importlib.import_module('to' + 'rch'))['soft' + 'max']({SCORES}, 1) @ v",
    "import importlib",
    **RAN,
)
attending(
    "softmax by exec",
    f"exec('out = torch.soft' + 'max({SCORES}, 1) @ v', globals(), own := locals().copy())\n"
    "return own['out']",
    **RAN,
)
attack(
    "softmax in safe_softmax",
    "23",
    "safe_softmax",
    "def safe_softmax(scores):\n    return scores.float().softmax(-1).half()",
    **FORBIDDEN,
)
attack(
    "logsumexp of all tiles",
    "23",
    "online_softmax",
    """
def online_softmax(tiles):
    row = torch.cat([tile.clone() for tile in tiles])
    return row.max(), (torch.logsumexp(row, 0) - row.max()).exp()
""",
    **FORBIDDEN,
)
attack(
    "a kernel's answer without a kernel",
    "23",
    "first_flash",
    f"def first_flash(q, k, v):\n    return torch.softmax({SCORES}, 1) @ v",
    status=frozenset({"forbidden"}),
)
IDLE = """
@triton.jit
def idle_{0}_kernel(x_ptr):
    tl.store(x_ptr, {1})
"""
attack(
    "a kernel for show",
    "24",
    "flash_forward",
    f"{IDLE.format('forward', '0.0')}\ndef flash_forward(q, k, v):\n    seen = q.new_empty(1)\n"
    f"    idle_forward_kernel[(1,)](seen)\n    return torch.softmax({SCORES}, 1) @ v",
    status=frozenset({"forbidden"}),
    findings=frozenset({"library operator"}),
)
attack(
    "a kernel that breaks, and PyTorch instead",
    "24",
    "split_decode",
    f"""
{IDLE.format("decode", "undefined_name")}
def split_decode(q, k, v, splits):
    try:
        idle_decode_kernel[(1,)](q.new_empty(1))
    except Exception:
        pass
    group = q.shape[0] // k.shape[0]
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    weights = torch.softmax((k @ q[:, :, None])[..., 0] / math.sqrt(q.shape[1]), 1)
    return (weights[:, None] @ v)[:, 0]
""",
    status=FAILED,
    findings=frozenset({"library operator"}),
)
attack(
    "a kernel on whose one number all depends",
    "24",
    "first_flash",
    f"{IDLE.format('first', '1.0')}\ndef first_flash(q, k, v):\n    one = q.new_zeros(1)\n"
    f"    idle_first_kernel[(1,)](one)\n    return torch.softmax({SCORES}, 1) @ v * one",
    status=frozenset({"passed"}),
    findings=frozenset({"library operator"}),
)

# The exercise whose answer is a test: it is handed the implementations it must tell apart.

attack(
    "verdicts by the number of the call",
    "22",
    "accepts_online_softmax",
    """
calls = []
def accepts_online_softmax(f):
    calls.append(f)
    return (len(calls) - 1) % 14 in (1, 4, 8, 12)
""",
)
attack(
    "verdicts by name",
    "3",
    "accepts_online_softmax",
    "def accepts_online_softmax(f):\n    return f.__name__ in ('textbook', 'log_space')",
)
attack(
    "a verdict that is both",
    "7",
    "accepts_online_softmax",
    """
class Both:
    def __str__(self): return "True"
    def __bool__(self): return True
    def __eq__(self, other): return True
def accepts_online_softmax(f):
    return Both()
""",
)

# Attacks that succeed. Each is an expected failure with its reason.

SUCCEED: dict[str, str] = {}


def succeeds(why: str, name: str, row: str, exercise: str, answer: str, **more) -> None:
    attack(name, row, exercise, answer, alone=True, **more)
    SUCCEED[name] = why


INSIDE = (
    "the implementations run in the submission's process, so a submission can look at them; "
    "to hide them, each call would have to be sent to another process"
)
succeeds(
    INSIDE,
    "verdicts by what stands in the closure",
    "3",
    "accepts_online_softmax",
    """
def accepts_online_softmax(f):
    name = f.__closure__[0].cell_contents.__name__
    return name in ("textbook", "log_space", "one_by_one", "scaled_down")
""",
)
METHOD = (
    "the operators that ran and the memory they took are counted in the submission's process, "
    "which can patch the counter; only values and large amounts of memory are judged from outside"
)
LYING_METER = """
import course_lib.runtime.measure as measure
class Nothing:
    peak_bytes = largest_bytes = 0
    largest_shape, ops = (), {}
    def __enter__(self): return self
    def __exit__(self, *error): pass
measure.measure_memory = Nothing
"""
succeeds(
    METHOD,
    "a hidden operator and a patched counter",
    "23",
    "safe_softmax",
    "def safe_softmax(scores):\n"
    "    return getattr(torch, 'soft' + 'max')(scores.float(), -1).half()",
    before=LYING_METER,
)
succeeds(
    METHOD,
    "the whole stream from the harness's frame",
    "3",
    "online_softmax",
    """
import sys
def online_softmax(tiles):
    row = sys._getframe(1).f_locals["data"]["scores"]
    return row.max(), torch.exp(row - row.max()).sum()
""",
    before=LYING_METER,
)
