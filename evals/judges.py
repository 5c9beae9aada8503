"""A benchmark's judge behind any server that speaks OpenAI's protocol: cached, retried, and never dearer than allowed.

Every reply is kept (paid.py). Requests are sent `concurrency` at once; what fails is tried again, and once more after
all the rest is done, for as long as that gets any of it.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from evals.games import Ask, Reply
from evals.paid import Cache, Ledger, OverCap, Paid, Stopped
from evolve.config import Endpoint, Price
from evolve.store import digest

# How many tries in a row end a pass (or as many as are under way): the server is down, so the rest needn't find out.
DOWN = 8
NO_LOGPROBS = "without logprobs"
ALL_REFUSED = 5  # so many refused and none answered: the server won't have such requests, whatever they ask
# What a request that was never sent ends with, by name: httpx's, of whichever release the client uses.
NOT_SENT = ("ConnectError", "ConnectTimeout", "PoolTimeout")


@dataclass(frozen=True)
class Verdict:
    """What came of one ask: a benchmark's verdict, or None and `why`.

    tokens and dollars are of all its attempts, whenever they were paid; `paid` is what of the dollars this call spent.
    """

    verdict: Any
    reply: Reply | None
    read: int
    generated: int
    dollars: float
    paid: float
    attempts: int
    cached: bool
    why: str | None = None


class _Later(Exception):
    """A request whose tries are used up; why, as one line."""


def _identity(endpoint: Endpoint, cache: Path, folder: Path | None, *, plan: bool = False) -> str:
    """Which model it is that is asked: by the server's name for it; of one that is started, its weights and how."""
    if endpoint.serve is None:
        return endpoint.model
    from evolve.sources import Resolver

    weights = Resolver(cache / "digests", unpinned=plan).model(str(folder), None, "the judge's model")
    return f"{endpoint.model}@{weights.digest}@{digest(endpoint.serve)[:16]}"


def _request(model: str, ask: Ask, attempt: int) -> dict[str, Any]:
    """What decides a reply; its digest is the reply's key. The first attempt is sent as the benchmark wants it."""
    return {"model": model, "messages": ask.messages, "fields": dict(ask.fields), "attempt": attempt}


def _fields(ask: Ask, attempt: int) -> dict[str, Any]:
    return {**ask.fields, "seed": ask.fields.get("seed", 0) + attempt} if attempt else dict(ask.fields)


def _limit(ask: Ask) -> int | None:
    """The most tokens that may be generated."""
    return ask.fields.get("max_completion_tokens", ask.fields.get("max_tokens"))


def _dollars(price: Price | None, read: float, generated: float) -> float:
    return (read * price.input + generated * price.output) / 1e6 if price else 0.0


def _text(ask: Ask) -> str:
    return json.dumps(ask.messages, ensure_ascii=False)


def estimate(asks: Sequence[Ask], endpoint: Endpoint, cache: Path, folder: Path | None = None) -> dict[str, Any]:
    """What is still to be paid for, roughly: a token is 4 characters, and answers are as long as they may be.

    Returns {"requests", "cached": of all, how many need no request, "tokens": {"read", "generated"}, "dollars": None
    without a price}.
    """
    model, kept = _identity(endpoint, cache, folder, plan=True), Cache(cache)
    different = {digest(_request(model, ask, 0)): ask for ask in asks}
    missing = [ask for key, ask in different.items() if not kept.path(key).exists()]
    read, generated = sum(len(_text(ask)) for ask in missing) // 4, sum(_limit(ask) or 0 for ask in missing)
    return {
        "requests": len(missing),
        "cached": len(different) - len(missing),
        "tokens": {"read": read, "generated": generated},
        "dollars": _dollars(endpoint.price, read, generated) if endpoint.price else None,
    }


