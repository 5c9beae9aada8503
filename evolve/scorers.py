"""Who scores answers: a reward model here, a verifier (verifiers.py) or a judge (judge.py).

A scorer yields each item's score as it is made.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evolve import templates
from evolve.stages import ModelSettings

Ids = tuple[int, ...]
CPU_TOKENS = 1024  # of a batch: past them a CPU's matrix products gain nothing and its caches lose


TOKENS = "tokens of the judge"  # among a score's counts


class Item(NamedTuple):
    """What is scored. `gold` is the data set's reference answer, where it has one."""

    prompt: str
    answer: str
    gold: str | None = None


@dataclass(frozen=True)
class Score:
    """A score (None: could not be given) and, from a verifier, whether the answer is right.

    counts: what happened on the way and how often, to be added up over all answers.
    """

    value: float | None
    correct: bool | None = None
    counts: Mapping[str, int] = field(default_factory=dict)


class Scorer(Protocol):
    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        """(an item's index, its score) for each item, in the order in which they are made."""

    def close(self) -> None:
        """Gives back what it holds."""


class _Conversations:
    """What a reward model reads of items: the whole conversation, scored at its last token.

    That is how the authors of published ones call them (`apply_chat_template`, batches of one, `logits[0][0]`) and what
    vLLM's classification pools. An empty answer is scored as what it is: to leave it out would favour models that
    fail. A conversation longer than `max_length` has no score; one that several items share is read once.
    """

    def __init__(self, path: Path, read: ModelSettings, max_length: int):
        from transformers import AutoConfig

        self.tokenizer = templates.load_tokenizer(path, read.chat_template, read.trust_remote_code)
        self.max_length = max_length
        labels = AutoConfig.from_pretrained(path, trust_remote_code=read.trust_remote_code).num_labels
        if labels != 1:
            raise ValueError(f"{path}: a reward model has one output, this has {labels}")

    def __call__(self, items: Sequence[Item]) -> tuple[list[tuple[Ids, list[int]]], list[int]]:
        """Token ids, shortest first, with the items that have them; and the items that are too long."""
        found: dict[Ids, list[int]] = {}
        for index, item in enumerate(items):
            ids = tuple(templates.conversation(self.tokenizer, item.prompt, item.answer))
            found.setdefault(ids, []).append(index)
        short = [entry for entry in found.items() if len(entry[0]) <= self.max_length]
        long = [index for ids, indices in found.items() if len(ids) > self.max_length for index in indices]
        return sorted(short, key=lambda entry: len(entry[0])), long


def _score(value: float) -> Score:
    return Score(value if isfinite(value) else None)


class RewardModel:
    """A sequence-classification model of one output, by transformers.

    Answers are batched by length; padding is masked, so a score doesn't depend on its batch (beyond rounding).
    """

    def __init__(self, path: Path, read: ModelSettings, *, max_length: int, batch_size: int, device: str):
        import torch
        from transformers import AutoModelForSequenceClassification

        self.read = _Conversations(path, read, max_length)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, read.dtype), trust_remote_code=read.trust_remote_code
        ).to(device)
        self.model.config.use_cache = False
        self.model.eval()
        self.batch_size, self.device = batch_size, device

    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        encoded, long = self.read(items)
        yield from ((index, Score(None)) for index in long)
        first = 0
        while first < len(encoded):
            batch = encoded[first : first + self.batch_size]
            batch = batch[: self._size([len(ids) for ids, _ in batch])]
            first += len(batch)
            for (_, indices), value in zip(batch, self._batch([ids for ids, _ in batch]), strict=True):
                yield from ((index, _score(value)) for index in indices)

    def close(self) -> None:
        del self.model

    def _size(self, lengths: Sequence[int]) -> int:
        """How many of the next sequences, of rising lengths, make a batch."""
        if self.device != "cpu":
            return len(lengths)
        return max([1, *(n for n, length in enumerate(lengths, 1) if n * length <= CPU_TOKENS)])

    def _batch(self, sequences: Sequence[Sequence[int]]) -> list[float]:
        import torch

        pad = templates.padding(sequences)
        self.model.config.get_text_config().pad_token_id = pad
        input_ids = torch.full((len(sequences), max(map(len, sequences))), pad)
        mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(sequences):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = 1
        with torch.inference_mode():
            logits = self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)).logits
        found: list[float] = logits[:, 0].float().tolist()
        return found


class VLLMRewardModel:
    """The same model by vLLM's classification, whose process should have nothing else to do.

    vLLM takes an answer as soon as there is room for it, and reads the prompt that several answers share once.
    """

    def __init__(
        self,
        path: Path,
        read: ModelSettings,
        *,
        max_length: int,
        batch_size: int,
        memory_share: float,
        device: str,
    ):
        from evolve.config import VLLM, Sampling
        from evolve.engines import Task
        from evolve.engines.vllm import EngineArgs, LLMEngine, arguments

        self.read = _Conversations(path, read, max_length)
        greedy = Sampling(temperature=0, top_k=0, top_p=1)
        task = Task(path, read, greedy, max_new_tokens=0, max_length=max_length, device=device)
        given = arguments(VLLM(name="vllm", batch_size=batch_size, memory_share=memory_share), task)
        self.engine = LLMEngine.from_engine_args(EngineArgs(**given, runner="pooling", convert="classify"))

    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        from vllm import PoolingParams, TokensPrompt

        encoded, long = self.read(items)
        yield from ((index, Score(None)) for index in long)
        for place, (ids, _) in enumerate(encoded):
            logit = PoolingParams(task="classify", use_activation=False)
            self.engine.add_request(str(place), TokensPrompt(prompt_token_ids=list(ids)), logit)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                made: Any = output.outputs
                score = _score(made.data.item())
                yield from ((index, score) for index in encoded[int(output.request_id)][1])

    def close(self) -> None:
        self.engine.engine_core.shutdown()
