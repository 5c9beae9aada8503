"""A small reward model, trained on preference pairs by TRL's RewardTrainer: for when no big one fits."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from evolve.config import RUNTIME
from evolve.data import has_pair
from evolve.scorers import Item, RewardModel
from evolve.stages import Context, ModelSettings, read_rows
from evolve.store import Report, StageConfig

VERSION = 3


class Config(StageConfig):
    COUNTED = "pairs"
    FOLLOWS = "pairs"

    model: ModelSettings
    checkpoint_dtype: str
    epochs: int
    batch_size: int
    micro_batch: Annotated[int, RUNTIME]
    learning_rate: float
    max_length: int
    max_dropped: float
    seed: int


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, TrainerCallback, set_seed
    from trl import RewardConfig, RewardTrainer

    from evolve import templates
    from evolve.trainer import one_device

    def load() -> Any:
        return templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)

    tokenizer = load()
    rows = read_rows(inputs["pairs"] / "rows.jsonl")
    encoded = []
    for row in rows:
        pair = {
            f"{name}_ids": templates.conversation(tokenizer, row["prompt"], row[name])
            for name in ("chosen", "rejected")
        }
        if max(map(len, pair.values())) <= config.max_length:
            encoded.append(pair)
    if not encoded or len(rows) - len(encoded) > config.max_dropped * len(rows):
        raise ValueError(
            f"{len(rows) - len(encoded)} of {len(rows)} pairs are longer than data.max_length={config.max_length}"
        )
    set_seed(config.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        inputs["model"], num_labels=1, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )
    # TRL pads with the pad token and tells the model to read at the last other one: it has to be none that ends a pair.
    pad = templates.padding(
        (ids for pair in encoded for ids in pair.values()), tokenizer.pad_token_id, *tokenizer.all_special_ids
    )
    padding = load()
    padding.pad_token_id = pad
    micro = min(config.micro_batch, config.batch_size)

    class Trainer(RewardTrainer):
        """TRL's loss is a mean over a micro-batch, of which a step's last may be short; here every pair of a step
        weighs the same."""

        def _get_num_items_in_batch(self, batch_samples, device):
            return torch.tensor(sum(len(batch["input_ids"]) for batch in batch_samples))

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            share = len(inputs["input_ids"]) / num_items_in_batch
            return share * super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    class Steps(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            context.progress(state.global_step, state.max_steps)

    with tempfile.TemporaryDirectory() as scratch:
        arguments = RewardConfig(
            output_dir=scratch,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=config.batch_size // micro,
            num_train_epochs=config.epochs,
            learning_rate=config.learning_rate,
            warmup_steps=0.1,
            max_length=None,
            bf16=config.model.dtype == "bfloat16",
            gradient_checkpointing=False,
            use_cpu=context.device == "cpu",
            seed=config.seed,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        one_device(arguments)
        trainer = Trainer(
            model=model,
            processing_class=padding,
            train_dataset=Dataset.from_list(encoded),
            callbacks=[Steps()],
            args=arguments,
        )
        trainer.model_accepts_loss_kwargs = True  # so that the Trainer divides by no number of micro-batches
        trainer.train()
    model.to(getattr(torch, config.checkpoint_dtype)).save_pretrained(out)
    if pad in tokenizer.all_special_ids:
        tokenizer.pad_token_id = pad  # so that who pads with it is read where the model was trained
    tokenizer.save_pretrained(out)

    # How far it can be believed: the share of held-out pairs that it ranks as the data set does.
    scorer = RewardModel(
        out,
        config.model.model_copy(update={"chat_template": None}),
        max_length=config.max_length,
        batch_size=4 * config.micro_batch,
        device=context.device,
    )
    held_out = [row for row in read_rows(inputs["held_out"] / "rows.jsonl") if has_pair(row)]
    scores = dict(scorer([Item(row["prompt"], row[name]) for name in ("chosen", "rejected") for row in held_out]))
    pairs = [(scores[n].value, scores[n + len(held_out)].value) for n in range(len(held_out))]
    known = [(better, worse) for better, worse in pairs if better is not None and worse is not None]
    accuracy = (
        sum((better > worse) + 0.5 * (better == worse) for better, worse in known) / len(known) if known else None
    )
    return Report(
        dropped={
            "longer than max_length": len(rows) - len(encoded),
            "held-out pairs longer than max_length": len(held_out) - len(known),
        },
        tokens={"trained": config.epochs * sum(len(ids) for pair in encoded for ids in pair.values())},
        values={"pairs": len(encoded), "held_out_pairs": len(known), "held_out_accuracy": accuracy},
    )
