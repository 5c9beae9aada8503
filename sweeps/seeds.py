"""A setting run several times: members that differ in training seeds, data seeds and base models made by seeds alone.

What training did to one run is shared by all its prompts, so a run is what was sampled: numbers are means over runs
with Student's interval, differences are paired by run (the same seeds, data and base model). Answers that were drawn
again (eval.seed) are averaged within their run.

Runs that share a seed of several that vary (`seed=0,1 data.seed=0,1`: the same prompts, or the same draws) are not
independent, and neither are any two that such runs lead from one to the other: all of these together count as one, as
do runs that share their measurements. n is how many are left; of one there is neither interval nor test.

Four questions, each corrected by itself over the settings (Holm), after the last phase:

    self-refinement    refined - direct answers
    self-improvement   direct answers - those of the base model
    iterations         refined answers - those before the first iteration
    against            refined answers - those of the sweep's first setting

seeds.csv has two more: self-refinement after every phase, and refined answers after each - those after the one before,
and after the last - those after each. means.csv has every mean, after every phase.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import pairwise, product
from pathlib import Path
from statistics import fmean
from typing import Any

import evals
from evals import statistics
from evolve.store import flatten
from sweeps import differences, tables
from sweeps.collect import Measurement, MemberResult, Sweep, role
from sweeps.formats import Cell, Table, write_csv
from sweeps.style import Point

DRAWN_AGAIN = "eval.seed"  # makes other answers of the same models, not another run
SEEDS = ("seed", "data.seed", DRAWN_AGAIN)
MODEL = ("model.path", "model.revision")
DRAWS = (("seed",), ("data.seed",), MODEL)  # what makes another run

Runs = Mapping[str, Sequence[MemberResult]]  # of one setting, by those of its DRAWS that vary in the sweep, as JSON
Measured = Mapping[str, Sequence[Measurement]]  # by run
Mean = tuple[Mapping[str, Any], Sequence[str]]  # an estimate, and the records that it comes from
Last = dict[str, dict[str, Mean]]  # by setting or member, and kind of answers


@lru_cache(maxsize=8)
def groups(sweep: Sweep) -> dict[str, Runs]:
    """The runs of each setting, by its name; empty where no setting was run more than once."""
    found = _grouped(sweep, (*SEEDS, *MODEL))
    for runs in found.values():
        members = [member for of in runs.values() for member in of]
        seeds, made = ({_values(member, fields) for member in members} for fields in (SEEDS, (*SEEDS, *MODEL)))
        if len(made) > len(seeds):  # with the same seeds, another model is another setting
            found = _grouped(sweep, SEEDS)
            break
    return found if any(len(runs) > 1 for runs in found.values()) else {}


def _grouped(sweep: Sweep, seeds: Sequence[str]) -> dict[str, Runs]:
    """Members that are equal but for these fields, by their setting's name."""
    varying = [draw for draw in _varying(sweep) if draw[0] in seeds]
    found: dict[str, dict[str, list[MemberResult]]] = {}
    names: dict[str, str] = {}
    for member in sweep.members:
        rest = {field: value for field, value in flatten(member.config).items() if field not in seeds}
        name = names.setdefault(json.dumps(rest, sort_keys=True), _name(member, seeds))
        run = json.dumps([_values(member, draw) for draw in varying])
        found.setdefault(name, {}).setdefault(run, []).append(member)
    return dict(found)


def _varying(sweep: Sweep) -> list[tuple[str, ...]]:
    return [draw for draw in DRAWS if len({_values(member, draw) for member in sweep.members}) > 1]


def _independent(runs: Mapping[str, tuple[str, ...]]) -> list[list[str]]:
    """Runs by what is independent of the others: those that share a draw, or all of their records, stand together.

    runs: by run, the records of its measurements.
    """
    found: list[tuple[set[Any], list[str]]] = []
    for run, records in runs.items():
        marks, together = {*enumerate(json.loads(run)), records}, list[str]()
        for one in [one for one in found if one[0] & marks]:
            found.remove(one)
            marks |= one[0]
            together += one[1]
        found.append((marks, [*together, run]))
    return [together for _, together in found]


def most_runs(sweep: Sweep) -> int:
    """Of independent runs, of the setting that has the most."""
    return max(len(_independent({run: (run,) for run in runs})) for runs in groups(sweep).values())


