"""What W&B is told of a sweep: rows of metrics, tables, artefacts by reference, figures. wandb_log.py logs it.

Numbers come from records alone, and `phase` is the method's (base 0, sft 1, offline 2, iteration n 2 + n): a member has
the same rows in every sweep. Logged from a second folder, they are appended to its run again: W&B keeps both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from evolve import plan
from evolve.store import digest
from sweeps import figures
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.report import PAGE
from sweeps.samples import Chain
from sweeps.training import TRAINING, stages

Row = dict[str, Any]
SAMPLES: list[str | int] = [
    "phase",
    "benchmark",
    "id",
    "prompt",
    "turn",
    "answer",
    "score",
    "about",
    "record",
    "answers",
]


def member_id(member: MemberResult) -> str:
    return digest([step["id"] for step in member.steps])[:16]


def runs(sweep: Sweep) -> dict[str, MemberResult]:
    """Each run and its member: the first, where several have the same stages (seeds of what draws nothing)."""
    found: dict[str, MemberResult] = {}
    for member in sweep.members:
        found.setdefault(member_id(member), member)
    return found


def sweep_id(sweep: Sweep) -> str:
    """Of the run that stands for the sweep as a whole."""
    return digest(sorted(map(member_id, sweep.members)))[:16]


def rows(sweep: Sweep, member: MemberResult, fresh: Sequence[Measurement]) -> Iterator[Row]:
    """The numbers of a member's phases: each optimiser step of their training, then a row for each measurement."""
    told = {m.phase for m in member.measurements if m not in fresh}  # by another benchmark's numbers
    for measurement in fresh:
        phase = measurement.phase
        if phase not in told:
            yield from _steps(sweep, member, phase)
        told.add(phase)
        tokens = {"generated": member.generated[phase]} if phase in member.generated else {}
        yield {"phase": plan.place(phase), **scalars(measurement), **tokens, **_timing(sweep, member, phase)}


def _steps(sweep: Sweep, member: MemberResult, phase: str) -> Iterator[Row]:
    """What a phase's training logged of its optimiser steps, which are numbered through the member's phases."""
    for trained, stage_id, before, logged in stages(sweep, member):
        if trained == phase:
            kind = stage_id.split("/")[0]
            for row in logged:
                number = row.pop("step")
                yield {"optimiser_step": before + number, **{f"{kind}/{key}": row[key] for key in row}}


def _timing(sweep: Sweep, member: MemberResult, phase: str) -> Row:
    """Where the time of a phase's training went, under timing/, by stage and name."""
    found: Row = {}
    for step in member.steps:
        if step["phase"] == phase and step["kind"] in TRAINING:
            record = sweep.record(step["id"]) or {}
            found |= {f"timing/{step['kind']}/{name}": value for name, value in record.get("timing", {}).items()}
    return found


def scalars(measurement: Measurement) -> dict[str, float]:
    """A benchmark's headline: metric/kind, and the ends of its interval where it has one."""
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


def tables(sweep: Sweep, member: MemberResult, chains: Sequence[Chain]) -> Row:
    """Of each benchmark its numbers by turn and by answers used, and the member's share of the page's sample chains."""
    found = {}
    for benchmark in sweep.benchmarks:
        whose = "" if benchmark in ("refinement", "test_time") else f"{benchmark} "
        for by, name in (("turns", "by turn"), ("sizes", "by answers")):
            if measured := [one for one in member.of(benchmark) if by in one.metrics]:
                found[f"{whose}{name}"] = _numbers(measured, by)
    place = sweep.members.index(member)
    if own := [chain for chain in chains if place in chain.members]:
        found["samples"] = _samples(own)
    return found


def _numbers(measured: Sequence[Measurement], by: str) -> Any:
    """One benchmark's numbers by turn (turns), or by answers used, with the tokens they cost (sizes)."""
    import wandb

    place = ["turn"] if by == "turns" else ["kind", "answers", "tokens"]
    table = wandb.Table(columns=["phase", *place, "metric", "value", "low", "high", "n", "protocol", "record"])
    for made in measured:
        for place, worth in _points(made.metrics, by):
            for name in made.titles:
                if estimate := worth.get(name):
                    numbers = [estimate[key] for key in ("value", "low", "high", "n")]
                    table.add_data(made.phase, *place, name, *numbers, made.metrics["protocol"], made.id)
    return table


def _points(metrics: Row, by: str) -> Iterator[tuple[list[Any], Row]]:
    for part in metrics[by]:
        if by == "turns":
            yield [part["turn"]], part
            continue
        for kind, worth in part["worth"].items():
            yield [kind, part["answers"], part["tokens"]["value"]], worth


def _samples(chains: Sequence[Chain]) -> Any:
    """A line for each turn. `record`: of the evaluation; `answers`: of the stage that wrote them."""
    import wandb

    table = wandb.Table(columns=SAMPLES)
    for chain in chains:
        for number, turn in enumerate(chain.turns, 1):
            said = [turn.score, turn.about, chain.record, chain.answers]
            table.add_data(chain.phase, chain.benchmark, chain.id, chain.prompt, number, turn.text, *said)
    return table


def artifacts(sweep: Sweep, member: MemberResult) -> Iterator[Any]:
    """The member's last model and the rows that it was trained on, by reference: nothing is uploaded or read.

    Metadata: the stage, its identity, and the size and SHA-256 of each file, all from its record.
    """
    trained = [made for step in member.steps if step["kind"] in TRAINING and (made := sweep.record(step["id"]))]
    for model in trained[-1:]:
        yield _artifact(sweep, model, "model")
        for one in model["inputs"].values():
            if "@" not in one and (made := sweep.record(one)) and "rows.jsonl" in made["files"]:  # @: from outside
                yield _artifact(sweep, made, "dataset")


def _artifact(sweep: Sweep, record: Row, kind: str) -> Any:
    import wandb

    metadata = {"stage": record["id"], "identity": record["identity"], "files": record["files"]}
    made = wandb.Artifact(record["id"].replace("/", "-"), type=kind, metadata=metadata)
    made.add_reference(sweep.store.folder(record["id"]).resolve().as_uri(), checksum=False)  # the record has hashes
    return made


def media(sweep: Sweep) -> dict[str, Any]:
    """What belongs to no member but to all: the sweep's figures, and its page if it has been written."""
    import wandb

    found: dict[str, Any] = {
        f"figures/{drawn.name}": wandb.Image(str(sweep.folder / f"{drawn.name}.png"), caption=drawn.title)
        for drawn in figures.write(sweep)
    }
    if (page := sweep.folder / PAGE).exists():
        found["report"] = wandb.Html(page.read_text(encoding="utf-8"), inject=False)
    return found
