"""Numbers that never travel alone: a value, its 95 % interval clustered by prompt, and n.

A prompt is the unit that was sampled, so several answers to one prompt count as one cluster: their mean is taken first,
and the interval is Student's over the prompts' means (scipy). A difference between two turns or two models is paired
by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval [low, high] over n prompts; the bounds are None where n < 2."""

    value: float
    low: float | None
    high: float | None
    n: int


def mean(clusters: Mapping[str, Sequence[float]]) -> Estimate:
    """The mean over prompts of each prompt's mean value. Raises ValueError if there is no value at all."""
    from scipy import stats

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
    """The share of prompts that are right, each 0 or 1, with Wilson's interval: it has a width at 0 and 1 too."""
    from scipy import stats

    right = [int(value) for values in clusters.values() for value in values]
    if not right:
        raise ValueError("no value to take a mean of")
    interval = stats.binomtest(sum(right), len(right)).proportion_ci(method="wilson")
    return Estimate(sum(right) / len(right), float(interval.low), float(interval.high), len(right))


def paired(after: Mapping[str, Sequence[float]], before: Mapping[str, Sequence[float]]) -> Estimate:
    """The mean over prompts of (after - before), for the prompts that both have."""
    common = [key for key in after if key in before and after[key] and before[key]]
    return mean({key: [fmean(after[key]) - fmean(before[key])] for key in common})
