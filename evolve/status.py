"""How a sweep stands: every stage of every member, from the store, Slurm's queue and what its jobs said."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from evolve.config import ConfigError
from evolve.show import console, duration
from evolve.store import RECORD, Lease, Store

ORDER = ("failed", "running", "waiting", "blocked", "missing", "done")
STYLE = {
    "failed": "bold red",
    "running": "cyan",
    "waiting": "yellow",
    "blocked": "red",
    "missing": "magenta",
    "done": "green",
}
INSIDE = "its job runs"
ROOM = "for room in the queue, when the others have ended"
WHY = {
    "Dependency": "for the results of other jobs",
    "": "to be looked at",
    "BeginTime": "back in the queue, for two minutes",
    **dict.fromkeys(("PartitionTimeLimit", "JobHeldUser", "JobHeldAdmin"), "will not start by themselves: see squeue"),
}


@dataclass
class State:
    """Of a stage. state: done, running, waiting (in the queue), failed, blocked (needs one that failed), missing."""

    state: str
    job: str | None = None  # Slurm's id
    log: str | None = None
    message: str = ""
    progress: str = ""
    seconds: float | None = None


@dataclass
class Sweep:
    folder: Path
    store: Store
    members: list[dict[str, Any]]
    needs: dict[str, list[str]]  # by stage, inputs first


def load(folder: Path) -> Sweep:
    """Raises ConfigError where there is no sweep."""
    try:
        content = json.loads((folder / "sweep.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigError(f"{folder}: no sweep there; it is the folder that the sweep's command named") from None
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


def submitted(folder: Path) -> dict[str, tuple[str, str]]:
    """(job's key, Slurm's id) by stage of a sweep, of the last job that was to make it."""
    path, found = folder / "jobs.jsonl", dict[str, tuple[str, str]]()
    for line in path.read_text().splitlines() if path.exists() else ():
        note = json.loads(line)
        found |= {stage: (key, number) for stage, (key, number) in note["stages"].items()}
    return found


def states(sweep: Sweep) -> dict[str, State]:
    """Of each stage, by id. Raises ConfigError where Slurm can't be asked."""
    from evolve import slurm

    jobs = submitted(sweep.folder)
    done = {stage for stage in sweep.needs if (sweep.store.folder(stage) / RECORD).exists()}
    open_ = {key for stage, (key, _) in jobs.items() if stage not in done}
    rest = slurm.rest(sweep.folder)
    queue = (
        slurm.queue(sweep.store)
        if open_ or (slurm.folder(sweep.store, rest).exists() and len(done) < len(sweep.needs))
        else {}
    )
    told = {key: _events(slurm.folder(sweep.store, key)) for key in open_}
    found: dict[str, State] = {}
    for stage in sweep.needs:
        key, number = jobs.get(stage, ("", None))
        if stage in done:
            found[stage] = State("done", number)
            continue
        kind, name = stage.split("/")
        lease = sweep.store.root / kind / f".{name}.lease"
        events = told.get(key, {})
        log = (
            slurm.folder(sweep.store, key) / f"{stage.replace('/', '-')}.log"
            if key
            else sweep.folder / "logs" / f"{stage.replace('/', '-')}.log"
        )
        shown = str(log) if log.exists() else None
        if key in queue:
            live = queue[key]
            if live.state == "RUNNING" and events.get("now") == stage:
                found[stage] = State(
                    "running", live.id, shown, progress=_progress(slurm.folder(sweep.store, key), stage)
                )
            else:
                why = live.reason if live.state == "PENDING" and live.reason not in ("None", "") else ""
                found[stage] = State("waiting", live.id, shown, why if live.state == "PENDING" else INSIDE)
        elif lease.exists() and not Lease.is_stale(lease, sweep.store.lease_timeout):
            found[stage] = State("running", None, shown)
        elif rest in queue and (number is None or events.get("job") != number):
            found[stage] = State("waiting", queue[rest].id, None, ROOM)
        elif events.get("job") == number and (message := events.get("failed", {}).get(stage)):
            found[stage] = State("failed", number, shown, message)
        elif lost := [
            need
            for need in sweep.needs[stage]
            if need in found and found[need].state in ("failed", "blocked", "missing")
        ]:
            found[stage] = State("blocked", number, None, f"needs {lost[0]}")
        elif number is None:
            found[stage] = State("missing", None, shown)
        elif events.get("job") == number:
            found[stage] = State("missing", number, shown, "its job ended without a word: cancelled, or killed")
        else:
            said = sorted(slurm.folder(sweep.store, key).glob(f"{number}_*log.out"))
            why = "its job ended before it began: cancelled, or Python did not start there; do nodes share this disk?"
            found[stage] = State("missing", number, str(said[-1]) if said else None, why)
    return found


