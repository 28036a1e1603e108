"""The sandbox: what a child can reach, how it is stopped, and that the self-test notices holes."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import course_lib
from course_lib.grading import sandbox as module
from course_lib.grading import wire
from course_lib.grading.sandbox import Child, Sandbox, SandboxError
from tests.grading.bwrap import bwrap_works

needs_bwrap = pytest.mark.skipif(not bwrap_works(), reason="bubblewrap cannot be used here")


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as made:
        yield made


def run(child: Child, source: str) -> dict:
    """Execute a cell, and what it said."""
    wire.send(child.sock, {"op": "cell", "id": 1, "index": 1, "source": source})
    return wire.receive(child.sock, deadline=time.monotonic() + 30)[0]


def value(child: Child, source: str):
    """The value of an expression in the child."""
    assert run(child, f"answer = ({source})") == {"id": 1, "ok": True}
    wire.send(child.sock, {"op": "describe", "id": 2, "names": ["answer"]})
    reply, blob = wire.receive(child.sock, deadline=time.monotonic() + 30)
    return wire.unpack(reply["values"], blob, strict=True)["answer"]


@needs_bwrap
def test_children_are_warm_wherever_namespaces_nest(sandbox: Sandbox) -> None:
    assert sandbox.level == "bwrap"
    assert sandbox.start == "warm" or "nested namespaces are refused" in sandbox.why_cold


@needs_bwrap
@pytest.mark.parametrize("start", ["warm", "cold"])
def test_what_a_child_sees(sandbox: Sandbox, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if start == "warm" and sandbox.start == "cold":
        pytest.skip(f"here children start cold: {sandbox.why_cold}")
    monkeypatch.setattr(sandbox, "start", start)
    monkeypatch.setenv("COURSE_SECRET", "of the grader")
    with contextlib.closing(sandbox.child()) as child:
        assert child.started == start
        top = value(child, "sorted(__import__('os').listdir('/'))")
        assert set(top) <= {
            *("bin", "course", "dev", "etc", "lib", "lib32", "lib64", "libx32", "proc", "sbin"),
            *("tmp", "usr", Path(os.path.realpath(os.sys.prefix)).parts[1]),
            *(Path(each).parts[1] for each in (os.sys.prefix, os.sys.base_prefix)),
        }
        assert "COURSE_SECRET" not in value(child, "dict(__import__('os').environ)")
        course = "sorted(__import__('os').listdir('/course/course_lib'))"
        assert value(child, course) == ["__init__.py", "grading", "runtime"]
        processes = "[p for p in __import__('os').listdir('/proc') if p.isdigit()]"
        assert value(child, processes) == ["1"]
        assert value(child, "__import__('os').getuid()") != 0
        assert value(child, "__import__('socket').if_nameindex()") == [(1, "lo")]


@needs_bwrap
def test_no_file_of_a_chapter_is_anywhere(sandbox: Sandbox) -> None:
    """Every line that only an exercise's record holds is looked for in all that can be read."""
    here = Path(course_lib.__path__[0])
    names = {path.parent.parent.name for path in here.glob("*/exercises/__init__.py")}
    assert names
    search = (
        "[os.path.join(folder, each) for folder, inner, files in os.walk('/') "
        "for each in inner + files if folder.endswith('course_lib') and each in names "
        "or folder.rstrip('/').endswith(('/solutions', '/exercises')) and 'course' in folder]"
    )
    with contextlib.closing(sandbox.child()) as child:
        assert run(child, f"import os; names = {names!r}").get("ok")
        assert run(child, "course = list(os.walk('/course'))").get("ok")
        assert value(child, "len(course) > 2") is True
        assert value(child, search) == []
        for name in sorted(names):
            reply = run(child, f"import course_lib.{name}")
            assert reply["error"]["type"] == "ModuleNotFoundError"
        assert run(child, "from course_lib.runtime.tile import tl, triton").get("ok")


@needs_bwrap
def test_an_installed_course_is_masked_and_its_neighbours_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "lib" / "site-packages"
    for name in ("course_lib", "neighbour"):
        (packages / name / "exercises").mkdir(parents=True)
        (packages / name / "exercises" / "__init__.py").write_text("answer = 42")
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(0o755)
    monkeypatch.setattr("sys.path", [*os.sys.path, str(packages)])
    module._mounts.cache_clear()
    try:
        with Sandbox() as made, contextlib.closing(made.child()) as child:
            assert value(child, f"__import__('os').listdir({str(packages / 'course_lib')!r})") == []
            assert run(child, f"import sys; sys.path.append({str(packages)!r})").get("ok")
            assert run(child, "import neighbour.exercises").get("ok")
            assert "error" in run(child, "import course_lib.exercises")
    finally:
        module._mounts.cache_clear()


@needs_bwrap
def test_children_do_not_see_each_other(sandbox: Sandbox) -> None:
    with (
        contextlib.closing(sandbox.child()) as first,
        contextlib.closing(sandbox.child()) as second,
    ):
        written = 0
        for place in ("/tmp/left", "/dev/shm/left"):
            # /tmp cannot be written to where the course's own environment stands in it.
            written += bool(run(first, f"open({place!r}, 'w').write('for my friend')").get("ok"))
            assert run(second, f"open({place!r})")["error"]["type"] == "FileNotFoundError"
        assert written == (2 if module._environment("cpu")["TMPDIR"] == "/tmp" else 1)
        assert "error" in run(first, "open('/dev/left', 'w')")


