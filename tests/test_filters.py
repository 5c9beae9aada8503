from hypothesis import given
from hypothesis import strategies as st

from evolve.config import Filter
from evolve.filters import Pair, pair
from evolve.strategies import Answer

BEST = Filter(name="reward_model", scorer="reward_model", select="best_worst", margin=0.0, unfinished="drop")
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
    select=st.sampled_from(["best_worst", "last_first"]),
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


@given(filters, scored)
def test_a_pair_or_a_reason(filter, made):
    answers, scores = [item[0] for item in made], [item[1] for item in made]
    found = pair(filter, answers, scores)
    if found.dropped is not None:
        assert found == Pair(dropped=found.dropped)
        assert found.dropped in REASONS
        return
    assert 0 <= found.chosen < len(answers)
    assert 0 <= found.rejected < len(answers)
    chosen, rejected = answers[found.chosen], answers[found.rejected]
    assert chosen.text != rejected.text
    for one in (chosen, rejected):
        assert one.text.strip()
        assert one.end == "stop" or filter.unfinished == "keep"
    if filter.select == "best_worst":
        assert scores[found.chosen] - scores[found.rejected] > filter.margin
    else:
        assert found.rejected == 0
        assert chosen.turn > 1


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=6, unique=True))
def test_best_over_worst(scores):
    found = pair(BEST, [answer(str(index)) for index in range(len(scores))], scores)
    assert scores[found.chosen] == max(scores)
    assert scores[found.rejected] == min(scores)


def test_earlier_of_equals():
    assert pair(BEST, [answer(text) for text in "abcd"], [1.0, 0.0, 1.0, 0.0]) == Pair(0, 1)


def test_reasons_of_best_worst():
    a, b = answer("a"), answer("b", 2)
    assert pair(BEST, [], []).dropped == "fewer than two usable answers"
    assert pair(BEST, [a, b], [None, 1.0]).dropped == "fewer than two usable answers"
    assert pair(BEST, [a, answer(" \n")], [0.0, 1.0]).dropped == "fewer than two usable answers"
    assert pair(BEST, [a, answer("b", 2, "length")], [0.0, 1.0]).dropped == "fewer than two usable answers"
    assert pair(keeping(BEST, unfinished="keep"), [a, answer("b", 2, "length")], [0.0, 1.0]) == Pair(1, 0)
    assert pair(BEST, [a, b], [1.0, 1.0]).dropped == "tie"
    assert pair(keeping(BEST, margin=0.5), [a, b], [0.5, 1.0]).dropped == "within the margin"
    assert pair(keeping(BEST, margin=0.4), [a, b], [0.5, 1.0]) == Pair(1, 0)
    assert pair(BEST, [a, answer("a", 2)], [0.0, 1.0]).dropped == "identical answers"


def test_rule_prefers_the_last_usable_refinement_over_the_direct_answer():
    direct, second, third = answer("a"), answer("b", 2), answer("c", 3)
    assert pair(LAST, [direct, second, third], None) == Pair(2, 0)
    assert pair(LAST, [direct, second, answer("c", 3, "length")], None) == Pair(1, 0)
    assert pair(LAST, [answer("", 1), second], None).dropped == "direct answer empty or unfinished"
    assert pair(LAST, [direct, answer("b")], None).dropped == "no usable refinement"
    assert pair(LAST, [direct, second, answer("a", 3)], None).dropped == "identical answers"
