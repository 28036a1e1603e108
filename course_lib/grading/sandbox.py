"""The wall around a student's code: what a child may read, and how it is started and stopped.

The child is started by bubblewrap in namespaces of its own, as an ordinary user. It reads the
system's libraries, the interpreter with its packages (an installed `course_lib` is masked), and the
student's view of `course_lib`; it writes to a small /tmp that nobody else sees. There is no
network. Limits are set from outside, before a byte of a submission reaches it.

Where bubblewrap cannot run there is only the level "rlimits", which hides nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import random
import resource
import secrets
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import course_lib
from course_lib.grading import limiter, seccomp, wire

VIEW = "/course"
"""Where the child finds its `course_lib`."""
_GRADING_FILES = (
    "__init__", "compare", "compiles", "exercise", "isolation", "run", "seccomp", "wire", "worker",
    "zygote",
)  # fmt: skip
"""What the child needs of `course_lib.grading`. None of it knows an exercise."""
_INSIDE_UID = 1000
_ORDINARY_UIDS = range(61184, 65519)
"""As root, one of these is taken: nobody's files, and a process limit of its own."""
_MAIN = "from course_lib.grading.zygote import main; main()"

MIB = 1 << 20
DATA_LIMIT = 2048 * MIB
"""Private memory of one process (RLIMIT_DATA)."""
TREE_LIMIT = 3072 * MIB
"""Resident memory of all processes of a submission together; watched, not reserved."""
FILE_LIMIT = 48 * MIB
PROCESS_LIMIT = 24
"""Processes and threads of one submission."""
CPU_LIMIT = 1800


class SandboxError(RuntimeError):
    """The sandbox cannot be built here, or does not hold. The message says what and why."""


class Limits:
    """Sets limits of running processes, as the user that they belong to."""

    def __init__(self, uid: int | None) -> None:
        self._process: subprocess.Popen[str] | None = None
        if uid is not None:
            script = Path(limiter.__file__)
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(script), str(uid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={},
                cwd="/",
            )

    def set(self, pid: int, which: int, most: int) -> None:
        """Lower a limit for good.

        Raises:
            SandboxError: If it cannot be set.
        """
        try:
            if self._process is None:
                limiter.set_limit(pid, which, most)
                return
            assert self._process.stdin is not None
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps([pid, which, most]) + "\n")
            self._process.stdin.flush()
            answer = self._process.stdout.readline().strip()
        except OSError as error:
            answer = str(error)
        if answer != "ok":
            raise SandboxError(f"limit {which} of process {pid} cannot be set: {answer}")

    def close(self) -> None:
        """End the helper."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


@dataclass
class Child:
    """One running child: process 1 of namespaces of its own.

    Attributes:
        sock: For frames.
        pid: On this machine, as long as `pidfd` is open and it was not reaped.
        pidfd: Names this process and no other.
        baseline: Bytes of private memory and of address space before any code of a submission ran.
        started: "warm" or "cold".
        limits: What sets its limits.
    """

    sock: socket.socket
    pid: int
    pidfd: int
    started: str
    limits: Limits
    baseline: tuple[int, int] = (0, 0)
    _report: socket.socket | None = None
    _process: subprocess.Popen[Any] | None = None

    def alive(self) -> bool:
        """Whether it still runs."""
        return not select.select([self.pidfd], [], [], 0)[0]

    def kill(self) -> None:
        """Kill it, and with process 1 everything in its namespaces; wait until all is gone."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
        select.select([self.pidfd], [], [], 10)
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                # Without namespaces there is only the group that it leads.
                if os.getpgid(self._process.pid) == self._process.pid:
                    os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
            self._process.wait(10)

    def close(self) -> None:
        """Kill it and let go of everything."""
        self.kill()
        self.sock.close()
        if self._report is not None:
            self._report.close()
        with contextlib.suppress(OSError):
            os.close(self.pidfd)

    def how_it_ended(self) -> str:
        """What ended it, in words, as far as it can be told; "" where it cannot."""
        code: int | None = None
        if self._report is not None:
            with contextlib.suppress(OSError, ValueError, TimeoutError):
                self._report.settimeout(2)
                code = int(json.loads(self._report.recv(200))["exit"])
        elif self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = self._process.wait(2)
                # bwrap passes a signal on as 128 + its number.
                code = 128 - code if code is not None and code > 128 else code
        if code is None:
            return ""
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"it was ended by {signal.Signals(-code).name}"
        return f"it ended itself with exit code {code}"

    def limit(self, which: int, most: int) -> None:
        """Lower a limit of process 1 for good."""
        self.limits.set(self.pid, which, most)

    def memory(self) -> tuple[int, int]:
        """Bytes of private memory and of address space that process 1 holds now."""
        sizes = _status(self.pid)
        return sizes.get("VmData", 0), sizes.get("VmSize", 0)

    def tree(self) -> list[int]:
        """Ids of its processes, itself first."""
        return _tree(self.pid)

    def end_others(self) -> None:
        """End all its processes but process 1.

        Raises:
            SandboxError: If there are always new ones.
        """
        for _ in range(20):
            others = self.tree()[1:]
            if not others:
                return
            for pid in others:
                with contextlib.suppress(ProcessLookupError):
                    pidfd = os.pidfd_open(pid)
                    # Looked up again: the number may have gone to somebody else's process.
                    if pid in self.tree():
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    os.close(pidfd)
            time.sleep(0.01)
        raise SandboxError("its processes cannot be ended one by one")

    def resident(self) -> int:
        """Resident bytes of all its processes."""
        return sum(_status(pid).get("VmRSS", 0) for pid in self.tree())

    def cpu_seconds(self) -> float:
        """Processor time that its processes took so far."""
        return sum(_cpu_seconds(pid) for pid in self.tree())


