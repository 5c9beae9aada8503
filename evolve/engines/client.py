"""A server that speaks OpenAI's protocol, for whoever asks it: its model, tries, what it says, errors in one line.

The engine and the benchmarks' judges do. A server is one that runs, or one that is started (serve.py).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar
from urllib.parse import urlsplit

import openai

from evolve.engines.serve import Served

# How an answer ended, in our words; one that a filter cut off was cut off. Any other end is no answer.
ENDS = {"stop": "stop", "length": "length", "content_filter": "length"}
NO_ROOM = re.compile(r"context[ _-]?(length|size|window)", re.IGNORECASE)  # in what refuses a prompt
NO_ROUTE = (404, 405, 501)
REFUSED = (400, 413, 422)  # this request, whoever sends it
LONGEST_PAUSE = 120.0  # seconds, whatever a server asks for
RUBBISH = (ValueError, LookupError, TypeError, AttributeError, RecursionError)  # of reading what is no such JSON

T = TypeVar("T")


class NoAnswer(Exception):
    """A body that is not what was asked for; its text."""


FAILURES = (openai.APIError, NoAnswer)  # what a try may end with


class Said(NamedTuple):
    """What an answer's JSON says; what the server doesn't give is None."""

    text: str
    end: str
    tokens: int | None
    read: int | None
    logprobs: list[dict[str, Any]] | None


def read_models(body: str) -> dict[str, dict[str, Any]]:
    """GET /models: what is said of each model, by its name."""
    return {str(entry["id"]): dict(entry) for entry in json.loads(body)["data"]}


def read_answer(body: str, silent: bool = False) -> Said:
    """POST /completions or /chat/completions. Raises one of RUBBISH if it isn't one answer in text.

    silent: no text at all is an answer too, an empty one, and not only where it was cut off before there was any.
    """
    answer = json.loads(body)
    choice = answer["choices"][0]
    text, end = choice["message"]["content"] if "message" in choice else choice["text"], ENDS[choice["finish_reason"]]
    if text is None and (silent or end != "stop"):
        text = ""
    text = _whole(text)
    usage = answer.get("usage") or {}
    tokens, read = (
        count if isinstance(count := usage.get(name), int) else None for name in ("completion_tokens", "prompt_tokens")
    )
    logprobs = choice.get("logprobs")
    logprobs = logprobs.get("content") if isinstance(logprobs, dict) else None
    if logprobs is not None:  # what can't be at all may be said to be -Infinity, which JSON has no word for
        logprobs = json.loads(_whole(json.dumps(logprobs, ensure_ascii=False)), parse_constant=lambda _: -9999.0)
    return Said(text, end, tokens, read, logprobs)


def _whole(text: str) -> str:
    """JSON can hold half a surrogate pair, and UTF-8 can't."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class Settings(Protocol):
    """What a section of the configuration says of a server: fields as in config.Server."""

    @property
    def url(self) -> str | None: ...

    @property
    def serve(self) -> str | None: ...

    @property
    def model(self) -> str | None: ...

    @property
    def key(self) -> str: ...

    @property
    def timeout(self) -> float: ...

    @property
    def retries(self) -> int: ...


