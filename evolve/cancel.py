"""Stops a sweep's jobs under Slurm. What is finished stays, and the sweep's command goes on from there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

from evolve import slurm, status
from evolve.config import ConfigError


def _jobs(folder: Path, queue: Mapping[str, slurm.Queued]) -> set[str]:
    """The keys of a sweep's jobs that are in the queue."""
    return {key for key, number in status.submitted(folder).values() if key in queue and queue[key].id == number}


def main() -> int:
    """The exit status: 0 done, 2 no such sweep, or Slurm can't be asked."""
    parser = argparse.ArgumentParser(prog="python -m evolve.cancel", description="Stops a sweep's jobs under Slurm.")
    parser.add_argument(
        "folder", nargs="?", type=Path, default=Path("outputs"), help="a sweep's folder, or an output: its newest"
    )
    parser.add_argument("--all", action="store_true", help="also jobs whose results other sweeps wait for")
    given = parser.parse_args()
    try:
        folder = given.folder if (given.folder / "sweep.json").exists() else status.newest(given.folder)
        sweep = status.load(folder)
        queue = slurm.queue(sweep.store)
        slurm.cancel(queue[key].id for key in {slurm.rest(folder)} & queue.keys())  # first, or it submits others
        mine = _jobs(folder, queue)
        others = {
            key
            for path in folder.resolve().parent.glob("*/sweep.json")
            if path.parent.resolve() != folder.resolve()
            for key in _jobs(path.parent, queue)
        }
        kept = set() if given.all else mine & others
        shares = {f"{key}-shares" for key in mine - kept} & queue.keys()
        stopped = sorted(queue[key].id for key in (mine - kept) | shares)
        slurm.cancel(stopped)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = f"; {len(kept)} go on, for other sweeps (--all stops them too)" if kept else ""
    print(f"{len(stopped)} jobs stopped{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
