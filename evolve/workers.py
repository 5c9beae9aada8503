"""Where stages run: in this process, or in warm worker processes beside it.

A worker imports torch and transformers once (about ten seconds) and then runs one stage after another; one that has
used a GPU, or was given some, ends after its stage, so that the memory comes back. A worker dies with its parent.
"""

from __future__ import annotations

import contextlib
import errno
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

from evolve import devices
from evolve.config import ConfigError, Resources
from evolve.parts import Shared
from evolve.store import Corrupt, Report, Stage, Store, provenance

FULL = (errno.ENOSPC, errno.EDQUOT)  # what the system says where there is no room left


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
    nodes: int = 1  # that the Slurm job has which this runs in; stages run on this one, but for their ranks


def execute(stage: Stage, setting: Setting, progress: Any) -> Outcome:
    """Builds one stage under its lease and commits it; what it prints is added to its log.

    A share of its rows is made without: its process alone writes the file they are in, for whoever builds the stage.
    """
    store = setting.store
    try:
        lease = store.lease(stage) if setting.share is None else contextlib.nullcontext()
    except OSError as error:
        return Outcome("failed", f"{store.root}: can't be written to ({error.strerror})")
    if lease is None:
        return Outcome("busy")
    try:
        with lease, _logged(_log(stage, setting)):  # in this order: without the lease, the log may be in other hands
            return _build(stage, setting, progress)
    except OSError as error:
        return Outcome("failed", f"{setting.logs}: can't be written to ({error.strerror})")


def _build(stage: Stage, setting: Setting, progress: Any) -> Outcome:
    store = setting.store
    started, began = time.time(), time.monotonic()
    try:
        if store.record(stage) is not None:
            return Outcome("reused")
        inputs = {name: store.open(item) for name, item in stage.inputs.items()}
        with store.build(stage) as folder:
            try:
                report = _run(stage, inputs, folder, setting, progress)
            except Shared:
                return Outcome("done", seconds=time.monotonic() - began)
            devices = max(stage.config.gpus, 1)  # as many processes, where they have no GPU
            made = provenance(setting.code, started, time.monotonic() - began, devices)
            store.commit(stage, folder, report, made)
    except Exception as error:
        with contextlib.suppress(OSError):  # the log's disk is full
            traceback.print_exc()
        if isinstance(error, OSError) and error.errno in FULL:
            return Outcome("failed", f"{store.root}: {error.strerror}; the same command goes on once there is room")
        text = str(error).strip().splitlines() or [""]
        known = isinstance(error, ConfigError | Corrupt | ValueError | OSError | RuntimeError)
        message = text[0] if known and text[0] else f"{type(error).__name__}: {text[0]}"
        return Outcome("failed", message, _log(stage, setting))
    return Outcome("done", seconds=time.monotonic() - began)


def _run(stage: Stage, inputs: Mapping[str, Path], folder: Path, setting: Setting, progress: Any) -> Report:
    from evolve import ranks
    from evolve.stages import Context, module

    device = _device(setting.resources.device) if stage.config.gpus else "cpu"
    store = setting.store
    context = Context(device, progress, store.partial(stage.id), store.judgments, setting.share)
    if (processes := stage.config.ranks) > 1:
        python = setting.resources.slurm.python if setting.resources.slurm else None
        return ranks.run(stage, inputs, folder, context, processes, setting.nodes, python)
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


def _log(stage: Stage, setting: Setting) -> Path:
    return setting.logs / f"{stage.id.replace('/', '-')}.log"


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Standard output and error into a file, native libraries' too, behind what earlier attempts have left there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    if os.fstat(file).st_size:
        with contextlib.suppress(OSError):  # the disk is full: the stage's own files will say so
            os.write(file, time.strftime("\n--- again, %Y-%m-%dT%H:%M:%S%z\n").encode())
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(file, 1)
    os.dup2(file, 2)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # the disk is full, and what can't be kept isn't the terminal's
                with open(os.devnull, "w") as nowhere:
                    os.dup2(nowhere.fileno(), stream.fileno())
                stream.flush()
        for target, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, target)
            os.close(copy)
        with contextlib.suppress(OSError):
            if os.fstat(file).st_size == 0:
                path.unlink()
        os.close(file)


