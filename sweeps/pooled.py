"""Figure 1's way of reporting: members that differ in template and evaluation seed alone, as one curve by turn. [paper]

A prompt is one cluster, whatever the number of templates and seeds it was asked with: its mean over them is taken
first, so the interval is over prompts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from evals import refinement, statistics
from sweeps import tables
from sweeps.collect import Measurement, MemberResult, Sweep


def shown(sweep: Sweep) -> list[tables.Shown]:
    """A table for each metric, with a row for each group of members and phase. Empty where no members go together."""
    found = []
    groups = [group for group in _groups(sweep) if len(group) > 1]
    for metric, title in refinement.METRICS.items():
        rows = [row for group in groups for row in _rows(sweep, group, metric)]
        if rows:
            turns = max(map(len, rows)) - 2
            header = ["members", "phase", *(f"turn {turn}" for turn in range(1, turns + 1))]
            about = f"{title} by turn, pooled over templates and seeds of evaluation, ±: 95 % interval over prompts"
            found.append(tables.Shown(about, [header, *rows]))
    return found


def _groups(sweep: Sweep) -> list[list[MemberResult]]:
    """Members whose settings are equal but for the template and eval.seed."""
    found: dict[str, list[MemberResult]] = {}
    for member in sweep.members:
        config: dict[str, Any] = {key: value for key, value in member.config.items() if key != "template"}
        config["eval"] = {key: value for key, value in config["eval"].items() if key != "seed"}
        found.setdefault(json.dumps(config, sort_keys=True), []).append(member)
    return list(found.values())


def _rows(sweep: Sweep, group: list[MemberResult], metric: str) -> Iterator[list[str]]:
    templates = {member.config["template"]["name"] for member in group}
    seeds = {member.config["eval"]["seed"] for member in group}
    about = " x ".join(f"{len(of)} {what}" for of, what in ((templates, "templates"), (seeds, "seeds")) if len(of) > 1)
    name = f"{group[0].config['model']['name']}, {about}"
    for phase in sweep.phases:
        measured = [one for member in group for one in member.of("refinement") if one.phase == phase]
        if len(measured) == len(group):
            cells = list(_cells(sweep, measured, metric))
            if cells:
                yield [name, phase, *cells]


def _cells(sweep: Sweep, measured: list[Measurement], metric: str) -> Iterator[str]:
    for turn in range(1, len(measured[0].metrics["turns"]) + 1):
        values: dict[str, list[float]] = {}
        for one in measured:
            for prompt, value in sweep.items(one).get(f"turn {turn}", {}).get(metric, {}).items():
                values.setdefault(prompt, []).append(value)
        if values:
            yield tables.number(asdict(statistics.mean(values)))
