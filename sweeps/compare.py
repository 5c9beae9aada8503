"""python -m sweeps.compare A B: what B has beyond A, paired by prompt. A, B: a sweep's FOLDER, or FOLDER:MEMBER.

Of two sweeps, members of the same name are compared, after the last phase that both have measured. Says which settings
differ, each difference with its interval and test (corrected over the table), and the prompts that differ most.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evals import statistics
from evolve.config import ConfigError
from evolve.show import console as make_console
from evolve.store import flatten
from sweeps import best, collect, differences, summary, tables
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.formats import Cell, Table, rich_table

IDLE = ("resources", "wandb", "output", "dry_run")  # sections that change no number
TOP = 5  # prompts shown


@dataclass(frozen=True)
class Side:
    sweep: Sweep
    member: MemberResult


Pair = tuple[Side, Side]


def choose(word: str) -> list[Side]:
    """The members that a word of the command names. Raises ConfigError with a line."""
    folder, name = (word, "") if Path(word).is_dir() else word.partition(":")[::2]
    sweep = collect.load(Path(folder))
    found = [Side(sweep, member) for member in sweep.members if name in ("", member.name)]
    if not found:
        raise ConfigError(f"{folder}: no member {name!r}; it has {', '.join(repr(m.name) for m in sweep.members)}")
    return found


def pairs(before: list[Side], after: list[Side]) -> list[Pair]:
    """Members of the same name; one of each whatever their names. Raises ConfigError where none go together."""
    if len(before) == len(after) == 1:
        return [(before[0], after[0])]
    names = {side.member.name: side for side in before}
    if found := [(names[side.member.name], side) for side in after if side.member.name in names]:
        return found
    raise ConfigError("no member's name is in both sweeps; name one of each: FOLDER:MEMBER")


def alone(before: list[Side], after: list[Side], found: list[Pair]) -> list[str]:
    """As lines: the members that are compared with nobody."""
    paired = [id(side) for pair in found for side in pair]
    left = [[side for side in sides if id(side) not in paired] for sides in (before, after)]
    return [
        f"{sides[0].sweep.folder}: not compared, for the other side has none of the name: "
        f"{', '.join(side.member.name for side in sides)}"
        for sides in left
        if sides
    ]


def settings(pair: Pair) -> dict[str, tuple[Any, Any]]:
    """What differs in the configuration: {key: (before, after)}."""
    left, right = (flatten({k: v for k, v in side.member.config.items() if k not in IDLE}) for side in pair)
    keys = [key for key in {**left, **right} if left.get(key) != right.get(key)]
    return {key: (left.get(key), right.get(key)) for key in keys}


def measured(pair: Pair) -> Iterator[tuple[Measurement, Measurement]]:
    """Each benchmark by a judge that both have, after the last phase that both have."""
    before, after = (side.member for side in pair)
    for benchmark in dict.fromkeys(one.benchmark for one in before.measurements):
        for judge in dict.fromkeys(one.judge for one in before.of(benchmark)):
            later = {one.phase: one for one in after.of(benchmark, judge)}
            common = [(one, later[one.phase]) for one in before.of(benchmark, judge) if one.phase in later]
            yield from common[-1:]


def table(found: list[Pair]) -> Table:
    """Differences of every pair, benchmark, metric and kind of answers. Raises ConfigError where there are none."""
    rows: list[tuple[tuple[str, str, str, str], Pair, Measurement, Measurement]] = []
    asked: dict[tuple[str, str, str, str], str] = {}
    sides = {}  # pairs that share stages share tests
    for pair in found:
        for one, other in measured(pair):
            for metric in one.titles:
                for kind in [kind for kind in one.headline if kind in other.headline]:
                    left, right = _values(pair, (one, other), kind, metric)
                    key = (one.id, other.id, kind, metric)
                    common, every = left.keys() & right.keys(), left.keys() | right.keys()
                    if left and right:
                        asked[key] = f"{len(common)}" if common == every else f"{len(common)} of {len(every)}"
                    if common:
                        rows.append((key, pair, one, other))
                    if common and (one.id, left) != (other.id, right):  # else they are one, and nothing is to be tested
                        sides[key] = ({k: [right[k]] for k in common}, {k: [left[k]] for k in common})
    if not rows and asked:
        raise ConfigError("both have been measured, but on other prompts, none of them the same: see data.* of both")
    if not rows:
        raise ConfigError("nothing has been measured of both, by the same benchmark and judge after the same phase")
    tested = statistics.differences(sides)
    cells = []
    for key, pair, one, other in rows:
        kind, metric = key[2:]
        difference, p = "same stage", "-"
        if key in tested:
            difference, p, _ = differences.cells(tested[key], (other.id, one.id))
            difference.best = tested[key].p_corrected < best.ALPHA
        who = (
            pair[1].member.name
            if pair[0].member.name == pair[1].member.name
            else f"{pair[0].member.name} -> {pair[1].member.name}"
        )
        numbers = [tables.cell(side, metric, kind) for side in (one, other)]
        label = [who, summary.named(one.benchmark, one.titles[metric]), one.phase, kind]
        cells.append([*label, *numbers, difference, p, asked[key]])
    about = (
        f"B - A, paired by prompt, ±: 95 % interval; p: t-test, corrected over {len(tested)} of them (Holm); "
        f"bold: p < {best.ALPHA}; prompts: those of the difference, and of how many, where A or B lacks some"
    )
    header = ["member", "metric", "after", "answers", "A", "B", "difference", "p", "prompts"]
    return Table(about, [header, *cells], labels=4)


def _values(
    pair: Pair, sides: tuple[Measurement, Measurement], kind: str, metric: str
) -> tuple[Mapping[str, float], Mapping[str, float]]:
    before, after = (
        best.by_prompt(side.sweep, best.Rival(Cell(""), one, kind, metric))
        for side, one in zip(pair, sides, strict=True)
    )
    return before, after


def prompts(pair: Pair) -> list[str]:
    """As lines: the prompts whose last answers differ most by the first benchmark's main metric, with both answers."""
    for one, other in measured(pair):
        metric = next((metric for metric in one.titles if metric in other.titles), "")
        kind = "refined" if "refined" in one.headline else next(iter(one.headline))
        left, right = _values(pair, (one, other), kind, metric)
        gaps = {key: right[key] - left[key] for key in left.keys() & right.keys() if right[key] != left[key]}
        title = summary.named(one.benchmark, one.titles.get(metric, ""))
        texts = [_texts(side.sweep, made) for side, made in zip(pair, (one, other), strict=True)]
        return [
            f"{gap:+.3f} {title}, prompt {key}"
            + "".join(f"\n       {what}: {_short(text)}" for what, text in _said(key, texts))
            for key, gap in sorted(gaps.items(), key=lambda gap: (-abs(gap[1]), gap[0]))[:TOP]
        ]
    return []


