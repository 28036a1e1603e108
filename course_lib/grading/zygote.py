"""Runs inside the sandbox: imports torch once, and forks a separate child for each submission.

Each child gets namespaces of its own (user, mounts, processes, network, IPC, host name, cgroup) in
which it is process 1, its own /proc, /tmp and /dev/shm, no capability, and no way back. The zygote
itself never runs a line of a submission, and holds nothing that a submission may not know.

Only Linux's system calls and the standard library are used for this, since Python 3.11 has no
`os.unshare`.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import gc
import json
import os
import signal
import socket
import sys

_NAMESPACES = (
    0x10000000  # user
    | 0x00020000  # mounts
    | 0x20000000  # processes
    | 0x40000000  # network
    | 0x08000000  # IPC
    | 0x04000000  # host name
    | 0x02000000  # cgroup
)
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x8, 0x4000, 0x40000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 1, 4, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 38, 47, 4
_CAPABILITY_VERSION_3 = 0x20080522
_LAST_CAPABILITY = 63

_libc = ctypes.CDLL(None, use_errno=True)


def serve(control: socket.socket) -> None:
    """Fork a child for every request until the other side closes.

    A request is one byte with two sockets: for the worker's frames, and for reports on the child.
    """
    _import_everything()
    gc.collect()
    gc.freeze()
    # Children of the zygote only wait for their own child; the kernel may reap them.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    control.sendall(b"z")
    while True:
        fds, request = _receive_sockets(control)
        if not request:
            return
        child = os.fork()
        if child == 0:
            try:
                control.close()
                _supervise(*fds)
            finally:
                os._exit(1)
        for fd in fds:
            os.close(fd)


def _import_everything() -> None:
    import numpy  # noqa: F401
    import torch
    import torch.testing  # 0.6 s, and notebooks use it

    from course_lib.runtime.tile import HAS_TRITON

    # A fork keeps one thread. Workers of a pool that is already running would be missing.
    torch.set_num_threads(1)
    if HAS_TRITON:
        import course_lib.grading.compiles
        import course_lib.runtime.crosscompile
        import course_lib.runtime.executor
    import course_lib.grading.worker  # noqa: F401


def _receive_sockets(control: socket.socket) -> tuple[list[int], bytes]:
    fds = array.array("i")
    room = socket.CMSG_SPACE(2 * fds.itemsize)
    data, ancillary, *_ = control.recvmsg(1, room)
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
    return list(fds), data


def _supervise(data_fd: int, report_fd: int) -> None:
    """Between the zygote and the child: make the namespaces, hand out a pidfd, wait, report."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    report = socket.socket(fileno=report_fd)
    uid, gid = os.getuid(), os.getgid()
    try:
        _check(_libc.unshare(_NAMESPACES), "unshare")
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
        child = os.fork()
    except OSError as error:
        report.sendall(json.dumps({"failed": str(error)}).encode())
        return
    if child == 0:
        try:
            report.close()
            _enter()
            _run_worker(data_fd)
        finally:
            # Whatever happens, nothing below this frame may run on in the child.
            os._exit(1)
    os.close(data_fd)
    # The child cannot be reaped before we wait for it, so this pidfd means no other process.
    pidfd = os.pidfd_open(child)
    socket.send_fds(report, [b"p"], [pidfd])
    os.close(pidfd)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        report.sendall(json.dumps({"exit": os.waitstatus_to_exitcode(status)}).encode())
    report.close()
    os._exit(0)


def _enter() -> None:
    """As process 1 of the new namespaces: private mounts, no way to make more, no capabilities."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.setsid()
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "private mounts")
    _mount("proc", "/proc", _MS_NOSUID | _MS_NODEV | _MS_NOEXEC, "")
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    # /tmp, or /dev/shm where the interpreter's environment stands in /tmp.
    writable = os.environ["TMPDIR"]
    for place, size in {"/dev/shm": 16, writable: 64}.items():
        options = f"mode=700,size={size}m,nr_inodes=10000"
        _mount("tmpfs", place, _MS_NOSUID | _MS_NODEV, options)
    os.chdir(writable)
    _check(_libc.sethostname(b"grader", 6), "host name")
    _drop_capabilities()
    # Without it a process of the same user id outside could be asked to trace this one.
    _prctl(_PR_SET_DUMPABLE, 0)


def _mount(kind: str, target: str, flags: int, options: str) -> None:
    _check(
        _libc.mount(kind.encode(), target.encode(), kind.encode(), flags, options.encode()),
        f"mount {target}",
    )


def _drop_capabilities() -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    for capability in range(_LAST_CAPABILITY + 1):
        # The kernel knows fewer than 64; it says so for the others.
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    _check(_libc.capset(header, nothing), "capset")


def _run_worker(data_fd: int) -> None:
    from course_lib.grading import worker

    gc.unfreeze()
    worker.serve(socket.socket(fileno=data_fd))
    os._exit(0)


def _prctl(option: int, value: int) -> None:
    _check(_libc.prctl(option, value, 0, 0, 0), f"prctl {option}")


def _check(failed: int, what: str) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def main() -> None:
    """`python -c "…main()" warm|cold FD`: serve as the zygote, or as one worker."""
    kind, fd = sys.argv[1], int(sys.argv[2])
    sock = socket.socket(fileno=fd)
    if kind == "warm":
        serve(sock)
    else:
        import torch

        from course_lib.grading import worker

        torch.set_num_threads(1)
        worker.serve(sock)
