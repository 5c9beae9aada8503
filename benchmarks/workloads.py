"""What benchmarks/training.py trains: models, and pairs that are real or have real pairs' lengths."""

from __future__ import annotations

import platform
import random
from contextlib import suppress
from dataclasses import dataclass
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve.config import CONF, Template

if TYPE_CHECKING:
    from evolve.pairs import EncodedPair

# Lengths of UltraFeedback's 1,000 binarised pairs in SmolLM2's tokens: mean and deviation of the logarithm. A chosen
# and a rejected answer's logarithms correlate with 0.51.
PROMPT, CHOSEN, REJECTED, CORRELATION = (4.33, 1.38), (4.96, 1.52), (4.94, 1.36), 0.51
HEAD, TURN, INSTRUCTION, EXAMPLE, ASK = 26, 5, 90, 5, 5  # tokens of a chat's and the refinement prompt's parts


@dataclass(frozen=True)
class Workload:
    """What is trained on what. Each of a step's `batch` pairs is six sequences of at most `max_length` tokens."""

    name: str
    model: str  # a folder, or a key of SHAPES
    data: str  # a file, 'embedded', or 'synthetic'
    batch: int
    steps: int  # counted; there is one more before
    max_length: int
    learning_rate: float
    dtype: str  # of autocast; weights are float32 wherever they are trained
    micro_batch: int = 1  # ours: pairs at once
    rows: int = 1  # stock's: rows at once; a pair is three, each two sequences
    attention: str = "sdpa"  # stock's implementation
    lora: bool = False
    gradient_checkpointing: bool = False
    device: str = "cpu"
    threads: int = 0  # of torch; 0: its own choice


SHAPES: dict[str, dict[str, Any]] = {  # Llama 3.2 1B's and Llama 3.1 8B's
    "llama_1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama_8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
}
WORKLOADS = (
    Workload("smollm2", "weights/smollm2_135m", "synthetic", 2, 1, 1024, 5e-6, "bfloat16"),
    Workload(
        "embedded",
        "evolve/embedded",
        "embedded",
        64,
        20,
        128,
        2e-4,
        "float32",
        micro_batch=64,
        rows=192,
        attention="eager",
    ),
)
GPU_WORKLOADS = tuple(
    Workload(
        f"{shape}_{'lora' if lora else 'full'}",
        shape,
        "synthetic",
        8,
        4,
        2048,
        5e-6,
        "bfloat16",
        rows=4,
        lora=lora,
        gradient_checkpointing=shape == "llama_8b" and not lora,
        device="cuda",
    )
    for shape in SHAPES
    for lora in (False, True)
)


def synthetic_pairs(count: int, max_length: int, vocabulary: int, seed: int = 0) -> list[EncodedPair]:
    """Pairs of random tokens, with UltraFeedback's lengths and the prefixes that templates make sequences share."""
    from evolve.losses import DIRECT, REFINE
    from evolve.pairs import EncodedPair
    from evolve.templates import Encoded

    draw = random.Random(seed)

    def text(length: float) -> list[int]:
        return [draw.randrange(100, vocabulary) for _ in range(max(1, round(length)))]

    head, turn, instruction, example, ask = map(text, (HEAD, TURN, INSTRUCTION, EXAMPLE, ASK))
    found: list[EncodedPair] = []
    while len(found) < count:
        shared = draw.gauss(0, 1)
        own = CORRELATION * shared + (1 - CORRELATION**2) ** 0.5 * draw.gauss(0, 1)
        prompt = text(draw.lognormvariate(*PROMPT))
        answers = {
            name: text(exp(mean + deviation * normal))
            for name, (mean, deviation), normal in (("chosen", CHOSEN, shared), ("rejected", REJECTED, own))
        }
        sequences = {}
        for name in DIRECT + REFINE:
            context, answer = name.split("_")
            shown = [] if context == "direct" else [*example, *answers[context], *ask]
            before = head + (instruction if shown else []) + prompt + shown + turn
            sequences[name] = Encoded(before + answers[answer], len(before))
        if max(len(sequence.ids) for sequence in sequences.values()) <= max_length:
            found.append(EncodedPair(str(len(found)), sequences))
    return found


def real_pairs(source: str, count: int, max_length: int, model: Path) -> list[EncodedPair]:
    """The first pairs of a file, in an order that is not the file's, or of the embedded world.

    Raises ValueError if too few are short enough.
    """
    import yaml

    from evolve import data, pairs, templates, world

    template = Template(**yaml.safe_load((CONF / "template" / "rewrite.yaml").read_text()))
    rows = world.rows(count, 0) if source == "embedded" else data.ordered(data.read(source, "train"), 0, None)[0]
    rows = [{**row, "id": data.row_id(row["prompt"])} for row in rows[: 20 * count]]
    found, _ = pairs.encode(templates.load_tokenizer(model, None, False), template, rows, max_length, 1.0)
    if len(found) < count:
        raise ValueError(f"{source}: {len(found)} of {len(rows)} pairs fit {max_length} tokens; {count} are needed")
    return found[:count]


def configuration(workload: Workload) -> Any:
    from transformers import AutoConfig, LlamaConfig

    if workload.model in SHAPES:
        return LlamaConfig(max_position_embeddings=8192, **SHAPES[workload.model])
    return AutoConfig.from_pretrained(workload.model)


def load(workload: Workload) -> tuple[Any, Any, list[EncodedPair]]:
    """Model, tokenizer, and the pairs of all steps."""
    import torch
    from transformers import AutoModelForCausalLM, set_seed

    from evolve import templates, world

    if workload.threads:
        torch.set_num_threads(workload.threads)
    count = workload.batch * (workload.steps + 1)
    dtype = torch.bfloat16 if workload.lora else torch.float32
    tokenizer: Any
    set_seed(0)
    if workload.model in SHAPES:
        with torch.device(workload.device):
            model = AutoModelForCausalLM.from_config(configuration(workload), dtype=dtype)
        tokenizer = world.tokenizer()  # for its pad token alone
    else:
        loaded: Any = AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype)
        model = loaded.to(workload.device)
        tokenizer = templates.load_tokenizer(workload.model, None, False)
    if workload.data == "synthetic":
        return model, tokenizer, synthetic_pairs(count, workload.max_length, model.config.vocab_size)
    return model, tokenizer, real_pairs(workload.data, count, workload.max_length, Path(workload.model))


def lora() -> Any:
    """Of stock's side; ours builds its own from the same numbers (training.LORA)."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


def processor() -> str:
    """The CPU's name."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
