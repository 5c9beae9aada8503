"""Answers to preference pairs, by a filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from evolve import filters
from evolve.config import Filter, Section
from evolve.stages import Context, read_rows, write_rows
from evolve.store import Report
from evolve.strategies import Answer

VERSION = 1


class Config(Section):
    filter: Filter


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    scores = {}
    if "scores" in inputs:
        scores = {row["id"]: row["scores"] for row in read_rows(inputs["scores"] / "scores.jsonl")}
    kept = []
    dropped: Counter[str] = Counter()
    later = 0
    for row in rows:
        answers = [Answer(**{**answer, "given": tuple(answer["given"])}) for answer in row["answers"]]
        pair = filters.pair(config.filter, answers, scores.get(row["id"]))
        if pair.dropped:
            dropped[pair.dropped] += 1
            continue
        chosen, rejected = answers[pair.chosen], answers[pair.rejected]
        later += chosen.turn > rejected.turn
        kept.append(
            {
                "id": row["id"],
                "prompt": row["prompt"],
                "chosen": chosen.text,
                "rejected": rejected.text,
                "chosen_finished": chosen.end == "stop",
                "rejected_finished": rejected.end == "stop",
            }
        )
    if not kept:
        raise ValueError(f"none of {len(rows)} prompts gives a pair: {dict(dropped)}")
    write_rows(out / "rows.jsonl", kept)
    return Report(dropped=dict(sorted(dropped.items())), values={"pairs": len(kept), "chosen is the later turn": later})
