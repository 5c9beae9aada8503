"""What generates: one small protocol, so that strategies never know which engine runs them.

    submit(requests)   hand requests over; returns at once
    poll()             wait until some are done, return them; [] when nothing is under way
    close()            give back memory

An engine draws each answer from its request's own seed, so that results don't depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from evolve.config import Engine as Settings
from evolve.config import Sampling, Template
from evolve.stages import ModelSettings
from evolve.strategies import Completion, Request


@dataclass(frozen=True)
class Task:
    """What any engine has to know: the model and how to read it, how to lay out and draw answers, how long they may be.

    `template` is None where nothing is refined; `max_length` is in tokens of prompt and answer together.
    """

    model: Path
    read: ModelSettings
    template: Template | None
    sampling: Sampling
    max_new_tokens: int
    max_length: int
    device: str


class Engine(Protocol):
    def submit(self, requests: Sequence[Request]) -> None: ...

    def poll(self) -> list[Completion]: ...

    def close(self) -> None: ...


def load(settings: Settings, task: Task) -> Engine:
    """The engine that `engine=` names, with the task's model loaded."""
    from evolve.engines.hf import HFEngine

    return {"hf": HFEngine}[settings.name](task, settings.batch_size)
