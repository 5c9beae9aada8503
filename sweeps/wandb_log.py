"""python -m sweeps.wandb_log FOLDER: one W&B run for each member of a sweep, and one for the sweep itself.

A run's id is derived from the member's stages, so that the same member is the same run wherever it is logged from, and
a resumed sweep continues it: what has been logged is noted in the folder and not logged twice from there. Members of
the same stages are one run, with the first one's name and settings. Runs are written to FOLDER/wandb, whatever the
mode; online, `wandb sync` then sends them. So W&B may be slow or down, and is told the same either way. No key is read
or written here; W&B finds its own.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evolve import plan
from evolve.config import ConfigError
from evolve.store import replace
from sweeps import collect, samples, wandb_rows
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.training import TRAINING
from sweeps.wandb_rows import Row

LIMIT = 300  # seconds for sending
# W&B's own limits on a server that is down (settings of the environment win): it would try for days.
PATIENCE = {"WANDB_X_GRAPHQL_RETRY_MAX": "2", "WANDB_HTTP_TIMEOUT": "20"}


def mode(wanted: str) -> str:
    """online where a key is set up, else offline, unless told."""
    import wandb

    return wanted if wanted != "auto" else ("online" if wandb.login(prompt=False, verify=False) else "offline")


def _marker(sweep: Sweep, run: str) -> Path:
    return sweep.folder / "wandb" / f"{run}.json"


def _noted(sweep: Sweep, run: str) -> set[str]:
    """What of a run has been logged from this folder."""
    try:
        return set(json.loads(_marker(sweep, run).read_bytes()))
    except (FileNotFoundError, ValueError):  # damaged: logged again, into the same run
        return set()


def pending(sweep: Sweep) -> list[tuple[MemberResult, list[Measurement]]]:
    """Members with measurements that have not been logged from this folder; of equal ones the first."""
    found = []
    for run, member in wandb_rows.runs(sweep).items():
        done = _noted(sweep, run)
        if fresh := [m for m in member.measurements if f"{m.phase} {m.id}" not in done]:
            found.append((member, fresh))
    return found


def log(sweep: Sweep) -> tuple[int, str]:
    """Logs what has not been logged; returns how many runs were touched, and the mode."""
    how = mode(sweep.members[0].config["wandb"]["mode"])
    waiting = pending(sweep) if how != "disabled" else []
    chains, chosen = samples.chains(sweep) if waiting else ([], "")
    for member, fresh in waiting:
        config = {key: value for key, value in member.config.items() if key not in ("wandb", "output", "dry_run")}
        tags = [member.config[section]["name"] for section in ("model", "data", "strategy", "loss")]
        last = plan.place(fresh[-1].phase)
        told = [
            *wandb_rows.rows(sweep, member, fresh),
            {**wandb_rows.tables(sweep, member, chains), "phase": last, "samples chosen": chosen},
        ]
        about = {"name": member.name, "job_type": "member", "tags": tags, "config": config}
        run = wandb_rows.member_id(member)
        _run(sweep, run, about, told, wandb_rows.artifacts(sweep, member))
        replace(_marker(sweep, run), json.dumps([f"{m.phase} {m.id}" for m in member.measurements]))
    if waiting:
        config = {"command": sweep.command, "experiment": sweep.experiment, "members": [m.name for m in sweep.members]}
        about = {"name": sweep.folder.name, "job_type": "sweep", "config": config}
        everything = {**wandb_rows.media(sweep), "phase": plan.place(sweep.phases[-1])}
        _run(sweep, wandb_rows.sweep_id(sweep), about, [everything])
    return len(waiting), how


def _run(sweep: Sweep, run_id: str, about: Row, rows: Iterable[Row], artifacts: Iterable[Any] = ()) -> None:
    """Writes rows of a run into the folder. `wandb sync` puts them after those that the run has already."""
    import wandb

    (sweep.folder / "wandb").mkdir(exist_ok=True)
    settings = sweep.members[0].config["wandb"]
    run = wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        id=run_id,
        resume="allow",
        group=sweep.folder.name,
        mode="offline",
        dir=sweep.folder,
        settings=wandb.Settings(silent=True, console="off"),
        **about,
    )
    run.define_metric("phase")
    run.define_metric("*", step_metric="phase")
    run.define_metric("optimiser_step")
    for kind in TRAINING:
        run.define_metric(f"{kind}/*", step_metric="optimiser_step")
    for row in rows:
        run.log(row)
    for artifact in artifacts:
        run.log_artifact(artifact)
    run.finish()


def unsent(folder: Path) -> list[Path]:
    """Runs in a sweep's folder that W&B has not got in full."""
    return [run for run in folder.glob("wandb/offline-run-*/*.wandb") if not run.with_suffix(".wandb.synced").exists()]


def send(folder: Path) -> str:
    """Sends what has not been sent; returns what went wrong, in a line, or nothing."""
    try:
        said = subprocess.run(
            [sys.executable, "-m", "wandb", "sync", "wandb"],
            cwd=folder,
            env=PATIENCE | os.environ | {"WANDB_SILENT": "false"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT,
        ).stdout
    except subprocess.TimeoutExpired:
        return f"not done in {LIMIT} s"
    if not unsent(folder):
        return ""
    lines = [line.removeprefix("wandb: ") for line in said.splitlines()]
    last = ([line for line in lines if line.startswith("ERROR ")] or lines or ["no answer"])[-1]
    return last.removeprefix("ERROR ").removeprefix("while retrying: ").rstrip(":. ")


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    folder = Path(sys.argv[1]).absolute()
    os.environ.setdefault("WANDB_SILENT", "true")
    os.environ.setdefault("WANDB_DATA_DIR", str(folder / "wandb"))  # where tables wait to be sent; else the home
    try:
        sweep = collect.load(folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    import wandb

    try:
        touched, how = log(sweep)
    except (OSError, wandb.Error) as error:
        print(f"error: {str(error).splitlines()[0]}; the same command goes on from there", file=sys.stderr)
        return 1
    said = [f"{touched} member{'s' * (touched > 1)} logged in group {sweep.folder.name}"] if touched else []
    if unsent(sweep.folder) and (touched or how == "online"):
        problem = send(sweep.folder) if how == "online" else how
        later = f"{problem}, so not sent; {shlex.join(['wandb', 'sync', f'{sweep.folder}/wandb'])} sends them"
        said.append(later if problem else "sent")
    if said:
        print(", ".join(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
