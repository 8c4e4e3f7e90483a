"""A real browser on a real JupyterLab: both on this machine, nothing else can be reached.

A test asks for the fixture `open_notebook`, gets a `Tab`, and drives it:

    def test_step(open_notebook):
        tab = open_notebook('tutorials/quick_start')       # under nbs/; or a notebook object made on the fly
        tab.run_all()
        tab.click('.betty-step')
        tab.wait_text('.betty-counter', 'step 1')
        tab.screenshot('quick_start')

Widgets get handles for the selectors by `widget.add_class('...')`. Screenshots go to the folder named by BETTY_NB_SHOTS, else to a temporary one."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

from tests.repo import ROOT, child_env, files

CHROMIUM = os.environ.get("BETTY_NB_CHROMIUM") or next(
    filter(None, map(shutil.which, ["chromium", "chromium-browser", "google-chrome"])), None
)
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
VIEWPORT = {"width": 1280, "height": 720}
START, WAIT = 120, 60  # seconds that a server may need to start, and a page to show something, on a busy machine
IDLE = "() => window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"


def settings(folder, subshells):
    "JupyterLab's user settings: no news, every cell in the page, and where widget messages go if `subshells` says so."
    chosen = {
        "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
        "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    }
    if subshells:
        chosen["@jupyterlab/apputils-extension/kernels-settings"] = {"commsOverSubshells": subshells}
    for plugin, values in chosen.items():
        f = folder / f"{plugin}.jupyterlab-settings"
        f.parent.mkdir(parents=True, exist_ok=True)
        f.write_text(json.dumps(values))


class Lab:
    "JupyterLab on localhost, serving a copy of nbs/, with settings and runtime files of its own."

    def __init__(self, home, subshells=None):
        self.root, self.log, self.token = home / "nbs", home / "lab.log", secrets.token_hex(16)
        for f in files():
            if ROOT / "nbs" not in f.parents:
                continue
            copy = home / f.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(f, copy)
        self.root.mkdir(exist_ok=True)
        settings(home / "settings", subshells)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.base = f"http://127.0.0.1:{port}"
        folders = dict(
            JUPYTER_CONFIG_DIR="config",
            JUPYTER_DATA_DIR="data",
            JUPYTER_RUNTIME_DIR="runtime",
            IPYTHONDIR="ipython",
            JUPYTERLAB_SETTINGS_DIR="settings",
            JUPYTERLAB_WORKSPACES_DIR="workspaces",
        )
        options = {
            "ServerApp.root_dir": self.root,
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": port,
            "ServerApp.port_retries": 0,
            "ServerApp.terminals_enabled": False,
            "IdentityProvider.token": self.token,
            "LabApp.expose_app_in_browser": True,
            "LabApp.extension_manager": "readonly",
            "LanguageServerManager.autodetect": False,
            "ZMQChannelsWebsocketConnection.iopub_data_rate_limit": 1e9,  # a test may open hundreds of widgets in a row
            "ZMQChannelsWebsocketConnection.iopub_msg_rate_limit": 1e6,
        }
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", *(f"--{k}={v}" for k, v in options.items())],
                env=child_env(**{k: str(home / v) for k, v in folders.items()}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.wait_until_up()

    def wait_until_up(self):
        end = time.monotonic() + START
        while True:
            try:
                return urllib.request.urlopen(f"{self.base}/api/status?token={self.token}", timeout=2).close()
            except OSError:
                if self.process.poll() is None and time.monotonic() < end:
                    time.sleep(0.1)
                else:
                    raise RuntimeError(f"JupyterLab does not start:\n{self.log.read_text()}") from None

    def url(self, notebook):
        return f"{self.base}/lab/tree/{notebook}?token={self.token}&reset"

    def close(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


class Tab:
    "A notebook open in JupyterLab; `page` is playwright's page for what is not here."

    def __init__(self, page, shots, root=None):
        self.page, self.shots, self.root = page, shots, root  # root: the folder in which the kernel runs

    def command(self, name, **args):
        "Run one of JupyterLab's commands and wait until it is done."
        return self.page.evaluate("([name, args]) => window.jupyterapp.commands.execute(name, args).then(() => null)", [name, args])

    def run_all(self, wait=True):
        "Run all cells; without `wait`, only start."
        if wait:
            self.command("notebook:run-all-cells")
        else:
            self.page.evaluate("() => { window.jupyterapp.commands.execute('notebook:run-all-cells') }")
        return self

    def run_cell(self, number):
        "Run one cell and wait until it is done."
        self.page.evaluate("i => { window.jupyterapp.shell.currentWidget.content.activeCellIndex = i }", number)
        self.command("notebook:run-cell")
        return self

    def errors(self):
        "The text of every error output in the notebook."
        return self.page.locator(
            '.jp-RenderedText[data-mime-type="application/vnd.jupyter.error"], .jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'
        ).all_inner_texts()

    def click(self, selector):
        self.page.locator(selector).first.click()

    def text(self, selector):
        return self.page.locator(selector).first.text_content()

    def wait_text(self, selector, text, seconds=WAIT):
        "Wait until the element shows `text`, a string it contains or a compiled pattern."
        from playwright.sync_api import expect

        expect(self.page.locator(selector).first).to_contain_text(text, timeout=1000 * seconds)
        return self.text(selector)

    def wait_change(self, selector, before, seconds=WAIT):
        "Wait until the element no longer shows the text `before`; its new text."
        from playwright.sync_api import expect

        expect(self.page.locator(selector).first).not_to_have_text(before, timeout=1000 * seconds)
        return self.text(selector)

    def show(self, selector):
        self.page.locator(selector).first.evaluate("e => e.scrollIntoView({block: 'start'})")

    def screenshot(self, name, selector=None):
        "Save what the window shows, or one element of it, as `name`.png; the file."
        f = self.shots / (re.sub(r"\.png$", "", str(name)) + ".png")
        f.parent.mkdir(parents=True, exist_ok=True)
        (self.page.locator(selector).first if selector else self.page).screenshot(path=f)
        print(f"screenshot {f}")
        return f

    def close(self):
        self.page.evaluate("() => window.jupyterapp.shell.currentWidget.sessionContext.shutdown()")
        self.page.close()


@pytest.fixture(scope="session")
def chrome(tmp_path_factory):
    "A headless Chromium that sees this machine only."
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium, or name the program in BETTY_NB_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("chromium"), executable_path=CHROMIUM, headless=True, args=FLAGS, viewport=VIEWPORT
        )
        context.set_default_timeout(1000 * WAIT)
        yield context
        context.close()


@pytest.fixture(scope="session")
def lab(request, tmp_path_factory):
    """JupyterLab. A test chooses JupyterLab's setting "Kernel Comms over subshells" by
    `@pytest.mark.parametrize('lab', ['perCommTarget', 'disabled'], indirect=True)`; without it, the default."""
    if not CHROMIUM:
        pytest.skip("no Chromium here: apt-get install chromium, or name the program in BETTY_NB_CHROMIUM")
    pytest.importorskip("jupyterlab")
    server = Lab(tmp_path_factory.mktemp("lab"), getattr(request, "param", None))
    yield server
    server.close()


@pytest.fixture
def open_notebook(lab, chrome, tmp_path):
    "A function that opens a notebook, a path under nbs/ or a notebook object, with a fresh kernel; its `Tab`."
    tabs, shots = [], Path(os.environ.get("BETTY_NB_SHOTS") or tmp_path).resolve()

    def open_(notebook):
        if not isinstance(notebook, (str, Path)):
            nbformat.write(notebook, lab.root / (made := f"made_{secrets.token_hex(4)}.ipynb"))
            notebook = made
        page = chrome.new_page()
        page.goto(lab.url(Path(notebook).with_suffix(".ipynb").as_posix()))
        page.wait_for_function(IDLE, timeout=1000 * START)
        tabs.append(Tab(page, shots, lab.root))
        return tabs[-1]

    yield open_
    for tab in tabs:
        tab.close()
