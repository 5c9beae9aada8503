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
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import time
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve import jobs, snapshot
from evolve.config import ConfigError, Resources
from evolve.jobs import Job
from evolve.store import Corrupt, Lease, Stage, Store, append, digest, refresh, seal, unseal
from evolve.store import replace as replace_file

if TYPE_CHECKING:
    from evolve.launch import Planned

# What sbatch says where the site allows no more jobs for now. Its words for any limit speak of job submit limits; where
# it names the limit, the name counts.
FULL = re.compile(r"temporarily unable to accept job|temporarily unavailable|job submit limit", re.IGNORECASE)
LIMIT = re.compile(r"\b(?:QOS|Assoc)\w+")
# What its commands say where the controller doesn't answer; only to the first of these has nothing been heard for sure.
FAILURE = r"(?:connection|send|receive|shutdown) failure|connection re(?:fused|set)|missing socket"
AWAY = re.compile(rf"unable to contact|timed out|zero bytes|standby mode|{FAILURE}", re.IGNORECASE)
LAST = 50  # jobs that the one which submits what is left waits for
# What tells a job to go would end it, as a failure, until Python has its handlers; who is not heard is ended by Slurm.
DEAF = """sh -c 'trap "" USR2 TERM; exec "$@"' sh"""
TIMEOUTS = 10**6  # of submitit's: how many are too many is said by slurm_job.py, which sees what each achieved


class Full(Exception):
    """The site takes no more jobs now."""


class NotNow(ConfigError):
    """Slurm can't be reached, or has no room: the same may go well later."""


@dataclass(frozen=True)
class Queued:
    """A job in Slurm's queue, or an array of several. reason: why it waits. user: whose it is, by number."""

    id: str
    state: str
    reason: str
    user: str
    tasks: int = 1


@dataclass
class Submission:
    """What a command submitted. left: jobs that the site took no more of. rest: whether a job submits them later."""

    jobs: dict[str, str] = field(default_factory=dict)  # Slurm's id by key
    attached: int = 0  # stages that jobs in the queue make already
    earlier: int = 0  # of those jobs, how many were asked for with other resources
    left: int = 0
    rest: bool = False


def folder(store: Store, key: str = "") -> Path:
    """Of a job: its stages, events and logs."""
    return store.root.parent / "jobs" / key


def tag(store: Store) -> str:
    """What names a store in a job's comment."""
    return digest(str(store.root.resolve()))[:8]


def queue(store: Store, patience: float = 60) -> dict[str, Queued]:
    """The store's jobs that wait or run, by key; of all users; of an array, one that runs if any does.

    patience: seconds to ask again in, where Slurm's controller is away. Raises ConfigError where it can't be asked;
    NotNow, if that may change.
    """
    found: dict[str, Queued] = {}
    command = ["squeue", "--noheader", "--all", "--array", "--format=%i|%T|%r|%U|%k"]
    for line in _slurm(command, patience).splitlines():
        number, state, reason, user, comment = (*line.split("|", 4), *[""] * 4)[:5]  # others' comments hold line ends
        words = comment.split(":")
        if words[:2] != ["evolve", tag(store)] or len(words) != 3:
            continue
        known = found.get(words[2])
        shown = Queued(number.split("_")[0], state, reason, user) if known is None or state == "RUNNING" else known
        found[words[2]] = replace(shown, tasks=1 + (known.tasks if known else 0))
    return found


def _slurm(command: Sequence[str], patience: float = 60) -> str:
    """What a command of Slurm's says; asked again where its controller doesn't answer."""
    deadline = time.monotonic() + patience
    while True:
        try:
            # Comments are of anybody's jobs, and may hold anything.
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
        except FileNotFoundError:
            raise ConfigError(f"hydra/launcher=slurm: there is no {command[0]} here; run this where Slurm is") from None
        except subprocess.TimeoutExpired:  # it may have been heard all the same, so it is not said twice
            raise NotNow(f"{command[0]}: no answer from Slurm in a minute") from None
        if done.returncode == 0:
            return done.stdout
        said = " ".join(done.stderr.split())
        if time.monotonic() > deadline or "Unable to contact" not in said:
            raise _refusal(said)(f"{command[0]}: {said}")
        time.sleep(2)


def _refusal(said: str) -> type[ConfigError]:
    return NotNow if AWAY.search(said) else ConfigError


