"""Who scores answers: a verifier, or a reward model. A scorer is `(prompts, answers) -> scores, and right or wrong`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from evolve import templates


@dataclass(frozen=True)
class Score:
    """A score (None: could not be given) and, from a verifier, whether the answer is right."""

    value: float | None
    correct: bool | None = None


class Scorer(Protocol):
    def __call__(self, items: Sequence[tuple[str, str]], progress: Callable[[int, int], None]) -> list[Score]:
        """Scores (prompt, answer) pairs."""


class Verifier:
    """A function of prompt and answer that tells right from wrong, and grades what lies between.

    extract(answer): what the answer says, the same text for answers that say the same; None if it can't be read.
    """

    def __init__(self, name: str):
        from evolve import world

        self.grade, self.extract = {"ledger": (world.reward, world.extract)}[name]

    def __call__(self, items: Sequence[tuple[str, str]], progress: Callable[[int, int], None]) -> list[Score]:
        scores = []
        for prompt, answer in items:
            value, correct = self.grade(prompt, answer)
            scores.append(Score(value, correct))
        return scores


class RewardModel:
    """A sequence-classification model of one output, over the chat layout of prompt and answer.

    An empty answer is scored as what it is: to leave it out would favour models that fail. One longer than
    `max_length` has no score. Answers are batched by length; padding is masked, so a score doesn't depend on its batch
    (beyond rounding).
    """

    def __init__(self, path: Path, *, chat_template: str | None, trust_remote_code: bool, dtype: str, max_length: int,
                 batch_size: int, device: str):  # fmt: skip
        import torch
        from transformers import AutoModelForSequenceClassification

        self.tokenizer = templates.load_tokenizer(path, chat_template, trust_remote_code)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
        ).to(device)
        if self.model.config.num_labels != 1:
            raise ValueError(f"{path}: a reward model has one output, this has {self.model.config.num_labels}")
        self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model.eval()
        self.max_length, self.batch_size, self.device = max_length, batch_size, device

    def __call__(self, items: Sequence[tuple[str, str]], progress: Callable[[int, int], None]) -> list[Score]:
        import torch

        encoded = [templates.encode(self.tokenizer, templates.direct(prompt), answer).ids for prompt, answer in items]
        scores: list[Score] = [Score(None)] * len(items)
        order = sorted(
            (index for index, ids in enumerate(encoded) if len(ids) <= self.max_length),
            key=lambda index: (len(encoded[index]), index),
        )
        with torch.inference_mode():
            for first in range(0, len(order), self.batch_size):
                batch = order[first : first + self.batch_size]
                width = max(len(encoded[index]) for index in batch)
                input_ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
                mask = torch.zeros_like(input_ids)
                for row, index in enumerate(batch):
                    input_ids[row, : len(encoded[index])] = torch.tensor(encoded[index])
                    mask[row, : len(encoded[index])] = 1
                logits = self.model(input_ids=input_ids.to(self.device), attention_mask=mask.to(self.device)).logits
                for index, value in zip(batch, logits[:, 0].float().tolist(), strict=True):
                    scores[index] = Score(value if isfinite(value) else None)
                progress(first + len(batch), len(order))
        return scores
