"""What is measured after each iteration: one file a benchmark, and the statistics they share.

A benchmark's file has
    needs(config) -> Needs                          whose prompts are answered, and who scores, for plan.py
    measure(answers, ..., protocol) -> Measured     metrics as JSON, counts of what has no score, values by prompt, and
                                                    what writes files that others' tools can score again
    METRICS                                         their names, the main one first, and titles; `titles` has those
                                                    that were measured
    headline(metrics) -> {name: {metric: estimate}} the few numbers that are said of a model
    summary(metrics) -> str                         the same as a line
    EXPLAIN, OBJECTIVE                              what the names mean; of which a search maximises the main metric
    TOGETHER                                        metrics that a figure shows in one panel, where there are such
one with prompts of its own
    questions(files ..., limit, ...) -> rows        {"id", "prompt", "reference"?, ...}
and one that a judge decides asks, read, stand_in (games.py); its `measure` is also given the judge and its replies.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from typing import Any

HELD_OUT = ("refinement", "test_time", "drift")  # that are asked of the data's held-out prompts
JUDGED = ("alpaca_eval", "arena_hard")  # that a judge decides
BENCHMARKS = (*HELD_OUT, *JUDGED)  # each a file here; imported when it is asked for


def load(name: str) -> Any:
    """A benchmark by its name; a name that is none of ours is a task of lm-eval's."""
    if name in BENCHMARKS:
        return importlib.import_module(f"evals.{name}")
    from evals.task import Task

    return Task(name)


def titles(name: str, measured: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What a benchmark's metrics are called that some of its measurements have, the main one first.

    Those of METRICS are in its order; what else a task of lm-eval has measured follows by its own name.
    """
    benchmark = load(name)
    worth = [of for metrics in measured for of in benchmark.headline(metrics).values()]
    found = dict.fromkeys(metric for of in worth for metric, estimate in of.items() if isinstance(estimate, Mapping))
    known = {metric: title for metric, title in benchmark.METRICS.items() if metric in found}
    return known if name in BENCHMARKS else known | {metric: metric for metric in found if metric not in known}
