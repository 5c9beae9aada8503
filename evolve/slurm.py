"""A sweep under Slurm: its missing stages as jobs, each stage in one job, whoever submits and however often.

    submit(planned)  ->  jobs, each with `afterok` on those whose results it needs

Slurm's queue is the one list of what is under way: each job's comment names the store and the job's key, and
`<output>/jobs/<key>/` what it makes. So a submission that was killed, or another user's sweep in the same store, is
seen, its jobs are waited for and none is submitted twice; one process submits at a time. What is done is what the store
has a record of. Neither accounting (sacct) nor what submitit pickles of a job's end is looked at.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import pickle
import re
import shlex
import subprocess
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve import jobs, snapshot
from evolve.config import ConfigError, Resources
from evolve.jobs import Job
from evolve.store import Lease, Stage, Store, digest

if TYPE_CHECKING:
    from evolve.launch import Planned

# What sbatch says where the site allows no more jobs for now.
FULL = re.compile(
    r"MaxSubmitJob|MaxJobs|job submit limit|temporarily unable to accept job|temporarily unavailable|job limit",
    re.IGNORECASE,
)
LIVE = {
    "PENDING",
    "RUNNING",
    "SUSPENDED",
    "CONFIGURING",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STOPPED",
}
TIMEOUTS = 10**6  # of submitit's: how many are too many is said by slurm_job.py, which sees what each achieved


class Full(Exception):
    """The site takes no more jobs now."""


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue. reason: why it waits."""

    id: str
    state: str
    reason: str


@dataclass
class Submission:
    """What a command submitted. left: jobs that the site took no more of; a job of their own submits them later."""

    jobs: dict[str, str] = field(default_factory=dict)  # Slurm's id by key
    attached: int = 0  # stages that jobs in the queue make already
    left: int = 0


def folder(store: Store, key: str = "") -> Path:
    """Of a job: its stages, events and logs."""
    return store.root.parent / "jobs" / key


def tag(store: Store) -> str:
    """What names a store in a job's comment."""
    return digest(str(store.root.resolve()))[:8]


def queue(store: Store) -> dict[str, Queued]:
    """The store's jobs that wait or run, by key; of all users. Raises ConfigError where Slurm can't be asked."""
    found = {}
    for line in _slurm(["squeue", "--noheader", "--all", "--array", "--format=%i|%T|%r|%k"]).splitlines():
        number, state, reason, comment = line.split("|", 3)
        words = comment.split(":")
        if words[:2] == ["evolve", tag(store)] and state in LIVE:
            found[words[2]] = Queued(number.split("_")[0], state, reason)  # of an array's jobs, the array's
    return found


def _slurm(command: Sequence[str]) -> str:
    """What a command of Slurm's says; asked again for a minute where its controller doesn't answer."""
    deadline = time.time() + 60
    while True:
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError:
            raise ConfigError(f"hydra/launcher=slurm: there is no {command[0]} here; run this where Slurm is") from None
        except subprocess.TimeoutExpired:
            raise ConfigError(f"{command[0]}: no answer from Slurm in a minute") from None
        if done.returncode == 0:
            return done.stdout
        said = " ".join(done.stderr.split())
        if time.time() > deadline or "Unable to contact" not in said:
            raise ConfigError(f"{command[0]}: {said}")
        time.sleep(2)


def live(store: Store) -> dict[str, tuple[str, str]]:
    """(key, Slurm's id) of the jobs that make stages now or will, by stage."""
    found: dict[str, tuple[str, str]] = {}
    for key, queued in queue(store).items():
        try:
            stages = json.loads((folder(store, key) / "stages.json").read_text())["stages"]
        except FileNotFoundError:  # the job that submits what is left
            continue
        found |= dict.fromkeys(stages, (key, queued.id))
    return found


def parameters(job: Job, resources: Resources) -> dict[str, Any]:
    """A job's options of sbatch, without what only its submission knows."""
    slurm, need = resources.slurm, job.need
    assert slurm is not None
    kinds = list(dict.fromkeys(stage.kind for stage in job.stages))
    return {
        "job_name": f"evolve-{'-'.join(kinds) if len(kinds) < 4 else f'{kinds[0]}-to-{job.stages[-1].kind}'}",
        "time": need.minutes,
        "cpus_per_task": need.cpus,
        "mem": need.memory,
        "gpus_per_node": need.gpus or None,
        "partition": need.partition or slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "signal_delay_s": slurm.signal_seconds,
        "setup": [*slurm.setup, *(f"export {name}={shlex.quote(it)}" for name, it in snapshot.environment().items())],
        # Of itself, srun gives a step one CPU of the job's since Slurm 22.05.
        "srun_args": [f"--cpus-per-task={need.cpus}", "--kill-on-bad-exit=1"],
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {
            "requeue": True,
            "kill-on-invalid-dep": "yes",
            **{name.replace("_", "-"): value for name, value in {**slurm.options, **need.options}.items()},
        },
    }


