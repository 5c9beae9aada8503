"""Any server that speaks OpenAI's protocol: one that runs, or one that is started for the stage's model (serve.py).

The server draws, each answer from its request's seed; how much of that holds whatever else is in its batch is the
server's matter. It stops where the model's own files say, as Codec does.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import PriorityQueue, SimpleQueue
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import openai

from evolve.config import Server
from evolve.engines import Codec, Completion, Request, Task, before, too_long
from evolve.engines.serve import Served

# How an answer ended, in our words; one that a filter cut off was cut off. Any other end is no answer.
ENDS = {"stop": "stop", "length": "length", "content_filter": "length"}
NO_ROOM = re.compile(r"context[ _-]?(length|size|window)", re.IGNORECASE)  # in what refuses a prompt
NO_ROUTE = (404, 405, 501)
# Who takes more fields than OpenAI has, as their lists of models name them; other servers may refuse such a request.
# Unless told, these draw by the model's own habits (its generation_config.json), which are not part of the experiment.
MORE_FIELDS = ("vllm", "sglang")
RUBBISH = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of reading what is no such JSON

T = TypeVar("T")


class Said(NamedTuple):
    """What an answer's JSON says; a count is None where the server gives none."""

    text: str
    end: str
    tokens: int | None
    read: int | None


def read_models(body: str) -> dict[str, dict[str, Any]]:
    """GET /models: what is said of each model, by its name."""
    return {str(entry["id"]): dict(entry) for entry in json.loads(body)["data"]}


def read_answer(body: str) -> Said:
    """POST /completions or /chat/completions. Raises one of RUBBISH if it isn't one answer in text."""
    answer = json.loads(body)
    choice = answer["choices"][0]
    text, end = choice["message"]["content"] if "message" in choice else choice["text"], ENDS[choice["finish_reason"]]
    if text is None and end != "stop":  # cut off before there was any
        text = ""
    # JSON can hold half a surrogate pair, and UTF-8 can't.
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").strip()
    usage = answer.get("usage") or {}
    tokens, read = (
        count if isinstance(count := usage.get(name), int) else None for name in ("completion_tokens", "prompt_tokens")
    )
    return Said(text, end, tokens, read)


