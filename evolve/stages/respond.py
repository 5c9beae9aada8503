"""A model answers prompts with a strategy: K answers each."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from evolve import parts
from evolve.config import Engine, Sampling, Strategy, Template
from evolve.scorers import Item
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.stages.score import Config as ScoreConfig
from evolve.stages.score import load_scorer
from evolve.store import Report, StageConfig

VERSION = 3


class Config(StageConfig):
    SHARED = True
    COUNTED = "answers"
    FOLLOWS = "prompts"

    model: ModelSettings
    engine: Engine
    strategy: Strategy
    template: Template | None  # None: the strategy never refines
    sampling: Sampling
    scorer: ScoreConfig | None  # for a strategy that looks at scores on the way
    max_prompt_tokens: int | None  # None: all are kept, and one that has no room has answers that were not made
    max_new_tokens: int
    max_length: int
    seed: int
    until: tuple[str, ...] = ()  # strings before which an answer ends

    @property
    def gpus(self) -> int:
        scorer = 0 if self.scorer is None else min(1, self.scorer.gpus)  # it shares its process's device
        return max(self.engine.gpus, scorer)


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from evolve import templates

    tokenizer = templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)
    rows = read_rows(inputs["prompts"] / "rows.jsonl")
    kept = [
        row
        for row in rows
        if config.max_prompt_tokens is None
        or len(templates.encode_prompt(tokenizer, templates.direct(row["prompt"]))) <= config.max_prompt_tokens
    ]
    if not kept:
        raise ValueError(f"all {len(rows)} prompts are longer than data.max_prompt_tokens={config.max_prompt_tokens}")
    items = [Item(row["prompt"], "", row.get("gold")) for row in kept]
    made = parts.run(answer, (config, inputs, items), len(kept), context, **config.engine.shards)
    write_rows(
        out / "answers.jsonl",
        (
            {**{key: row[key] for key in ("id", "prompt", "gold") if key in row}, "answers": answers}
            for row, answers in zip(kept, made, strict=True)
        ),
    )
    flat = [answer for answers in made for answer in answers]
    ends = Counter(answer["end"] for answer in flat)
    dropped = {
        "prompts longer than max_prompt_tokens": len(rows) - len(kept),
        "answers not made: no room in the context": ends["too long"],
    }
    values = {
        "prompts": len(kept),
        "answers": len(flat),
        "cut off at max_response_tokens": ends["length"],
        "empty": sum(not answer["text"] for answer in flat),
    }
    tokens = {
        "generated": sum(answer["tokens"] for answer in flat),
        "read": sum(answer["read"] for answer in flat),
    }
    return Report(dropped, tokens, values)


def answer(
    argument: tuple[Config, Mapping[str, Path], list[Item]],
    numbers: Sequence[int],
    emit: parts.Emit,
    context: Context,
) -> None:
    """Emits the answers to the prompts of these numbers."""
    from evolve import engines, strategies, templates

    config, inputs, items = argument
    chosen = [items[number] for number in numbers]
    score = None
    opened = contextlib.ExitStack()
    if config.scorer is not None:
        scorer = opened.enter_context(contextlib.closing(load_scorer(config.scorer, inputs, context)))
        gold = {item.prompt: item.gold for item in chosen}

        def score(prompt: str, answer: str) -> float:
            [(_, given)] = scorer([Item(prompt, answer, gold[prompt])])
            return float("-inf") if given.value is None else given.value

    task = engines.Task(
        model=inputs["model"],
        read=config.model,
        sampling=config.sampling,
        max_new_tokens=config.max_new_tokens,
        max_length=config.engine.max_length or config.max_length,
        device=context.device,
        until=config.until,
    )
    asked, done = len(numbers) * config.strategy.answers, 0

    def poll() -> list[engines.Completion]:
        nonlocal done
        completions = engine.poll()
        done += len(completions)
        context.progress(done, asked)
        return completions

    def layout(prompt: str, earlier: Sequence[str]) -> templates.Messages:
        return templates.asking(config.template, prompt, earlier)

    prompts = [item.prompt for item in chosen]
    with opened:
        engine = opened.enter_context(contextlib.closing(engines.load(config.engine, task)))
        window = 4 * config.engine.batch_size
        for place, answers in strategies.run(
            config.strategy, prompts, config.seed, layout, engine.submit, poll, score, window
        ):
            emit(numbers[place], [asdict(answer) for answer in answers])
