"""One slice of a data set: held-out prompts, pairs for a training stage, or an iteration's prompts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from evolve import data
from evolve.stages import Context, write_rows
from evolve.store import Report, StageConfig

VERSION = 1


class Config(StageConfig):
    LIGHT = True
    COUNTED = "rows"

    pool: Literal["eval", "pairs", "prompts"]
    start: int  # of the slice in its pool; negative: from the end
    count: int
    reserve: int  # rows at the start of the source that are held out, so not in any pool but eval
    tail: int  # rows at its end that are a reward model's, so not in this slice; 0 where the plan has seen to that
    seed: int
    split: str
    eval_split: str | None
    max_characters: int | None
    prompt: str = "prompt"
    gold: str | None = None


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    rows, dropped = data.slice_rows(
        str(inputs["data"]),
        str(inputs["eval"]) if "eval" in inputs else None,
        pool=config.pool,
        start=config.start,
        count=config.count,
        reserve=config.reserve,
        tail=config.tail,
        seed=config.seed,
        split=config.split,
        eval_split=config.eval_split,
        max_characters=config.max_characters,
        prompt=config.prompt,
        gold=config.gold,
    )
    write_rows(out / "rows.jsonl", rows)
    return Report(dropped=dropped, values={"rows": len(rows)})