class Client:
    """Raises ValueError for a setting that the server contradicts, RuntimeError for a server that doesn't answer.

    Args:
        section: whose settings they are, for errors.
        folder: the model's, for a server that is started.
        crowd: the setting of how many requests are under way at once.
        wait: waits that many seconds between tries.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path | None,
        section: str = "engine",
        crowd: str = "batch_size",
        wait: Callable[[float], object] = time.sleep,
    ):
        self.settings, self.section, self._crowd, self._wait = settings, section, f"{section}.{crowd}", wait
        self._key = _key(settings, section)
        self.served: Served | None = None
        self.where, url = f"{section}.url={settings.url}", settings.url
        with contextlib.ExitStack() as opened:
            if settings.serve is not None:
                assert folder is not None, "a server that is started is started for a model"
                self.served = Served(settings.serve, folder, settings.timeout, section)
                opened.callback(self.served.close)
                self.where, url = f"{section}.serve: its server", self.served.url
            self.openai = openai.OpenAI(
                base_url=url,
                api_key=self._key or "none",
                timeout=openai.Timeout(settings.timeout, connect=min(settings.timeout, 10)),
                max_retries=0,  # `again` tries again: it knows what is no answer, too
                http_client=openai.DefaultHttpxClient(trust_env=self.served is None),  # no proxy to this machine
            )
            opened.callback(self.openai.close)
            self.model, self.entry = self._find_model()
            self.close = opened.pop_all().close

    def _find_model(self) -> tuple[str, dict[str, Any]]:
        """The model by the server's name for it, and what the server says of it."""
        wanted = self.settings.model
        try:
            listed = self.ask(self.openai.models.with_raw_response.list, read_models)
        except FAILURES as error:
            status = getattr(error, "status_code", None)
            if status not in NO_ROUTE:
                raise self.explained(error) from None
            if wanted is None:
                raise ValueError(
                    f"{self.where}: has no list of models (GET {self.openai.base_url}models says {status}); set "
                    f"{self.section}.model, or correct the url, which usually ends in /v1"
                ) from None
            return wanted, {}
        names = ", ".join(sorted(listed)) or "none"
        if wanted is None and len(listed) != 1:
            raise ValueError(f"{self.section}.model: not set, and the server has not one model; it has: {names}")
        wanted = wanted or next(iter(listed))
        if wanted not in listed:
            raise ValueError(f"{self.section}.model={wanted}: the server doesn't have it; it has: {names}")
        return wanted, listed[wanted]

    def ask(self, call: Callable[[], Any], read: Callable[[str], T]) -> T:
        """What `read` makes of the body that `call` gives. Raises one of FAILURES once no further try may help."""
        return self.again(lambda: self.once(call, read))

    def once(self, call: Callable[[], Any], read: Callable[[str], T]) -> T:
        """`ask` in one try."""
        said = call().text
        try:
            return read(said)
        except RUBBISH:
            raise NoAnswer(said) from None

    def again(self, once: Callable[[], T]) -> T:
        """`once`, tried again after what may pass."""
        for attempt in range(self.settings.retries):
            try:
                return once()
            except FAILURES as error:
                if not passes(error):
                    raise
                self._wait(_pause(error, attempt))
        return once()

    def explained(self, error: Exception) -> Exception:
        """One line for one of FAILURES. The client's own text is not shown: it may hold what was sent."""
        if isinstance(error, NoAnswer):
            return RuntimeError(
                f"{self.where}: answers, but not as OpenAI's protocol has it; is it such a server? It said: "
                f"{self._start(str(error))}"
            )
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            which = "the key in" if self._key else "a key is wanted, and there is none in"
            return ValueError(
                f"{self.where}: {which} the environment variable {self.settings.key} ({self.section}.key)"
                f"{' is refused' if self._key else ''} ({error.status_code})"
            )
        tries = f"{self.settings.retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            return RuntimeError(
                f"{self.where}: no answer within {self.section}.timeout={self.settings.timeout:g} s, {tries}; raise "
                f"it, or lower {self._crowd}"
            )
        if isinstance(error, openai.APIConnectionError):
            if self.served is not None and self.served.ended:
                return RuntimeError(f"{self.where} ended; its last line: {self._start(self.served.last_line)}")
            why = self._start(str(error.__cause__ or error))
            return RuntimeError(f"{self.where}: can't be reached, {tries} ({why}); start it, or correct the url")
        return RuntimeError(f"{self.where}: says error {getattr(error, 'status_code', '')}: {self.words(error)}")

    def words(self, error: Exception) -> str:
        """What the server said is wrong, as a line."""
        return self._start(_words(error))

    def _start(self, text: str) -> str:
        """Of what a server said, for an error: a line, without the key."""
        line = " ".join((text.replace(self._key, "***") if self._key else text).split())
        return (line[:200] or "(nothing)") + ("..." if len(line) > 200 else "")


def passes(error: Exception) -> bool:
    """Whether the same request may be answered a little later; a server's own word on that counts."""
    if not isinstance(error, openai.APIStatusError):
        return True
    said = error.response.headers.get("x-should-retry")
    return said == "true" or (said != "false" and (error.status_code in (408, 409, 429) or error.status_code >= 500))


def refuses(error: Exception) -> bool:
    """Whether it is this request that the server won't have."""
    return getattr(error, "status_code", None) in REFUSED and not passes(error)


def no_room(error: Exception) -> bool:
    """Whether the request was refused because it is longer than the server holds."""
    return refuses(error) and NO_ROOM.search(_words(error)) is not None


def _pause(error: Exception, attempt: int) -> float:
    """Seconds until the next try: what the server asks for, or twice as long each time."""
    headers = error.response.headers if isinstance(error, openai.APIStatusError) else {}
    for header, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        asked = headers.get(header, "")
        with contextlib.suppress(ValueError):
            seconds = float(asked) / unit
            if math.isfinite(seconds):
                return min(max(seconds, 0.0), LONGEST_PAUSE)
        with contextlib.suppress(ValueError):
            return min(max(parsedate_to_datetime(asked).timestamp() - time.time(), 0.0), LONGEST_PAUSE)
    return min(0.5 * 2.0 ** min(attempt, 9), 8.0)


def _words(error: Exception) -> str:
    body: Any = getattr(error, "body", None)
    message = body.get("message") if isinstance(body, dict) else None
    if isinstance(message, str):
        return message
    return error.response.text if isinstance(error, openai.APIStatusError) else str(error)


def _key(settings: Settings, section: str) -> str:
    """What the environment variable holds; '' where it isn't set. Raises ValueError where a key must be there."""
    key = os.environ.get(settings.key, "").strip()
    if not key and (urlsplit(settings.url or "").hostname or "").endswith("openai.com"):
        raise ValueError(f"{section}.url={settings.url}: wants a key; set the environment variable {settings.key}")
    if not (key.isascii() and key.isprintable() and " " not in key):  # an HTTP header can't hold it, and would say so
        raise ValueError(f"the environment variable {settings.key} ({section}.key) holds characters that no key has")
    return key
