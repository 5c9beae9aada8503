"""Judges: what they are asked, how their words are read, and the scores that come of it."""

import random

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evolve import config, judge
from evolve.engines import Completion
from evolve.judge import Judge
from evolve.scorers import TOKENS, Item


def settings(name="policy", **changed):
    given = yaml.safe_load((config.CONF / "judge" / f"{name}.yaml").read_text())
    given.pop("defaults")
    return config.Judge(**{**given, "engine": {"name": "hf", "batch_size": 4}, **changed})


class Says:
    """An engine whose answer to a request is `words(its text, its seed)`; answers come back in any order."""

    def __init__(self, words, chaos=0):
        self.words, self.random, self.asked, self.waiting = words, random.Random(chaos), [], []

    def submit(self, requests):
        self.asked += requests
        self.waiting += requests

    def poll(self):
        self.random.shuffle(self.waiting)
        done, self.waiting = self.waiting[:3], self.waiting[3:]
        return [Completion(one.key, *self.words(one.messages[0]["content"], one.seed)) for one in done]

    def close(self):
        pass


def scores(judge, items):
    found = dict(judge(items))
    assert found.keys() == set(range(len(items)))
    return [found[index] for index in range(len(items))]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Good.\nScore: 4", 4.0),
        ("**Score:** 3.5/5", 3.5),
        ("The score is 2, no...\nScore: 5.", 5.0),
        ("Score (0-5): 4", 4.0),
        ("My score: 4", None),
        ("A high score of 5 points.", None),
        ("Score: 1\nScore: 0", 0.0),
        ("Score: 6", None),
        ("Score: -1", None),
        ("Score: N", None),
        ("4", None),
        ("", None),
        ("SCORE : 5 points", 5.0),
    ],
)
def test_a_grade_is_read(text, value):
    assert judge.grade(text, 5) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("Verdict: A", 1.0),
        ("A is fine.\n**Verdict: B**", 0.0),
        ("verdict: tie", 0.5),
        ("Verdict: a close call, I'd say B", None),
        ("Verdict: A\nVerdict: B", 0.0),
        ("Verdict: Answer A", None),
        ("Verdict: [[A]]", 1.0),
        ("A", None),
        ("", None),
    ],
)
def test_a_verdict_is_read(text, value):
    assert judge.verdict(text) == value


def test_a_score_is_the_mean_of_the_grades_that_can_be_read():
    words = {"one": ["Score: 5", "Score: 2", "I can't say"], "two": ["none"] * 3, "three": ["Score: 0"] * 3}

    def say(text, seed):
        answer = text.split("ANSWER:\n")[1].split("\n")[0]
        return words[answer].pop(), 7, "stop"

    engine = Says(say)
    found = scores(Judge(settings(), engine, 0), [Item("q", answer) for answer in words])
    assert [score.value for score in found] == [3.5, None, 0.0]
    assert found[0].counts == {TOKENS: 21, "verdicts": 3, "verdicts unread": 1}
    assert found[1].counts["verdicts unread"] == 3
    assert len({request.seed for request in engine.asked}) == 9


def test_what_an_answer_says_about_braces_stays():
    engine = Says(lambda text, seed: ("Score: 1", 1, "stop"))
    scores(Judge(settings(samples=1), engine, 0), [Item("what is {response}?", "it is {prompt} or {first}")])
    (asked,) = engine.asked
    assert "what is {response}?" in asked.messages[0]["content"]
    assert "it is {prompt} or {first}" in asked.messages[0]["content"]


def test_a_verdict_that_was_cut_off_does_not_count():
    engine = Says(lambda text, seed: ("Score: 4\nbut then", 9, "length"))
    (found,) = scores(Judge(settings(), engine, 0), [Item("q", "a")])
    assert found.value is None
    assert found.counts["verdicts cut off"] == 3


def test_what_is_too_long_for_the_judge_has_no_score_and_is_counted():
    engine = Says(lambda text, seed: ("", 0, "too long"))
    (found,) = scores(Judge(settings(), engine, 0), [Item("q", "a")])
    assert found.value is None
    assert found.counts["not asked: too long for the judge"] == 3


QUALITY = st.lists(st.integers(0, 3), min_size=1, max_size=5)


def better(text, seed):
    """A fair judge of answers that are numbers."""
    first, second = (int(text.split(f"ANSWER {name}:\n")[1].split("\n")[0].split(".")[0]) for name in "AB")
    return ("Verdict: tie" if first == second else f"Verdict: {'A' if first > second else 'B'}"), 1, "stop"


@given(st.lists(QUALITY, min_size=1, max_size=3), st.integers(0, 99))
def test_pairwise_an_answer_scores_the_share_of_its_games_that_it_wins(prompts, chaos):
    items = [Item(f"q{number}", f"{value}.") for number, values in enumerate(prompts) for value in values]
    engine = Says(better, chaos)
    found = scores(Judge(settings("policy_pairwise"), engine, 0), items)
    assert len(engine.asked) == sum(len(values) * (len(values) - 1) for values in prompts)
    place = 0
    for values in prompts:
        for mine, value in enumerate(values):
            rivals = [other for index, other in enumerate(values) if index != mine]
            expected = [1.0 if value > other else 0.5 if value == other else 0.0 for other in rivals]
            score = found[place].value
            assert score is None if not rivals else score == pytest.approx(sum(expected) / len(expected))
            place += 1


def test_a_judge_that_takes_the_first_gives_no_answer_an_advantage_and_is_seen():
    items = [Item("q", answer) for answer in ("x", "y", "z")]
    found = scores(Judge(settings("policy_pairwise"), Says(lambda text, seed: ("Verdict: A", 1, "stop")), 0), items)
    assert [score.value for score in found] == [0.5, 0.5, 0.5]
    assert sum(score.counts["wins of the answer shown first"] for score in found) == 6
    assert not any("second" in reason for score in found for reason in score.counts)


@given(st.permutations(range(4)))
def test_an_answers_grade_has_nothing_to_do_with_its_company(order):
    def say(text, seed):
        return f"Score: {seed % 6}", 1, "stop"

    items = [Item("q", f"answer {number}") for number in range(4)]
    alone = [scores(Judge(settings(), Says(say), 0), [item])[0].value for item in items]
    together = scores(Judge(settings(), Says(say), 0), [items[number] for number in order])
    assert [score.value for score in together] == [alone[number] for number in order]


@pytest.mark.parametrize(
    ("name", "changed", "words"),
    [
        ("policy", {"highest": None}, r"judge\.highest=null: .*highest grade"),
        ("policy", {"temperature": 0}, r"judge\.samples=3: all would be the same"),
        ("policy", {"model": None}, r"judge\.model=null: only a server"),
        ("policy", {"mode": "pairwise"}, r"judge\.prompt\.text of 'additive': holds \{first\} 0 times"),
        ("policy_pairwise", {"mode": "graded"}, r"judge\.prompt\.text of 'versus': holds \{response\} 0 times"),
    ],
)
def test_settings_that_contradict_one_another_are_refused(name, changed, words):
    with pytest.raises(ValueError, match=words):
        settings(name, **changed)