@needs_bwrap
def test_killing_a_child_ends_all_that_it_started(sandbox: Sandbox) -> None:
    child = sandbox.child()
    daemon = "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(1000)"
    assert run(child, daemon).get("ok")
    everybody = child.tree()
    assert len(everybody) == 2
    child.close()
    # What is dead already may wait a moment for the one that asks how it ended.
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}").exists() for pid in everybody):
        assert time.monotonic() < deadline, "something is left"
        time.sleep(0.01)


@needs_bwrap
def test_how_it_ended_is_told(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in {sandbox.start, "cold"}:
        monkeypatch.setattr(sandbox, "start", start)
        for source, words in (("os._exit(3)", "exit code 3"), ("ctypes.string_at(0)", "SIGSEGV")):
            with contextlib.closing(sandbox.child()) as child:
                with pytest.raises(wire.Closed):
                    run(child, f"import os, ctypes\n{source}")
                assert words in child.how_it_ended()


@needs_bwrap
def test_a_limit_set_from_outside_cannot_be_raised(sandbox: Sandbox) -> None:
    import resource

    with contextlib.closing(sandbox.child()) as child:
        child.limit(resource.RLIMIT_DATA, child.baseline[0] + (64 << 20))
        assert run(child, "x = bytearray(200 << 20)")["error"]["type"] == "MemoryError"
        more = "import resource\nresource.setrlimit(resource.RLIMIT_DATA, (1 << 40, 1 << 40))"
        assert "error" in run(child, more)
        assert run(child, "x = bytearray(8 << 20)").get("ok")


# The self-test.


def weakened(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, change) -> str:
    """What the self-test says when bwrap's command was changed."""
    build = Sandbox._bwrap_command

    def changed(self, *args, **kwargs) -> list[str]:
        command = build(self, *args, **kwargs)
        return change(command)

    monkeypatch.setattr(sandbox, "start", "cold")
    monkeypatch.setattr(Sandbox, "_bwrap_command", changed)
    with pytest.raises(SandboxError) as error:
        sandbox.self_test()
    return str(error.value)


@needs_bwrap
def test_the_self_test_notices_readable_secrets_and_a_network(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(command: list[str]) -> list[str]:
        at = command.index("--remount-ro")  # afterwards nothing can be made in /tmp
        scratch = str(sandbox._scratch)
        shown = ["--share-net", "--ro-bind", scratch, scratch]
        return [*command[:at], *shown, *command[at:]]

    said = weakened(sandbox, monkeypatch, change)
    assert "read a planted file" in said
    assert "connect to a socket of the host" in said
    assert "share the net namespace" in said or os.geteuid() != 0


@needs_bwrap
def test_the_self_test_notices_a_writable_view_and_user_namespaces(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(command: list[str]) -> list[str]:
        kept = [each for each in command if each != "--disable-userns"]
        at = next(i for i, each in enumerate(kept) if each == "--remount-ro" and kept[i + 1] == "/")
        del kept[at : at + 2]
        return kept

    said = weakened(sandbox, monkeypatch, change)
    assert "write into /" in said
    assert "make a user namespace" in said


@needs_bwrap
def test_the_self_test_notices_missing_limits(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Sandbox, "_set_limits", lambda self, child: None)
    with pytest.raises(SandboxError) as error:
        sandbox.self_test()
    for what in ("allocate past", "write a file past", "raise a limit", "start processes past"):
        assert what in str(error.value)


# Levels.


@needs_bwrap
def test_where_nested_namespaces_are_refused_children_start_cold(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(self) -> Child:
        raise SandboxError("nested namespaces are refused: unshare: Operation not permitted")

    monkeypatch.setattr(Sandbox, "_warm_child", refused)
    with Sandbox() as made:
        assert (made.level, made.start) == ("bwrap", "cold")
        assert "nested namespaces are refused" in made.why_cold


def test_without_bubblewrap_there_is_no_official_grade(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match="bubblewrap is not installed"):
        Sandbox()


def test_a_weak_sandbox_is_asked_for_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with Sandbox(allow_weak=True) as weak:
        assert (weak.level, weak.start) == ("rlimits", "cold")
        scratch = weak._scratch
        with contextlib.closing(weak.child()) as child:
            assert run(child, "from course_lib.runtime.tile import tl").get("ok")
            assert run(child, "import course_lib.start_here")["error"]["type"] == (
                "ModuleNotFoundError"
            )
            assert run(child, "x = bytearray(20 << 30)")["error"]["type"] == "MemoryError"
    assert not scratch.exists()


def test_a_device_is_one_of_two() -> None:
    with pytest.raises(SandboxError, match="'tpu'; expected 'cpu' or 'cuda'"):
        Sandbox(device="tpu")


@needs_bwrap
def test_a_gpu_is_shown_by_its_device_nodes(sandbox: Sandbox, tmp_path: Path) -> None:
    """Without a GPU the command can be looked at, and no more."""
    nodes = {"dev": tmp_path / "nvidia0"}
    nodes["dev"].touch()
    command = module.device_arguments("cuda", tmp_path)
    assert ["--dev-bind", str(nodes["dev"]), str(nodes["dev"])] == command[:3]
    assert command[3:] == ["--ro-bind", "/sys", "/sys"]
    assert module.device_arguments("cpu", tmp_path) == []
