"""A server that a command starts, for as long as an engine needs it; it ends with this process, however that ends."""

from __future__ import annotations

import contextlib
import http.client
import shlex
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from evolve.processes import Call


def run(words: Sequence[str], log: str, progress: Callable[[int, int], None]) -> int:
    """The server's parent: a Call, so that both end with who started it. Asked to end, it asks the server."""
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    return process.wait()


class Served:
    """`command`, run without a shell, with a model's folder for {model} and a free port for {port} in its words.

    Raises ValueError if there is no such command, RuntimeError with the last line of its log if the server ends before
    it is ready or isn't ready after `seconds`.
    """

    def __init__(self, command: str, model: Path, seconds: float, section: str = "engine"):
        self._section = section
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = str(found.getsockname()[1])
        words = [word.replace("{model}", str(model)).replace("{port}", port) for word in shlex.split(command)]
        if shutil.which(words[0]) is None:
            raise ValueError(f"{section}.serve: no such command here: {words[0]}; install it, or give its whole path")
        self.url = f"http://127.0.0.1:{port}/v1"
        self._scratch = tempfile.TemporaryDirectory()
        self._log = Path(self._scratch.name) / "log"
        self._call = Call(run, (words, str(self._log)))
        print(f"waiting for {self.url}/models, log {self._log}: {shlex.join(words)}", flush=True)
        try:
            self._wait(seconds)
        except BaseException:
            self.close()
            raise
        print(f"{self.url} is ready", flush=True)

    def _wait(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while not self._ready():
            if self.ended:
                raise RuntimeError(
                    f"{self._section}.serve: its server ended before it was ready; its last line: {self.last_line}"
                )
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"{self._section}.serve: its server isn't ready after {self._section}.timeout={seconds:g} s; its "
                    f"last line: {self.last_line}"
                )
            time.sleep(0.5)

    def _ready(self) -> bool:
        """Whether it answers requests; that it has no list of models, or wants a key, is an answer too."""
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(f"{self.url}/models", timeout=5).close()
        except urllib.error.HTTPError as error:
            return error.code < 500
        except (OSError, http.client.HTTPException):
            return False
        return True

    @property
    def ended(self) -> bool:
        return not self._call.running

    @property
    def last_line(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
            return next((line.strip() for line in reversed(lines) if line.strip()), "(nothing)")
        return "(nothing)"

    def close(self) -> None:
        """Ends it with all its children; what it has said goes to the stage's log."""
        self._call.stop()
        with contextlib.suppress(FileNotFoundError):
            print(self._log.read_text(encoding="utf-8", errors="replace"), flush=True)
        self._scratch.cleanup()
