"""How likely a model finds answers, each in the context that it was made in: what drift is measured by.

One stage reads a model's answers with the model itself, another with the base model that all began with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from evolve import parts
from evolve.config import RUNTIME, Template
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report, StageConfig

VERSION = 1


class Config(StageConfig):
    SHARED = True
    COUNTED = "answers"
    FOLLOWS = "answers"

    model: ModelSettings
    template: Template | None  # None: no answer was shown another
    micro_batch: Annotated[int, RUNTIME]


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    """log_probabilities.jsonl: {"id", "answers": [[log pi(answer | context) in nats, its tokens], ...]}.

    The token that ends an answer counts, where it has one. null for an answer that was not made.
    """
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    made = parts.run(read, (config, inputs, rows), len(rows), context)
    write_rows(
        out / "log_probabilities.jsonl",
        ({"id": row["id"], "answers": found} for row, (found, _) in zip(rows, made, strict=True)),
    )
    flat = [one for found, _ in made for one in found]
    return Report(
        dropped={"answers that were not made": sum(one is None for one in flat)},
        tokens={"read": sum(tokens for _, tokens in made)},
        values={"answers": len(flat)},
    )


def read(
    argument: tuple[Config, Mapping[str, Path], Sequence[Mapping[str, Any]]],
    numbers: Sequence[int],
    emit: parts.Emit,
    context: Context,
) -> None:
    """Emits [[log-probability, tokens] of each answer, tokens read] of the prompts of these numbers."""
    import torch
    from transformers import AutoModelForCausalLM

    from evolve import pairs, templates

    config, inputs, rows = argument
    tokenizer = templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        inputs["model"], dtype=torch.float32, trust_remote_code=config.model.trust_remote_code
    )
    model = pairs.prepare(loaded.to(context.device).eval(), "padded", bf16=config.model.dtype == "bfloat16")
    done = 0
    for first in range(0, len(numbers), config.micro_batch):
        some = numbers[first : first + config.micro_batch]
        encoded = {
            (number, place): templates.encode(
                tokenizer,
                templates.asking(
                    config.template,
                    rows[number]["prompt"],
                    [rows[number]["answers"][given]["text"] for given in answer["given"]],
                ),
                answer["text"],
                finished=answer["end"] == "stop",
            )
            for number in some
            for place, answer in enumerate(rows[number]["answers"])
            if answer["end"] != "too long"
        }
        found = []
        if encoded:
            with torch.inference_mode():
                batch = pairs.batch([list(encoded.values())], "padded", tokenizer.pad_token_id).to(context.device)
                found = pairs.log_probabilities(model, batch).tolist()
        values = {key: [value, one.answer_tokens] for (key, one), value in zip(encoded.items(), found, strict=True)}
        for number in some:
            places = range(len(rows[number]["answers"]))
            tokens = sum(len(one.ids) for (owner, _), one in encoded.items() if owner == number)
            emit(number, [[values.get((number, place)) for place in places], tokens])
        done += len(some)
        context.progress(done, len(numbers))
