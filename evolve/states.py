"""How each stage of a sweep stands: by the store, by Slurm's queue, and by what its jobs said."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve import slurm
from evolve.config import ConfigError
from evolve.slurm import Queued
from evolve.store import LATE, RECORD, Corrupt, Lease, Store, lines, unseal

INSIDE = "its job runs"
ROOM = "for room in the queue, when the others have ended"


@dataclass
class State:
    """Of a stage.

    state: done, running, ending (its job is), waiting (in the queue), failed, blocked (needs one that failed), missing,
    or unknown where Slurm can't be asked of its job. seconds: that it took, or that it runs. failures: of its job's
    tries of it. requeues: of its job.
    """

    state: str
    job: str | None = None  # Slurm's id
    log: str | None = None
    message: str = ""
    progress: str = ""
    seconds: float | None = None
    failures: int = 0
    requeues: int = 0


@dataclass
class Sweep:
    folder: Path
    store: Store
    members: list[dict[str, Any]]
    needs: dict[str, list[str]]  # by stage, inputs first


@dataclass
class View:
    """A sweep at one moment. away: why Slurm can't be asked; empty where it can, or needn't be."""

    sweep: Sweep
    states: dict[str, State]
    away: str = ""

    @property
    def count(self) -> Counter[str]:
        return Counter(state.state for state in self.states.values())


def read(folder: Path) -> dict[str, Any]:
    """What a sweep's folder says of it: its store, members and their steps. Raises ConfigError where there is none."""
    try:
        return unseal((folder / "sweep.json").read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no sweep.json, so no sweep's folder; outputs/sweeps/ has them") from None
    except Corrupt:
        raise ConfigError(f"{folder}: its sweep.json is damaged; the sweep's command writes it again") from None


def load(folder: Path) -> Sweep:
    """Raises ConfigError where there is no sweep."""
    content = read(folder)
    store = Store((folder / content["store"]).resolve(), content.get("lease_timeout", 60.0))
    members = content["members"]
    alone: dict[str, list[str]] = {step["id"]: [] for member in members for step in member["steps"]}
    return Sweep(folder, store, members, content.get("needs", alone))  # older sweeps don't say what needs what


def newest(output: Path) -> Path:
    """The sweep under `output` that was last started. Raises ConfigError."""
    found = sorted((output / "sweeps").glob("*/sweep.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"{output}: no sweep there; name its folder, or the output that it was started with")
    return found[-1].parent


def add_folder(parser: argparse.ArgumentParser) -> None:
    """The argument that `named` takes."""
    what = "a sweep's folder, or an output: its newest"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"), help=what)


def named(folder: Path) -> Path:
    """The sweep's folder that a person means: this one, or an output's newest. Raises ConfigError."""
    return folder if (folder / "sweep.json").exists() else newest(folder)


def submitted(folder: Path) -> dict[str, tuple[str, str]]:
    """(job's key, Slurm's id) by stage of a sweep, of the last job that was to make it."""
    notes = (note.get("stages", {}) for note in lines(folder / "jobs.jsonl"))
    return {stage: (key, number) for made in notes for stage, (key, number) in made.items()}


def wanted(folder: Path) -> set[tuple[str, str]]:
    """(key, Slurm's id) of the jobs that a sweep has waited for since it was last cancelled."""
    found: set[tuple[str, str]] = set()
    for note in lines(folder / "jobs.jsonl"):
        found = set() if "cancelled" in note else found | {(key, number) for key, number in note["stages"].values()}
    return found


@dataclass
class Said:
    """What a job said: of its last run, which stage it is at since when, and which failed; of all, what they took.

    made: when each stage was done. back: why it went back into the queue last.
    """

    job: str | None = None
    now: str | None = None
    since: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    failures: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    made: dict[str, float] = field(default_factory=dict)
    requeues: int = 0
    back: str = ""


def hear(folder: Path) -> Said:
    """What the job of a folder said."""
    said = Said()
    for event in lines(folder / "events.jsonl"):
        what, stage = event["event"], event.get("stage", "")
        if event["job"] != said.job:  # submitted again
            said.failures.clear()
            said.back = ""
        said.job, said.requeues = event["job"], event["restarts"]
        if what == "start":
            said.now, said.failed = None, {}
        elif what == "stage":
            said.now, said.since = stage, event["time"]
        elif what in ("done", "reused"):
            said.made[stage] = event["time"]
            if what == "done" and "seconds" in event:
                said.seconds[stage] = event["seconds"]
        elif what in ("failed", "lost"):
            said.failed[stage] = event["message"]
        elif what == "back":
            said.back = event["message"]
        said.failures[stage] += what in ("failed", "again")
    return said


def look(sweep: Sweep) -> View:
    """How each stage stands; without Slurm, where it can't be asked, as far as the store and the jobs' words say."""
    jobs = submitted(sweep.folder)
    done = {stage for stage in sweep.needs if (sweep.store.folder(stage) / RECORD).exists()}
    rest = slurm.rest(sweep.folder)
    left = len(done) < len(sweep.needs) and slurm.folder(sweep.store, rest).exists()
    queue: dict[str, Queued] = {}
    away = ""
    if left or not jobs.keys() <= done:
        try:
            queue = slurm.queue(sweep.store, patience=0)
        except ConfigError as error:
            away = str(error)
    said = {key: hear(slurm.folder(sweep.store, key)) for key in {rest, *(key for key, _ in jobs.values())}}
    view = View(sweep, {}, away)
    for stage in sweep.needs:
        key, number = jobs.get(stage, ("", None))
        words = said.get(key, Said())
        if stage in done:
            seconds = words.seconds.get(stage)
            state = State("done", number, seconds=_recorded(sweep.store, stage) if seconds is None else seconds)
        else:
            state = (
                _queued(sweep.store, stage, key, queue, words)
                or _held(sweep.store, stage)
                or _left(queue.get(rest), said[rest], number, words)
                or _ended(view, stage, key, number, words, said[rest])
            )
            logs = slurm.folder(sweep.store, key) if key else sweep.folder / "logs"
            log = logs / f"{stage.replace('/', '-')}.log"
            state.log = state.log or (str(log) if log.exists() else None)
        state.failures, state.requeues = words.failures[stage], words.requeues
        view.states[stage] = state
    return view


def _recorded(store: Store, stage: str) -> float | None:
    """A stage's seconds by its record, which is believed: whether it is whole is the plan's to see."""
    try:
        return float(json.loads((store.folder(stage) / RECORD).read_bytes())["seconds"])
    except (OSError, ValueError, KeyError):
        return None


def _queued(store: Store, stage: str, key: str, queue: Mapping[str, Queued], said: Said) -> State | None:
    """Of a stage whose job is in the queue."""
    job, shares = queue.get(key), queue.get(f"{key}-shares")
    if job is None:
        return None
    if shares is not None and shares.state == "RUNNING" and (state := _shared(store, stage, key, shares)):
        return state
    if job.state == "COMPLETING":
        return State("ending", job.id, message="its job is ending")
    if job.state == "RUNNING" and said.now == stage:
        progress = _progress(slurm.folder(store, key), stage)
        text = f"{progress[0]}/{progress[1]}" if progress else ""
        return State("running", job.id, progress=text, seconds=max(0.0, time.time() - said.since))
    if job.state == "PENDING":
        return State("waiting", job.id, message="" if job.reason == "None" else job.reason)
    return State("waiting", job.id, message=INSIDE if job.state == "RUNNING" else job.state.lower())


def _shared(store: Store, stage: str, key: str, shares: Queued) -> State | None:
    """Of a stage whose rows an array of jobs makes."""
    folders = [path for path in slurm.folder(store, key).iterdir() if path.name.isdigit()]
    begun = [said for path in folders if (said := hear(path)).now == stage]
    if not begun:
        return None
    known = [progress for path in folders if (progress := _progress(path, stage))]
    rows = f"{sum(done for done, _ in known)}/{sum(total for _, total in known)} " if known else ""
    text = f"{rows}in {len(begun)} of {len(folders)} shares"
    since = min(said.since for said in begun)
    return State("running", shares.id, progress=text, seconds=max(0.0, time.time() - since))


def _progress(folder: Path, stage: str) -> tuple[int, int] | None:
    try:
        found = unseal((folder / "progress.json").read_bytes())
    except (FileNotFoundError, Corrupt):
        return None
    return (found["done"], found["total"]) if found["stage"] == stage else None


def _held(store: Store, stage: str) -> State | None:
    """Of a stage that some process makes, not necessarily a job's."""
    kind, name = stage.split("/")
    lease = store.root / kind / f".{name}.lease"
    return State("running") if lease.exists() and not Lease.is_stale(lease, store.lease_timeout) else None


def _left(rest: Queued | None, why: Said, number: str | None, said: Said) -> State | None:
    """Of a stage that is to be submitted once there is room. why: what the job said that is to submit it."""
    if rest is None or (number is not None and said.job == number):
        return None
    return State("waiting", rest.id, message=why.back if why.back and why.job == rest.id else ROOM)


def _ended(view: View, stage: str, key: str, number: str | None, said: Said, rest: Said) -> State:
    """Of a stage that nothing is known to make: why. rest: what the job said that was to submit what is left."""
    if said.job == number and (message := said.failed.get(stage)):
        return State("failed", number, message=message)
    for need in view.sweep.needs[stage]:
        if need in view.states and view.states[need].state in ("failed", "blocked", "missing"):
            return State("blocked", number, message=f"needs {need}")
    store = view.sweep.store
    if number is None:
        why = rest.failed.get("")  # no stage of its own, but all that it was to submit
        log = _output(slurm.folder(store, slurm.rest(view.sweep.folder)), rest.job)
        return State("failed", rest.job, log, f"not submitted: {why}") if why else State("missing")
    if view.away:
        return State("unknown", number)
    if said.job == number and time.time() - said.made.get(stage, 0.0) < LATE:
        return State("ending", number, message="its job has made it; it is not seen here yet")
    if said.job == number:
        return State("missing", number, message="its job ended without a word: cancelled, or killed")
    why = "its job ended before it began: cancelled, or Python did not start there; do nodes share this disk?"
    return State("missing", number, _output(slurm.folder(store, key), number), why)


def _output(folder: Path, number: str | None) -> str | None:
    """Where what a job printed is."""
    return next(map(str, sorted(folder.glob(f"{number}_*log.out"), reverse=True)), None)
