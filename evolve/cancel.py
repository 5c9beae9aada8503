"""Stops a sweep's jobs under Slurm. What is finished stays, and the sweep's command goes on from there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evolve import slurm, states
from evolve.config import ConfigError


def cancel(folder: Path, every: bool) -> tuple[int, int]:
    """How many jobs of a sweep's go on, as other sweeps want them (none where `every` one is to end), and were stopped.

    Raises ConfigError.
    """
    sweep = states.load(folder)
    with slurm.turn(sweep.store):  # a submission that is under way is waited for
        queue = slurm.queue(sweep.store)
        there = {(key, job.id) for key, job in queue.items()}
        mine = there.intersection(states.submitted(folder).values())
        others = [path.parent for path in folder.resolve().parent.glob("*/sweep.json")]
        wanted = [states.wanted(other) for other in others if other != folder.resolve()]
        kept = set() if every else mine & set().union(*wanted)
        ending = {key for key, _ in mine - kept}
        ending |= {f"{key}-shares" for key in ending} | {slurm.rest(folder)}
        stopped = sorted(queue[key].id for key in ending & queue.keys())
        slurm.cancel(stopped)
        slurm.note(folder, cancelled=stopped)
    return len(kept), len(stopped)


def main() -> int:
    """The exit status: 0 done, 2 no such sweep, or Slurm can't be asked."""
    parser = argparse.ArgumentParser(prog="python -m evolve.cancel", description="Stops a sweep's jobs under Slurm.")
    states.add_folder(parser)
    parser.add_argument("--all", action="store_true", help="also jobs whose results other sweeps wait for")
    given = parser.parse_args()
    try:
        kept, stopped = cancel(states.named(given.folder), given.all)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = f"; {kept} go on, for other sweeps (--all stops them too)" if kept else ""
    print(f"{stopped} jobs stopped{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
