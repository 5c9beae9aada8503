"""What a benchmark and its judge say to one another: asks, replies, and verdicts by turn.

A judged benchmark (alpaca_eval.py, arena_hard.py) has
    asks(prompt, answer, reference, ...) -> [Ask]   the games of one answer against the reference, in a fixed order
    read(ask, reply) -> verdict | None              what the judge said, as JSON; None: it can't be read
    stand_in(sign) -> [verdict]                     the same games' verdicts where a scorer finds the answer better (1),
                                                    equal (0) or worse (-1) than the reference
and knows nothing of servers, caches or costs; the stage `compare` knows nothing of labels or win rates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ask:
    """One question to a judge: messages, and what the request says beside (max_tokens, temperature, logprobs, ...)."""

    messages: list[dict[str, str]]
    fields: Mapping[str, Any]
    answer_first: bool  # of the two that are shown; the other is the reference


@dataclass(frozen=True)
class Reply:
    """What a judge said. `logprobs` is choices[0].logprobs.content of OpenAI's protocol, None where there is none."""

    text: str
    end: str
    logprobs: list[dict[str, Any]] | None = None


Replies = dict[str, dict[str, list[Reply | None]]]  # by prompt's id and turn, in the order of `asks`
