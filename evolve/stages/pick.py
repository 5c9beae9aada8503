"""Of several answers to a prompt the best by its score, alone: best-of-n, as any other answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evals import picks
from evolve.stages import Context, read_rows, write_rows
from evolve.store import Report, StageConfig

VERSION = 1


class Config(StageConfig):
    LIGHT = True
    COUNTED = "prompts"
    FOLLOWS = "answers"


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    """Rows of answers.jsonl with one answer; beside it its `place` from 0, `of` how many, and the `tokens` of all."""
    rows, unscored = [], 0
    scores = read_rows(inputs["scores"] / "scores.jsonl")
    for row, scored in zip(read_rows(inputs["answers"] / "answers.jsonl"), scores, strict=True):
        answers, place = row["answers"], picks.best(scored["scores"])
        unscored += scored["scores"][place] is None
        spent = {"place": place, "of": len(answers), "tokens": sum(answer["tokens"] for answer in answers)}
        rows.append({**row, "answers": [answers[place]], **spent})
    write_rows(out / "answers.jsonl", rows)
    first = sum(row["place"] == 0 for row in rows)
    dropped = {"prompts without a score, whose first answer stands": unscored}
    return Report(dropped, values={"prompts": len(rows), "the first is the best": first})
