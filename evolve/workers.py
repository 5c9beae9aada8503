"""Where stages run: in this process, or in warm worker processes beside it.

A worker imports torch and transformers once (about ten seconds) and then runs one stage after another; one that has
used a GPU ends after its stage, so that the memory comes back. A worker dies with its parent.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from evolve.config import ConfigError, Resources
from evolve.parts import Shared
from evolve.store import Corrupt, Report, Stage, Store, provenance


@dataclass(frozen=True)
class Outcome:
    """How a stage ended: done, reused (another process built it), busy (another is building it), failed, blocked."""

    status: str
    message: str = ""
    log: Path | None = None
    seconds: float = 0.0
    last: bool = False  # the worker that sends this ends with it


@dataclass(frozen=True)
class Progress:
    done: int
    total: int


@dataclass(frozen=True)
class Setting:
    """What workers are told once."""

    store: Store
    resources: Resources
    logs: Path
    code: Mapping[str, Any]
    share: tuple[int, int] | None = None  # of a stage's rows, where other jobs make the rest (Context.share)


def execute(stage: Stage, setting: Setting, progress: Any) -> Outcome:
    """Builds one stage under its lease and commits it.

    A share of its rows is made without: its process alone writes the file they are in, for whoever builds the stage.
    """
    store = setting.store
    started = time.time()
    log = setting.logs / f"{stage.id.replace('/', '-')}.log"
    try:
        lease = store.lease(stage) if setting.share is None else contextlib.nullcontext()
    except OSError as error:
        return Outcome("failed", f"{store.root}: can't be written to ({error.strerror})", log)
    if lease is None:
        return Outcome("busy")
    with lease:
        try:
            if store.record(stage) is not None:
                return Outcome("reused")
            inputs = {name: store.open(item) for name, item in stage.inputs.items()}
            with store.build(stage) as folder:
                try:
                    report = _run(stage, inputs, folder, setting, progress)
                except Shared:
                    return Outcome("done", seconds=time.time() - started)
                store.commit(stage, folder, report, provenance(setting.code, started))
        except (Exception, SystemExit) as error:
            if isinstance(error, SystemExit):
                raise  # told to stop, not failed
            known = isinstance(error, ConfigError | Corrupt | ValueError | OSError | RuntimeError)
            traceback.print_exc()
            text = str(error).strip().splitlines() or [""]
            return Outcome("failed", text[0] if known and text[0] else f"{type(error).__name__}: {text[0]}", log)
    return Outcome("done", seconds=time.time() - started)


def _run(stage: Stage, inputs: Mapping[str, Path], folder: Path, setting: Setting, progress: Any) -> Report:
    from evolve import jobs, ranks
    from evolve.stages import Context, module

    device = _device(setting.resources.device) if jobs.gpus(stage) else "cpu"
    store = setting.store
    context = Context(device, progress, store.partial(stage.id), store.judgments, setting.share)
    if (processes := getattr(stage.config, "ranks", 1)) > 1:
        return ranks.run(stage, inputs, folder, context, processes)
    report: Report = module(stage.kind).run(stage.config, inputs, folder, context)
    return report


def _device(wanted: str) -> str:
    if wanted == "cpu":
        return "cpu"
    import torch

    if torch.cuda.is_available():
        return "cuda"
    if wanted == "cuda":
        raise ConfigError("resources.device=cuda: torch sees no GPU here; set resources.device=cpu or auto")
    return "cpu"


def _prepare(resources: Resources) -> None:
    """The libraries' threads and noise; before they are imported."""
    os.environ |= {
        "OMP_NUM_THREADS": str(resources.threads),
        "MKL_NUM_THREADS": str(resources.threads),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Standard output and error into a file, native libraries' too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, target)
            os.close(copy)
        os.close(file)
        with contextlib.suppress(OSError):
            if path.stat().st_size == 0:
                path.unlink()


def run_logged(stage: Stage, setting: Setting, progress: Any) -> Outcome:
    with _logged(setting.logs / f"{stage.id.replace('/', '-')}.log"):
        return execute(stage, setting, progress)


class Inline:
    """Runs stages in this process, one at a time: for jobs of Hydra's stock launchers."""

    size = 1

    def __init__(self, setting: Setting):
        self.setting = setting
        self._outcome: list[tuple[str, Outcome | Progress]] = []
        _prepare(setting.resources)

    @property
    def free(self) -> int:
        return 0 if self._outcome else 1

    def start(self, stage: Stage) -> None:
        self._outcome.append((stage.id, run_logged(stage, self.setting, lambda done, total: None)))
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():  # the next stage may need it all
            gc.collect()
            torch.cuda.empty_cache()

    def wait(self, seconds: float) -> list[tuple[str, Outcome | Progress]]:
        if not self._outcome:
            time.sleep(seconds)
        outcome, self._outcome = self._outcome, []
        return outcome

    def close(self) -> None:
        pass


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C is the parent's to handle, once a worker is started as a whole.

    Blocked, it reaches no worker while that imports: it inherits the mask. Yet a signal that this thread blocks reaches
    another thread, and Python would raise it here, between the worker's start and what it is sent.
    """
    resource_tracker.ensure_running()  # its own start would let the signal through again
    came: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGINT, handler)
    if came and callable(handler):
        handler(came[0], None)


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    stage: Stage | None = None


class Workers:
    """Warm worker processes. A worker that dies (out of memory, kill -9) fails its stage alone and is replaced."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.size = setting.resources.workers
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    @property
    def free(self) -> int:
        return self.size - sum(worker.stage is not None for worker in self._workers)

    def start(self, stage: Stage) -> None:
        self._workers = [worker for worker in self._workers if worker.stage is not None or worker.process.is_alive()]
        worker = next((worker for worker in self._workers if worker.stage is None), None) or self._spawn()
        worker.stage = stage
        with contextlib.suppress(BrokenPipeError):  # it has died since: `wait` finds out and says so
            worker.pipe.send(stage)

    def _spawn(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(theirs, self.setting), daemon=True)
        worker = _Worker(process, ours)
        with _uninterrupted():
            process.start()
            theirs.close()
            self._workers.append(worker)
        return worker

    def wait(self, seconds: float) -> list[tuple[str, Outcome | Progress]]:
        """News of running stages, once there is some or the time is up: (stage's id, progress or outcome)."""
        news: list[tuple[str, Outcome | Progress]] = []
        busy = {worker.pipe: worker for worker in self._workers if worker.stage is not None}
        if not busy:
            time.sleep(seconds)
        for pipe in wait(list(busy), timeout=seconds) if busy else []:
            worker = busy[pipe]  # type: ignore[index]
            assert worker.stage is not None
            try:
                message = worker.pipe.recv()
            except (EOFError, OSError):
                worker.process.join()
                self._workers.remove(worker)
                code = worker.process.exitcode
                how = f"signal {-code}" if code and code < 0 else f"exit status {code}"
                log = self.setting.logs / f"{worker.stage.id.replace('/', '-')}.log"
                news.append((worker.stage.id, Outcome("failed", f"its worker process ended by {how}", log)))
                continue
            news.append((worker.stage.id, message))
            if isinstance(message, Outcome):
                worker.stage = None
                if message.last:
                    self._workers.remove(worker)
        return news

    def close(self) -> None:
        """Stops all workers; what they were building is dropped, what they committed stays."""
        for worker in self._workers:
            worker.process.terminate() if worker.stage else worker.process.kill()  # it has nothing to give back
        deadline = time.time() + 5
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.time()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []


def _serve(pipe: Connection, setting: Setting) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # Slurm tells all of a job's processes to go; the parent sees to it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # unwinds, so that lease and folder are given back
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    _prepare(setting.resources)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.time() - last > 0.2:
            last = time.time()
            pipe.send(Progress(done, total))

    while True:
        try:
            stage = pipe.recv()
        except EOFError:
            return
        outcome = run_logged(stage, setting, progress)
        torch = sys.modules.get("torch")
        used_gpu = torch is not None and torch.cuda.is_initialized()
        pipe.send(replace(outcome, last=used_gpu))
        if used_gpu:
            return
