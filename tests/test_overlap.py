"""Contamination counts on small cases, against a plain search, and at size."""

import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import overlap
from evolve import data

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
words = st.lists(st.sampled_from("abc"), max_size=6).map(" ".join)
texts = st.lists(words, max_size=5)


def rows(prompts):
    return [{"id": f"e{number}", "prompt": prompt} for number, prompt in enumerate(prompts)]


def found(training, evaluation, **options):
    return overlap.overlap([{"prompt": text} for text in training], rows(evaluation), **options)


@pytest.mark.parametrize(
    ("training", "evaluation", "exact", "ngram"),
    [
        (LONG, LONG, 1, 1),
        (LONG, "  One TWO" + LONG[7:], 1, 1),
        (LONG, LONG.replace(" ", ", ") + "!", 0, 1),
        (LONG, LONG.replace("fourteen", "14"), 0, 1),  # thirteen in a row
        (LONG, LONG.replace("two", "2"), 0, 0),  # twelve
        (LONG, "Five six, seven?", 0, 1),  # a short prompt, whole
        (LONG, "five seven", 0, 0),
        (LONG, " ".join(LONG.split()[1:13]), 0, 1),  # twelve are all there are
        ("five", LONG, 0, 0),
        ("?!", " ?!", 1, 1),  # not one word
        ("?!", "!", 0, 0),
        ("", "a", 0, 0),
    ],
)
def test_what_is_a_match(training, evaluation, exact, ngram):
    counts = found([training], [evaluation])
    assert (counts["exact"], counts["ngram"]) == (exact, ngram)
    assert counts["examples"] == ["e0"] * ngram
    assert counts["answers"] is None


def plain(text, prompt, n):
    """Whether they share n words in a row, or all of the prompt's: as strings."""
    asked, trained = prompt.split(), f" {' '.join(text.split())} "
    size = min(n, len(asked))
    return size > 0 and any(
        f" {' '.join(asked[start : start + size])} " in trained for start in range(len(asked) - size + 1)
    )


@given(texts, texts, st.integers(1, 6))
def test_counts_are_those_of_a_plain_search(training, evaluation, n):
    counts = found(training, evaluation, n=n)
    exact = [e in {data.same(text) for text in training} for e in map(data.same, evaluation)]
    near = [any(plain(text, prompt, n) for text in training) for prompt in evaluation]
    either = [one or other for one, other in zip(exact, near, strict=True)]
    assert (counts["exact"], counts["ngram"]) == (sum(exact), sum(either))
    order = sorted((not same, number) for number, same in enumerate(exact) if either[number])
    assert counts["examples"] == [f"e{number}" for _, number in order[:3]]
    assert (counts["evaluation"], counts["training"]) == (len(evaluation), len(training))


@given(texts, texts, st.integers(1, 6))
def test_more_training_and_shorter_runs_only_add(training, evaluation, n):
    counts, more = found(training, evaluation, n=n), found([*training, "a b c"], evaluation, n=n)
    shorter = found(training, evaluation, n=max(1, n - 1))
    assert counts["exact"] <= more["exact"]
    assert counts["ngram"] <= min(more["ngram"], shorter["ngram"])
    assert counts["exact"] == shorter["exact"] <= counts["ngram"]


def test_answers_are_counted_apart():
    training = [{"prompt": "hello", "chosen": f"You ask: {LONG}", "rejected": "What is it?"}, {"prompt": LONG}]
    counts = overlap.overlap(training, [{"prompt": LONG}, {"prompt": "what is it?"}, {"prompt": "something else"}])
    assert (counts["exact"], counts["ngram"], counts["examples"]) == (1, 1, [data.row_id(LONG)])
    assert counts["answers"] == {
        "exact": 1,
        "ngram": 2,
        "examples": [data.row_id("what is it?"), data.row_id(LONG)],
    }
    with pytest.raises(ValueError, match="n=0: at least one word"):
        overlap.overlap([], [], n=0)


def write(path, made):
    path.write_text("".join(json.dumps(row) + "\n" for row in made), encoding="utf-8")
    return str(path)


def test_the_command(tmp_path, capsys):
    """Conversations: all messages of a prompt, of an answer the last."""
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Yes?"}, {"content": LONG}]
    answer = [{"role": "user", "content": "who are you"}, {"role": "assistant", "content": "a model"}]
    training = write(tmp_path / "t.jsonl", [{"question": said, "chosen": answer, "rejected": None}])
    evaluation = write(tmp_path / "e.jsonl", [{"prompt": LONG}, {"prompt": "Who are you"}, {"prompt": "A MODEL"}])
    asked = ["--training", training, "--evaluation", evaluation]
    assert overlap.main([*asked, "--training-prompt", "question"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "evaluation": 3,
        "training": 1,
        "exact": 0,
        "ngram": 1,
        "examples": [data.row_id(LONG)],
        "answers": {"exact": 1, "ngram": 1, "examples": [data.row_id("A MODEL")]},
    }
    for wrong, line in (
        (asked, "t.jsonl, row 1: no 'prompt'; it has question, chosen, rejected"),
        ([*asked[:2], "--evaluation", str(tmp_path / "none.jsonl")], "none.jsonl"),
        ([*asked, "--training-prompt", "rejected"], "t.jsonl, row 1, rejected: neither a text nor"),
        ([*asked, "--training-prompt", "question", "-n", "0"], "n=0"),
    ):
        if "none" in line:
            wrong = [*wrong, "--training-prompt", "question"]
        assert overlap.main(wrong) == 2
        error = capsys.readouterr().err
        assert line in error
        assert error.count("\n") == 1


def test_ten_thousand_rows_take_seconds():
    """60 words a prompt, 150 an answer; ten evaluation prompts are planted."""
    draw = random.Random(0)
    common = [f"w{int(draw.paretovariate(0.6))}" for _ in range(50_000)]

    def text(size):
        return " ".join(draw.choices(common, k=size))

    training = [{"prompt": text(60), "chosen": text(150), "rejected": text(150)} for _ in range(10_000)]
    evaluation = [{"prompt": text(draw.choice([8, 20, 60]))} for _ in range(990)]
    planted = [{"prompt": training[number]["prompt"]} for number in range(10)]
    start = time.monotonic()
    counts = overlap.overlap(training, evaluation + planted)
    assert time.monotonic() - start < 30
    assert counts["exact"] == 10
    assert counts["ngram"] >= 10
