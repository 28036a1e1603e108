"""The last trusted steps before the sandbox: reach what it needs, become nobody, start bwrap.

Run as a script by `sandbox.py` (`python -I -S launcher.py SPEC`), never imported by it; it needs
the standard library alone. As root it takes an ordinary user's id *before* bwrap starts: a child
of a bwrap that root started reads every file and is stopped by no process limit.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys

_CLONE_NEWNS = 0x00020000
_MS_BIND, _MS_REC, _MS_PRIVATE = 0x1000, 0x4000, 0x40000


def main() -> None:
    """Follow the specification in the first argument, and become its command.

    It is JSON: `argv`; `uid` to become, or null; `stage`, a list of [path, name] to show at
    `stage_at`/name, for paths that the ordinary user cannot reach; `close_fds`.
    """
    spec = json.loads(sys.argv[1])
    if spec["stage"]:
        _stage(spec["stage"], spec["stage_at"])
    if spec["uid"] is not None:
        uid = spec["uid"]
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        if os.getuid() == 0 or os.geteuid() == 0:
            raise SystemExit("root could not be given up")
    os.umask(0o077)
    os.execv(spec["argv"][0], spec["argv"])


def _stage(paths: list[list[str]], stage: str) -> None:
    """Show paths below a directory that everybody reaches, in a mount namespace of our own."""
    libc = ctypes.CDLL(None, use_errno=True)
    _check(libc.unshare(_CLONE_NEWNS), "unshare")
    _check(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "private mounts")
    _check(libc.mount(b"tmpfs", stage.encode(), b"tmpfs", 0, b"mode=755,size=1m"), "tmpfs")
    for source, name in paths:
        target = os.path.join(stage, name)
        if os.path.isdir(source):
            os.mkdir(target)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
        bound = libc.mount(source.encode(), target.encode(), None, _MS_BIND | _MS_REC, None)
        _check(bound, f"bind of {source}")


def _check(failed: int, what: str) -> None:
    if failed:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main()
