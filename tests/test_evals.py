import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evals import picks, refinement, statistics, test_time
from evals.statistics import Estimate
from evolve.config import Strategy

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
    metrics, unscored, *_ = refinement.measure(answers, scores, "as agreed")
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
    metrics, unscored, *_ = refinement.measure(answers, scores, "")
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
    metrics, *_ = refinement.measure(*made([[draw.random()] for _ in range(5)]), "")
    assert metrics["gain"]["reward"] == {"value": 0, "low": 0, "high": 0, "n": 5}


def chain(turns, stop):
    return Strategy(name="chain", answers=turns, branching=None, expand=None, stop=stop)


def with_tokens(answers):
    """The answers' rows, each answer of 2 tokens."""
    return [{**row, "answers": [{**answer, "tokens": 2} for answer in row["answers"]]} for row in answers]


def test_the_standing_answer_counts_for_turns_that_were_not_made():
    """Of four: one whole that rises, one whole whose last turn drops, one that a drop ended at turn 3, one at 2."""
    answers, scores = made(
        [[0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 0.75, 0.0], [0.0, 1.0, 0.5], [0.75, 0.25]],
        [[False, False, False, True], [False] * 4, [False, True, False], [True, False]],
    )
    metrics, *_ = refinement.measure(with_tokens(answers), scores, "", chain(4, "score_drop"))
    rewards = [[0.0, 0.25, 0.5, 1.0], [0.5, 0.5, 0.75, 0.75], [0.0, 1.0, 1.0, 1.0], [0.75, 0.75, 0.75, 0.75]]
    assert [turn["reward"]["value"] for turn in metrics["turns"]] == [
        sum(column) / 4 for column in zip(*rewards, strict=True)
    ]
    assert [turn["accuracy"]["value"] for turn in metrics["turns"]] == [0.25, 0.5, 0.5, 0.75]
    assert metrics["made"]["turns"]["value"] == 13 / 4
    assert metrics["made"]["tokens"]["value"] == 26 / 4
    assert metrics["made"]["tokens"]["n"] == 4


def test_a_chain_cut_short_by_a_drop_ends_before_its_last_answer_however_that_is_scored_again():
    answers, scores = made([[0.0, 1.0, 1.0], [0.5, 0.5, 0.5]], [[False, True, False], [True, True, False]])
    metrics, *_ = refinement.measure(with_tokens(answers), scores, "", chain(4, "score_drop"))
    assert [turn["accuracy"]["value"] for turn in metrics["turns"]] == [0.5, 1.0, 1.0, 1.0]
    whole, *_ = refinement.measure(with_tokens(answers), scores, "", chain(3, "score_drop"))
    assert [turn["accuracy"]["value"] for turn in whole["turns"]] == [0.5, 1.0, 0.0]


def test_an_unchanged_answer_stands():
    answers, scores = made([[0.5, 1.0, 1.0], [0.25, 0.0, 0.5, 0.25]], texts=[["a", "b", "b"], ["a", "b", "c", "d"]])
    metrics, *_ = refinement.measure(with_tokens(answers), scores, "", chain(4, "unchanged"))
    assert [turn["reward"]["value"] for turn in metrics["turns"]] == [0.375, 0.5, 0.75, 0.625]
    assert [turn["unchanged"] for turn in metrics["turns"]] == [None, 0.0, 0.5, 0.5]


@given(st.lists(st.lists(values, min_size=3, max_size=3), min_size=2, max_size=5))
def test_whole_chains_are_measured_as_without_a_rule(scores):
    answers, scored = made(scores)
    plain, *_ = refinement.measure(answers, scored, "")
    ruled, *_ = refinement.measure(with_tokens(answers), scored, "", chain(3, "unchanged"))
    assert ruled.pop("made")["turns"]["value"] == 3
    assert ruled == plain


# ---- test_time


@given(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=9))
def test_majority_is_the_most_frequent_and_the_earlier_of_equals(said):
    found = said[picks.majority(said)]
    counts = {text: said.count(text) for text in said if text is not None}
    if not counts:
        assert picks.majority(said) == 0
        return
    assert counts[found] == max(counts.values())
    assert picks.majority(said) == min(said.index(text) for text in counts if counts[text] == counts[found])


@given(
    st.lists(
        st.tuples(st.none() | st.integers(0, 3).map(float), st.sampled_from(["a", "b", None])), min_size=4, max_size=4
    ),
    st.sampled_from(["parallel", "chain"]),
)
def test_what_is_picked_from_several(found, name):
    """Of any number of them; those without a score or text are passed over, and the first stands where all are."""
    scores, said = map(list, zip(*found, strict=True))
    strategy = Strategy(name=name, answers=4, branching=None, expand=None, chains=2 if name == "chain" else 1)
    assert list(picks.sizes(strategy)) == ([2, 4] if name == "chain" else [1, 2, 3, 4])
    for size in picks.sizes(strategy):
        which = picks.picked(strategy, size, scores, said)
        assert list(which) == ["single", *(["latest"] if name == "chain" else []), "best", "majority"]
        assert list(which["single"]) == list(range(size))
        assert list(which.get("latest", [])) == ([size - 2, size - 1] if name == "chain" else [])
        ([best], [vote]) = (which[kind] for kind in ("best", "majority"))
        known = [score for score in scores[:size] if score is not None]
        assert best == (scores.index(max(known)) if known else 0)
        assert vote == picks.majority(said[:size])
        assert (said[vote] is None) == (set(said[:size]) == {None})
    assert "best" not in picks.picked(strategy, 4, None, said) and "majority" not in picks.picked(
        strategy, 4, scores, None
    )


