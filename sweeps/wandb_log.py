"""python -m sweeps.wandb_log FOLDER: one W&B run for each member of a sweep, grouped by the sweep.

A run's id is derived from the member's identity, so that the same member is the same run wherever it is logged from,
and a resumed sweep continues it: what has been logged is noted in the folder and not logged twice. Offline runs lie in
FOLDER/wandb for `wandb sync`. No key is read or written here; W&B finds its own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evolve.store import digest
from sweeps import collect
from sweeps.collect import Measurement, MemberResult, Sweep

TRAINING = ("activate", "train", "reinforce")


def run_id(member: MemberResult) -> str:
    return digest([step["id"] for step in member.steps])[:16]


def mode(wanted: str) -> Any:
    """online where a key is set up, else offline, unless told."""
    import wandb

    return wanted if wanted != "auto" else ("online" if wandb.api.api_key else "offline")


def _marker(sweep: Sweep, member: MemberResult) -> Path:
    return sweep.folder / "wandb" / f"{run_id(member)}.json"


def pending(sweep: Sweep) -> list[tuple[MemberResult, list[Measurement]]]:
    """Members with measurements that have not been logged from this folder."""
    found = []
    for member in sweep.members:
        marker = _marker(sweep, member)
        done = set(json.loads(marker.read_text())) if marker.exists() else set()
        if fresh := [m for m in member.measurements if f"{m.phase} {m.id}" not in done]:
            found.append((member, fresh))
    return found


def log(sweep: Sweep) -> tuple[int, str]:
    """Logs what has not been logged; returns how many runs were touched, and the mode."""
    import wandb

    how = mode(sweep.members[0].config["wandb"]["mode"])
    waiting = pending(sweep) if how != "disabled" else []
    for member, fresh in waiting:
        settings = member.config["wandb"]
        (sweep.folder / "wandb").mkdir(exist_ok=True)
        run = wandb.init(
            project=settings["project"],
            entity=settings["entity"],
            id=run_id(member),
            resume="allow",
            name=member.name,
            group=sweep.folder.name,
            tags=[member.config[section]["name"] for section in ("model", "data", "strategy", "loss")],
            config={key: value for key, value in member.config.items() if key not in ("wandb", "output", "dry_run")},
            mode=how,
            dir=sweep.folder,
            settings=wandb.Settings(silent=True, console="off"),
        )
        run.define_metric("phase")
        run.define_metric("*", step_metric="phase")
        run.define_metric("optimiser_step")
        for kind in TRAINING:
            run.define_metric(f"{kind}/*", step_metric="optimiser_step")
        order = {phase: number for number, phase in enumerate(sweep.phases)}
        told = {m.phase for m in member.measurements if m not in fresh}  # by another benchmark's numbers
        for measurement in fresh:
            for row in _steps(sweep, member, measurement.phase) if measurement.phase not in told else ():
                run.log(row)
            told.add(measurement.phase)
            tokens = {"generated": member.generated[measurement.phase]} if measurement.phase in member.generated else {}
            timing = _timing(sweep, member, measurement.phase)
            run.log({"phase": order[measurement.phase], **_scalars(measurement), **tokens, **timing})
        for benchmark in sweep.benchmarks:
            whose = "" if benchmark in ("refinement", "test_time") else f"{benchmark} "
            for by in ("turns", "sizes"):
                if measured := [one for one in member.of(benchmark) if by in one.metrics]:
                    name = f"{whose}by {'turn' if by == 'turns' else 'answers'}"
                    run.log({name: _table(wandb, measured, by), "phase": order[fresh[-1].phase]})
        run.finish()
        _marker(sweep, member).write_text(json.dumps([f"{m.phase} {m.id}" for m in member.measurements]))
    return len(waiting), how


def _steps(sweep: Sweep, member: MemberResult, phase: str) -> list[dict[str, float]]:
    """What a phase's training logged of its optimiser steps, which are numbered through the member's phases."""
    found, before = [], 0
    for step in member.steps:
        file = sweep.store.folder(step["id"]) / "steps.jsonl"
        if step["kind"] not in TRAINING or not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        if step["phase"] == phase:
            for row in rows:
                number = row.pop("step")
                found.append({"optimiser_step": before + number, **{f"{step['kind']}/{key}": row[key] for key in row}})
        before += len(rows)
    return found


def _timing(sweep: Sweep, member: MemberResult, phase: str) -> dict[str, float]:
    """Where the time of a phase's training went, under timing/, by stage and name."""
    found: dict[str, float] = {}
    for step in member.steps:
        if step["phase"] == phase and step["kind"] in TRAINING:
            record = sweep.store.read(step["id"]) or {}
            found |= {f"timing/{step['kind']}/{name}": value for name, value in record.get("timing", {}).items()}
    return found


def _scalars(measurement: Measurement) -> dict[str, float]:
    found: dict[str, float] = {}
    prefix = "" if measurement.benchmark == "refinement" else f"{measurement.benchmark}/"
    for kind, worth in measurement.headline.items():
        for name in measurement.titles:
            if (estimate := worth.get(name)) is not None:
                key = f"{prefix}{name}/{kind}"
                found[key] = estimate["value"]
                if estimate["low"] is not None:
                    found |= {f"{key}_low": estimate["low"], f"{key}_high": estimate["high"]}
    return found


def _table(wandb: Any, measured: list[Measurement], by: str) -> Any:
    """One benchmark's numbers by turn (turns), or by answers used, with the tokens they cost (sizes)."""
    place = ["turn"] if by == "turns" else ["kind", "answers", "tokens"]
    table = wandb.Table(columns=["phase", *place, "metric", "value", "low", "high", "n", "protocol", "record"])
    for made in measured:
        for place, worth in _points(made.metrics, by):
            for name in made.titles:
                if estimate := worth.get(name):
                    numbers = [estimate[key] for key in ("value", "low", "high", "n")]
                    table.add_data(made.phase, *place, name, *numbers, made.metrics["protocol"], made.id)
    return table


def _points(metrics: dict[str, Any], by: str) -> Iterator[tuple[list[Any], dict[str, Any]]]:
    for part in metrics[by]:
        if by == "turns":
            yield [part["turn"]], part
            continue
        for kind, worth in part["worth"].items():
            yield [kind, part["answers"], part["tokens"]["value"]], worth


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        sweep = collect.load(Path(sys.argv[1]).absolute())
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    touched, how = log(sweep)
    if touched:
        where = f"; wandb sync {sweep.folder}/wandb/offline-* sends them" if how == "offline" else ""
        print(f"{touched} runs logged {how}, group {sweep.folder.name}{where}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
