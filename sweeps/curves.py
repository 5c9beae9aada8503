"""Figures over what a sweep varies: turns pooled over templates and seeds, numbers among the settings, compute."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from evals.refinement import METRICS
from sweeps import pooled, seeds, style, summary
from sweeps.collect import Sweep
from sweeps.spent import spent
from sweeps.style import Point

TITLES = {"direct": "direct answers", "refined": "refined answers", "gain": "gain of refinement"}


def pooled_turns(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """Figure 1: reward by turn after the last phase, a line for each model, pooled and by template. [paper]"""
    groups = [group for group in pooled.groups(sweep) if len(group) > 1 and pooled.measured(group)]
    if not groups:
        return None
    templates = list(dict.fromkeys(member.config["template"]["name"] for group in groups for member in group))
    parts: list[str | None] = [None, *(templates if len(templates) > 1 else [])]
    size = (max(0.55, 0.25 * len(parts)) * style.WIDTH, 2.6)
    fig, axes = plt.subplots(1, len(parts), figsize=size, sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    looks = style.styles([pooled.name(group) for group in groups])
    for ax, template in zip(axes.flat, parts, strict=True):
        for group in groups:
            members = [member for member in group if template in (None, member.config["template"]["name"])]
            curves = pooled.measured(members)
            estimates = pooled.by_turn(sweep, curves, metric)
            if estimates:
                records, name = [one.id for one in curves], pooled.name(group)
                said = name if template is None else f"{name}, template {template}"
                points = [Point(turn, f"turn {turn}", of, records) for turn, of in enumerate(estimates, 1)]
                handles[name] = style.line(ax, said, points, looks[name])
        ax.set_title(
            "all templates"
            if template is None and len(parts) > 1
            else ""
            if template is None
            else f"template {template}"
        )
        ax.set_xlabel("turn (1: direct answer)")
        ax.xaxis.get_major_locator().set_params(integer=True)
    if not handles:
        plt.close(fig)
        return None
    axes[0, 0].set_ylabel(METRICS[metric])
    style.legend(fig, handles)
    return fig


def over_settings(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """Direct answers, refined answers and gain after the last phase over a setting that is a number.

    Of several such settings the one with the most values is the axis; what else members differ in makes the lines.
    """
    [judge] = seeds.judges(sweep, "refinement")
    last = seeds.last(sweep, judge, metric)
    words = {name: dict(word.split("=", 1) for word in name.split(" ") if "=" in word) for name in last}
    if not words:
        return None
    numbers = [
        key for key in next(iter(words.values())) if all(_number(of.get(key)) is not None for of in words.values())
    ]
    values = {key: {of[key] for of in words.values()} for key in numbers if not key.endswith("seed")}
    key = max(values, key=lambda key: len(values[key]), default=None)
    if key is None or len(values[key]) < 2:
        return None
    points: dict[str, dict[str, list[Point]]] = {}
    for name, kinds in last.items():
        rest = " ".join(f"{other}={value}" for other, value in words[name].items() if other != key)
        for kind, (estimate, records) in kinds.items():
            value = words[name][key]
            point = Point(float(value), f"{key}={value}", estimate, records)
            points.setdefault(kind, {}).setdefault(rest, []).append(point)
    if not points:
        return None
    fig, axes = plt.subplots(1, len(points), figsize=(style.WIDTH, 2.7), squeeze=False)
    handles: dict[str, Any] = {}
    looks = style.styles(list(next(iter(points.values()))))
    for ax, (kind, lines) in zip(axes.flat, points.items(), strict=True):
        for rest, found in lines.items():
            said = ", ".join(filter(None, [rest, kind]))
            handles[rest] = style.line(ax, said, sorted(found, key=lambda point: point.x), looks[rest])
        ax.set_xticks(sorted(float(value) for value in values[key]))
        ax.set_title(TITLES.get(kind, kind))
        ax.set_xlabel(key)
    axes[0, 0].set_ylabel(METRICS[metric])
    if len(handles) > 1:
        style.legend(fig, handles)
    return fig


def _number(word: str | None) -> float | None:
    try:
        return float(word or "")
    except ValueError:
        return None


def over_compute(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """Direct and refined answers by what training has cost so far: tokens generated and trained on, and time."""
    over_runs = seeds.groups(sweep)
    several: dict[str, seeds.Runs] = over_runs or {member.name: {"": [member]} for member in sweep.members}
    what, names = summary.labelled(list(several))
    looks = style.styles(list(several))
    fig, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 4.6), sharex="col", sharey="row")
    handles: dict[str, Any] = {}
    [judge] = seeds.judges(sweep, "refinement")
    for name, runs in several.items():
        by_phase = seeds.measured(runs, "refinement", judge)
        costs = [spent(sweep, member) for members in runs.values() for member in members]
        for row, kind in enumerate(("direct", "refined")):
            found = []
            for phase in sweep.phases:
                here = [cost[phase] for cost in costs if phase in cost]
                measured = by_phase.get(phase, {})
                worth = (
                    seeds.over_runs(measured, kind, metric)
                    if over_runs
                    else next((seeds.worth(one, kind, metric) for [one] in measured.values()), None)
                )
                if here and worth:
                    found.append((phase, fmean(of.made for of in here), fmean(of.seconds for of in here), worth))
            if len(found) < 2:
                continue
            for column in range(2):
                points = [
                    Point(seconds if column else made, f"{phase}, {made:,.0f} tokens, {seconds:,.0f} s", *worth)
                    for phase, made, seconds, worth in found
                ]
                said = f"{name}, {kind}"
                handles[names[name]] = style.line(axes[row, column], said, points, looks[name])
    if not handles:
        plt.close(fig)
        return None
    for row, kind in enumerate(("direct", "refined")):
        axes[row, 0].set_ylabel(f"{METRICS[metric]}\n{kind} answers")
    axes[1, 0].set_xlabel("tokens generated and trained on, so far")
    axes[1, 1].set_xlabel("seconds of stages x their devices, so far")
    axes[1, 0].xaxis.set_major_formatter(plt.matplotlib.ticker.EngFormatter(sep=""))
    style.legend(fig, handles, None if what == "member" else what)
    return fig
