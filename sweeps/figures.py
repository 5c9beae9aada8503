"""Figures of a sweep as PNG, SVG and PDF: over iterations, turns, settings, compute, answers used at test time."""

from __future__ import annotations

import contextlib
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import evals
from evals.refinement import METRICS
from evolve.store import RECORD, Corrupt, digest, hash_file, seal, unseal
from evolve.store import replace as replace_file
from sweeps import collect, curves, seeds, style, summary, tables, training
from sweeps.collect import Measurement, Sweep
from sweeps.style import Drawn, Mark, Point

# An experiment's own figure has its name: `figure3-reward.pdf`, not `iterations-reward.pdf`.
NAMED = {
    "figure1": "pooled",
    "figure3": "iterations",
    "figure5": "iterations",
    "alpha_beta": "settings",
    "compute": "compute",
}
DRAWN = 12  # members in a figure that has lines for each: more can't be told apart
SHORT = {"base": "base", "sft": "SFT", "offline": "offline"}


def _short(phase: str) -> str:
    return SHORT.get(phase, phase.replace("iteration ", "it "))


def over_iterations(sweep: Sweep, metric: str, plt: Any, benchmark: str = "refinement") -> Any | None:
    """Direct and refined answers after each phase, side by side: self-improvement, and what a second look adds.

    A line for each member, or for each setting over its runs.
    """
    series = _series(sweep, benchmark)
    what, names = summary.labelled(list(series))
    looks = style.styles(list(names))
    drawn: dict[str, list[tuple[str, list[Point]]]] = {}  # by kind of answers, for each member or setting
    for kind in ("direct", "refined"):
        lines = [(name, points(kind, metric)) for name, points in series.items()]
        if lines := [(name, found) for name, found in lines if found]:
            drawn[kind] = lines
    if not drawn or len(sweep.phases) < 2:
        return None
    panels = style.WIDTH if len(drawn) == 2 else style.WIDTH * 0.6
    fig, axes = plt.subplots(1, len(drawn), figsize=(panels, 2.9), sharey=True, squeeze=False)
    titles = {"direct": "direct answers: self-improvement", "refined": "refined answers: with self-refinement"}
    handles: dict[str, Any] = {}
    for ax, (kind, lines) in zip(axes.flat, drawn.items(), strict=True):
        for name, found in lines:
            handles[names[name]] = style.line(ax, f"{name}, {kind}", found, looks[name])
        ax.set_xticks(range(len(sweep.phases)), [_short(phase) for phase in sweep.phases])
        ax.set_title(titles[kind])
    axes[0, 0].set_ylabel(summary.named(benchmark, sweep.titles(benchmark)[metric]))
    style.legend(fig, handles, None if what == "member" else what)
    return fig


def _series(sweep: Sweep, benchmark: str) -> dict[str, Callable[[str, str], list[Point]]]:
    """For each member, or each setting that has runs: what gives its points by kind of answers and metric."""
    several = seeds.groups(sweep)
    if several:
        [judge] = seeds.judges(sweep, benchmark)
        shifts = [_shift(len(several), number) for number in range(len(several))]
        return {
            name: partial(seeds.points, sweep, runs, benchmark, judge, shift)
            for shift, (name, runs) in zip(shifts, several.items(), strict=True)
        }
    return {
        member.name: partial(_by_phase, sweep, member.of(benchmark), _shift(len(sweep.members), number))
        for number, member in enumerate(sweep.members)
    }


def _by_phase(sweep: Sweep, measured: Sequence[Measurement], shift: float, kind: str, metric: str) -> list[Point]:
    place = {phase: number for number, phase in enumerate(sweep.phases)}
    found = [(one, one.headline.get(kind, {}).get(metric)) for one in measured]
    return [Point(place[one.phase] + shift, one.phase, estimate, [one.id]) for one, estimate in found if estimate]


def _shift(width: int, number: int) -> float:
    """How far the points of one of `width` lines lie beside their phase, so that intervals don't hide one another."""
    return (number - (width - 1) / 2) * min(0.06, 0.5 / width)


