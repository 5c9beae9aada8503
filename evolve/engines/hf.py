"""transformers' generate, batched by length. It runs greedily on what draw.py has drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from evolve.engines import Codec, Completion, Request, Task, too_long
from evolve.engines.draw import Sampler, only


class _Draw(LogitsProcessor):
    def __init__(self, sampler: Sampler, seeds: torch.Tensor, prompt_width: int):
        self.sampler, self.seeds, self.prompt_width = sampler, seeds, prompt_width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return only(scores, self.sampler(scores, self.seeds, input_ids.shape[1] - self.prompt_width))


class _Until(StoppingCriteria):
    """Ends a row at a stop string in what was generated; transformers' own looks at the prompt too."""

    def __init__(self, codec: Codec, prompt_width: int):
        self.codec, self.prompt_width = codec, prompt_width
        # Tokens in which a string that the newest of them completes must stand: each has a byte of it at least.
        self.window = 1 + max(len(stop.encode()) for stop in codec.task.until)

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        rows = input_ids[:, self.prompt_width :].tolist()
        done = [self.codec.stops(row[-self.window :]) and self.codec.stops(row) for row in rows]
        return torch.tensor(done, device=input_ids.device)


class HFEngine:
    """`model`: one that is in memory already, as a policy in training is; None: the task's is loaded."""

    def __init__(self, task: Task, batch_size: int, model: Any = None):
        self.task, self.batch_size = task, batch_size
        self.codec = Codec(task)
        self.tokenizer = self.codec.tokenizer
        if model is None:
            model = AutoModelForCausalLM.from_pretrained(
                task.folder, dtype=getattr(torch, task.read.dtype), trust_remote_code=task.read.trust_remote_code
            )
            model = model.to(task.device)
        self.model = model.eval()
        # The model's own sampling habits (repetition penalties and such) are not part of the experiment.
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.codec.ends, pad_token_id=self.tokenizer.pad_token_id, max_new_tokens=task.max_new_tokens
        )
        self.sampler = Sampler(task.sampling) if task.sampling.temperature > 0 else None
        self._queue: list[tuple[list[int], Request]] = []
        self._refused: list[Completion] = []

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            ids = self.codec.encode(request)
            if ids is None:
                self._refused.append(too_long(request))
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
        if self.sampler is not None:
            seeds = torch.tensor([request.seed for _, request in batch], device=self.task.device)
            processors.append(_Draw(self.sampler, seeds, width))
        criteria = [_Until(self.codec, width)] if self.task.until else []
        output = self.model.generate(
            input_ids=input_ids.to(self.task.device),
            attention_mask=mask.to(self.task.device),
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList(criteria),
            do_sample=False,
        )[:, width:].tolist()
        return [
            self.codec.completion(request, len(prompt), ids)
            for ids, (prompt, request) in zip(output, batch, strict=True)
        ]

    def close(self) -> None:
        del self.model
