"""Tables of a sweep: members by iterations, direct and refined answers, each number with its interval."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

import evals
from sweeps.collect import Measurement, Sweep

COUNTS = {"unscored": "unscored", "never_made": "never made"}  # of what a turn counts, and how a cell says it
LOPSIDED = 0.5  # of an interval's width: from where on its ends are at unlike distances
WIDE = 6  # columns of numbers that fit beside one another


def number(estimate: Mapping[str, Any] | None) -> str:
    """'0.512 ±0.021': a value and half the width of its 95 % interval; both ends of one that is lopsided."""
    if estimate is None:
        return "-"
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None:
        return f"{value:.3f}"
    if abs((high - value) - (value - low)) > LOPSIDED * (high - low):
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"
    return f"{value:.3f} ±{(high - low) / 2:.3f}"


def answers(measurement: Measurement, metric: str) -> dict[str, Mapping[str, Any] | None]:
    """What is said of each model: of a chain direct answers, refined answers, and the gain of one over the other."""
    alone = len(measurement.metrics.get("turns", ())) == 1
    found = {kind: worth.get(metric) for kind, worth in measurement.headline.items()}
    return {kind: worth for kind, worth in found.items() if not (alone and kind in ("refined", "gain"))}


def _shows_generated(sweep: Sweep, metric: str) -> bool:
    """The first metric's table says too what each member has generated for its training, where any has."""
    return metric == "reward" and any(any(member.generated.values()) for member in sweep.members)


def cell(measurement: Measurement, metric: str, kind: str) -> str:
    """A number with its interval, and how many items have none."""
    worth = measurement.headline.get(kind, {})
    counts = [f"{worth[key]} {said}" for key, said in COUNTS.items() if worth.get(key)]
    text = number(answers(measurement, metric).get(kind))
    return f"{text} ({', '.join(counts)})" if counts and text != "-" else text


def grid(sweep: Sweep, metric: str, benchmark: str = "refinement", judge: str | None = None) -> list[list[str]]:
    """Rows of cells, the header first: member, answers, then each phase. Empty if nothing has the metric."""
    rows = []
    for member in sweep.members:
        measured = member.of(benchmark, judge)
        by_phase = {measurement.phase: measurement for measurement in measured}
        missing = {phase for phase, name in member.missing if name == benchmark}
        for kind in dict.fromkeys(kind for m in measured for kind in m.headline):
            cells = []
            for phase in sweep.phases:
                if phase in by_phase:
                    cells.append(cell(by_phase[phase], metric, kind))
                else:
                    cells.append("missing" if phase in missing else "")
            if any(cell not in ("", "-", "missing") for cell in cells):
                rows.append([member.name, kind, *cells])
        made = {m.phase: m.metrics["made"] for m in measured if "made" in m.metrics}
        if made and metric == next(iter(measured[0].titles)):
            for kind in ("turns", "tokens"):
                cells = [number(made[phase][kind]) if phase in made else "" for phase in sweep.phases]
                rows.append([member.name, f"{kind} made", *cells])
        if benchmark == "refinement" and _shows_generated(sweep, metric) and measured:
            tokens = {phase: f"{count:,}" for phase, count in member.generated.items()}
            rows.append([member.name, "generated", *(tokens.get(phase, "") for phase in sweep.phases)])
    return [["member", "answers", *sweep.phases], *rows] if rows else []


def scaling(sweep: Sweep, metric: str, benchmark: str = "test_time", judge: str | None = None) -> list[list[str]]:
    """Test-time scaling of each member's last model: rows of cells, a column for each number of answers used.

    Beside the metric stand the tokens that were generated for a prompt: equal numbers of answers may differ in cost.
    Empty where no curve was measured.
    """
    measured = {member.name: member.of(benchmark, judge)[-1:] for member in sweep.members}
    last = [(name, sizes) for name, found in measured.items() for one in found if (sizes := one.metrics.get("sizes"))]
    used = sorted({size["answers"] for _, sizes in last for size in sizes})
    if len(used) > WIDE:
        used = [n for n in used if n.bit_count() == 1 or n == used[-1]]  # powers of two, and all
    rows = []
    for name, sizes in last:
        by_size = {size["answers"]: size for size in sizes}
        if not sizes[-1]["worth"].get("single", {}).get(metric):
            continue
        for kind in sizes[-1]["worth"]:
            cells = [number(by_size[n]["worth"][kind][metric]) if n in by_size else "" for n in used]
            rows.append([name, kind, *cells])
        rows.append([name, "tokens", *(f"{by_size[n]['tokens']['value']:.1f}" if n in by_size else "" for n in used)])
    return [["member", "answers used", *map(str, used)], *rows] if rows else []


