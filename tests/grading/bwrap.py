"""Whether bubblewrap can be used here, for tests of the sandbox."""

from __future__ import annotations

import functools
import shutil
import subprocess


@functools.cache
def bwrap_works() -> bool:
    """It is installed, and the machine lets it make namespaces."""
    if shutil.which("bwrap") is None:
        return False
    command = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "--proc", "/proc", "true"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0
