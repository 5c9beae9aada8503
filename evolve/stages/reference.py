"""Log-probabilities of pairs under the reference model, once for every member of a sweep that can use them.

Direct and refinement contexts are stages of their own: members that need the first alone share it with those that need
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from evolve.config import RUNTIME, Template
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report, StageConfig

VERSION = 2


class Config(StageConfig):
    COUNTED = "pairs"
    FOLLOWS = "pairs"

    model: ModelSettings
    contexts: Literal["direct", "refine"]
    template: Template
    max_length: int
    max_dropped: float
    micro_batch: Annotated[int, RUNTIME]
    layout: Annotated[Literal["shared", "packed", "padded"], RUNTIME]


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    import torch
    from safetensors.numpy import save_file
    from transformers import AutoModelForCausalLM

    from evolve import losses, pairs, templates

    names = losses.DIRECT if config.contexts == "direct" else losses.REFINE
    tokenizer = templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)
    rows = read_rows(inputs["pairs"] / "rows.jsonl")
    encoded, dropped = pairs.encode(tokenizer, config.template, rows, config.max_length, config.max_dropped)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        inputs["model"], dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )
    model = loaded.to(context.device).eval()
    longest = max(encoded, key=lambda pair: sum(len(sequence.ids) for sequence in pair.sequences.values()))
    pairs.check(model, [[longest.sequences[name] for name in names]], config.layout, tokenizer.pad_token_id)
    # The same precision as training's, or the first step would not be at the reference.
    pairs.prepare(model, config.layout, bf16=config.model.dtype == "bfloat16")
    found: list[torch.Tensor] = []
    with torch.inference_mode():
        for first in range(0, len(encoded), config.micro_batch):
            some = [[pair.sequences[name] for name in names] for pair in encoded[first : first + config.micro_batch]]
            batch = pairs.batch(some, config.layout, tokenizer.pad_token_id).to(context.device)
            found.append(pairs.log_probabilities(model, batch).reshape(-1, len(names)).cpu())
            context.progress(first + len(some), len(encoded))
    columns = dict(zip(names, torch.cat(found).T.contiguous(), strict=True))
    save_file({name: column.numpy() for name, column in columns.items()}, out / "reference.safetensors")
    write_rows(out / "rows.jsonl", ({"id": pair.id} for pair in encoded))
    tokens = sum(len(pair.sequences[name].ids) for pair in encoded for name in names)
    return Report(dropped=dropped, tokens={"read": tokens}, values={"pairs": len(encoded)})
