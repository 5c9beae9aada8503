"""A scorer grades every answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from evolve import parts, verifiers
from evolve.config import RUNTIME, Section
from evolve.scorers import Item, RewardModel, Score, Scorer, VLLMRewardModel
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report

VERSION = 2


class Config(Section):
    scorer: Literal["verifier", "reward_model"]
    verifier: str | None
    model: ModelSettings | None  # of a reward model
    max_length: int
    batch_size: Annotated[int, RUNTIME]
    engine: Annotated[Literal["hf", "vllm"], RUNTIME] = "hf"
    processes: Annotated[int, RUNTIME] = 1
    memory_share: Annotated[float, RUNTIME] = 0.9


def load_scorer(config: Config, reward_model: Path | None, context: Context, engine: str = "hf") -> Scorer:
    """The scorer, in this process; only one that has nothing else to do may take vLLM's engine."""
    if config.scorer == "verifier":
        assert config.verifier is not None
        return verifiers.load(config.verifier)
    assert reward_model is not None and config.model is not None
    if engine == "vllm":
        return VLLMRewardModel(
            reward_model,
            config.model,
            max_length=config.max_length,
            batch_size=config.batch_size,
            memory_share=config.memory_share,
            device=context.device,
        )
    return RewardModel(
        reward_model,
        config.model,
        max_length=config.max_length,
        batch_size=config.batch_size,
        device=context.device,
    )


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    items = [Item(row["prompt"], answer["text"], row.get("gold")) for row in rows for answer in row["answers"]]
    model = config.scorer == "reward_model"
    made = parts.run(
        grade,
        (config, inputs.get("reward_model"), items),
        len(items),
        context,
        apart=model and config.engine == "vllm",
        processes=config.processes if model else 1,
        retries=int(model),
    )
    scores = iter([Score(*values) for values in made])
    scored = []
    unscored = gave_up = 0
    for row in rows:
        here = [next(scores) for _ in row["answers"]]
        unscored += sum(score.value is None for score in here)
        gave_up += sum(score.gave_up for score in here)
        scored.append(
            {"id": row["id"], "scores": [score.value for score in here], "correct": [score.correct for score in here]}
        )
    write_rows(out / "scores.jsonl", scored)
    values = {"answers": len(items)} | ({"wrong because the verifier gave up": gave_up} if gave_up else {})
    return Report(dropped={"answers without a score": unscored}, values=values)


def grade(
    argument: tuple[Config, Path | None, Sequence[Item]], numbers: Sequence[int], emit: parts.Emit, context: Context
) -> None:
    """Emits the scores of the answers of these numbers."""
    config, reward_model, items = argument
    scorer = load_scorer(config, reward_model, context, config.engine)
    for done, (index, score) in enumerate(scorer([items[number] for number in numbers]), 1):
        emit(numbers[index], [score.value, score.correct, score.gave_up])
        context.progress(done, len(numbers))
