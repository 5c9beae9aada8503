"""Tables of a sweep: members by iterations, direct and refined answers, each number with its interval."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sweeps.collect import Measurement, Sweep

METRICS = {"reward": "mean reward", "accuracy": "accuracy"}


def number(estimate: Mapping[str, Any] | None) -> str:
    """'0.512 ±0.021': a value and half the width of its 95 % interval."""
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ±{(estimate['high'] - estimate['low']) / 2:.3f}"


def answers(measurement: Measurement, metric: str) -> dict[str, Mapping[str, Any] | None]:
    """The three things said of each model: direct answers, refined answers, and the gain of one over the other."""
    turns = measurement.metrics["turns"]
    found = {"direct": turns[0][metric]}
    if len(turns) > 1:
        found |= {"refined": turns[-1][metric], "gain": measurement.metrics["gain"][metric]}
    return found


def _shows_generated(sweep: Sweep, metric: str) -> bool:
    """The first metric's table says too what each member has generated for its training, where any has."""
    return metric == next(iter(METRICS)) and any(any(member.generated.values()) for member in sweep.members)


def grid(sweep: Sweep, metric: str) -> list[list[str]]:
    """Rows of cells, the header first: member, answers, then each phase. Empty if nothing has the metric."""
    rows = []
    for member in sweep.members:
        by_phase = {measurement.phase: answers(measurement, metric) for measurement in member.measurements}
        for kind in ("direct", "refined", "gain"):
            cells = []
            for phase in sweep.phases:
                if phase in by_phase:
                    cells.append(number(by_phase[phase].get(kind)))
                else:
                    cells.append("missing" if phase in member.missing else "")
            if any(cell not in ("", "-", "missing") for cell in cells):
                rows.append([member.name, kind, *cells])
        if _shows_generated(sweep, metric) and member.measurements:
            tokens = {phase: f"{count:,}" for phase, count in member.generated.items()}
            rows.append([member.name, "generated", *(tokens.get(phase, "") for phase in sweep.phases)])
    return [["member", "answers", *sweep.phases], *rows] if rows else []


def title(sweep: Sweep, metric: str) -> str:
    """The metric with its protocol, n and how intervals are made: a number never travels alone."""
    found = [measurement for member in sweep.members for measurement in member.measurements]
    protocols = sorted({measurement.metrics["protocol"] for measurement in found})
    counts = sorted({measurement.metrics["turns"][0]["reward"]["n"] for measurement in found})
    dropped = {measurement.id: sum(measurement.record["dropped"].values()) for measurement in found}
    unscored = sum(dropped.values())
    spent = "; generated: tokens drawn for training so far" if _shows_generated(sweep, metric) else ""
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{METRICS[metric]} on {n} held-out prompts, ±: 95 % interval over prompts (not over training seeds); "
        f"{'; '.join(protocols)}; {unscored or 'no'} prompts unscored; gain: refined - direct, paired{spent}"
    )


def rich_table(sweep: Sweep, metric: str) -> Table | None:
    rows = grid(sweep, metric)
    if not rows:
        return None
    table = Table(title=title(sweep, metric), title_justify="left")
    for place, name in enumerate(rows[0]):
        table.add_column(name, justify="left" if place < 2 else "right", no_wrap=place > 1)
    last = None
    for row in rows[1:]:
        if last is not None and row[0] != last:
            table.add_section()
        table.add_row("" if row[0] == last else row[0], *row[1:])
        last = row[0]
    return table


def markdown(sweep: Sweep, metric: str) -> str:
    rows = grid(sweep, metric)
    if not rows:
        return ""
    lines = [f"**{title(sweep, metric)}**", ""]
    lines += ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    return "\n".join(lines) + "\n"


def write(sweep: Sweep) -> None:
    """table.md, and table.csv with a line for each member, phase, turn and metric, down to the record it comes from."""
    (sweep.folder / "table.md").write_text("\n".join(filter(None, (markdown(sweep, metric) for metric in METRICS))))
    with (sweep.folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        out = csv.writer(file)
        header = ["member", "phase", "turn", "metric", "value", "low", "high", "n", "protocol", "record", "generated"]
        out.writerow(header)
        for member in sweep.members:
            for measurement in member.measurements:
                for turn in measurement.metrics["turns"]:
                    for metric in METRICS:
                        if estimate := turn[metric]:
                            out.writerow(
                                [member.name, measurement.phase, turn["turn"], metric]
                                + [estimate[key] for key in ("value", "low", "high", "n")]
                                + [measurement.metrics["protocol"], measurement.id]
                                + [member.generated.get(measurement.phase, "")]
                            )
