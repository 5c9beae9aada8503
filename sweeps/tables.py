"""Tables of a sweep: members by iterations, direct and refined answers, each number with its interval."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from evals import BENCHMARKS
from sweeps.collect import Measurement, Sweep

METRICS = {"reward": "mean reward", "accuracy": "accuracy"}
WIDE = 6  # columns of numbers that fit beside one another


def number(estimate: Mapping[str, Any] | None) -> str:
    """'0.512 ±0.021': a value and half the width of its 95 % interval."""
    if estimate is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f} ±{(estimate['high'] - estimate['low']) / 2:.3f}"


def answers(measurement: Measurement, metric: str) -> dict[str, Mapping[str, Any] | None]:
    """What is said of each model: of a chain direct answers, refined answers, and the gain of one over the other."""
    found = {kind: worth[metric] for kind, worth in measurement.headline.items()}
    if len(measurement.metrics.get("turns", ())) == 1:
        return {"direct": found["direct"]}
    return found


def _shows_generated(sweep: Sweep, metric: str) -> bool:
    """The first metric's table says too what each member has generated for its training, where any has."""
    return metric == next(iter(METRICS)) and any(any(member.generated.values()) for member in sweep.members)


def grid(sweep: Sweep, metric: str, benchmark: str = "refinement") -> list[list[str]]:
    """Rows of cells, the header first: member, answers, then each phase. Empty if nothing has the metric."""
    rows = []
    for member in sweep.members:
        measured = member.of(benchmark)
        by_phase = {measurement.phase: answers(measurement, metric) for measurement in measured}
        missing = {phase for phase, name in member.missing if name == benchmark}
        for kind in dict.fromkeys(kind for m in measured for kind in m.headline):
            cells = []
            for phase in sweep.phases:
                if phase in by_phase:
                    cells.append(number(by_phase[phase].get(kind)))
                else:
                    cells.append("missing" if phase in missing else "")
            if any(cell not in ("", "-", "missing") for cell in cells):
                rows.append([member.name, kind, *cells])
        made = {m.phase: m.metrics["made"] for m in measured if "made" in m.metrics}
        if made and metric == next(iter(METRICS)):
            for kind in ("turns", "tokens"):
                cells = [number(made[phase][kind]) if phase in made else "" for phase in sweep.phases]
                rows.append([member.name, f"{kind} made", *cells])
        if benchmark == "refinement" and _shows_generated(sweep, metric) and measured:
            tokens = {phase: f"{count:,}" for phase, count in member.generated.items()}
            rows.append([member.name, "generated", *(tokens.get(phase, "") for phase in sweep.phases)])
    return [["member", "answers", *sweep.phases], *rows] if rows else []


def scaling(sweep: Sweep, metric: str) -> list[list[str]]:
    """Test-time scaling of each member's last model: rows of cells, a column for each number of answers used.

    Beside the metric stand the tokens that were generated for a prompt: equal numbers of answers may differ in cost.
    """
    last = [
        (member.name, member.of("test_time")[-1].metrics["sizes"]) for member in sweep.members if member.of("test_time")
    ]
    used = sorted({size["answers"] for _, sizes in last for size in sizes})
    if len(used) > WIDE:
        used = [n for n in used if n.bit_count() == 1 or n == used[-1]]  # powers of two, and all
    rows = []
    for name, sizes in last:
        by_size = {size["answers"]: size for size in sizes}
        if not sizes[-1]["worth"]["single"][metric]:
            continue
        for kind in sizes[-1]["worth"]:
            cells = [number(by_size[n]["worth"][kind][metric]) if n in by_size else "" for n in used]
            rows.append([name, kind, *cells])
        rows.append([name, "tokens", *(f"{by_size[n]['tokens']['value']:.1f}" if n in by_size else "" for n in used)])
    return [["member", "answers used", *map(str, used)], *rows] if rows else []


