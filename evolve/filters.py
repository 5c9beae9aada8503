"""Scored answers to preference pairs, as a pure function of one prompt's answers."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import NamedTuple

from evolve.config import Filter
from evolve.strategies import Answer


class Pair(NamedTuple):
    """Indices of the chosen and the rejected answer."""

    chosen: int
    rejected: int


Scored = Mapping[int, float]  # answers' scores by index, in order


def best_worst(scored: Scored, draw: str) -> list[Pair]:
    """Of equals the earlier, as either."""
    return [Pair(max(scored, key=scored.__getitem__), min(scored, key=scored.__getitem__))]


def best_random(scored: Scored, draw: str) -> list[Pair]:
    best = max(scored, key=scored.__getitem__)
    others = [index for index in scored if index != best]
    number = int.from_bytes(hashlib.sha256(draw.encode()).digest()[:8], "big")
    return [Pair(best, others[number % len(others)])]


def every(scored: Scored, draw: str) -> list[Pair]:
    return [Pair(a, b) if scored[a] >= scored[b] else Pair(b, a) for a, b in combinations(scored, 2)]


SELECT = {"best_worst": best_worst, "best_random": best_random, "all": every}  # of filters that compare


def pairs(
    filter: Filter,
    answers: Sequence[Answer],
    scores: Sequence[float | None] | None,
    draw: str = "",
) -> tuple[list[Pair], str | None, Counter[str]]:
    """One prompt's pairs; if there is none, why; and counts of what else was left out, by reason.

    best_worst: the answers of highest and lowest score [reconstructed: argmax, argmin]; the earlier of equals, so that
    a tie does not favour refinements. best_random: the highest against any other, which `draw` (the seed and the
    prompt, say) decides. all: every two whose scores differ. last_first: the last refinement over the direct answer
    [reconstructed]. Scores that differ by no more than the margin make no pair.

    What cannot stand in a pair is left out first: empty answers, answers cut off at the token limit (unless
    `unfinished` keeps them) and, where scores count, answers without one and those that repeat an earlier one's text.
    """
    usable: list[int] = []
    out: Counter[str] = Counter()
    for index, answer in enumerate(answers):
        if not answer.text.strip():
            out["answers empty"] += 1
        elif answer.end != "stop" and filter.unfinished == "drop":
            out["answers unfinished"] += 1
        else:
            usable.append(index)
    if not filter.compares:
        if 0 not in usable:
            return [], "direct answer empty or unfinished", out
        refined = [index for index in usable if answers[index].turn > 1]
        if not refined:
            return [], "no usable refinement", out
        if answers[refined[-1]].text == answers[0].text:
            return [], "identical answers", out
        return [Pair(refined[-1], 0)], None, out

    assert scores is not None, f"{filter.select} needs scores"
    scored: dict[int, float] = {}
    texts: set[str] = set()
    for index in usable:
        score, text = scores[index], answers[index].text
        if score is None:
            out["answers unscored"] += 1
        elif text in texts:
            out["answers that repeat an earlier one"] += 1
        else:
            scored[index] = score
            texts.add(text)
    if len(scored) < 2:
        return [], "fewer than two usable answers", out
    gaps = {pair: scored[pair.chosen] - scored[pair.rejected] for pair in SELECT[filter.select](scored, draw)}
    found = [pair for pair, gap in gaps.items() if gap > filter.margin]
    if filter.several:
        out["pairs within the margin"] = len(gaps) - len(found)
    if found:
        return found, None, out
    return [], "tie" if not any(gaps.values()) else "within the margin", out
