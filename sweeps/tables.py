"""Tables of a sweep: members by iterations, direct and refined answers, each number with its interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import evals
from sweeps import best, formats
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.formats import Cell, Table, write_csv

COUNTS = {"unscored": "unscored", "never_made": "never made"}  # of what a turn counts, and how a cell says it
BY_ANSWERS = "by answers used"
LOPSIDED = 0.5  # of an interval's width: from where on its ends are at unlike distances
MANY = 3  # metrics of a benchmark that have a table each; of more, all stand in one
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


def _shows_generated(sweep: Sweep, metric: str) -> bool:
    """The first metric's table says too what each member has generated for its training, where any has."""
    return metric == "reward" and any(any(member.generated.values()) for member in sweep.members)


def cell(measurement: Measurement, metric: str, kind: str) -> Cell:
    """A number with its interval, and how many items have none."""
    worth = measurement.headline.get(kind, {})
    counts = [f"{worth[key]} {said}" for key, said in COUNTS.items() if worth.get(key)]
    estimate = worth.get(metric)
    text = number(estimate)
    text = f"{text} ({', '.join(counts)})" if counts and text != "-" else text
    return Cell(text, estimate, [measurement.id])


def together(sweep: Sweep, benchmark: str) -> list[tuple[str, ...]]:
    """A benchmark's metrics by table."""
    names = tuple(sweep.titles(benchmark))
    return [names] if len(names) > MANY else [(name,) for name in names]


def grid(sweep: Sweep, metric: str, benchmark: str = "refinement", judge: str | None = None) -> list[list[str]]:
    """Rows of cells, the header first: member, answers, then each phase. Empty if nothing has the metric."""
    rows = []
    contests = dict[tuple[str, str], list[best.Rival]]()
    titles = list(sweep.titles(benchmark))
    for member in sweep.members:
        measured = member.of(benchmark, judge)
        by_phase = {measurement.phase: measurement for measurement in measured}
        missing = {phase for phase, name in member.missing if name == benchmark}
        for kind in dict.fromkeys(kind for m in measured for kind in m.headline):
            cells = list[str]()
            for phase in sweep.phases:
                if phase in by_phase:
                    cells.append(one := cell(by_phase[phase], metric, kind))
                    contests.setdefault((phase, kind), []).append(best.Rival(one, by_phase[phase], kind, metric))
                else:
                    cells.append("missing" if phase in missing else "")
            if any(cell not in ("", "-", "missing") for cell in cells):
                rows.append([member.name, kind, *cells])
        made = {m.phase: m.metrics["made"] for m in measured if "made" in m.metrics}
        if made and metric in titles[:1]:
            for kind in ("turns", "tokens"):
                worth = {phase: (of[kind], [by_phase[phase].id]) for phase, of in made.items()}
                cells = [
                    Cell(number(worth[phase][0]), *worth[phase]) if phase in worth else "" for phase in sweep.phases
                ]
                rows.append([member.name, f"{kind} made", *cells])
        if benchmark == "refinement" and _shows_generated(sweep, metric) and measured:
            rows.append([member.name, "generated", *_generated(sweep, member)])
    if len(titles) <= MANY or metric in titles[:1]:
        best.mark(sweep, list(contests.values()))  # of many metrics not each is a goal, but the first is
    return [["member", "answers", *sweep.phases], *rows] if rows else []


def _generated(sweep: Sweep, member: MemberResult) -> Iterator[str]:
    """Tokens drawn for training up to each phase; they lead to what was made of them."""
    for phase in sweep.phases:
        count = member.generated.get(phase)
        until = next((at for at, of in enumerate(member.steps) if (of["phase"], of["kind"]) == (phase, "evaluate")), 0)
        records = [step["id"] for step in member.steps[:until] if step["kind"] in ("pair", "reinforce")]
        yield "" if count is None else Cell(f"{count:,}", {"value": count}, records) if records else f"{count:,}"


def all_metrics(sweep: Sweep, benchmark: str, judge: str | None = None) -> list[list[str]]:
    """The grids of a benchmark's metrics as one: member, answers, metric, then each phase."""
    found: dict[tuple[str, str], list[list[str]]] = {}
    for metric in sweep.titles(benchmark):
        for member, kind, *cells in grid(sweep, metric, benchmark, judge)[1:]:
            of = "" if kind.endswith(" made") else metric
            found.setdefault((member, kind), []).append([member, kind, of, *cells])
    names = [member.name for member in sweep.members]
    rows = [row for key in sorted(found, key=lambda key: names.index(key[0])) for row in found[key]]
    return [["member", "answers", "metric", *sweep.phases], *rows] if rows else []


def scaling(sweep: Sweep, metric: str, benchmark: str = "test_time", judge: str | None = None) -> list[list[str]]:
    """Test-time scaling of each member's last model: rows of cells, a column for each number of answers used.

    Beside the metric stand the tokens that were generated for a prompt: equal numbers of answers may differ in cost.
    Empty where no curve was measured.
    """
    measured = {member.name: member.last(benchmark, judge) for member in sweep.members}
    last = [(name, one, sizes) for name, one in measured.items() if one and (sizes := one.metrics.get("sizes"))]
    used = sorted({size["answers"] for *_, sizes in last for size in sizes})
    if len(used) > WIDE:
        used = [n for n in used if n.bit_count() == 1 or n == used[-1]]  # powers of two, and all
    rows = []
    for name, one, sizes in last:
        by_size = {size["answers"]: size for size in sizes}
        if not sizes[-1]["worth"].get("single", {}).get(metric):
            continue
        for kind in [kind for kind, of in sizes[-1]["worth"].items() if metric in of]:
            worth = {n: size["worth"][kind][metric] for n, size in by_size.items()}
            rows.append([name, kind, *(Cell(number(worth[n]), worth[n], [one.id]) if n in worth else "" for n in used)])
        spent = {n: size["tokens"] for n, size in by_size.items()}
        cells = [Cell(f"{spent[n]['value']:.1f}", spent[n], [one.id]) if n in spent else "" for n in used]
        rows.append([name, "tokens", *cells])
    return [["member", "answers used", *map(str, used)], *rows] if rows else []


