"""Figure 1's way of reporting: members that differ in template and evaluation seed alone, as one curve by turn. [paper]

Only where nothing was trained: a template of trained members is part of their training, so each has models of its own,
and of these only what differs in the evaluation's seed is pooled.

A prompt is one cluster, whatever the number of templates and seeds it was asked with: its mean over them is taken
first, so the interval is over prompts. That counts the seeds' noise too, since a seed's draws are independent from
prompt to prompt. It would not for training seeds, whose effect all prompts share; members that differ in those are
not pooled.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from evals import refinement, statistics
from sweeps import tables
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.formats import Cell, Table
from sweeps.training import TRAINING

Group = Sequence[MemberResult]


def shown(sweep: Sweep) -> list[Table]:
    """A table for each metric, with a row for each group of members and phase. Empty where no members go together.

    Of a group over several templates the members of each template have a row, too.
    """
    found = []
    together = [one for group in groups(sweep) for one in (group, *_by_template(group)) if len(one) > 1]
    for metric, title in refinement.METRICS.items():
        rows = [row for group in together for row in _rows(sweep, group, metric)]
        if rows:
            turns = max(map(len, rows)) - 3
            header = ["members", "phase", "gain", *(f"turn {turn}" for turn in range(1, turns + 1))]
            about = (
                f"{title} by turn, pooled over seeds of evaluation, and where nothing was trained over templates, "
                "±: 95 % interval over prompts; gain: the last turn - the first, paired"
            )
            found.append(Table(about, [header, *rows]))
    return found


def groups(sweep: Sweep) -> list[list[MemberResult]]:
    """Members whose settings are equal but for eval.seed, and the template where nothing was trained."""
    found: dict[str, list[MemberResult]] = {}
    for member in sweep.members:
        trained = any(step["kind"] in TRAINING for step in member.steps)
        config: dict[str, Any] = {key: value for key, value in member.config.items() if trained or key != "template"}
        config["eval"] = {key: value for key, value in config["eval"].items() if key != "seed"}
        found.setdefault(json.dumps(config, sort_keys=True), []).append(member)
    return list(found.values())


def _by_template(group: Group) -> list[Group]:
    """The members of each template; none where there is but one."""
    found: dict[str, list[MemberResult]] = {}
    for member in group:
        found.setdefault(member.config["template"]["name"], []).append(member)
    return list(found.values()) if len(found) > 1 else []


def name(group: Group) -> str:
    """The model, over how many templates and seeds the group goes, and what all its members are."""
    templates = {member.config["template"]["name"] for member in group}
    seeds = {member.config["eval"]["seed"] for member in group}
    about = " x ".join(f"{len(of)} {what}" for of, what in ((templates, "templates"), (seeds, "seeds")) if len(of) > 1)
    own, *others = (member.name.split(" ") for member in group)
    common = [
        word for word in own if all(word in of for of in others) and "=" in word and not word.startswith("model=")
    ]
    return ", ".join([group[0].config["model"]["name"], about, *common])


def measured(group: Group, phase: str | None = None) -> list[Measurement]:
    """The group's refinement curves after a phase, or after the last; none where one is missing."""
    wanted = [phase] if phase else group[0].phases("refinement")[-1:]
    found = [one for member in group for one in member.of("refinement") if [one.phase] == wanted]
    return found if len(found) == len(group) else []


def by_turn(sweep: Sweep, curves: Sequence[Measurement], metric: str) -> list[dict[str, Any]]:
    """Estimates over prompts of their means over the curves, one for each turn that has any value."""
    return [asdict(statistics.mean(values)) for values in _values(sweep, curves, metric)]


def _values(sweep: Sweep, curves: Sequence[Measurement], metric: str) -> list[dict[str, list[float]]]:
    """By turn that has any: each prompt's values, one for each curve."""
    found = []
    for turn in range(1, (len(curves[0].metrics["turns"]) if curves else 0) + 1):
        values: dict[str, list[float]] = {}
        for one in curves:
            for prompt, value in sweep.items(one).get(f"turn {turn}", {}).get(metric, {}).items():
                values.setdefault(prompt, []).append(value)
        if values:
            found.append(values)
    return found


def _rows(sweep: Sweep, group: Group, metric: str) -> Iterator[list[str]]:
    for phase in sweep.phases:
        curves = measured(group, phase)
        records = [one.id for one in curves]
        if values := _values(sweep, curves, metric):
            gain = statistics.paired(values[-1], values[0])
            estimates = [asdict(of) for of in (gain, *map(statistics.mean, values))]
            yield [name(group), phase, *(Cell(tables.number(of), of, records) for of in estimates)]
