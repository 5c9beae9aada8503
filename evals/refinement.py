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


def measure(
    answers: Sequence[Mapping[str, Any]], scores: Sequence[Mapping[str, Any]], protocol: str
) -> tuple[dict[str, Any], dict[str, int]]:
    """Metrics by turn, and counts of what could not be scored.

    Args:
        answers: rows of answers.jsonl (id, answers), all made by a chain.
        scores: rows of scores.jsonl (id, scores, correct), in the same order.
        protocol: scorer, template, temperature ...: what a number must be quoted with.

    Raises:
        ValueError: no prompt has all its answers scored.
    """
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
                "characters": fmean(len(made[turn]["text"]) for made in texts),
                "unchanged": fmean(made[turn]["text"] == made[turn - 1]["text"] for made in texts) if turn else None,
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
    return result, dropped