def over_metrics(sweep: Sweep, benchmark: str, plt: Any) -> Any | None:
    """A panel for each metric of a benchmark that has many, over phases: refined answers solid, direct ones dashed.

    Metrics that belong together share a panel, as changes from the base's direct answers in standard deviations of
    these by prompt, for their own units have nothing in common; marks of all but the first are hollow.
    """
    titles = sweep.titles(benchmark)
    series = _series(sweep, benchmark)
    together = [group for group in getattr(evals.load(benchmark), "TOGETHER", ()) if titles.keys() >= set(group)]
    scales = {(name, m): _scale(sweep, name, benchmark, m) for name in series for group in together for m in group}
    together = [group for group in together if all(scales[name, m] for name in series for m in group)]
    heads = {group[0]: group for group in together}
    rest = {metric for group in together for metric in group[1:]}
    panels = [heads.get(metric, (metric,)) for metric in titles if metric not in rest]
    if len(sweep.phases) < 2 or not panels:
        return None
    what, names = summary.labelled(list(series))
    looks = style.styles(list(series))
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    fig, axes = plt.subplots(rows, columns, figsize=(style.WIDTH, 0.7 + 1.75 * rows), sharex=True, squeeze=False)
    handles: dict[str, Any] = {}
    for ax, group in zip(axes.flat, panels, strict=False):
        for name, points in series.items():
            for place, metric in enumerate(group):
                for kind, dashes in (("direct", "--"), ("refined", "-")):
                    if not (found := points(kind, metric)):
                        continue
                    said = f"{name}, {kind}"
                    if len(group) > 1 and (scale := scales[name, metric]):
                        found = [replace(point, estimate=_in(scale, point.estimate)) for point in found]
                        said = f"{said}, {metric} in SDs"
                    hollow = {"markerfacecolor": "none", "alpha": 0.6} if place else {}
                    bars = style.line(ax, said, found, looks[name], linestyle=dashes, **hollow)
                    if not place:
                        handles[names[name]] = bars
        title = titles[group[0]]
        if len(group) > 1:
            title = f"{group[0]}, and hollow: {', '.join(group[1:])}; SDs from the base's direct answers"
        ax.set_title("\n".join(textwrap.wrap(title, 30)))
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    for number, ax in enumerate(axes.flat):
        if number < len(panels) <= number + columns:
            ax.set_xticks(range(len(sweep.phases)), [_short(phase) for phase in sweep.phases])
            ax.tick_params(labelbottom=True)
    fig.suptitle(f"{benchmark}: refined answers solid, direct ones dashed", fontsize=8)
    style.legend(fig, handles, None if what == "member" else what)
    return fig


def _scale(sweep: Sweep, name: str, benchmark: str, metric: str) -> tuple[float, float] | None:
    """Mean and standard deviation by prompt of a member's or setting's direct answers before any training.

    None where they were not measured, or are all the same.
    """
    runs = seeds.groups(sweep).get(name) or {"": [member for member in sweep.members if member.name == name]}
    base: dict[str, Measurement] = {}
    for member in (member for members in runs.values() for member in members):
        base |= {one.id: one for one in member.of(benchmark) if one.phase == member.phases(benchmark)[0]}
    values = [value for one in base.values() for value in sweep.items(one).get("direct", {}).get(metric, {}).values()]
    spread = stdev(values) if len(values) > 1 else 0.0
    return (fmean(values), spread) if spread else None


def _in(scale: tuple[float, float], estimate: Mapping[str, Any]) -> dict[str, Any]:
    """An estimate on another scale, whose zero and unit are taken for certain."""
    ends = {key: estimate[key] for key in ("value", "low", "high")}
    return {**estimate, **{key: None if end is None else (end - scale[0]) / scale[1] for key, end in ends.items()}}


