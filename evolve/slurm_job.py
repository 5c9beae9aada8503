"""What a job does under Slurm: its stages one after another, and what becomes of it where it can't go on.

    a stage fails            tried again as resources.retries says, then the job fails, and Slurm cancels what needs it
    another process has it   the job goes back into the queue: nothing is held while it waits
    time limit, preemption   told: workers stop, the job goes back and goes on from what the stage has kept, if it does
    node failure, SIGKILL    Slurm puts it back into the queue
    cancelled                told as well: workers stop, and the job ends

A job that comes back finds in the store what it finished. `events.jsonl` in its folder says what happened, for status.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from evolve import snapshot
from evolve.config import ConfigError
from evolve.config.resources import EARLY
from evolve.store import Corrupt, Stage, append, refresh, replace, seal, unseal
from evolve.workers import Outcome, Progress, Setting, Workers

REFUSED = ("presently disabled", "permission denied")  # what scontrol says where asking again is of no use
PATIENCE = 3  # time limits in a row without any progress after which a job has failed


class Told(BaseException):
    """SIGTERM: Slurm is about to end this process, and most likely has told the workers as well."""


def _tell(number: int, frame: Any) -> None:
    raise Told


@contextlib.contextmanager
def spared() -> Iterator[None]:
    """For what a job says of itself: where that can't be written, as on a full disk, a line on stderr has to do."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            print(f"the job goes on, and this is not written: {error}", file=sys.stderr, flush=True)


class Events:
    """What happens in a job, a line each, and how far its stage is: what status shows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shown = 0.0

    def add(self, event: str, **about: Any) -> None:
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        line = {"time": round(time.time(), 1), "event": event, "job": job, "restarts": restarts, **about}
        with spared():
            append(self.folder / "events.jsonl", line)
        with spared():
            print(time.strftime("%H:%M:%S"), event, *(f"{name}={value}" for name, value in about.items()), flush=True)

    # what launch.run tells whoever watches

    def started(self, stage: Stage) -> None:
        self.add("stage", stage=stage.id)

    def progress(self, stage: Stage, news: Progress) -> None:
        if time.monotonic() - self._shown > 5 or news.done == news.total:
            self._shown = time.monotonic()
            content = {"stage": stage.id, "done": news.done, "total": news.total, "time": time.time()}
            with spared():
                replace(self.folder / "progress.json", seal(content))

    def held(self, stage: Stage) -> None:
        self.add("held", stage=stage.id)

    def retried(self, stage: Stage, outcome: Outcome) -> None:
        self.add("again", stage=stage.id, message=outcome.message)

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        log, seconds = str(outcome.log or ""), round(outcome.seconds, 1)
        self.add(outcome.status, stage=stage.id, message=outcome.message, log=log, seconds=seconds)


@dataclass
class Run:
    """The stages of a job; called in it by submitit, which also calls `checkpoint` when the job is to go."""

    stages: tuple[Stage, ...]
    setting: Setting
    folder: Path
    pool: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pool": None, "ids": [stage.id for stage in self.stages]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Raises Corrupt where the stages are not those that were submitted: their file is damaged."""
        ids = state.pop("ids")
        self.__dict__ = state
        if ids != [stage.id for stage in self.stages]:
            raise Corrupt(f"{self.folder}: damaged since it was submitted; the sweep's command submits it again")

    def __call__(self) -> None:
        from evolve import launch

        snapshot.hold()
        events = Events(self.folder)
        events.add("start", node=socket.gethostname())
        store = self.setting.store
        # Slurm takes `afterok` on a job that it has forgotten for fulfilled.
        own = {stage.id for stage in self.stages}
        needed = {item.id: item for stage in self.stages for item in stage.stages if item.id not in own}.values()
        if absent := [item for item in needed if store.record(item) is None]:
            refresh(store.folder(item.id).parent for item in absent)
        for item in absent:
            if store.record(item) is None:
                events.add("lost", stage=self._next(), message=f"needs {item.id}, which is not there")
                raise RuntimeError(f"{item.id}: not there; the sweep's command makes it")
        todo = [stage for stage in self.stages if store.record(stage) is None]
        self.pool = Workers(self.setting)
        signal.signal(signal.SIGTERM, _tell)
        try:
            outcomes = launch.run(todo, store, self.pool, events, retries=self.setting.resources.retries, patient=False)
            self.pool.close()
            failed = [stage_id for stage_id, outcome in outcomes.items() if outcome.status == "failed"]
            if failed:
                time.sleep(2)  # it may have been this job's end that its worker heard of first
                raise RuntimeError(f"{', '.join(failed)}: failed; see {self.folder}")
        except launch.Busy as held:
            self._stop()
            go_back(events, f"{held} is being made by another process")
        except Told:
            self._stop()
            leave(events)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done
        events.add("end")

    def checkpoint(self) -> None:
        """Told to go: what is running stops, and goes on from what it has kept when the job comes back.

        Raises SystemExit once it is there: submitit would ask Slurm but once, and fail where there is no answer.
        """
        self._stop()
        events, said, slurm = Events(self.folder), known(), self.setting.resources.slurm
        assert slurm is not None
        at_limit = not preempted(said) and left(said) <= slurm.signal_seconds + 2 * EARLY
        if at_limit and self._stuck():
            message = (
                f"came to its time limit {PATIENCE} times and had kept nothing new since the time before; it needs "
                "more resources.slurm.needs.*.minutes, or, if it trains, fewer trainer.checkpoint_minutes"
            )
            events.add("failed", stage=self._next(), message=message)
            return
        if not said:
            go_back(events, "told to go: time limit or preemption")
        why = "preemption" if preempted(said) else "time limit" if at_limit else "SIGUSR2, not by Slurm"
        go_back(events, f"told to go: {why}")

    def _stop(self) -> None:
        deaf()
        if self.pool is not None:
            self.pool.close()

    def _next(self) -> str:
        store = self.setting.store
        return next((stage.id for stage in self.stages if store.record(stage) is None), self.stages[-1].id)

    def _stuck(self) -> bool:
        """Whether nothing was finished or kept since the job last came to its time limit, several times in a row."""
        job, times = os.environ.get("SLURM_JOB_ID", ""), 0
        path = self.folder / "requeues.json"
        with spared():
            kept = self._kept()
            seen: dict[str, Any] = {}
            with contextlib.suppress(FileNotFoundError, Corrupt):
                seen = unseal(path.read_bytes())
            times = seen["times"] + 1 if (seen.get("kept"), seen.get("job")) == (kept, job) else 1
            replace(path, seal({"kept": kept, "job": job, "times": times}))
        return bool(times >= PATIENCE)

    def _kept(self) -> list[list[str]]:
        """What each stage has finished, or can go on from."""
        store, kept = self.setting.store, []
        for stage in self.stages:
            files = []
            for file in sorted(store.partial(stage.id).rglob("*")):
                with contextlib.suppress(FileNotFoundError):
                    files.append(f"{file} {file.stat().st_mtime_ns}")
            replies = sum(1 for _ in store.judgments.rglob("*")) if stage.kind == "compare" else 0
            kept.append([str(store.record(stage) is not None), str(replies), *files])
        return kept


