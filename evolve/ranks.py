"""A stage in several processes, one for each device of this machine: torchrun starts them, and all run the same code.

What the stage trains with finds its peers through torchrun's environment; the first process writes the results. The
processes end with the one that started them, however it ended.
"""

from __future__ import annotations

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
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evolve.config import ROOT
from evolve.stages import Context, module
from evolve.store import Report, Stage, ended, this_process

PEER_GONE = ("Connection closed by peer", "Connection reset by peer", "NCCL")  # what a process says when another dies


def run(stage: Stage, inputs: Mapping[str, Path], out: Path, context: Context, processes: int) -> Report:
    """The stage's own `run` in that many processes. Raises RuntimeError with the first error that one of them had."""
    if context.device == "cuda":
        import torch

        if torch.cuda.device_count() < processes:
            raise RuntimeError(f"trainer.devices={processes}: there are {torch.cuda.device_count()} GPUs here")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = (stage.kind, stage.config, dict(inputs), out, context.device, context.partial, this_process())
        (folder / "job").write_bytes(pickle.dumps(job))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        started = subprocess.Popen(
            [*command, "-m", "evolve.ranks", name], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
        )
        shown = ""
        try:
            while started.poll() is None:
                time.sleep(0.2)
                if (folder / "progress").exists() and (text := (folder / "progress").read_text()) != shown:
                    shown = text
                    context.progress(*json.loads(text))
        finally:
            started.terminate()
            try:
                started.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(started.pid, signal.SIGKILL)
                started.wait()
        errors = sorted(folder.glob("error-*"), key=lambda path: path.stat().st_mtime_ns)
        text = errors[0].read_text() if errors else ""
        if started.returncode and (not text or any(sign in text for sign in PEER_GONE)):
            raise RuntimeError(f"one of {processes} processes ended with no error of its own (out of memory?)")
        if text:
            raise RuntimeError(text)
        return Report(**json.loads((folder / "report").read_text()))


def _follow(starter: Mapping[str, Any]) -> None:
    while not ended(starter):
        time.sleep(1)
    os._exit(1)


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    kind, config, inputs, out, device, partial, starter = pickle.loads((folder / "job").read_bytes())
    threading.Thread(target=_follow, args=(starter,), daemon=True).start()
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if rank == 0 and (done == total or time.monotonic() - last > 0.2):
            last = time.monotonic()
            (folder / "progress.new").write_text(json.dumps([done, total]))
            (folder / "progress.new").rename(folder / "progress")

    try:
        report = module(kind).run(config, inputs, out, Context(device, progress, partial))
    except Exception as error:
        traceback.print_exc()
        (folder / f"error-{rank}").write_text(f"{error}" or type(error).__name__)
        raise
    if rank == 0:
        (folder / "report").write_text(json.dumps(asdict(report)))


if __name__ == "__main__":
    main()
