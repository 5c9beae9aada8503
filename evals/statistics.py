"""Numbers that never travel alone: a value, its 95 % interval clustered by prompt, and n.

A prompt is the unit that was sampled, so several answers to one prompt count as one cluster: their mean is taken first,
and the interval is Student's over the prompts' means (scipy). A difference between two turns or two models is paired
by prompt; a table of differences is corrected for how many it holds, and says how small a one it could have seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import fmean, stdev
from typing import TypeVar

NO_SPREAD = 1e-12  # of the largest value: what lies below is rounding


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval [low, high] over n prompts; the bounds are None where n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A mean difference over n prompts with its 95 % interval, and whether it can be told from none.

    p is that of the paired t-test, p_corrected Holm's over the whole table. `detectable` is the smallest true
    difference that this many prompts of this spread show at p < 0.05 four times in five (80 % power, before the
    correction); None where there is no spread to go by.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    p: float
    p_corrected: float
    detectable: float | None


class NotFinite(ValueError):
    """A value that is nan or infinite, and so has no mean; the message says of which prompt."""


def _finite(clusters: Mapping[str, Sequence[float]]) -> None:
    for prompt, values in clusters.items():
        if not all(map(math.isfinite, values)):
            raise NotFinite(f"{prompt}: {', '.join(map(str, values))} is no finite number, so there is no mean of it")


def mean(clusters: Mapping[str, Sequence[float]]) -> Estimate:
    """The mean over prompts of each prompt's mean value.

    Raises ValueError if there is no value at all, NotFinite if one is nan or infinite.
    """
    from scipy import stats

    _finite(clusters)
    means = [fmean(values) for values in clusters.values() if values]
    if not means:
        raise ValueError("no value to take a mean of")
    value = fmean(means)
    if len(means) < 2:
        return Estimate(value, None, None, len(means))
    error = stats.sem(means)
    if error == 0:
        return Estimate(value, value, value, len(means))
    low, high = stats.t.interval(0.95, len(means) - 1, loc=value, scale=error)
    return Estimate(value, float(low), float(high), len(means))


def share(clusters: Mapping[str, Sequence[float]]) -> Estimate:
    """The share of prompts that are right, each 0 or 1, with Wilson's interval: it has a width at 0 and 1 too.

    Raises as `mean` does.
    """
    from scipy import stats

    _finite(clusters)
    right = [int(value) for values in clusters.values() for value in values]
    if not right:
        raise ValueError("no value to take a mean of")
    interval = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return Estimate(sum(right) / len(right), float(interval.low), float(interval.high), len(right))


def paired(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> Estimate:
    """The mean over prompts of (after - before), for the prompts that both have."""
    common = [key for key in after if key in before and after[key] and before[key]]
    return mean({key: [fmean(after[key]) - fmean(before[key])] for key in common})


def ratio(parts: Mapping[str, tuple[float, float]]) -> Estimate:
    """The share of all rows that are won, where prompts have unequally many: {prompt: (won, rows)}, 0 <= won <= rows.

    A logistic regression on a constant gives the same share, and this interval: from its cluster-robust (sandwich)
    variance, on the log-odds, so that it stays within 0 and 1. Where all is won or lost, the log-odds are infinite and
    Wilson's interval over prompts stands in. Raises ValueError if there is no row at all.
    """
    from scipy import special

    values = by_prompt(parts)
    plain = mean({prompt: [value] for prompt, value in values.items()})
    won, rows = sum(won for won, _ in parts.values()), sum(rows for _, rows in parts.values())
    if won in (0, rows):
        return share({prompt: [won / rows] for prompt in values})
    value = won / rows
    if plain.high is None:
        return Estimate(value, None, None, plain.n)
    half = (plain.high - plain.value) / (value * (1 - value))
    low, high = (float(special.expit(special.logit(value) + shift)) for shift in (-half, half))
    return Estimate(value, low, high, plain.n)


def by_prompt(parts: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """What each prompt adds to `ratio`: values whose mean is the ratio, and whose standard error is the ratio's.

    (The linearised ratio: a prompt with three times the rows lies three times as far from it.) So the paired
    difference of two answers' values is the difference of their two ratios.
    """
    counted = {prompt: part for prompt, part in parts.items() if part[1]}
    if not counted:
        raise ValueError("no row to take a share of")
    rows = fmean(rows for _, rows in counted.values())
    value = fmean(won for won, _ in counted.values()) / rows
    return {prompt: value + (won - value * mine) / rows for prompt, (won, mine) in counted.items()}


Name = TypeVar("Name")


def differences(
    pairs: Mapping[Name, tuple[Mapping[str, Sequence[float]], Mapping[str, Sequence[float]]]],
) -> dict[Name, Difference]:
    """{name: (after, before)}, each {prompt: values}, as a table of after - before, paired by prompt.

    Where all prompts differ by the same there is no spread to test against: p is then that of flipping signs, 1 for no
    difference and 2 / 2^n otherwise.

    Raises:
        ValueError: after and before are not over the same prompts.
        NotFinite: a value is nan or infinite.
    """
    tested = {name: _test(str(name), *pair) for name, pair in pairs.items()}
    corrected = holm([p for _, p, _ in tested.values()])
    return {
        name: Difference(**vars(estimate), p=p, p_corrected=of, detectable=detectable)
        for (name, (estimate, p, detectable)), of in zip(tested.items(), corrected, strict=True)
    }


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number, step by step (Holm 1979), in the same order.

    statsmodels' multipletests gives the same, but collects garbage at each call: a tenth of a second, many times over
    in a report.
    """
    corrected, worst = [0.0] * len(ps), 0.0
    for rank, place in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        worst = max(worst, min(1.0, (len(ps) - rank) * ps[place]))
        corrected[place] = worst
    return corrected


def _test(
    name: str, after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]
) -> tuple[Estimate, float, float | None]:
    """The mean difference, the p-value of the paired t-test, and the difference that it would have seen."""
    from scipy import stats

    means = [{prompt: fmean(values) for prompt, values in side.items() if values} for side in (after, before)]
    if alone := sorted(means[0].keys() ^ means[1].keys()):
        raise ValueError(
            f"{name}: {len(alone)} prompts are in one of the two alone ({', '.join(alone[:3])}); "
            "differences are paired, so give both the same prompts"
        )
    gains = {prompt: [value - means[1][prompt]] for prompt, value in means[0].items()}
    estimate, flat = mean(gains), [gain for (gain,) in gains.values()]
    rounding = NO_SPREAD * max(abs(value) for side in means for value in side.values())
    spread = stdev(flat) if len(flat) > 1 else 0.0
    if spread <= rounding:
        return estimate, 1.0 if abs(estimate.value) <= rounding else math.ldexp(2.0, -len(flat)), None
    return estimate, float(stats.ttest_1samp(flat, 0).pvalue), spread * _detectable_effect(len(flat))


@lru_cache
def _detectable_effect(n: int) -> float:
    """In standard deviations of n paired differences: power 0.8 at alpha 0.05, two-sided."""
    from statsmodels.stats.power import TTestPower

    return float(TTestPower().solve_power(nobs=n, alpha=0.05, power=0.8))