def parallel(answers):
    return Strategy(name="parallel", answers=answers, branching=None, expand=None)


def test_measure_by_answers_used():
    """Two prompts, three answers each, worked out by hand."""
    answers, scores = made(
        [[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]],
        [[False, False, True], [True, False, False]],
        [["a", "b", "c"], ["x", "y", "y"]],
    )
    likes = [
        {"id": "p0", "scores": [1, 3, 2], "correct": [None] * 3},
        {"id": "p1", "scores": [5, 5, 6], "correct": [None] * 3},
    ]
    metrics, unscored, *_ = test_time.measure(with_tokens(answers), scores, likes, "as agreed", parallel(3), str.strip)
    assert unscored == {"prompts with an answer that has no score": 0}
    assert (metrics["benchmark"], metrics["protocol"]) == ("test_time", "as agreed")
    sizes = metrics["sizes"]
    assert [(size["answers"], size["tokens"]["value"], size["tokens"]["n"]) for size in sizes] == [
        (1, 2, 2),
        (2, 4, 2),
        (3, 6, 2),
    ]

    def curve(kind, metric="reward"):
        return [size["worth"][kind][metric]["value"] for size in sizes]

    assert curve("single") == pytest.approx([0.5, 0.375, (0.5 + 1 / 3) / 2])
    assert curve("best") == [0.5, 0.75, 0.25]  # p0: a, b, b; p1: x, x (the earlier of equals), y
    assert curve("majority") == [0.5, 0.5, 0.0]  # p0: a throughout; p1: x, x, y
    assert curve("best", "accuracy") == [0.5, 0.5, 0.0]
    assert curve("single", "accuracy") == pytest.approx([0.5, 0.25, 1 / 3])
    assert list(sizes[0]["worth"]) == ["single", "best", "majority"]
    assert test_time.headline(metrics) == sizes[-1]["worth"]


def test_chains_are_used_turn_by_turn_and_have_a_latest():
    answers, scores = made([[0.0, 0.5, 1.0, 0.5], [0.0, 0.0, 1.0, 1.0]])
    strategy = Strategy(name="chain", answers=4, branching=None, expand=None, chains=2)
    metrics, *_ = test_time.measure(with_tokens(answers), scores, scores, "", strategy)
    assert [size["answers"] for size in metrics["sizes"]] == [2, 4]
    assert [size["worth"]["latest"]["reward"]["value"] for size in metrics["sizes"]] == [0.125, 0.875]
    assert list(metrics["sizes"][0]["worth"]) == ["single", "latest", "best"]  # nothing extracts, so nobody votes
    assert metrics["sizes"][0]["worth"]["best"]["accuracy"] is None


grades = st.lists(
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=4, max_size=4), min_size=2, max_size=6
)  # fmt: skip


@given(grades)
def test_an_oracle_only_gains_from_more_answers_and_is_pass_at_n(found):
    answers, scores = made(found, [[grade == 1.0 for grade in row] for row in found])
    metrics, *_ = test_time.measure(with_tokens(answers), scores, scores, "", parallel(4), str.strip)
    worth = [size["worth"] for size in metrics["sizes"]]
    rewards = [size["oracle"]["reward"]["value"] for size in worth]
    assert rewards == sorted(rewards) and "best" not in worth[0]
    for size, used in enumerate(worth, start=1):
        passed = sum(1.0 in row[:size] for row in found) / len(found)
        assert used["oracle"]["accuracy"]["value"] == pytest.approx(passed)
        assert all(used["oracle"]["reward"]["value"] >= used[kind]["reward"]["value"] - 1e-12 for kind in used)
    # One answer is one answer, however it is picked.
    assert all(worth[0][kind] == worth[0]["oracle"] for kind in worth[0])


@pytest.mark.parametrize("unscored", ["scores", "select"])
def test_a_prompt_without_a_score_counts_for_no_number_of_answers(unscored):
    answers, scores = made([[0.5, None], [0.25, 1.0]])
    whole = made([[0.5, 0.5], [0.25, 1.0]])[1]
    given = {"scores": whole, "select": whole, unscored: scores}
    metrics, dropped, *_ = test_time.measure(with_tokens(answers), protocol="", strategy=parallel(2), **given)
    assert dropped == {"prompts with an answer that has no score": 1}
    assert {size["worth"]["single"]["reward"]["n"] for size in metrics["sizes"]} == {1}
