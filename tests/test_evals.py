import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import refinement, statistics
from evals.statistics import Estimate

values = st.floats(-100, 100).map(lambda value: round(value, 3))
clusters = st.dictionaries(st.text(max_size=3), st.lists(values, min_size=1, max_size=4), min_size=2, max_size=9)


def bounds(estimate):
    return [estimate.value, estimate.low, estimate.high]


def test_mean_is_students_interval():
    """1, 2, 3, 4: mean 2.5, standard error 0.645497; Student's 97.5 % point at 3 degrees of freedom is 3.182446."""
    found = statistics.mean({str(n): [n] for n in (1, 2, 3, 4)})
    half = 3.182446305284263 * 0.6454972243679028
    assert bounds(found) == pytest.approx([2.5, 2.5 - half, 2.5 + half])
    assert found.n == 4


@given(clusters)
def test_answers_to_one_prompt_count_as_one(made):
    found = statistics.mean(made)
    alone = statistics.mean({key: [sum(answers) / len(answers)] for key, answers in made.items()})
    assert bounds(found) == pytest.approx(bounds(alone), abs=1e-9)
    assert found.n == len(made)
    doubled = statistics.mean({key: answers * 2 for key, answers in made.items()})
    assert bounds(doubled) == pytest.approx(bounds(found), abs=1e-9)


@given(clusters, values, st.floats(0.1, 10))
def test_an_interval_moves_and_stretches_with_its_values(made, shift, factor):
    found = bounds(statistics.mean(made))
    moved = statistics.mean({key: [factor * value + shift for value in answers] for key, answers in made.items()})
    assert bounds(moved) == pytest.approx([factor * value + shift for value in found], abs=1e-6)


def test_without_spread_the_interval_is_the_value():
    assert statistics.mean({"a": [0.75], "b": [0.75], "c": [0.5, 1.0]}) == Estimate(0.75, 0.75, 0.75, 3)


def test_one_prompt_has_no_interval():
    assert statistics.mean({"a": [1.0, 2.0]}) == Estimate(1.5, None, None, 1)
    assert statistics.mean({"a": [1.0], "b": []}) == Estimate(1.0, None, None, 1)
    for nothing in ({}, {"a": []}):
        with pytest.raises(ValueError, match="no value"):
            statistics.mean(nothing)


@given(clusters, values)
def test_paired_is_the_mean_of_differences(before, gain):
    after = {key: [value + gain for value in answers] for key, answers in before.items()}
    found = statistics.paired(after, before)
    assert bounds(found) == pytest.approx([gain] * 3, abs=1e-9)
    assert found.n == len(before)


def test_paired_takes_what_both_have():
    after = {"a": [3.0, 5.0], "b": [1.0], "c": [9.0], "d": []}
    before = {"a": [1.0], "b": [1.0], "d": [4.0], "e": [0.0]}
    assert statistics.paired(after, before) == statistics.mean({"a": [3.0], "b": [0.0]})
    with pytest.raises(ValueError, match="no value"):
        statistics.paired({"a": [1.0]}, {"b": [1.0]})


def test_intervals_cover_the_truth_as_often_as_they_say():
    """50 prompts of three answers each, which differ less within a prompt than between prompts."""
    draw = np.random.default_rng(0)
    samples = draw.normal(size=(2000, 50, 1)) + 0.3 * draw.normal(size=(2000, 50, 3))
    covered = 0
    for sample in samples.tolist():
        found = statistics.mean(dict(enumerate(sample)))
        covered += found.low <= 0 <= found.high
    assert abs(covered / 2000 - 0.95) < 0.02


def made(scores, correct=None, texts=None):
    """Rows of answers.jsonl and scores.jsonl, a list of turns for each prompt."""
    texts = texts or [[f"{number}.{turn}" for turn in range(len(row))] for number, row in enumerate(scores)]
    answers = [{"id": f"p{n}", "answers": [{"text": text} for text in row]} for n, row in enumerate(texts)]
    correct = correct or [[None] * len(row) for row in scores]
    return answers, [
        {"id": f"p{n}", "scores": row, "correct": right}
        for n, (row, right) in enumerate(zip(scores, correct, strict=True))
    ]


def test_measure_by_turn():
    answers, scores = made(
        [[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.25, 0.25, 0.25]],
        [[False, True, True], [False, False, True], [False, False, False]],
        [["a", "bb", "bb"], ["a", "b", "c"], ["d", "d", "d"]],
    )
    metrics, unscored = refinement.measure(answers, scores, "as agreed")
    assert unscored == {"prompts with an answer that has no score": 0}
    assert (metrics["benchmark"], metrics["protocol"]) == ("refinement", "as agreed")
    turns = metrics["turns"]
    assert [turn["turn"] for turn in turns] == [1, 2, 3]
    assert [turn["reward"]["value"] for turn in turns] == pytest.approx([0.25, 1.75 / 3, 0.75])
    assert [turn["accuracy"]["value"] for turn in turns] == pytest.approx([0, 1 / 3, 2 / 3])
    assert [turn["characters"] for turn in turns] == pytest.approx([1, 4 / 3, 4 / 3])
    assert [turn["unchanged"] for turn in turns] == [None, pytest.approx(1 / 3), pytest.approx(2 / 3)]
    gain = statistics.mean({"0": [0.5], "1": [1.0], "2": [0.0]})
    assert metrics["gain"]["reward"] == pytest.approx(vars(gain))
    assert metrics["gain"]["accuracy"]["value"] == pytest.approx(2 / 3)


def test_unscored_answers_are_left_out_and_counted():
    """A prompt with an unscored answer counts for no turn: turns are compared over the same prompts."""
    answers, scores = made([[0.0, 0.5, 1.0], [0.5, 0.5, None], [None, 1.0, 0.5], [0.25, 0.0, 0.75]])
    metrics, unscored = refinement.measure(answers, scores, "")
    assert unscored == {"prompts with an answer that has no score": 2}
    assert [turn["reward"]["n"] for turn in metrics["turns"]] == [2, 2, 2]
    assert [turn["reward"]["value"] for turn in metrics["turns"]] == pytest.approx([0.125, 0.25, 0.875])
    assert all(turn["accuracy"] is None for turn in metrics["turns"])
    assert (metrics["gain"]["reward"]["value"], metrics["gain"]["reward"]["n"]) == (pytest.approx(0.75), 2)
    assert metrics["gain"]["accuracy"] is None


def test_share_has_a_width_at_both_ends():
    """Wilson's interval against its formula at p = 0: z^2 / (n + z^2)."""
    none = statistics.share({str(number): [0.0] for number in range(20)})
    assert (none.value, none.low) == (0.0, pytest.approx(0.0, abs=1e-12))
    assert none.high == pytest.approx(1.959964**2 / (20 + 1.959964**2), rel=1e-5)
    assert statistics.share({"a": [1.0], "b": [0.0]}).value == 0.5


def test_a_turn_without_any_score_is_refused():
    with pytest.raises(ValueError, match="no value"):
        refinement.measure(*made([[0.5, None], [0.5, None]]), "")


def test_one_turn_has_no_gain():
    draw = random.Random(0)
    metrics, _ = refinement.measure(*made([[draw.random()] for _ in range(5)]), "")
    assert metrics["gain"]["reward"] == {"value": 0, "low": 0, "high": 0, "n": 5}
