"""What a person sees while a sweep is planned and run: on a terminal live bars, elsewhere plain lines."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from evolve.stages import KINDS
from evolve.store import Stage

if TYPE_CHECKING:
    from evolve.estimate import Estimate
    from evolve.launch import Planned
    from evolve.simulate import Outlook
    from evolve.slurm import Submission
    from evolve.workers import Outcome, Progress


def console() -> Console:
    """A terminal's own width; where there is none (a log, a pipe), room enough for a table's row on one line."""
    found = Console(highlight=False, markup=False)  # names and messages hold brackets of their own
    return found if found.is_terminal else Console(highlight=False, markup=False, width=160)


def duration(seconds: float) -> str:
    """75 -> '1 min 15 s'."""
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def short(number: float) -> str:
    """1234567 -> '1.23M'."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


ROWS = 40  # of a plan's table of members, and of its reasons


class Show:
    """The plan, then the run: a context manager around it."""

    def __init__(self, planned: Planned):
        self.planned = planned
        self.console = console()
        self.live: Any = None
        self._tasks: dict[str, Any] = {}
        self._overall: Any = None
        self._held: set[str] = set()
        self.new = [stage_id for stage_id, verdict in planned.verdicts.items() if not verdict.reused]
        self.done = self.elsewhere = 0
        self._labels = self._label_all()

    def _label_all(self) -> dict[str, str]:
        """'iteration 1 train (strategy=chain loss=both)' for every stage."""
        users: dict[str, list[tuple[str, str]]] = {}
        for member in self.planned.graph.members:
            for step in member.steps:
                users.setdefault(step.stage.id, []).append((step.phase, member.name))
        everyone = len(self.planned.graph.members)
        labels = {}
        for stage_id, found in users.items():
            members = list(dict.fromkeys(name for _, name in found))
            if everyone == 1:
                whose = ""
            elif len(members) == everyone:
                whose = " (all)"
            else:
                whose = f" ({members[0]})" if len(members) == 1 else f" ({len(members)} members)"
            labels[stage_id] = f"{found[0][0]} {stage_id.split('/')[0]}{whose}"
        return labels

    # ---- the plan

    def plan(self, outlook: Outlook, full: bool) -> None:
        graph = self.planned.graph
        for warning in self.planned.warnings:
            self.console.print(f"warning: {warning}", style="yellow")
        saved = graph.unshared - len(graph.stages)
        members = len(graph.members)
        self.console.print(
            f"plan    {len(graph.stages)} stages for {members} member{'s' * (members > 1)}"
            + (f" (shared stages save {saved} of {graph.unshared})" if saved else "")
            + f": {len(graph.stages) - len(self.new)} reused, {len(self.new)} new"
        )
        if self.new:
            self._cost(outlook)
        for judging in self.planned.judging:
            self.console.print(f"judge   {judging}", soft_wrap=True)
        if full:
            self._matrix()
            self._reasons()
            self._basis()
        self.console.print(f"folder  {self.planned.folder}", soft_wrap=True)

    def _cost(self, outlook: Outlook) -> None:
        """Hours and tokens, and how long it takes on what there is."""
        expected = [self.planned.expected[stage_id] for stage_id in self.new]
        tokens = []
        for name in ("generated", "trained"):
            if found := [one for one in expected if one.tokens.get(name)]:
                limit = "at most " if any(one.most for one in found) else "about "
                tokens.append(f"{limit}{short(sum(one.tokens[name] for one in found))} tokens {name}")
        if all(one.seconds is None for one in expected):
            hours = ["unknown hours (no earlier record, and no resources.rates)"]
        else:
            hours = [f"{short(outlook.gpu_hours)} GPU-hours"] if outlook.gpu_hours else []
            hours += [f"{short(outlook.cpu_hours)} CPU-hours"]
        self.console.print(f"cost    {', '.join([*hours, *tokens])}", soft_wrap=True)
        if outlook.on and any(one.seconds for one in expected):
            lengths = [
                f"{duration(schedule.makespan)} on {name}" + (f" ({schedule.busy:.0%} busy)" if schedule.busy else "")
                for name, schedule in outlook.on.items()
            ]
            path = next(iter(outlook.on.values())).path
            least = f"; at least: {outlook.unknown} stages are of unknown length" if outlook.unknown else ""
            self.console.print(f"time    {', '.join(lengths)}; never under {duration(path)}{least}", soft_wrap=True)

    def _basis(self) -> None:
        """What the expected time of each kind of stage goes by."""
        table = Table("kind", "new", "time", "expected by", title="how long new stages take", title_justify="left")
        rows: dict[tuple[str, str], list[Estimate]] = {}
        for stage_id in self.new:
            one = self.planned.expected[stage_id]
            rows.setdefault((stage_id.split("/")[0], one.how), []).append(one)
        for (kind, how), here in sorted(rows.items(), key=lambda row: KINDS.index(row[0][0])):
            spent = "?" if how == "unknown" else duration(sum(one.seconds or 0.0 for one in here))
            table.add_row(kind, str(len(here)), spent, self._words(how, here))
        if any(how != "unknown" for _, how in rows):
            self.console.print(table)

    def _words(self, how: str, expected: Sequence[Estimate]) -> str:
        if how == "assumed" and (rates := self.planned.config.resources.rates):
            return f"assumed: {rates.path}"
        if how == "unknown":
            return "unknown"
        measured = {record for one in expected for record in one.measured}
        hosts = ", ".join(sorted({record.host for record in measured}))
        days = sorted({record.started[:10] for record in measured})
        when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        grown = max(one.grown for one in expected)
        larger = f"; up to {grown:.3g} times as large as those" if grown > 1.05 else ""
        return f"{len(measured)} record{'s' * (len(measured) > 1)} of the {how} ({hosts}, {when}){larger}"

    def _matrix(self) -> None:
        """Members x phases: how many stages are new, reused, or another member's too."""
        graph, verdicts = self.planned.graph, self.planned.verdicts
        phases = list(dict.fromkeys(step.phase for member in graph.members for step in member.steps))
        table = Table(
            "member", *phases, title="stages: new + reused, ~ shared with a member above", title_justify="left"
        )
        seen: set[str] = set()
        for member in graph.members[:ROWS]:
            cells = []
            for phase in phases:
                here = dict.fromkeys(step.stage.id for step in member.steps if step.phase == phase)
                count = Counter(
                    "shared" if stage_id in seen else "reused" if verdicts[stage_id].reused else "new"
                    for stage_id in here
                )
                parts = [
                    f"{count['new']} new" if count["new"] else "",
                    f"{count['reused']} reused" if count["reused"] else "",
                    f"~{count['shared']}" if count["shared"] else "",
                ]
                cells.append(" + ".join(part for part in parts if part) or "-")
            seen |= {step.stage.id for step in member.steps}
            table.add_row(member.name, *cells)
        self.console.print(table)
        if (more := len(graph.members) - ROWS) > 0:
            self.console.print(f"        and {more} more members")

    def _reasons(self) -> None:
        why = Counter(self.planned.verdicts[stage_id].why for stage_id in self.new)
        direct = {reason: count for reason, count in why.items() if not reason.startswith("its ")}
        follow = sum(why.values()) - sum(direct.values())
        ordered = sorted(direct.items(), key=lambda item: -item[1])
        for reason, count in ordered[:ROWS]:
            self.console.print(f"new     {count:4d}  {reason}", soft_wrap=True)
        if rest := ordered[ROWS:]:
            self.console.print(f"new     {sum(count for _, count in rest):4d}  {len(rest)} more reasons")
        if follow:
            self.console.print(f"new     {follow:4d}  an input is new")

    # ---- jobs of a cluster

    def jobs(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(f"job     {line}", soft_wrap=True)

    def submitted(self, made: Submission) -> None:
        there = f"; {made.attached} stages are under way already" if made.attached else ""
        left = ""
        if made.left and made.rest:
            left = f"; {made.left} wait for room in the queue, and are submitted when the others have ended"
        elif made.left:
            left = f"; {made.left} find no room in the queue, and nothing submits them but the same command again"
        if made.jobs or there or left:
            self.console.print(f"jobs    {len(made.jobs)} submitted{there}{left}", soft_wrap=True)
            if made.earlier:
                what = f"{made.earlier} jobs in the queue keep their earlier resources"
                self.console.print(f"        {what}; python -m evolve.cancel first changes them", soft_wrap=True)
            self.console.print(f"        python -m evolve.status {self.planned.folder} --watch", soft_wrap=True)
            self.console.print(f"        python -m evolve.cancel {self.planned.folder}", soft_wrap=True)

    # ---- the run

    def __enter__(self) -> Show:
        self.began = time.time()
        if self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self.live = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.live.start()
            self._overall = self.live.add_task("stages", total=len(self.new))
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.live.stop()
        other = f", {self.elsewhere} by another process" if self.elsewhere else ""
        ran = f"{self.done - self.elsewhere} of {len(self.new)} new stages"
        self.console.print(f"ran     {ran}{other} in {duration(time.time() - self.began)}")

    def _line(self, text: str, style: str = "") -> None:
        clock = "" if self.console.is_terminal else time.strftime("%H:%M:%S ")
        self.console.print(f"{clock}{text}", style=style, soft_wrap=True)

    def started(self, stage: Stage) -> None:
        if self.live:
            self._tasks[stage.id] = self.live.add_task(f"  {self._labels[stage.id]}", total=None)

    def progress(self, stage: Stage, news: Progress) -> None:
        if self.live and stage.id in self._tasks:
            self.live.update(self._tasks[stage.id], completed=news.done, total=news.total)

    def _ended(self, stage: Stage) -> None:
        if self.live and stage.id in self._tasks:
            self.live.remove_task(self._tasks.pop(stage.id))

    def held(self, stage: Stage) -> None:
        self._ended(stage)
        if stage.id not in self._held:
            self._held.add(stage.id)
            self._line(f"wait    {self._labels[stage.id]}: another process is building it")

    def retried(self, stage: Stage, outcome: Outcome) -> None:
        self._ended(stage)
        self._line(f"again   {self._labels[stage.id]}: {outcome.message}", "yellow")

    def finished(self, stage: Stage, outcome: Outcome) -> None:
        self._ended(stage)
        if outcome.status == "failed":
            self._line(f"FAILED  {self._labels[stage.id]}: {outcome.message}", "bold red")
            if outcome.log:
                self._line(f"        log: {outcome.log}")
            return
        if outcome.status == "blocked":
            return
        self.done += 1
        self.elsewhere += outcome.status == "reused"
        if self.live:
            self.live.update(self._overall, advance=1)
        else:
            self._line(f"{self.done:4d}/{len(self.new)}  {self._labels[stage.id]}  {outcome.seconds:.1f} s")
        if stage.kind == "evaluate":
            self._result(stage)

    def _result(self, stage: Stage) -> None:
        import json

        import evals

        metrics = json.loads((self.planned.store.folder(stage.id) / "metrics.json").read_text())
        name = metrics["benchmark"]
        label = self._labels[stage.id].replace(" evaluate", "" if name == "refinement" else f" {name}")
        self._line(f"result  {label}: {evals.load(name).summary(metrics)}", "bold")
