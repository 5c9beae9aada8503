"""The paper's kind of table: a row for each method after its last phase, a column for each benchmark's metric.

A method is a member, or a setting over its runs where it was run with several seeds.

Direct answers (what self-improvement changes), refined answers, and the gain of one over the other (self-refinement)
are parts of their own. Beside our numbers stand the paper's, where they are known here (published.yaml).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evolve.store import flatten
from sweeps import best, seeds, tables
from sweeps.collect import MemberResult, Sweep
from sweeps.formats import Table

PARTS = {"direct": "direct answers", "refined": "refined answers", "gain": "self-refinement"}  # and what picks have
UNKNOWN = "not published here"
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())

Column = tuple[str, str, str]  # benchmark, judge, metric


def shown(sweep: Sweep, beyond: str | None = None) -> list[Table]:
    """The table; none where a sweep has one method, or measures one thing that the tables by phase show as well.

    `beyond`: of all benchmarks but this one, whatever is there.
    """
    measured = [name for name in sweep.benchmarks if name != (beyond or "test_time")]  # which has tables of its own
    columns = _columns(sweep, measured)
    over_runs = seeds.groups(sweep)
    methods: Mapping[str, seeds.Runs] = over_runs or {member.name: {"": [member]} for member in sweep.members}
    if not columns or (beyond is None and (len(columns) < 2 or len(methods) < 2)):
        return []
    what, names = labelled(list(methods))
    what = "setting" if over_runs and what == "member" else what
    known = [column for column in columns if any(column[2] in _numbers(row, column[0]) for row in PUBLISHED)]
    contests: dict[tuple[str, Column], list[best.Rival]] = {}
    rows = []
    for kind in dict.fromkeys(kind for member in sweep.members for m in member.measurements for kind in m.headline):
        for name, runs in methods.items():
            members = [member for several in runs.values() for member in several]
            cells = []
            for column in columns:
                benchmark, judge, metric = column
                last = members[0].last(benchmark, judge)
                if over_runs:
                    mean = seeds.over_runs(seeds.at_end(runs, benchmark, judge), kind, metric)
                    cells.append(seeds.cell(mean or _none(members, benchmark), seeds.most_runs(sweep)))
                elif last is None:
                    cells.append(_none(members, benchmark))
                else:
                    cells.append(cell := tables.cell(last, metric, kind))
                    contests.setdefault((kind, column), []).append(best.Rival(cell, last, kind, metric))
            if any(cell not in ("-", "missing") for cell in cells):
                beside = ["-" if kind == "gain" else published(members[0], kind, column) for column in known]
                rows.append([PARTS.get(kind, kind), names[name], _phase(members[0]), *cells, *beside])
    best.mark(sweep, list(contests.values()))
    titles = [_title(sweep, column) for column in columns]
    header = ["answers", what, "after", *titles, *(f"published {_title(sweep, column)}" for column in known)]
    about = _about(sweep, known, rows)
    if not over_runs:
        about += tables.untested(sweep, dict(zip(columns, titles, strict=True)))
    return [Table(about, [header, *rows], labels=3)]


def labels(sweep: Sweep) -> tuple[str, dict[str, str]]:
    """What members differ in, and what they are called: the value alone where all differ in one setting."""
    return labelled([member.name for member in sweep.members])


def labelled(names: Sequence[str]) -> tuple[str, dict[str, str]]:
    """The same of any such names."""
    keys = {name.partition("=")[0] for name in names}
    if len(keys) == 1 and not any(" " in name for name in names):
        return keys.pop(), {name: name.partition("=")[2] for name in names}
    return "member", {name: name for name in names}


def published(member: MemberResult, kind: str, column: Column) -> str:
    """The paper's number for a member's answers, with its tag."""
    config = flatten(member.config)
    for row in PUBLISHED:
        number = _numbers(row, column[0]).get(column[2])
        same = all(config.get(key) in (of if isinstance(of, list) else [of]) for key, of in row["settings"].items())
        if number is not None and same and kind in row["answers"] and _phase(member).startswith("iteration"):
            return f"{number} {row['tag']}"
    return UNKNOWN


def _numbers(row: Mapping[str, Any], benchmark: str) -> Mapping[str, float]:
    found: Mapping[str, float] = row["numbers"].get(benchmark, {})
    return found


def _columns(sweep: Sweep, benchmarks: Iterable[str]) -> list[Column]:
    """Benchmarks' metrics that some member has a number of: of many the first."""
    return [
        (benchmark, judge, metrics[0])
        for benchmark in benchmarks
        for judge in _judges(sweep, benchmark)
        for metrics in tables.together(sweep, benchmark)
        if any(
            worth.get(metrics[0])
            for member in sweep.judged(benchmark, judge).members
            for one in member.of(benchmark)
            for worth in one.headline.values()
        )
    ]


def _judges(sweep: Sweep, benchmark: str) -> list[str]:
    return seeds.judges(sweep, benchmark) if seeds.groups(sweep) else sweep.judges(benchmark)


def _phase(member: MemberResult) -> str:
    return [step["phase"] for step in member.steps if step["kind"] == "evaluate"][-1]


def _none(members: Iterable[MemberResult], benchmark: str) -> str:
    """What stands for a number that there is not: whether it was to be measured."""
    return "missing" if any((_phase(member), benchmark) in member.missing for member in members) else "-"


def named(benchmark: str, title: str) -> str:
    """A metric's title with its benchmark's name, where it doesn't say that itself."""
    return title if benchmark in ("refinement", "arena_hard") else f"{benchmark} {title}"


def _title(sweep: Sweep, column: Column) -> str:
    benchmark, judge, metric = column
    title = named(benchmark, sweep.titles(benchmark)[metric])
    return f"{title}, {judge}" if len(_judges(sweep, benchmark)) > 1 else title


def _about(sweep: Sweep, known: list[Column], rows: list[list[str]]) -> str:
    said = "all benchmarks after each member's last phase, ±: 95 % interval over prompts"
    if seeds.groups(sweep):
        said = f"all benchmarks after the last phase, {seeds.means_of(sweep, seeds.most_runs(sweep))}"
    said += "; protocols stand with each"
    said += (
        " benchmark's table by phase; direct answers: what self-improvement changes; self-refinement: refined - direct"
    )
    said += best.note(rows)
    if not known:
        return f"{said}; the paper's numbers for these are {UNKNOWN}"
    sources = "; ".join(f"{row['tag']} {row['what']}: {row['source']}" for row in PUBLISHED)
    return f"{said}; published, of Llama-3.1-8B also beside the embedded model: {sources}"
