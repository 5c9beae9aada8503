"""transformers' Trainer over pairs, with the objective as a pure function of log-probabilities (losses.py).

The Trainer brings the optimiser, schedule, accumulation, mixed precision and devices. Ours: what a batch is (pairs,
each several sequences), the objective, normalisation over the whole optimiser step, so that micro-batches don't
change the result, and two checks: the step-1 values, and that the loss stays finite.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from evolve import losses
from evolve.config import Optimiser, PreferenceWeights, SFTWeights
from evolve.pairs import EncodedPair, log_probabilities, pad


class Diverged(RuntimeError):
    """The loss is no longer a finite number."""


@dataclass(frozen=True)
class Objective:
    """What a step minimises: which sequences it needs, how many items a batch counts, and the loss summed over them."""

    names: tuple[str, ...]
    items: Callable[[Mapping[str, Any]], int]
    loss: Callable[[Mapping[str, Tensor], Mapping[str, Any], float], tuple[Tensor, dict[str, Tensor]]]
    expected: Mapping[str, float]  # metrics at the first step, where the policy is its own reference


def sft_objective(loss: SFTWeights) -> Objective:
    """L_SFT, per answer token of the step."""

    def compute(
        logp: Mapping[str, Tensor], batch: Mapping[str, Any], tokens: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        lengths = batch["chosen_tokens"]
        metrics = {
            "nll_direct" if name == "direct_chosen" else "nll_refine": -logp[name].detach() / lengths for name in logp
        }
        return losses.sft(logp, loss, tokens), metrics

    names = tuple(
        name for name, weight in (("direct_chosen", loss.direct), ("rejected_chosen", loss.refine)) if weight > 0
    )
    return Objective(names, lambda batch: int(batch["chosen_tokens"].sum()), compute, {})


def preference_objective(loss: PreferenceWeights, starts_at_reference: bool) -> Objective:
    """(1 - alpha) L_direct + alpha L_refine + nll L_NLL, per pair of the step."""

    def compute(logp: Mapping[str, Tensor], batch: Mapping[str, Any], pairs: float) -> tuple[Tensor, dict[str, Tensor]]:
        tokens = {answer: batch[f"{answer}_tokens"] for answer in ("chosen", "rejected")}
        total, metrics = losses.preference(logp, batch.get("reference", {}), loss, tokens)
        return total.sum() / pairs, metrics

    expected = losses.at_reference(loss) if starts_at_reference else {}
    return Objective(losses.needed(loss), lambda batch: len(batch["ids"]), compute, expected)


class PairTrainer(Trainer):
    """Minimises an `Objective` over pairs."""

    objective: Objective

    def __init__(
        self, objective: Objective, pad_id: int, tolerance: float, on_step: Callable[[int, int], None], **kw: Any
    ):
        self.objective = objective
        self.pad_id = pad_id
        self.tolerance = tolerance
        self.steps: list[dict[str, float]] = []
        self._sums: dict[str, list[Tensor]] = {}
        self._ids: list[str] = []
        super().__init__(data_collator=self._collate, callbacks=[_Steps(self, on_step)], **kw)
        # The objective divides by the whole step's items, so the Trainer must not divide by the micro-batches again.
        self.model_accepts_loss_kwargs = True

    def _collate(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs: list[EncodedPair] = [example["pair"] for example in examples]
        batch: dict[str, Any] = {
            "ids": [pair.id for pair in pairs],
            **{f"{answer}_tokens": _answer_tokens(pairs, f"direct_{answer}") for answer in ("chosen", "rejected")},
            **pad([pair.sequences[name] for name in self.objective.names for pair in pairs], self.pad_id),
        }
        if "reference" in examples[0]:
            batch["reference"] = {
                name: torch.tensor([example["reference"][name] for example in examples])
                for name in examples[0]["reference"]
            }
        return batch

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor:
        return torch.tensor(sum(self.objective.items(batch) for batch in batch_samples), device=device)

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        summed = log_probabilities(model, inputs)
        logp = dict(zip(self.objective.names, summed.chunk(len(self.objective.names)), strict=True))
        loss, metrics = self.objective.loss(logp, inputs, num_items_in_batch)
        self._ids = inputs["ids"]
        if not torch.isfinite(loss):
            raise Diverged(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}, prompts {', '.join(inputs['ids'])}; "
                "a smaller learning rate (model.learning_rate) is the usual remedy"
            )
        if self.state.global_step == 0:
            for name, value in self.objective.expected.items():
                if name in metrics and abs(metrics[name].mean().item() - value) > self.tolerance * max(1.0, value):
                    raise RuntimeError(
                        f"{name} is {metrics[name].mean().item():.6f} at the first step and must be {value:.6f}: the "
                        "reference log-probabilities are not this policy's"
                    )
        for name, values in {**metrics, "loss": loss.detach().reshape(1)}.items():
            self._sums.setdefault(name, []).append(values.float().cpu())
        return loss

    def take_metrics(self) -> dict[str, float]:
        """Means over the pairs of the step that has just ended; `loss` is the step's."""
        metrics = {name: torch.cat(values) for name, values in self._sums.items()}
        self._sums = {}
        return {name: (value.sum() if name == "loss" else value.mean()).item() for name, value in metrics.items()}


