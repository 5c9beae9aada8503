"""Judges on a real server that is broken on purpose, and the money they spend."""

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from pydantic import ValidationError

from evals.games import Ask
from evals.judges import Endpoint, Judge, estimate
from evals.paid import Cache, Ledger, OverCap, Stopped
from evolve.config import ROOT
from evolve.store import digest

KEY = "EVOLVE_TEST_KEY"
SECRET = "sk-a-very-secret-key"
PRICE = {"input": 1000, "output": 4000}  # dollars for a million tokens
READ, MADE = 40, 3  # what the server says that it read and made
USAGE = {"prompt_tokens": READ, "completion_tokens": MADE}
REQUEST = {"model": "m", "messages": [], "fields": {}, "attempt": 0}
OTHER = {**REQUEST, "attempt": 1}


def verdict(messages):
    return "AB"[hashlib.sha256(json.dumps(messages).encode()).digest()[0] % 2]


class Fake(ThreadingHTTPServer):
    """Judges by what is asked alone. `trouble(body, n)`: what goes wrong with the n-th request for these messages."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.trouble = lambda body, n: None
        self.models = ["judge"]
        self.lock = threading.Lock()
        self.asked, self.whole = Counter(), Counter()  # by messages and seed: requests, and those answered whole
        self.keys, self.bodies, self.times = set(), [], []
        self.under_way = self.most = 0

    def handle_error(self, request, client_address):
        pass


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.say(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = json.dumps([body["messages"], body.get("seed")])
        with server.lock:
            server.asked[key] += 1
            server.bodies.append(body)
            server.times.append(time.monotonic())
            server.keys.add(self.headers["Authorization"])
            number = sum(count for asked, count in server.asked.items() if json.loads(asked)[0] == body["messages"])
            server.under_way += 1
            server.most = max(server.most, server.under_way)
        try:
            self.answer(body, key, server.trouble(body, number))
        finally:
            with server.lock:
                server.under_way -= 1

    def answer(self, body, key, trouble):
        text = f"[[{verdict(body['messages'])}]]"
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [{"token": text, "logprob": -0.1, "bytes": None, "top_logprobs": []}]}
        answer = {"choices": [choice], "usage": USAGE}
        if isinstance(trouble, dict):  # an answer all the same, but another one
            choice |= trouble
        if isinstance(trouble, float):
            time.sleep(trouble)
        if isinstance(trouble, tuple):
            self.say(*trouble)
        elif trouble in ("closed", "cut"):
            if trouble == "cut":
                raw = json.dumps(answer).encode()
                self.head(200, len(raw))
                self.wfile.write(raw[: len(raw) // 2])
            self.close_connection = True
        else:
            self.say(200, answer)
            with self.server.lock:
                self.server.whole[key] += 1

    def head(self, status, length, headers=None):
        self.send_response(status)
        for name, value in {"Content-Length": length, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()

    def say(self, status, said, headers=None):
        raw = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.head(status, len(raw), headers)
        self.wfile.write(raw)


@pytest.fixture
def server():
    with Fake() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        yield fake
        fake.shutdown()


def endpoint(url, **values):
    defaults = {"serve": None, "model": "judge", "key": KEY, "logprobs": True, "concurrency": 8, "timeout": 10}
    return Endpoint(name="fake", url=url, **{**defaults, "retries": 2, **values})


def asking(number, first=True, **fields):
    return Ask([{"role": "user", "content": f"Which is better? {number} {first}"}], {"max_tokens": 5, **fields}, first)


ASKS = [asking(n, first) for n in range(20) for first in (True, False)]
HEALTHY = {index: verdict(ask.messages) == ("A" if ask.answer_first else "B") for index, ask in enumerate(ASKS)}


def read(ask, reply):
    """Whether the answer won; None: it can't be read."""
    if ask.fields.get("logprobs") and reply.logprobs is None:
        return None
    shown = {"[[A]]": True, "[[B]]": False}.get(reply.text)
    return None if shown is None else shown == ask.answer_first


