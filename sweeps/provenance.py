"""Where a sweep's numbers come from: each stage once, what it was made from, what it left out, and what it cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from evolve import plan
from evolve.show import duration
from evolve.stages import KINDS
from evolve.store import flatten
from sweeps.collect import Sweep
from sweeps.formats import Cell, Table

SPENT = {"generated": "tokens generated", "read": "tokens read", "trained": "tokens trained"}
CLOCK = "%Y-%m-%dT%H:%M:%SZ"  # of a record's `started`
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Entry:
    """A stage: for whom it stands in the sweep (the first of them; `more` others), and its record once it has run."""

    id: str
    phase: str
    member: str
    more: int
    record: Record | None
    folder: Path

    @property
    def kind(self) -> str:
        return self.id.split("/")[0]

    @cached_property
    def settings(self) -> dict[str, str]:
        config = self.record["config"] if self.record else {}
        return {key: json.dumps(value, ensure_ascii=False) for key, value in flatten(config).items()}

    @property
    def seeds(self) -> str:
        found = {key: value for key, value in self.settings.items() if key.split(".")[-1] == "seed"}
        return ", ".join(value if key == "seed" else f"{key} {value}" for key, value in found.items())

    @property
    def versions(self) -> str:
        return (
            ", ".join(f"{name} {version}" for name, version in self.record["versions"].items()) if self.record else ""
        )

    @property
    def files(self) -> str:
        files = self.record["files"] if self.record else {}
        return ", ".join(f"{name} ({_size(entry['bytes'])})" for name, entry in files.items())

    @property
    def code(self) -> str:
        code = self.record["code"] if self.record else {}
        states = {True: ", with uncommitted changes", False: "", None: ", state unknown"}
        return f"{(code.get('commit') or 'no commit')[:12]}{states[code.get('dirty')]}"


@dataclass(frozen=True)
class Group:
    """The stages of one kind; `shared` are the settings that all of them have, `own` by stage the others."""

    kind: str
    entries: list[Entry]
    shared: dict[str, str]
    own: dict[str, dict[str, str]]


def _size(count: int) -> str:
    """1234567 -> '1.2 MB'."""
    for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def entries(sweep: Sweep) -> list[Entry]:
    """Every stage of the sweep, in the order of its members."""
    uses: dict[str, list[tuple[str, str]]] = {}
    for member in sweep.members:
        for step in member.steps:
            uses.setdefault(step["id"], []).append((step["phase"], member.name))
    return [
        Entry(one, *found[0], len({name for _, name in found}) - 1, sweep.record(one), sweep.store.folder(one))
        for one, found in uses.items()
    ]


def groups(found: Iterable[Entry]) -> list[Group]:
    """By kind, in the method's order; only what has run."""
    made = []
    by_kind: dict[str, list[Entry]] = {}
    for entry in found:
        if entry.record:
            by_kind.setdefault(entry.kind, []).append(entry)
    for kind in sorted(by_kind, key=KINDS.index):
        here = by_kind[kind]
        shared = dict(set.intersection(*(set(entry.settings.items()) for entry in here)))
        shared = {key: shared[key] for key in here[0].settings if key in shared}
        own = {e.id: {key: value for key, value in e.settings.items() if key not in shared} for e in here}
        made.append(Group(kind, here, shared, own))
    return made


def ran(sweep: Sweep, found: Sequence[Entry]) -> dict[str, str]:
    """What ran, when, where, with which code, and how long it took."""
    done = [entry.record for entry in found if entry.record]
    begun = [datetime.strptime(record["started"], CLOCK).timestamp() for record in done]
    ended = [start + record["seconds"] for start, record in zip(begun, done, strict=True)]
    clock = sorted(record["started"].replace("T", " ").rstrip("Z") for record in done)
    versions = {f"{name} {version}": None for record in done for name, version in record["versions"].items()}
    stages = f"{len(done):,} of {len(found):,}, each once, however many members share it"
    said = {
        "Command": sweep.command or "not recorded",
        "Members": f"{len(sweep.members):,}",
        "Phases": ", ".join(sweep.phases),
        "Measured": ", ".join(
            name + (f" (by {' and by '.join(judges)})" if any(judges := sweep.judges(name)) else "")
            for name in sweep.benchmarks
        ),
        "Stages": stages,
        "When": f"{clock[0]} to {clock[-1]} UTC (first and last start of a stage)" if clock else "not yet",
        "How long": f"{duration(max(ended) - min(begun))} from the first start to the last end; its stages add up to "
        f"{duration(sum(record['seconds'] for record in done))}"
        if done
        else "",
        "Hosts": ", ".join(sorted({record["host"] for record in done})),
        "Code": "; ".join(dict.fromkeys(entry.code for entry in found if entry.record)),
        "Versions": ", ".join(versions),
        "Folder": str(sweep.folder.resolve()),
    }
    return {key: value for key, value in said.items() if value}