class Judge:
    """Asks one model for verdicts. A server is looked for, or started, with the first request that the cache lacks.

    Args:
        cache: the folder of all replies.
        folder: of the model, for endpoint.serve.
        section: where the endpoint stands in the configuration, for errors.
    """

    def __init__(self, endpoint: Endpoint, cache: Path, folder: Path | None = None, section: str = "annotator"):
        self.endpoint, self.folder, self.section = endpoint, folder, section
        self.model = _identity(endpoint, cache, folder)
        self.cache = Cache(cache)
        ledger = cache / "ledger" / digest(self.model)[:16]
        self.ledger = Ledger(ledger, self.model, endpoint.max_dollars, self.cache, endpoint.timeout)
        self._opening, self._opened = threading.Lock(), contextlib.ExitStack()
        self._opened.callback(self.ledger.close)
        self._client: Any = None
        self._stop = threading.Event()
        self._answered = 0
        self._refused: list[str] = []
        self._logprobs, self._without = False, 0  # whether any reply has had them; verdicts that lacked them

    def close(self) -> None:
        self._opened.close()

    def ask(self, asks: Sequence[Ask], read: Callable[[Ask, Reply], Any | None]) -> Iterator[tuple[int, Verdict]]:
        """(index, verdict) as they come, each index once.

        Raises, in one line and after all that was under way has been given back:
            ValueError: a setting that can't be: the key, the model's name, what verdicts are read from.
            RuntimeError: no server, one that refuses everything, verdicts that are missing, the cap reached.
        """
        if any(ask.fields.get("logprobs") for ask in asks) and not self.endpoint.logprobs:
            raise ValueError(
                f"{self.section}.logprobs=false: the verdicts asked for are read from tokens' probabilities; take "
                "verdicts in words, or a server that gives logprobs"
            )
        groups: dict[str, list[int]] = {}  # equal requests are asked once
        for index, ask in enumerate(asks):
            groups.setdefault(digest(_request(self.model, ask, 0)), []).append(index)
        self._stop.clear()
        self._answered, self._refused, self._logprobs, self._without = 0, [], False, 0
        # What is kept comes first: what ends the call leaves none of it unread.
        first = sorted(groups, key=lambda key: not self.cache.path(key).exists())
        left, missing, last_chance = [groups[key] for key in first], len(asks), False
        while left:
            failed: list[list[int]] = []
            for group, found in self._pass(left, asks, read):
                if isinstance(found, _Later):
                    error = found
                    failed.append(group)
                elif isinstance(found, OverCap):
                    raise RuntimeError(
                        f"{self.section}.max_dollars={self.endpoint.max_dollars:g}: {found.spent:.6g} dollars are "
                        f"spent on {self.endpoint.model}, and the next request may cost {found.bound:.2g}; {missing} "
                        f"of {len(asks)} verdicts missing; what is paid is kept, and with a higher cap the same "
                        "command asks for these alone"
                    )
                elif isinstance(found, Exception):
                    raise found
                else:
                    missing -= len(group)
                    yield from zip(group, found, strict=True)
            if failed and last_chance and len(failed) == len(left):
                raise RuntimeError(
                    f"{missing} of {len(asks)} verdicts missing: {error}; the same command asks for these alone"
                )
            left, last_chance = failed, True
        if not self._answered and len(self._refused) >= ALL_REFUSED:
            raise RuntimeError(self._refused[-1])

    def _pass(
        self, groups: Sequence[list[int]], asks: Sequence[Ask], read: Any
    ) -> Iterator[tuple[list[int], list[Verdict] | Exception]]:
        """Each group with its verdicts or why it has none; what ends the call comes last, and nothing behind it."""
        in_a_row = 0
        end: Exception | None = None
        later = _Later()
        done: SimpleQueue[Future[list[Verdict]]] = SimpleQueue()
        pool = ThreadPoolExecutor(self.endpoint.concurrency)
        try:
            futures = {pool.submit(self._judge, [asks[index] for index in group], read): group for group in groups}
            for future in futures:
                future.add_done_callback(done.put)
            for _ in futures:
                future = done.get()
                error = None if future.cancelled() else future.exception()
                if isinstance(error, _Later):
                    in_a_row, later = in_a_row + 1, error
                    if in_a_row >= max(DOWN, self.endpoint.concurrency):
                        pool.shutdown(wait=False, cancel_futures=True)
                elif isinstance(error, Exception):
                    end = error if end is None or isinstance(end, Stopped) else end
                    pool.shutdown(wait=False, cancel_futures=True)
                    continue
                elif not future.cancelled():
                    in_a_row = 0
                    yield futures[future], future.result()
                    continue
                if end is None:
                    yield futures[future], later
        finally:
            self._stop.set()  # of interest only where not all is done
            pool.shutdown(wait=True, cancel_futures=True)
        if end is not None:
            yield [], end
        self._stop.clear()

    def _judge(self, asks: Sequence[Ask], read: Any) -> list[Verdict]:
        """The verdicts of asks that are the same request, one after another: only the first can find no reply."""
        try:
            return [self._verdict(ask, read) for ask in asks]
        except _Later:
            raise
        except Exception:
            self._stop.set()  # at once: what is under way is waited for, and no more is sent
            raise

    def _verdict(self, ask: Ask, read: Any) -> Verdict:
        from evolve.engines.client import FAILURES, no_room, passes, refuses

        had: list[Paid] = []
        paid, asked = 0.0, 0

        def verdict(value: Any, why: str | None = None) -> Verdict:
            tokens = sum(one.read or 0 for one in had), sum(one.generated or 0 for one in had)
            reply = had[-1].reply if had else None
            dollars = math.fsum(one.dollars for one in had)
            return Verdict(value, reply, *tokens, dollars, paid, len(had), not asked, why)

        for attempt in range(self.endpoint.attempts):
            request = _request(self.model, ask, attempt)
            key = digest(request)
            found = self.cache.get(key)
            if found is None:
                client = self._server()
                patience = self.endpoint.timeout * (self.endpoint.retries + 1)
                try:
                    with self.cache.asking(key, self._stop, patience) as found:
                        if found is None:
                            asked += 1
                            found = client.again(lambda: self._pay(key, request, ask, attempt))  # noqa: B023
                            paid += found.dollars
                except FAILURES as error:
                    if refuses(error):
                        self._refused.append(f"{client.where}: refuses all requests: {client.words(error)}")
                        return verdict(None, "too long for the judge" if no_room(error) else "refused by the server")
                    explained = client.explained(error)
                    raise (_Later(str(explained)) if passes(error) else explained) from None
            self._answered += 1
            had.append(found)
            self._logprobs |= found.reply.logprobs is not None
            value = read(ask, found.reply)
            if value is not None:
                return verdict(value)
        if (why := _why(ask, had[-1].reply)) == NO_LOGPROBS:
            self._check_logprobs()
        return verdict(None, why)

    def _check_logprobs(self) -> None:
        """Raises ValueError once it is clear that the server never gives them: the rest would be paid in vain."""
        self._without += 1
        if self._without >= ALL_REFUSED and not self._logprobs:
            raise ValueError(
                f"{self.section}.logprobs=true: the server gives no log-probabilities ({self._without} verdicts lack "
                f"them); set {self.section}.logprobs=false, where the label in the judge's words counts"
            )

    def _server(self) -> Any:
        from evolve.engines.client import Client

        with self._opening:
            if self._stop.is_set():
                raise Stopped
            if self._client is None:
                self._client = Client(self.endpoint, self.folder, self.section, "concurrency", self._stop.wait)
                self._opened.callback(self._client.close)
            return self._client

    def _pay(self, key: str, request: Mapping[str, Any], ask: Ask, attempt: int) -> Paid:
        """One try, from what it may cost to what it did."""
        import openai

        from evolve.engines.client import FAILURES, read_answer

        if self._stop.is_set():
            raise Stopped
        price, limit = self.endpoint.price, _limit(ask)
        if self.endpoint.max_dollars is not None and limit is None:
            raise ValueError(f"{self.section}.max_dollars: a request without max_tokens may cost anything")
        bound = _dollars(price, len(_text(ask).encode()), limit or 0)
        if price:
            self.ledger.reserve(key, bound, self._stop)
        cost = bound  # of what ends without word of it
        try:
            create = self._client.openai.chat.completions.with_raw_response.create
            body = {"model": self._client.model, "messages": ask.messages, "extra_body": _fields(ask, attempt)}
            said = self._client.once(lambda: create(**body), lambda text: read_answer(text, silent=True))
            if said.read is not None and said.tokens is not None:
                cost = _dollars(price, said.read, said.tokens)
            paid = Paid(Reply(said.text, said.end, said.logprobs), said.read, said.tokens, cost, self.ledger.name)
            self.cache.put(key, request, paid)
            return paid
        except FAILURES as error:
            if isinstance(error, openai.APIStatusError) or type(error.__cause__).__name__ in NOT_SENT:
                cost = 0.0
            raise
        finally:
            if price:
                self.ledger.settle(key, cost)


def _why(ask: Ask, reply: Reply) -> str:
    """Why the last reply gave no verdict."""
    if ask.fields.get("logprobs") and reply.logprobs is None:
        return NO_LOGPROBS
    if not reply.text.strip():
        return "empty"
    return "cut off" if reply.end == "length" else "can't be read"
