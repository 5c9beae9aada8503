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

NUMBERS = ("value", "low", "high", "n", "p", "p_corrected", "detectable")

Values = Mapping[str, float]


@dataclass(frozen=True)
class Row:
    """One difference of a table; `unpaired` prompts have a value on one side alone and are left out."""

    question: str
    member: str
    phase: str
    difference: statistics.Difference
    unpaired: int
    records: tuple[str, str]  # after, before


def rows(sweep: Sweep, benchmark: str, judge: str, metric: str, every_phase: bool = False) -> list[Row]:
    """A table's differences: after each member's last phase, or after every one. Empty where nothing is comparable."""
    found = {
        key: (after, before)
        for key, after, before in _comparisons(sweep, benchmark, judge, every_phase)
        if metric in _kinds(sweep, after) and metric in _kinds(sweep, before)
    }
    # Members that share stages share comparisons: each is one test, however often it is shown.
    sides, unpaired = {}, {}
    for after, before in found.values():
        left, right = (_values(sweep, side, metric) for side in (after, before))
        common = left.keys() & right.keys()
        if common:
            test = _test(after, before)
            sides[test] = ({k: [left[k]] for k in common}, {k: [right[k]] for k in common})
            unpaired[test] = len(left.keys() ^ right.keys())
    tested = statistics.differences(sides)
    made = [
        Row(*key, tested[test], unpaired[test], (after[0].id, before[0].id))
        for key, (after, before) in found.items()
        if (test := _test(after, before)) in tested
    ]
    order = list(dict.fromkeys(row.question for row in made))
    return sorted(made, key=lambda row: order.index(row.question))


Side = tuple[Measurement, str]  # and which of its answers


def _comparisons(
    sweep: Sweep, benchmark: str, judge: str, every_phase: bool
) -> Iterator[tuple[tuple[str, str, str], Side, Side]]:
    first: MemberResult | None = None
    for member in sweep.members:
        measured = member.of(benchmark, judge)
        if not measured:
            continue
        phases = member.phases(benchmark)
        base = measured[0] if measured[0].phase == phases[0] else None  # None: it failed, or has not run yet
        shown = measured if every_phase else measured[-1:]
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
            if first is not None and made.phase == phases[-1]:
                other = first.of(benchmark, judge)[-1]
                if other.id != made.id and other.phase == first.phases(benchmark)[-1]:
                    yield (f"against {first.name}", member.name, made.phase), (made, refined), (other, refined)
        first = first or member


def _test(after: Side, before: Side) -> tuple[str, str, str, str]:
    return after[0].id, after[1], before[0].id, before[1]


def _kinds(sweep: Sweep, side: Side) -> set[str]:
    return {metric for metric, values in sweep.items(side[0]).get(side[1], {}).items() if values}


def _values(sweep: Sweep, side: Side, metric: str) -> Values:
    return sweep.items(side[0])[side[1]][metric]


def shown(sweep: Sweep) -> list[tables.Shown]:
    """A table for each benchmark, judge and metric, after the last phases."""
    found = []
    for benchmark in sweep.benchmarks:
        for judge in sweep.judges(benchmark):
            for metric, title in evals.load(benchmark).METRICS.items():
                if tested := rows(sweep, benchmark, judge, metric):
                    found.append(_table(f"{'' if benchmark == 'refinement' else f'{benchmark}, '}{title}", tested))
    return found


def _table(what: str, tested: Sequence[Row]) -> tables.Shown:
    about = (
        f"differences of {what} after the last phase, paired by prompt, ±: 95 % interval; p: t-test, corrected over "
        "the table (Holm); detectable: the smallest difference that four of five such tests would see"
    )
    if left_out := sum(row.unpaired for row in tested):
        about += f"; {left_out} prompts left out that one side has no score for"
    cells = [
        [row.question, row.member, tables.number(asdict(row.difference)), _p(row.difference), _seen(row)]
        for row in tested
    ]
    return tables.Shown(about, [["question", "member", "difference", "p", "detectable"], *cells])


def _p(difference: statistics.Difference) -> str:
    return "<0.001" if difference.p_corrected < 0.001 else f"{difference.p_corrected:.3f}"


def _seen(row: Row) -> str:
    return "-" if row.difference.detectable is None else f"{row.difference.detectable:.3f}"


def write(sweep: Sweep) -> list[Path]:
    """differences.csv: every benchmark, judge, metric and phase. Returns the file, or none where nothing compares."""
    lines = [
        [benchmark, judge, metric, row.question, row.member, row.phase]
        + [getattr(row.difference, name) for name in NUMBERS]
        + [row.unpaired, *row.records]
        for benchmark in sweep.benchmarks
        for judge in sweep.judges(benchmark)
        for metric in evals.load(benchmark).METRICS
        for row in rows(sweep, benchmark, judge, metric, every_phase=True)
    ]
    if not lines:
        return []
    path = sweep.folder / "differences.csv"
    head = ["benchmark", "judge", "metric", "question", "member", "phase"]
    tables.write_csv(path, [*head, *NUMBERS, "unpaired", "record", "record before"], lines)
    return [path]
