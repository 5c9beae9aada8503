"""Whether a model and its context can be held, from its config and its files' headers alone: before weights load."""

from __future__ import annotations

import json
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from evolve.config import HF, VLLM
from evolve.engines import Task

BYTES = {"float32": 4.0, "bfloat16": 2.0}
QUANTISED = {"fp8": 1.0, "int8": 1.0, "bitsandbytes": 0.5}  # bytes a weight, of what is quantised while it loads
GIB = 2**30


@cache
def _config(model: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code).get_text_config()


def parameters(model: Path) -> int:
    """How many weights a folder's safetensors hold, read from their headers."""
    count = 0
    index = model / "model.safetensors.index.json"
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    for file in model.glob("*.safetensors"):
        if named is not None and file.name not in named:
            continue  # the same weights again, in another layout
        with file.open("rb") as opened:
            header = json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
        count += sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return count


def weights(settings: HF | VLLM, task: Task) -> int:
    """Bytes of the weights, on all devices together."""
    quantised = settings.quantization if settings.name == "vllm" else None
    each = QUANTISED.get(quantised or "", BYTES[task.read.dtype])
    return int(parameters(task.folder) * each)


def head_size(task: Task) -> int:
    config = _config(task.folder, task.read.trust_remote_code)
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def per_token(task: Task) -> int:
    """Bytes of a token's keys and values: 2 x layers x key-value heads x head size x bytes a number."""
    config = _config(task.folder, task.read.trust_remote_code)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size(task) * BYTES[task.read.dtype])


def per_sequence(task: Task) -> int:
    return per_token(task) * task.max_length


def available(settings: HF | VLLM, device: str) -> int:
    """Bytes that an engine may take of the CPU's memory or of a GPU's: its share of what is free.

    vllm takes a share of all that a GPU has. Raises ValueError if so much is not free.
    """
    if device == "cpu":
        import psutil

        return int(settings.memory_share * psutil.virtual_memory().available)
    import torch

    free, total = torch.cuda.mem_get_info()
    if settings.name == "hf":
        return int(settings.memory_share * free)
    wanted = int(settings.memory_share * total)
    if wanted > free:
        raise ValueError(
            f"memory_share={settings.memory_share:g}: vLLM would take {wanted / GIB:.2f} GiB of the GPU's "
            f"{total / GIB:.2f}, and {free / GIB:.2f} are free; at most {free / total:.2f} is possible"
        )
    return wanted


def check(settings: HF | VLLM, task: Task, section: str = "engine") -> None:
    """Raises ValueError, with the sum, if the weights and the context don't fit, or the model reads no such context.

    hf holds the keys and values of a whole batch; vllm needs room for one sequence and takes what is left. `section` is
    the one of the configuration that an error names.
    """
    config = _config(task.folder, task.read.trust_remote_code)
    positions = getattr(config, "max_position_embeddings", None)
    if positions and task.max_length > positions:
        raise ValueError(
            f"max_length={task.max_length} (of {section} or data): the model in {task.folder} reads {positions} "
            "tokens; set one no larger"
        )
    batch = settings.batch_size if settings.name == "hf" else 1
    devices, quantised = (settings.tensor_parallel, settings.quantization) if settings.name == "vllm" else (1, None)
    need = weights(settings, task), batch * per_sequence(task)
    free = available(settings, task.device) * (1 if task.device == "cpu" else devices)
    if sum(need) <= free:
        return
    where = "the memory" if task.device == "cpu" else f"the memory of {devices} GPU{'s' * (devices > 1)}"
    fitting = int((free - need[0]) // per_sequence(task))
    if settings.name == "hf" and fitting >= 1:
        remedy = f"{section}.batch_size={fitting} would fit"
    elif settings.name == "vllm":
        remedy = f"raise {section}.tensor_parallel, or set {section}.quantization or a smaller max_length"
    else:
        remedy = "take a smaller model or a smaller max_length, or engine=vllm with tensor_parallel"
    raise ValueError(
        f"the model doesn't fit: weights {need[0] / GIB:.2f} GiB ({parameters(task.folder):,} in {task.read.dtype}"
        f"{', ' + quantised if quantised else ''}) + keys and values {need[1] / GIB:.2f} GiB "
        f"({batch} x {task.max_length} tokens x {per_token(task):,} bytes) = {sum(need) / GIB:.2f} GiB, and "
        f"{section}.memory_share={settings.memory_share:g} of {where} is {free / GIB:.2f} GiB; {remedy}"
    )
