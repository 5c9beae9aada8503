"""TRL's GRPOTrainer over prompts: policy gradient on scores of the policy's own answers (GRPO, DAPO, GSPO).

TRL brings advantages, clipping, the KL term, the optimiser. Ours: answers are drawn by the engine that `respond` uses,
with the same seeds, so a prompt is the same tokens and has the same first answer whatever the loss; the filter's
scorer gives the rewards; an answer that can't be used is left out of everything and counted.
"""

from __future__ import annotations

import logging
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from evolve import strategies
from evolve.config import Optimiser, PolicyGradient
from evolve.engines import Completion, Request
from evolve.engines.hf import HFEngine
from evolve.scorers import Item, Scorer
from evolve.templates import direct
from evolve.trainer import Diverged, Trained, one_device, with_adapters

REMEDY = "a smaller learning rate (model.learning_rate) is the usual remedy"
DIFFER = "prompts whose answers' scores differ"  # the others have no advantages, so nothing is learnt from them
KEPT = (
    *("loss", "grad_norm", "learning_rate", "reward", "reward_std", "kl", "entropy"),
    *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
)


class Rollouts:
    """Draws and scores a step's answers. TRL calls it with the step's prompts, each `answers` times in a row.

    `encoded` has each prompt's token ids, `gold` its reference answer where there is one. An answer without a score, or
    cut off at the token limit (unless `keep_unfinished`), is left out: its tokens have weight 0, and its group's mean
    and deviation are without it.
    Prompts that are None only fill the last step up. `counts` adds up over all steps; `metrics` are the latest step's.
    """

    def __init__(
        self,
        engine: HFEngine,
        scorer: Scorer,
        encoded: Mapping[str, Sequence[int]],
        gold: Mapping[str, str | None],
        *,
        answers: int,
        seed: int,
        keep_unfinished: bool,
    ):
        self.engine, self.scorer, self.encoded, self.gold = engine, scorer, encoded, gold
        self.answers, self.seed, self.keep_unfinished = answers, seed, keep_unfinished
        self.counts: Counter[str] = Counter()
        self.metrics: dict[str, float] = {}
        self.seconds = 0.0  # of drawing and scoring
        self.scale = 1.0  # what makes a mean over all rows of the step one over the answers that are used

    def __call__(self, prompts: Sequence[str | None], trainer: Any) -> dict[str, Any]:
        started = time.monotonic()
        asked = {row: prompt for row, prompt in enumerate(prompts) if prompt is not None}
        drawn = self._draw(asked)
        usable = [row for row in asked if drawn[row].end == "stop" or self.keep_unfinished]
        found = self.scorer([Item(asked[row], drawn[row].text, self.gold[asked[row]]) for row in usable])
        # In the rows' order, as sums over them round by it.
        scores = {usable[index]: score.value for index, score in sorted(found) if score.value is not None}
        self.scale = len(prompts) / len(scores) if scores else 1.0
        groups: dict[int, set[float]] = {row // self.answers: set() for row in asked}
        for row, score in scores.items():
            groups[row // self.answers].add(score)
        here = Counter(
            {
                "prompts": len(groups),
                DIFFER: sum(len(found) > 1 for found in groups.values()),
                "answers": len(asked),
                "empty": sum(not answer.text for answer in drawn.values()),
                "cut off at max_response_tokens": sum(answer.end == "length" for answer in drawn.values()),
                "left out as cut off": len(asked) - len(usable),
                "left out without a score": len(usable) - len(scores),
                "tokens generated": sum(answer.tokens for answer in drawn.values()),
                "tokens used": sum(len(self.encoded[asked[row]]) + drawn[row].tokens for row in scores),
            }
        )
        self.counts += here
        self.metrics = {
            "answer_tokens": here["tokens generated"] / len(asked),
            "cut_off": here["cut off at max_response_tokens"] / len(asked),
            "prompts_differ": here[DIFFER] / len(groups),
        }
        filler = [self.engine.tokenizer.eos_token_id]
        rows = range(len(prompts))
        self.seconds += time.monotonic() - started
        return {
            "prompt_ids": [list(self.encoded[asked[row]]) if row in asked else filler for row in rows],
            "completion_ids": [list(drawn[row].ids) if row in asked else filler for row in rows],
            "logprobs": None,  # TRL takes the policy's own, as for answers that it generates itself
            "env_mask": [[int(row in scores)] * (len(drawn[row].ids) if row in asked else 1) for row in rows],
            "score": [scores.get(row) for row in rows],
        }

    def _draw(self, asked: Mapping[int, str]) -> dict[int, Completion]:
        seeds = {row: strategies.seed(self.seed, prompt, row % self.answers) for row, prompt in asked.items()}
        self.engine.submit([Request((row, 0), direct(prompt), seeds[row]) for row, prompt in asked.items()])
        self.engine.model.eval()
        drawn: dict[int, Completion] = {}
        while made := self.engine.poll():
            drawn |= {completion.key[0]: completion for completion in made}
        self.engine.model.train()
        return drawn


class _Trainer(GRPOTrainer):
    """Means over the answers that are used, and a loss that has to be a number."""

    rollout_func: Rollouts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        if not (
            inputs["completion_mask"] * inputs["tool_mask"]
        ).any():  # a micro-batch with no answer that is used; TRL would log zeros of it
            return 0.0 * sum(weight.sum() for weight in model.parameters() if weight.requires_grad)
        loss: Tensor = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise Diverged(f"the loss is {loss.item()} at step {self.state.global_step + 1}; {REMEDY}")
        return loss if self.loss_type == "dapo" else loss * self.rollout_func.scale  # dapo's is per used token already


class _Steps(TrainerCallback):
    """A row of metrics for each optimiser step: TRL's but for clocks and what counts fillers, and the rollouts'."""

    def __init__(self, rollouts: Rollouts, on_step: Callable[[int, int], None]):
        self.rollouts, self.on_step = rollouts, on_step
        self.steps: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not all(torch.isfinite(weight).all() for weight in model.parameters()):  # before answers are drawn from them
            raise Diverged(f"the weights are not numbers after step {state.global_step}; {REMEDY}")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return  # the summary at the end
        kept = {name: logs[name] for name in KEPT if logs.get(name) is not None}
        drawn = self.rollouts.metrics if "reward" in logs else {}  # a second pass over the same answers draws none
        self.steps.append({"step": state.global_step, **kept, **drawn})
        self.on_step(state.global_step, state.max_steps)


def _reward(score: list[float | None], **_: Any) -> list[float | None]:
    return score


def train(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    rollouts: Rollouts,
    loss: PolicyGradient,
    settings: Optimiser,
    *,
    temperature: float,
    max_new_tokens: int,
    learning_rate: float,
    seed: int,
    bf16: bool,
    trust_remote_code: bool,
    device: str,
    on_step: Callable[[int, int], None],
) -> Trained:
    """One pass over the prompts on one device, trained in place.

    Args:
        prompts: in the order they are trained on; a step takes `settings.batch_size` of them, the last one the rest.
        rollouts: draws from `model` and scores.
        on_step: called with (step, steps) after each optimiser step.

    Raises:
        Diverged: the loss or its gradient is not finite; names the step.
    """
    micro = min(settings.micro_batch, settings.batch_size, len(prompts))
    batch = min(settings.batch_size, -(-len(prompts) // micro) * micro)
    filled = [*prompts, *[None] * (-len(prompts) % batch)]  # TRL would leave out what doesn't fill a step
    steps = len(filled) // batch * loss.updates
    # It tells of every batch with an answer that has no reward; those are counted here.
    logging.getLogger("trl.trainer.grpo_trainer").setLevel(logging.ERROR)
    callback = _Steps(rollouts, on_step)
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
        arguments = GRPOConfig(
            output_dir=scratch,
            # what is minimised
            loss_type=loss.loss_type,
            importance_sampling_level=loss.importance,
            epsilon=loss.clip_low,
            epsilon_high=loss.clip_high,
            beta=loss.kl,
            use_bias_correction_kl=False,  # the papers' KL term is not weighted by the probability ratio
            num_iterations=loss.updates,
            scale_rewards=loss.scale_rewards,
            # what a step is: rows are answers
            num_generations=rollouts.answers,
            per_device_train_batch_size=micro * rollouts.answers,
            gradient_accumulation_steps=batch // micro,
            num_train_epochs=1,
            shuffle_dataset=False,  # the slice was drawn at random; what fills the last step has to stay there
            temperature=temperature,
            max_completion_length=max_new_tokens,
            # how
            learning_rate=learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=round(settings.warmup * steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            disable_dropout=True,  # a ratio of probabilities is to be one of weights alone
            bf16=bf16,
            use_cpu=device == "cpu",
            seed=seed,
            trust_remote_code=trust_remote_code,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        one_device(arguments)
        trainer = _Trainer(
            model=model if settings.lora is None else with_adapters(model, settings.lora),
            reward_funcs=_reward,
            args=arguments,
            train_dataset=Dataset.from_dict({"prompt": filled}),
            processing_class=tokenizer,
            callbacks=[callback],
            rollout_func=rollouts,
        )
        trainer.remove_callback(PrinterCallback)
        use_cache = model.config.use_cache
        started = time.monotonic()
        trainer.train()
        model.config.use_cache = use_cache  # which the Trainer turns off, for whoever loads what is saved too
    timing = {"train_seconds": time.monotonic() - started, "rollout_seconds": rollouts.seconds}
    return Trained(callback.steps, timing, trainer, settings)