def crossed(sweep: Sweep) -> str:
    """What to know where no two runs of a setting are independent; empty where some are."""
    if not groups(sweep) or most_runs(sweep) > 1:
        return ""
    return (
        f"{' and '.join(draw[0] for draw in _varying(sweep))} are crossed, so no two runs are independent, and there "
        "is no interval or test over runs; 'data.seed=${seed}' sweeps them together"
    )


def means_of(sweep: Sweep, number: int) -> str:
    """What a title says of means over so many runs."""
    if said := crossed(sweep):
        return f"mean over the runs of each setting (seeds); {said}"
    return f"mean over {number} runs of each setting (seeds), ±: 95 % interval over runs"


def _values(member: MemberResult, fields: Sequence[str]) -> str:
    config = flatten(member.config)
    return json.dumps([config.get(field) for field in fields])


def _name(member: MemberResult, seeds: Sequence[str]) -> str:
    """The member's, without its seeds."""
    own = tuple(f"{field}=" for field in seeds)
    return " ".join(word for word in member.name.split(" ") if not word.startswith(own)) or "all runs"


def judges(sweep: Sweep, benchmark: str) -> list[str]:
    """Everyone who has judged a benchmark's answers; a reward model that each run trains for itself is one."""
    return list(dict.fromkeys(map(role, sweep.judges(benchmark))))


def measured(runs: Runs, benchmark: str, judge: str) -> dict[str, Measured]:
    """By phase, what those of the runs have that have reached it. judge: of `judges`."""
    found: dict[str, dict[str, list[Measurement]]] = {}
    for run, members in runs.items():
        for one in (one for member in members for one in member.of(benchmark) if role(one.judge) == judge):
            found.setdefault(one.phase, {}).setdefault(run, []).append(one)
    return {phase: dict(of) for phase, of in found.items()}


def phases(runs: Runs, benchmark: str) -> list[str]:
    """Those after which a setting is measured, whether it has been or not."""
    return next(iter(runs.values()))[0].phases(benchmark)


def _kinds(found: Measured) -> list[str]:
    """Of answers."""
    return list(dict.fromkeys(kind for of in found.values() for one in of for kind in one.headline))


def _of(found: Measured, kind: str, metric: str) -> dict[str, list[tuple[str, float]]]:
    """By run that has the metric, (record, value) of its measurements, each once."""
    worth = {
        run: {one.id: of["value"] for one in several if (of := one.headline.get(kind, {}).get(metric))}
        for run, several in found.items()
    }
    return {run: sorted(of.items()) for run, of in worth.items() if of}


Side = Mapping[str, Sequence[tuple[str, float]]]  # by run, (record, value)


def _records(runs: Sequence[str], *sides: Side) -> tuple[str, ...]:
    """Each once."""
    return tuple(dict.fromkeys(record for side in sides for run in runs for record, _ in side[run]))


def _distinct(runs: Sequence[str], *sides: Side) -> list[str]:
    """One of those runs that share all their measurements."""
    return list({_records([run], *sides): run for run in reversed(runs)}.values())[::-1]


def _mean(values: Side) -> Mean | None:
    """Over runs, with its interval. None of no run."""
    if not values:
        return None
    together = _independent({run: _records([run], values) for run in values})
    clusters = {
        runs[0]: [fmean(value for _, value in values[run]) for run in _distinct(runs, values)] for runs in together
    }
    return asdict(statistics.mean(clusters)), _records(list(values), values)


def over_runs(found: Measured, kind: str, metric: str) -> Mean | None:
    return _mean(_of(found, kind, metric))


