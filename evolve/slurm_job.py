"""What a job does under Slurm: its stages one after another, and what becomes of it where it can't go on.

    a stage fails            tried again as resources.retries says, then the job fails, and Slurm cancels what needs it
    another process has it   the job goes back into the queue: nothing is held while it waits
    time limit, preemption   told: workers stop, the job goes back and goes on from the last checkpoint
    node failure, SIGKILL    Slurm puts it back into the queue

A job that comes back finds in the store what it finished. `events.jsonl` in its folder says what happened, for status.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve import snapshot
from evolve.store import Stage
from evolve.workers import Outcome, Progress, Setting, Workers

GRACE = 900  # seconds after SIGTERM in which Slurm is to end this process
PATIENCE = 3  # time-outs in a row without any progress after which a job has failed


class Told(BaseException):
    """SIGTERM: Slurm is about to end this process, and most likely has told the workers as well."""


def _tell(number: int, frame: Any) -> None:
    raise Told


class Events:
    """What happens in a job, a line each, and how far its stage is: what status shows."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._shown = 0.0

    def add(self, event: str, **about: Any) -> None:
        job, restarts = os.environ.get("SLURM_JOB_ID", ""), int(os.environ.get("SLURM_RESTART_COUNT", 0))
        line = {"time": round(time.time(), 1), "event": event, "job": job, "restarts": restarts, **about}
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(time.strftime("%H:%M:%S"), event, *(f"{name}={value}" for name, value in about.items()), flush=True)

    # what launch.run tells whoever watches

    def started(self, stage: Stage) -> None:
        self.add("stage", stage=stage.id)

    def progress(self, stage: Stage, news: Progress) -> None:
        if time.time() - self._shown > 5:
            self._shown = time.time()
            content = {"stage": stage.id, "done": news.done, "total": news.total, "time": self._shown}
            (self.folder / ".progress").write_text(json.dumps(content))
            (self.folder / ".progress").rename(self.folder / "progress.json")

    def held(self, stage: Stage) -> None:
        self.add("held", stage=stage.id)

    def retried(self, stage: Stage, outcome: Outcome) -> None:
        self.add("again", stage=stage.id, message=outcome.message)

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        self.add(outcome.status, stage=stage.id, message=outcome.message, log=str(outcome.log or ""))


@dataclass
class Run:
    """The stages of a job; called in it by submitit, which also calls `checkpoint` when the job is to go."""

    stages: tuple[Stage, ...]
    setting: Setting
    folder: Path
    pool: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "pool": None}

    def __call__(self) -> None:
        from evolve import launch

        snapshot.hold()
        events = Events(self.folder)
        events.add("start", node=socket.gethostname())
        store = self.setting.store
        # Slurm takes `afterok` on a job that it has forgotten for fulfilled.
        own = {stage.id for stage in self.stages}
        for item in {item.id: item for stage in self.stages for item in stage.stages if item.id not in own}.values():
            for _ in range(10):  # what another machine has just written may take some seconds to be seen
                if store.record(item) is not None:
                    break
                time.sleep(2)
            else:
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
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.pool.close()
            events.add("back", message=f"{held} is being made by another process")
            requeue()
        except Told:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.pool.close()
            events.add("back", message="told to go: preemption or cancellation")
            time.sleep(GRACE)  # to end by itself now would be a failure, and what needs this job would be cancelled
            sys.exit(1)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done
        events.add("end")

    def checkpoint(self) -> Any:
        """Told to go: what is running stops, and goes on from its checkpoint when the job comes back."""
        from submitit.helpers import DelayedSubmission

        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # submitit's handler doesn't stand being called twice
        # scontrol inherits it: what asks for the requeue must not die of the signal that the requeue sends.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        events = Events(self.folder)
        if self.pool is not None:
            self.pool.close()
        if self._stuck():
            minutes = "resources.slurm.needs.*.minutes"
            message = (
                f"was told to go {PATIENCE} times and had got nowhere since the time before; is {minutes} too small?"
            )
            events.add("failed", stage=self._next(), message=message)
            return None
        events.add("back", message="told to go: time limit or preemption")
        return DelayedSubmission(self)

    def _next(self) -> str:
        store = self.setting.store
        return next((stage.id for stage in self.stages if store.record(stage) is None), self.stages[-1].id)

    def _stuck(self) -> bool:
        """Whether nothing was finished or kept since the job was last told to go, several times in a row."""
        store, job = self.setting.store, os.environ.get("SLURM_JOB_ID", "")
        kept = []
        for stage in self.stages:
            files = []
            for file in sorted(store.partial(stage.id).rglob("*")):
                with contextlib.suppress(FileNotFoundError):
                    files.append(f"{file} {file.stat().st_mtime_ns}")
            replies = sum(1 for _ in store.judgments.rglob("*")) if stage.kind == "compare" else 0
            kept.append([str(store.record(stage) is not None), str(replies), *files])
        path = self.folder / "requeues.json"
        seen: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        times = seen["times"] + 1 if (seen.get("kept"), seen.get("job")) == (kept, job) else 1
        path.write_text(json.dumps({"kept": kept, "job": job, "times": times}))
        return bool(times >= PATIENCE)


@dataclass
class Rest:
    """Submits what a site's limits left over of a plan."""

    plan: Path

    def __call__(self) -> None:
        from evolve import slurm

        made = slurm.submit(pickle.loads(self.plan.read_bytes()), again=self.plan)
        print(f"{len(made.jobs)} jobs submitted, {made.left} left", flush=True)

    def checkpoint(self) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def requeue() -> None:
    """Back into the queue; Slurm ends this process, which ignores SIGTERM by now, as scontrol then does."""
    while subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]]).returncode:
        time.sleep(5)  # the controller is away
    time.sleep(GRACE)
    sys.exit(1)