@contextlib.contextmanager
def _turn(store: Store) -> Iterator[None]:
    """One process at a time submits to a store, so that each of two sweeps sees what the other has submitted."""
    while (lease := Lease.take(store.root / ".submit.lease", store.lease_timeout)) is None:
        time.sleep(0.5)
    with lease:
        yield


def submit(planned: Planned, again: Path | None = None) -> Submission:
    """Submits what is neither done nor under way, inputs first.

    again: the plan's file, of a submission that left jobs over: what it has submitted once is not tried again.

    Raises ConfigError where Slurm refuses a job for anything but its number.
    """
    store, resources = planned.store, planned.config.resources
    check(resources)
    assert resources.slurm is not None
    tried = set(again.with_suffix(".tried").read_text().split()) if again else set()
    with _turn(store):
        under_way = live(store)
        done = {stage.id for stage in planned.graph.stages.values() if store.record(stage) is not None}
        todo = jobs.group(_reachable(planned.graph.stages.values(), done, under_way, tried), resources)
        if again is None:
            cancel(queued.id for key, queued in queue(store).items() if key == rest(planned.folder))
        made = Submission(attached=sum(stage in under_way for stage in planned.graph.stages))
        _note(planned, {stage: job for stage, job in under_way.items() if stage in planned.graph.stages})
        own = {rest(planned.folder)} if again else set()  # the job that this runs in
        there = len(queue(store).keys() - own)
        sizes = {job.key: 1 if job.shared is None else 1 + job.need.shards for job in todo}
        room = math.inf if resources.slurm.max_jobs is None else resources.slurm.max_jobs - there
        room -= sum(sizes.values()) > room  # for the job that submits the rest
        number_of = {stage: number for stage, (_, number) in under_way.items()}
        taken = 0
        for job in todo:
            needs = sorted({number_of[item] for item in job.inputs if item in number_of}, key=_by_number)
            try:
                taken += sizes[job.key]
                if taken > room:
                    raise Full
                made.jobs[job.key] = number = _submit(job, planned, needs)
            except Full:
                made.left = len(todo) - len(made.jobs)
                break
            number_of |= {stage.id: number for stage in job.stages}
            _note(planned, {stage.id: (job.key, number) for stage in job.stages})
        if made.left:
            _leave(planned, again, todo, made, tried, [number for _, number in under_way.values()])
    return made


