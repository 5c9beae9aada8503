"""What generates: one small protocol, so that strategies never know which engine runs them.

    submit(requests)   hand requests over; returns at once
    poll()             wait until some are done, return them; [] when nothing is under way
    close()            give back memory

A request is messages and a seed. An engine draws each answer from its request's own seed (draw.py), so that what else
is in the batch changes an answer only where it changes how logits are rounded: in float32 all but never, in bfloat16
sooner or later. hf and vllm draw the same tokens from the same seed where their logits agree.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from evolve import templates
from evolve.config import HF, VLLM, Sampling, Server
from evolve.stages import ModelSettings


class Request(NamedTuple):
    """`key` names the request: in a strategy (prompt's index, answer's index)."""

    key: tuple[int, int]
    messages: templates.Messages
    seed: int  # 63 bits


class Completion(NamedTuple):
    """What an engine gives back.

    end: 'stop' (of itself, or at a stop string), 'length' (cut off at the token limit) or 'too long' (not made: its
    prompt left no room).
    tokens: generated, the one that ended it too. read: of the prompt.
    """

    key: tuple[int, int]
    text: str
    tokens: int
    end: str
    read: int = 0
    ids: tuple[int, ...] = ()  # the tokens generated, from an engine that has them


@dataclass(frozen=True)
class Task:
    """What any engine has to know: the model and how to read it, how to draw answers, how long they may be.

    `max_length` is in tokens of prompt and answer together. `model` is None where a server that runs has its own.
    An answer ends before the first of the strings `until`.
    """

    model: Path | None
    read: ModelSettings
    sampling: Sampling
    max_new_tokens: int
    max_length: int
    device: str
    until: tuple[str, ...] = ()

    @property
    def folder(self) -> Path:
        """The model's folder, for an engine that has to have one."""
        assert self.model is not None, "only a server that runs has a model of its own"
        return self.model


class Engine(Protocol):
    def submit(self, requests: Sequence[Request]) -> None: ...

    def poll(self) -> list[Completion]: ...

    def close(self) -> None: ...


def load(settings: HF | VLLM | Server, task: Task, section: str = "engine") -> Engine:
    """The engine that `section` of the configuration names, with the task's model loaded.

    Raises ValueError, before weights are loaded, if the model or its context can't be held.
    """
    if settings.name == "openai":
        from evolve.engines.openai import OpenAIEngine

        return OpenAIEngine(settings, task)
    from evolve.engines import memory

    memory.check(settings, task, section)
    if settings.name == "vllm":
        from evolve.engines.vllm import VLLMEngine

        return VLLMEngine(settings, task)
    from evolve.engines.hf import HFEngine

    return HFEngine(task, settings.batch_size)


class Codec:
    """Messages to tokens and generated tokens to completions, for engines that work on tokens."""

    def __init__(self, task: Task):
        from transformers import AutoConfig, GenerationConfig

        self.task = task
        self.tokenizer = templates.load_tokenizer(task.folder, task.read.chat_template, task.read.trust_remote_code)
        config: Any = AutoConfig.from_pretrained(task.folder, trust_remote_code=task.read.trust_remote_code)
        habits: Any = (
            GenerationConfig.from_pretrained(task.folder)
            if (task.folder / "generation_config.json").exists()
            else GenerationConfig.from_model_config(config)
        )
        ends = habits.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.ends = sorted({end for end in [*ends, self.tokenizer.eos_token_id] if end is not None})

    def encode(self, request: Request) -> list[int] | None:
        """The prompt's ids; None: there is no room for an answer behind it."""
        ids = templates.encode_prompt(self.tokenizer, request.messages)
        return ids if len(ids) + self.task.max_new_tokens <= self.task.max_length else None

    def completion(self, request: Request, read: int, ids: Sequence[int]) -> Completion:
        """From the ids generated; what stands behind the first that ends an answer is none of it.

        A stop string ends it with the token that completes the string, however many more an engine has made.
        """
        place = next((place for place, token in enumerate(ids) if token in self.ends), None)
        answer = ids if place is None else ids[:place]
        spent, end = tuple(ids if place is None else ids[: place + 1]), "length" if place is None else "stop"
        text = self.decode(answer)
        if self.stops(answer):
            spent = tuple(answer[: 1 + bisect_left(range(1, len(answer)), True, key=lambda n: self.stops(answer[:n]))])
            text, end = before(self.decode(spent), self.task.until), "stop"
        return Completion(request.key, text.strip(), len(spent), end, read, spent)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def stops(self, ids: Sequence[int]) -> bool:
        """Whether a stop string stands in the text of these ids."""
        return bool(self.task.until) and any(stop in self.decode(ids) for stop in self.task.until)


def before(text: str, until: Sequence[str]) -> str:
    """What stands before the first of the stop strings; all of the text, if none of them does."""
    return text[: min((text.index(stop) for stop in until if stop in text), default=len(text))]


def too_long(request: Request) -> Completion:
    return Completion(request.key, "", 0, "too long")
