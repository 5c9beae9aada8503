from collections import Counter
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.config import Filter
from evolve.filters import Pair, pairs
from evolve.stages import Context, read_rows, reference, write_rows
from evolve.stages import pair as stage
from evolve.strategies import Answer

BEST = Filter(name="reward_model", scorer="reward_model", select="best_worst", margin=0.0, unfinished="drop")
RANDOM = BEST.model_copy(update={"select": "best_random"})
ALL = BEST.model_copy(update={"select": "all"})
LAST = Filter(name="rule", scorer="none", select="last_first", margin=0.0, unfinished="drop")
REASONS = {
    "direct answer empty or unfinished",
    "no usable refinement",
    "fewer than two usable answers",
    "tie",
    "within the margin",
    "identical answers",
}


def answer(text="a", turn=1, end="stop"):
    return Answer(text, (), turn, len(text), end)


def keeping(filter, **changes):
    return filter.model_copy(update=changes)


# Few texts and few scores, so that equal ones are common.
texts = st.sampled_from(["a", "b", "c", "", "  "])
ends = st.sampled_from(["stop", "stop", "length"])
filters = st.builds(
    Filter,
    name=st.just("any"),
    scorer=st.just("verifier"),
    select=st.sampled_from(["best_worst", "best_random", "all", "last_first"]),
    margin=st.sampled_from([0.0, 0.5]),
    unfinished=st.sampled_from(["drop", "keep"]),
)
scored = st.lists(
    st.tuples(
        st.builds(answer, texts, st.integers(1, 4), ends),
        st.one_of(st.none(), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.floats(-5, 5)),
    ),
    max_size=6,
)


def one(filter, answers, scores, draw=""):
    """The pair of a prompt that gives one, or the reason why there is none."""
    found, why, _ = pairs(filter, answers, scores, draw)
    assert len(found) == (why is None)
    return why or found[0]


@given(filters, scored, st.text(max_size=2))
def test_pairs_or_a_reason(filter, made, draw):
    answers, scores = [item[0] for item in made], [item[1] for item in made]
    found, why, left_out = pairs(filter, answers, scores, draw)
    assert bool(found) == (why is None) and (why is None or why in REASONS)
    assert len(set(found)) == len(found) and (len(found) <= 1 or filter.select == "all")
    for pair in found:
        chosen, rejected = answers[pair.chosen], answers[pair.rejected]
        assert chosen.text != rejected.text
        for each in (chosen, rejected):
            assert each.text.strip()
            assert each.end == "stop" or filter.unfinished == "keep"
        if filter.select == "last_first":
            assert pair.rejected == 0 and chosen.turn > 1
        else:
            assert scores[pair.chosen] - scores[pair.rejected] > filter.margin
    # Every answer is either left out for one reason or can stand in a pair.
    without = sum(count for reason, count in left_out.items() if reason.startswith("answers"))
    assert 0 <= without <= len(answers)
    if filter.select != "last_first":
        assert (why == "fewer than two usable answers") == (len(answers) - without < 2)


@given(filters.filter(lambda f: f.select != "last_first"), scored, st.text(max_size=2))
def test_what_is_left_out_might_as_well_not_be_there(filter, made, draw):
    """Without unusable answers and repetitions the same texts are paired, and nothing is counted."""
    texts, kept = set(), []
    for answer, score in made:
        usable = answer.text.strip() and (answer.end == "stop" or filter.unfinished == "keep")
        if usable and score is not None and answer.text not in texts:
            texts.add(answer.text)
            kept.append((answer, score))

    def texts_of(items):
        answers = [answer for answer, _ in items]
        found, why, out = pairs(filter, answers, [score for _, score in items], draw)
        return [(answers[a].text, answers[b].text) for a, b in found], why, out

    (found, why, _), (alone, reason, left_out) = texts_of(made), texts_of(kept)
    assert (found, why) == (alone, reason)
    assert not any(count for left, count in left_out.items() if left.startswith("answers"))


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6), st.sampled_from([0.0, 0.5]))
def test_all_pairs_are_every_two_that_differ(scores, margin):
    found, _, left_out = pairs(keeping(ALL, margin=margin), [answer(str(n)) for n in range(len(scores))], scores)
    wanted = {
        frozenset(two) for two in combinations(range(len(scores)), 2) if abs(scores[two[0]] - scores[two[1]]) > margin
    }
    assert {frozenset(pair) for pair in found} == wanted and len(found) == len(wanted)
    assert left_out["pairs within the margin"] == len(scores) * (len(scores) - 1) // 2 - len(wanted)


def test_the_best_meets_every_other_answer_about_as_often():
    answers, scores = [answer(text) for text in "abcd"], [0.0, 0.5, 1.0, 0.25]
    drawn = Counter(one(RANDOM, answers, scores, f"0\x00{prompt}") for prompt in range(3000))
    assert drawn.keys() == {Pair(2, 0), Pair(2, 1), Pair(2, 3)}
    assert min(drawn.values()) > 900  # 1000 expected, standard deviation 26
    again = [one(RANDOM, answers, scores, f"1\x00{prompt}") for prompt in range(30)]
    assert again == [one(RANDOM, answers, scores, f"1\x00{prompt}") for prompt in range(30)]
    assert again != [one(RANDOM, answers, scores, f"0\x00{prompt}") for prompt in range(30)]


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True))
def test_best_over_worst(scores):
    found = one(BEST, [answer(str(index)) for index in range(len(scores))], scores)
    assert scores[found.chosen] == max(scores)
    assert scores[found.rejected] == min(scores)