def live(store: Store, there: Mapping[str, Queued]) -> dict[str, tuple[str, str]]:
    """(key, Slurm's id) of the jobs in the queue that make stages now or will, by stage."""
    found: dict[str, tuple[str, str]] = {}
    for key, queued in there.items():
        try:
            stages = unseal((folder(store, key) / "stages.json").read_bytes())["stages"]
        except FileNotFoundError:  # the job that submits what is left
            continue
        except Corrupt:
            path = folder(store, key) / "stages.json"
            raise ConfigError(
                f"{path}: damaged, so what job {queued.id} makes isn't known; wait for its end, or scancel {queued.id}"
            ) from None
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
        "nodes": need.nodes,
        "cpus_per_task": need.cpus,
        "mem": need.memory,
        "gpus_per_node": need.gpus or None,
        "partition": need.partition or slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "signal_delay_s": slurm.signal_seconds,
        "setup": [*slurm.setup, *(f"export {name}={shlex.quote(it)}" for name, it in snapshot.environment().items())],
        # Of itself, srun gives a step one CPU of the job's since Slurm 22.05. Of several nodes, one runs the job; what
        # spreads over all of them is started from there (ranks.py).
        "srun_args": ["--nodes=1", "--ntasks=1", f"--cpus-per-task={need.cpus}", "--kill-on-bad-exit=1"],
        "stderr_to_stdout": True,
        "wckey": None,
        "additional_parameters": {
            "requeue": True,
            "kill_on_invalid_dep": "yes",
            **{name.lstrip("-").replace("-", "_"): it for name, it in {**slurm.options, **need.options}.items()},
        },
    }


def asked(job: Job, resources: Resources) -> str:
    """A digest of what is asked of Slurm for a job, whatever the code that it runs."""
    slurm = resources.slurm
    assert slurm is not None
    return digest([{**parameters(job, resources), "setup": slurm.setup}, slurm.python, job.need.shards])


@contextlib.contextmanager
def turn(store: Store) -> Iterator[None]:
    """One process at a time submits to a store, or cancels, so that each sees what the other has done."""
    began, said = time.monotonic(), False
    while (lease := Lease.take(store.root / ".submit.lease", store.lease_timeout)) is None:
        if not said and time.monotonic() - began > 5:
            said = True
            print(f"wait    another process submits or cancels jobs of {store.root}", file=sys.stderr)
        time.sleep(0.5)
    with lease:
        yield


def submit(planned: Planned, again: Path | None = None) -> Submission:
    """Submits what is neither done nor under way, inputs first.

    again: the plan's file, of a submission that left jobs over: what it has submitted once is not tried again, however
    often it is called.

    Raises ConfigError where Slurm refuses a job for anything but its number; NotNow where it can't be reached, or has
    no room for a single one.
    """
    store, resources = planned.store, planned.config.resources
    check(resources)
    assert resources.slurm is not None
    tried = set(again.with_suffix(".tried").read_text().split()) if again else set()
    with turn(store):
        # A job that ends may be one that goes back into the queue: which it is will be seen.
        deadline, there = time.monotonic() + 60, queue(store)
        while time.monotonic() < deadline and any(one.state == "COMPLETING" for one in there.values()):
            time.sleep(1)
            there = queue(store)
        there = _whole(store, there)
        under_way = live(store, there)
        done = {stage.id for stage in planned.graph.stages.values() if store.record(stage) is not None}
        todo = jobs.group(_reachable(planned.graph.stages.values(), done, under_way, tried), resources)
        # What submits the rest: this very job, or one of an earlier command; another user's goes on.
        later = there.pop(rest(planned.folder), None)
        others = later is not None and later.user != str(os.getuid())
        if later and again is None and not others:
            cancel([later.id])
        mine = {s: job for s, job in under_way.items() if s in planned.graph.stages and s not in done}
        made = Submission(attached=len(mine), earlier=_earlier(planned, {key for key, _ in mine.values()}))
        note(planned.folder, stages=mine)
        sizes = {job.key: 1 if job.shared is None else 1 + job.need.shards for job in todo}
        queued = sum(one.tasks for one in there.values())
        room = math.inf if resources.slurm.max_jobs is None else resources.slurm.max_jobs - queued
        room = max(0, room - (sum(sizes.values()) > room))  # for the job that submits the rest
        number_of = {
            s: number for s, (_, number) in under_way.items() if s not in done
        }  # what is done waits for nobody
        taken = 0
        for job in todo:
            needs = sorted({number_of[item] for item in job.inputs if item in number_of}, key=_by_number)
            try:
                taken += sizes[job.key]
                if taken > room:
                    raise Full(f"resources.slurm.max_jobs={resources.slurm.max_jobs}, and {queued} are in the queue")
                made.jobs[job.key] = number = _submit(job, planned, needs)
            except Full as full:
                if not made.jobs and not there:
                    raise NotNow(f"no room for a single job: {full}") from None
                made.left = len(todo) - len(made.jobs)
                break
            except ConfigError as error:
                before = f"; {len(made.jobs)} jobs were submitted before, and go on" if made.jobs else ""
                raise type(error)(f"{error}{before}") from None
            number_of |= {stage.id: number for stage in job.stages}
            note(planned.folder, stages={stage.id: (job.key, number) for stage in job.stages})
            if again:
                tried |= {stage.id for stage in job.stages}
                _note_tried(again, tried)
        if made.left:
            waits = [number for _, number in mine.values()] or [one.id for one in there.values()]
            made.rest = (others and again is None) or _leave(
                planned, again, todo, made, tried, list(dict.fromkeys(waits))
            )
    return made


