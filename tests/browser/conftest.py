"""A real JupyterLab, a real Chromium, and no way out of this machine."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test of this folder is a browser test; without Chromium it is skipped, never in CI."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason="no Chromium: apt-get install chromium"))


class LabPage:
    """A notebook open in JupyterLab. Requests to anywhere but loopback are refused and kept."""

    def __init__(self, page, outside: list[str]) -> None:
        self.page, self.outside = page, outside

    def run_all(self, timeout: float = 120.0) -> None:
        """Run every cell and wait until the kernel is idle again."""
        self.page.locator(".jp-StatusBar-Widget").get_by_text("| Idle").wait_for(timeout=60_000)
        for _ in range(3):
            self._click_run_all()
            # On a slow machine Lab may still ask which kernel to use, and then runs nothing.
            self.page.wait_for_timeout(1500)
            if not self.page.locator(".jp-Dialog .jp-mod-accept").count():
                break
            self.page.locator(".jp-Dialog .jp-mod-accept").click()
            self.page.wait_for_timeout(3000)
        self.page.wait_for_function(
            "() => !document.title.startsWith('(Busy)') && "
            "[...document.querySelectorAll('.jp-InputPrompt')]"
            ".every(p => !p.textContent.includes('*'))",
            timeout=timeout * 1000,
        )

    def _click_run_all(self) -> None:
        self.page.keyboard.press("Escape")
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()

    def errors(self) -> list[str]:
        """The text of every red output."""
        stderr = '[data-mime-type="application/vnd.jupyter.stderr"]'
        error = '.jp-RenderedText[data-mime-type*="error"]'
        return self.page.locator(f"{stderr}, {error}").all_inner_texts()

    def lab(self, name: str):
        """The lab with this name."""
        return self.page.locator(f'.course-lab[data-lab="{name}"]')

    def screenshot(self, path: Path, locator=None) -> Path:
        """A picture of the page, or of one part of it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        (locator or self.page).screenshot(path=path)
        return path


@contextmanager
def jupyter_lab(root: Path, settings: Path) -> Iterator[str]:
    """JupyterLab on a free loopback port, serving `root`; gives its address with the token."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "COURSE_HOME": str(settings / "home"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings),
        # Otherwise the tabs of whoever works here would open as well; `reset` closes our own.
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
    }
    news = settings / "@jupyterlab" / "apputils-extension"
    news.mkdir(parents=True, exist_ok=True)
    (news / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"]
    command += ["--ip=127.0.0.1", "--IdentityProvider.token=t", f"--notebook-dir={root}"]
    server = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=t", timeout=1).close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail("JupyterLab did not start within 30 s")
        yield f"http://127.0.0.1:{port}/lab/tree/{{path}}?token=t&reset"
    finally:
        server.terminate()
        server.wait(timeout=20)


@contextmanager
def open_notebook(
    address: str, path: str, theme: str = "light", width: int = 1280
) -> Iterator[LabPage]:
    """Open a notebook in a fresh browser, in a theme."""
    from playwright.sync_api import sync_playwright

    outside: list[str] = []

    def only_loopback(route) -> None:
        if route.request.url.startswith(("http://127.0.0.1", "data:", "blob:")):
            route.continue_()
        else:
            outside.append(route.request.url)
            route.abort()

    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        page = browser.new_page(viewport={"width": width, "height": 1000})
        page.route("**/*", only_loopback)
        page.goto(address.format(path=path))
        page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=60_000)
        page.wait_for_selector(
            '.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=60_000
        )
        if theme == "dark":
            page.get_by_role("menuitem", name="Settings", exact=True).click()
            page.get_by_text("Theme", exact=True).first.hover()
            page.get_by_text(THEMES[theme], exact=True).click()
            page.wait_for_function("() => document.body.dataset.jpThemeLight === 'false'")
        try:
            yield LabPage(page, outside)
        finally:
            browser.close()


@pytest.fixture(scope="session")
def lab_address(tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A JupyterLab over an empty folder: its address and the folder."""
    root = tmp_path_factory.mktemp("notebooks")
    with jupyter_lab(root, tmp_path_factory.mktemp("settings")) as address:
        yield address, root
