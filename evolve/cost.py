"""What a plan will cost beside time: the verdicts that judges behind servers are to be asked for, and their price."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evals
from evolve.config import ConfigError, Endpoint
from evolve.stages import questions
from evolve.store import Source, Stage, Store, digest

Questions = dict[str, list[dict[str, Any]]]  # by the id of the stage that makes them


@dataclass(frozen=True)
class Judging:
    """What new comparisons will ask of one judge; `open`: comparisons whose questions are not on this machine yet."""

    judge: str
    comparisons: int
    open: int
    requests: int
    tokens: int
    dollars: float | None
    cap: float | None

    def __str__(self) -> str:
        known = self.comparisons - self.open
        parts = []
        if known:
            price = "" if self.dollars is None else f", {self.dollars:.2f} dollars"
            parts.append(
                f"up to {self.requests:,} verdicts for {known} new comparisons, about {self.tokens:,} tokens{price}"
            )
        if self.open:
            parts.append(f"{self.open} new comparisons can't be priced until their questions are downloaded")
        if self.cap is not None and (self.dollars or 0.0) > self.cap:
            parts.append(
                f"that is more than max_dollars={self.cap:g}, where it stops: set what it may cost before it begins"
            )
        elif self.cap is not None:
            parts.append(f"it stops at max_dollars={self.cap:g}, with all that it has cost before")
        return f"{self.judge}: {'; '.join(parts)}"


def check_questions(stages: Iterable[Stage]) -> Questions:
    """The questions of new comparisons whose files are on this machine; files of lm-eval's tasks are only checked.

    Raises ConfigError where they are not as they should be, before anything is spent on their answers.
    """
    found: Questions = {}
    for stage in stages:
        asked = stage.inputs["questions"] if stage.kind == "compare" else stage
        if not isinstance(asked, Stage) or asked.kind != "questions" or asked.id in found:
            continue
        config: Any = asked.config
        files = {use: Path(item.path) for use, item in asked.inputs.items() if isinstance(item, Source)}
        if not all(file.exists() or str(file) == "embedded" for file in files.values()):
            continue
        benchmark, task = evals.load(config.benchmark), config.benchmark not in evals.BENCHMARKS
        try:
            if task:
                benchmark.check(**files, **config.settings)
            else:
                found[asked.id] = questions.rows(config, files)
        except (ValueError, OSError) as error:
            key = f"eval.{'harness.data.' if task else ''}{config.benchmark}"
            raise ConfigError(f"{key}: {error}") from None
    return found


def judging(stages: Iterable[Stage], rows: Questions, store: Store) -> list[Judging]:
    """What new comparisons cost, by judge. Answers are not there yet: they are taken to be as long as references."""
    asked: dict[str, list[Stage]] = {}
    for stage in stages:
        config: Any = stage.config
        if stage.kind == "compare" and config.endpoint is not None:
            asked.setdefault(config.endpoint.model, []).append(stage)
    return [_of(name, made, rows, store) for name, made in asked.items()]


def _of(name: str, stages: list[Stage], rows: Questions, store: Store) -> Judging:
    from evals import judges

    config: Any = stages[0].config
    endpoint: Endpoint = config.endpoint
    requests = tokens = unknown = 0
    dollars = 0.0
    estimates: dict[str, dict[str, Any]] = {}  # every phase of every member asks the same questions
    for stage in stages:
        config, asked, weights = stage.config, stage.inputs["questions"].id, stage.inputs.get("judge")
        if asked not in rows:
            unknown += 1
            continue
        key = digest([asked, config.settings, weights.id if weights else None])
        if key not in estimates:
            benchmark = evals.load(config.benchmark)
            asks = [
                ask
                for row in rows[asked]
                for ask in benchmark.asks(row["prompt"], f"{row['reference']} ", row["reference"], **config.settings)
            ]
            folder = Path(weights.path) if isinstance(weights, Source) else None
            estimates[key] = judges.estimate(asks, endpoint, store.judgments, folder)
        each, turns = estimates[key], len(config.turns)
        requests += turns * each["requests"]
        tokens += turns * sum(each["tokens"].values())
        dollars += turns * (each["dollars"] or 0.0)
    price = dollars if endpoint.price and (endpoint.price.input or endpoint.price.output) else None
    return Judging(name, len(stages), unknown, requests, tokens, price, endpoint.max_dollars)