def shown(sweep: Sweep, benchmarks: Sequence[str] | None = None) -> list[Table]:
    """For each of the benchmarks (all of them), judge and metric, a table by phase and one of differences."""
    several = groups(sweep)
    found = []
    for benchmark, judge, metric, title in _metrics(sweep, benchmarks) if several else ():
        means: list[tuple[str, str, list[Mean | str]]] = []
        for name, runs in several.items():
            by_phase = measured(runs, benchmark, judge)
            kinds = dict.fromkeys(kind for of in by_phase.values() for kind in _kinds(of))
            missing = {
                phase for members in runs.values() for one in members for phase, of in one.missing if of == benchmark
            }
            for kind in kinds:
                row = [
                    over_runs(by_phase.get(phase, {}), kind, metric) or ("missing" if phase in missing else "")
                    for phase in sweep.phases
                ]
                if any(not isinstance(of, str) for of in row):
                    means.append((name, kind, row))
        if not means:
            continue
        number = max(of[0]["n"] for *_, row in means for of in row if not isinstance(of, str))
        body = [[name, kind, *(cell(of, number) for of in row)] for name, kind, row in means]
        about = f"{title}, {means_of(sweep, number)}"
        if not crossed(sweep) and any("run" in cell for _, _, *cells in body for cell in cells):
            about += "; fewer runs where a number says so: runs that share a seed or a measurement are one"
        found.append(Table(about, [["setting", "answers", *sweep.phases], *body]))
        if tested := rows(sweep, several, benchmark, judge, metric):
            lines = [[of.question, of.setting, *differences.cells(of.difference, of.records)] for of in tested]
            about = (
                f"differences of {title} after the last phase, paired by run, ±: 95 % interval; p: t-test over "
                f"{max(of.difference.n for of in tested)} runs, corrected within each question (Holm); detectable: "
                "what four of five such tests see"
            )
            found.append(Table(about, [["question", "setting", "difference", "p", "detectable"], *lines]))
    return found


def _metrics(sweep: Sweep, benchmarks: Sequence[str] | None = None) -> Iterator[tuple[str, str, str, str]]:
    for benchmark in sweep.benchmarks if benchmarks is None else benchmarks:
        for judge in judges(sweep, benchmark):
            for metric, title in sweep.titles(benchmark).items():
                yield benchmark, judge, metric, title if benchmark == "refinement" else f"{benchmark}, {title}"


def cell(of: Mean | str, number: int) -> str:
    """A mean, which says so where it is over fewer runs than the table's `number`."""
    if isinstance(of, str):
        return of
    estimate, records = of
    n = estimate["n"]
    return Cell(tables.number(estimate) + (f" ({n} run{'s' * (n > 1)})" if n < number else ""), estimate, records)


def last(sweep: Sweep, judge: str, metric: str) -> Last:
    """Of each setting after its last phase; of each member where none was run more than once."""
    found: Last = {}
    for name, runs in groups(sweep).items():
        here = at_end(runs, "refinement", judge)
        means = {kind: over_runs(here, kind, metric) for kind in _kinds(here)}
        found[name] = {kind: mean for kind, mean in means.items() if mean}
    for member in () if found else sweep.members:
        if one := member.last("refinement"):
            found[member.name] = {kind: of for kind in one.headline if (of := worth(one, kind, metric))}
    return found


def worth(one: Measurement, kind: str, metric: str) -> Mean | None:
    """Of one measurement, in the form of a mean over runs."""
    estimate = one.headline.get(kind, {}).get(metric)
    return (estimate, [one.id]) if estimate else None


def at_end(runs: Runs, benchmark: str, judge: str) -> Measured:
    """What those of the runs have that have reached the last phase."""
    return measured(runs, benchmark, judge).get(phases(runs, benchmark)[-1], {}) if phases(runs, benchmark) else {}


def points(sweep: Sweep, runs: Runs, benchmark: str, judge: str, shift: float, kind: str, metric: str) -> list[Point]:
    """Of a setting, after each phase."""
    by_phase, found = measured(runs, benchmark, judge), []
    for place, phase in enumerate(sweep.phases):
        if mean := over_runs(by_phase.get(phase, {}), kind, metric):
            found.append(Point(place + shift, phase, *mean))
    return found


def turns(runs: Runs, judge: str, metric: str, shift: float) -> list[Point]:
    """Of a setting, at each turn of its chains after the last phase."""
    measured, found = at_end(runs, "refinement", judge), []
    for turn in range(max((len(one.metrics["turns"]) for of in measured.values() for one in of), default=0)):
        values = {
            run: [(one.id, of["value"]) for one in several if (of := one.metrics["turns"][turn][metric])]
            for run, several in measured.items()
        }
        if mean := _mean({run: sorted(set(of)) for run, of in values.items() if of}):
            found.append(Point(turn + 1 + shift, f"turn {turn + 1}", *mean))
    return found


@dataclass(frozen=True)
class Row:
    """One difference over runs, and the records of its sides."""

    question: str
    setting: str
    difference: statistics.Difference
    after: tuple[str, ...]
    before: tuple[str, ...]

    @property
    def records(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.after, *self.before)))


