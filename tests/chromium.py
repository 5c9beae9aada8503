"""A headless Chromium, driven through its debugging pipe (Chrome DevTools Protocol), to see what a page does."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

FOUND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEYS = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowUp": 38, "ArrowDown": 40, "ArrowLeft": 37, "ArrowRight": 39}


class Page:
    """One page. `complaints`: what it wrote to the console, threw or was forbidden; `asked`: URLs that it wanted."""

    def __init__(self, into: Any, out: Any):
        self._into, self._out, self._number, self._session = into, out, 0, None
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self._loaded = False
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Calls a method of the protocol and returns its result. Raises RuntimeError with what Chromium says."""
        self._number += 1
        call = {"id": self._number, "method": method, "params": parameters}
        self._into.write(json.dumps(call | ({"sessionId": self._session} if self._session else {})).encode() + b"\0")
        self._into.flush()
        while (news := self._next()).get("id") != self._number:
            pass
        if "error" in news:
            raise RuntimeError(f"{method}: {news['error']}")
        return dict(news["result"])

    def _next(self) -> dict[str, Any]:
        read = bytearray()
        while (byte := self._out.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("Chromium has ended")
            read += byte
        news: dict[str, Any] = json.loads(read)
        method, about = news.get("method"), news.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.complaints.append(str(about["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(about["args"]))
        elif method == "Log.entryAdded":
            self.complaints.append(about["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.asked.append(about["request"]["url"])
        elif method == "Page.loadEventFired":
            self._loaded = True
        return news

    def open(self, url: str) -> None:
        self._loaded = False
        self.send("Page.navigate", url=url)
        while not self._loaded:
            self._next()

    def look(self, width: int, height: int, **media: str) -> None:
        """The window's size in CSS pixels; media features by name (prefers_color_scheme="dark"), or media="print"."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        kind = media.pop("media", "")
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.send("Emulation.setEmulatedMedia", media=kind, features=features)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression, a promise's once it is there. Raises RuntimeError where it throws."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def press(self, key: str) -> None:
        about = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]} | (
            {"text": "\r"} if key == "Enter" else {}
        )
        self.send("Input.dispatchKeyEvent", type="keyDown", **about)
        self.send("Input.dispatchKeyEvent", type="keyUp", **about)

    def picture(self, path: Path, clip: Mapping[str, float] | None = None) -> None:
        more = {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True} if clip else {}
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", **more)["data"]))


@contextlib.contextmanager
def page() -> Iterator[Page]:
    """A fresh browser with one page. Needs FOUND."""
    assert FOUND is not None
    pipes = [os.pipe(), os.pipe()]  # what it reads, and what it writes
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (pipes[0][0], pipes[1][1])]

    def place() -> None:
        os.dup2(theirs[0], 3)  # where Chromium looks for them
        os.dup2(theirs[1], 4)

    with TemporaryDirectory() as profile:
        command = [FOUND, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
        command += [f"--user-data-dir={profile}", "--disable-background-networking", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, pass_fds=(3, 4), preexec_fn=place, **quiet)
        for end in (pipes[0][0], pipes[1][1], *theirs):
            os.close(end)
        with os.fdopen(pipes[0][1], "wb") as into, os.fdopen(pipes[1][0], "rb") as out:
            made = Page(into, out)
            try:
                yield made
            finally:
                made.send("Browser.close")
                process.wait(30)