def _events(folder: Path) -> dict[str, Any]:
    """What a job's last run said: which stage it is at, and which failed."""
    now, job, failed = None, None, dict[str, str]()
    path = folder / "events.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:  # being written
            continue
        job = event["job"]
        if event["event"] == "start":
            now, failed = None, {}
        elif event["event"] == "stage":
            now = event["stage"]
        elif event["event"] in ("failed", "lost"):
            failed[event["stage"]] = event["message"]
    return {"now": now, "failed": failed, "job": job}


def _progress(folder: Path, stage: str) -> str:
    try:
        found = json.loads((folder / "progress.json").read_text())
    except FileNotFoundError:
        return ""
    return f"{found['done']}/{found['total']}" if found["stage"] == stage else ""


def show(sweep: Sweep, found: Mapping[str, State], most: int = 20) -> None:
    """Members x phases, then each stage that isn't done, the `most` first of a state."""
    out = console()
    count = Counter(state.state for state in found.values())
    out.print(f"sweep   {sweep.folder}", soft_wrap=True)
    out.print("stages  " + ", ".join(f"{count[state]} {state}" for state in reversed(ORDER) if count[state]))
    phases = list(dict.fromkeys(step["phase"] for member in sweep.members for step in member["steps"]))
    table = Table("member", *phases, title="stages that are done, of how many", title_justify="left")
    for member in sweep.members[:most]:
        cells = []
        for phase in phases:
            here = Counter(found[step["id"]].state for step in member["steps"] if step["phase"] == phase)
            worst = next((state for state in ORDER if here[state]), "done")
            text = f"{here['done']}/{here.total()}" if here else "-"
            cells.append(Text(text if worst in ("done", "waiting") else f"{text} {worst}", style=STYLE[worst]))
        table.add_row(member["name"], *cells)
    out.print(table)
    if len(sweep.members) > most:
        out.print(f"        and {len(sweep.members) - most} more members")
    for state in ("running", "failed", "missing"):
        these = [(stage, one) for stage, one in found.items() if one.state == state]
        for stage, one in these[:most]:
            job = f"  job {one.job}" if one.job else ""
            words = "  ".join(part for part in (one.progress, one.message) if part)
            out.print(f"{state:8}{stage}{job}  {words}".rstrip(), style=STYLE[state], soft_wrap=True)
            if one.log:
                out.print(f"        {one.log}", soft_wrap=True)
        if len(these) > most:
            out.print(f"{state:8}and {len(these) - most} more")
    jobs = {one.job: one.message for one in found.values() if one.state == "waiting" and one.message != INSIDE}
    for why, number in Counter(jobs.values()).most_common():
        out.print(f"waiting {number} jobs: {WHY.get(why, why)}", style=STYLE["waiting"])


def watch(folder: Path, every: float = 5.0) -> dict[str, State]:
    """Shows a sweep until nothing of it waits or runs. Returns how it ended."""
    out = console()
    last, quiet = None, 0
    began = time.time()
    while True:
        sweep = load(folder)
        found = states(sweep)
        count = Counter(state.state for state in found.values())
        if count != last:
            last = count
            if out.is_terminal:
                out.clear()
                show(sweep, found)
            else:
                counts = ", ".join(f"{count[state]} {state}" for state in reversed(ORDER) if count[state])
                out.print(f"{time.strftime('%H:%M:%S')} {counts}")
        quiet = 0 if count["running"] or count["waiting"] else quiet + 1
        if quiet == 2:  # a record that has just been written may take a moment to be seen
            if not out.is_terminal:
                show(sweep, found)
            out.print(f"ended   after {duration(time.time() - began)} of watching")
            return found
        time.sleep(every)


def main() -> int:
    """The exit status: 0 all is done or on its way, 1 something failed or is missing, 2 no such sweep."""
    parser = argparse.ArgumentParser(prog="python -m evolve.status", description="How a sweep stands.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), help="a sweep's folder, or an output: its newest"
    )
    parser.add_argument("--watch", action="store_true", help="stay until nothing waits or runs")
    parser.add_argument("--json", action="store_true", help="every stage as JSON")
    given = parser.parse_args()
    try:
        folder = given.folder if (given.folder / "sweep.json").exists() else newest(given.folder)
        if given.watch:
            found = watch(folder)
        else:
            sweep = load(folder)
            found = states(sweep)
            if given.json:
                print(json.dumps({stage: asdict(state) for stage, state in found.items()}, indent=1))
            else:
                show(sweep, found)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return int(any(state.state in ("failed", "blocked", "missing") for state in found.values()))


if __name__ == "__main__":
    sys.exit(main())
