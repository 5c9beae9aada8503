"""When a plan's jobs would start and end on machines that are all its own: Slurm's order of things, without Slurm.

Jobs wait for those they need. Of the ones that can start, the one submitted first goes first; where it has no room, it
gets the machine that will have room soonest, by the others' time limits, and later ones start only where they don't put
that off (Slurm's backfill, with one reservation). A job over several machines gets as much of each.
"""

from __future__ import annotations

import bisect
import heapq
import math
import re
import subprocess
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evolve import devices, jobs, slurm
from evolve.config import ConfigError, Node
from evolve.jobs import Job
from evolve.slurm import LAST
from evolve.store import Stage

if TYPE_CHECKING:
    from evolve.launch import Planned

Amounts = tuple[int, int, int]  # GPUs, CPUs, MiB


@dataclass(frozen=True)
class Task:
    """A job. seconds: that it will take; limit: that its time limit says; needs: keys of those it waits for.

    wants: on each of so many different machines (nodes).
    """

    key: str
    seconds: float
    wants: Amounts
    needs: frozenset[str] = frozenset()
    limit: float = 0.0
    nodes: int = 1


@dataclass
class Schedule:
    """starts, ends: seconds by task's key; nodes: where. path: seconds of the longest chain of tasks that wait.

    busy: the share of the GPUs' time that jobs hold them, until the last has ended.
    """

    starts: dict[str, float] = field(default_factory=dict)
    ends: dict[str, float] = field(default_factory=dict)
    nodes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    path: float = 0.0
    busy: float = 0.0

    @property
    def makespan(self) -> float:
        return max(self.ends.values(), default=0.0)


def simulate(
    tasks: Sequence[Task], nodes: Sequence[Amounts], startup: float = 0.0, most: int | None = None
) -> Schedule:
    """Tasks in the order that they are submitted in, each after those it needs.

    startup: seconds that each takes beside its own. most: how many may be in the queue at once; the rest is submitted
    as resources.slurm.max_jobs has it. Raises ConfigError for a task that no machine has room for.
    """
    for task in tasks:
        if (enough := sum(_fits(task.wants, node) for node in nodes)) < task.nodes:
            gpus, cpus, memory = task.wants
            those = "no node has" if not enough else f"{enough} of the {task.nodes} nodes that it needs have"
            raise ConfigError(
                f"resources.slurm.needs: a job wants {gpus} GPUs, {cpus} CPUs and {memory} MiB, which {those}; "
                f"the largest has {' / '.join(map(str, max(nodes, default=(0, 0, 0))))}"
            )
    made = Schedule(path=critical(tasks, startup))
    free = [list(node) for node in nodes]
    waits = [{need for need in task.needs} for task in tasks]
    needed: dict[str, list[int]] = {}
    for place, task in enumerate(tasks):
        for need in task.needs:
            needed.setdefault(need, []).append(place)
    ready: list[int] = []  # places of those that wait for nothing but room, in order
    running: list[tuple[float, int]] = []  # (when it ends, its place)
    limits: dict[int, float] = {}  # by place: when Slurm takes a running one to end
    submitted, now = 0, 0.0

    def reserve(task: Task) -> tuple[float, dict[int, list[int]]]:
        """When machines have room for it first, and what is left on these beside it then."""
        then = [list(node) for node in free]
        for when, place in sorted((limits[place], place) for _, place in running):
            for node in made.nodes[tasks[place].key]:
                _add(then[node], tasks[place].wants, 1)
            fitting = [node for node, has in enumerate(then) if _fits(task.wants, has)][: task.nodes]
            if len(fitting) == task.nodes:
                for node in fitting:
                    _add(then[node], task.wants, -1)
                return when, {node: then[node] for node in fitting}
        raise AssertionError("machines that are empty have room")

    while submitted < len(tasks) or ready or running:
        if all(task.key in made.ends for task in tasks[max(0, submitted - LAST) : submitted]):
            queued = submitted - len(made.ends)
            before, room = submitted, len(tasks) if most is None else max(1, most - queued - (submitted > 0))
            submitted = min(len(tasks), submitted + room)
            ready += [place for place in range(before, submitted) if not waits[place]]
        start, held = math.inf, dict[int, list[int]]()  # when the first that has no room starts; what it leaves
        full: set[Amounts] = set()  # there is no room for so much
        left = []
        for place in ready:
            task = tasks[place]
            limit = max(task.limit, startup + task.seconds)
            fitting = [] if task.wants in full else [node for node, has in enumerate(free) if _fits(task.wants, has)]
            late = held if now + limit > start else {}  # it would still be there then
            chosen = [node for node in fitting if node not in late or _fits(task.wants, late[node])][: task.nodes]
            if len(chosen) == task.nodes:
                for node in chosen:
                    _add(free[node], task.wants, -1)
                    if node in late:
                        _add(late[node], task.wants, -1)
                made.starts[task.key], made.nodes[task.key], limits[place] = now, tuple(chosen), now + limit
                heapq.heappush(running, (now + startup + task.seconds, place))
            else:
                left.append(place)
                if not held:
                    start, held = reserve(task)
                if not fitting:
                    full.add(task.wants)
        ready = left
        now = running[0][0]
        while running and running[0][0] == now:
            _, place = heapq.heappop(running)
            made.ends[tasks[place].key] = now
            for node in made.nodes[tasks[place].key]:
                _add(free[node], tasks[place].wants, 1)
            for other in needed.get(tasks[place].key, ()):
                waits[other].discard(tasks[place].key)
                if not waits[other] and other < submitted:
                    bisect.insort(ready, other)
    gpus = sum(node[0] for node in nodes)
    used = sum(task.nodes * task.wants[0] * (startup + task.seconds) for task in tasks)
    made.busy = used / (gpus * made.makespan) if gpus and made.makespan else 0.0
    return made


