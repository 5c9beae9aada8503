"""A benchmark's metrics from scored answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from evolve.config import RUNTIME, Benchmark, Section, Strategy
from evolve.stages import Context, read_rows
from evolve.store import Report

VERSION = 1


class Config(Section):
    benchmark: Benchmark
    # What to quote a number with: the inputs' identities say the same, and names in it are only names.
    protocol: Annotated[str, RUNTIME]
    strategy: Strategy | None = None  # how the answers were made, where the numbers depend on it
    verifier: str | None = None  # who extracts what an answer says


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from evals import BENCHMARKS
    from evolve import verifiers

    benchmark = BENCHMARKS[config.benchmark]
    given: dict[str, Any] = {use: read_rows(inputs[use] / "scores.jsonl") for use in inputs if use != "answers"}
    if config.strategy is not None:
        given["strategy"] = config.strategy
    if config.verifier is not None:
        given["extract"] = verifiers.load(config.verifier).extract
    answers = read_rows(inputs["answers"] / "answers.jsonl")
    metrics, unscored = benchmark.measure(answers, protocol=config.protocol, **given)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    found = benchmark.headline(metrics)
    values = {name: worth["reward"]["value"] for name, worth in found.items() if name != "gain"}
    return Report(dropped=unscored, values=values)