def judged(server, folder, asks=ASKS, **values):
    with contextlib.closing(Judge(endpoint(server.url, **values), folder)) as judge:
        return dict(judge.ask(asks, read))


def verdicts(found):
    return {index: verdict.verdict for index, verdict in found.items()}


# ---- what is asked, and kept


def test_every_ask_gets_its_verdict_once_and_all_are_kept(server, tmp_path):
    server.trouble = lambda body, n: time.sleep(0.1)  # so that requests meet
    found = judged(server, tmp_path, price=PRICE)
    assert verdicts(found) == HEALTHY and set(HEALTHY.values()) == {True, False}
    assert len(server.bodies) == len(ASKS) and 1 < server.most <= 8
    assert all(body.keys() == {"model", "messages", "max_tokens"} for body in server.bodies)
    one = found[0]
    assert (one.read, one.generated, one.attempts, one.cached, one.why) == (READ, MADE, 1, False, None)
    assert one.dollars == one.paid == pytest.approx((READ * 1000 + MADE * 4000) / 1e6)

    server.shutdown()
    again = judged(server, tmp_path, price=PRICE)
    assert again == {index: replace(verdict, paid=0.0, cached=True) for index, verdict in found.items()}


def test_a_reply_is_its_requests_whoever_answers(server, tmp_path):
    """The address, the key and the price are no part of what is asked; model, messages, fields and attempt are."""
    judged(server, tmp_path, ASKS[:1])
    with Fake() as other:
        judged(other, tmp_path, ASKS[:1], key="ANOTHER_KEY", price=PRICE, timeout=5)
        assert not other.bodies
    server.models.append("another")
    judged(server, tmp_path, ASKS[:1], model="another")
    judged(server, tmp_path, [asking(0, temperature=1)])
    judged(server, tmp_path, [Ask([*ASKS[0].messages, {"role": "user", "content": ""}], ASKS[0].fields, True)])
    assert len(server.bodies) == 4


def test_equal_requests_are_asked_once(server, tmp_path):
    """Each is read for itself: of two equal answers either may be shown first."""
    same = [Ask(ASKS[0].messages, ASKS[0].fields, first) for first in (True, False)] * 4
    server.trouble = lambda body, n: 0.1
    found = judged(server, tmp_path, same)
    assert len(server.bodies) == 1
    assert verdicts(found) == {n: HEALTHY[0] == (n % 2 == 0) for n in range(8)}
    assert sum(verdict.cached for verdict in found.values()) == 7


def test_who_stops_early_keeps_what_was_under_way(server, tmp_path):
    server.trouble = lambda body, n: 0.1
    with contextlib.closing(Judge(endpoint(server.url), tmp_path)) as judge:
        verdicts = judge.ask(ASKS, read)
        next(verdicts)
        verdicts.close()
    assert len(list(tmp_path.glob("??/*.json"))) == len(server.bodies) < 40
    assert {index: one.verdict for index, one in judged(server, tmp_path).items()} == HEALTHY
    assert len(server.bodies) == 40


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"checksum": 1}', None], ids=repr)
def test_a_damaged_reply_is_asked_again_and_said(server, tmp_path, capfd, damage):
    judged(server, tmp_path, ASKS[:2])
    file = min(tmp_path.glob("??/*.json"))
    changed = file.read_text().replace("[[A]]", "[[C]]").replace("[[B]]", "[[C]]").encode()
    file.write_bytes(changed if damage is None else damage)
    assert verdicts(judged(server, tmp_path, ASKS[:2])) == {index: HEALTHY[index] for index in range(2)}
    assert len(server.bodies) == 3
    assert f"{file}: not what was written; asked again" in capfd.readouterr().out
    assert len(judged(server, tmp_path, ASKS[:2])) == 2 and len(server.bodies) == 3


# ---- broken on purpose

