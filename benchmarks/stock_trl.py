"""EVOLVE's objective under trl.DPOTrainer: the stock side of benchmarks/training.py."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from evolve.config import PreferenceWeights

if TYPE_CHECKING:
    from evolve.pairs import EncodedPair

ROWS = (("direct", False), ("rejected", True), ("chosen", True))  # a pair's rows in TRL: context, is its loss squared


def rows(pairs: Sequence[EncodedPair]) -> list[dict[str, Any]]:
    """Pairs as TRL's tokenised preference rows, three each, sorted by length."""
    found = []
    for pair in pairs:
        for context, squared in ROWS:
            chosen, rejected = (pair.sequences[f"{context}_{answer}"] for answer in ("chosen", "rejected"))
            found.append(
                {
                    "prompt_ids": chosen.ids[: chosen.answer],
                    "chosen_ids": chosen.ids[chosen.answer :],
                    "rejected_ids": rejected.ids[rejected.answer :],
                    "squared": squared,
                }
            )
    return sorted(found, key=lambda row: len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])))


def trainer(
    model: Any,
    tokenizer: Any,
    steps: Sequence[Sequence[EncodedPair]],
    loss: PreferenceWeights,
    on_step: Callable[[], None],
    peft_config: Any = None,
    **settings: Any,
) -> Any:
    """trl.DPOTrainer over the pairs of each step, in order; `losses` holds a number for each step that was trained.

    Overridden is what the objective needs: rows that are tokens already, and a row's loss as a formula of its
    log-probabilities. TRL's own loss is still made, for its metrics, and dropped: a few operations on [rows].
    """
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from evolve.losses import dpo, refine

    if loss.beta_direct is None or loss.beta_refine is None or loss.refine_scale is None or loss.nll:
        raise ValueError("the stock side has the direct and both refinement terms, and no other")
    beta_direct, beta_refine, scale = loss.beta_direct, loss.beta_refine, loss.refine_scale

    class Rows(DPOTrainer):
        losses: list[float]
        precompute_seconds = 0.0

        def _prepare_dataset(self, dataset: Any, *arguments: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *arguments: Any) -> Any:
            began = time.perf_counter()
            dataset = super()._precompute_ref_logps(*arguments)
            self.precompute_seconds = time.perf_counter() - began
            return dataset

        def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
            return super().compute_ref_log_probs(model, {k: v for k, v in inputs.items() if k != "squared"})

        def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
            squared = inputs.pop("squared")
            outputs = None

            def forward(**arguments: Any) -> Any:
                nonlocal outputs
                outputs = model(**arguments)
                return outputs

            super()._compute_loss(forward, inputs, False)
            assert outputs is not None
            chosen, rejected = outputs.log_probs.sum(1).chunk(2)
            h_w, h_l = chosen - inputs["ref_chosen_logps"], rejected - inputs["ref_rejected_logps"]
            direct = (1 - loss.alpha) * dpo(h_w, h_l, beta_direct)
            refined = loss.alpha * refine(h_w, h_l, beta_refine, scale)
            return len(ROWS) * torch.where(squared, refined, direct).mean()

    class Steps(TrainerCallback):
        def on_step_end(self, *arguments: Any, **keywords: Any) -> None:
            on_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **keywords: Any) -> None:
            if "loss" in logs:
                made.losses.append(logs["loss"])

    collate = DataCollatorForPreference(pad_token_id=tokenizer.pad_token_id)

    def collate_rows(examples: list[dict[str, Any]]) -> dict[str, Any]:
        return {**collate(examples), "squared": torch.tensor([row["squared"] for row in examples])}

    batch = len(ROWS) * len(steps[0])
    per_batch = settings.pop("rows")
    if batch % per_batch:
        raise ValueError(f"rows={per_batch}: doesn't divide a step's {batch} rows")
    with tempfile.TemporaryDirectory() as scratch:
        made: Any = Rows(
            model=model,
            processing_class=tokenizer,
            args=DPOConfig(
                **{
                    "output_dir": scratch,
                    "per_device_train_batch_size": per_batch,
                    "gradient_accumulation_steps": batch // per_batch,
                    "train_sampling_strategy": "sequential",
                    "num_train_epochs": 1,
                    "precompute_ref_log_probs": True,
                    "beta": beta_direct,
                    "max_length": None,
                    "lr_scheduler_type": "constant",
                    "seed": 0,
                    "logging_steps": 1,
                    "save_strategy": "no",
                    "report_to": [],
                    "disable_tqdm": True,
                    "remove_unused_columns": False,
                    "dataloader_pin_memory": False,
                    **settings,
                }
            ),
            train_dataset=Dataset.from_list([row for step in steps for row in rows(step)]),
            data_collator=collate_rows,
            callbacks=[Steps()],
            peft_config=peft_config,
        )
    made.losses = []
    made.remove_callback(PrinterCallback)
    return made
