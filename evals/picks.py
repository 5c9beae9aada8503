"""Several answers to a prompt, and which of them count: all, the newest, the best, the one most often given.

Pure functions over one prompt's answers, in the order in which their strategy makes them. The earlier of equals is
taken throughout.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from evals import statistics
from evolve.config import Strategy

EXPLAIN = {
    "single": "mean of all answers",
    "latest": "mean of the newest turn's answers",
    "best": "the answer that the selecting scorer likes best",
    "majority": "the answer most often given",
}


def best(scores: Sequence[float | None]) -> int:
    """Which answer scores highest; those without a score are passed over, and the first stands where none has one."""
    return max(range(len(scores)), key=lambda index: -float("inf") if (score := scores[index]) is None else score)


def majority(extracted: Sequence[str | None]) -> int:
    """Which answer gives the most frequent text (None: it gives none); the first of all where none can be read."""
    votes = Counter(text for text in extracted if text is not None)
    return extracted.index(max(votes, key=votes.__getitem__)) if votes else 0


def picked(
    strategy: Strategy, size: int, scores: Sequence[float | None] | None, said: Sequence[str | None] | None
) -> dict[str, Sequence[int]]:
    """Which of the first `size` answers count, by the way they are used; without scores or texts, not by these."""
    found: dict[str, Sequence[int]] = {"single": range(size)}
    if strategy.name in ("chain", "few_shot"):
        found["latest"] = range(size - strategy.chains, size)
    if scores is not None:
        found["best"] = [best(scores[:size])]
    if said is not None:
        found["majority"] = [majority(said[:size])]
    return found


def sizes(strategy: Strategy) -> range:
    """How many answers can be used: of several chains, whole turns of all."""
    return range(strategy.chains, strategy.answers + 1, strategy.chains)


def tokens(rows: Sequence[Mapping[str, Any]], size: int) -> dict[str, Any]:
    """The tokens that were generated for the first `size` answers to a prompt, of rows of answers.jsonl."""
    spent = {row["id"]: [float(sum(answer["tokens"] for answer in row["answers"][:size]))] for row in rows}
    return asdict(statistics.mean(spent))


def of_all(rows: Sequence[Mapping[str, Any]], worth: Mapping[str, Any]) -> dict[str, Any]:
    """What answers that were picked from all are worth, as a benchmark's `sizes` have it; rows of the stage `pick`."""
    spent = {row["id"]: [float(row["tokens"])] for row in rows}
    return {"answers": rows[0]["of"], "tokens": asdict(statistics.mean(spent)), "worth": dict(worth)}


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each way to use all of the answers, where there are several."""
    return dict(metrics["sizes"][-1]["worth"]) if "sizes" in metrics else {}


def shape(strategy: Strategy) -> str:
    """A strategy in words, for protocols."""
    if strategy.chains > 1:
        return f"{strategy.chains} chains of {strategy.answers // strategy.chains} turns"
    return f"{strategy.answers} answers ({strategy.name})"
