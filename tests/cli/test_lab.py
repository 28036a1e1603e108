"""`course lab`: loopback, a token, no news, and an end that leaves nothing running."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from course_lib import cli
from course_lib.notebook.lab_server import SETTINGS, ServerError, free_port


def test_ports():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"Port {port} is taken"):
            free_port(port)
    assert 8888 <= free_port(None) < 8988


def test_a_taken_port_is_bad_input(capsys, monkeypatch, tmp_path: Path):
    monkeypatch.setattr("course_lib.notebook.workspace.workspace", lambda: tmp_path / "work")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert cli.main(["lab", "--no-browser", "--port", str(port)]) == 2
    assert f"Port {port} is taken" in capsys.readouterr().err


def test_the_server_that_a_learner_gets(tmp_path: Path):
    """Starts in under 10 s, wants its token, ships its settings, and ends with its parent."""
    code = (
        "import sys; from pathlib import Path\n"
        "from course_lib.notebook.lab_server import serve\n"
        "sys.exit(serve(Path(sys.argv[1]), '00_start_here.ipynb', browser=False, "
        "say=lambda line: print(line, flush=True)))"
    )
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        line = ""
        while "http" not in line:
            line = process.stdout.readline()
            assert line or process.poll() is None, "the server did not start"
        seconds = time.monotonic() - start
        match = re.search(
            r"http://127\.0\.0\.1:(\d+)/lab/tree/00_start_here.ipynb\?token=(\S+)", line
        )
        assert match
        base = f"http://127.0.0.1:{match[1]}"
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(f"{base}/api/contents", timeout=5)
        with urllib.request.urlopen(
            f"{base}/lab/api/settings?token={match[2]}", timeout=10
        ) as page:
            settings = json.load(page)["settings"]
        news = [s for s in settings if s["id"] == "@jupyterlab/apputils-extension:notification"]
        assert news[0]["schema"]["properties"]["fetchNews"]["default"] == "false"
        # Only this machine reaches it.
        address = socket.gethostbyname(socket.gethostname())
        if not address.startswith("127."):
            with socket.socket() as outside:
                outside.settimeout(1)
                assert outside.connect_ex((address, int(match[1]))) != 0
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=15)
        if process.stdout:
            process.stdout.close()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{base}/api", timeout=2)
    assert seconds < (10 if not os.environ.get("PYTEST_XDIST_WORKER") else 20)


def test_shipped_settings_turn_the_news_off():
    overrides = json.loads((SETTINGS / "overrides.json").read_text())
    assert overrides["@jupyterlab/apputils-extension:notification"]["fetchNews"] == "false"
