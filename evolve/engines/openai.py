"""Any server that speaks OpenAI's protocol: one that runs, or one that is started for the stage's model (serve.py).

The server draws, each answer from its request's seed; how much of that holds whatever else is in its batch is the
server's matter. It stops where the model's own files say, as Codec does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import PriorityQueue, SimpleQueue
from typing import Any

from evolve.config import Server
from evolve.engines import Codec, Completion, Request, Task, before, too_long
from evolve.engines.client import FAILURES, Client, no_room, read_answer

# Who takes more fields than OpenAI has, as their lists of models name them; other servers may refuse such a request.
# Unless told, these draw by the model's own habits (its generation_config.json), which are not part of the experiment.
MORE_FIELDS = ("vllm", "sglang")


class OpenAIEngine:
    """Raises ValueError for a setting that the server contradicts, RuntimeError for a server that doesn't answer."""

    def __init__(self, settings: Server, task: Task):
        self.settings, self.task = settings, task
        self.codec = Codec(task) if task.model is not None else None  # None: of a model that only the server knows
        if self.codec is None and settings.endpoint == "completions":
            raise ValueError("engine.endpoint=completions: sends token ids, which want the model's files; set chat")
        self.client = Client(settings, task.model)
        with contextlib.ExitStack() as opened:
            opened.callback(self.client.close)
            self._fields = self._how_to_draw()
            opened.pop_all()
        self._pool = ThreadPoolExecutor(settings.batch_size)
        # By key: the first prompts are finished first, and so are kept if the server dies, rather than all begun.
        self._waiting: PriorityQueue[tuple[Request, list[int]]] = PriorityQueue()
        self._done: SimpleQueue[Future[Completion]] = SimpleQueue()
        self._under_way = 0
        self._refused: list[Completion] = []
        self._error: BaseException | None = None

    def submit(self, requests: Sequence[Request]) -> None:
        for request in requests:
            ids = self.codec.encode(request) if self.codec else []  # without files the server says what is too long
            if ids is None:
                self._refused.append(too_long(request))
            elif self._error is None:
                self._waiting.put((request, ids))
                self._pool.submit(self._next).add_done_callback(self._done.put)
                self._under_way += 1

    def poll(self) -> list[Completion]:
        """After an error nothing more is asked, and it is raised once all that was on its way has been given back."""
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        while self._under_way:
            future = self._done.get()
            self._under_way -= 1
            if future.cancelled():
                continue
            if error := future.exception():
                self._error = self._error or error
                self._pool.shutdown(wait=False, cancel_futures=True)
                continue
            return [future.result()]
        if self._error:
            raise self._error
        return []

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.client.close()

    def _how_to_draw(self) -> dict[str, Any]:
        """What every request says. Raises ValueError if the server holds less than the task's lengths."""
        sampling, entry = self.task.sampling, self.client.entry
        holds = entry.get("max_model_len")
        if isinstance(holds, int) and holds < self.task.max_length:
            raise ValueError(
                f"engine.max_length (or data.max_length)={self.task.max_length}: the server holds {holds} tokens; set "
                f"engine.max_length={holds}, or start it with more"
            )
        more: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        if entry.get("owned_by") in MORE_FIELDS:
            more = {"top_k": sampling.top_k or -1, "min_p": 0.0, "repetition_penalty": 1.0}
            if self.codec:
                more["stop_token_ids"] = self.codec.ends
        return {
            "model": self.client.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": more or None,
            **({"stop": list(self.task.until[:4])} if self.task.until else {}),  # OpenAI's takes no more
        }

    def _next(self) -> Completion:
        request, ids = self._waiting.get_nowait()
        limit, fields = self.task.max_new_tokens, {**self._fields, "seed": request.seed}
        create: Any
        if self.settings.endpoint == "chat":
            create = self.client.openai.chat.completions.with_raw_response.create
            fields |= {"messages": request.messages, "max_completion_tokens": limit}
        else:
            create = self.client.openai.completions.with_raw_response.create
            fields |= {"prompt": [ids], "max_tokens": limit}
        try:
            said = self.client.ask(lambda: create(**fields), read_answer)
        except FAILURES as error:
            if no_room(error):
                return too_long(request)
            raise self.client.explained(error) from None
        if said.tokens is not None and said.tokens > limit:
            raise RuntimeError(
                f"{self.client.where}: made {said.tokens} tokens where {limit} were the most; it doesn't know "
                f"{'max_completion_tokens' if self.settings.endpoint == 'chat' else 'max_tokens'}"
            )
        text, tokens = said.text.strip(), said.tokens
        if tokens is None:
            if self.codec is None:
                raise RuntimeError(f"{self.client.where}: doesn't say how many tokens it made (usage)")
            tokens = len(self.codec.tokenizer.encode(text, add_special_tokens=False)) + (said.end == "stop")
        text = before(said.text, self.task.until)
        end = said.end if text == said.text else "stop"
        return Completion(request.key, text.strip(), tokens, end, len(ids) if said.read is None else said.read)
