"""transformers' generate, batched by length, with a seed for each request.

A token is drawn by inverting its distribution at one uniform number, which is a hash of the request's seed and the
step: so a request draws the same answer whatever stands beside it in the batch. generate itself runs greedily on what
has been drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from evolve import templates
from evolve.engines import Task
from evolve.strategies import Completion, Request

_MASK = 0xFFFFFFFF


def _mix(value: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit values held in int64: every input bit reaches every output bit."""
    value = ((value ^ (value >> 16)) * 0x85EBCA6B) & _MASK
    value = ((value ^ (value >> 13)) * 0xC2B2AE35) & _MASK
    return value ^ (value >> 16)


def uniform(seeds: Tensor, step: int) -> Tensor:
    """Numbers in (0, 1), [rows], float64: a pure function of (a row's 63-bit seed, step)."""
    low, high = seeds & _MASK, seeds >> 32
    first = _mix(_mix(low ^ (step * 0x9E3779B9 & _MASK)) ^ high)
    second = _mix(first ^ _mix(high + 0x85EBCA6B & _MASK))
    return ((first << 20 | second >> 12).double() + 0.5) / 2**52


def draw(logits: Tensor, numbers: Tensor) -> Tensor:
    """The token whose stretch of the cumulative softmax holds a row's number: [rows] from [rows, vocabulary]."""
    heights = logits.float().softmax(-1).cumsum(-1, dtype=torch.float64)
    if not heights[:, -1].isfinite().all():
        raise ValueError("the model's logits are not numbers: its weights are spoilt")
    wanted = numbers[:, None] * heights[:, -1:]  # rounding may leave the sum a little off 1
    return torch.searchsorted(heights, wanted, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)


class _Draw(LogitsProcessor):
    """Leaves one token possible in each row, the drawn one."""

    def __init__(self, seeds: Tensor, prompt_width: int):
        self.seeds, self.prompt_width = seeds, prompt_width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        tokens = draw(scores, uniform(self.seeds, input_ids.shape[1] - self.prompt_width))
        return torch.full_like(scores, float("-inf")).scatter_(1, tokens[:, None], 0.0)


class HFEngine:
    """`model`: one that is in memory already, as a policy in training is; None: the task's is loaded."""

    def __init__(self, task: Task, batch_size: int, model: Any = None):
        self.task, self.batch_size = task, batch_size
        self.tokenizer = templates.load_tokenizer(task.model, task.read.chat_template, task.read.trust_remote_code)
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(
                task.model, dtype=getattr(torch, task.read.dtype), trust_remote_code=task.read.trust_remote_code
            )
            model = model.to(task.device)
        self.model = model.eval()
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({end for end in [*ends, self.tokenizer.eos_token_id] if end is not None})
        # The model's own sampling habits (repetition penalties and such) are not part of the experiment.
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.ends, pad_token_id=self.tokenizer.pad_token_id, max_new_tokens=task.max_new_tokens
        )
        self._queue: list[tuple[list[int], Request]] = []
        self._refused: list[Completion] = []

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.possible:
                self._refused.append(Completion(request.key, "", 0, "too long"))
                continue
            if request.earlier:
                assert self.task.template is not None, "a strategy that refines needs a template"
                messages = templates.refine(self.task.template, request.prompt, request.earlier)
            else:
                messages = templates.direct(request.prompt)
            ids = templates.encode_prompt(self.tokenizer, messages)
            if len(ids) + self.task.max_new_tokens > self.task.max_length:
                self._refused.append(Completion(request.key, "", 0, "too long"))
            else:
                self._queue.append((ids, request))

    def poll(self) -> list[Completion]:
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        if not self._queue:
            return []
        # By length, so that little is padded; then by key, so that batches don't depend on arrival.
        self._queue.sort(key=lambda item: (len(item[0]), item[1].key))
        batch, self._queue = self._queue[: self.batch_size], self._queue[self.batch_size :]
        return self._generate(batch)

    @torch.inference_mode()
    def _generate(self, batch: list[tuple[list[int], Request]]) -> list[Completion]:
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.full((len(batch), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, (ids, _) in enumerate(batch):
            input_ids[row, width - len(ids) :] = torch.tensor(ids)
            mask[row, width - len(ids) :] = 1
        processors = LogitsProcessorList()
        if self.task.sampling.temperature > 0:
            processors.append(TemperatureLogitsWarper(self.task.sampling.temperature))
            if self.task.sampling.top_k:
                processors.append(TopKLogitsWarper(self.task.sampling.top_k))
            if self.task.sampling.top_p < 1:
                processors.append(TopPLogitsWarper(self.task.sampling.top_p))
            seeds = torch.tensor([request.seed for _, request in batch], device=self.task.device)
            processors.append(_Draw(seeds, width))
        output = self.model.generate(
            input_ids=input_ids.to(self.task.device),
            attention_mask=mask.to(self.task.device),
            logits_processor=processors,
            do_sample=False,
        )[:, width:].tolist()
        completions = []
        for ids, (_, request) in zip(output, batch, strict=True):
            end = next((place for place, token in enumerate(ids) if token in self.ends), None)
            answer = ids if end is None else ids[:end]
            text = str(self.tokenizer.decode(answer, skip_special_tokens=True)).strip()
            spent = len(ids) if end is None else end + 1
            completions.append(
                Completion(request.key, text, spent, "length" if end is None else "stop", tuple(ids[:spent]))
            )
        return completions

    def close(self) -> None:
        del self.model
