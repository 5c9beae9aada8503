"""What a benchmark needs before it can measure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
