"""A JupyterLab of its own, driven in headless Chromium: ready means ready, and every error in the page is noted."""

from __future__ import annotations

import contextlib
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

import pytest
from playwright.sync_api import Error, Page, sync_playwright

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# The idle badge is not enough: a cell that is run before the session is connected is dropped without an error. And what is awaited
# may belong to a widget that is being replaced, and never come: so each look ends by itself, and looks again.
READY = """() => Promise.race([new Promise(done => setTimeout(() => done(false), 2000)), (async () => {
  const app = window.jupyterapp; if (!app) return false;
  await app.restored;
  const panel = app.shell.currentWidget, session = panel?.sessionContext; if (!session) return false;
  await panel.context.ready; await session.ready;
  const kernel = session.session?.kernel; if (!kernel) return false;
  await kernel.info;
  return kernel.connectionStatus === 'connected' && kernel.status === 'idle';
})()])"""
RUN = """i => Promise.race([new Promise(done => setTimeout(() => done(false), 120000)), (async () => {
  const app = window.jupyterapp, notebook = app.shell.currentWidget.content;
  notebook.activeCellIndex = i;
  return await app.commands.execute('notebook:run-cell');
})()])"""


class Lab:
    """One page of JupyterLab; `errors` are those of the page and its console."""

    def __init__(self, page: Page, base: str, token: str) -> None:
        self.page, self._base, self._token = page, base, token
        self.errors: list[str] = []
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: self.errors.append(f"page error: {e}"))

    def open(self, name: str) -> int:
        """Open a notebook and wait for its kernel; how many cells it has."""
        self.page.goto(f"{self._base}/lab/tree/{name}?reset&token={self._token}")  # a workspace of its own
        self.ready()
        return int(self.page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length"))

    def ready(self) -> None:
        """Wait until the notebook in front has a kernel that is idle."""
        end = time.monotonic() + 60
        while True:
            try:
                if self.page.evaluate(READY):
                    break
            except Error as error:
                if "Execution context" not in str(error):  # the page is still being replaced
                    raise
            assert time.monotonic() < end, "JupyterLab was not ready within 60 s"
            self.page.wait_for_timeout(50)

    def run(self, cell: int) -> bool:
        """Run a cell to its end; whether it succeeded."""
        return bool(self.page.evaluate(RUN, cell))

    def text(self, cell: int) -> str:
        """What the cell shows."""
        js = "i => window.jupyterapp.shell.currentWidget.content.widgets[i].node.innerText"
        return str(self.page.evaluate(js, cell))


def chromium() -> str:
    """Where Chromium is; without it the test is skipped, or fails in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        text = "no Chromium: install it (apt-get install chromium)"
        pytest.fail(text) if os.environ.get("CI") == "true" else pytest.skip(text)
    return str(found)


@contextlib.contextmanager
def lab(root: pathlib.Path, scratch: pathlib.Path) -> Iterator[Lab]:
    """JupyterLab on the notebooks in `root`, with settings of its own in `scratch`."""
    browser_path, token = chromium(), secrets.token_hex(16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    names = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR")
    environment = {**os.environ, **{name: str(scratch / name.lower()) for name in names}}
    settings = scratch / "jupyter_config_dir" / "labconfig"
    settings.mkdir(parents=True)
    # The question whether to get news would cover the lower right corner of every screenshot.
    (settings / "page_config.json").write_text('{"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": true}}')
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command += [f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    base = f"http://127.0.0.1:{port}"
    with (scratch / "lab.log").open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _answers(f"{base}/api/status?token={token}", server, scratch / "lab.log")
            with sync_playwright() as playwright:
                browser = playwright.chromium.launch(executable_path=browser_path, headless=True, args=list(FLAGS))
                yield Lab(browser.new_page(viewport={"width": 1280, "height": 900}), base, token)
                browser.close()
        finally:
            server.send_signal(signal.SIGTERM)  # ends its kernels too
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()


def _answers(url: str, server: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(url, timeout=2).close()  # noqa: S310 - a server of this test, on loopback
            return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            assert server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < end, log.read_text()[-2000:]
            time.sleep(0.1)
