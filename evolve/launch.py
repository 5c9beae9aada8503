"""Runs the graph of a sweep on this machine, and shows it to whoever waits.

    plan_members -> Planned;  sweep = plan, run what is missing, report

A stage that fails fails its dependants alone and is shown at once; every other member goes on. Ctrl-C, or a kill at any
moment, loses nothing that was committed: the same command finds it in the store and runs the rest.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import stat
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Protocol

from evolve import cost, estimate, plan, simulate, snapshot, sources, workers
from evolve.config import ROOT, Config, ConfigError
from evolve.estimate import Estimate
from evolve.plan import Graph, Verdict
from evolve.show import Show
from evolve.store import Corrupt, Stage, Store, digest, replace, seal, unseal
from evolve.workers import Inline, Outcome, Setting, Workers

PEERS = 500  # records of a kind, the newest, that new stages are compared with


class Failed(Exception):
    """Some stages failed; the message says which. planned: of which the others are done."""

    def __init__(self, message: str, planned: Planned):
        super().__init__(message, planned)
        self.planned = planned

    def __str__(self) -> str:
        return str(self.args[0])


class Busy(Exception):
    """Another process is making a stage, and nothing else is left to do; the message is the stage's id."""


class Watch(Protocol):
    """Who is told how a run goes."""

    def started(self, stage: Stage) -> None: ...
    def progress(self, stage: Stage, news: workers.Progress) -> None: ...
    def held(self, stage: Stage) -> None: ...
    def retried(self, stage: Stage, outcome: Outcome) -> None: ...
    def finished(self, stage: Stage, outcome: Outcome) -> None: ...


@dataclass
class Planned:
    """A sweep ready to run."""

    graph: Graph
    store: Store
    verdicts: dict[str, Verdict]
    warnings: list[str] = field(default_factory=list)
    judging: list[cost.Judging] = field(default_factory=list)
    expected: dict[str, Estimate] = field(default_factory=dict)  # of new stages

    @property
    def new(self) -> list[Stage]:
        return [stage for stage in self.graph.stages.values() if not self.verdicts[stage.id].reused]

    @property
    def config(self) -> Config:
        """Any member's: for what all share (resources, output, wandb)."""
        return self.graph.members[0].config

    @cached_property
    def folder(self) -> Path:
        """Of the sweep: named by what is in it, so that the same command finds it again."""
        described = [plan.describe(member) for member in self.graph.members]
        keys = sorted({word.split("=")[0].split("/")[-1] for member in described for word in member["name"].split()})
        one = f"{self.config.model.name}-{self.config.strategy.name}-{self.config.loss.name}"
        name = "-".join(keys)[:48] if len(described) > 1 else one
        ids = [[step["id"] for step in member["steps"]] for member in described]
        return self.store.root.parent / "sweeps" / f"{name}-{digest(ids)[:8]}"


def plan_members(configs: Sequence[Config], overrides: Sequence[Sequence[str]]) -> Planned:
    """Resolves what comes from outside, builds the graph, compares it with the store. Writes nothing but hashes' cache.

    Raises ConfigError.
    """
    dry = all(config.dry_run for config in configs)
    store = plan.store_of(configs[0])
    _share(store.root.parent)
    resolver = sources.Resolver(store.root / "digests", unpinned=dry)
    for config in configs:
        resolver.check_rows(
            config.data,
            trained=config.loss.sft is not None or config.loss.pt != "none",
            iterations=config.trained_iterations,
            reward_model=config.trains_reward_model,
        )
    names = plan.names(configs, overrides)
    graph = Graph([plan.build(name, config, resolver) for name, config in zip(names, configs, strict=True)])
    newest = cache(lambda kind: store.newest(kind, PEERS))
    try:
        verdicts = plan.compare(graph, store, newest)
    except OSError as error:
        raise ConfigError(f"output={configs[0].output}: can't be read ({error.strerror})") from None
    new = [stage for stage in graph.stages.values() if not verdicts[stage.id].reused]
    questions = cost.check_questions(new)
    judging = cost.judging(new, questions, store)
    counts = {stage_id: len(rows) for stage_id, rows in questions.items()}
    rates = configs[0].resources.rates
    expected = estimate.estimates(graph.stages, {stage.id for stage in new}, store, newest, counts, rates)
    return Planned(graph, store, verdicts, resolver.warnings, judging, expected)