def _answer_tokens(pairs: Sequence[EncodedPair], name: str) -> Tensor:
    return torch.tensor([len(pair.sequences[name].ids) - pair.sequences[name].answer for pair in pairs])


class _Steps(TrainerCallback):
    def __init__(self, trainer: PairTrainer, on_step: Callable[[int, int], None]):
        self.trainer = trainer
        self.on_step = on_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.steps.append({"step": state.global_step, **self.trainer.take_metrics()})
        self.on_step(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if logs and self.trainer.steps and "grad_norm" in logs:
            if not isfinite(logs["grad_norm"]):  # no loss will show it if this was the last step
                raise Diverged(
                    f"the gradient is not finite at step {state.global_step}, prompts {', '.join(self.trainer._ids)}; "
                    "a smaller learning rate (model.learning_rate) is the usual remedy"
                )
            self.trainer.steps[-1] |= {name: float(logs[name]) for name in ("grad_norm", "learning_rate")}


def train(
    model: Any,
    objective: Objective,
    examples: Sequence[Mapping[str, Any]],
    settings: Optimiser,
    *,
    epochs: int,
    learning_rate: float,
    seed: int,
    pad_id: int,
    bf16: bool,
    device: str,
    on_step: Callable[[int, int], None],
) -> list[dict[str, float]]:
    """Trains in place; returns a row of metrics for each optimiser step.

    Args:
        examples: dicts with 'pair' (EncodedPair) and, for preference training, 'reference' (name -> log-probability).
        on_step: called with (step, steps) after each optimiser step.

    Raises:
        Diverged: the loss is not finite; names the step and the prompts.
    """
    micro = min(settings.micro_batch, settings.batch_size)
    steps = -(-len(examples) // settings.batch_size) * epochs
    set_seed(seed)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=settings.batch_size // micro,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type=settings.schedule,
            warmup_steps=round(settings.warmup * steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            gradient_checkpointing=settings.gradient_checkpointing,
            bf16=bf16,
            use_cpu=device == "cpu",
            seed=seed,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        one_device(arguments)
        trainer = PairTrainer(
            objective,
            pad_id,
            tolerance=0.05 if bf16 else 1e-3,
            on_step=on_step,
            model=model,
            args=arguments,
            train_dataset=examples,
        )
        trainer.remove_callback(_printer())
        trainer.train()
    return trainer.steps


def one_device(arguments: TrainingArguments) -> None:
    """Keeps the Trainer from splitting batches over all GPUs that it sees (DataParallel): a stage has one device."""
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1


def _printer() -> type:
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def save(model: Any, tokenizer: Any, out: Path, dtype: str) -> None:
    """Weights as safetensors in the hub's layout, with tokenizer and chat template, so that any tool can load them."""
    model.to(getattr(torch, dtype)).save_pretrained(out)
    tokenizer.save_pretrained(out)
