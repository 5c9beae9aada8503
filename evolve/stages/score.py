"""A scorer grades every answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from evolve import parts, verifiers
from evolve.config import RUNTIME, Judge, Sampling, Section
from evolve.scorers import Item, RewardModel, Score, Scorer, VLLMRewardModel
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report

VERSION = 2


class Config(Section):
    scorer: Literal["verifier", "reward_model", "judge"]
    verifier: str | None
    model: ModelSettings | None  # of a reward model or judge
    max_length: int
    batch_size: Annotated[int, RUNTIME]
    engine: Annotated[Literal["hf", "vllm"], RUNTIME] = "hf"
    processes: Annotated[int, RUNTIME] = 1
    memory_share: Annotated[float, RUNTIME] = 0.9
    judge: Judge | None = None
    seed: int | None = None  # of a judge

    @property
    def shards(self) -> dict[str, Any]:
        """How a stage is dealt to processes (parts.run)."""
        if self.judge is not None:
            return self.judge.engine.shards
        if self.scorer == "verifier":
            return {}
        return {"apart": self.engine == "vllm", "processes": self.processes, "retries": 1}


def load_scorer(config: Config, inputs: Mapping[str, Path], context: Context, engine: str = "hf") -> Scorer:
    """The scorer, in this process; only one that has nothing else to do may take vLLM's engine."""
    if config.scorer == "verifier":
        assert config.verifier is not None
        return verifiers.load(config.verifier)
    assert config.model is not None
    if config.judge is not None:
        from evolve import engines, judge

        task = engines.Task(
            model=inputs.get("judge"),
            read=config.model,
            sampling=Sampling(temperature=config.judge.temperature, top_k=0, top_p=1.0),
            max_new_tokens=config.judge.max_new_tokens,
            max_length=config.max_length,
            device=context.device,
        )
        assert config.seed is not None
        return judge.Judge(config.judge, engines.load(config.judge.engine, task), config.seed)
    if engine == "vllm":
        return VLLMRewardModel(
            inputs["reward_model"],
            config.model,
            max_length=config.max_length,
            batch_size=config.batch_size,
            memory_share=config.memory_share,
            device=context.device,
        )
    return RewardModel(
        inputs["reward_model"],
        config.model,
        max_length=config.max_length,
        batch_size=config.batch_size,
        device=context.device,
    )


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    made = parts.run(grade, (config, inputs, rows), len(rows), context, **config.shards)
    scored = [[Score(*values) for values in row] for row in made]
    write_rows(
        out / "scores.jsonl",
        (
            {"id": row["id"], "scores": [score.value for score in here], "correct": [score.correct for score in here]}
            for row, here in zip(rows, scored, strict=True)
        ),
    )
    flat = [score for here in scored for score in here]
    counts: Counter[str] = Counter()
    for score in flat:
        counts.update(score.counts)
    unscored = sum(score.value is None for score in flat)
    return Report(dropped={"answers without a score": unscored}, values={"answers": len(flat), **counts})


def grade(
    argument: tuple[Config, Mapping[str, Path], Sequence[Mapping[str, Any]]],
    numbers: Sequence[int],
    emit: parts.Emit,
    context: Context,
) -> None:
    """Emits the scores of the answers in the rows of these numbers."""
    config, inputs, rows = argument
    scorer = load_scorer(config, inputs, context, config.engine)
    items: list[Item] = []
    owners: list[tuple[int, int]] = []  # of each item: its row, and its place in it
    for number in numbers:
        row = rows[number]
        if not row["answers"]:
            emit(number, [])
        for place, answer in enumerate(row["answers"]):
            items.append(Item(row["prompt"], answer["text"], row.get("gold")))
            owners.append((number, place))
    found: dict[int, dict[int, Score]] = {number: {} for number in numbers}
    for done, (index, score) in enumerate(scorer(items), 1):
        number, place = owners[index]
        here = found[number]
        here[place] = score
        if len(here) == len(rows[number]["answers"]):
            emit(number, [[here[place].value, here[place].correct, here[place].counts] for place in sorted(here)])
        context.progress(done, len(items))
