"""Several answers to each question of a lm-eval task: what one of them is worth, and what one picked from n is.

Each metric is picked by itself, as it has its own extraction: strict and flexible match may vote for different answers.

    single    the mean of the first n answers          latest    of chains: the mean of the newest turn's
    best      the one that a scorer likes best         majority  the one most often given, by what is extracted
    oracle    the one that the metric likes best: any right, pass@n
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from evals import harness, picks
from evals.harness import Scored, Setup
from evals.needs import Measured
from evolve.config import Strategy


def measure(
    setup: Setup,
    questions: Sequence[Mapping[str, Any]],
    samples: Sequence[Mapping[str, Any]],
    strategy: Strategy,
    *,
    select: Sequence[Mapping[str, Any]] = (),
    majority: bool = False,
    extract: Callable[[str], str | None] | None = None,
) -> Measured:
    """`sizes`: metrics by the number of answers used, and by the way they are used; values of all answers by question.

    A document's parts (IFEval's instructions) are pooled after picking. Metrics that are none of any document (F1 of a
    corpus ...) are left out.

    Args:
        questions: rows that harness.questions made of the same setup.
        samples: rows of answers.jsonl, made by `strategy`. An answer that was never made counts as wrong, and has no
            vote.
        select: rows of scores.jsonl of the same answers, by the scorer that picks the best.
        majority: whether answers vote: with what a metric's filter extracts, or `extract` where that is given.

    Raises:
        ValueError: the questions are not the task's any more.
    """
    given = harness.turns(questions, samples)
    scored = [harness.score(setup, questions, answers) for answers in given]
    metrics = [metric for metric, combine in scored[0].combine.items() if _has_values(scored, metric, combine)]
    scores = {row["id"]: row["scores"] for row in select}
    votes = _votes(setup.task, given, scored, extract) if majority else {}
    sizes = []
    for size in picks.sizes(strategy):
        items: dict[str, dict[str, dict[str, float]]] = {}
        for metric in metrics:
            which: dict[str, dict[str, Sequence[int]]] = {}
            for name in given[0]:
                found = picks.picked(strategy, size, scores.get(name), votes.get(metric, {}).get(name))
                found["oracle"] = [picks.best([_right(one, metric, name) for one in scored[:size]])]
                for kind, indices in found.items():
                    which.setdefault(kind, {})[name] = indices
            for kind, of_all in which.items():
                items.setdefault(kind, {})[metric] = _values(scored, metric, of_all)
        worth = {
            kind: {metric: asdict(harness.estimate(values)) for metric, values in found.items()}
            for kind, found in items.items()
        }
        sizes.append({"answers": size, "tokens": picks.tokens(samples, size), "worth": worth})
    dropped = {
        harness.NEVER_MADE: sum(answer is None for answers in given for answer in answers.values()),
        harness.FAILED: sum(len(one.failed) for one in scored),
    }
    return Measured({"sizes": sizes}, dropped, items)


def _has_values(scored: Sequence[Scored], metric: str, combine: Any) -> bool:
    return all(harness.by_document(one.values[metric], combine) is not None for one in scored)


def _votes(
    task: str, given: Sequence[Mapping[str, Any]], scored: Sequence[Scored], extract: Callable[[str], str | None] | None
) -> dict[str, dict[str, list[str | None]]]:
    """What each answer says, by metric and question; None: nothing. Metrics whose filter extracts nothing have none."""
    filters = harness.extractions(task)
    if extract is not None:
        read = {text: extract(text) for text in {text for one in given for text in one.values() if text}}
        said = {name: [read.get(one[name]) for one in given] for name in given[0]}
        return dict.fromkeys(scored[0].filters, said)

    def vote(metric: str, name: str, place: int) -> str | None:
        text = scored[place].texts[metric][name].strip()
        nothing = given[place][name] is None or text in filters[scored[place].filters[metric]]
        return None if nothing else text

    return {
        metric: {name: [vote(metric, name, place) for place in range(len(given))] for name in given[0]}
        for metric, used in scored[0].filters.items()
        if used in filters
    }


def _right(scored: Scored, metric: str, name: str) -> float:
    """How much the metric likes an answer: of several parts, how many are right."""
    value = scored.values[metric][name]
    worth = float(sum(value)) if isinstance(value, list) else float(value)
    return worth if scored.higher[metric] else -worth


def _values(scored: Sequence[Scored], metric: str, indices: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Values by question of the answers that count, by their places; of several the mean."""
    found = []
    for place in range(len(next(iter(indices.values())))):
        raw = {name: scored[which[place]].values[metric][name] for name, which in indices.items()}
        values = harness.by_document(raw, scored[0].combine[metric])
        assert values is not None, "what is none of any document is left out before"
        found.append(values)
    return {name: fmean(values[name] for values in found) for name in indices}