class Inline:
    """Runs stages in this process, one at a time: for jobs of Hydra's stock launchers."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self._outcome: list[tuple[str, Outcome | Progress]] = []
        _prepare(setting.resources)

    def takes(self, stage: Stage) -> bool:
        return not self._outcome

    def start(self, stage: Stage) -> None:
        self._outcome.append((stage.id, execute(stage, self.setting, lambda done, total: None)))
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
    gpus: tuple[str, ...]
    stage: Stage | None = None


class Workers:
    """Warm worker processes. A worker that dies (out of memory, kill -9) fails its stage alone and is replaced.

    Where several share GPUs, or one, each sees those alone that its stage uses, and no two see the same.
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        self.size = setting.resources.workers
        self._gpus = devices.gpus(setting.resources) if self.size > 1 else ()  # to deal
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    @property
    def _free(self) -> list[str]:
        used = {gpu for worker in self._workers for gpu in worker.gpus}
        return [gpu for gpu in self._gpus if gpu not in used]

    def _wants(self, stage: Stage) -> int:
        """How many GPUs it is given: all there are, where it uses more; it then says so itself."""
        return min(stage.config.gpus // self.setting.nodes, len(self._gpus))

    def takes(self, stage: Stage) -> bool:
        """Whether there is a slot for the stage now, and the GPUs that it uses."""
        busy = sum(worker.stage is not None for worker in self._workers)
        return busy < self.size and self._wants(stage) <= len(self._free)

    def start(self, stage: Stage) -> None:
        """What `takes` said yes to."""
        self._workers = [worker for worker in self._workers if worker.stage is not None or worker.process.is_alive()]
        given = tuple(self._free[: self._wants(stage)])
        idle = [worker for worker in self._workers if worker.stage is None and not given]
        worker = idle[0] if idle else self._spawn(given)
        worker.stage = stage
        with contextlib.suppress(BrokenPipeError):  # it has died since: `wait` finds out and says so
            worker.pipe.send(stage)

    def _spawn(self, given: tuple[str, ...]) -> _Worker:
        ours, theirs = self._context.Pipe()
        dealt = given if self._gpus else None
        process = self._context.Process(target=_serve, args=(theirs, self.setting, dealt), daemon=True)
        worker = _Worker(process, ours, given)
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
                said = f"its worker process ended by {how}"
                news.append((worker.stage.id, Outcome("failed", said, _log(worker.stage, self.setting))))
                continue
            news.append((worker.stage.id, message))
            if isinstance(message, Outcome):
                worker.stage = None
                if message.last:
                    self._workers.remove(worker)
                    worker.process.join(10)  # until then its GPUs are nobody else's
                    worker.process.kill()
        return news

    def close(self) -> None:
        """Stops all workers; what they were building is dropped, what they committed stays."""
        for worker in self._workers:
            worker.process.terminate() if worker.stage else worker.process.kill()  # it has nothing to give back
        deadline = time.monotonic() + 5
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
        self._workers = []


def _serve(pipe: Connection, setting: Setting, dealt: tuple[str, ...] | None) -> None:
    """dealt: the GPUs that it may see; None: all that there are."""
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
    if dealt is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(dealt)
    last = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal last
        if done == total or time.monotonic() - last > 0.2:
            last = time.monotonic()
            pipe.send(Progress(done, total))

    while True:
        try:
            stage = pipe.recv()
        except EOFError:
            return
        outcome = execute(stage, setting, progress)
        torch = sys.modules.get("torch")
        last_one = bool(dealt) or (torch is not None and torch.cuda.is_initialized())
        pipe.send(replace(outcome, last=last_one))
        if last_one:
            return