@dataclass
class Rest:
    """Submits what a site's limits left over of a plan; goes back into the queue as long as there is no room."""

    plan: Path

    def __call__(self) -> None:
        from evolve import slurm

        snapshot.hold()
        events = Events(self.plan.parent)
        events.add("start", node=socket.gethostname())
        try:
            made = slurm.submit(pickle.loads(self.plan.read_bytes()), again=self.plan)
        except slurm.NotNow as error:
            go_back(events, str(error))
        except Exception as error:
            message = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            events.add("failed", message=message)
            raise
        print(f"{len(made.jobs)} jobs submitted, {made.left} left", flush=True)
        if made.left and not made.rest:
            go_back(events, "no room in the queue")

    def checkpoint(self) -> None:
        go_back(Events(self.plan.parent), "told to go")


def deaf() -> None:
    """What tells a job to go has no effect any more.

    submitit's handler doesn't stand being called twice; and scontrol inherits it: what asks for the requeue must not
    die of the signal that the requeue sends.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def number() -> str:
    """This job as Slurm's commands name it; of an array's, itself alone."""
    share = os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{share}" if share else os.environ["SLURM_JOB_ID"]


def known() -> dict[str, str]:
    """What Slurm knows of this job; nothing where it doesn't answer."""
    command = ["scontrol", "--oneliner", "show", "job", number()]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60).stdout
    except subprocess.TimeoutExpired:
        return {}
    return dict(word.split("=", 1) for word in shown.split() if "=" in word)


def preempted(said: Mapping[str, str]) -> bool:
    return said.get("PreemptTime", "None") != "None"


def left(said: Mapping[str, str]) -> float:
    """Seconds until a job's time limit; NaN where it has none, or nothing is known of it."""
    return _seconds(said.get("TimeLimit", "")) - _seconds(said.get("RunTime", ""))


def _seconds(text: str) -> float:
    """'1-00:00:10' -> 86410; NaN for what is no such time, as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return math.nan
    return sum(int(part or 0) * of for part, of in zip(found.groups(), (86400, 3600, 60, 1), strict=True))


def leave(events: Events) -> NoReturn:
    """Ends a job that got SIGTERM: at once where Slurm has decided on it already, and else when Slurm ends it.

    Slurm preempts with a grace period, in which the job counts as running: it goes back by itself, and holds nothing.
    Without one, or cancelled, the job is ending, and how it does no longer counts. Where Slurm has decided nothing
    within a minute, the signal was somebody else's, and the job goes back as well.
    """
    deadline = time.monotonic() + 60
    while True:
        said = known()
        if said and said["JobState"] != "RUNNING":
            events.add("ended", message=f"told to go: {said['JobState'].lower()}")
            sys.exit(1)
        if preempted(said) or (said and time.monotonic() > deadline):
            go_back(events, f"told to go: {'preemption' if preempted(said) else 'SIGTERM, not by Slurm'}")
        time.sleep(2)  # to end by itself now would be a failure, and what needs this job would be cancelled


def go_back(events: Events, why: str) -> NoReturn:
    """Ends this process with its job back in the queue; how it ends then no longer counts.

    Raises RuntimeError where Slurm refuses for good: the job fails, and the same command submits it again.
    """
    deaf()
    events.add("back", message=why)
    requeue()
    sys.exit(1)


def requeue() -> None:
    """Raises RuntimeError where Slurm refuses for good."""
    while True:
        done = subprocess.run(["scontrol", "requeue", number()], capture_output=True, text=True)
        if not done.returncode:
            return
        said = " ".join(done.stderr.split())
        print(said, file=sys.stderr, flush=True)
        if any(words in said for words in REFUSED):
            raise RuntimeError(f"could not go back into the queue: {said}")
        time.sleep(5)  # the controller is away
