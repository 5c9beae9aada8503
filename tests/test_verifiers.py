"""Verifiers on examples of each kind, on answers that no process survives, and on published labels."""

import gzip
import json
import os
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve import verifiers, world
from evolve.scorers import Item, Score

BOMB = "The answer is \\boxed{9^{9^{9^{9^9}}}}"  # more digits than there is memory for, made in one call of C


@pytest.fixture(scope="module")
def maths():
    return verifiers.load("math")


@pytest.fixture(scope="module")
def exact():
    return verifiers.load("exact")


def right(verifier, gold, answer):
    score = verifier.grade(Item("", answer, gold))
    assert score.value == float(score.correct) and not score.counts
    return score.correct


def test_the_ledger_is_the_worlds_reward():
    prompt = "3 0 1 2 0 1 2"
    answers = ["3 0 0 3 1 1 0 2", "2 3 3 2 0 0 3 1", "1 2 2 1 3 3 2 0", "not a ledger", "", " ".join("1" * 8)]
    ledger = verifiers.load("ledger")
    found = dict(ledger([Item(prompt, answer) for answer in answers]))
    assert [found[n] for n in range(len(answers))] == [Score(*world.reward(prompt, answer)) for answer in answers]
    assert {score.correct for score in found.values()} == {True, False}
    assert [ledger.extract(text) for text in (" 1 2  2 1 3 3 2 0\n", "1 2", "9 2 2 1 3 3 2 0", "")] == [
        "1 2 2 1 3 3 2 0",
        None,
        None,
        None,
    ]
    with pytest.raises(KeyError):
        verifiers.load("unheard of")


@pytest.mark.parametrize(
    ("answer", "result"),
    [
        ("Paris", "paris"),
        ("I think\nthat it is\n  New   York. \n", "new york"),
        ("First, the answer is 3.\nNo: The Answer is: $4$.\nBye", "4"),
        ("2 + 2 = 4\n#### 4\n", "4"),
        ("the answer is 5\n#### 6", "6"),
        ("so \\boxed{7} or rather \\boxed{\\frac{1}{2}}, so the answer is 8", "\\frac{1}{2}"),
        ("\\boxed{never closed", "\\boxed{never closed"),
        ("", None),
        (" \n ", None),
    ],
)
def test_what_an_exact_answer_is(exact, answer, result):
    assert exact.extract(answer) == result
    assert right(exact, result or "x", answer) == (result is not None)
    assert not right(exact, "another", answer)


@given(st.text(), st.text())
def test_exact_takes_any_text(exact, gold, answer):
    assert right(exact, gold, answer) in (True, False)
    assert exact.extract(answer) != ""


@pytest.mark.parametrize(
    ("gold", "answer", "correct"),
    [
        ("1/2", "so it is $\\frac{2}{4}$", True),
        ("\\frac{1}{2}", "The final answer is 0.5.", True),
        ("18", "She makes $18 every day.\n#### 18", True),
        ("6", "the total: $4.00 + $2.00 = $<<4+2=6.00>>6.00\n#### 6", True),
        ("1,200", "The answer is 1200", True),
        ("\\$36", "it costs \\boxed{36}", True),
        ("$x = 5$", "\\boxed{5}", True),
        ("\\{1, 2\\}", "\\boxed{\\{2, 1\\}}", True),
        ("2\\sqrt{2}", "$\\sqrt{8}$", True),
        ("18", "She makes $17 every day.", False),
        ("18", "eighteen", False),
        ("18", "", False),
        ("x + 1", "$y + 1$", False),
    ],
)
def test_the_same_value_is_right_however_it_is_written(maths, gold, answer, correct):
    assert right(maths, gold, answer) == correct


def test_equal_values_are_equal_strings(maths):
    for same in (("0.5", "$\\frac{2}{4}$", "50%", "x = 1/2"), ("$\\sqrt{8}$", "$2\\sqrt{2}$"), ("$x+x$", "$2x$")):
        assert len({maths.extract(text) for text in same}) == 1
    assert maths.extract("0.33") != maths.extract("1/3")
    assert maths.extract("no number in it") is None


def test_an_answer_that_no_process_survives_is_wrong_and_the_next_is_graded():
    maths = verifiers.Math(seconds=1)
    assert maths.grade(Item("", BOMB, "3")) == Score(0.0, False, {verifiers.GAVE_UP: 1})
    assert right(maths, "3", "3")


def test_other_threads_may_ask(maths):
    found = []
    thread = threading.Thread(target=lambda: found.append(maths.grade(Item("", "so \\boxed{3}", "3"))))
    thread.start()
    thread.join()
    assert found == [Score(1.0, True)]


def test_the_process_ends_with_who_asked():
    verifier = verifiers.Math()
    assert right(verifier, "3", "3")
    process = verifier._process
    process.stdin.close()
    assert process.wait(10) == 0


@pytest.mark.parametrize("name", ["math", "exact"])
def test_without_a_reference_answer_one_line_says_so(name):
    with pytest.raises(ValueError, match=r"row of the prompt 'how many\?' has none; set data\.gold"):
        verifiers.load(name).grade(Item("how many?", "3"))


# ---- against published labels


@pytest.fixture
def folder():
    found = os.environ.get("EVOLVE_TEST_DATA")
    if not found:
        pytest.skip("EVOLVE_TEST_DATA (a folder with gsm8k/ and math/) is not set")
    return Path(found)


@pytest.mark.slow
def test_gsm8k_labels(maths, folder):
    """OpenAI's 2,640 graded solutions of four systems."""
    file = folder / "gsm8k" / "example_model_solutions_0_660.jsonl.gz"
    wrong, labels = [], []
    for row in map(json.loads, gzip.decompress(file.read_bytes()).decode().splitlines()):
        for made in (value for value in row.values() if isinstance(value, dict)):
            labels.append(made["is_correct"])
            if right(maths, row["ground_truth"].rpartition("A:")[2].strip(), made["solution"]) != labels[-1]:
                wrong.append(made["solution"])
    assert len(labels) == 2640 and 0 < sum(labels) < 2640
    assert wrong == []


@pytest.mark.slow
def test_gsm8k_references_are_right_of_themselves(maths, exact, folder):
    from evolve import data

    rows = data.read(str(folder / "gsm8k" / "test.jsonl"), "test", "question", "answer")
    solutions = [json.loads(line)["answer"] for line in (folder / "gsm8k" / "test.jsonl").open()]
    assert len(rows) == 1319 and all("chosen" not in row for row in rows)
    for verifier in (maths, exact):
        assert all(right(verifier, row["gold"], text) for row, text in zip(rows, solutions, strict=True))
        assert sum(right(verifier, row["gold"], solutions[n - 1]) for n, row in enumerate(rows)) < 100


@pytest.mark.slow
def test_math_500_solutions_are_right(maths, folder):
    rows = [json.loads(line) for line in (folder / "math" / "math500_test.jsonl").open()]
    assert len(rows) == 500
    assert [row["unique_id"] for row in rows if not right(maths, row["answer"], row["solution"])] == []
    started = time.monotonic()
    assert sum(right(maths, row["answer"], rows[n - 1]["solution"]) for n, row in enumerate(rows)) < 25
    assert time.monotonic() - started < 120
