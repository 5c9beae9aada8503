"""What is measured after each iteration: one file a benchmark, and the statistics they share.

A benchmark's file has
    needs(config) -> Needs                          whose prompts are answered, and who scores, for plan.py
    measure(answers, ..., protocol) -> Measured     metrics as JSON, counts of what has no score, values by prompt, and
                                                    what writes files that others' tools can score again
    METRICS                                         their names, the first the one a search maximises, and titles
    headline(metrics) -> {name: {metric: estimate}} the few numbers that are said of a model
    summary(metrics) -> str                         the same as a line
    EXPLAIN, OBJECTIVE                              what the names mean; which of them a search maximises
one with prompts of its own
    questions(files ..., limit, ...) -> rows        {"id", "prompt", "reference"?, ...}
and one that a judge decides asks, read, stand_in (games.py); its `measure` is also given the judge and its replies.
"""

from __future__ import annotations

import importlib
from typing import Any

BENCHMARKS = ("refinement", "test_time", "alpaca_eval", "arena_hard")  # each a file here; imported when it is asked for


def load(name: str) -> Any:
    """A benchmark by its name; a name that is none of ours is a task of lm-eval's."""
    if name in BENCHMARKS:
        return importlib.import_module(f"evals.{name}")
    from evals.task import Task

    return Task(name)