def title(sweep: Sweep, metrics: Sequence[str], benchmark: str = "refinement", judge: str | None = None) -> str:
    """The metrics with their protocol, n and how intervals are made: a number never travels alone."""
    found = [measurement for member in sweep.members for measurement in member.of(benchmark, judge)]
    protocols = sorted({measurement.metrics["protocol"] for measurement in found})
    kinds = {kind: worth for measurement in found for kind, worth in measurement.headline.items()}
    estimates = [
        of for metric in metrics for one in found for worth in one.headline.values() if (of := worth.get(metric))
    ]
    counts = sorted({estimate["n"] for estimate in estimates})
    left_out = _left_out(found)
    explained = "".join(f"; {kind}: {what}" for kind, what in evals.load(benchmark).EXPLAIN.items() if kind in kinds)
    if benchmark == "refinement" and _shows_generated(sweep, metrics[0]):
        explained += "; generated: tokens drawn for training so far"
    if any("made" in measurement.metrics for measurement in found):
        explained += "; turns, tokens made: of a prompt's chain, all that were"
    n = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    ours = benchmark in ("refinement", "test_time")
    name, prompts = ("", "held-out prompts") if ours else (f"{benchmark}, ", "prompts")
    titles = sweep.titles(benchmark)
    what = titles[metrics[0]] if len(metrics) == 1 else f"{len(metrics)} metrics"
    name = f"{benchmark}, " if len(metrics) > 1 else name
    described = [metric for metric in metrics if len(metrics) > 1 and titles[metric] != metric]
    explained += "".join(f"; {metric}: {titles[metric]}" for metric in described)
    explained += untested(sweep, {(benchmark, judge, metric): titles[metric] for metric in metrics})
    return (
        f"{name}{what} on {n} {prompts}, ±: 95 % interval over prompts (not over training seeds); "
        f"{'; '.join(protocols)}; {left_out}{explained}"
    )


def untested(sweep: Sweep, named: Mapping[tuple[str, str | None, str], str]) -> str:
    """What a title says of the metrics (benchmark, judge, metric) without values by prompt, by what they are called."""

    def paired(benchmark: str, judge: str | None, metric: str) -> bool:
        found = (one for member in sweep.members for one in member.of(benchmark, judge))
        return any(of.get(metric) for one in found for of in sweep.items(one).values())

    names = [name for column, name in named.items() if not paired(*column)]
    return f"; not tested, being of all prompts together, with no value by prompt: {', '.join(names)}" if names else ""


def _left_out(found: Sequence[Measurement]) -> str:
    """Prompts without a score, of benchmarks that count them so; others count by turn, and their cells say it."""
    if any("unscored" in turn for one in found for turn in one.metrics.get("turns", ())):
        return "what is unscored stands beside each number"
    most = max(map(_unscored, found))
    return f"up to {most} prompts of a number unscored, as its n says" if most else "no prompts unscored"


def _unscored(measurement: Measurement) -> int:
    return sum(measurement.record["dropped"].values())


def shown(sweep: Sweep, benchmarks: Sequence[str] = ()) -> list[Table]:
    """Every table that the sweep has numbers for, or those of some benchmarks."""
    kinds = [
        (benchmark, judge, metrics)
        for benchmark in benchmarks or sweep.benchmarks
        for judge in sweep.judges(benchmark)
        for metrics in together(sweep, benchmark)
    ]
    found = []
    for benchmark, judge, metrics in kinds:
        several = len(metrics) > 1
        rows = all_metrics(sweep, benchmark, judge) if several else grid(sweep, metrics[0], benchmark, judge)
        if rows:
            about = title(sweep, metrics, benchmark, judge) + best.note(rows)
            found.append(Table(about, rows, labels=3 if several else 2))
    about = "after each member's last phase, by the number of answers used; tokens: generated for them a prompt"
    for benchmark, judge, metrics in kinds:
        for metric in metrics:
            if rows := scaling(sweep, metric, benchmark, judge):
                found.append(Table(f"{BY_ANSWERS}: {title(sweep, [metric], benchmark, judge)}; {about}", rows))
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


def write(sweep: Sweep, found: Sequence[Table]) -> list[Path]:
    """The tables as shown, in every form; table.csv with a line for each member, phase, benchmark, turn and metric.

    Each line leads to its record. test_time.csv has the like, by answers used, where several are. Returns all.
    """
    files = [*formats.write(sweep.folder, found), sweep.folder / "table.csv"]
    whose = ["member", "phase"]
    number, source = ["metric", "value", "low", "high", "n"], ["protocol", "record"]
    write_csv(files[-1], [*whose, "benchmark", "turn", *number, "unscored", *source, "generated"], _turns(sweep))
    if scaled := list(_sizes(sweep)):
        files.append(sweep.folder / "test_time.csv")
        write_csv(files[-1], [*whose, "benchmark", "kind", "answers", "tokens", *number, *source], scaled)
    return files


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
                    unscored = turn.get("unscored", _unscored(made))
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
