"""What generates: one small protocol, so that strategies never know which engine runs them.

    submit(requests)   hand requests over; returns at once
    poll()             wait until some are done, return them; [] when nothing is under way
    close()            give back memory

An engine draws each answer from its request's own seed, so that results don't depend on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from evolve.config import Engine as Settings
from evolve.config import Sampling, Template
from evolve.strategies import Completion, Request


class Engine(Protocol):
    def submit(self, requests: Sequence[Request]) -> None: ...

    def poll(self) -> list[Completion]: ...

    def close(self) -> None: ...


def load(
    settings: Settings,
    model: Path,
    *,
    chat_template: str | None,
    trust_remote_code: bool,
    dtype: str,
    template: Template,
    sampling: Sampling,
    max_new_tokens: int,
    max_length: int,
    device: str,
) -> Engine:
    """The engine that `engine=` names, with a model loaded."""
    from evolve.engines.hf import HFEngine

    return {"hf": HFEngine}[settings.name](
        model,
        chat_template=chat_template,
        trust_remote_code=trust_remote_code,
        dtype=dtype,
        template=template,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        max_length=max_length,
        batch_size=settings.batch_size,
        device=device,
    )