def title(sweep: Sweep, metric: str, benchmark: str = "refinement", judge: str | None = None) -> str:
    """The metric with its protocol, n and how intervals are made: a number never travels alone."""
    found = [measurement for member in sweep.members for measurement in member.of(benchmark, judge)]
    protocols = sorted({measurement.metrics["protocol"] for measurement in found})
    kinds = {kind: worth for measurement in found for kind, worth in measurement.headline.items()}
    estimates = [estimate for measurement in found for estimate in answers(measurement, metric).values() if estimate]
    counts = sorted({estimate["n"] for estimate in estimates})
    left_out = _left_out(found)
    explained = "".join(f"; {kind}: {what}" for kind, what in evals.load(benchmark).EXPLAIN.items() if kind in kinds)
    if benchmark == "refinement" and _shows_generated(sweep, metric):
        explained += "; generated: tokens drawn for training so far"
    if any("made" in measurement.metrics for measurement in found):
        explained += "; turns, tokens made: of a prompt's chain, all that were"
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    ours = benchmark in ("refinement", "test_time")
    name, prompts = ("", "held-out prompts") if ours else (f"{benchmark}, ", "prompts")
    return (
        f"{name}{found[0].titles[metric]} on {n} {prompts}, ±: 95 % interval over prompts (not over training seeds); "
        f"{'; '.join(protocols)}; {left_out}{explained}"
    )


def _left_out(found: Sequence[Measurement]) -> str:
    """Prompts without a score, of benchmarks that count them so; others count by turn, and their cells say it."""
    if any("unscored" in turn for one in found for turn in one.metrics.get("turns", ())):
        return "what is unscored stands beside each number"
    by_record = {one.id: sum(one.record["dropped"].values()) for one in found}
    return f"{sum(by_record.values()) or 'no'} prompts unscored"


@dataclass(frozen=True)
class Shown:
    """A table as it is shown: its title, and rows of cells with the header first."""

    title: str
    rows: list[list[str]]


def shown(sweep: Sweep) -> list[Shown]:
    """Every table that the sweep has numbers for."""
    kinds = [
        (benchmark, judge, metric)
        for benchmark in sweep.benchmarks
        for judge in sweep.judges(benchmark)
        for metric in evals.load(benchmark).METRICS
    ]
    found = []
    for benchmark, judge, metric in kinds:
        if rows := grid(sweep, metric, benchmark, judge):
            found.append(Shown(title(sweep, metric, benchmark, judge), rows))
    about = "after each member's last phase, by the number of answers used; tokens: generated for them a prompt"
    for benchmark, judge, metric in kinds:
        if rows := scaling(sweep, metric, benchmark, judge):
            found.append(Shown(f"{title(sweep, metric, benchmark, judge)}; {about}", rows))
    return found


def overlaps(sweep: Sweep) -> list[str]:
    """Contamination as lines: how many prompts of each evaluation stand in what members train on."""
    found: dict[str, set[str]] = {}
    for step in {step["id"]: step for member in sweep.members for step in member.steps}.values():
        record = sweep.record(step["id"]) if step["kind"] == "overlap" else None
        asked = sweep.record(record["inputs"]["evaluation"]) if record else None
        if not record or not asked:
            continue
        name = asked["identity"]["config"].get("benchmark", "held-out prompts")
        values = record["values"]
        found.setdefault(name, set()).add(
            f"{values['exact']} of {values['evaluation']} stand in {values['training']:,} training rows, and "
            f"{values['ngram']} share {record['identity']['config']['words']} words in a row with them"
        )
    return [f"overlap {name}: {'; '.join(sorted(lines))}" for name, lines in found.items()]


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


def write(sweep: Sweep, found: Iterable[Shown]) -> list[Path]:
    """table.md with the tables as shown; table.csv with a line for each member, phase, benchmark, turn and metric.

    Each line leads to its record. test_time.csv has the like, by answers used, where several are. Returns all.
    """
    files = [sweep.folder / "table.md", sweep.folder / "table.csv"]
    files[0].write_text("\n".join(map(markdown, found)))
    whose = ["member", "phase"]
    number, source = ["metric", "value", "low", "high", "n"], ["protocol", "record"]
    write_csv(files[1], [*whose, "benchmark", "turn", *number, "unscored", *source, "generated"], _turns(sweep))
    if scaled := list(_sizes(sweep)):
        files.append(sweep.folder / "test_time.csv")
        write_csv(files[-1], [*whose, "benchmark", "kind", "answers", "tokens", *number, *source], scaled)
    return files


def write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


def _numbers(measurement: Measurement, worth: Mapping[str, Any]) -> Iterator[list[Any]]:
    """Of each metric that there is: its name, value, low, high, n."""
    for metric in measurement.titles:
        if estimate := worth.get(metric):
            yield [metric, *(estimate[key] for key in ("value", "low", "high", "n"))]


def _turns(sweep: Sweep) -> Iterator[list[Any]]:
    for member in sweep.members:
        for made in member.measurements:
            for turn in made.metrics.get("turns", ()):
                for numbers in _numbers(made, turn):
                    source = [made.metrics["protocol"], made.id, member.generated.get(made.phase, "")]
                    unscored = turn.get("unscored", 0)
                    yield [member.name, made.phase, made.benchmark, turn["turn"], *numbers, unscored, *source]


def _sizes(sweep: Sweep) -> Iterator[list[Any]]:
    for member in sweep.members:
        for made in member.measurements:
            for size in made.metrics.get("sizes", ()):
                for kind, worth in size["worth"].items():
                    for numbers in _numbers(made, worth):
                        spent = [kind, size["answers"], size["tokens"]["value"]]
                        yield [
                            member.name,
                            made.phase,
                            made.benchmark,
                            *spent,
                            *numbers,
                            made.metrics["protocol"],
                            made.id,
                        ]