def dropped(found: Sequence[Entry]) -> tuple[Table | None, list[str]]:
    """What was left out and why, by kind and reason; and the reasons that were looked for and never met."""
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for entry in found:
        for reason, count in (entry.record or {}).get("dropped", {}).items():
            counts.setdefault((entry.kind, reason), {})[entry.id] = count
    rows, never = list[list[str]](), []
    for (kind, reason), by_stage in sorted(counts.items(), key=lambda item: KINDS.index(item[0][0])):
        most = sorted((one for one, count in by_stage.items() if count), key=lambda one: -by_stage[one])
        if most:
            worst = Cell(f"{by_stage[most[0]]:,}", records=most[:1])
            total = Cell(f"{sum(by_stage.values()):,}", records=most[:3])
            rows.append([kind, reason, total, f"{len(most):,} of {len(by_stage):,}", worst])
        else:
            never.append(f"{kind}: {reason}")
    header = ["stage", "what", "left out", "stages with any", "most in one stage"]
    return (Table("What was left out", [header, *rows]) if rows else None), never


def cost(found: Sequence[Entry]) -> list[Table]:
    """Time, tokens, and the dollars that judges were paid, by kind of stage and by phase; each stage counts once."""
    done = [(entry, entry.record) for entry in found if entry.record]
    paid = any(record["values"].get("dollars") is not None for _, record in done)
    spent = [name for name in SPENT if any(record["tokens"].get(name) for _, record in done)]
    header = ["stages", "time", *(SPENT[name] for name in spent), *(["dollars"] if paid else [])]

    def row(name: str, here: Sequence[tuple[Entry, Record]]) -> list[str]:
        tokens: Counter[str] = Counter()
        for _, record in here:
            tokens.update(record["tokens"])
        seconds = sum(record["seconds"] for _, record in here)
        cells = [name, f"{len(here):,}", Cell(duration(seconds), order=round(seconds, 3))]
        cells += [f"{tokens[what]:,}" if tokens[what] else "" for what in spent]
        if paid:
            dollars = [record["values"]["dollars"] for _, record in here if "dollars" in record["values"]]
            cells.append(f"{sum(dollars):.4f}" if dollars else "")
        return cells

    tables = []
    for what, names in (("kind", KINDS), ("phase", sorted({entry.phase for entry in found}, key=plan.place))):
        here = [(name, [one for one in done if getattr(one[0], what) == name]) for name in names]
        rows = [row(name, some) for name, some in here if some]
        title = "By kind of stage" if what == "kind" else "By phase"
        title += "; of a stage that several members share, in the phase of the first" if what == "phase" else ""
        tables.append(Table(title, [[what, *header], *rows], labels=1, total=row("all", done)))
    return tables


def differing(sweep: Sweep) -> Table | None:
    """The settings in which members differ, a row for each member. None where there is one member, or no difference."""
    configs = [
        {key: json.dumps(value, ensure_ascii=False).strip('"') for key, value in flatten(member.config).items()}
        for member in sweep.members
    ]
    every = dict.fromkeys(key for config in configs for key in config)
    keys = [key for key in every if len({config.get(key) for config in configs}) > 1]
    rows = [
        [member.name, *(config.get(key, "-") for key in keys)]
        for member, config in zip(sweep.members, configs, strict=True)
    ]
    title = f"{len(keys)} settings in which members differ"
    return Table(title, [["member", *keys], *rows], labels=1 + len(keys)) if keys else None