def test_earlier_of_equals():
    assert one(BEST, [answer(text) for text in "abcd"], [1.0, 0.0, 1.0, 0.0]) == Pair(0, 1)


def test_reasons_of_best_worst():
    a, b = answer("a"), answer("b", 2)
    assert one(BEST, [], []) == "fewer than two usable answers"
    assert one(BEST, [a, b], [None, 1.0]) == "fewer than two usable answers"
    assert one(BEST, [a, answer(" \n")], [0.0, 1.0]) == "fewer than two usable answers"
    assert one(BEST, [a, answer("b", 2, "length")], [0.0, 1.0]) == "fewer than two usable answers"
    assert one(keeping(BEST, unfinished="keep"), [a, answer("b", 2, "length")], [0.0, 1.0]) == Pair(1, 0)
    assert one(BEST, [a, b], [1.0, 1.0]) == "tie"
    assert one(keeping(BEST, margin=0.5), [a, b], [0.5, 1.0]) == "within the margin"
    assert one(keeping(BEST, margin=0.4), [a, b], [0.5, 1.0]) == Pair(1, 0)
    assert one(BEST, [a, answer("a", 2)], [0.0, 1.0]) == "fewer than two usable answers"


def test_rule_prefers_the_last_usable_refinement_over_the_direct_answer():
    direct, second, third = answer("a"), answer("b", 2), answer("c", 3)
    assert one(LAST, [direct, second, third], None) == Pair(2, 0)
    assert one(LAST, [direct, second, answer("c", 3, "length")], None) == Pair(1, 0)
    assert one(LAST, [answer("", 1), second], None) == "direct answer empty or unfinished"
    assert one(LAST, [direct, answer("b")], None) == "no usable refinement"
    assert one(LAST, [direct, second, answer("a", 3)], None) == "identical answers"


def test_counts_of_what_is_left_out():
    made = [answer("a"), answer(" "), answer("b", 2, "length"), answer("c"), answer("a", 2), answer("d")]
    _, _, left_out = pairs(BEST, made, [0.0, 1.0, 1.0, None, 0.5, 1.0])
    assert left_out == {
        "answers empty": 1,
        "answers unfinished": 1,
        "answers unscored": 1,
        "answers that repeat an earlier one": 1,
    }


@pytest.fixture
def folders(tmp_path):
    """Answers and scores of two prompts: three answers that differ in score, and two that tie."""
    for name in ("answers", "scores", "out", "reference"):
        (tmp_path / name).mkdir()
    texts = {"p": ["1 2 3 3 1 0 2 2", "0 0 0 0 0 0 0 0", "1 2 3 3 1 0 2 1"], "q": ["1 1 1 1 1 1 1 1", "2", ""]}
    answers = [
        {"id": key, "prompt": "3 0 1 2 0 1 2", "answers": [vars(answer(text)) for text in texts[key]]} for key in texts
    ]
    write_rows(tmp_path / "answers" / "answers.jsonl", answers)
    scores = [{"id": "p", "scores": [0.5, 0.0, 1.0]}, {"id": "q", "scores": [0.5, 0.5, 0.0]}]
    write_rows(tmp_path / "scores" / "scores.jsonl", scores)
    return tmp_path


def make_pairs(folders, filter, seed=None):
    inputs = {name: folders / name for name in ("answers", "scores")}
    context = Context("cpu", lambda done, total: None, folders / "partial")
    report = stage.run(stage.Config(filter=filter, seed=seed), inputs, folders / "out", context)
    return read_rows(folders / "out" / "rows.jsonl"), report


def test_the_record_counts_by_reason(folders):
    rows, report = make_pairs(folders, BEST)
    assert [(row["id"], row["chosen"][-1], row["rejected"][-1]) for row in rows] == [("p", "1", "0")]
    assert report.dropped == {"answers empty": 1, "tie": 1}
    assert report.values == {"pairs": 1, "prompts": 1, "chosen is the later turn": 0}


def test_pairs_of_one_prompt_have_references_of_their_own(folders, tiny, template):
    """The reference's log-probabilities of each pair, joined by id as training does, are that pair's own."""
    rows, report = make_pairs(folders, ALL)
    assert [row["id"] for row in rows] == ["p/0-1", "p/2-0", "p/2-1"]
    assert report.values["prompts"] == 1 and report.dropped["pairs within the margin"] == 1
    settings = {"model": {"dtype": "float32", "chat_template": None, "trust_remote_code": False}, "contexts": "direct"}
    settings |= {"template": template, "max_length": 128, "max_dropped": 0.0, "micro_batch": 2, "layout": "shared"}
    context = Context("cpu", lambda done, total: None, folders / "partial")
    inputs = {"model": tiny, "pairs": folders / "out"}
    reference.run(reference.Config(**settings), inputs, folders / "reference", context)
    from safetensors.numpy import load_file

    ids = [row["id"] for row in read_rows(folders / "reference" / "rows.jsonl")]
    assert ids == [row["id"] for row in rows]
    chosen, rejected = load_file(folders / "reference" / "reference.safetensors").values()
    found = {row_id: (float(a), float(b)) for row_id, a, b in zip(ids, chosen, rejected, strict=True)}
    best, middle, worst = found["p/2-0"][0], found["p/0-1"][0], found["p/0-1"][1]
    assert len({best, middle, worst}) == 3
    assert found == {
        "p/0-1": pytest.approx((middle, worst), abs=1e-4),
        "p/2-0": pytest.approx((best, middle), abs=1e-4),
        "p/2-1": pytest.approx((best, worst), abs=1e-4),
    }