def _whole(store: Store, there: Mapping[str, Queued]) -> dict[str, Queued]:
    """The queue without what was cut short of this user's submissions, which is cancelled.

    That is jobs that have nothing to run, as submitit puts it into its place once sbatch has returned; and shares that
    no job follows.
    """
    places = {key: folder(store, key.removesuffix("-shares")) for key in there}

    def seen() -> set[str]:
        cut = {key for key, one in there.items() if not any(places[key].glob(f"{one.id}_*submitted.pkl"))}
        cut |= {key for key in there if places[key].name not in there.keys() - cut}
        return {key for key in cut if there[key].user == str(os.getuid())}

    if cut := seen():
        refresh(places[key] for key in cut)  # another machine may have written it just now
        cut = seen()
    cancel(there[key].id for key in cut)
    return {key: one for key, one in there.items() if key not in cut}


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


def _earlier(planned: Planned, keys: Collection[str]) -> int:
    """How many of these jobs, if of stages of this plan alone, were asked for with other resources than it has."""
    differ = 0
    for key in keys:
        content = unseal((folder(planned.store, key) / "stages.json").read_bytes())
        stages = [stage for stage_id in content["stages"] if (stage := planned.graph.stages.get(stage_id))]
        if "asked" in content and len(stages) == len(content["stages"]):
            now = [asked(job, planned.config.resources) for job in jobs.group(stages, planned.config.resources)]
            differ += now != [content["asked"]]
    return differ


def note(sweep: Path, **what: Any) -> None:
    """For status and cancel. stages: (key, Slurm's id) of the job that makes each; cancelled: Slurm's ids."""
    if any(what.values()) or "cancelled" in what:
        append(sweep / "jobs.jsonl", {"time": round(time.time()), **what})


def _submit(job: Job, planned: Planned, needs: Sequence[str]) -> str:
    """Slurm's id of the job. Raises Full."""
    from evolve.slurm_job import Run
    from evolve.workers import Setting

    store, resources = planned.store, planned.config.resources
    where = folder(store, job.key)
    where.mkdir(parents=True, exist_ok=True)
    content = {
        "stages": [stage.id for stage in job.stages],
        "needs": job.need.model_dump(),
        "asked": asked(job, resources),
    }
    replace_file(where / "stages.json", seal(content))
    setting = Setting(Store(store.root, store.lease_timeout), resources, where, snapshot.code(), nodes=job.need.nodes)
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
        array = _sbatch(shares, where, {**options, **about}, resources)
        waits.append(f"afterany:{array}")
    about = {"comment": f"evolve:{tag(store)}:{job.key}", "dependency": ",".join(waits) or None}
    try:
        return _sbatch([Run(job.stages, setting, where)], where, {**options, **about}, resources)
    except (Full, ConfigError):
        cancel([array] if job.shared is not None else [])
        raise


