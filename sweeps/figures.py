"""Figures of a sweep as PNG: reward over iterations, over a chain's turns; benchmarks by answers used at test time."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import evals
from evals.refinement import METRICS
from evolve.store import digest, hash_file
from sweeps.collect import Sweep

# Okabe and Ito's colours: apart for the colour-blind too; markers tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
SHORT = {"base": "base", "sft": "SFT", "offline": "offline"}


def _errors(estimates: Sequence[dict[str, Any]]) -> list[list[float]]:
    low = [e["value"] - (e["value"] if e["low"] is None else e["low"]) for e in estimates]
    high = [(e["value"] if e["high"] is None else e["high"]) - e["value"] for e in estimates]
    return [low, high]


def _short(phase: str) -> str:
    return SHORT.get(phase, phase.replace("iteration ", "it "))


def over_iterations(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """Refined (solid) and direct (dashed) answers after each phase, a colour for each member."""
    fig, ax = plt.subplots(figsize=(8, 4.8), layout="constrained")
    place = {phase: number for number, phase in enumerate(sweep.phases)}
    width = len(sweep.members)
    drawn = False
    for number, (member, colour, marker) in enumerate(zip(sweep.members, cycle(COLOURS), cycle(MARKERS), strict=False)):
        shift = (number - (width - 1) / 2) * min(0.06, 0.5 / width)  # so that intervals don't hide one another
        for turn, style in ((-1, "-"), (0, "--")):
            measured = member.of("refinement")
            found = [(m.phase, m.metrics["turns"][turn][metric]) for m in measured]
            found = [(phase, estimate) for phase, estimate in found if estimate]
            if not found or (turn == 0 and len(measured[0].metrics["turns"]) == 1):
                continue
            drawn = True
            ax.errorbar(
                [place[phase] + shift for phase, _ in found],
                [estimate["value"] for _, estimate in found],
                yerr=_errors([estimate for _, estimate in found]),
                color=colour,
                marker=marker,
                markersize=5,
                linestyle=style,
                linewidth=1.6 if turn else 1.0,
                elinewidth=0.8,
                label=member.name if turn else None,
            )
    if not drawn:
        plt.close(fig)
        return None
    ax.set_xticks(range(len(sweep.phases)), [_short(phase) for phase in sweep.phases])
    ax.set_ylabel(METRICS[metric])
    ax.set_title("after each stage: refined answers solid, direct answers dashed; bars: 95 % intervals", fontsize=9)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return fig


def over_turns(sweep: Sweep, metric: str, plt: Any) -> Any | None:
    """The refinement curve (Figure 1's axes) of every phase, a panel for each member."""
    members = [member for member in sweep.members if member.of("refinement")]
    if not members or len(members[0].of("refinement")[0].metrics["turns"]) < 2:
        return None
    columns = min(3, len(members))
    rows = -(-len(members) // columns)
    fig, axes = plt.subplots(
        rows,
        columns,
        figsize=(3.4 * columns + 1.2, 2.9 * rows),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    handles: dict[str, Any] = {}
    for ax, member in zip(axes.flat, members, strict=False):
        for phase, colour, marker in zip(sweep.phases, cycle(COLOURS), cycle(MARKERS), strict=False):
            for measurement in member.of("refinement"):
                if measurement.phase != phase:
                    continue
                turns = [turn for turn in measurement.metrics["turns"] if turn[metric]]
                if turns:
                    estimates = [turn[metric] for turn in turns]
                    handles[phase] = ax.errorbar(
                        [turn["turn"] for turn in turns],
                        [estimate["value"] for estimate in estimates],
                        yerr=_errors(estimates),
                        color=colour,
                        marker=marker,
                        markersize=4,
                        linewidth=1.3,
                        elinewidth=0.8,
                    )
        ax.set_title(member.name, fontsize=9)
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for ax in list(axes.flat)[len(members) :]:
        ax.set_visible(False)
    if not handles:
        plt.close(fig)
        return None
    fig.supxlabel("turn (1: direct answer)", fontsize=9)
    fig.supylabel(METRICS[metric], fontsize=9)
    fig.legend(
        list(handles.values()),
        [_short(phase) for phase in handles],
        loc="outside right center",
        fontsize=8,
        frameon=False,
    )
    return fig


def over_answers(sweep: Sweep, metric: str, plt: Any, benchmark: str = "test_time") -> Any | None:
    """Test-time scaling: a column for each way to use n answers; above by their number, below by tokens generated.

    A colour for each member; its last model solid, its first dotted.
    """
    lines = []  # member's number, colour, marker, style, sizes
    for member, colour, marker in zip(sweep.members, cycle(COLOURS), cycle(MARKERS), strict=False):
        measured = [sizes for m in member.of(benchmark) if (sizes := m.metrics.get("sizes"))]
        measured = [sizes for sizes in measured if sizes[0]["worth"].get("single", {}).get(metric)]
        for sizes, style in zip([measured[-1:], measured[:-1][:1]], "-:", strict=True):
            lines += [(member.name, colour, marker, style, some) for some in sizes]
    kinds = list(dict.fromkeys(kind for *_, sizes in lines for kind in sizes[0]["worth"]))
    if not any(len(sizes) > 1 for *_, sizes in lines):
        return None
    fig, axes = plt.subplots(
        2, len(kinds), figsize=(2.9 * len(kinds) + 1.4, 5.6), sharex="row", sharey=True, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for column, kind in enumerate(kinds):
        for name, colour, marker, style, sizes in lines:
            if kind not in sizes[0]["worth"]:
                continue
            estimates = [size["worth"][kind][metric] for size in sizes]
            places = ([size["answers"] for size in sizes], [size["tokens"]["value"] for size in sizes])
            for row, xs in enumerate(places):
                drawn = axes[row, column].errorbar(
                    xs,
                    [estimate["value"] for estimate in estimates],
                    yerr=_errors(estimates),
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linestyle=style,
                    linewidth=1.5 if style == "-" else 1.0,
                    elinewidth=0.7,
                )
                if style == "-":
                    handles[name] = drawn
        axes[0, column].set_title(kind, fontsize=9)
    for ax in axes.flat:
        ax.grid(alpha=0.25)
        ax.xaxis.get_major_locator().set_params(integer=True)
    for row, what in enumerate(("answers used", "tokens generated for a prompt")):
        axes[row, 0].set_ylabel(evals.load(benchmark).METRICS[metric], fontsize=9)
        for ax in axes[row]:
            ax.set_xlabel(what, fontsize=8)
    fig.suptitle("after the last phase solid, after the first dotted; bars: 95 % intervals over prompts", fontsize=9)
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", fontsize=8, frameon=False)
    return fig


def write(sweep: Sweep) -> list[Path]:
    """Draws every figure that the sweep has numbers for, unless these are drawn already; returns their files."""
    shown = [[member.name, [[m.phase, m.id] for m in member.measurements]] for member in sweep.members]
    fingerprint = digest([shown, hash_file(Path(__file__))])
    note = sweep.folder / ".figures.json"
    if note.exists():
        drawn = json.loads(note.read_text())
        written = [sweep.folder / name for name in drawn["files"]]
        if drawn["of"] == fingerprint and all(path.exists() for path in written):
            return written
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    written = []
    draw = {
        f"{name}-{metric}": partial(of, sweep, metric, plt)
        for name, of in (("iterations", over_iterations), ("turns", over_turns))
        for metric in METRICS
    }
    for benchmark in sweep.benchmarks:
        name = "test_time" if benchmark == "test_time" else f"test_time-{benchmark}"
        for metric in evals.load(benchmark).METRICS:
            draw[f"{name}-{metric}"] = partial(over_answers, sweep, metric, plt, benchmark)
    for name, of in draw.items():
        if (figure := of()) is not None:
            path = sweep.folder / f"{name}.png"
            figure.savefig(path, dpi=130)
            plt.close(figure)
            written.append(path)
    note.write_text(json.dumps({"of": fingerprint, "files": [path.name for path in written]}))
    return written