def rows(
    sweep: Sweep, several: Mapping[str, Runs], benchmark: str, judge: str, metric: str, every_phase: bool = False
) -> list[Row]:
    """Differences over the runs that both sides have, two independent ones at least."""
    asked: dict[str, dict[str, tuple[Side, Side]]] = {}
    reference: tuple[str, Side] | None = None  # the first setting's
    for name, runs in several.items():
        by_phase, planned = measured(runs, benchmark, judge), phases(runs, benchmark)
        if not planned or planned[-1] not in by_phase:
            continue
        kinds = _kinds(by_phase[planned[-1]])
        direct = kinds[0]
        refined = next((kind for kind in evals.load(benchmark).OBJECTIVE if kind in kinds), kinds[-1])

        def side(phase: str, kind: str, by_phase: Mapping[str, Measured] = by_phase) -> Side:
            return _of(by_phase.get(phase, {}), kind, metric)

        ours = side(planned[-1], refined)
        if refined != direct:
            asked.setdefault("self-refinement", {})[name] = ours, side(planned[-1], direct)
        if planned[-1] != planned[0]:
            asked.setdefault("self-improvement", {})[name] = side(planned[-1], direct), side(planned[0], direct)
        before = [phase for phase in planned if not phase.startswith("iteration")]
        if before and before[-1] not in (planned[0], planned[-1]):
            asked.setdefault("iterations", {})[name] = ours, side(before[-1], refined)
        for phase in planned[:-1] if every_phase and refined != direct else ():
            asked.setdefault(f"self-refinement, {phase}", {})[name] = side(phase, refined), side(phase, direct)
        for one, after in (
            dict.fromkeys([*pairwise(planned), *product(planned[:-1], planned[-1:])]) if every_phase else ()
        ):
            asked.setdefault(f"{after} after {one}", {})[name] = side(after, refined), side(one, refined)
        if reference is not None and ours != reference[1]:  # else they are the same stages
            asked.setdefault(f"against {reference[0]}", {})[name] = ours, reference[1]
        reference = reference or (name, ours)
    return [row for question, pairs in asked.items() for row in _tested(question, pairs)]


def _tested(question: str, pairs: Mapping[str, tuple[Side, Side]]) -> Iterator[Row]:
    """Settings that share their measurements share a test."""
    tests: dict[tuple[tuple[str, ...], ...], tuple[dict[str, list[float]], dict[str, list[float]]]] = {}
    of: dict[str, tuple[tuple[str, ...], ...]] = {}
    for name, (after, before) in pairs.items():
        both = [run for run in after if run in before]
        together = _independent({run: _records([run], after, before) for run in both})
        if len(together) > 1:
            kept = [_distinct(runs, after, before) for runs in together]
            of[name] = key = tuple(_records(runs, after, before) for runs in kept)
            left, right = (
                {runs[0]: [fmean(value for _, value in side[run]) for run in runs] for runs in kept}
                for side in (after, before)
            )
            tests[key] = left, right
    tested = statistics.differences(tests)
    for name, key in of.items():
        after, before = pairs[name]
        both = [run for run in after if run in before]
        yield Row(question, name, tested[key], _records(both, after), _records(both, before))


def write(sweep: Sweep) -> list[Path]:
    """means.csv: every mean; seeds.csv: every difference. Returns those that have a line.

    None has one where no setting was run more than once. Each line has the records of its number; n: independent runs.
    """
    several = groups(sweep)
    means, lines = [], []
    for benchmark, judge, metric, _ in _metrics(sweep) if several else ():
        about = [benchmark, judge, metric]
        for name, runs in several.items():
            for phase, found in measured(runs, benchmark, judge).items():
                for kind in _kinds(found):
                    worth = _of(found, kind, metric)
                    if mean := _mean(worth):
                        numbers = [mean[0][key] for key in ("value", "low", "high", "n")]
                        means.append([*about, name, phase, kind, *numbers, len(worth), " ".join(mean[1])])
        for of in rows(sweep, several, benchmark, judge, metric, every_phase=True):
            numbers = [getattr(of.difference, number) for number in differences.NUMBERS]
            lines.append([*about, of.question, of.setting, *numbers, " ".join(of.after), " ".join(of.before)])
    head, records = ["benchmark", "judge", "metric"], ["records after", "records before"]
    files = {
        "means.csv": ([*head, "setting", "phase", "answers", "value", "low", "high", "n", "runs", "records"], means),
        "seeds.csv": ([*head, "question", "setting", *differences.NUMBERS, *records], lines),
    }
    written = {sweep.folder / name: table for name, table in files.items() if table[1]}
    for path, (header, body) in written.items():
        write_csv(path, header, body)
    return list(written)
