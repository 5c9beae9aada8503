"""The refinement curve: mean reward, and accuracy where a verifier judges, by turn of a chain on held-out prompts.

This is Figure 1's measurement [paper]: each turn's answer is made from the prompt and the turn before; turn 1 is the
direct answer, the last is the refined one. `gain` is self-refinement: the last turn against turn 1 of the same model,
paired by prompt. (Self-improvement, turn 1 of one model against turn 1 of an earlier one, is between records.)

    prompt "2 0 1 3 ..."   turn 1 "1 3 3 2 ...": reward 0.5, wrong   turn 2 "2 0 0 3 ...": reward 1.0, right
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from evals import statistics
from evals.needs import Measured, Needs
from evolve.config import Config, Stop, Strategy

METRICS = {"reward": "mean reward", "accuracy": "accuracy"}
OBJECTIVE = ("refined",)
EXPLAIN = {"gain": "refined - direct, paired"}
STOPS = {"unchanged": "the answer stays", "score_drop": "the score drops"}


def chain(turns: int, stop: Stop | None = None) -> Strategy:
    """One answer and its refinements, each of the one before."""
    return Strategy(name="chain", answers=turns, branching=None, expand=None, stop=stop)


def needs(config: Config) -> Needs:
    turns, stop = config.eval.turns, config.eval.stop
    strategy = chain(turns, stop)
    until = f" at most, until {STOPS[stop]}" if stop else ""
    settings = {"strategy": strategy} if stop else {}
    scorers = {"scores": config.eval_scorer}
    said = f"chain of {turns} turns{until}"
    return Needs(strategy, said, config.eval.temperature, scorers=scorers, settings=settings)


def measure(
    answers: Sequence[Mapping[str, Any]],
    scores: Sequence[Mapping[str, Any]],
    protocol: str,
    strategy: Strategy | None = None,
) -> Measured:
    """Metrics by turn, counts of what could not be scored, and both by prompt.

    Args:
        answers: rows of answers.jsonl (id, answers), all made by a chain.
        scores: rows of scores.jsonl (id, scores, correct), in the same order.
        protocol: scorer, template, temperature ...: what a number must be quoted with.
        strategy: of chains that may end early. The answer that stands then counts for the turns that were not made,
            and `made` has how many were, and the tokens that were generated.

    Raises:
        ValueError: no prompt has all its answers scored.
    """
    made = None
    if strategy is not None:
        tokens = {row["id"]: [float(sum(answer["tokens"] for answer in row["answers"]))] for row in answers}
        counts = {row["id"]: [float(len(row["answers"]))] for row in answers}
        made = {"turns": asdict(statistics.mean(counts)), "tokens": asdict(statistics.mean(tokens))}
        answers, scores = _carried(answers, scores, strategy)
    turns = len(answers[0]["answers"])
    # A prompt counts for every turn or for none, so that turns are compared over the same prompts.
    whole = [row for row in scores if None not in row["scores"]]
    dropped = {"prompts with an answer that has no score": len(scores) - len(whole)}
    metrics: list[dict[str, Any]] = []
    by_turn = []
    for turn in range(turns):
        rewards = {row["id"]: [row["scores"][turn]] for row in whole}
        correct = {row["id"]: [float(row["correct"][turn])] for row in whole if row["correct"][turn] is not None}
        by_turn.append((rewards, correct))
        texts = [row["answers"] for row in answers]
        metrics.append(
            {
                "turn": turn + 1,
                "reward": asdict(statistics.mean(rewards)),
                "accuracy": asdict(statistics.share(correct)) if correct else None,
                "characters": fmean(len(row[turn]["text"]) for row in texts),
                "unchanged": fmean(row[turn]["text"] == row[turn - 1]["text"] for row in texts) if turn else None,
            }
        )
    (first, first_right), (last, last_right) = by_turn[0], by_turn[-1]
    result = {
        "benchmark": "refinement",
        "protocol": protocol,
        "turns": metrics,
        "gain": {
            "reward": asdict(statistics.paired(last, first)),
            "accuracy": asdict(statistics.paired(last_right, first_right)) if first_right and last_right else None,
        },
    }
    items = {
        kind: {"reward": _single(rewards), "accuracy": _single(right)}
        for kind, (rewards, right) in {
            "direct": by_turn[0],
            "refined": by_turn[-1],
            **{f"turn {turn}": values for turn, values in enumerate(by_turn, 1)},
        }.items()
    }
    return Measured(result | ({"made": made} if made else {}), dropped, items)


def _single(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: value for key, (value,) in values.items()}


def _carried(
    answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], strategy: Strategy
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows with an answer for every turn: where the chain has ended, the one that stands.

    A chain that `score_drop` ended early ended with an answer that does not stand. Of a whole one, the last scores say.
    """
    carried: tuple[list[dict[str, Any]], list[dict[str, Any]]] = [], []
    for row, scored in zip(answers, scores, strict=True):
        last = len(row["answers"]) - 1
        final = last
        if strategy.stop == "score_drop" and last > 0:
            before, after = scored["scores"][last - 1 :]
            final -= last + 1 < strategy.answers or (None not in (before, after) and after < before)
        standing = [turn if turn < last else final for turn in range(strategy.answers)]
        carried[0].append({**row, "answers": [row["answers"][turn] for turn in standing]})
        picked = {key: [scored[key][turn] for turn in standing] for key in ("scores", "correct")}
        carried[1].append({**scored, **picked})
    return carried


def headline(metrics: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Direct answers, refined answers, and the gain of one over the other."""
    return {"direct": metrics["turns"][0], "refined": metrics["turns"][-1], "gain": metrics["gain"]}


def summary(metrics: Mapping[str, Any]) -> str:
    first, last, gain = headline(metrics).values()
    text = f"reward direct {first['reward']['value']:.3f}, refined {last['reward']['value']:.3f}"
    if first["accuracy"]:
        text += f"; accuracy direct {first['accuracy']['value']:.1%}, refined {last['accuracy']['value']:.1%}"
    if gain["reward"]["low"] is not None:
        text += "; gain {value:+.3f} [{low:+.3f}, {high:+.3f}]".format(**gain["reward"])
    if made := metrics.get("made"):
        text += f"; {made['turns']['value']:.2f} turns, {made['tokens']['value']:.1f} tokens a prompt"
    return text