class Sandbox:
    """Starts children; a context manager that leaves no process and no file behind.

    They also end when the thread that made it ends, whatever ends that.

    Args:
        device: "cpu", or "cuda" to show the GPU's device nodes to the child.
        allow_weak: Where bubblewrap cannot run, go on with limits only.

    Raises:
        SandboxError: If there is no sandbox here and `allow_weak` is False, or it does not hold.
    """

    def __init__(self, *, device: str = "cpu", allow_weak: bool = False) -> None:
        if device not in ("cpu", "cuda"):
            raise SandboxError(f"device is {device!r}; expected 'cpu' or 'cuda'.")
        self.device = device
        self.uid = _ordinary_uid() if os.geteuid() == 0 else None
        self.level, self.start = "bwrap", "warm"
        self.why_cold = ""
        self._zygote: tuple[subprocess.Popen[Any], socket.socket] | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="course-grade-"))
        self._limits = Limits(self.uid)
        try:
            self._bwrap = shutil.which("bwrap")
            problem = self._choose_level()
            if problem and not allow_weak:
                raise SandboxError(problem)
            if problem:
                self.level, self.start, self.why_cold = "rlimits", "cold", problem
                self._make_weak()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the zygote and remove what was written."""
        if self._zygote is not None:
            process, control = self._zygote
            control.close()
            process.kill()
            process.wait(10)
            self._zygote = None
        self._limits.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def child(self) -> Child:
        """A fresh child, with its limits set, that has not seen anything yet.

        Raises:
            SandboxError: If it cannot be started.
        """
        child = self._warm_child() if self.start == "warm" else self._cold_child()
        try:
            header, _ = wire.receive(child.sock, deadline=time.monotonic() + 60)
            if header != {"hello": True}:
                raise SandboxError("the child did not start as it should")
            child.baseline = child.memory()
            self._set_limits(child)
        except (wire.Closed, wire.WireError, TimeoutError) as error:
            child.close()
            raise SandboxError(f"the child did not start: {error}. {self._errors()}") from None
        return child

    def _set_limits(self, child: Child) -> None:
        limits = {
            resource.RLIMIT_CPU: CPU_LIMIT,
            resource.RLIMIT_FSIZE: FILE_LIMIT,
            resource.RLIMIT_NOFILE: 256,
            resource.RLIMIT_NPROC: PROCESS_LIMIT,
            resource.RLIMIT_CORE: 0,
            resource.RLIMIT_MEMLOCK: MIB,
        }
        if self.device == "cpu":
            # A CUDA context reserves address space and private mappings beyond any sensible limit.
            limits[resource.RLIMIT_DATA] = child.baseline[0] + DATA_LIMIT
            limits[resource.RLIMIT_AS] = child.baseline[1] + 2 * DATA_LIMIT
        if self.level != "bwrap":
            # Counted over everything that this user runs.
            del limits[resource.RLIMIT_NPROC]
        for which, most in limits.items():
            child.limit(which, most)

    # Which level there is.

    def _choose_level(self) -> str:
        """Try warm, then cold, each with the self-test. "" where one holds, else what is wrong."""
        if self._bwrap is None:
            return "bubblewrap is not installed: there is no `bwrap` on the PATH."
        for start in ("warm", "cold"):
            self.start = start
            try:
                self.self_test()
            except SandboxError as error:
                problem = str(error)
                self.why_cold = self.why_cold or problem
                continue
            if start == "warm":
                self.why_cold = ""
            return ""
        return f"bubblewrap is here, and its sandbox does not hold: {problem}"

    def self_test(self) -> None:
        """Start a child and let it try to get out.

        Raises:
            SandboxError: If anything that must fail succeeded.
        """
        planted = self._scratch / f"secret-{secrets.token_hex(4)}"
        planted.write_text("a child must not read this")
        planted.chmod(0o644)
        self._scratch.chmod(0o755)
        here = Path(course_lib.__path__[0])
        absent = [here, *(here.parent / each for each in ("solutions", "tests", "exercises"))]
        with socket.socket() as listening, contextlib.closing(self.child()) as child:
            listening.bind(("127.0.0.1", 0))
            listening.listen(1)
            targets = {
                "secret": str(planted),
                "absent": [str(path) for path in absent],
                "address": list(listening.getsockname()),
                "bytes": child.baseline[1] + 4 * DATA_LIMIT,
                "file": FILE_LIMIT + 2 * MIB,
                "processes": 2 * PROCESS_LIMIT,
                "calls": platform.machine() in seccomp.KNOWN,
                "memory_files": self.device == "cpu" and platform.machine() in seccomp.KNOWN,
            }
            problems = _seen_from_outside(child)
            wire.send(child.sock, {"op": "probe", "id": 0, "targets": targets})
            try:
                reply, _ = wire.receive(child.sock, deadline=time.monotonic() + 60)
            except (wire.Closed, wire.WireError, TimeoutError) as error:
                raise SandboxError(f"the self-test did not end: {error}") from None
            problems += list(reply.get("escaped", ["answer the self-test otherwise than asked"]))
        planted.unlink()
        if problems:
            raise SandboxError(f"in the sandbox one can {'; '.join(problems)}.")

    # Starting.

    def _cold_child(self) -> Child:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                if self.level == "bwrap":
                    process, pid = self._start_bwrap("cold", theirs)
                else:
                    process = self._start_bare(theirs)
                    pid = process.pid
        except BaseException:
            ours.close()
            raise
        pidfd = -1
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
        if pidfd < 0 or process.poll() is not None:
            # bwrap is alive until it has waited for its child: only then is this id its child's.
            process.kill()
            process.wait()
            ours.close()
            if pidfd >= 0:
                os.close(pidfd)
            raise SandboxError(f"the child ended at once. {self._errors()}")
        return Child(ours, pid, pidfd, "cold", self._limits, _process=process)

    def _warm_child(self) -> Child:
        if self._zygote is None or self._zygote[0].poll() is not None:
            self._start_zygote()
        assert self._zygote is not None
        control = self._zygote[1]
        ours, theirs = socket.socketpair()
        report, their_report = socket.socketpair()
        pidfd = -1
        try:
            with theirs, their_report:
                socket.send_fds(control, [b"c"], [theirs.fileno(), their_report.fileno()])
            report.settimeout(30)
            message, fds, *_ = socket.recv_fds(report, 1000, 1)
            if not fds:
                said = json.loads(message or b"{}").get("failed", "it said nothing")
                raise SandboxError(f"nested namespaces are refused: {said}")
            (pidfd,) = fds
            return Child(ours, _pid_of(pidfd), pidfd, "warm", self._limits, _report=report)
        except (OSError, ValueError, SandboxError) as error:
            ours.close()
            report.close()
            if pidfd >= 0:
                os.close(pidfd)
            if isinstance(error, SandboxError):
                raise
            raise SandboxError(f"the zygote gave no child: {error}. {self._errors()}") from None

    def _start_zygote(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            process, _ = self._start_bwrap("warm", theirs)
        ours.settimeout(60)
        try:
            ready = ours.recv(1)
        except OSError:
            ready = b""
        if ready != b"z":
            process.kill()
            process.wait()
            ours.close()
            raise SandboxError(f"the zygote did not start. {self._errors()}")
        ours.settimeout(None)
        self._zygote = process, ours

    def _start_bwrap(self, kind: str, sock: socket.socket) -> tuple[subprocess.Popen[Any], int]:
        """Start bwrap through the launcher; the process, and the id of process 1 inside."""
        read, write = os.pipe()
        stage, staged = self._staged()
        command = self._bwrap_command(kind, sock.fileno(), write, staged)
        spec = {
            "argv": command,
            "uid": self.uid,
            "stage": [[path, name] for path, name in staged.items()],
            "stage_at": str(stage),
        }
        launcher = Path(__file__).with_name("launcher.py")
        try:
            with open(self._scratch / "errors", "wb") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(launcher), json.dumps(spec)],
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    env={},
                    pass_fds=[sock.fileno(), write],
                    cwd="/",
                )
        finally:
            os.close(write)
        with os.fdopen(read, "rb") as info:
            # bwrap closes its end when it has said who its child is.
            said = _read_within(info.fileno(), 30)
        try:
            return process, int(json.loads(said)["child-pid"])
        except (ValueError, KeyError):
            process.kill()
            process.wait()
            raise SandboxError(f"bwrap did not start. {self._errors()}") from None

    def _start_bare(self, sock: socket.socket) -> subprocess.Popen[Any]:
        """The weak level: a process of its own session, with a clean environment."""
        view = self._scratch / "view"
        home = self._scratch / "home"
        home.mkdir(mode=0o700, exist_ok=True)
        if self.uid is not None:
            os.chown(home, self.uid, self.uid)
        places = {"PYTHONPATH": str(view), "HOME": str(home), "TMPDIR": str(home)}
        caches = {"TRITON_CACHE_DIR": f"{home}/triton", "MPLCONFIGDIR": f"{home}/matplotlib"}
        environment = {**_environment(self.device), **places, **caches}
        identity: dict[str, Any] = {}
        if self.uid is not None:
            identity = {"user": self.uid, "group": self.uid, "extra_groups": []}
        return subprocess.Popen(
            [sys.executable, "-s", "-P", "-c", _MAIN, "cold", str(sock.fileno())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            pass_fds=[sock.fileno()],
            cwd=home,
            start_new_session=True,
            **identity,
        )

    def _make_weak(self) -> None:
        """The student's view as files: without namespaces nothing can be mounted."""
        if self.uid is not None and not _reached_by_all(os.path.realpath(sys.executable)):
            # Root's own interpreter: nobody else can start it, and nothing can be shown elsewhere.
            self.uid = None
            self._limits.close()
            self._limits = Limits(None)
        self._scratch.chmod(0o755)
        for inside, source in _view_files().items():
            target = self._scratch / "view" / inside
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(source, target)

    def _staged(self) -> tuple[Path, dict[str, str]]:
        """As root: paths that an ordinary user does not reach, each with a name to show it by."""
        stage = self._scratch / "stage"
        if self.uid is None:
            return stage, {}
        sources = [source for kind, source, _ in _mounts(self.device) if kind == "bind"]
        hidden = [source for source in sources if not _reached_by_all(source)]
        if hidden:
            stage.mkdir(exist_ok=True)
            self._scratch.chmod(0o755)
        return stage, {source: str(number) for number, source in enumerate(hidden)}

    def _bwrap_command(self, kind: str, sock: int, info: int, staged: dict[str, str]) -> list[str]:
        stage = self._scratch / "stage"
        assert self._bwrap is not None
        command = [self._bwrap, "--unshare-all", "--unshare-user", "--die-with-parent"]
        command += ["--as-pid-1", "--new-session", "--hostname", "grader", "--cap-drop", "ALL"]
        command += ["--uid", str(_INSIDE_UID), "--gid", str(_INSIDE_UID), "--clearenv"]
        for name, value in _environment(self.device).items():
            command += ["--setenv", name, value]
        command += ["--proc", "/proc", "--dev", "/dev"]
        command += ["--size", str(16 * MIB), "--tmpfs", "/dev/shm"]
        # Before what is shown: an environment may stand below /tmp.
        command += ["--size", str(64 * MIB), "--tmpfs", "/tmp"]
        for what, source, target in _mounts(self.device):
            if what == "bind":
                shown = str(stage / staged[source]) if source in staged else source
                command += ["--ro-bind", shown, target]
            elif what == "mask":
                command += ["--tmpfs", target, "--remount-ro", target]
            else:
                command += ["--symlink", source, target]
        command += device_arguments(self.device)
        command += ["--remount-ro", "/dev", "--remount-ro", "/"]
        writable = _environment(self.device)["TMPDIR"]
        if writable != "/tmp":
            command += ["--remount-ro", "/tmp"]
        command += ["--chdir", writable]
        command += ["--info-fd", str(info)]
        if kind == "cold":
            command.append("--disable-userns")
        return [*command, sys.executable, "-s", "-P", "-c", _MAIN, kind, str(sock)]

    def _errors(self) -> str:
        with contextlib.suppress(OSError):
            text = (self._scratch / "errors").read_bytes()[-2000:].decode(errors="replace")
            lines = text.strip().splitlines()
            return f"It said: {lines[-1]}" if lines else ""
        return ""


