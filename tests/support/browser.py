"""A real browser without a window, over the DevTools protocol on a pipe: nothing but the standard library."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = """--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking
--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars --remote-debugging-pipe""".split()
# In the page: every image with its natural width, and how much wider than the window the page is.
_INSPECT = """({
  images: [...document.images].map(i => [i.alt, i.complete ? i.naturalWidth : 0]),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  paper: getComputedStyle(document.body).backgroundColor,
  text: document.body.innerText,
  title: document.title,
})"""


def find() -> str | None:
    """The path of a browser, None where there is none."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A browser process; `open` shows a file and gives what there is to know of the page."""

    def __init__(self, path: str, profile: Path, timeout: float = 60) -> None:
        self._timeout, self._number, self._buffer = timeout, 0, b""
        self._events: list[dict] = []
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        # The browser reads descriptor 3 and writes 4; the shell puts them there, from numbers that cannot collide.
        theirs = [fcntl.fcntl(number, fcntl.F_DUPFD, 10) for number in (to_read, to_write)]
        command = 'exec "$@" 3<&{} 4>&{}'.format(*theirs)
        self._process = subprocess.Popen(
            ["bash", "-c", command, "bash", path, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for number in (to_read, to_write, *theirs):
            os.close(number)
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def open(self, file: Path, *, width: int = 1200, dark: bool = False, shot: Path | None = None) -> dict:
        """What `_INSPECT` finds in `file`, and errors: messages of the console and exceptions; requests: URLs asked for
        beyond the file itself and data: URLs. shot: where to put a PNG of the whole page."""
        self._call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[theme])
        self._events.clear()
        url = file.resolve().as_uri()
        self._call("Page.navigate", url=url)
        self._until("Page.loadEventFired")
        self._call(
            "Runtime.evaluate",
            awaitPromise=True,
            expression="Promise.all([...document.images].map(i => i.decode().catch(() => 0)))",
        )
        page = self._call("Runtime.evaluate", expression=_INSPECT, returnByValue=True)["result"]["value"]
        if shot is not None:
            data = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
            shot.write_bytes(base64.b64decode(data))
        asked = [e["params"]["request"]["url"] for e in self._events if e["method"] == "Network.requestWillBeSent"]
        page["requests"] = [name for name in asked if name != url and not name.startswith("data:")]
        page["errors"] = [
            json.dumps(event["params"])
            for event in self._events
            if event["method"] in ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")
        ]
        return page

    def close(self) -> None:
        try:
            self._send("Browser.close")
            self._process.wait(10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        os.close(self._read)
        os.close(self._write)

    def _send(self, method: str, **parameters) -> int:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._write, data) :]
        return self._number

    def _call(self, method: str, **parameters) -> dict:
        number = self._send(method, **parameters)
        deadline = time.monotonic() + self._timeout
        while True:
            message = self._receive(deadline, method)
            if message.get("id") == number:
                if "error" in message:
                    raise RuntimeError(f"{method}: {message['error']}")
                return message["result"]
            self._events.append(message)

    def _until(self, event: str) -> None:
        deadline = time.monotonic() + self._timeout
        while not any(e.get("method") == event for e in self._events):
            self._events.append(self._receive(deadline, event))

    def _receive(self, deadline: float, waiting_for: str) -> dict:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._read, 1 << 20) if ready else b""
            if not data:
                how = "has ended" if ready else f"is silent for {self._timeout} s"
                raise RuntimeError(f"the browser {how}, waiting for {waiting_for}")
            self._buffer += data
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)
