"""The paper's kind of table: a row for each method after its last phase, a column for each benchmark's metric.

Direct answers (what self-improvement changes), refined answers, and the gain of one over the other (self-refinement)
are parts of their own. Beside our numbers stand the paper's, where they are known here (published.yaml).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evolve.store import flatten
from sweeps import best, tables
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.formats import Table

PARTS = {"direct": "direct answers", "refined": "refined answers", "gain": "self-refinement"}  # and what picks have
UNKNOWN = "not published here"
PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text())

Column = tuple[str, str, str]  # benchmark, judge, metric


def shown(sweep: Sweep, beyond: str | None = None) -> list[Table]:
    """The table; none where a sweep has one member, or measures one thing that the tables by phase show as well.

    `beyond`: of all benchmarks but this one, whatever is there.
    """
    measured = [name for name in sweep.benchmarks if name != (beyond or "test_time")]  # which has tables of its own
    columns = _columns(sweep, measured)
    if not columns or (beyond is None and (len(columns) < 2 or len(sweep.members) < 2)):
        return []
    what, names = labels(sweep)
    known = [column for column in columns if any(column[2] in _numbers(row, column[0]) for row in PUBLISHED)]
    contests: dict[tuple[str, Column], list[best.Rival]] = {}
    rows = []
    for kind in dict.fromkeys(kind for member in sweep.members for m in member.measurements for kind in m.headline):
        for member in sweep.members:
            cells = []
            for column in columns:
                last = _last(member, column)
                if last is None:
                    cells.append("missing" if _asked(member, column[0]) else "-")
                    continue
                cells.append(cell := tables.cell(last, column[2], kind))
                contests.setdefault((kind, column), []).append(best.Rival(cell, last, kind, column[2]))
            if any(cell not in ("-", "missing") for cell in cells):
                beside = [published(member, kind, column) for column in known] if kind != "gain" else ["-"] * len(known)
                rows.append([PARTS.get(kind, kind), names[member.name], _phase(member), *cells, *beside])
    best.mark(sweep, list(contests.values()))
    titles = [_title(sweep, column) for column in columns]
    header = ["answers", what, "after", *titles, *(f"published {_title(sweep, column)}" for column in known)]
    about = _about(known, rows) + tables.untested(sweep, dict(zip(columns, titles, strict=True)))
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
        for judge in sweep.judges(benchmark)
        for metrics in tables.together(sweep, benchmark)
        if any(
            worth.get(metrics[0])
            for member in sweep.members
            for one in member.of(benchmark, judge)
            for worth in one.headline.values()
        )
    ]


def _last(member: MemberResult, column: Column) -> Measurement | None:
    found = [one for one in member.of(column[0], column[1]) if one.phase == _phase(member)]
    return found[0] if found else None


def _phase(member: MemberResult) -> str:
    return [step["phase"] for step in member.steps if step["kind"] == "evaluate"][-1]


def _asked(member: MemberResult, benchmark: str) -> bool:
    return (_phase(member), benchmark) in member.missing


def named(benchmark: str, title: str) -> str:
    """A metric's title with its benchmark's name, where it doesn't say that itself."""
    return title if benchmark in ("refinement", "arena_hard") else f"{benchmark} {title}"


def _title(sweep: Sweep, column: Column) -> str:
    benchmark, judge, metric = column
    title = named(benchmark, sweep.titles(benchmark)[metric])
    return f"{title}, {judge}" if len(sweep.judges(benchmark)) > 1 else title


def _about(known: list[Column], rows: list[list[str]]) -> str:
    said = "all benchmarks after each member's last phase, ±: 95 % interval over prompts; protocols stand with each"
    said += (
        " benchmark's table by phase; direct answers: what self-improvement changes; self-refinement: refined - direct"
    )
    said += best.note(rows)
    if not known:
        return f"{said}; the paper's numbers for these are {UNKNOWN}"
    sources = "; ".join(f"{row['tag']} {row['what']}: {row['source']}" for row in PUBLISHED)
    return f"{said}; published, of Llama-3.1-8B also beside the embedded model: {sources}"
