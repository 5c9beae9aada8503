"""Which numbers of a table are best: the highest, where paired tests tell it from every other.

The best of some numbers is the best by chance too. So it is bold only where each difference to the others, paired by
prompt, has p < 0.05 after Holm's correction over all such tests of the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from evals import statistics
from sweeps.collect import Measurement, Sweep
from sweeps.formats import Cell, is_best

ALPHA = 0.05


@dataclass(frozen=True)
class Rival:
    """One of the numbers that stand against one another: a measurement's answers of a kind, by a metric."""

    cell: Cell
    measurement: Measurement
    kind: str
    metric: str

    @property
    def key(self) -> tuple[str, str, str]:
        return self.measurement.id, self.kind, self.metric


def mark(sweep: Sweep, contests: Sequence[Sequence[Rival]]) -> None:
    """Sets `best` of the cells that are, one contest a group of numbers that are to be compared."""
    sides = {}
    tests = []
    for contest in contests:
        contest = [one for one in contest if one.metric not in one.measurement.metrics.get("less_is_better", ())]
        measured = [one for one in contest if one.cell.estimate and by_prompt(sweep, one)]
        if not measured:
            continue
        top = max(measured, key=lambda one: one.cell.estimate["value"] if one.cell.estimate else 0.0)
        others = {one.key: one for one in measured if one.key != top.key}.values()
        keys = []
        for other in others:
            left, right = by_prompt(sweep, top), by_prompt(sweep, other)
            if common := left.keys() & right.keys():
                keys.append((*top.key, *other.key))
                sides[keys[-1]] = ({k: [left[k]] for k in common}, {k: [right[k]] for k in common})
        if len(keys) == len(others):  # nothing is best of what it was not tested against
            tests.append((measured, top, keys))
    tested = statistics.differences(sides)
    for measured, top, keys in tests:
        if keys and all(tested[key].p_corrected < ALPHA and tested[key].value > 0 for key in keys):
            for one in measured:
                one.cell.best = one.key == top.key  # of members that share it, each one's


def note(rows: Iterable[Iterable[str]]) -> str:
    """What bold means, for the title of a table that has some."""
    if not any(is_best(cell) for row in rows for cell in row):
        return ""
    return "; bold: above every other, each paired difference p < 0.05 (t-test, corrected over the table by Holm)"


def by_prompt(sweep: Sweep, one: Rival) -> Mapping[str, float]:
    """{prompt's id: value}; of `gain`, refined - direct answers. Empty where the benchmark has none by prompt."""
    items = sweep.items(one.measurement)
    if one.kind != "gain":
        return items.get(one.kind, {}).get(one.metric, {})
    direct, refined = (items.get(kind, {}).get(one.metric, {}) for kind in ("direct", "refined"))
    return {key: refined[key] - direct[key] for key in direct.keys() & refined.keys()}
