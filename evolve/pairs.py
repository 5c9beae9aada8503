"""Preference pairs as tokens, and the log-probabilities of their answers: shared by activation, reference and training.

A pair is six sequences (losses.DIRECT and losses.REFINE). It is kept or left out as a whole, whichever of the six a
loss needs, so that all members of a sweep train on the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evolve import templates
from evolve.config import Template
from evolve.losses import DIRECT, REFINE
from evolve.templates import Encoded

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class EncodedPair:
    id: str
    sequences: Mapping[str, Encoded]  # by the names of DIRECT and REFINE


def encode(
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    rows: Sequence[Mapping[str, Any]],
    max_length: int,
    max_dropped: float,
) -> tuple[list[EncodedPair], dict[str, int]]:
    """Rows with id, prompt, chosen, rejected -> encoded pairs, and counts of those left out and why.

    Nothing is cut: a pair of which any sequence is longer than `max_length` tokens is left out.
    Raises ValueError if more than the share `max_dropped` of the pairs is, or nothing is left.
    """
    pairs = []
    for row in rows:
        prompt, answers = row["prompt"], {"chosen": row["chosen"], "rejected": row["rejected"]}
        sequences = {}
        for name in DIRECT + REFINE:
            context, answer = name.split("_")
            if context == "direct":
                messages = templates.direct(prompt)
            else:
                messages = templates.refine(template, prompt, [answers[context]])
            finished = row.get(f"{answer}_finished", True)
            sequences[name] = templates.encode(tokenizer, messages, answers[answer], finished)
        if max(len(sequence.ids) for sequence in sequences.values()) <= max_length:
            pairs.append(EncodedPair(row["id"], sequences))
    dropped = {"longer than max_length": len(rows) - len(pairs)}
    if not pairs or len(rows) - len(pairs) > max_dropped * len(rows):
        raise ValueError(
            f"{len(rows) - len(pairs)} of {len(rows)} pairs are longer than data.max_length={max_length} tokens in "
            f"some context; trainer.max_dropped allows a share of {max_dropped}: raise one of the two, or set "
            "data.max_characters"
        )
    return pairs, dropped


def pad(sequences: Sequence[Encoded], pad_id: int) -> dict[str, torch.Tensor]:
    """input_ids, attention_mask and answer (True where a token is the answer's), each [sequences, longest]."""
    import torch

    width = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id)
    attention_mask = torch.zeros((len(sequences), width), dtype=torch.long)
    answer = torch.zeros((len(sequences), width), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        input_ids[row, :length] = torch.tensor(sequence.ids)
        attention_mask[row, :length] = 1
        answer[row, sequence.answer : length] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "answer": answer}


def log_probabilities(model: PreTrainedModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the answer's tokens of log pi(token | what stands before it): [sequences], float32.

    Logits are made only at positions where some sequence of the batch has an answer token to predict.
    """
    import torch

    predicts = batch["answer"][:, 1:]  # position t predicts token t + 1
    keep = predicts.any(0).nonzero().squeeze(1)
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], logits_to_keep=keep, use_cache=False
    ).logits
    mask = predicts[:, keep]
    logits = logits[mask].float()
    targets = batch["input_ids"][:, 1:][:, keep][mask]
    logp = logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), device=logp.device).index_add(0, rows, logp)