# What the child sees.


def _view_files() -> dict[str, Path]:
    """The student's view of `course_lib`: path in the view to the file or folder shown there."""
    grading = Path(__file__).parent
    shown = {
        "course_lib/__init__.py": grading / "student_view" / "__init__.py",
        "course_lib/runtime": grading.parent / "runtime",
    }
    shown |= {f"course_lib/grading/{name}.py": grading / f"{name}.py" for name in _GRADING_FILES}
    return shown


@functools.cache
def _mounts(device: str) -> list[tuple[str, str, str]]:
    """Everything but /proc, /dev and /tmp: ("bind" | "mask" | "link", source, target), in order."""
    binds = {Path("/usr"): Path("/usr")}
    links = {}
    for path in map(Path, ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32")):
        if path.is_symlink():
            links[path] = os.readlink(path)
        elif path.is_dir():
            binds[path] = path
    for path in map(Path, ("/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d")):
        if path.exists():
            binds[path] = path
    # The interpreter by every name under which it may be asked for, symbolic links included.
    for prefix in {sys.prefix, sys.base_prefix, sysconfig.get_paths()["stdlib"]}:
        for path in (Path(prefix), Path(prefix).resolve()):
            if not path.is_relative_to("/usr"):
                binds[path] = path
    for each in sys.path:
        path = Path(each)
        if path.name in ("site-packages", "dist-packages") and path.is_dir():
            binds[path] = path
    binds = {
        target: source
        for target, source in binds.items()
        if not any(target != other and target.is_relative_to(other) for other in binds)
    }
    masks = _course_paths(list(binds))
    ordered = [("bind", str(source), str(target)) for target, source in binds.items()]
    ordered += [("mask", "", str(path)) for path in masks]
    # What lies in a masked folder and is needed all the same: an environment in the repository.
    again = [path for path in binds if any(path.is_relative_to(mask) for mask in masks)]
    ordered += [("bind", str(path), str(path)) for path in again]
    ordered.sort(key=lambda mount: len(Path(mount[2]).parts))
    view = [("bind", str(source), f"{VIEW}/{path}") for path, source in _view_files().items()]
    symbolic = [("link", target, str(path)) for path, target in links.items()]
    return [*ordered, *symbolic, *view]


def _course_paths(shown: list[Path]) -> list[Path]:
    """Every folder below what is shown that holds the course: masked, whole."""
    found = set()
    package = Path(course_lib.__path__[0]).resolve()
    repository = package.parent
    # A clone is known by what stands beside the package; site-packages is no clone.
    folders = [package, *(repository / each for each in ("solutions", "tests", "exercises"))]
    if repository.name in ("site-packages", "dist-packages"):
        folders = [package]
    # Packages of the interpreter that an environment was made from are not the environment's.
    used = {Path(each).resolve() for each in sys.path if each}
    for root in shown:
        for packages in root.glob("lib*/python3*/*-packages"):
            if sys.prefix != sys.base_prefix and packages.resolve() not in used:
                found.add(packages)
    candidates = [*folders, *(Path(each) / "course_lib" for each in sys.path if each)]
    for root in shown:
        candidates += root.glob("lib*/python3*/*-packages/course_lib")
        candidates += root.glob("local/lib*/python3*/*-packages/course_lib")
    for path in candidates:
        if path.is_dir():
            for same in (path, path.resolve()):
                if any(same.is_relative_to(root) for root in shown):
                    found.add(same)
    return sorted(found)


def device_arguments(device: str, dev: Path = Path("/dev")) -> list[str]:
    """What bwrap shows of a GPU: its device nodes, after /dev, and /sys, which CUDA reads."""
    if device != "cuda":
        return []
    nodes = [str(node) for node in sorted(dev.glob("nvidia*"))]
    shown = [part for node in nodes for part in ("--dev-bind", node, node)]
    return [*shown, "--ro-bind", "/sys", "/sys"]


def _environment(device: str) -> dict[str, str]:
    """All that the child's environment holds. Nothing in it says that it is a grade."""
    # A /tmp of a child's own would hide an environment that stands in it.
    in_tmp = any(Path(target).is_relative_to("/tmp") for *_, target in _mounts(device))
    writable = "/dev/shm" if in_tmp else "/tmp"
    names = {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": writable,
        "TMPDIR": writable,
        "USER": "student",
        "LOGNAME": "student",
        "LANG": "C.UTF-8",
        "PYTHONPATH": VIEW,
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "TRITON_CACHE_DIR": f"{writable}/triton",
        "MPLBACKEND": "agg",
        "MPLCONFIGDIR": f"{writable}/matplotlib",
        "PLOTLY_RENDERER": "json",
        # One thread: a fork keeps one, and sums must be added in the same order every time.
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }
    if device == "cpu":
        names["CUDA_VISIBLE_DEVICES"] = ""
    return names


# Looking at processes.


def _seen_from_outside(child: Child) -> list[str]:
    """What this process, which nobody in the sandbox can deceive, sees wrong with a child."""
    fields = _status_lines(child.pid)
    problems = []
    if "0" in fields.get("Uid", "0").split():
        problems.append("be root on this machine")
    if int(fields.get("CapEff", "1"), 16) or int(fields.get("CapPrm", "1"), 16):
        problems.append("use capabilities")
    if fields.get("NoNewPrivs") != "1":
        problems.append("gain privileges from a program")
    for name in ("user", "mnt", "pid", "net", "ipc", "uts"):
        try:
            if os.readlink(f"/proc/{child.pid}/ns/{name}") == os.readlink(f"/proc/self/ns/{name}"):
                problems.append(f"share the {name} namespace of this machine")
        except PermissionError:
            # It made itself undumpable, and we are not root: its own tests have to do.
            continue
    return problems


def _status_lines(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, value in pairs}


def _status(pid: int) -> dict[str, int]:
    """Sizes of a process in bytes."""
    lines = _status_lines(pid)
    return {
        name: int(value.split()[0]) * 1024
        for name, value in lines.items()
        if name.startswith("Vm") and value.endswith("kB")
    }


def _tree(pid: int) -> list[int]:
    """A process and all below it."""
    found, waiting = [], [pid]
    while waiting:
        here = waiting.pop()
        found.append(here)
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{here}/task"):
                text = Path(f"/proc/{here}/task/{task}/children").read_text()
                waiting += [int(each) for each in text.split()]
    return found


_TICKS = os.sysconf("SC_CLK_TCK")


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    # utime, stime, and those of children that were waited for.
    return sum(map(int, fields[11:15])) / _TICKS


def _pid_of(pidfd: int) -> int:
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        if line.startswith("Pid:"):
            return int(line.split()[1])
    raise OSError("the pidfd names no process")


def _read_within(fd: int, seconds: float) -> bytes:
    """All that is written to a pipe until it is closed, within some seconds."""
    data, deadline = b"", time.monotonic() + seconds
    while len(data) < 10_000:
        ready, *_ = select.select([fd], [], [], max(0.0, deadline - time.monotonic()))
        part = os.read(fd, 4096) if ready else b""
        if not part:
            break
        data += part
        with contextlib.suppress(ValueError):
            json.loads(data)
            break
    return data


def _ordinary_uid() -> int:
    return random.SystemRandom().choice(_ORDINARY_UIDS)


def _reached_by_all(path: str) -> bool:
    """Whether any user can go down to a path and read it."""
    here = Path(path)
    with contextlib.suppress(OSError):
        if any(not parent.stat().st_mode & stat.S_IXOTH for parent in here.parents):
            return False
        mode = here.stat().st_mode
        wanted = stat.S_IROTH | (stat.S_IXOTH if stat.S_ISDIR(mode) else 0)
        return mode & wanted == wanted
    return False
