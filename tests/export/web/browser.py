"""Headless Chromium by the WebDriver protocol, in plain Python: what a person does with a page, and what it does."""

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # WebDriver's key of an element reference


def need(tool):
    """The tool's path; without it the test is skipped, and fails where everything must run."""
    path = shutil.which(tool)
    if path is None:
        (pytest.fail if os.environ.get("TINYMIM_REQUIRE_SHARED") else pytest.skip)(f"needs {tool}")
    return path


class Browser:
    """A session of chromedriver's."""

    def __init__(self, url, downloads):
        self.url, self.downloads = url, Path(downloads)

    def send(self, command, method="POST", **body):
        data = json.dumps(body).encode() if method == "POST" else None
        request = urllib.request.Request(self.url + command, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode()[:2000]) from error

    def open(self, url):
        self.send("/url", url=url)

    def find(self, selector):
        return self.send("/element", using="css selector", value=selector)[ELEMENT]

    def type(self, selector, text):
        """Keys into a field; a file's path into a file input, as choosing it does."""
        self.send(f"/element/{self.find(selector)}/value", text=str(text))

    def click(self, selector):
        self.send(f"/element/{self.find(selector)}/click")

    def js(self, script, *args):
        """The value of a script with ``return``; a promise is waited for."""
        return self.send("/execute/sync", script=script, args=list(args))

    def wait(self, script, seconds=90):
        """Until the script returns something true; return that."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.js(script):
                return value
            time.sleep(0.05)
        raise TimeoutError(f"{script}: status is {self.js('return document.body.innerText')}")

    def downloaded(self, name, seconds=30):
        """The path of a finished download."""
        end = time.monotonic() + seconds
        while not (self.downloads / name).is_file():
            assert time.monotonic() < end, list(self.downloads.iterdir())
            time.sleep(0.05)
        return self.downloads / name

    def dark(self):
        """As for a reader who prefers dark pages."""
        self.cdp("Emulation.setEmulatedMedia", features=[dict(name="prefers-color-scheme", value="dark")])

    def resize(self, width, height):
        """The viewport, phone widths too."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def cdp(self, command, **params):
        return self.send("/goog/cdp/execute", cmd=command, params=params)

    def console(self):
        """Warnings and errors of the page since the last call."""
        return [entry["message"] for entry in self.send("/se/log", type="browser")]

    def screenshot(self, path):
        metrics = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
        shot = self.cdp(
            "Page.captureScreenshot",
            captureBeyondViewport=True,
            clip=dict(x=0, y=0, width=metrics["width"], height=metrics["height"], scale=1),
        )
        Path(path).write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium():
    """A browser with an empty profile; ended by its own process id."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        downloads = Path(folder) / "downloads"
        downloads.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        driver = subprocess.Popen(
            [need("chromedriver"), f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        base = Browser(f"http://127.0.0.1:{port}", downloads)
        try:
            for _ in range(200):
                with contextlib.suppress(OSError):
                    if base.send("/status", method="GET")["ready"]:
                        break
                time.sleep(0.05)
            options = {
                "args": [*FLAGS, f"--user-data-dir={folder}/profile"],
                "binary": need("chromium"),
                "prefs": {"download.default_directory": str(downloads), "download.prompt_for_download": False},
            }
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = base.send("/session", capabilities={"alwaysMatch": wanted})["sessionId"]
            browser = Browser(f"{base.url}/session/{session}", downloads)
            yield browser
            browser.send("", method="DELETE")
        finally:
            driver.terminate()
            driver.wait()


@contextlib.contextmanager
def served(folder, headers=None):
    """``python -m http.server -d folder`` on a free port, in a thread: its URL and the paths asked for."""
    asked = []

    class Handler(SimpleHTTPRequestHandler):
        def end_headers(self):
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            super().end_headers()

        def log_message(self, form, *args):
            asked.append(str(args[0]))

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()
