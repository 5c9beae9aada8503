"""Stops a sweep's jobs under Slurm. What is finished stays, and the sweep's command goes on from there."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from evolve import slurm, status
from evolve.config import ConfigError


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
        mine = {key for key, _ in status.submitted(sweep).values()} & queue.keys()
        others = {
            key
            for path in folder.resolve().parent.glob("*/sweep.json")
            if path.parent.resolve() != folder.resolve()
            for key, _ in status.submitted(status.load(path.parent)).values()
        }
        kept = set() if given.all else mine & others
        rest = {slurm.rest(folder)} & queue.keys()
        shares = {f"{key}-shares" for key in mine - kept} & queue.keys()
        stopped = sorted(queue[key].id for key in (mine - kept) | rest | shares)
        slurm.cancel(stopped)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    left = f"; {len(kept)} go on, for other sweeps (--all stops them too)" if kept else ""
    print(f"{len(stopped)} jobs stopped{left}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
