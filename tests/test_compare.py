"""The stage `compare`, with a small judged benchmark and a real server."""

import sys
import threading
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from test_judges import KEY, MADE, PRICE, READ, SECRET, Fake, endpoint

import evals
from evals.games import Ask
from evolve.config import Resources
from evolve.stages import Context, module, read_rows, stage, write_rows
from evolve.stages.score import Config as ScoreConfig
from evolve.store import Report, Stage, StageConfig, Store
from evolve.workers import Setting, execute


def asks(prompt, answer, reference, word="better"):
    """In both orders; shown first, the text that comes first in the alphabet."""
    return [
        Ask(
            [{"role": "user", "content": f"{word}: {prompt}\n{first}\n{second}"}],
            {"max_tokens": 5, "temperature": 0},
            first is answer,
        )
        for first, second in ((answer, reference), (reference, answer))
    ]


def read(ask, reply):
    shown = {"[[A]]": "first", "[[B]]": "second"}.get(reply.text)
    return None if shown is None else {"won": (shown == "first") == ask.answer_first}


def stand_in(sign):
    return [{"won": sign > 0}, {"won": sign > 0}]


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(sys.modules, "evals.toy", SimpleNamespace(asks=asks, read=read, stand_in=stand_in))
    monkeypatch.setattr(evals, "BENCHMARKS", (*evals.BENCHMARKS, "toy"))


def prefers(body):
    """The longer of the two texts, wherever it is shown."""
    _, first, second = body["messages"][0]["content"].rsplit("\n", 2)
    return {"message": {"role": "assistant", "content": f"[[{'A' if len(first) > len(second) else 'B'}]]"}}


@pytest.fixture
def server():
    with Fake() as fake:
        fake.trouble = lambda body, n: prefers(body)
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        yield fake
        fake.shutdown()


def answer(text, end="stop"):
    return {"text": text, "end": end, "tokens": 3, "read": 5}


ROWS = [
    {
        "id": "a",
        "prompt": "0 1 2",
        "answers": [answer("long enough"), answer("x"), answer("y"), answer("longer still")],
    },
    {"id": "b", "prompt": "1 2", "answers": [answer("x", "length"), answer("x"), answer("y"), answer("", "too long")]},
    {"id": "c", "prompt": "2", "answers": [answer("long enough")]},  # a chain that ended early
]
QUESTIONS = [{"id": row["id"], "prompt": row["prompt"], "reference": "middling", "gold": "g"} for row in reversed(ROWS)]
WON, LOST, NONE = [{"won": True}] * 2, [{"won": False}] * 2, [None, None]
EXPECTED = [
    {"id": "a", "verdicts": {"1": WON, "4": WON}},
    {"id": "b", "verdicts": {"1": LOST, "4": NONE}},
    {"id": "c", "verdicts": {"1": WON, "4": NONE}},
]
NOT_MADE = {"verdicts unscored: no answer was made": 4}


@pytest.fixture
def compare(tmp_path):
    """Runs the stage: its files' rows, its report, and what it showed."""

    def compare(rows=ROWS, questions=QUESTIONS, shared="judgments", name="run", **config):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        write_rows(out / "answers.jsonl", rows)
        write_rows(out / "rows.jsonl", questions)
        seen = []
        context = Context("cpu", lambda *now: seen.append(now), out / "partial", shared and tmp_path / shared)
        defaults = {"benchmark": "toy", "settings": {}, "turns": (1, 4), "endpoint": None, "scorer": None}
        made = stage("compare", {}, **{**defaults, **config})
        report = module("compare").run(made.config, {"answers": out, "questions": out}, out, context)
        return out, report, seen

    return compare


def test_a_judge_compares(server, compare):
    out, report, seen = compare(endpoint=endpoint(server.url, price=PRICE, max_dollars=50))
    assert read_rows(out / "verdicts.jsonl") == EXPECTED
    cost = (READ * 1000 + MADE * 4000) / 1e6
    assert report.dropped == NOT_MADE
    assert report.tokens == {"read": 8 * READ, "generated": 8 * MADE}
    assert report.values == {"verdicts": 12, "from the cache": 0, "dollars": pytest.approx(8 * cost)}
    assert seen == [(done, 8) for done in range(1, 9)]
    replies = read_rows(out / "replies.jsonl")
    assert [(row["id"], row["turn"], row["answer_first"]) for row in replies] == [
        (name, turn, first) for name, turn in (("a", 1), ("a", 4), ("b", 1), ("c", 1)) for first in (True, False)
    ]
    assert replies[0] == {
        "id": "a",
        "turn": 1,
        "answer_first": True,
        "reply": {"text": "[[A]]", "end": "stop", "logprobs": None},
        "tokens": {"read": READ, "generated": MADE},
        "dollars": pytest.approx(cost),
        "attempts": 1,
        "unscored": None,
    }
    files = {name: (out / name).read_bytes() for name in ("verdicts.jsonl", "replies.jsonl")}
    _, again, _ = compare(endpoint=endpoint(server.url, price=PRICE))
    assert len(server.bodies) == 8 and again.values == {"verdicts": 12, "from the cache": 8, "dollars": 0}
    assert {name: (out / name).read_bytes() for name in files} == files  # wherever the replies come from


def test_settings_reach_the_benchmark(server, compare):
    compare(endpoint=endpoint(server.url), settings={"word": "worse"})
    assert all(body["messages"][0]["content"].startswith("worse: ") for body in server.bodies)


