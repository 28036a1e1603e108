"""Sets limits of running processes as the ordinary user they belong to.

Run as a script by `sandbox.py` when the grader is root: in a container, root often may not change
the limits of another user's processes, and that user may. It reads one JSON list a line on its
input ([pid, limit, most]) and answers each with "ok" or with what was wrong.
"""

from __future__ import annotations

import json
import os
import resource
import sys


def set_limit(pid: int, which: int, most: int) -> None:
    """Lower a process's soft and hard limit; a lower hard limit stays.

    Raises:
        OSError: If the process is gone or not ours.
    """
    hard = resource.prlimit(pid, which)[1]
    if hard != resource.RLIM_INFINITY:
        most = min(most, hard)
    resource.prlimit(pid, which, (most, most))


def main() -> None:
    """Become the user in the first argument, and answer lines until there are no more."""
    uid = int(sys.argv[1])
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for line in sys.stdin:
        try:
            set_limit(*json.loads(line))
            answer = "ok"
        except OSError as error:
            answer = str(error)
        print(answer, flush=True)


if __name__ == "__main__":
    main()
