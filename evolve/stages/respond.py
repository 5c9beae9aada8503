"""A model answers prompts with a strategy: K answers each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from evolve.config import Engine, Sampling, Section, Strategy, Template
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.stages.score import Config as ScoreConfig
from evolve.stages.score import load_scorer
from evolve.store import Report

VERSION = 1


class Config(Section):
    model: ModelSettings
    engine: Engine
    strategy: Strategy
    template: Template | None  # None: the strategy never refines
    sampling: Sampling
    scorer: ScoreConfig | None  # for a strategy that looks at scores on the way
    max_prompt_tokens: int
    max_new_tokens: int
    max_length: int
    seed: int


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from evolve import engines, strategies, templates

    tokenizer = templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)
    rows = read_rows(inputs["prompts"] / "rows.jsonl")
    kept = [
        row
        for row in rows
        if len(templates.encode_prompt(tokenizer, templates.direct(row["prompt"]))) <= config.max_prompt_tokens
    ]
    if not kept:
        raise ValueError(f"all {len(rows)} prompts are longer than data.max_prompt_tokens={config.max_prompt_tokens}")
    score = None
    if config.scorer is not None:
        scorer = load_scorer(config.scorer, inputs.get("reward_model"), context)

        def score(prompt: str, answer: str) -> float:
            value = scorer([(prompt, answer)], lambda done, total: None)[0].value
            return float("-inf") if value is None else value

    task = engines.Task(
        model=inputs["model"],
        read=config.model,
        template=config.template,
        sampling=config.sampling,
        max_new_tokens=config.max_new_tokens,
        max_length=config.max_length,
        device=context.device,
    )
    engine = engines.load(config.engine, task)
    asked = len(kept) * config.strategy.answers
    made = 0

    def poll() -> list[strategies.Completion]:
        nonlocal made
        completions = engine.poll()
        made += len(completions)
        context.progress(made, asked)
        return completions

    prompts = [row["prompt"] for row in kept]
    answers = dict(strategies.run(config.strategy, prompts, config.seed, engine.submit, poll, score))
    engine.close()
    write_rows(
        out / "answers.jsonl",
        (
            {"id": row["id"], "prompt": row["prompt"], "answers": [asdict(answer) for answer in answers[index]]}
            for index, row in enumerate(kept)
        ),
    )
    flat = [answer for index in range(len(kept)) for answer in answers[index]]
    ends = Counter(answer.end for answer in flat)
    dropped = {
        "prompts longer than max_prompt_tokens": len(rows) - len(kept),
        "answers not made: no room in the context": ends["too long"],
    }
    values = {
        "prompts": len(kept),
        "answers": len(flat),
        "cut off at max_response_tokens": ends["length"],
        "empty": sum(not answer.text for answer in flat),
    }
    return Report(dropped, {"generated": sum(answer.tokens for answer in flat)}, values)
