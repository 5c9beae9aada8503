"""Preference training: (1 - alpha) L_direct + alpha L_refine on pairs, against stored reference log-probabilities."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve.config import PreferenceWeights
from evolve.stages import Context, Fitting, read_rows, write_rows
from evolve.store import Report

if TYPE_CHECKING:
    from evolve.trainer import Objective

VERSION = 2


class Config(Fitting):
    COUNTED = "pairs"
    FOLLOWS = "pairs"

    loss: PreferenceWeights
    starts_at_reference: bool  # then the first step's losses are known exactly, and checked


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from safetensors.numpy import load_file

    from evolve.trainer import preference_objective

    # Inputs: pairs_1, reference_direct_1, reference_refine_1, ...: several where earlier iterations' pairs are kept.
    rows: list[dict[str, Any]] = []
    reference: dict[str, dict[str, float]] = {}
    for name in sorted(name for name in inputs if name.startswith("pairs_")):
        number = name.removeprefix("pairs_")
        here = read_rows(inputs[name] / "rows.jsonl")
        for row in here:
            row["id"] = f"{number}/{row['id']}"
        rows += here
        for kind in ("direct", "refine"):
            if folder := inputs.get(f"reference_{kind}_{number}"):
                ids = [row["id"] for row in read_rows(folder / "rows.jsonl")]
                for column, values in load_file(folder / "reference.safetensors").items():
                    for row_id, value in zip(ids, values, strict=True):
                        reference.setdefault(f"{number}/{row_id}", {})[column] = float(value)
    objective = preference_objective(config.loss, config.starts_at_reference)
    return fit(config, objective, rows, reference or None, inputs["model"], out, context)


def fit(
    config: Fitting,
    objective: Objective,
    rows: Sequence[Mapping[str, Any]],
    reference: Mapping[str, Mapping[str, float]] | None,
    model_path: Path,
    out: Path,
    context: Context,
) -> Report:
    """Loads the model, encodes the pairs, minimises the objective, saves the model. Shared with activation.

    Where there are several processes, each runs this, and the first writes.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from evolve import pairs, templates, trainer

    started = time.monotonic()

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            model_path, dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
        )

    tokenizer = templates.load_tokenizer(model_path, config.model.chat_template, config.model.trust_remote_code)
    encoded, dropped = pairs.encode(tokenizer, config.template, rows, config.max_length, config.max_dropped)
    examples: list[dict[str, Any]] = [{"pair": pair} for pair in encoded]
    if reference is not None:
        for example in examples:
            example["reference"] = reference.get(example["pair"].id, {})
    model = load()
    loaded = time.monotonic()
    trained = trainer.train(
        model,
        objective,
        examples,
        config.optimiser,
        epochs=config.epochs,
        learning_rate=config.learning_rate,
        seed=config.seed,
        pad_id=tokenizer.pad_token_id,
        bf16=config.model.dtype == "bfloat16",
        device=context.device,
        folder=context.partial,
        on_step=context.progress,
    )
    done = time.monotonic()
    whole = trainer.whole(trained, load)
    if whole is not None:
        trainer.save(whole, tokenizer, out, config.checkpoint_dtype)
        write_rows(out / "steps.jsonl", trained.steps)
    timing = {"load_seconds": loaded - started, **trained.timing, "save_seconds": time.monotonic() - done}
    steps = trained.steps
    tokens = config.epochs * sum(len(pair.sequences[name].ids) for pair in encoded for name in objective.names)
    values = {"pairs": len(encoded), "steps": len(steps), "first": steps[0], "last": steps[-1]}
    return Report(dropped=dropped, tokens={"trained": tokens}, values=values, timing=timing)
