"""Test-time scaling: what more answers to a held-out prompt are worth, by how many are used and the tokens they cost.

Of the first n answers of a strategy (parallel: n draws; a chain: n turns; several chains: whole turns of all of them):

    single    the mean of them: what one answer is worth
    latest    of chains: the mean of those of the newest turn, which a plain chain would hand out
    best      the one that a scorer likes best. Where a verifier selects it is called oracle: the accuracy is pass@n
    majority  the one whose extracted answer is the most frequent (self-consistency, Wang et al. 2022)

The earlier of equals is taken throughout. Prompts are the same at every n, so a curve is over one sample.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from evals import picks, statistics
from evals.needs import Measured, Needs
from evolve.config import Config, Strategy

METRICS = {"reward": "mean reward", "accuracy": "accuracy"}
OBJECTIVE = ("best", "oracle")
EXPLAIN = picks.EXPLAIN | {"oracle": "the best by the verifier, so that its accuracy is pass@n"}


def needs(config: Config) -> Needs:
    strategy = config.eval.test_time
    assert strategy is not None, "config.py refuses the benchmark without"
    return Needs(
        strategy,
        picks.shape(strategy),
        config.eval.temperature,
        scorers={"scores": config.eval_scorer, "select": config.eval.select},
        settings={"strategy": strategy, "verifier": config.data.verifier},
    )


def measure(
    answers: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    select: Sequence[Mapping[str, Any]],
    protocol: str,
    strategy: Strategy,
    extract: Callable[[str], str | None] | None = None,
) -> Measured:
    """Metrics by the number of answers used, counts of what could not be scored, and those of all answers by prompt.

    Args:
        answers: rows of answers.jsonl (id, answers), made by `strategy`.
        scores: rows of scores.jsonl (id, scores, correct), in the same order: what answers are worth.
        select: the same of the scorer that selects.
        protocol: scorers, template, temperature ...: what a number must be quoted with.
        extract: what an answer says, or None; without it there is no vote.

    Raises:
        ValueError: no prompt has all its answers scored by both.
    """
    rows = list(zip(answers, scores, select, strict=True))
    whole = [row for row in rows if None not in row[1]["scores"] and None not in row[2]["scores"]]
    dropped = {"prompts with an answer that has no score": len(rows) - len(whole)}
    oracle = any(None not in chosen["correct"] for _, _, chosen in whole)
    said = {made["id"]: [extract(one["text"]) for one in made["answers"]] for made, _, _ in whole if extract}
    sizes = []
    for size in picks.sizes(strategy):
        which: dict[str, dict[str, Sequence[int]]] = {}
        for made, _, chosen in whole:
            for kind, indices in picks.picked(strategy, size, chosen["scores"], said.get(made["id"])).items():
                kind = "oracle" if oracle and kind == "best" else kind
                which.setdefault(kind, {})[made["id"]] = indices
        values = {kind: _values(indices, whole) for kind, indices in which.items()}
        worth = {kind: _worth(found) for kind, found in values.items()}
        sizes.append({"answers": size, "tokens": picks.tokens([made for made, _, _ in whole], size), "worth": worth})
    items = {
        kind: {metric: {key: fmean(given) for key, given in by_prompt.items()} for metric, by_prompt in found.items()}
        for kind, found in values.items()  # of all answers
    }
    return Measured({"benchmark": "test_time", "protocol": protocol, "sizes": sizes}, dropped, items)


Values = dict[str, dict[str, list[float]]]


def _values(indices: Mapping[str, Sequence[int]], rows: Sequence[tuple[Mapping[str, Any], ...]]) -> Values:
    """Rewards, and whether right where a verifier judges, of the answers picked for each prompt."""
    reward: dict[str, list[float]] = {}
    correct: dict[str, list[float]] = {}
    for made, scored, chosen in rows:
        which = indices[made["id"]]
        reward[made["id"]] = [scored["scores"][index] for index in which]
        right = [
            scored["correct"][index] if scored["correct"][index] is not None else chosen["correct"][index]
            for index in which
        ]
        if None not in right:
            correct[made["id"]] = [float(one) for one in right]
    return {"reward": reward, "accuracy": correct}


def _worth(values: Values) -> dict[str, Any]:
    """The estimates of both."""
    reward, correct = values["reward"], values["accuracy"]
    alone = all(len(given) == 1 for given in reward.values())
    accuracy = (statistics.share if alone else statistics.mean)(correct) if correct else None
    return {"reward": asdict(statistics.mean(reward)), "accuracy": asdict(accuracy) if accuracy else None}


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Each way to use them, of all the answers."""
    return picks.headline(metrics)


def summary(metrics: Mapping[str, Any]) -> str:
    size, found = metrics["sizes"][-1], headline(metrics)
    lines = [
        f"{metric} " + ", ".join(f"{kind} {worth[metric]['value']:.3f}" for kind, worth in found.items())
        for metric in ("reward", "accuracy")
        if found["single"][metric]
    ]
    return f"{size['answers']} answers, {size['tokens']['value']:.0f} tokens a prompt: {'; '.join(lines)}"
