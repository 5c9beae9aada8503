"""Policy gradient on an iteration's prompts: the policy draws K answers to each, a scorer's scores are the rewards.

One pass, with as many answers as `respond` draws for the losses on pairs. Of `optimiser`, batches count prompts, each
with its K answers: as many an optimiser step as there are pairs in preference training. Whatever engine others have,
transformers' draws the answers here, from the weights in training, and on one device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from evolve.config import RUNTIME, Optimiser, PolicyGradient, Sampling
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.stages.score import Config as ScoreConfig
from evolve.stages.score import load_scorer
from evolve.store import Report, StageConfig

VERSION = 2


class Config(StageConfig):
    COUNTED = "answers"
    FOLLOWS = "prompts"

    model: ModelSettings
    checkpoint_dtype: str
    loss: PolicyGradient
    answers: int  # K
    sampling: Sampling
    scorer: ScoreConfig
    unfinished: Literal["drop", "keep"]  # what becomes of answers cut off at the token limit
    optimiser: Optimiser
    learning_rate: float
    max_prompt_tokens: int
    max_new_tokens: int
    max_length: int
    seed: int
    generation_batch: Annotated[int, RUNTIME]


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    """Inputs: model, prompts; reward_model where one scores; reference where a KL term has one that is not `model`."""
    import torch
    from transformers import AutoModelForCausalLM

    from evolve import engines, reinforce, templates, trainer
    from evolve.engines.hf import HFEngine

    started = time.monotonic()
    tokenizer = templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)
    rows = read_rows(inputs["prompts"] / "rows.jsonl")
    encoded = {row["prompt"]: templates.encode_prompt(tokenizer, templates.direct(row["prompt"])) for row in rows}
    short = [row["prompt"] for row in rows if len(encoded[row["prompt"]]) <= config.max_prompt_tokens]
    prompts = [prompt for prompt in short if len(encoded[prompt]) + config.max_new_tokens <= config.max_length]
    if not prompts:
        raise ValueError(
            f"all {len(rows)} prompts are longer than data.max_prompt_tokens={config.max_prompt_tokens} or leave no "
            f"room for {config.max_new_tokens} tokens in data.max_length={config.max_length}"
        )

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            inputs["model"], dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
        )

    model = load().to(context.device)
    habits = model.generation_config
    task = engines.Task(
        model=inputs["model"],
        read=config.model,
        sampling=config.sampling,
        max_new_tokens=config.max_new_tokens,
        max_length=config.max_length,
        device=context.device,
    )
    with contextlib.closing(load_scorer(config.scorer, inputs, context)) as scorer:
        rollouts = reinforce.Rollouts(
            HFEngine(task, config.generation_batch, model),
            scorer,
            encoded,
            {row["prompt"]: row.get("gold") for row in rows},
            answers=config.answers,
            seed=config.seed,
            keep_unfinished=config.unfinished == "keep",
        )
        model.config.name_or_path = str(inputs.get("reference", inputs["model"]))  # where TRL loads the KL term's from
        loaded = time.monotonic()
        trained = reinforce.train(
            model,
            tokenizer,
            prompts,
            rollouts,
            config.loss,
            config.optimiser,
            temperature=config.sampling.temperature,
            max_new_tokens=config.max_new_tokens,
            learning_rate=config.learning_rate,
            seed=config.seed,
            bf16=config.model.dtype == "bfloat16",
            trust_remote_code=config.model.trust_remote_code,
            device=context.device,
            on_step=context.progress,
        )
    counts = rollouts.counts
    if not counts[reinforce.DIFFER]:
        raise ValueError(
            f"none of {counts['prompts']} prompts has answers of different scores, so there was nothing to learn from: "
            f"of {counts['answers']} answers {counts['left out as cut off']} were cut off, "
            f"{counts['left out without a score']} had no score"
        )
    done = time.monotonic()
    model.generation_config = habits
    trainer.save(trainer.whole(trained, load), tokenizer, out, config.checkpoint_dtype)
    write_rows(out / "steps.jsonl", trained.steps)
    timing = {"load_seconds": loaded - started, **trained.timing, "save_seconds": time.monotonic() - done}
    dropped = {
        "prompts longer than max_prompt_tokens": len(rows) - len(short),
        "prompts without room for an answer": len(short) - len(prompts),
        "answers cut off at max_response_tokens": counts["left out as cut off"],
        "answers without a score": counts["left out without a score"],
    }
    shown = ("prompts", reinforce.DIFFER, "answers", "empty", "cut off at max_response_tokens")
    values: dict[str, Any] = {name: counts[name] for name in shown}
    values |= {"steps": len(trained.steps), "first": trained.steps[0], "last": trained.steps[-1]}
    tokens = {"generated": counts["tokens generated"], "trained": config.loss.updates * counts["tokens used"]}
    return Report(dropped, tokens, values, timing)
