"""What is measured after each iteration: one file a benchmark, and the statistics they share.

A benchmark's file has
    needs(config) -> Needs                          the stages that answer and score, for plan.py
    measure(answers, scores, ..., protocol)         the metrics, as JSON, and counts of what could not be scored
    headline(metrics) -> {name: {metric: estimate}} the few numbers that are said of a model
    summary(metrics) -> str                         the same as a line
    EXPLAIN, OBJECTIVE                              what the names mean; which of them a search maximises
"""

from __future__ import annotations

from typing import Any

from evals import refinement, test_time

BENCHMARKS: dict[str, Any] = {"refinement": refinement, "test_time": test_time}