def _texts(sweep: Sweep, measurement: Measurement) -> dict[str, tuple[str, str]]:
    """{prompt's id: (prompt, last answer)}; nothing of what is only weighed, or of answers that the store has lost."""
    answers = measurement.record["inputs"].get("answers")
    rows = sweep.rows(answers, "answers.jsonl") if answers else None
    return {row["id"]: (row["prompt"], row["answers"][-1]["text"]) for row in rows or ()}


def _said(key: str, texts: list[dict[str, tuple[str, str]]]) -> Iterator[tuple[str, str]]:
    for what, place, side in (("prompt", 0, 0), ("A", 1, 0), ("B", 1, 1)):
        if key in texts[side]:
            yield what, str(texts[side][key][place])


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


def main() -> int:
    words = sys.argv[1:]
    if len(words) != 2 or any(word.startswith("-") for word in words):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(words) else 2
    console = make_console()
    try:
        before, after = map(choose, words)
        found = pairs(before, after)
        made = table(found)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console.print(rich_table(made))
    for line in alone(before, after, found):
        print(line)
    for pair in found:
        name = pair[1].member.name
        for key, (before, after) in settings(pair).items():
            print(f"{name}: {key}: {_short(str(before))} -> {_short(str(after))}")
        for line in prompts(pair):
            print(f"{name}: {line}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
