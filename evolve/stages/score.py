"""A scorer grades every answer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from evolve.config import RUNTIME, Section
from evolve.scorers import RewardModel, Scorer, Verifier
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report

VERSION = 1


class Config(Section):
    scorer: Literal["verifier", "reward_model"]
    verifier: str | None
    model: ModelSettings | None  # of a reward model
    max_length: int
    batch_size: Annotated[int, RUNTIME]


def load_scorer(config: Config, reward_model: Path | None, context: Context) -> Scorer:
    if config.scorer == "verifier":
        assert config.verifier is not None
        return Verifier(config.verifier)
    assert reward_model is not None and config.model is not None
    return RewardModel(
        reward_model,
        chat_template=config.model.chat_template,
        trust_remote_code=config.model.trust_remote_code,
        dtype=config.model.dtype,
        max_length=config.max_length,
        batch_size=config.batch_size,
        device=context.device,
    )


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    scorer = load_scorer(config, inputs.get("reward_model"), context)
    items = [(row["prompt"], answer["text"]) for row in rows for answer in row["answers"]]
    scores = iter(scorer(items, context.progress))
    scored = []
    unscored = 0
    for row in rows:
        here = [next(scores) for _ in row["answers"]]
        unscored += sum(score.value is None for score in here)
        scored.append(
            {"id": row["id"], "scores": [score.value for score in here], "correct": [score.correct for score in here]}
        )
    write_rows(out / "scores.jsonl", scored)
    return Report(dropped={"answers without a score": unscored}, values={"answers": len(items)})
