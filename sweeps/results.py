"""All tables of a sweep, and those that its end prints."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from sweeps import differences, pooled, seeds, summary, tables
from sweeps.collect import Sweep
from sweeps.formats import Table

ROWS = 40  # of a table on the screen


@lru_cache(maxsize=8)
def every(sweep: Sweep) -> list[Table]:
    """For the files and for the page, which ask for it one after the other."""
    found = summary.shown(sweep) + seeds.shown(sweep) + tables.shown(sweep) + pooled.shown(sweep)
    return found + differences.shown(sweep)


def first(sweep: Sweep) -> list[Table]:
    """What a person reads first: the first benchmark by phase, and of the others what stands at the end.

    Where settings were run with several seeds, means over these, not every run.
    """
    [main, *_] = sweep.benchmarks
    found = seeds.shown(sweep, [main])
    if not found:
        found = [made for made in tables.shown(sweep, [main]) if not made.title.startswith(tables.BY_ANSWERS)]
    return [_cut(made) for made in found + summary.shown(sweep, beyond=main)]


def _cut(made: Table) -> Table:
    more = len(made.rows) - 1 - ROWS
    if more <= 0:
        return made
    return replace(made, title=f"{made.title}; {more:,} more rows in the files", rows=made.rows[: ROWS + 1])