def title(sweep: Sweep, metric: str, benchmark: str = "refinement") -> str:
    """The metric with its protocol, n and how intervals are made: a number never travels alone."""
    found = [measurement for member in sweep.members for measurement in member.of(benchmark)]
    protocols = sorted({measurement.metrics["protocol"] for measurement in found})
    kinds = {kind: worth for measurement in found for kind, worth in measurement.headline.items()}
    counts = sorted({next(iter(measurement.headline.values()))["reward"]["n"] for measurement in found})
    dropped = {measurement.id: sum(measurement.record["dropped"].values()) for measurement in found}
    unscored = sum(dropped.values())
    explained = "".join(f"; {kind}: {what}" for kind, what in BENCHMARKS[benchmark].EXPLAIN.items() if kind in kinds)
    if benchmark == "refinement" and _shows_generated(sweep, metric):
        explained += "; generated: tokens drawn for training so far"
    if any("made" in measurement.metrics for measurement in found):
        explained += "; turns, tokens made: of a prompt's chain, all that were"
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{METRICS[metric]} on {n} held-out prompts, ±: 95 % interval over prompts (not over training seeds); "
        f"{'; '.join(protocols)}; {unscored or 'no'} prompts unscored{explained}"
    )


@dataclass(frozen=True)
class Shown:
    """A table as it is shown: its title, and rows of cells with the header first."""

    title: str
    rows: list[list[str]]


def shown(sweep: Sweep) -> list[Shown]:
    """Every table that the sweep has numbers for."""
    found = []
    for benchmark in sweep.benchmarks:
        for metric in METRICS:
            if rows := grid(sweep, metric, benchmark):
                found.append(Shown(title(sweep, metric, benchmark), rows))
    for metric in METRICS:
        if rows := scaling(sweep, metric):
            about = "after each member's last phase, by the number of answers used; tokens: generated for them a prompt"
            found.append(Shown(f"{title(sweep, metric, 'test_time')}; {about}", rows))
    return found


def rich_table(made: Shown) -> Table:
    table = Table(title=made.title, title_justify="left")
    for place, name in enumerate(made.rows[0]):
        table.add_column(name, justify="left" if place < 2 else "right", no_wrap=place > 1, overflow="fold")
    last = None
    for row in made.rows[1:]:
        if last is not None and row[0] != last:
            table.add_section()
        table.add_row("" if row[0] == last else row[0], *row[1:])
        last = row[0]
    return table


def markdown(made: Shown) -> str:
    lines = [f"**{made.title}**", ""]
    lines += ["| " + " | ".join(made.rows[0]) + " |", "|" + "---|" * len(made.rows[0])]
    lines += ["| " + " | ".join(row) + " |" for row in made.rows[1:]]
    return "\n".join(lines) + "\n"


def write(sweep: Sweep) -> list[Path]:
    """table.md, and table.csv with a line for each member, phase, turn and metric, down to the record it comes from.

    test_time.csv has the like, by answers used, where that was measured. Returns the files.
    """
    files = [sweep.folder / "table.md", sweep.folder / "table.csv"]
    files[0].write_text("\n".join(map(markdown, shown(sweep))))
    whose = ["member", "phase"]
    number, source = ["metric", "value", "low", "high", "n"], ["protocol", "record"]
    _csv(files[1], [*whose, "turn", *number, *source, "generated"], _turns(sweep))
    if scaled := list(_sizes(sweep)):
        files.append(sweep.folder / "test_time.csv")
        _csv(files[-1], [*whose, "kind", "answers", "tokens", *number, *source], scaled)
    return files


def _csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _numbers(worth: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Of each metric that there is: its name, value, low, high, n."""
    for metric in METRICS:
        if estimate := worth[metric]:
            yield [metric, *(estimate[key] for key in ("value", "low", "high", "n"))]


def _turns(sweep: Sweep) -> Iterator[list[Any]]:
    for member in sweep.members:
        for made in member.of("refinement"):
            for turn in made.metrics["turns"]:
                for numbers in _numbers(turn):
                    source = [made.metrics["protocol"], made.id, member.generated.get(made.phase, "")]
                    yield [member.name, made.phase, turn["turn"], *numbers, *source]


def _sizes(sweep: Sweep) -> Iterator[list[Any]]:
    for member in sweep.members:
        for made in member.of("test_time"):
            for size in made.metrics["sizes"]:
                for kind, worth in size["worth"].items():
                    for numbers in _numbers(worth):
                        spent = [kind, size["answers"], size["tokens"]["value"]]
                        yield [member.name, made.phase, *spent, *numbers, made.metrics["protocol"], made.id]
