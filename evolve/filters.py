"""Scored answers to preference pairs, as a pure function of one prompt's answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evolve.config import Filter
from evolve.strategies import Answer


@dataclass(frozen=True)
class Pair:
    """Indices of the chosen and the rejected answer, or why there is none."""

    chosen: int = -1
    rejected: int = -1
    dropped: str | None = None


def pair(filter: Filter, answers: Sequence[Answer], scores: Sequence[float | None] | None) -> Pair:
    """One prompt's pair.

    best_worst: the answers of highest and lowest score [reconstructed: argmax, argmin]; the earlier of equals, so that
    a tie does not favour refinements. last_first: the last refinement over the direct answer [reconstructed].

    What cannot stand in a pair is left out first: empty answers, answers cut off at the token limit (unless
    `unfinished` keeps them), answers without a score.
    """
    usable = [
        index
        for index, answer in enumerate(answers)
        if answer.text.strip() and (answer.end == "stop" or filter.unfinished == "keep")
    ]
    if filter.select == "last_first":
        if 0 not in usable:
            return Pair(dropped="direct answer empty or unfinished")
        refined = [index for index in usable if answers[index].turn > 1]
        if not refined:
            return Pair(dropped="no usable refinement")
        chosen, rejected = refined[-1], 0
    else:
        assert scores is not None, "best_worst needs scores"
        scored = {index: score for index in usable if (score := scores[index]) is not None}
        if len(scored) < 2:
            return Pair(dropped="fewer than two usable answers")
        chosen = max(scored, key=lambda index: scored[index])
        rejected = min(scored, key=lambda index: scored[index])
        if scored[chosen] == scored[rejected]:
            return Pair(dropped="tie")
        if scored[chosen] - scored[rejected] <= filter.margin:
            return Pair(dropped="within the margin")
    if answers[chosen].text == answers[rejected].text:
        return Pair(dropped="identical answers")
    return Pair(chosen, rejected)