GARBAGE = (200, "<html>Welcome!</html>")
TROUBLES = {
    "429": (429, {"error": {"message": "slow down"}}, {"Retry-After": "0.3"}),
    "500": (500, "<html>Oops"),
    "slow": 1.5,
    "closed": "closed",
    "cut": "cut",
    "empty body": (200, ""),
    "no JSON": GARBAGE,
    "half a JSON": (200, '{"choices": [{"mess'),
    "empty verdict": {"message": {"role": "assistant", "content": ""}},
    "no text": {"message": {"role": "assistant", "content": None}},
    "malformed": {"message": {"role": "assistant", "content": "I think that [["}},
    "no logprobs": {"logprobs": None},
}
UNREADABLE = ("empty verdict", "no text", "malformed", "no logprobs")


@pytest.mark.parametrize("case", TROUBLES)
def test_a_server_that_recovers_changes_no_verdict(server, tmp_path, case):
    """Each answer that was given whole is paid once."""
    asks = [replace(ask, fields={**ask.fields, "logprobs": True}) for ask in ASKS]
    server.trouble = lambda body, n: TROUBLES[case] if n == 1 else None
    found = judged(server, tmp_path, asks, timeout=1, concurrency=40, price=PRICE, max_dollars=100)
    assert verdicts(found) == HEALTHY
    assert set(server.asked.values()) == ({1} if case in UNREADABLE else {2})
    if case != "slow":  # there the server finishes for nobody
        assert set(server.whole.values()) == {1}
    seeds = Counter(body.get("seed") for body in server.bodies)
    assert seeds == ({None: 40, 1: 40} if case in UNREADABLE else {None: 80})
    asked, server.trouble = len(server.bodies), None
    again = judged(server, tmp_path, asks)
    assert verdicts(again) == HEALTHY and len(server.bodies) == asked
    attempts = 2 if case in UNREADABLE else 1
    assert {(one.attempts, one.read) for one in again.values()} == {(attempts, attempts * READ)}


def test_all_troubles_at_once(server, tmp_path):
    draw = random.Random(0)
    asks = [replace(ask, fields={**ask.fields, "logprobs": True}) for ask in ASKS]
    passing = [case for case in TROUBLES if case not in UNREADABLE]
    plan = {json.dumps(ask.messages): [TROUBLES[draw.choice(passing)] for _ in range(3)] for ask in asks}
    server.trouble = lambda body, n: dict(enumerate(plan[json.dumps(body["messages"])], 1)).get(n)
    found = judged(server, tmp_path, asks, timeout=1, concurrency=20, retries=1)  # so that a later pass is needed
    assert verdicts(found) == HEALTHY
    assert len(list(tmp_path.glob("??/*.json"))) == len(asks)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "1"}, 1),
        ({"Retry-After": lambda: formatdate(time.time() + 2, usegmt=True)}, 1),  # in whole seconds
        ({"Retry-After-Ms": "900", "Retry-After": "30"}, 0.9),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "soon"}, 0.5),
        ({"Retry-After": "inf"}, 0.5),
        ({}, 0.5),
    ],
    ids=["seconds", "date", "milliseconds", "negative", "words", "infinite", "nothing"],
)
def test_who_is_told_to_wait_waits(server, tmp_path, headers, seconds):
    def trouble(body, n):
        said = {name: value() if callable(value) else value for name, value in headers.items()}
        return (429, "", said) if n == 1 else None

    server.trouble = trouble
    judged(server, tmp_path, ASKS[:1])
    assert seconds <= server.times[1] - server.times[0] < seconds + 1.1


def test_a_server_may_say_that_another_try_is_in_vain(server, tmp_path):
    server.trouble = lambda body, n: (429, {"error": {"message": "no quota"}}, {"x-should-retry": "false"})
    with pytest.raises(RuntimeError, match=r"says error 429: no quota$"):
        judged(server, tmp_path, concurrency=1)
    assert len(server.bodies) <= 2