def sweep(configs: Sequence[Config], overrides: Sequence[Sequence[str]], inline: bool = False) -> Planned:
    """Plans and runs members. `inline`: in this process, one stage at a time, as a job of a stock launcher.

    Raises Failed when a stage failed, after everything else has run and been reported.
    """
    planned = plan_members(configs, overrides)
    if planned.config.resources.slurm is not None and not inline and "SLURM_JOB_ID" not in os.environ:
        planned.warnings.append("resources are Slurm's, but stages run right here: hydra/launcher=slurm submits them")
    show = Show(planned)
    show.plan(simulate.here(planned), full=planned.config.dry_run)
    if planned.config.dry_run:
        return planned
    begin(planned)
    setting = Setting(
        Store(planned.store.root, planned.store.lease_timeout),
        planned.config.resources,
        planned.folder / "logs",
        snapshot.code(),
    )
    outcomes: dict[str, Outcome] = {}
    if any(not verdict.reused for verdict in planned.verdicts.values()):
        pool = Inline(setting) if inline else Workers(setting)
        try:
            with show:
                outcomes = run(planned.new, planned.store, pool, show, retries=planned.config.resources.retries)
        finally:
            pool.close()
    said = ""
    if failed := [stage_id for stage_id, outcome in outcomes.items() if outcome.status == "failed"]:
        blocked = sum(outcome.status == "blocked" for outcome in outcomes.values())
        said = (
            f"{len(failed)} stage(s) failed ({', '.join(failed)}), so {blocked} that need them did not run; "
            f"everything else is done. Logs: {planned.folder / 'logs'}; the same command tries again"
        )
    if not inline:
        conclude(planned, said)
    elif said:
        raise Failed(said, planned)
    return planned


def submit(configs: Sequence[Config], overrides: Sequence[Sequence[str]], wait: bool) -> Planned:
    """Plans members and submits what is missing to Slurm; with `wait`, stays until it has ended, and reports.

    Raises Failed when a stage failed while it stayed; KeyboardInterrupt, with the jobs left alone.
    """
    from evolve import slurm, status

    planned = plan_members(configs, overrides)
    show = Show(planned)
    show.plan(simulate.cluster(planned), full=planned.config.dry_run)
    if planned.config.dry_run:
        show.jobs(slurm.preview(planned))
        return planned
    begin(planned)
    if planned.new:
        with _written(planned):
            show.submitted(slurm.submit(planned))
        if not wait:
            return planned
        try:
            view = status.watch(planned.folder)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("no longer watched; the jobs go on") from None
        if lost := len(view.states) - view.count["done"]:
            conclude(planned, f"{lost} stages were not made; the lines above say why, and the same command tries again")
    conclude(planned)
    return planned


def begin(planned: Planned) -> None:
    """The sweep's folder; the code that runs is kept. Raises ConfigError where the output can't be written to."""
    with _written(planned):
        for folder in {planned.store.folder(stage.id).parent for stage in planned.new}:
            if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        write_sweep(planned)
    snapshot.hold()


@contextlib.contextmanager
def _written(planned: Planned) -> Iterator[None]:
    """What can't be written is said in one line, with whose it is."""
    try:
        yield
    except OSError as error:
        where, why = f"output={planned.config.output}", error.strerror
        if isinstance(error, PermissionError) and error.filename:
            path = Path(error.filename)
            path = path if path.exists() else path.parent
            why = f"{path} is {_owner(path)}'s. For several users: chgrp -R, chmod -R g+rwX, and g+s of its folders"
        raise ConfigError(f"{where}: can't be written to: {why}") from None


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:  # no user of this machine's
        return f"user {path.stat().st_uid}"


def _share(output: Path) -> None:
    """In a folder of a group's (chmod g+ws), what this process and its children write is the group's to write, too."""
    there = next(folder for folder in (output, *output.parents) if folder.exists())
    shared = stat.S_ISGID | stat.S_IWGRP
    if there.stat().st_mode & shared == shared:
        os.umask(os.umask(0) & ~stat.S_IRWXG)


def run(
    stages: Sequence[Stage], store: Store, pool: Workers | Inline, watch: Watch, *, retries: int, patient: bool = True
) -> dict[str, Outcome]:
    """Stages that are not in the store, inputs first: each once its inputs are there, on as many workers as there are.

    patient: whether a stage that another process makes is waited for. Raises Busy where not, once the others are done.
    """
    named = {stage.id: stage for stage in stages}
    outcomes: dict[str, Outcome] = {}
    waiting = {stage.id: {item.id for item in stage.stages if item.id in named} for stage in stages}
    dependants: dict[str, list[str]] = defaultdict(list)
    for stage_id, needs in waiting.items():
        for need in needs:
            dependants[need].append(stage_id)
    order = {stage_id: number for number, stage_id in enumerate(named)}
    ready = [stage_id for stage_id, needs in waiting.items() if not needs]
    running: set[str] = set()
    again: dict[str, float] = {}  # held by another process: when to look again
    tries: dict[str, int] = defaultdict(int)

    def finish(stage_id: str, outcome: Outcome) -> None:
        outcomes[stage_id] = outcome
        watch.finished(named[stage_id], outcome)
        for dependant in dependants[stage_id]:
            if dependant in outcomes:
                continue
            if outcome.status in ("failed", "blocked"):
                finish(dependant, Outcome("blocked", f"needs {stage_id}"))
            else:
                waiting[dependant].discard(stage_id)
                if not waiting[dependant]:
                    ready.append(dependant)

    while len(outcomes) < len(waiting):
        now = time.monotonic()
        for stage_id in [stage_id for stage_id, when in again.items() if when <= now]:
            del again[stage_id]
            if store.record(named[stage_id]) is not None:
                finish(stage_id, Outcome("reused"))
            else:
                ready.append(stage_id)
        ready.sort(key=order.__getitem__)
        short = False  # of GPUs: what an earlier stage waits for, no later one takes
        for stage_id in list(ready):
            stage = named[stage_id]
            if (short and stage.config.gpus) or not pool.takes(stage):
                short = True
                continue
            ready.remove(stage_id)
            running.add(stage_id)
            watch.started(stage)
            pool.start(stage)
        if again and not running and not patient:
            raise Busy(next(iter(again)))
        for stage_id, news in pool.wait(0.2):
            if isinstance(news, workers.Progress):
                watch.progress(named[stage_id], news)
                continue
            running.discard(stage_id)
            if news.status == "busy":
                watch.held(named[stage_id])
                again[stage_id] = time.monotonic() + 0.5
            elif news.status == "failed" and tries[stage_id] < retries:
                tries[stage_id] += 1
                watch.retried(named[stage_id], news)
                ready.append(stage_id)
            else:
                finish(stage_id, news)
    return outcomes


