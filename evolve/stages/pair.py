"""Answers to preference pairs, by a filter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from evolve import filters
from evolve.config import Filter
from evolve.stages import Context, read_rows, write_rows
from evolve.store import Report, StageConfig
from evolve.strategies import Answer

VERSION = 2


class Config(StageConfig):
    LIGHT = True
    COUNTED = "pairs"
    FOLLOWS = "answers"

    filter: Filter
    seed: int | None = None  # of a filter that draws


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    scores = {}
    if "scores" in inputs:
        scores = {row["id"]: row["scores"] for row in read_rows(inputs["scores"] / "scores.jsonl")}
    kept = []
    dropped: Counter[str] = Counter()
    prompts = 0
    later = 0
    for row in rows:
        answers = [Answer(**{**answer, "given": tuple(answer["given"])}) for answer in row["answers"]]
        draw = f"{config.seed}\x00{row['id']}"
        pairs, why, left_out = filters.pairs(config.filter, answers, scores.get(row["id"]), draw)
        dropped += left_out if why is None else left_out + Counter([why])
        prompts += bool(pairs)
        for pair in pairs:
            chosen, rejected = answers[pair.chosen], answers[pair.rejected]
            later += chosen.turn > rejected.turn
            # References are joined by id, so that each pair has its own.
            several = f"/{pair.chosen}-{pair.rejected}" if config.filter.several else ""
            kept.append(
                {
                    "id": f"{row['id']}{several}",
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
    values = {"pairs": len(kept), "prompts": prompts, "chosen is the later turn": later}
    return Report(dropped=dict(sorted(dropped.items())), values=values)
