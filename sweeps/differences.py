"""Which differences in a sweep are more than chance: paired by prompt, corrected over the table (Holm).

Four questions, kept apart:

    self-refinement    refined - direct answers of one model: what its second look is worth
    best of 8 ...      the answer picked from several - the mean of them (the direct one, where all were not measured)
    self-improvement   direct answers of a later model - those of the base: what training has done to the first
    against            refined answers of a member - those of the sweep's first, after their last phase
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import evals
from evals import statistics
from sweeps import tables
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.formats import Cell, Table, write_csv

NUMBERS = ("value", "low", "high", "n", "p", "p_corrected", "detectable")

Values = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One difference of a table; `unpaired` prompts have a value on one side alone and are left out."""

    question: str
    member: str
    phase: str
    metric: str
    difference: statistics.Difference
    unpaired: int
    records: tuple[str, str]  # after, before


def rows(sweep: Sweep, benchmark: str, judge: str, *metrics: str, every_phase: bool = False) -> list[Row]:
    """A table's differences: after each member's last phase, or after every one. Empty where nothing is comparable."""
    found = {
        (*key, metric): (after, before)
        for key, after, before in _comparisons(sweep, benchmark, judge, every_phase)
        for metric in metrics
        if metric in _kinds(sweep, after) and metric in _kinds(sweep, before)
    }
    # Members that share stages share comparisons: each is one test, however often it is shown.
    sides, unpaired = {}, {}
    for (*_, metric), (after, before) in found.items():
        left, right = (_values(sweep, side, metric) for side in (after, before))
        common = left.keys() & right.keys()
        if common:
            test = _test(after, before, metric)
            sides[test] = ({k: [left[k]] for k in common}, {k: [right[k]] for k in common})
            unpaired[test] = len(left.keys() ^ right.keys())
    tested = statistics.differences(sides)
    made = [
        Row(*key, tested[test], unpaired[test], (after[0].id, before[0].id))
        for key, (after, before) in found.items()
        if (test := _test(after, before, key[-1])) in tested
    ]
    order = list(dict.fromkeys(row.question for row in made))
    return sorted(made, key=lambda row: order.index(row.question))


Side = tuple[Measurement, str]  # and which of its answers


def _comparisons(
    sweep: Sweep, benchmark: str, judge: str, every_phase: bool
) -> Iterator[tuple[tuple[str, str, str], Side, Side]]:
    reference: MemberResult | None = None  # the first member
    for member in sweep.members:
        measured = member.of(benchmark, judge)
        if not measured:
            continue
        phases = member.phases(benchmark)
        base = measured[0] if measured[0].phase == phases[0] else None  # None: it failed, or has not run yet
        last = member.last(benchmark, judge)
        shown = measured if every_phase else [last] if last else []
        for made in shown:
            kinds = list(made.headline)
            refined = next((kind for kind in evals.load(benchmark).OBJECTIVE if kind in kinds), kinds[-1])
            if "refined" in kinds and len(made.metrics["turns"]) > 1:
                yield ("self-refinement", member.name, made.phase), (made, "refined"), (made, kinds[0])
            for size in made.metrics.get("sizes", ())[-1:]:
                one = "single" if "single" in size["worth"] else kinds[0]
                for kind in [kind for kind in size["worth"] if kind != one]:
                    yield (f"{kind} of {size['answers']}", member.name, made.phase), (made, kind), (made, one)
            if base is not None and made.id != base.id:
                yield ("self-improvement", member.name, made.phase), (made, kinds[0]), (base, kinds[0])
            if reference is not None and made.phase == phases[-1]:
                other = reference.last(benchmark, judge)
                if other is not None and other.id != made.id:
                    yield (f"against {reference.name}", member.name, made.phase), (made, refined), (other, refined)
        reference = reference or member


def _test(after: Side, before: Side, metric: str) -> tuple[str, str, str, str, str]:
    return after[0].id, after[1], before[0].id, before[1], metric


def _kinds(sweep: Sweep, side: Side) -> set[str]:
    return {metric for metric, values in sweep.items(side[0]).get(side[1], {}).items() if values}


def _values(sweep: Sweep, side: Side, metric: str) -> Values:
    return sweep.items(side[0])[side[1]][metric]


def shown(sweep: Sweep) -> list[Table]:
    """A table for each benchmark, judge and metric (or for all of its metrics, where they are many), last phases."""
    found = []
    for benchmark in sweep.benchmarks:
        titles = sweep.titles(benchmark)
        for judge in sweep.judges(benchmark):
            for metrics in tables.together(sweep, benchmark):
                if tested := rows(sweep, benchmark, judge, *metrics):
                    what = titles[metrics[0]] if len(metrics) == 1 else f"{len(metrics)} metrics"
                    name = f"{'' if benchmark == 'refinement' else f'{benchmark}, '}{what}"
                    found.append(_table(name, tested, several=len(metrics) > 1))
    return found


def _table(what: str, tested: Sequence[Row], several: bool) -> Table:
    about = (
        f"differences of {what} after the last phase, paired by prompt, ±: 95 % interval; p: t-test, corrected over "
        "the table (Holm); detectable: the smallest difference that four of five such tests would see"
    )
    if left_out := max(row.unpaired for row in tested):
        about += f"; up to {left_out} prompts of a row left out that one side has no score for"
    body = [
        [
            row.question,
            row.member,
            *([row.metric] if several else []),
            *cells(row.difference, row.records),
        ]
        for row in tested
    ]
    labels = ["question", "member", *(["metric"] if several else [])]
    return Table(about, [[*labels, "difference", "p", "detectable"], *body], len(labels))


def cells(difference: statistics.Difference, records: Sequence[str]) -> tuple[Cell, Cell, str]:
    """The difference, its corrected p-value, and the smallest that four of five such tests would see."""
    estimate, p, size = asdict(difference), difference.p_corrected, difference.detectable
    return (
        Cell(tables.number(estimate), estimate, records),
        Cell("<0.001" if p < 0.001 else f"{p:.3f}", {"value": p}, records),
        "-" if size is None else Cell(f"{size:.3f}", {"value": size}, records),
    )


def write(sweep: Sweep) -> list[Path]:
    """differences.csv: every benchmark, judge, metric and phase. Returns the file, or none where nothing compares."""
    lines = [
        [benchmark, judge, row.metric, row.question, row.member, row.phase]
        + [getattr(row.difference, name) for name in NUMBERS]
        + [row.unpaired, *row.records]
        for benchmark in sweep.benchmarks
        for judge in sweep.judges(benchmark)
        for metrics in tables.together(sweep, benchmark)
        for row in rows(sweep, benchmark, judge, *metrics, every_phase=True)
    ]
    if not lines:
        return []
    path = sweep.folder / "differences.csv"
    head = ["benchmark", "judge", "metric", "question", "member", "phase"]
    write_csv(path, [*head, *NUMBERS, "unpaired", "record", "record before"], lines)
    return [path]
