"""A scorer grades every answer."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from evolve import parts, verifiers
from evolve.config import RUNTIME, Judge, Sampling
from evolve.scorers import TOKENS, Item, RewardModel, Score, Scorer, VLLMRewardModel
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report, StageConfig

VERSION = 2
ROWS = 256  # that are scored together


class Config(StageConfig):
    SHARED = True
    COUNTED = "answers"
    FOLLOWS = "answers"

    scorer: Literal["verifier", "reward_model", "judge"]
    verifier: str | None
    model: ModelSettings | None  # of a reward model or judge
    max_length: int
    batch_size: Annotated[int, RUNTIME]
    engine: Literal["hf", "vllm"] = "hf"
    processes: Annotated[int, RUNTIME] = 1
    memory_share: Annotated[float, RUNTIME] = 0.9
    judge: Judge | None = None
    seed: int | None = None  # of a judge

    @property
    def gpus(self) -> int:
        if self.judge is not None:
            return self.judge.engine.gpus
        return 0 if self.scorer == "verifier" else self.processes

    @property
    def light(self) -> bool:
        return self.scorer == "verifier"

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
            max_length=config.judge.engine.max_length or config.max_length,
            device=context.device,
        )
        assert config.seed is not None
        return judge.Judge(config.judge, engines.load(config.judge.engine, task, "judge.engine"), config.seed)
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
    tokens = {"generated": counts.pop(TOKENS)} if TOKENS in counts else {}
    unscored = sum(score.value is None for score in flat)
    return Report(dropped={"answers without a score": unscored}, tokens=tokens, values={"answers": len(flat), **counts})


def grade(
    argument: tuple[Config, Mapping[str, Path], Sequence[Mapping[str, Any]]],
    numbers: Sequence[int],
    emit: parts.Emit,
    context: Context,
) -> None:
    """Emits the scores of the answers in the rows of these numbers. An answer that was not made has none."""
    config, inputs, rows = argument
    answers = sum(len(rows[number]["answers"]) for number in numbers)
    done = 0
    with contextlib.closing(load_scorer(config, inputs, context, config.engine)) as scorer:
        # Some rows at a time: sorted by length as a whole, no row would be finished before nearly all are.
        for first in range(0, len(numbers), ROWS):
            some = numbers[first : first + ROWS]
            places = [
                (number, place)
                for number in some
                for place, answer in enumerate(rows[number]["answers"])
                if answer["end"] != "too long"
            ]
            items = [
                Item(rows[number]["prompt"], rows[number]["answers"][place]["text"], rows[number].get("gold"))
                for number, place in places
            ]
            found = {number: [Score(None)] * len(rows[number]["answers"]) for number in some}
            left = Counter(number for number, _ in places)
            for number in some:
                if not left[number]:
                    emit(number, [_values(score) for score in found[number]])
            for index, score in scorer(items):
                number, place = places[index]
                found[number][place] = score
                left[number] -= 1
                if not left[number]:
                    emit(number, [_values(score) for score in found[number]])
                done += 1
                context.progress(done, answers)


def _values(score: Score) -> list[Any]:
    return [score.value, score.correct, score.counts]
