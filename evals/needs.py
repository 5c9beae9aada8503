"""What a benchmark needs before it can measure, and what it measures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from evolve.config import Config, Strategy


@dataclass(frozen=True)
class File:
    """A file from outside, by a local path or owner/name/file on the hub; `key` is the setting that names it."""

    key: str
    path: str
    revision: str | None = None


@dataclass(frozen=True)
class Asked:
    """A benchmark's own questions: the files they come from, by the argument's name of its `questions`, and the rest.

    `hub`: data sets that are read from the hub, where no file stands for them. `answered`: False for questions whose
    answers the model only weighs (multiple choice), and writes none.
    """

    files: Mapping[str, File]
    settings: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    hub: tuple[str, ...] = ()
    answered: bool = True


@dataclass(frozen=True)
class Samples:
    """Several answers to each question, of which `measure` picks: how they are made, who scores them if anyone does."""

    strategy: Strategy
    temperature: float
    select: str | None


def samples(config: Config, pick: Collection[str]) -> Samples | None:
    """Those that a benchmark's setting `pick` wants; None: none."""
    strategy = config.eval.test_time
    if not pick or strategy is None:
        return None
    return Samples(strategy, config.eval.temperature, config.eval.select if "best" in pick else None)


@dataclass(frozen=True)
class Needs:
    """How prompts are answered, and in words; whose scores or verdicts `measure` gets.

    scorers: by the argument's name of `measure`, for benchmarks whose answers are scored one by one.
    asked: None for a benchmark that is asked of the data's held-out prompts.
    judging: what verdicts depend on beside the judge, in words: numbers that differ in it stand in different tables.
    versus: for answers that a judge compares with references: the settings of the benchmark's `asks`; and reading: of
    its `read`.
    files: that `measure` reads, by the argument's name. settings: of `measure`, where the numbers depend on more.
    until: strings before which an answer ends.
    samples: several answers beside those of `strategy`. Of a benchmark with a judge, the best alone is compared.
    weighed: who says how likely the answers are, by the argument's name of `measure`: policy (who made them), base.
    """

    strategy: Strategy
    protocol: str
    temperature: float
    judging: str = ""
    scorers: Mapping[str, str] = field(default_factory=dict)
    asked: Asked | None = None
    versus: Mapping[str, Any] | None = None
    reading: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, File] = field(default_factory=dict)
    max_new_tokens: int | None = None
    until: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: Samples | None = None
    weighed: tuple[str, ...] = ()


class Measured(NamedTuple):
    """What a benchmark says of a model: metrics as JSON, counts of what could not be scored, and values by prompt.

    items: {kind of answer, as in headline: {metric: {prompt's id: value}}}, for comparisons that are paired by prompt.
    records: writes files into a folder that others' tools can score again.
    """

    metrics: dict[str, Any]
    dropped: dict[str, int]
    items: dict[str, dict[str, dict[str, float]]]
    records: Callable[[Path], None] | None = None