def critical(tasks: Iterable[Task], startup: float = 0.0) -> float:
    """Seconds that the longest chain of tasks takes, each waiting for the one before."""
    ends: dict[str, float] = {}
    for task in tasks:
        ends[task.key] = startup + task.seconds + max((ends[need] for need in task.needs), default=0.0)
    return max(ends.values(), default=0.0)


def _add(to: list[int], amounts: Sequence[int], sign: int) -> None:
    for part, amount in enumerate(amounts):
        to[part] += sign * amount


def _fits(wants: Sequence[int], has: Sequence[int]) -> bool:
    return all(wanted <= there for wanted, there in zip(wants, has, strict=True))


def megabytes(memory: str) -> int:
    """Of a size as sbatch --mem has it, in MiB."""
    number, unit = memory.rstrip("KMGTkmgt"), memory[-1].upper()
    return -(-int(number) // 1024) if unit == "K" else int(number) * {"G": 1024, "T": 1024**2}.get(unit, 1)


def of_jobs(made: Sequence[Job], seconds: Mapping[str, float]) -> list[Task]:
    """Jobs as tasks, with those that share a stage's rows; seconds: of each stage, by id."""
    after, tasks = jobs.after(made), list[Task]()
    for job in made:
        wants = job.need.gpus or 0, job.need.cpus, megabytes(job.need.memory)
        takes, needs, limit = (
            sum(seconds[stage.id] for stage in job.stages),
            frozenset(after[job.key]),
            60.0 * job.need.minutes,
        )
        if job.shared is not None:
            each = seconds[job.shared.id] / job.need.shards
            shares = [Task(f"{job.key}/{n}", each, wants, needs, limit) for n in range(job.need.shards)]
            tasks += shares
            takes, needs = takes - seconds[job.shared.id], needs | {share.key for share in shares}
        tasks.append(Task(job.key, takes, wants, needs, limit, job.need.nodes))
    return tasks


def of_stages(stages: Sequence[Stage], seconds: Mapping[str, float], gpus: int = 0) -> list[Task]:
    """Stages as tasks of one slot each, as the local launcher's workers run them. gpus: that there are to deal."""
    new = {stage.id for stage in stages}
    return [
        Task(
            stage.id,
            seconds[stage.id],
            (min(stage.config.gpus, gpus), 1, 0),
            frozenset(item.id for item in stage.stages if item.id in new),
        )
        for stage in stages
    ]


def pool(gpus: int, node: Node) -> list[Amounts]:
    """So many GPUs, in machines like this one."""
    full, rest = divmod(gpus, node.gpus)
    sizes = [node.gpus] * full + [rest] * bool(rest)
    return [(size, node.cpus, megabytes(node.memory)) for size in sizes]


def machines(partitions: Collection[str | None]) -> list[Amounts]:
    """Those of partitions (as sbatch takes them: 'a,b'; None: the site's default one) that are in order; none where
    there is no Slurm."""
    named = {name for given in partitions if given for name in given.split(",")}
    command = ["sinfo", "--noheader", "--Node", "--states=idle,alloc,mix,comp", "--format=%N|%P|%c|%m|%G"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return []
    found: dict[str, Amounts] = {}
    for line in said.stdout.splitlines() if said.returncode == 0 else ():
        name, where, cpus, memory, resources = line.split("|")
        if where.rstrip("*") in named or (None in partitions and where.endswith("*")):
            found[name] = (gpus_of(resources), int(cpus), int(memory))
    return list(found.values())


def gpus_of(resources: str) -> int:
    """How many of a node's generic resources are GPUs: 'gpu:a100:4(S:0-1),shard:16' has 4."""
    found = [re.sub(r"\(.*", "", part).split(":") for part in re.split(r",(?![^(]*\))", resources)]
    return sum(int(words[-1]) for words in found if words[0] == "gpu")


@dataclass
class Outlook:
    """What a plan takes. unknown: stages of which nothing is known, and that are taken to need no time.

    on: the schedule by what the plan runs on.
    """

    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    unknown: int = 0
    on: dict[str, Schedule] = field(default_factory=dict)


def here(planned: Planned) -> Outlook:
    """On this machine's workers."""
    resources, new = planned.config.resources, planned.new
    seconds = _seconds(planned)
    found = devices.gpus(resources)
    cuda = resources.device == "cuda" or bool(found)
    made = Outlook(unknown=_unknown(planned))
    made.gpu_hours = sum(seconds[stage.id] * stage.config.gpus for stage in new) * cuda / 3600
    made.cpu_hours = sum(seconds.values()) * resources.threads / 3600
    workers = resources.workers
    dealt = len(found) if workers > 1 else 0
    schedule = simulate(of_stages(new, seconds, dealt), [(dealt, workers, 0)])
    made.on[f"{workers} worker{'s' * (workers > 1)}"] = schedule
    return made


def cluster(planned: Planned) -> Outlook:
    """On a partition of Slurm's, or on as many GPUs as resources.slurm.simulate says: when it starts what, if it is a
    dry run.

    Raises ConfigError; where the partition's machines can't run it as they are now, that is a warning of the plan's.
    """
    resources = planned.config.resources
    slurm.check(resources)
    assert resources.slurm is not None
    seconds = _seconds(planned)
    grouped = jobs.group(planned.new, resources)
    tasks = of_jobs(grouped, seconds)
    startup, most = resources.slurm.startup_seconds, resources.slurm.max_jobs
    made = Outlook(unknown=_unknown(planned))
    made.gpu_hours = sum(task.nodes * task.wants[0] * (task.seconds + startup) for task in tasks) / 3600
    made.cpu_hours = sum(task.nodes * task.wants[1] * (task.seconds + startup) for task in tasks) / 3600
    if not planned.config.dry_run:
        return made
    for gpus in resources.slurm.simulate or ():
        made.on[f"{gpus} GPUs"] = simulate(tasks, pool(gpus, resources.slurm.node), startup, most)
    partitions = {job.need.partition or resources.slurm.partition for job in grouped}
    if resources.slurm.simulate is None and (nodes := machines(partitions)):
        gpus = sum(node[0] for node in nodes)
        try:
            made.on[f"{len(nodes)} nodes with {gpus} GPUs"] = simulate(tasks, nodes, startup, most)
        except ConfigError as error:  # of those that are in order now; the job's may be down for an hour
            planned.warnings.append(f"{error}, of those that are in order now; so how long it takes isn't known")
    return made


def _seconds(planned: Planned) -> dict[str, float]:
    return {stage.id: planned.expected[stage.id].seconds or 0.0 for stage in planned.new}


def _unknown(planned: Planned) -> int:
    """Of stages that take longer than seconds."""
    return sum(planned.expected[stage.id].seconds is None and not stage.config.light for stage in planned.new)