def _sbatch(functions: Sequence[Any], where: Path, options: Mapping[str, Any], resources: Resources) -> str:
    """Slurm's id of a job, or of an array of several; asked again for a minute where the controller is away."""
    import submitit
    from submitit.core.utils import FailedJobError

    assert resources.slurm is not None
    python = f"{DEAF} {resources.slurm.python or shlex.quote(sys.executable)}"
    try:
        executor = submitit.SlurmExecutor(where, max_num_timeout=TIMEOUTS, python=python)
    except RuntimeError:
        raise ConfigError("hydra/launcher=slurm: there is no srun here; run this where Slurm is") from None
    executor.update_parameters(**options)
    deadline = time.monotonic() + 60
    while True:
        try:
            with contextlib.redirect_stderr(io.StringIO()), _outside():  # sbatch's words, which the error holds
                return str(executor.submit_array(functions)[0].job_id).split("_")[0]
        except FailedJobError as error:
            said = " ".join(str(error).split())
        limits = LIMIT.findall(said)
        if any("Submit" in limit for limit in limits) if limits else FULL.search(said):
            raise Full(said)
        if time.monotonic() > deadline or "Unable to contact" not in said:  # otherwise it may have been heard
            raise _refusal(said)(said)
        time.sleep(2)


@contextlib.contextmanager
def _outside() -> Iterator[None]:
    """Without what Slurm told the job that this process may run in: sbatch and srun would take it for options."""
    before = dict(os.environ)
    for name in before:
        if name.startswith(("SLURM_", "SUBMITIT_", "SRUN_")) and name != "SLURM_CONF" and "SLURM_JOB_ID" in before:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(before)


def rest(sweep: Path) -> str:
    """The key of the job that submits what is left of a sweep."""
    return f"rest-{digest(str(sweep.resolve()))[:8]}"


def _leave(
    planned: Planned, plan: Path | None, todo: Sequence[Job], made: Submission, tried: set[str], before: list[str]
) -> bool:
    """Whether a job of its own submits what is left, once the last of the others have ended.

    Where the site has no room for it, the last job that was submitted makes room, but for the only one to wait for; and
    not where this is such a job already, which can go back into the queue itself.
    """
    from evolve.slurm_job import Rest

    store, resources = planned.store, planned.config.resources
    assert resources.slurm is not None
    where = folder(store, rest(planned.folder))
    where.mkdir(parents=True, exist_ok=True)
    again = plan is not None
    if plan is None:
        plan = where / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:8]}.pkl"
        plan.write_bytes(pickle.dumps(planned))
    small = Job((), resources.slurm.needs["small"])
    while True:
        _note_tried(plan, tried | {stage.id for job in todo if job.key in made.jobs for stage in job.stages})
        waits = [*before, *made.jobs.values()][-LAST:]
        options = {
            **parameters(small, resources),
            "job_name": "evolve-rest",
            "comment": f"evolve:{tag(store)}:{rest(planned.folder)}",
            "dependency": f"afterany:{':'.join(waits)}",
        }
        try:
            _sbatch([Rest(plan)], where, options, resources)
            return True
        except Full:
            if again or not made.jobs or len(waits) == 1:
                return False
        key, last = made.jobs.popitem()
        shares = queue(store).get(f"{key}-shares")
        cancel([last, *([shares.id] if shares else [])])
        made.left += 1


def _note_tried(plan: Path, stages: Iterable[str]) -> None:
    """What the submissions of a plan that left jobs over have submitted, once and for all."""
    replace_file(plan.with_suffix(".tried"), "\n".join(sorted(stages)) + "\n")


def cancel(numbers: Iterable[str]) -> None:
    """Stops jobs, whether they wait or run."""
    found = list(numbers)
    for start in range(0, len(found), 200):
        _slurm(["scancel", *found[start : start + 200]])


def preview(planned: Planned) -> list[str]:
    """What a submission would ask of Slurm: a line for each kind of job there is. Asks Slurm nothing."""
    resources = planned.config.resources
    check(resources)
    count: dict[str, int] = {}
    for job in jobs.group(planned.new, resources):
        options = parameters(job, resources)
        ours = ("setup", "srun_args", "stderr_to_stdout", "signal_delay_s", "additional_parameters")
        given = {name: it for name, it in options.items() if name not in ours and it is not None}
        words = [
            f"--{name.replace('_', '-')}" + ("" if it is True else f"={it}")
            for name, it in (given | options["additional_parameters"]).items()
        ]
        line = f"sbatch {' '.join(words)}"
        count[line] = count.get(line, 0) + 1
        if job.shared is not None:
            array = f"{line} --array=0-{job.need.shards - 1}"
            count[array] = count.get(array, 0) + 1
    return [f"{number:4d} x {line}" for line, number in count.items()]


def check(resources: Resources) -> None:
    """Raises ConfigError where nothing is said of what stages get under Slurm."""
    if resources.slurm is None:
        raise ConfigError(
            "hydra/launcher=slurm: resources say nothing of what stages get; take resources=slurm, or one of your "
            "site's own that builds on it"
        )
