"""python -m sweeps.workspace FOLDER: saves a W&B workspace that compares the members of a sweep.

Its panels show what sweeps.wandb_log logs of these members, under the same names; each time a new view is saved.
--dry-run prints what would be sent, as JSON, and needs neither a key nor W&B.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from evolve.config import ConfigError
from sweeps import collect, figures, samples, style, wandb_rows
from sweeps.collect import Sweep
from sweeps.training import TRAINING
from sweeps.wandb_log import PATIENCE

ENDS = ("_low", "_high")  # of intervals: in the tables


def workspace(sweep: Sweep, entity: str) -> ws.Workspace:
    """Only this sweep's runs, in its order and in the colours of its figures."""
    looks = style.styles([member.name for member in sweep.members])
    colours = {run: looks[member.name][0] for run, member in wandb_rows.runs(sweep).items()}
    scalars = list(_scalars(sweep))
    goal = scalars[0][1].rpartition("/")[0]  # the first metric of the first benchmark
    return ws.Workspace(
        entity=entity,
        project=sweep.members[0].config["wandb"]["project"],
        name=re.sub(r"[^\w .,-]", "-", sweep.folder.name),  # W&B refuses signs, = too
        sections=list(_sections(sweep, scalars)),
        settings=ws.WorkspaceSettings(max_runs=len(sweep.members) + 1),
        runset_settings=ws.RunsetSettings(
            # By id, not by group: a member of several sweeps is one run, and of one group.
            filters=[expr.Metric("ID").isin([*colours, wandb_rows.sweep_id(sweep)])],
            order=[expr.Ordering(expr.Metric("CreatedTimestamp"), ascending=True)],
            run_settings={run: ws.RunSettings(color=colour) for run, colour in colours.items()},
            pinned_columns=[f"summary:{key}" for _, key, _ in scalars if key.rpartition("/")[0] == goal],
        ),
    )


def _scalars(sweep: Sweep) -> Iterator[tuple[str, str, str]]:
    """Each benchmark's headline numbers once: benchmark, key, and what the key is in words."""
    measured = [one for member in sweep.members for one in member.measurements]
    for benchmark in sweep.benchmarks:
        found = {key: one.titles for one in measured if one.benchmark == benchmark for key in wandb_rows.scalars(one)}
        for key, titles in found.items():
            metric, _, kind = key.removeprefix(f"{benchmark}/").rpartition("/")
            if not kind.endswith(ENDS):
                yield benchmark, key, f"{titles[metric]}, {kind}"


def _sections(sweep: Sweep, scalars: Iterable[tuple[str, str, str]]) -> Iterator[ws.Section]:
    def section(name: str, panels: Iterable[Any], columns: int = 3, is_open: bool = False) -> ws.Section:
        layout = ws.SectionLayoutSettings(columns=columns)
        return ws.Section(name=name, panels=list(panels), is_open=is_open, layout_settings=layout)

    for benchmark, of in groupby(scalars, key=lambda one: one[0]):
        yield section(benchmark, [wr.LinePlot(title=title, x="phase", y=[key]) for _, key, title in of], is_open=True)
    keys = {
        key for member in sweep.members for row in wandb_rows.rows(sweep, member, member.measurements) for key in row
    }
    for kind in TRAINING:
        if curves := [key for key in sorted(keys) if key.startswith(f"{kind}/")]:
            yield section(f"training: {kind}", [wr.LinePlot(title=key, x="optimiser_step", y=[key]) for key in curves])
    tokens = [wr.LinePlot(title="tokens generated for training", x="phase", y=["generated"])] * ("generated" in keys)
    spent = [wr.BarPlot(title=key, metrics=[key]) for key in sorted(keys) if key.startswith("timing/")]
    yield section("cost", [*tokens, *spent])
    chains, chosen = samples.chains(sweep)
    tables = {key for member in sweep.members for key in wandb_rows.tables(sweep, member, chains)}
    notes = {"samples": [wr.MarkdownPanel(markdown=chosen)]}
    shown = [
        panel for key in sorted(tables) for panel in (*notes.get(key, []), wr.WeavePanelSummaryTable(table_name=key))
    ]
    yield section("tables and sample chains", shown, columns=1)
    drawn = [f"figures/{one.name}" for one in figures.write(sweep)]
    yield section("figures and page", [wr.MediaBrowser(media_keys=[key]) for key in [*drawn, "report"]], columns=2)
    yield section("what differs", [wr.RunComparer(diff_only="split")], columns=1)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.workspace", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a sweep's: outputs/sweeps/NAME")
    parser.add_argument("--dry-run", action="store_true", help="print the workspace as JSON, and send nothing")
    asked = parser.parse_args()
    os.environ.update({"WANDB_SILENT": "true"} | PATIENCE | os.environ)
    try:
        sweep = collect.load(asked.folder.absolute())
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not sweep.benchmarks:
        print(f"error: {sweep.folder}: nothing has been measured yet, so there is nothing to compare", file=sys.stderr)
        return 2
    entity = sweep.members[0].config["wandb"]["entity"]
    if not asked.dry_run and not wandb.login(prompt=False, verify=False):
        print("error: no key of W&B: `wandb login` or WANDB_API_KEY sets it up; --dry-run needs none", file=sys.stderr)
        return 2
    try:
        if asked.dry_run:
            print(json.dumps(workspace(sweep, entity or "")._spec, indent=1))  # there is no public way
            return 0
        print(workspace(sweep, entity or wandb.Api().default_entity or "").save().url)
    except (OSError, wandb.Error) as error:
        print(f"error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
