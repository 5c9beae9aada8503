"""Ratios and tables of differences against statsmodels, scipy, simulation and their own symmetries."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from statsmodels.stats.multitest import multipletests

from evals import statistics
from evals.statistics import Estimate

values = st.floats(-100, 100).map(lambda value: round(value, 2))
answers = st.lists(values, min_size=1, max_size=3)
sides = st.dictionaries(st.text(max_size=3), st.tuples(answers, answers), min_size=1, max_size=8).map(
    lambda both: tuple({prompt: pair[side] for prompt, pair in both.items()} for side in (0, 1))
)
tables = st.dictionaries(st.text(max_size=3), sides, min_size=1, max_size=5)
parts = st.dictionaries(
    st.text(max_size=3),
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda two: (min(two) / 2, float(max(two)))),
    min_size=2,
    max_size=9,
).filter(lambda made: any(rows for _, rows in made.values()))


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def matched(seed, n, gain=0.0, answers=1):
    """`answers` answers to n prompts, after and before, which share what their prompt is worth."""
    draw = np.random.default_rng(seed)
    base, noise = draw.normal(size=(n, 1)), draw.normal(size=(2, n, answers))
    return tuple(
        {str(k): row for k, row in enumerate((base + noise[side] + gain * (1 - side)).tolist())} for side in (0, 1)
    )


@pytest.mark.parametrize("n", [2, 3, 30, 500])
def test_p_and_interval_are_those_of_the_paired_t_test(n):
    after, before = matched(n, n, 0.3)
    theirs = stats.ttest_rel([v for (v,) in after.values()], [v for (v,) in before.values()])
    found = statistics.differences({"gain": (after, before)})["gain"]
    assert (found.p, found.p_corrected, found.n) == (pytest.approx(theirs.pvalue, rel=1e-9), found.p, n)
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_answers_to_one_prompt_are_one_value():
    after, before = matched(1, 40, 0.2, answers=3)
    alone = tuple({prompt: [sum(row) / 3] for prompt, row in side.items()} for side in (after, before))
    found = statistics.differences({"three": (after, before), "mean": alone})
    assert vars(found["three"]) == pytest.approx(vars(found["mean"]))


def test_the_detectable_difference_is_detected_four_times_in_five():
    """50 prompts; the true difference is what an independent draw of the same spread calls detectable."""
    spread = 2**0.5
    assumed = statistics.differences({"": matched(0, 50)})[""]
    scale = assumed.detectable / np.std([a[0] - b[0] for a, b in zip(*map(dict.values, matched(0, 50)), strict=True)])
    found = statistics.differences({str(seed): matched(seed, 50, scale * spread) for seed in range(1, 1001)})
    assert abs(np.mean([one.p < 0.05 for one in found.values()]) - 0.8) < 0.04


def test_differences_cover_the_truth_and_find_nothing_where_there_is_nothing():
    found = statistics.differences({str(seed): matched(seed, 25) for seed in range(2000)}).values()
    assert abs(np.mean([one.low <= 0 <= one.high for one in found]) - 0.95) < 0.015
    assert abs(np.mean([one.p < 0.05 for one in found]) - 0.05) < 0.015
    assert not any(one.p_corrected < 0.05 for one in found)


@settings(max_examples=12)  # statsmodels collects garbage at each correction, a tenth of a second
@given(st.lists(st.floats(0, 1), min_size=1, max_size=9))
def test_holms_correction_is_statsmodels(ps):
    assert statistics.holm(ps) == pytest.approx(list(multipletests(ps, method="holm")[1]))


@given(tables)
def test_all_of_a_table_are_corrected_together(table):
    found = statistics.differences(table)
    assert [one.p_corrected for one in found.values()] == statistics.holm([one.p for one in found.values()])


@given(sides)
def test_swapped_sides_swap_the_sign(pair):
    there, back = (statistics.differences({"": side})[""] for side in (pair, pair[::-1]))
    assert there.value == pytest.approx(-back.value, abs=1e-9)
    assert (there.p, there.detectable, there.n) == (pytest.approx(back.p), pytest.approx(back.detectable), back.n)
    if there.n > 1:
        assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=1e-9)


@given(tables, st.randoms())
def test_order_is_nothing(table, draw):
    def shuffled(mapping):
        return dict(draw.sample(sorted(mapping.items()), len(mapping)))

    mixed = shuffled({name: tuple(map(shuffled, pair)) for name, pair in table.items()})
    found, again = statistics.differences(table), statistics.differences(mixed)
    assert found.keys() == again.keys()
    for name, one in found.items():
        assert vars(one) == pytest.approx(vars(again[name]), abs=1e-9)


def flat(value, n):
    return {str(k): [value] for k in range(n)}


def test_without_spread_signs_are_flipped():
    """0.3 - 0.2 and 0.2 - 0.1 differ by rounding alone: that is no spread."""
    rounded = ({"0": [0.3], "1": [0.2], "2": [0.7]}, {"0": [0.2], "1": [0.1], "2": [0.6]})
    found = statistics.differences(
        {
            "none": (flat(0.5, 9), flat(0.5, 9)),
            "constant": (flat(1.0, 9), flat(0.0, 9)),
            "rounded": rounded,
            "one": (flat(3.0, 1), flat(1.0, 1)),
            "many": (flat(1.0, 5000), flat(0.0, 5000)),
        }
    )
    assert [found[name].p for name in found] == [1.0, 2 * 0.5**9, 0.25, 1.0, 0.0]
    assert all(one.detectable is None for one in found.values())
    assert (found["one"].value, found["one"].low, found["one"].high, found["one"].n) == (2.0, None, None, 1)
    assert (found["constant"].low, found["constant"].high) == (1.0, 1.0)
    assert statistics.differences({}) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused_by_name(value):
    after, before = flat(1.0, 3), flat(0.0, 3)
    after["1"] = [value]
    for made in (
        lambda: statistics.mean(after),
        lambda: statistics.share(after),
        lambda: statistics.paired(after, before),
        lambda: statistics.differences({"gain": (after, before)}),
    ):
        with pytest.raises(statistics.NotFinite, match=rf"^1: {value} is no finite number"):
            made()


def test_other_prompts_are_refused():
    table = {"same": (flat(1.0, 3), flat(0.0, 3)), "DPO": (flat(1.0, 4), {**flat(0.0, 2), "x": [1.0], "3": []})}
    with pytest.raises(ValueError, match=r"^DPO: 3 prompts are in one of the two alone \(2, 3, x\)"):
        statistics.differences(table)
    with pytest.raises(ValueError, match="no value"):
        statistics.differences({"": ({}, {})})


def drawn(seed, n, mean):
    """A share of about `mean`, where decided prompts have more rows: as Arena-Hard's."""
    draw = np.random.default_rng(seed)
    lean = draw.beta(2 * mean, 2 * (1 - mean), size=n)
    rows = draw.choice([2, 4, 6], size=n)
    won = draw.binomial(rows, lean)
    return {str(k): (float(one), float(of)) for k, (one, of) in enumerate(zip(won, rows, strict=True))}


