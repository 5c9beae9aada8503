"""Preference pairs as tokens, and the log-probabilities of their answers: shared by activation, reference and training.

A pair is six sequences (losses.DIRECT and losses.REFINE). It is kept or left out as a whole, whichever of the six a
loss needs, so that all members of a sweep train on the same pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evolve import packing, templates
from evolve.config import Template
from evolve.losses import DIRECT, REFINE
from evolve.packing import Layout, plant
from evolve.templates import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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


def answer_tokens(pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    """Lengths in tokens of the chosen and the rejected answers: [pairs] each."""
    return {
        answer: torch.tensor([pair.sequences[f"direct_{answer}"].answer_tokens for pair in pairs])
        for answer in ("chosen", "rejected")
    }


@dataclass
class Batch:
    """Sequences as a model runs them, and which of its log-probabilities make up which sequence's.

    input_ids: [rows, width]; one row, where `layout` says who attends to whom, or padded rows with `mask`. positions:
    [1, width] or None. kept: the columns at which logits are made. picked: [rows, kept], which of these predict an
    answer's token, or None for all. targets: [scored], the tokens predicted. pieces, owners: [answer tokens], entry n
    says that log-probability pieces[n] belongs to sequence owners[n]; one shared by two sequences stands there twice.
    tokens: those of all sequences, as if nothing were shared; `width * rows` are run.
    """

    input_ids: Tensor
    positions: Tensor | None
    mask: Tensor | None
    layout: Layout | None
    kept: Tensor
    picked: Tensor | None
    targets: Tensor
    pieces: Tensor
    owners: Tensor
    sequences: int
    tokens: int

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        if self.layout is not None:
            moved["layout"] = Layout(self.layout.forest, torch.device(device))
        return replace(self, **moved)


def batch(groups: Sequence[Sequence[Encoded]], how: str, pad_id: int) -> Batch:
    """Groups of sequences (a group: one pair's) as one batch; its sequences are numbered group by group.

    how: 'shared' runs what a group's sequences begin with in common once; 'packed' has no padding and shares nothing;
    'padded' is the plain way, for models whose attention can't be laid out otherwise.
    """
    flat = [sequence for group in groups for sequence in group]
    tokens = sum(len(sequence.ids) for sequence in flat)
    if how == "padded":
        return _padded(flat, tokens, pad_id)
    forest = plant(
        [[sequence.ids for sequence in group] for group in (groups if how == "shared" else [[s] for s in flat])]
    )
    numbers: dict[tuple[int, int], int] = {}  # (place that predicts, place predicted) -> its log-probability
    pieces: list[int] = []
    owners: list[int] = []
    for owner, (sequence, path) in enumerate(zip(flat, forest.paths, strict=True)):
        for depth in range(sequence.answer, len(path)):
            pieces.append(numbers.setdefault((path[depth - 1], path[depth]), len(numbers)))
            owners.append(owner)
    edges = torch.tensor(list(numbers), dtype=torch.long).reshape(-1, 2)  # none if every answer is empty
    return Batch(
        input_ids=forest.input_ids[None],
        positions=forest.positions[None],
        mask=None,
        layout=Layout(forest, torch.device("cpu")),
        kept=edges[:, 0],
        picked=None,
        targets=forest.input_ids[edges[:, 1]],
        pieces=torch.tensor(pieces, dtype=torch.long),
        owners=torch.tensor(owners, dtype=torch.long),
        sequences=len(flat),
        tokens=tokens,
    )


def _padded(sequences: Sequence[Encoded], tokens: int, pad_id: int) -> Batch:
    width = max(len(sequence.ids) for sequence in sequences)
    input_ids = torch.full((len(sequences), width), pad_id)
    mask = torch.zeros((len(sequences), width), dtype=torch.long)
    predicts = torch.zeros((len(sequences), width - 1), dtype=torch.bool)  # column t predicts token t + 1
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        input_ids[row, :length] = torch.tensor(sequence.ids)
        mask[row, :length] = 1
        predicts[row, sequence.answer - 1 : length - 1] = True
    kept = predicts.any(0).nonzero().squeeze(1)
    picked = predicts[:, kept]
    return Batch(
        input_ids=input_ids,
        positions=None,
        mask=mask,
        layout=None,
        kept=kept,
        picked=picked,
        targets=input_ids[:, 1:][:, kept][picked],
        pieces=torch.arange(int(picked.sum())),
        owners=picked.nonzero()[:, 0],
        sequences=len(sequences),
        tokens=tokens,
    )


def prepare(model: Any, how: str, bf16: bool = False) -> Any:
    """Teaches a causal language model, in place, to answer `model(batch=Batch)` with log-probabilities: [scored].

    The logits are made by the model's own head, where an answer's token is predicted and nowhere else, and never leave
    `forward`: what wraps the model (DDP, FSDP, DeepSpeed, PEFT) sees one small tensor, in float32. With bf16 the
    forward is autocast in here, so that it is the same arithmetic for references, on one device, and on many.
    """
    if how != "padded":
        model.set_attn_implementation(packing.ATTENTION)
    inner = model.forward

    def forward(*args: Any, batch: Batch | None = None, **kwargs: Any) -> Any:
        if batch is None:
            return inner(*args, **kwargs)
        layout = {} if batch.layout is None else {"layout": batch.layout}
        with torch.autocast(batch.input_ids.device.type, torch.bfloat16, enabled=bf16):
            logits = inner(
                input_ids=batch.input_ids, attention_mask=batch.mask, position_ids=batch.positions,
                logits_to_keep=batch.kept, use_cache=False, **layout,
            ).logits  # fmt: skip
            return LogProbability.apply(logits[0] if batch.picked is None else logits[batch.picked], batch.targets)

    model.forward = forward
    return model


class LogProbability(torch.autograd.Function):
    """log softmax(logits)[target]: logits [scored, vocabulary] of any precision, targets [scored] -> [scored], float32.

    Keeps the logits as they are and works through them in chunks, where log_softmax would make float32 copies of all.
    """

    CHUNK = 512

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        normaliser = torch.cat([chunk.float().logsumexp(1) for chunk in logits.split(LogProbability.CHUNK)])
        ctx.save_for_backward(logits, targets, normaliser)
        return logits.gather(1, targets[:, None]).squeeze(1).float() - normaliser

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, targets, normaliser = ctx.saved_tensors
        (gradient,) = gradients
        result = torch.empty_like(logits)
        for first in range(0, len(logits), LogProbability.CHUNK):
            part = slice(first, first + LogProbability.CHUNK)
            weight = gradient[part, None]
            chunk = (logits[part].float() - normaliser[part, None]).exp_().mul_(-weight)
            result[part] = chunk.scatter_add_(1, targets[part, None], weight)
        return result, None


def log_probabilities(model: Any, batch: Batch) -> Tensor:
    """Sum over the answer's tokens of log pi(token | what stands before it): [sequences], float32.

    model: one that `prepare` has been at, wrapped or not.
    """
    scored = model(batch=batch)
    return torch.zeros(batch.sequences, device=scored.device).index_add(0, batch.owners, scored[batch.pieces])


def check(model: Any, groups: Sequence[Sequence[Encoded]], how: str, pad_id: int) -> None:
    """Compares a layout's log-probabilities with the plain, padded way's, on a model that `prepare` has not been at.

    Raises ValueError if they differ: not every architecture attends through the interface that layouts rely on. The
    model is left as it was. Groups should be as long as any: a window of attention shows in nothing shorter.
    """
    if how == "padded":
        return
    was_training, before, plain = model.training, model.config._attn_implementation, model.forward
    model.eval()
    found = {}
    try:
        with torch.inference_mode():
            for way in ("padded", how):
                one = batch(groups, way, pad_id).to(model.device)
                model.forward = plain
                found[way] = log_probabilities(prepare(model, way), one)
    except TypeError as error:  # its forward takes no layout, or doesn't hand it on to its attention
        raise ValueError(
            f"this model ({model.config.model_type}) can't be run in the layout '{how}' ({error}); set "
            "trainer.layout=padded"
        ) from error
    finally:
        model.forward = plain
        model.set_attn_implementation(before)
        model.train(was_training)
    difference = (found[how] - found["padded"]).abs().max().item()
    if difference > 1e-3 * found["padded"].abs().max().clamp(min=1).item():
        raise ValueError(
            f"this model ({model.config.model_type}) gives log-probabilities {difference:.3g} apart in the layouts "
            f"'{how}' and 'padded'; set trainer.layout=padded"
        )
