"""A call in a process of its own, which ends with the process that started it, however that ended.

The call, its progress and its result go through a folder; what it prints goes where its starter's does.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evolve import snapshot
from evolve.config import ConfigError
from evolve.store import ended, this_process

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL")  # what a process says when another dies
GROUP = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class Died(RuntimeError):
    """The process ended with no error of its own."""


class Call:
    """`function(*arguments, progress)` in a process of its own, or in several that `launcher` starts in Python's place.

    The function is one of a module's, its arguments can be pickled, its result is JSON; of several processes the first
    one's counts. scratch: a folder that all of them see, where they don't share this machine's.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: Sequence[Any],
        *,
        launcher: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        scratch: Path | None = None,
    ):
        self._several = bool(launcher)
        self._scratch = tempfile.TemporaryDirectory(prefix=".call-", dir=scratch)
        self._folder = Path(self._scratch.name)
        (self._folder / "call").write_bytes(pickle.dumps((function, tuple(arguments), this_process())))
        # A cluster's launcher, or this process's own, may have left word of a group that this one is not part of.
        inherited = {name: value for name, value in os.environ.items() if launcher or name not in GROUP}
        self._process = subprocess.Popen(
            [*(launcher or [sys.executable]), "-m", "evolve.processes", str(self._folder)],
            env={**inherited, **snapshot.environment(), **(environment or {})},
            start_new_session=True,
        )

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    @property
    def progress(self) -> tuple[int, int] | None:
        """(done, total), once there is some."""
        try:
            done, total = json.loads((self._folder / "progress").read_text())
        except FileNotFoundError:
            return None
        return done, total

    def result(self) -> Any:
        """What the function returned. Raises ValueError or RuntimeError with its error's text, or Died."""
        errors = sorted(self._folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        found = json.loads(errors[0].read_text()) if errors else {}
        text = found.get("text", "")
        result = self._folder / "result"
        died = self._process.returncode or not result.exists()  # srun ends with 0 where it could start nothing
        if died and (not text or (self._several and any(sign in text for sign in PEER_GONE))):
            raise Died("it ended with no error of its own (out of memory?)")
        if text:
            raise (ValueError if found["known"] else RuntimeError)(text)
        return json.loads(result.read_text())

    def stop(self) -> None:
        """Ends it and all that it started. Safe to call again."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._scratch.cleanup()


def _follow(starter: Mapping[str, Any]) -> None:
    while not ended(starter):
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)  # the launcher and what libraries have started, too


def main() -> None:
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm tells all of a job's processes to go; its starter sees to it
    folder, rank = Path(sys.argv[1]), int(os.environ.get("RANK", 0))
    function, arguments, starter = pickle.loads((folder / "call").read_bytes())
    threading.Thread(target=_follow, args=(starter,), daemon=True).start()
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if rank == 0 and (done == total or time.monotonic() - last > 0.2):
            last = time.monotonic()
            (folder / "progress.new").write_text(json.dumps([done, total]))
            (folder / "progress.new").rename(folder / "progress")

    try:
        result = function(*arguments, progress)
    except Exception as error:
        traceback.print_exc()
        known = isinstance(error, ValueError | ConfigError)
        text = f"{error}" or type(error).__name__
        (folder / f"error-{rank}.new").write_text(json.dumps({"text": text, "known": known}))
        (folder / f"error-{rank}.new").rename(folder / f"error-{rank}")
        raise
    if rank == 0:
        (folder / "result").write_text(json.dumps(result))
    # The call is over. Libraries' threads have been seen to abort the interpreter while it ends.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