def test_the_interval_is_statsmodels_clustered_one():
    """statsmodels takes the normal's quantile, and n / (n - 1) times (rows - 1) / (rows - 1): one parameter."""
    import statsmodels.api as sm

    made = drawn(0, 60, 0.3)
    won = np.concatenate([[1] * int(w) + [0] * int(of - w) for w, of in made.values()])
    groups = np.concatenate([[k] * int(of) for k, (_, of) in enumerate(made.values())])
    fit = sm.Logit(won, np.ones(len(won))).fit(disp=0, cov_type="cluster", cov_kwds={"groups": groups})
    found = statistics.ratio(made)
    assert found.value == pytest.approx(won.mean())
    assert found.n == 60
    half = (np.log(found.high / (1 - found.high)) - np.log(found.low / (1 - found.low))) / 2
    assert half / stats.t.ppf(0.975, 59) == pytest.approx(fit.bse[0], rel=1e-6)


@pytest.mark.parametrize("truth", [0.03, 0.3, 0.5])
def test_ratios_cover_the_truth(truth):
    """And rows taken for independent do not."""
    found, rows = [], []
    for seed in range(1000):
        made = drawn(seed, 100, truth)
        found.append(statistics.ratio(made))
        rows.append(
            statistics.ratio(
                {f"{k}.{row}": (float(row < won), 1.0) for k, (won, of) in made.items() for row in range(int(of))}
            )
        )
    covered, naive = (np.mean([one.low <= truth <= one.high for one in some]) for some in (found, rows))
    assert abs(covered - 0.95) < 0.02
    assert naive < covered - 0.05


@given(parts)
def test_a_ratio_is_a_share_within_its_bounds(made):
    found = statistics.ratio(made)
    won, rows = map(sum, zip(*made.values(), strict=True))
    assert found.value == pytest.approx(won / rows)
    if found.low is not None:
        assert 0 <= found.low <= found.value + 1e-12
        assert found.value - 1e-12 <= found.high <= 1
    lost = statistics.ratio({prompt: (of - won, of) for prompt, (won, of) in made.items()})
    assert lost.value == pytest.approx(1 - found.value)
    if found.low is not None:
        assert (lost.low, lost.high) == pytest.approx((1 - found.high, 1 - found.low), abs=1e-9)
    by_prompt = statistics.by_prompt(made)
    assert math.fsum(by_prompt.values()) / len(by_prompt) == pytest.approx(found.value)
    assert found.n == len(by_prompt)


def test_ratio_without_spread():
    assert statistics.ratio({"a": (0.0, 2.0), "b": (0.0, 6.0)}) == statistics.share({"a": [0.0], "b": [0.0]})
    assert statistics.ratio({"a": (1.0, 2.0), "b": (3.0, 6.0)}) == Estimate(0.5, 0.5, 0.5, 2)
    assert statistics.ratio({"a": (1.0, 2.0), "b": (0.0, 0.0)}) == Estimate(0.5, None, None, 1)
    with pytest.raises(ValueError, match="no row"):
        statistics.ratio({"a": (0.0, 0.0)})


@settings(max_examples=50)
@given(parts, st.randoms())
def test_the_gain_of_a_ratio_is_the_difference_of_two(made, draw):
    other = {prompt: (of - won, of) for prompt, (won, of) in made.items()}
    gain = statistics.paired(
        *({prompt: [v] for prompt, v in statistics.by_prompt(side).items()} for side in (other, made))
    )
    assert gain.value == pytest.approx(statistics.ratio(other).value - statistics.ratio(made).value, abs=1e-9)
