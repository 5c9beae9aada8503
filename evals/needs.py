"""What a benchmark needs before it can measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from evolve.config import Strategy


@dataclass(frozen=True)
class Needs:
    """How held-out prompts are answered, and in words; whose scores `measure` gets, by its argument's name.

    settings: of the stage `evaluate`, where the numbers depend on more than answers and scores.
    """

    strategy: Strategy
    protocol: str
    scorers: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)


class Measured(NamedTuple):
    """What a benchmark says of a model: metrics as JSON, counts of what could not be scored, and values by prompt.

    items: {kind of answer, as in headline: {metric: {prompt's id: value}}}, for comparisons that are paired by prompt.
    """

    metrics: dict[str, Any]
    dropped: dict[str, int]
    items: dict[str, dict[str, dict[str, float]]]