def test_unscored_verdicts_are_counted_by_reason(server, compare):
    def trouble(body, n):
        first = body["messages"][0]["content"].split("\n")[1]
        if "longer still" in body["messages"][0]["content"]:
            return 400, {"error": {"message": "flagged"}}
        return {"message": {"content": "Well"}} if first == "middling" else prefers(body)

    server.trouble = trouble
    out, report, _ = compare(endpoint=endpoint(server.url))
    assert report.dropped == {
        "verdicts unscored: can't be read": 3,
        "verdicts unscored: refused by the server": 2,
        **NOT_MADE,
    }
    assert read_rows(out / "verdicts.jsonl")[0] == {"id": "a", "verdicts": {"1": [{"won": True}, None], "4": NONE}}
    replies = read_rows(out / "replies.jsonl")
    assert [row["unscored"] for row in replies[:4]] == [None, "can't be read", *["refused by the server"] * 2]
    assert (replies[1]["attempts"], replies[2]["attempts"], replies[2]["reply"]) == (2, 0, None)


VERIFIER = ScoreConfig(scorer="verifier", verifier="exact", model=None, max_length=9, batch_size=2)


def test_a_scorer_stands_in(compare):
    """Better or worse than the reference, or equal to it, which wins nothing here; gold comes from the question."""
    questions = [
        {**question, "reference": reference, "gold": gold}
        for question, (reference, gold) in zip(
            QUESTIONS, [("a b", "long enough"), ("y", "y"), ("longer still", "longer still")], strict=True
        )
    ]
    out, report, seen = compare(questions=questions, scorer=VERIFIER, turns=(1, 3, 4))
    assert read_rows(out / "verdicts.jsonl") == [
        {"id": "a", "verdicts": {"1": LOST, "3": LOST, "4": LOST}},  # worse, worse, equal
        {"id": "b", "verdicts": {"1": LOST, "3": LOST, "4": NONE}},  # worse, equal
        {"id": "c", "verdicts": {"1": WON, "3": NONE, "4": NONE}},
    ]
    assert report.values["verdicts"] == 18 and not (out / "replies.jsonl").exists()
    assert report.dropped == {"verdicts unscored: no answer was made": 6}
    assert seen[-1][0] == seen[-1][1]


def test_an_answer_without_a_reference(compare, server):
    with pytest.raises(ValueError, match=r"^question b: has no reference answer to compare with$"):
        compare(questions=[{**QUESTIONS[0], "id": row["id"]} for row in ROWS if row["id"] != "b"], scorer=VERIFIER)


def test_one_of_both_judges(server):
    for values in ({}, {"endpoint": endpoint(server.url), "scorer": VERIFIER}):
        with pytest.raises(ValidationError, match="a comparison is judged by one of them"):
            module("compare").Config(
                **{"benchmark": "toy", "settings": {}, "turns": (1,), "endpoint": None, "scorer": None, **values}
            )


def test_identities(server):
    """What is only about where and how a judge runs makes no new comparison; what it is does."""

    def identity(**values):
        config = {"benchmark": "toy", "settings": {}, "turns": (1, 4), "scorer": None, **values.pop("config", {})}
        return stage("compare", {}, endpoint=endpoint(**{"url": server.url, **values}), **config).id

    same = {
        "url": "http://elsewhere/v1",
        "key": "OTHER",
        "concurrency": 3,
        "timeout": 3,
        "retries": 9,
        "price": PRICE,
    }
    for name, value in same.items():
        assert identity(**{name: value}) == identity(), name
    assert identity(price=PRICE, max_dollars=3) == identity()
    other = [
        {"model": "m"},
        {"logprobs": False},
        {"attempts": 3},
        {"url": None, "serve": "s {model} {port}"},
        {"config": {"turns": (1,)}},
        {"config": {"settings": {"word": "x"}}},
        {"config": {"benchmark": "another"}},
    ]
    assert len({identity(), *(identity(**dict(values)) for values in other)}) == 1 + len(other)


class Empty(StageConfig):
    pass


def test_through_the_store(server, tmp_path, monkeypatch):
    """Replies lie beside the store; the key lies nowhere."""
    monkeypatch.setenv(KEY, SECRET)
    store = Store(tmp_path / "outputs" / "store")
    inputs = {"answers": Stage("respond", 1, Empty()), "questions": Stage("data", 1, Empty())}
    for made, name, rows in zip(inputs.values(), ("answers.jsonl", "rows.jsonl"), (ROWS, QUESTIONS), strict=True):
        with store.build(made) as folder:
            write_rows(folder / name, rows)
            store.commit(made, folder, Report(), {})
    judge = endpoint(server.url, price=PRICE, max_dollars=50)
    made = stage("compare", inputs, benchmark="toy", settings={}, turns=(1, 4), endpoint=judge, scorer=None)
    resources = Resources(workers=1, threads=1, device="cpu", retries=0, lease_timeout=60)
    outcome = execute(made, Setting(store, resources, tmp_path / "logs", {}), lambda done, total: None)
    assert outcome.status == "done", outcome
    assert read_rows(store.folder(made.id) / "verdicts.jsonl") == EXPECTED
    assert len(list((tmp_path / "outputs" / "judgments").glob("??/*.json"))) == 8
    assert server.keys == {f"Bearer {SECRET}"}
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 12 and not any("secret" in path.read_text() for path in files)
