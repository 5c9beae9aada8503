"""What lm-eval is given for a model: one that records what it is asked, one that replays what was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

UNASKED = (math.nan, False)  # a log-likelihood that was not made


class _Prompts(LM):
    """Prompts as the engines get them, before the chat template: where answers are generated, one user turn.

    `kind` is the task's, generate or likelihood.
    """

    def __init__(self, kind: str):
        super().__init__()
        self.generates = kind == "generate"
        self.chat = False

    @property
    def tokenizer_name(self) -> str:
        return "none"

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        if self.generates:
            return "\n\n".join(message["content"] for message in chat_history)
        self.chat = True
        return json.dumps({"messages": chat_history, "open": add_generation_prompt}, ensure_ascii=False)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [value for value, _ in self.loglikelihood(requests)]


class Recorder(_Prompts):
    def __init__(self, kind: str):
        super().__init__(kind)
        self.rows: dict[str, dict[str, Any]] = {}

    def generate_until(self, requests: list[Instance]) -> list[str]:
        for request in requests:
            prompt, settings = request.args
            self.rows[_id(request)] = {"prompt": prompt, "until": settings["until"]}
        return [""] * len(requests)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        for request in requests:
            row = self.rows.setdefault(_id(request), {"prompt": request.args[0], "requests": [], "chat": self.chat})
            row["requests"].append(list(request.args))
        return [(0.0, False)] * len(requests)


class Replayer(_Prompts):
    """`given`: by document's id, its answer (None: was not made), or its log-likelihoods as [value, greedy]."""

    def __init__(self, kind: str, prompts: Mapping[str, str], given: Mapping[str, Any]):
        super().__init__(kind)
        self.prompts, self.given = prompts, given

    def _check(self, request: Instance) -> str:
        name = _id(request)
        if self.prompts.get(name) != request.args[0] and not request.idx:
            raise ValueError(f"{name}: was not asked, or asked otherwise; data, shots, limit or lm-eval have changed")
        return name

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self.given[self._check(request)] or "" for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        made = [(self.given[self._check(request)], request.idx) for request in requests]
        return [(values[place][0], values[place][1]) if values else UNASKED for values, place in made]


def _id(request: Instance) -> str:
    return f"{request.task_name}/{request.doc_id}"