class OpenAIEngine:
    """Raises ValueError for a setting that the server contradicts, RuntimeError for a server that doesn't answer."""

    def __init__(self, settings: Server, task: Task):
        self.settings, self.task = settings, task
        self.codec = Codec(task) if task.model is not None else None  # None: of a model that only the server knows
        if self.codec is None and settings.endpoint == "completions":
            raise ValueError("engine.endpoint=completions: sends token ids, which want the model's files; set chat")
        self._key = _key(settings)
        self._served: Served | None = None
        self._where, url = f"engine.url={settings.url}", settings.url
        with contextlib.ExitStack() as opened:
            if settings.serve is not None:
                self._served = Served(settings.serve, task.folder, settings.timeout)
                opened.callback(self._served.close)
                self._where, url = "engine.serve: its server", self._served.url
            self.client = openai.OpenAI(
                base_url=url,
                api_key=self._key or "none",
                timeout=openai.Timeout(settings.timeout, connect=min(settings.timeout, 10)),
                max_retries=settings.retries,
                http_client=openai.DefaultHttpxClient(trust_env=self._served is None),  # no proxy to this machine
            )
            opened.callback(self.client.close)
            self._fields = self._find_model()
            self._close = opened.pop_all().close
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
        self._close()

    def _find_model(self) -> dict[str, Any]:
        """What every request says: the model by the server's name for it, and how to draw."""
        sampling, wanted = self.task.sampling, self.settings.model
        entry: dict[str, Any] = {}
        try:
            listed = self._ask(self.client.models.with_raw_response.list, read_models)
        except openai.APIError as error:
            status = getattr(error, "status_code", None)
            if status not in NO_ROUTE:
                raise self._explained(error) from None
            if wanted is None:
                raise ValueError(
                    f"{self._where}: has no list of models (GET {self.client.base_url}models says {status}); set "
                    "engine.model, or correct the url, which usually ends in /v1"
                ) from None
        else:
            names = ", ".join(sorted(listed)) or "none"
            if wanted is None and len(listed) != 1:
                raise ValueError(f"engine.model: not set, and the server has not one model; it has: {names}")
            wanted = wanted or next(iter(listed))
            if wanted not in listed:
                raise ValueError(f"engine.model={wanted}: the server doesn't have it; it has: {names}")
            entry = listed[wanted]
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
            "model": wanted,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": more or None,
            **({"stop": list(self.task.until[:4])} if self.task.until else {}),  # OpenAI's takes no more
        }

    def _next(self) -> Completion:
        request, ids = self._waiting.get_nowait()
        limit, fields = self.task.max_new_tokens, {**self._fields, "seed": request.seed}
        try:
            if self.settings.endpoint == "chat":
                fields |= {"messages": request.messages, "max_completion_tokens": limit}
                said = self._ask(lambda: self.client.chat.completions.with_raw_response.create(**fields), read_answer)
            else:
                fields |= {"prompt": [ids], "max_tokens": limit}
                said = self._ask(lambda: self.client.completions.with_raw_response.create(**fields), read_answer)
        except openai.APIError as error:
            if getattr(error, "status_code", None) in (400, 413, 422) and NO_ROOM.search(_words(error)):
                return too_long(request)
            raise self._explained(error) from None
        if said.tokens is not None and said.tokens > limit:
            raise RuntimeError(
                f"{self._where}: made {said.tokens} tokens where {limit} were the most; it doesn't know "
                f"{'max_completion_tokens' if self.settings.endpoint == 'chat' else 'max_tokens'}"
            )
        tokens = said.tokens
        if tokens is None:
            if self.codec is None:
                raise RuntimeError(f"{self._where}: doesn't say how many tokens it made (usage)")
            tokens = len(self.codec.tokenizer.encode(said.text, add_special_tokens=False)) + (said.end == "stop")
        text = before(said.text, self.task.until)
        end = said.end if text == said.text else "stop"
        return Completion(request.key, text.strip(), tokens, end, len(ids) if said.read is None else said.read)

    def _ask(self, ask: Callable[[], Any], read: Callable[[str], T]) -> T:
        """The client itself asks again after what is an error; this does after what is no answer."""
        said = ""
        for attempt in range(self.settings.retries + 1):
            if attempt:
                time.sleep(min(0.5 * 2 ** (attempt - 1), 8))  # as the client
            said = ask().text
            with contextlib.suppress(*RUBBISH):
                return read(said)
        raise RuntimeError(
            f"{self._where}: answers, but not as OpenAI's protocol has it; is it such a server? It said: "
            f"{self._start(said)}"
        )

    def _explained(self, error: openai.APIError) -> Exception:
        """One line for an error of the client's. The client's own text is not shown: it may hold what was sent."""
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            which = "the key in" if self._key else "a key is wanted, and there is none in"
            return ValueError(
                f"{self._where}: {which} the environment variable {self.settings.key} (engine.key)"
                f"{' is refused' if self._key else ''} ({error.status_code})"
            )
        tries = f"{self.settings.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return RuntimeError(
                f"{self._where}: no answer within engine.timeout={self.settings.timeout:g} s, {tries}; raise it, or "
                "lower engine.batch_size"
            )
        if isinstance(error, openai.APIConnectionError):
            if self._served is not None and self._served.ended:
                return RuntimeError(f"{self._where} ended; its last line: {self._start(self._served.last_line)}")
            why = self._start(str(error.__cause__ or error))
            return RuntimeError(f"{self._where}: can't be reached, {tries} ({why}); start it, or correct the url")
        status = getattr(error, "status_code", "")
        return RuntimeError(f"{self._where}: says error {status}: {self._start(_words(error))}")

    def _start(self, text: str) -> str:
        """Of what a server said, for an error: a line, without the key."""
        line = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return (line[:200] or "(nothing)") + ("..." if len(line) > 200 else "")


def _words(error: openai.APIError) -> str:
    """What the server said is wrong."""
    body: Any = error.body
    message = body.get("message") if isinstance(body, dict) else None
    if isinstance(message, str):
        return message
    return error.response.text if isinstance(error, openai.APIStatusError) else error.message


def _key(settings: Server) -> str:
    """What the environment variable holds; '' where it isn't set. Raises ValueError where a key must be there."""
    key = os.environ.get(settings.key, "").strip()
    if not key and (urlsplit(settings.url or "").hostname or "").endswith("openai.com"):
        raise ValueError(f"engine.url={settings.url}: wants a key; set the environment variable {settings.key}")
    if not (key.isascii() and key.isprintable() and " " not in key):  # an HTTP header can't hold it, and would say so
        raise ValueError(f"the environment variable {settings.key} (engine.key) holds characters that no key has")
    return key