def write_sweep(planned: Planned) -> None:
    """The sweep's folder: which members there are and where their results lie. What sweeps/ reads, beside the store."""
    planned.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "store": os.path.relpath(planned.store.root, planned.folder),
        "lease_timeout": planned.store.lease_timeout,
        **_asked(planned.folder / "sweep.json"),
        "needs": {stage.id: [item.id for item in stage.stages] for stage in planned.graph.stages.values()},
        "members": [plan.describe(member) for member in planned.graph.members],
    }
    replace(planned.folder / "sweep.json", seal(content))


def _asked(before: Path) -> dict[str, str]:
    """The command that a person gave, to be given again, and the experiment that it names; nothing where none was.

    before: the sweep's file, if the same stages ran already: an experiment stays one, however it is asked for now.
    """
    if Path(sys.argv[0]).name != "main.py":
        return {}
    found = {"command": shlex.join(["python", "evolve/main.py", *sys.argv[1:]])}
    named = [word for word in sys.argv[1:] if word.startswith("experiment=")]
    with contextlib.suppress(FileNotFoundError, Corrupt):
        if not named and (known := unseal(before.read_bytes())).get("experiment"):
            return {key: known[key] for key in ("command", "experiment") if key in known}
    return found | {key: value for key, _, value in (word.partition("=") for word in named)}


def report(planned: Planned) -> None:
    """Tables, figures and a page from the store's records, and W&B."""
    from sweeps import collect, report, wandb_log

    if not (planned.folder / "sweep.json").exists():
        write_sweep(planned)
    report.show([planned.folder])
    if planned.config.wandb.mode != "disabled" and wandb_log.pending(collect.load(planned.folder)):
        # A process of its own, after the results: nothing that W&B does can stop a sweep.
        command = [sys.executable, "-m", "sweeps.wandb_log", str(planned.folder)]
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
            output = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
        except subprocess.TimeoutExpired:
            output = [f"not all logged in half an hour; {shlex.join(['python', *command[1:]])} goes on"]
        if output:
            print(f"W&B     {output[-1]}")


def conclude(planned: Planned, failed: str = "") -> None:
    """Reports. Raises Failed where stages failed, `failed` saying which, even if the report breaks."""
    try:
        report(planned)
    except Exception as error:
        if not failed:
            raise
        command = shlex.join(["python", "-m", "sweeps.report", str(planned.folder)])
        print(f"no report: {type(error).__name__}: {error}; {command} tries again", file=sys.stderr)
    if failed:
        raise Failed(failed, planned)
    check_measured(planned)


def check_measured(planned: Planned) -> None:
    """Raises Failed where the report has found a measurement that isn't what was written, and moved it aside."""
    measured = [stage for stage in planned.graph.stages.values() if stage.kind == "evaluate"]
    if gone := [stage.id for stage in measured if planned.store.record(stage) is None]:
        raise Failed(f"{', '.join(gone)}: damaged, so not in the tables; the same command makes it again", planned)


def objective(planned: Planned, number: int) -> float | None:
    """A member's last refined reward, or what its first benchmark has instead: what a search over settings maximises.

    None before it is known, and where there is none.
    """
    import evals

    member = planned.graph.members[number]
    benchmark = next(iter(member.config.eval.benchmarks), None)
    evaluations = [stage for (_, name), stage in member.evaluations.items() if name == benchmark]
    record: Mapping[str, Any] | None = planned.store.record(evaluations[-1]) if evaluations else None
    if record is None or benchmark is None:
        return None
    values = record["values"]
    return next((values[name] for name in evals.load(benchmark).OBJECTIVE if name in values), None)
