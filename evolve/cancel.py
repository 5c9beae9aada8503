"""Stops a sweep's jobs under Slurm. What is finished stays, and the sweep's command goes on from there."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from evolve import slurm, states
from evolve.config import ConfigError


@dataclass(frozen=True)
class Cancelled:
    """Of a sweep's jobs: how many were stopped, go on as other sweeps want them, or are other users'."""

    stopped: int
    kept: int
    others: int


def cancel(folder: Path, every: bool) -> Cancelled:
    """Stops a sweep's jobs; where `every` one is to end, also those that other sweeps want. Raises ConfigError."""
    sweep = states.load(folder)
    with slurm.turn(sweep.store):  # a submission that is under way is waited for
        queue = slurm.queue(sweep.store)
        there = {(key, job.id) for key, job in queue.items()}
        mine = there.intersection(states.submitted(folder).values())
        sweeps = [path.parent for path in folder.resolve().parent.glob("*/sweep.json")]
        wanted = [states.wanted(other) for other in sweeps if other != folder.resolve()]
        kept = set() if every else mine & set().union(*wanted)
        ending = {key for key, _ in mine - kept} | {slurm.rest(folder)} & queue.keys()
        others = {key for key in ending if queue[key].user != str(os.getuid())}  # which Slurm wouldn't let us stop
        ending -= others
        ending |= {f"{key}-shares" for key in ending}
        stopped = sorted(queue[key].id for key in ending & queue.keys())
        try:
            slurm.cancel(stopped)
        finally:  # the sweep waits for none of them any more, whatever Slurm has heard
            slurm.note(folder, cancelled=stopped)
    return Cancelled(len(stopped), len(kept), len(others))


def main() -> int:
    """The exit status: 0 done, 2 no such sweep, or Slurm can't be asked."""
    parser = argparse.ArgumentParser(prog="python -m evolve.cancel", description="Stops a sweep's jobs under Slurm.")
    states.add_folder(parser)
    parser.add_argument("--all", action="store_true", help="also jobs whose results other sweeps wait for")
    given = parser.parse_args()
    try:
        made = cancel(states.named(given.folder), given.all)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = f"; {made.kept} go on, for other sweeps (--all stops them too)" if made.kept else ""
    left += f"; {made.others} go on, which are other users'" if made.others else ""
    print(f"{made.stopped} jobs stopped{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
