"""How likely a model finds each choice of a question (lm-eval's own HFLM): what multiple-choice tasks are scored by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from evolve import parts
from evolve.config import RUNTIME
from evolve.stages import Context, ModelSettings, read_rows, write_rows
from evolve.store import Report, StageConfig

VERSION = 1
ROWS = 256  # that are asked together


class Config(StageConfig):
    SHARED = True
    COUNTED = "questions"
    FOLLOWS = "questions"

    model: ModelSettings
    batch_size: Annotated[int, RUNTIME] = 16


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    """likelihoods.jsonl: {"id", "likelihoods": [[log-likelihood, whether it is what the model would say], ...]}.

    null for a question that doesn't fit the model: lm-eval would cut its beginning off.
    """
    rows = read_rows(inputs["questions"] / "rows.jsonl")
    made = parts.run(ask, (config, inputs, rows), len(rows), context)
    write_rows(
        out / "likelihoods.jsonl",
        ({"id": row["id"], "likelihoods": found} for row, (found, _) in zip(rows, made, strict=True)),
    )
    return Report(
        dropped={"questions too long for the model": sum(found is None for found, _ in made)},
        tokens={"read": sum(tokens for _, tokens in made)},
        values={"questions": len(rows), "likelihoods": sum(len(found or ()) for found, _ in made)},
    )


def ask(
    argument: tuple[Config, Mapping[str, Path], Sequence[Mapping[str, Any]]],
    numbers: Sequence[int],
    emit: parts.Emit,
    context: Context,
) -> None:
    """Emits [likelihoods, tokens read] of the questions of these numbers."""
    import torch
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM

    from evolve import templates

    config, inputs, rows = argument
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        inputs["model"],
        dtype=getattr(torch, config.model.dtype),
        trust_remote_code=config.model.trust_remote_code,
    )
    tokenizer = templates.load_tokenizer(inputs["model"], config.model.chat_template, config.model.trust_remote_code)
    model = HFLM(pretrained=loaded.to(context.device).eval(), tokenizer=tokenizer, batch_size=config.batch_size)

    def texts(row: Mapping[str, Any], request: Sequence[str]) -> tuple[str, ...]:
        first, *rest = request
        if row["chat"] and first and rest:
            asked = json.loads(first)
            first = model.apply_chat_template(asked["messages"], add_generation_prompt=asked["open"])
        return first, *rest

    done = 0
    for start in range(0, len(numbers), ROWS):
        some = numbers[start : start + ROWS]
        asked: list[tuple[int, Instance]] = []
        lengths = {}
        for number in some:
            requests = [texts(rows[number], request) for request in rows[number]["requests"]]
            each = [len(model.tok_encode("".join(request))) for request in requests]
            lengths[number] = sum(each)
            kind = "loglikelihood" if len(requests[0]) == 2 else "loglikelihood_rolling"
            if kind == "loglikelihood_rolling" or max(each) <= model.max_length:  # a rolling one has a window
                asked += [(number, Instance(kind, {}, request, place)) for place, request in enumerate(requests)]
        found: dict[int, list[list[Any]]] = {}
        for kind in ("loglikelihood", "loglikelihood_rolling"):
            of_kind = [(number, one) for number, one in asked if one.request_type == kind]
            values = getattr(model, kind)([one for _, one in of_kind], disable_tqdm=True) if of_kind else []
            for (number, _), value in zip(of_kind, values, strict=True):
                pair = (value, False) if kind == "loglikelihood_rolling" else value
                found.setdefault(number, []).append([float(pair[0]), bool(pair[1])])
        for number in some:
            emit(number, [found.get(number), lengths[number]])
        done += len(some)
        context.progress(done, len(numbers))
