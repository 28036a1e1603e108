"""JupyterLab for a learner: on loopback, with a token, quiet, and open on the first notebook."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import webbrowser
from collections.abc import Callable
from pathlib import Path

HOST = "127.0.0.1"
FIRST_PORT = 8888
READY_WITHIN = 90.0
SETTINGS = Path(__file__).resolve().parent / "lab_settings"


class ServerError(RuntimeError):
    """JupyterLab did not start. The message says why, as far as it is known."""


def free_port(wanted: int | None) -> int:
    """A free loopback port: the wanted one, or the first from 8888 on.

    Raises:
        ServerError: If the wanted port, or every one of a hundred, is taken.
    """
    candidates = [wanted] if wanted is not None else range(FIRST_PORT, FIRST_PORT + 100)
    for port in candidates:
        with socket.socket() as probe:
            # As the server does: a port in TIME_WAIT is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except PermissionError:
                raise ServerError(f"Port {port} needs administrator rights.") from None
            except OSError:
                continue
            return port
    if wanted is not None:
        raise ServerError(f"Port {wanted} is taken. Choose another with --port.")
    raise ServerError(f"Ports {FIRST_PORT} to {FIRST_PORT + 99} are all taken. Use --port.")


def _say(line: str) -> None:
    """Print at once, also where the output goes to a file."""
    print(line, flush=True)


def serve(
    work: Path,
    start: str,
    *,
    port: int | None = None,
    browser: bool = True,
    say: Callable[[str], None] = _say,
) -> int:
    """Run JupyterLab on the learner's folder until Ctrl-C.

    Args:
        work: The learner's folder.
        start: The notebook to open, inside `work`.
        port: The port, or None for the first free one.
        browser: Whether to open a browser.
        say: Gets what the learner reads.

    Returns:
        The exit code.

    Raises:
        ServerError: If it does not start.
    """
    port = free_port(port)
    token = secrets.token_urlsafe(24)
    log = work / ".jupyter.log"
    environment = {
        **os.environ,
        # By environment and not by argument: arguments show in everybody's process list.
        "JUPYTER_TOKEN": token,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser"),
        f"--ServerApp.ip={HOST}",
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={work}",
        f"--LabApp.app_settings_dir={SETTINGS}",
    ]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        command.append("--ServerApp.allow_root=True")
    url = f"http://{HOST}:{port}/lab/tree/{start}?token={token}"
    with log.open("w", encoding="utf-8") as sink:
        server = subprocess.Popen(command, env=environment, cwd=work, stdout=sink, stderr=sink)
    # `kill` and a closed terminal must end JupyterLab and its kernels too.
    for number in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, number):
            signal.signal(getattr(signal, number), _stop)
    try:
        _wait(server, port, token, log)
        say(f"JupyterLab is ready:\n\n    {url}\n\nYour notebooks are in {work}. Ctrl-C ends it.")
        if browser and not webbrowser.open(url):
            say("No browser opened by itself: open the address above.")
        return server.wait()
    except KeyboardInterrupt:
        say("\nClosing. Your work is saved where you left it.")
        return 0
    finally:
        _end(server)


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def _wait(server: subprocess.Popen[bytes], port: int, token: str, log: Path) -> None:
    """Wait until the server answers."""
    request = urllib.request.Request(
        f"http://{HOST}:{port}/api/status", headers={"Authorization": f"token {token}"}
    )
    # A proxy from the environment must not get a request for this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + READY_WITHIN
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerError(f"JupyterLab ended at once. It said:\n{_tail(log)}")
        try:
            opener.open(request, timeout=2).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise ServerError(f"JupyterLab did not answer in {READY_WITHIN:.0f} s. It said:\n{_tail(log)}")


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return "\n".join(f"    {line}" for line in lines[-12:]) + f"\nThe whole log: {log}"


def _end(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(timeout=10)
        except subprocess.TimeoutExpired:
            server.kill()