def over_turns(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """The refinement curve (Figure 1's axes) of every phase, a panel for each member."""
    members = [
        member
        for member in sweep.members
        if any(len(measured.metrics["turns"]) > 1 for measured in member.of("refinement"))
    ]
    if not members:
        return None
    columns = min(3, len(members))
    rows = -(-len(members) // columns)
    size = (style.WIDTH * (0.25 + 0.25 * columns), 0.6 + 1.75 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    looks, (what, names) = style.styles(sweep.phases), summary.labels(sweep)
    handles: dict[str, Any] = {}
    for ax, member in zip(axes.flat, members, strict=False):
        for measurement in member.of("refinement"):
            turns = [turn for turn in measurement.metrics["turns"] if turn[metric]]
            if turns:
                points = [Point(t["turn"], f"turn {t['turn']}", t[metric], [measurement.id]) for t in turns]
                phase, name = measurement.phase, f"{member.name}, {measurement.phase}"
                handles[phase] = style.line(ax, name, points, looks[phase])
        ax.set_title(names[member.name])
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in list(axes.flat)[len(members) :]:
        ax.set_visible(False)
    if not handles:
        plt.close(fig)
        return None
    for ax in axes[-1]:
        ax.set_xlabel("turn (1: direct answer)")
    for ax in axes[:, 0]:
        ax.set_ylabel(METRICS[metric])
    if what != "member":
        fig.suptitle(f"by {what}", fontsize=8)
    style.legend(fig, {_short(phase): handles[phase] for phase in sweep.phases if phase in handles})
    return fig


def turns_over_runs(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """The refinement curve after the last phase, a line for each setting over its runs."""
    several = seeds.groups(sweep)
    [judge] = seeds.judges(sweep, "refinement")
    what, names = summary.labelled(list(several))
    looks = style.styles(list(names))
    fig, ax = plt.subplots(figsize=(style.WIDTH * 0.6, 2.9))
    handles = {}
    for number, (name, runs) in enumerate(several.items()):
        if points := seeds.turns(runs, judge, metric, _shift(len(several), number)):
            handles[names[name]] = style.line(ax, name, points, looks[name])
    if not handles:
        plt.close(fig)
        return None
    ax.set_xlabel("turn (1: direct answer)")
    ax.set_ylabel(METRICS[metric])
    ax.xaxis.get_major_locator().set_params(integer=True)
    style.legend(fig, handles, None if what == "member" else what)
    return fig


def over_answers(sweep: Sweep, metric: str, plt: Any, benchmark: str = "test_time") -> Any | None:
    """Test-time scaling: a column for each way to use n answers; above by their number, below by tokens generated.

    A colour for each member; its last model solid, its first dotted.
    """
    looks = style.styles([member.name for member in sweep.members])
    lines = []  # member's name, style, measurement, sizes
    for member in sweep.members:
        measured = [(m, sizes) for m in member.of(benchmark) if (sizes := m.metrics.get("sizes"))]
        measured = [(m, sizes) for m, sizes in measured if sizes[0]["worth"].get("single", {}).get(metric)]
        for some, dots in zip([measured[-1:], measured[:-1][:1]], "-:", strict=True):
            lines += [(member.name, dots, m, sizes) for m, sizes in some]
    kinds = list(dict.fromkeys(kind for *_, sizes in lines for kind, of in sizes[0]["worth"].items() if metric in of))
    if not any(len(sizes) > 1 for *_, sizes in lines):
        return None
    size = (max(style.WIDTH, 1.7 * len(kinds)), 4.6)
    fig, axes = plt.subplots(2, len(kinds), figsize=size, sharex="row", sharey=True, squeeze=False)
    handles: dict[str, Any] = {}
    for column, kind in enumerate(kinds):
        for name, dots, made, sizes in lines:
            if metric not in sizes[0]["worth"].get(kind, {}):
                continue
            for row, places in enumerate(
                ([size["answers"] for size in sizes], [size["tokens"]["value"] for size in sizes])
            ):
                points = [
                    Point(
                        x,
                        f"{of['answers']} answers, {of['tokens']['value']:.1f} tokens",
                        of["worth"][kind][metric],
                        [made.id],
                    )
                    for x, of in zip(places, sizes, strict=True)
                ]
                said = f"{name}, {made.phase}, {kind}"
                drawn = style.line(axes[row, column], said, points, looks[name], linestyle=dots)
                if dots == "-":
                    handles[name] = drawn
        axes[0, column].set_title(kind)
    for ax in axes.flat:
        ax.xaxis.get_major_locator().set_params(integer=True)
    for row, what in enumerate(("answers used", "tokens generated for a prompt")):
        axes[row, 0].set_ylabel(sweep.titles(benchmark)[metric])
        for ax in axes[row]:
            ax.set_xlabel(what)
    fig.suptitle("after the last phase solid, after the first dotted", fontsize=8)
    style.legend(fig, handles)
    return fig


Drawing = tuple[str, Callable[[Any], Any | None], bool]  # title, what draws it, whether each member has a line in it


def drawings(sweep: Sweep) -> dict[str, Drawing]:
    """What may be drawn, by file name without its ending. What several judges have judged is drawn for each."""
    over_runs = bool(seeds.groups(sweep))
    found: dict[str, Drawing] = {}
    for benchmark in sweep.benchmarks:
        judges = seeds.judges(sweep, benchmark) if over_runs else sweep.judges(benchmark)
        for number, judge in enumerate(judges, 1):
            own = _of_refinement if benchmark == "refinement" else _of_benchmark
            for name, (title, draw, by_member) in own(sweep.judged(benchmark, judge), benchmark, over_runs).items():
                if len(judges) > 1:
                    found[f"{name}-{number}"] = (f"{title}, by {judge}", draw, by_member)
                else:
                    found[name] = (title, draw, by_member)
    found["training"] = ("training", partial(training.over_steps, replace(sweep, members=sweep.members[:DRAWN])), True)
    return found


def _few(sweep: Sweep, benchmark: str) -> Sweep:
    return replace(sweep, members=[member for member in sweep.members if member.of(benchmark)][:DRAWN])


def _of_refinement(sweep: Sweep, benchmark: str, over_runs: bool) -> dict[str, Drawing]:
    own = NAMED.get(sweep.experiment or "")
    own = "turns" if own == "pooled" and over_runs else own
    few = _few(sweep, benchmark)
    of: dict[str, tuple[str, Callable[..., Any | None]]] = {
        "iterations": ("by phase", over_iterations),
        "turns": ("by turn", turns_over_runs if over_runs else over_turns),
        "pooled": ("by turn, pooled", curves.pooled_turns),
        "settings": ("by setting", curves.over_settings),
        "compute": ("by what training has cost", curves.over_compute),
    }
    if over_runs:
        del of["pooled"]
    found: dict[str, Drawing] = {}
    for name, (by, draw) in of.items():
        every = over_runs or name in ("pooled", "settings")
        for metric, title in METRICS.items():
            shown = sweep.experiment if name == own else name
            found[f"{shown}-{metric}"] = (f"{title} {by}", partial(draw, sweep if every else few, metric), not every)
    return found | _by_answers(sweep, benchmark)


def _of_benchmark(sweep: Sweep, benchmark: str, over_runs: bool) -> dict[str, Drawing]:
    whole = sweep if over_runs else _few(sweep, benchmark)
    titles = sweep.titles(benchmark)
    found = _by_answers(sweep, benchmark)
    if len(titles) > tables.MANY:
        found[benchmark] = (f"{benchmark} by phase", partial(over_metrics, whole, benchmark), not over_runs)
    elif benchmark != "test_time":
        for metric, title in titles.items():
            drawn = partial(over_iterations, whole, metric, benchmark=benchmark)
            about = f"{summary.named(benchmark, title)} by phase"
            found[f"iterations-{benchmark}-{_file(metric)}"] = (about, drawn, not over_runs)
    return found


def _by_answers(sweep: Sweep, benchmark: str) -> dict[str, Drawing]:
    name = "test_time" if benchmark == "test_time" else f"test_time-{benchmark}"
    few = _few(sweep, benchmark)
    return {
        f"{name}-{_file(metric)}": (
            f"{title} by answers used, {benchmark}",
            partial(over_answers, few, metric, benchmark=benchmark),
            True,
        )
        for metric, title in sweep.titles(benchmark).items()
    }


def _file(metric: str) -> str:
    """A metric's name as that of a file: lm-eval's have commas and spaces."""
    return re.sub(r"[^\w@-]+", "-", metric)


def write(sweep: Sweep) -> list[Drawn]:
    """Draws every figure that the sweep has numbers for, unless these are drawn already."""
    ran = [
        [m.name, m.missing, [s["id"] for s in m.steps if (sweep.store.folder(s["id"]) / RECORD).exists()]]
        for m in sweep.members
    ]
    fingerprint = digest([ran, sweep.experiment, collect.code("py")])
    note = sweep.folder / ".figures.json"
    before: set[str] = set()  # files of figures that may no longer be drawn, or have another name
    with contextlib.suppress(FileNotFoundError, Corrupt):
        kept = unseal(note.read_bytes())
        before = set(kept["files"])
        if kept["of"] == fingerprint and kept["files"] == {
            name: hash_file(sweep.folder / name) for name in kept["files"]
        }:
            return [Drawn(**of | {"marks": [Mark(**mark) for mark in of["marks"]]}) for of in kept["figures"]]
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    left_out = f"the first {DRAWN} of {len(sweep.members)} members, of which the tables have all"
    with plt.rc_context(dict(style.STYLE)):
        for name, (title, draw, by_member) in drawings(sweep).items():
            if (figure := draw(plt)) is not None:
                some = left_out if by_member and len(sweep.members) > DRAWN else ""
                said = "; ".join(filter(None, [_bars(sweep, figure, by_member), some]))
                above = "; ".join(filter(None, [figure.get_suptitle(), said]))
                fitting = int(figure.get_figwidth() * 72 / 4)  # characters of a line
                figure.suptitle("\n".join(textwrap.wrap(above, fitting)), fontsize=8)
                written.append(style.save(figure, sweep.folder, name, title, said))
                plt.close(figure)
    hashes = {file.name: hash_file(file) for of in written for file in files(sweep, of)}
    for name in before - hashes.keys():
        (sweep.folder / name).unlink(missing_ok=True)
    if not sweep.damaged:  # else they are drawn again once it has been made again
        replace_file(note, seal({"of": fingerprint, "files": hashes, "figures": [asdict(of) for of in written]}))
    return written


def _bars(sweep: Sweep, figure: Any, by_member: bool) -> str:
    """What a figure's intervals are over, in words; or why there are none over runs."""
    over_runs = bool(seeds.groups(sweep)) and not by_member
    counts = sorted({of["n"] for of in style.estimates(figure) if of["low"] is not None})
    if not counts:
        return seeds.crossed(sweep) if over_runs else ""
    if over_runs:
        return f"bars: 95 % intervals over {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))} runs"
    trained = any(step["kind"] in training.TRAINING for member in sweep.members for step in member.steps)
    return "bars: 95 % intervals over prompts" + (", one training run" if trained else "")


def files(sweep: Sweep, of: Drawn) -> list[Path]:
    return [sweep.folder / f"{of.name}.{form}" for form in style.FORMATS]