def _by_number(identifier: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", identifier))


def _reachable(stages: Iterable[Stage], done: set[str], under_way: Collection[str], tried: set[str]) -> list[Stage]:
    """What is to be made: not what is done, nor under way, nor what failed in this plan, nor what needs that."""
    lost: set[str] = set()
    found = []
    for stage in stages:
        if stage.id in done or stage.id in under_way:
            continue
        if stage.id in tried or any(item.id in lost for item in stage.stages):
            lost.add(stage.id)
            continue
        found.append(stage)
    return found


def _note(planned: Planned, made: Mapping[str, tuple[str, str]]) -> None:
    """For the sweep's status: which job makes which stage."""
    if made:
        with (planned.folder / "jobs.jsonl").open("a") as file:
            file.write(json.dumps({"time": round(time.time()), "stages": made}) + "\n")


def _submit(job: Job, planned: Planned, needs: Sequence[str]) -> str:
    """Slurm's id of the job. Raises Full."""
    from evolve.slurm_job import Run
    from evolve.workers import Setting

    store, resources = planned.store, planned.config.resources
    where = folder(store, job.key)
    where.mkdir(parents=True, exist_ok=True)
    content = {"stages": [stage.id for stage in job.stages], "needs": job.need.model_dump()}
    temporary = where / f".stages-{uuid.uuid4().hex[:8]}"
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.rename(where / "stages.json")
    setting = Setting(Store(store.root, store.lease_timeout), resources, where, snapshot.code())
    options = parameters(job, resources)
    waits = [f"afterok:{':'.join(needs)}"] if needs else []
    if job.shared is not None:
        shares = [
            Run((job.shared,), replace(setting, logs=where / f"{n}", share=(n, job.need.shards)), where / f"{n}")
            for n in range(job.need.shards)
        ]
        for share in shares:
            share.folder.mkdir(exist_ok=True)
        about = {"comment": f"evolve:{tag(store)}:{job.key}-shares", "dependency": ",".join(waits) or None}
        # Any end will do: what a share has not made, the job makes.
        waits.append(f"afterany:{_sbatch(shares, where, {**options, **about}, resources)}")
    about = {"comment": f"evolve:{tag(store)}:{job.key}", "dependency": ",".join(waits) or None}
    return _sbatch([Run(job.stages, setting, where)], where, {**options, **about}, resources)


def _sbatch(functions: Sequence[Any], where: Path, options: Mapping[str, Any], resources: Resources) -> str:
    """Slurm's id of a job, or of an array of several."""
    import submitit
    from submitit.core.utils import FailedJobError

    assert resources.slurm is not None
    try:
        executor = submitit.SlurmExecutor(where, max_num_timeout=TIMEOUTS, python=resources.slurm.python)
    except RuntimeError:
        raise ConfigError("hydra/launcher=slurm: there is no srun here; run this where Slurm is") from None
    executor.update_parameters(**options)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # sbatch's words, which the error holds
            return str(executor.submit_array(functions)[0].job_id).split("_")[0]
    except FailedJobError as error:
        said = " ".join(str(error).split())
        if FULL.search(said):
            raise Full from None
        raise ConfigError(said) from None


def rest(sweep: Path) -> str:
    """The key of the job that submits what is left of a sweep."""
    return f"rest-{digest(str(sweep.resolve()))[:8]}"


def _leave(
    planned: Planned, plan: Path | None, todo: Sequence[Job], made: Submission, tried: set[str], before: list[str]
) -> None:
    """A job of its own submits what is left, once the last of the others have ended.

    Where the site has no room for it, the last job that was submitted makes room. Where none was and none is under way,
    nothing is done: the same command goes on once there is room.
    """
    from evolve.slurm_job import Rest

    store, resources = planned.store, planned.config.resources
    assert resources.slurm is not None
    where = folder(store, rest(planned.folder))
    where.mkdir(parents=True, exist_ok=True)
    plan = plan or where / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.pkl"
    plan.write_bytes(pickle.dumps(planned))
    small = Job((), resources.slurm.needs["small"])
    while waits := [*before, *made.jobs.values()][-50:]:
        submitted = [stage.id for job in todo if job.key in made.jobs for stage in job.stages]
        plan.with_suffix(".tried").write_text("\n".join([*tried, *submitted]) + "\n")
        options = {
            **parameters(small, resources),
            "job_name": "evolve-rest",
            "comment": f"evolve:{tag(store)}:{rest(planned.folder)}",
            "dependency": f"afterany:{':'.join(waits)}",
        }
        try:
            _sbatch([Rest(plan)], where, options, resources)
        except Full:
            if not made.jobs:
                return
            _, last = made.jobs.popitem()
            cancel([last])
            made.left += 1
        else:
            return


def cancel(numbers: Iterable[str]) -> None:
    """Stops jobs, whether they wait or run."""
    found = list(numbers)
    for start in range(0, len(found), 200):
        _slurm(["scancel", *found[start : start + 200]])


def preview(planned: Planned) -> list[str]:
    """What a submission would ask of Slurm: a line for each kind of job there is. Asks Slurm nothing."""
    resources = planned.config.resources
    check(resources)
    new = [stage for stage in planned.graph.stages.values() if not planned.verdicts[stage.id].reused]
    count: dict[str, int] = {}
    for job in jobs.group(new, resources):
        options = parameters(job, resources)
        names = {"job_name": "job-name", "cpus_per_task": "cpus-per-task", "gpus_per_node": "gpus-per-node"}
        plain = (
            "job_name",
            "time",
            "cpus_per_task",
            "mem",
            "gpus_per_node",
            "partition",
            "account",
            "qos",
            "constraint",
        )
        given = {names.get(name, name): options[name] for name in plain if options[name] is not None}
        words = [f"--{name}={value}" for name, value in {**given, **options["additional_parameters"]}.items()]
        line = f"sbatch {' '.join(words)}".replace("=True", "")
        count[line] = count.get(line, 0) + 1
    return [f"{number:4d} x {line}" for line, number in count.items()]


def check(resources: Resources) -> None:
    """Raises ConfigError where nothing is said of what stages get under Slurm."""
    if resources.slurm is None:
        raise ConfigError(
            "hydra/launcher=slurm: resources say nothing of what stages get; take resources=slurm, or one of your "
            "site's own that builds on it"
        )
