"""Training curves: what steps.jsonl has, over a member's optimiser steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from sweeps import style, summary
from sweeps.collect import MemberResult, Sweep
from sweeps.style import Point

TRAINING = ("activate", "train", "reinforce")
PANELS = {
    "loss": "loss",
    "margin_direct": "margin of chosen over rejected, direct",
    "margin_refine_rejected": "the same, refining the rejected",
    "reward": "reward",
    "kl_direct": "KL to the reference, direct",
    "kl": "KL to the reference",
    "grad_norm": "norm of the gradient",
}
SHOWN = 4  # panels
POINTS = 150  # of a stage; of longer ones means over equal spans

Stage = tuple[str, str, int, list[dict[str, float]]]  # phase, id, steps before it, its rows


def stages(sweep: Sweep, member: MemberResult) -> Iterator[Stage]:
    """A member's training stages, up to the first whose steps can't be read: how many there were numbers the next."""
    before = 0
    for step in member.steps:
        if step["kind"] in TRAINING:
            if (rows := sweep.rows(step["id"], "steps.jsonl")) is None:
                break
            yield step["phase"], step["id"], before, rows
            before += len(rows)


def over_steps(sweep: Sweep, plt: Any) -> Any | None:
    """A panel for each metric, a colour for each member; a mark where a stage ends."""
    known: dict[str, list[dict[str, float]]] = {}  # by stage: members share them
    runs = [(member, list(stages(sweep, member))) for member in sweep.members]
    keys = {key for _, made in runs for *_, rows in made for row in rows[:1] for key in row}
    panels = [key for key in PANELS if key in keys][:SHOWN]
    if not panels:
        return None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    size = (style.WIDTH * columns / 2, 0.6 + 1.9 * rows)
    fig, axes = plt.subplots(rows, columns, figsize=size, sharex=True, squeeze=False)
    looks, (what, names) = style.styles([member.name for member, _ in runs]), summary.labels(sweep)
    handles: dict[str, Any] = {}
    for ax, key in zip(axes.flat, panels, strict=False):
        for member, made in runs:
            xs, ys, ends = [], [], []
            for phase, stage_id, before, logged in made:
                means = known.setdefault(stage_id, _means(logged))
                here = [(before + row["step"], row[key]) for row in means if key in row]
                if not here:
                    continue
                xs += [x for x, _ in here] + [math.nan]  # no line from one stage to the next
                ys += [y for _, y in here] + [math.nan]
                last, value = here[-1]
                span = int(means[-1].get("span", 1))
                said = f"{phase}, {PANELS[key]} after {len(logged)} steps"
                said += f", mean of the last {span}" if span > 1 else ""
                ends.append(Point(last, said, {"value": value, "low": None, "high": None}, [stage_id]))
            if not ends:
                continue
            ax.plot(xs, ys, color=looks[member.name][0], linewidth=0.9, alpha=0.85)
            handles[names[member.name]] = style.line(ax, member.name, ends, looks[member.name], linestyle="")
        ax.set_title(PANELS[key])
    for ax in list(axes.flat)[len(panels) :]:
        ax.set_visible(False)
    for ax in axes[-1]:
        ax.set_xlabel("optimiser step, through a member's phases")
    style.legend(fig, handles, None if what == "member" else what)
    return fig


def _means(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """At most POINTS rows: means over equal spans, each at its last step; `span`: of how many rows."""
    if len(rows) <= POINTS:
        return rows
    edges = [round(len(rows) * n / POINTS) for n in range(POINTS + 1)]
    spans = [rows[first:last] for first, last in pairwise(edges)]
    return [
        {key: math.fsum(row[key] for row in span) / len(span) for key in PANELS if all(key in row for row in span)}
        | {"step": span[-1]["step"], "span": len(span)}
        for span in spans
    ]