def test_what_json_should_not_hold_is_kept_whole(server, tmp_path):
    raw = '{"choices": [{"message": {"content": "[[A]] \\ud83d"}, "finish_reason": "stop", "logprobs": {"content": '
    raw += '[{"token": "\\ud83d", "logprob": -Infinity, "top_logprobs": []}]}}], "usage": null}'
    server.trouble = lambda body, n: (200, raw)
    for _ in range(2):
        with contextlib.closing(Judge(endpoint(server.url), tmp_path)) as judge:
            [(_, found)] = judge.ask([asking(0, logprobs=True)], lambda ask, reply: reply.text)
        assert found.reply.text == found.verdict == "[[A]] \ufffd"
        assert found.reply.logprobs == [{"token": "\ufffd", "logprob": -9999.0, "top_logprobs": []}]
    assert len(server.bodies) == 1


SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

class Handler(BaseHTTPRequestHandler):
    def say(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def do_GET(self):
        self.say({"data": [{"id": "judge"}]})

    def do_POST(self):
        self.say({"choices": [{"message": {"content": sys.argv[1]}, "finish_reason": "stop"}]})

HTTPServer(("127.0.0.1", int(sys.argv[2])), Handler).serve_forever()
"""


def test_a_judge_is_started_for_what_the_cache_lacks(tmp_path):
    """It is its weights then, whatever the server calls it, and how they are served."""
    (tmp_path / "server.py").write_text(SERVER)
    serve = f"{sys.executable} {tmp_path / 'server.py'} {{model}} {{port}}"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)
    given = [("one", serve), ("two", serve), ("one", f"{serve} fp8"), ("one", serve)]
    for number, (name, command) in enumerate(given):
        judge = Judge(endpoint(None, serve=command), tmp_path / "cache", tmp_path / name)
        with contextlib.closing(judge):
            [(_, found)] = judge.ask(ASKS[:1], lambda ask, reply: reply.text)
        assert found.verdict == str(tmp_path / name)
        assert found.cached == (number == 3)
    judge = Judge(endpoint(None, serve="none {model} {port}"), tmp_path / "cache", tmp_path / "one")
    with pytest.raises(ValueError, match=r"^annotator.serve: no such command here: none; "):
        list(judge.ask(ASKS[1:2], read))


def test_what_fails_waits_for_the_rest_and_is_asked_alone_next_time(server, tmp_path):
    bad = [json.dumps(ASKS[index].messages) for index in (3, 17)]
    server.trouble = lambda body, n: (503, "no GPU\nleft") if json.dumps(body["messages"]) in bad else None
    with contextlib.closing(Judge(endpoint(server.url, retries=1), tmp_path)) as judge:
        found = {}
        with pytest.raises(RuntimeError) as caught:
            for index, one in judge.ask(ASKS, read):
                found[index] = one.verdict
    assert str(caught.value) == (
        f"2 of 40 verdicts missing: annotator.url={server.url}: says error 503: no GPU left; the same command asks for "
        "these alone"
    )
    assert found == {index: value for index, value in HEALTHY.items() if index not in (3, 17)}
    assert sorted(server.asked.values())[-3:] == [1, 4, 4]  # two passes of two tries
    server.trouble, server.bodies = lambda body, n: None, []
    assert verdicts(judged(server, tmp_path)) == HEALTHY
    assert len(server.bodies) == 2


def test_a_server_that_is_down_is_not_asked_for_everything(server, tmp_path):
    server.trouble = lambda body, n: (500, "down") if len(server.bodies) > 10 else None
    with pytest.raises(RuntimeError, match=r"^30 of 40 verdicts missing: .* says error 500: down; the same"):
        judged(server, tmp_path, retries=0, concurrency=1)
    assert 10 + 2 * 8 <= len(server.bodies) <= 10 + 2 * (8 + 2)  # two passes, each seen to fail a little late


def test_a_server_that_fails_now_and_then_is_not_down(server, tmp_path):
    server.trouble = lambda body, n: (500, "busy") if n == 1 and len(server.bodies) % 2 else None
    assert verdicts(judged(server, tmp_path, retries=0, concurrency=1)) == HEALTHY
    assert [body["messages"] for body in server.bodies[:40]] == [ask.messages for ask in ASKS]


def test_what_can_never_be_read_is_unscored(server, tmp_path):
    for text, end, logprobs, why in (
        ("", "stop", None, "empty"),
        ("Well", "length", None, "cut off"),
        ("Well", "stop", None, "can't be read"),
        ("Well", "stop", True, "without logprobs"),
    ):
        choice = {"message": {"content": text}, "finish_reason": end, "logprobs": None}
        server.trouble = lambda body, n, choice=choice: choice
        for once in (False, True):
            found = judged(server, tmp_path, [asking(why, logprobs=logprobs)], attempts=3)[0]
            assert (found.verdict, found.why, found.attempts, found.cached) == (None, why, 3, once)
            assert (found.read, found.reply.text) == (3 * READ, text)
    assert [body.get("seed") for body in server.bodies] == [None, 1, 2] * 4


def test_a_refused_request_is_unscored_and_no_answer(server, tmp_path):
    refused = {
        3: (400, {"error": {"message": "flagged"}}),
        5: (400, {"error": {"message": "maximum context length"}}),
    }
    by_ask = {json.dumps(ASKS[index].messages): said for index, said in refused.items()}
    server.trouble = lambda body, n: by_ask.get(json.dumps(body["messages"]))
    found = judged(server, tmp_path)
    assert verdicts(found) == {**HEALTHY, 3: None, 5: None}
    assert (found[3].why, found[5].why) == ("refused by the server", "too long for the judge")
    assert len(server.bodies) == 40 and len(list(tmp_path.glob("??/*.json"))) == 38
    server.trouble = lambda body, n: None
    assert verdicts(judged(server, tmp_path)) == HEALTHY and len(server.bodies) == 42


def test_a_server_that_refuses_everything_is_an_error(server, tmp_path):
    server.trouble = lambda body, n: (400, {"error": {"message": "top_logprobs: unknown"}})
    with pytest.raises(RuntimeError, match=r"refuses all requests: top_logprobs: unknown$"):
        judged(server, tmp_path)


# ---- one line


def one_line(caught, *parts):
    line = str(caught.value)
    assert "\n" not in line and [part for part in parts if part not in line] == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_stops_at_once_and_is_nowhere(server, tmp_path, status, monkeypatch, capfd, caplog):
    caplog.set_level(0)
    monkeypatch.setenv(KEY, SECRET)
    judged(server, tmp_path, ASKS[:3], price=PRICE)
    server.trouble = lambda body, n: (status, {"error": {"message": f"Incorrect API key: {SECRET}"}})
    with pytest.raises(ValueError) as caught:
        judged(server, tmp_path, concurrency=2, price=PRICE)
    one_line(caught, f"the key in the environment variable {KEY} (annotator.key) is refused ({status})")
    assert len(server.bodies) <= 3 + 2 and server.keys == {f"Bearer {SECRET}"}
    for status in (500, 404):
        server.trouble = lambda body, n, status=status: (status, {"error": {"message": f"Incorrect: {SECRET}"}})
        with pytest.raises(RuntimeError, match=r"Incorrect: \*\*\*"):
            judged(server, tmp_path, retries=0, price=PRICE)
    shown = capfd.readouterr()
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert not any("secret" in text for text in [shown.out, shown.err, caplog.text, str(caught.value), *files])


def test_an_unknown_model(server, tmp_path):
    with pytest.raises(ValueError) as caught:
        judged(server, tmp_path, model="other")
    one_line(caught, "annotator.model=other: the server doesn't have it; it has: judge")
    server.trouble = lambda body, n: (404, {"error": {"message": "The model `judge` does not exist"}})
    with pytest.raises(RuntimeError) as caught:
        judged(server, tmp_path)
    one_line(caught, "says error 404: The model `judge` does not exist")
    assert len(server.bodies) <= 8


def test_no_server_no_key(server, tmp_path, monkeypatch):
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError) as caught:
        judged(server, tmp_path, retries=1)
    one_line(caught, f"annotator.url={server.url}: can't be reached, 2 tries (", "start it, or correct the url")
    monkeypatch.delenv(KEY, raising=False)
    with pytest.raises(ValueError) as caught:
        list(Judge(endpoint("https://api.openai.com/v1"), tmp_path).ask(ASKS, read))
    one_line(caught, f"wants a key; set the environment variable {KEY}")


def test_weighted_verdicts_want_logprobs(server, tmp_path):
    with pytest.raises(ValueError, match=r"^annotator.logprobs=false: "):
        judged(server, tmp_path, [asking(0, logprobs=True)], logprobs=False)


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"url": None}, ["neither is set"]),
        ({"serve": "s {model} {port}"}, ["each is set"]),
        ({"url": "ftp://x"}, ["no such address"]),
        ({"url": "http://me:word@x/v1"}, ["holds more than an address"]),
        ({"key": "sk-secret"}, ["not the name of an environment variable"]),
        ({"max_dollars": 3}, ["max_dollars=3", "needs", "price"]),
    ],
)
def test_settings_that_cannot_be(values, parts):
    with pytest.raises(ValidationError) as caught:
        endpoint(**{"url": "http://x/v1", **values})
    message = caught.value.errors()[0]["msg"]
    assert [part for part in parts if part not in message] == [] and "secret" not in message and "word" not in message


# ---- money


def bound(ask):
    """The most that it may cost."""
    return (len(json.dumps(ask.messages)) * 1000 + 5 * 4000) / 1e6


COST = (READ * 1000 + MADE * 4000) / 1e6


@pytest.mark.parametrize("concurrency", [1, 16])
def test_the_cap_stops_before_it_is_passed(server, tmp_path, concurrency):
    cap = 10 * COST + bound(ASKS[0]) - 0.001  # there is room to ask for the tenth, not for the eleventh
    server.trouble = lambda body, n: 0.02
    with pytest.raises(RuntimeError) as caught:
        judged(server, tmp_path, concurrency=concurrency, price=PRICE, max_dollars=cap)
    spent = f"annotator.max_dollars={cap:g}: {10 * COST:g} dollars are spent on judge"
    one_line(caught, spent, "30 of 40 verdicts missing", "what is paid is kept")
    assert sum(server.whole.values()) == 10
    with pytest.raises(RuntimeError, match="30 of 40 verdicts missing"):
        judged(server, tmp_path, price=PRICE, max_dollars=cap)
    assert sum(server.asked.values()) == 10
    assert verdicts(judged(server, tmp_path, price=PRICE, max_dollars=100)) == HEALTHY
    assert set(server.whole.values()) == {1}


def test_a_try_without_an_answer_counts_as_the_most_it_may_have_cost(server, tmp_path):
    """A refusal costs nothing."""
    server.trouble = lambda body, n: {1: "cut", 2: (500, ""), 3: (429, "")}.get(n)
    with contextlib.closing(Judge(endpoint(server.url, price=PRICE, max_dollars=100, retries=3), tmp_path)) as judge:
        list(judge.ask(ASKS[:1], read))
        assert judge.ledger.total() == (pytest.approx(COST + bound(ASKS[0])), 0)


PROGRAM = """
import contextlib, json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_judges import ASKS, endpoint, read, replace, PRICE, Judge
url, folder, values = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
fields = values.pop("fields", {{}})
asks = [replace(ask, fields={{**ask.fields, **fields}}) for ask in ASKS]
with contextlib.closing(Judge(endpoint(url, price=PRICE, **values), folder)) as judge:
    for index, verdict in judge.ask(asks, read):
        print("verdict", index, verdict.verdict, verdict.cached, flush=True)
"""


def process(server, folder, **values):
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    return subprocess.Popen(
        [sys.executable, "-c", program, server.url, str(folder), json.dumps(values)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_what_was_paid_survives_a_kill(server, tmp_path):
    """The second run asks only for what is missing; what was under way may have been charged, and stays counted."""
    late = threading.Event()
    server.trouble = lambda body, n: None if len(server.bodies) <= 12 else late.wait(20) and None
    with process(server, tmp_path, concurrency=4, max_dollars=100) as killed:
        said = [line for _, line in zip(range(12), killed.stdout, strict=False) if line.startswith("verdict")]
        while len(server.bodies) < 16:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
    late.set()
    assert len(said) == len(list(tmp_path.glob("??/*.json"))) == 12
    with contextlib.closing(Judge(endpoint(server.url, price=PRICE, max_dollars=100), tmp_path)) as judge:
        found = dict(judge.ask(ASKS, read))
        spent, held = judge.ledger.total()
    assert verdicts(found) == HEALTHY and sum(one.cached for one in found.values()) == 12
    assert len(server.bodies) == 16 + 28
    assert held == 0 and spent == pytest.approx(40 * COST + sum(map(bound, ASKS[12:16])), abs=0.01)


@pytest.mark.slow
def test_processes_share_a_cap(server, tmp_path):
    """What both were charged, for different requests, stays below, and leaves no room for another."""
    cap = 17 * COST
    server.trouble = lambda body, n: 0.05
    running = [process(server, tmp_path, concurrency=6, max_dollars=cap, fields={"temperature": n}) for n in (0, 1)]
    said = [one.communicate(timeout=60) for one in running]
    charged = sum(server.whole.values()) * COST
    assert cap - max(map(bound, ASKS)) < charged <= cap
    assert len({body["temperature"] for body in server.bodies}) == 2
    for _, errors in said:
        assert f"annotator.max_dollars={cap:g}: " in errors.strip().splitlines()[-1]
        assert "verdicts missing; what is paid is kept" in errors


def test_what_a_dead_process_had_reserved(tmp_path):
    """It stays counted, but for a request whose reply it had kept: another's reply was paid by another."""
    program = f"""
import os, threading
from pathlib import Path
from evals.games import Reply
from evals.paid import Cache, Ledger, Paid
cache = Cache(Path({str(tmp_path)!r}))
ledger = Ledger(cache.folder / "ledger", "m", 100, cache, 1)
for key, dollars in dict.fromkeys(keys := {["ab" * 32, "cd" * 32, "ef" * 32]!r}, 2.0).items():
    ledger.reserve(key, dollars, threading.Event())
ledger.settle(keys[0], 1.0)
for request, key, by in (({REQUEST!r}, {digest(REQUEST)!r}, ledger.name), ({OTHER!r}, {digest(OTHER)!r}, "another")):
    ledger.reserve(key, 4.0, threading.Event())
    cache.put(key, request, Paid(Reply("", "stop"), 1, 1, 0.25, by))
os._exit(9)
"""
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    ledger = Ledger(tmp_path / "ledger", "m", 9.3, Cache(tmp_path), 60)
    assert ledger.total() == (1 + 2 + 2 + 0.25 + 4, 0)
    with pytest.raises(OverCap):  # at once: nobody is there to be waited for
        ledger.reserve("12" * 32, 0.1, threading.Event())
    ledger.cap = 9.4
    ledger.reserve("12" * 32, 0.1, threading.Event())
    assert ledger.total() == (9.25, 0.1)


def test_a_reservation_is_waited_for(tmp_path):
    """It is the most that a request may cost, and most cost less."""
    one, other = (Ledger(tmp_path / "ledger", "m", 10, Cache(tmp_path), 1) for _ in range(2))
    go = threading.Event()
    one.reserve("a", 8, go)
    started = time.monotonic()
    threading.Timer(0.5, one.settle, ("a", 1)).start()
    other.reserve("b", 8, go)
    assert time.monotonic() - started > 0.4 and other.total() == (1, 8)
    with pytest.raises(OverCap) as caught:  # `other` says no more
        one.reserve("c", 2, go)
    assert caught.value.args == (9, 2)
    other.settle("b", 2)
    other.close()
    one.reserve("c", 7, go)
    assert one.total() == (3, 7)
    with pytest.raises(OverCap):
        Ledger(tmp_path / "ledger", "m", 3, Cache(tmp_path), 60).reserve("d", 0.1, go)
    stopped = threading.Event()
    stopped.set()
    with pytest.raises(Stopped):
        one.reserve("e", 1, stopped)
    (tmp_path / "ledger" / "torn.json").write_text("{")
    with pytest.raises(RuntimeError, match=r"torn\.json: can't be read .*, so what was spent isn't known"):
        one.total()


def test_who_says_no_counts_is_taken_to_have_used_all(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "USAGE", {})
    found = judged(server, tmp_path, ASKS[:1], price=PRICE)[0]
    assert (found.dollars, found.read, found.generated) == (pytest.approx(bound(ASKS[0])), 0, 0)


def test_a_cap_wants_max_tokens(server, tmp_path):
    with pytest.raises(ValueError, match=r"^annotator.max_dollars: a request without max_tokens may cost anything$"):
        judged(server, tmp_path, [Ask(ASKS[0].messages, {}, True)], price=PRICE, max_dollars=1)
    assert not server.bodies


def test_what_it_will_cost(server, tmp_path):
    judge = endpoint(server.url, price=PRICE)
    whole = estimate([*ASKS, ASKS[0]], judge, tmp_path)
    read = sum(len(json.dumps(ask.messages)) for ask in ASKS) // 4
    assert whole == {
        "requests": 40,
        "cached": 0,
        "tokens": {"read": read, "generated": 200},
        "dollars": pytest.approx((read * 1000 + 200 * 4000) / 1e6),
    }
    judged(server, tmp_path, ASKS[:30])
    left = estimate(ASKS, judge, tmp_path)
    assert (left["requests"], left["cached"]) == (10, 30) and 0 < left["dollars"] < whole["dollars"] / 3
    assert estimate(ASKS, endpoint(server.url), tmp_path)["dollars"] is None


def test_two_that_ask_the_same_at_once_pay_once(server, tmp_path):
    server.trouble = lambda body, n: 0.2  # answered, but slowly
    found = [[], []]

    def ask(into):
        with contextlib.closing(Judge(endpoint(server.url), tmp_path)) as judge:
            into.extend(judge.ask(ASKS[:8], lambda ask, reply: reply.text))

    threads = [threading.Thread(target=ask, args=(into,)) for into in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    texts = [{index: verdict.verdict for index, verdict in one} for one in found]
    assert texts[0] == texts[1] and len(texts[0]) == 8
    assert set(server.whole.values()) == {1}
    assert not list(tmp_path.rglob("*.asking"))


def test_the_right_to_ask_of_a_dead_process_is_taken_over(server, tmp_path):
    cache = Cache(tmp_path)
    child = "import sys; from evals.paid import *; from pathlib import Path; import threading, os\n"
    child += f"with Cache(Path({str(tmp_path)!r})).asking({digest(REQUEST)!r}, threading.Event(), 9): os._exit(0)"
    subprocess.run([sys.executable, "-c", child], cwd=ROOT, check=True)
    assert list(tmp_path.rglob("*.asking"))
    began = time.monotonic()
    with cache.asking(digest(REQUEST), threading.Event(), 60) as found:
        assert found is None
    assert time.monotonic() - began < 30 and not list(tmp_path.rglob("*.asking"))


@pytest.mark.parametrize("content", ["", '{"pid": 1', "[]"])
def test_a_claim_that_was_cut_short_holds_nobody_up_for_ever(tmp_path, content):
    cache = Cache(tmp_path)
    claim = cache.path(digest(REQUEST)).with_suffix(".asking")
    claim.parent.mkdir(parents=True)
    claim.write_text(content)
    with cache.asking(digest(REQUEST), threading.Event(), 0.5) as found:
        assert found is None
    assert not claim.exists()


def test_a_server_without_logprobs_is_found_out_at_once(server, tmp_path):
    server.trouble = lambda body, n: {"logprobs": None}
    asks = [asking(number, logprobs=True) for number in range(40)]
    judge = Judge(endpoint(server.url, concurrency=2), tmp_path)
    told = r"^annotator.logprobs=true: the server gives no .*annotator.logprobs=false"
    with contextlib.closing(judge), pytest.raises(ValueError, match=told):
        list(judge.ask(asks, lambda ask, reply: None))
    assert sum(server.whole.values()) < 20
