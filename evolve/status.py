"""Shows how a sweep stands: its members, its stages, their jobs, logs and times, what failed and why."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from rich.table import Table
from rich.text import Text

from evolve import states
from evolve.config import ConfigError
from evolve.show import console, duration
from evolve.states import INSIDE, State, View, load, look
from evolve.store import refresh

STYLE = {  # the first of a member's states is what its table says
    "failed": "bold red",
    "running": "cyan",
    "ending": "cyan",
    "waiting": "yellow",
    "unknown": "yellow",
    "blocked": "red",
    "missing": "magenta",
    "done": "green",
}
ON_ITS_WAY = ("running", "ending", "waiting", "unknown")
WHY = {
    "Dependency": "for the results of other jobs",
    "": "to be looked at",
    "BeginTime": "back in the queue, for two minutes",
    **dict.fromkeys(("PartitionTimeLimit", "JobHeldUser", "JobHeldAdmin"), "will not start by themselves: see squeue"),
}


def counts(view: View) -> str:
    """'3 done, 1 running'."""
    return ", ".join(f"{view.count[state]} {state}" for state in reversed(STYLE) if view.count[state])


def show(view: View, most: int = 20, stages: bool = False) -> None:
    """Members x phases, then each stage that isn't done, the `most` first of a state; or every stage."""
    out, sweep = console(), view.sweep
    out.print(f"sweep   {sweep.folder}", soft_wrap=True)
    if view.away:
        out.print(f"warning: {view.away}; what follows goes by the store and the jobs' own words", style="yellow")
    out.print(f"stages  {counts(view)}")
    if stages:
        _stages(view)
    else:
        _members(view, most)
        _lines(view, most)
    jobs = {one.job: one.message for one in view.states.values() if one.state == "waiting" and one.message != INSIDE}
    for why, number in Counter(jobs.values()).most_common():
        out.print(f"waiting {number} jobs: {WHY.get(why, why)}", style=STYLE["waiting"])


def _members(view: View, most: int) -> None:
    members = view.sweep.members
    phases = list(dict.fromkeys(step["phase"] for member in members for step in member["steps"]))
    table = Table("member", *phases, title="stages that are done, of how many", title_justify="left")
    for member in members[:most]:
        cells = []
        for phase in phases:
            here = Counter(view.states[step["id"]].state for step in member["steps"] if step["phase"] == phase)
            worst = next((state for state in STYLE if here[state]), "done")
            text = f"{here['done']}/{here.total()}" if here else "-"
            cells.append(Text(text if worst in ("done", "waiting") else f"{text} {worst}", style=STYLE[worst]))
        table.add_row(member["name"], *cells)
    console().print(table)
    if len(members) > most:
        console().print(f"        and {len(members) - most} more members")


def _lines(view: View, most: int) -> None:
    for state in ("running", "ending", "unknown", "failed", "missing"):
        these = [(stage, one) for stage, one in view.states.items() if one.state == state]
        for stage, one in these[:most]:
            job = f"job {one.job}" if one.job else ""
            words = "  ".join(part for part in (job, one.progress, _history(one), one.message) if part)
            console().print(f"{state:8}{stage}  {words}".rstrip(), style=STYLE[state], soft_wrap=True)
            if one.log:
                console().print(f"        {one.log}", soft_wrap=True)
        if len(these) > most:
            console().print(f"{state:8}and {len(these) - most} more")


def _history(one: State) -> str:
    """'1 min 2 s, failed once, requeued 2 times', as far as there is something to say."""
    parts = [] if one.seconds is None else [duration(one.seconds)]
    for what, number in (("failed", one.failures), ("requeued", one.requeues)):
        if number:
            parts.append(f"{what} {'once' if number == 1 else f'{number} times'}")
    return ", ".join(parts)


def _stages(view: View) -> None:
    """Each member's stages, those that several share with the first of them."""
    table = Table("member", "phase", "stage", "state", "job", "time", "log, what is wrong")
    seen: set[str] = set()
    for member in view.sweep.members:
        for step in member["steps"]:
            stage = step["id"]
            if stage in seen:
                continue
            seen.add(stage)
            one = view.states[stage]
            state = Text(f"{one.state} {one.progress}".rstrip(), style=STYLE[one.state])
            words = "\n".join(part for part in (one.message, one.log) if part)
            table.add_row(member["name"], step["phase"], stage, state, one.job or "", _history(one), words)
    console().print(table)


def watch(folder: Path, every: float = 5.0) -> View:
    """Shows a sweep until nothing of it waits or runs. Returns how it ended."""
    out = console()
    last, quiet = None, False
    began = time.time()
    while True:
        view = look(load(folder))
        if (view.count, view.away) != last:
            last = view.count, view.away
            if out.is_terminal:
                out.clear()
                show(view)
            else:
                out.print(f"{time.strftime('%H:%M:%S')} {counts(view)}{view.away and f' ({view.away})'}")
        undone = [stage for stage, one in view.states.items() if one.state != "done"]
        before, quiet = quiet, not any(view.count[state] for state in ON_ITS_WAY)
        if quiet and (before or not undone):
            if not out.is_terminal:
                show(view)
            out.print(f"ended   after {duration(time.time() - began)} of watching")
            return view
        if quiet:  # what has just been written may not be seen yet
            refresh(view.sweep.store.folder(stage).parent for stage in undone)
        time.sleep(every)


def main() -> int:
    """The exit status: 0 all is done or on its way, 1 something failed or is missing, 2 no such sweep."""
    parser = argparse.ArgumentParser(prog="python -m evolve.status", description="How a sweep stands.")
    states.add_folder(parser)
    parser.add_argument("--watch", action="store_true", help="stay until nothing waits or runs")
    parser.add_argument("--stages", action="store_true", help="every stage: its state, job, time and log")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    given = parser.parse_args()
    if given.watch and given.json:
        parser.error("--watch shows tables as things change; --json says it once: take one of them")
    try:
        folder = states.named(given.folder)
        view = watch(folder) if given.watch else look(load(folder))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if given.json:
        if view.away:
            print(f"warning: {view.away}", file=sys.stderr)
        print(json.dumps({stage: asdict(state) for stage, state in view.states.items()}, indent=1))
    elif not given.watch:
        show(view, stages=given.stages)
    return int(any(view.count[state] for state in ("failed", "blocked", "missing")))


if __name__ == "__main__":
    sys.exit(main())
