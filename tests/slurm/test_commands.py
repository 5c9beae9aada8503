"""What commands do and say while a sweep's jobs run, are told to go, are waited for, or belong to others as well."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from evolve import slurm
from evolve.config import ROOT
from evolve.states import View, load, look, newest
from evolve.store import Store

from .cluster import Cluster
from .conftest import running
from .sweep import HOLD, ONE, PATIENCE, SMALL, Sweep, restarts

ANSWERS = ["loss=none", "loss.pt=none", "loss.sft_direct=0", *SMALL]  # of the base model, scored: one job


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with running(tmp_path_factory.mktemp("slurm"), hold=HOLD) as made:
        yield made


@pytest.fixture
def sweep(cluster, tmp_path, monkeypatch) -> Callable[..., Sweep]:
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)
    return lambda *words, **settings: Sweep(cluster, tmp_path, *words, **settings)


def seen(slurm: Sweep) -> View:
    return look(load(newest(slurm.output)))


def said(slurm: Sweep, event: str) -> list[dict]:
    """Of all jobs, what they said of such events."""
    every = [one for path in slurm.output.glob("jobs/*/events.jsonl") for one in slurm.events(path.parent.name)]
    return [one for one in every if one["event"] == event]


def test_a_time_limit_is_no_failure(sweep, cluster):
    """More than a minute's work in jobs of a minute: told before the limit, a job goes back, and goes on."""
    limits = {"resources__slurm__max_minutes": 1, "resources__slurm__signal_seconds": 10}
    before = restarts(cluster)
    slurm = sweep(*ANSWERS, "data.eval_prompts=800", "engine.batch_size=1", **limits)
    slurm.submit()
    slurm.wait()
    slurm.check()
    assert restarts(cluster) - before == len(said(slurm, "back")) > 0
    assert {event["message"] for event in said(slurm, "back")} == {"told to go: time limit"}
    states = slurm.status().values()
    assert max(state["requeues"] for state in states) > 0 and not any(state["failures"] for state in states)
    took = [state["seconds"] for state in states]
    assert min(took) >= 0 and max(took) > 1  # the shortest are done within what a clock's reading is rounded to


def test_a_preempted_job_does_not_sit_out_its_grace(sweep, cluster):
    """Slurm sends SIGTERM alone; the job goes back by itself, and the one that pushed it starts."""
    cluster.run("scontrol", "update", "PartitionName=low", "GraceTime=300")
    before = restarts(cluster)
    try:
        slurm = sweep(*ONE, resources__slurm__partition="low")
        slurm.submit()
        mine = [job.id for job in cluster.queue()]

        def pushed() -> bool:
            """Whether a job had to make room: one may end by itself just then."""
            if slurm.running():
                pushing = cluster.submit("--partition=main", "--exclusive", "--nodes=3", wrap="sleep 1")
                cluster.wait_until(lambda: pushing not in {one.id for one in cluster.queue()}, 60)
            return restarts(cluster) > before

        cluster.wait_until(pushed, PATIENCE)
        ended = "".join(cluster.run("scontrol", "show", "job", number).stdout for number in mine)
        assert not re.search("JobState=(FAILED|CANCELLED|TIMEOUT)", ended)  # some may have been done before
        assert {event["message"] for event in said(slurm, "back")} == {"told to go: preemption"}
        assert not said(slurm, "failed")
    finally:
        cluster.run("scontrol", "update", "PartitionName=low", f"GraceTime={cluster.grace}")


def test_a_job_told_to_go_before_it_has_begun_does_not_fail(sweep, cluster, tmp_path):
    """Importing from a cold disk takes a while: meanwhile neither signal has a handler."""
    python, began, go = tmp_path / "python", tmp_path / "began", tmp_path / "go"
    wait = f"touch {began}; until [ -e {go} ]; do sleep .1; done"
    python.write_text(f'#!/bin/sh\n{wait}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    slurm = sweep(*ANSWERS, resources__slurm__python=python)
    slurm.submit()
    cluster.wait_until(began.exists, PATIENCE)
    [job] = [job for job in cluster.queue() if job.state == "RUNNING"]
    for number in ("USR2", "TERM"):
        cluster.run("scancel", f"--signal={number}", job.id)
    time.sleep(2)
    go.touch()
    slurm.wait()
    slurm.check()
    assert not said(slurm, "back")


def test_a_job_told_to_go_while_the_controller_is_away_goes_back_all_the_same(sweep, cluster):
    slurm = sweep(*ANSWERS)
    slurm.submit()
    job = cluster.wait_until(slurm.running, PATIENCE)
    mine = {**cluster.environment, "SLURM_JOB_ID": job.id}
    [process] = [
        one
        for one in psutil.process_iter(["name", "cmdline", "environ"])
        if one.info["name"].startswith("python") and "submitit.core._submit" in (one.info["cmdline"] or [])
        if mine.items() <= one.info["environ"].items()
    ]
    cluster.kill_controller(orderly=True)
    process.send_signal(signal.SIGUSR2)
    [log] = slurm.output.glob(f"jobs/*/{job.id}_*log.out")
    cluster.wait_until(lambda: log.read_text().partition("told to go: ")[2].count("\n") > 1, PATIENCE)  # scontrol's
    cluster.start_controller()
    slurm.wait()
    slurm.check()
    assert [event["message"] for event in said(slurm, "back")] == ["told to go: time limit or preemption"]


def test_a_submission_that_is_cut_short_is_made_good(sweep, cluster, tmp_path):
    """At first sbatch finds no controller. Then the command is killed before a job has got what it is to run."""
    slurm = sweep("-m", "eval.seed=1,2", *ANSWERS)
    sbatch, tried = tmp_path / "bin" / "sbatch", tmp_path / "tried"
    sbatch.parent.mkdir()
    away = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    first = f'[ -e {tried} ] || {{ touch {tried}; echo "{away}" >&2; exit 1; }}'
    sbatch.write_text(f'#!/bin/sh\n{first}\nexec {shutil.which("sbatch")} "$@"\n')
    sbatch.chmod(0o755)
    slurm.environment["PATH"] = f"{sbatch.parent}:{os.environ['PATH']}"
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # so that none begins meanwhile
    slurm.submit()
    assert tried.exists()
    before = {job.comment: job.id for job in cluster.queue()}
    cut = max(before, key=lambda comment: int(before[comment]))
    [pickled] = slurm.output.glob(f"jobs/*/{before[cut]}_submitted.pkl")
    pickled.unlink()
    assert "jobs    1 submitted; " in slurm.submit()
    after = {job.comment: job.id for job in cluster.queue()}
    assert after.keys() == before.keys()
    assert {comment for comment in after if after[comment] != before[comment]} == {cut}
    cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    slurm.wait()
    slurm.check()


def test_waiting_ends_with_the_outcome_and_ctrl_c_leaves_the_jobs(sweep, cluster):
    """A training whose loss grows too much at once fails, after as many measurements as could be made before it."""
    words = ["-m", "trainer.max_loss_growth=1.0000001,10", *ONE, "hydra.launcher.wait=true"]
    slurm = sweep(*words)
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Tests that are run in the background inherit an ignored SIGINT, and Python then leaves it ignored.
    how |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(slurm.command, cwd=slurm.folder, env=slurm.environment, **how) as process:
        cluster.wait_until(slurm.running, PATIENCE)
        process.send_signal(signal.SIGINT)
        shown, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "no longer watched; the jobs go on\n"), shown
    jobs = {job.id for job in cluster.queue()}
    assert jobs  # between two stages none may be running
    again = sweep(*words, resources__slurm__needs__default__minutes=100)
    shown = again.run(again.command, 1)
    assert re.search(r"\d jobs in the queue keep their earlier resources", shown)
    assert not cluster.queue() and "\nended " in shown and "report.html" in shown
    count = slurm.count()
    assert count["failed"] == 1 and count["blocked"] > 0 and "missing" not in count
    [failed] = [state for state in slurm.status().values() if state["state"] == "failed"]
    assert "max_loss_growth" in failed["message"] and Path(failed["log"]).exists()
    every = slurm.run([sys.executable, "-m", "evolve.status", str(slurm.output), "--stages"], 1)
    assert all(part in every.replace("\n", "") for part in ("failed once", "max_loss_growth", failed["job"]))


def test_status_without_the_controller_and_cancel_by_all_who_share(sweep, cluster):
    one, two = sweep("-m", "loss=sft", *SMALL), sweep("-m", "loss=both", *SMALL)
    for each in (one, two):
        each.submit()
    folders = sorted(one.output.glob("sweeps/*"), key=lambda folder: (folder / "sweep.json").stat().st_mtime)
    first, second = folders
    job = cluster.wait_until(one.running, PATIENCE)
    cluster.kill_controller(orderly=True)
    shown = one.run([sys.executable, "-m", "evolve.status", str(second)])
    assert "Unable to contact slurm controller" in shown and "unknown" in shown
    cluster.start_controller()
    cancel = [sys.executable, "-m", "evolve.cancel"]
    assert "go on, for other sweeps" in one.run([*cancel, str(first)])
    assert "JobState=CANCELLED" not in cluster.run("scontrol", "show", "job", job.id).stdout
    job = cluster.wait_until(one.running, PATIENCE)
    cluster.kill_node(job.node)  # so that the job takes a while to end
    assert "go on" not in one.run([*cancel, str(second)])
    assert seen(one).count["ending"] or not cluster.queue()
    cluster.wait_until(lambda: not cluster.queue(), 60)
    cluster.wait_until(lambda: one.count()["missing"], PATIENCE)  # once the lease of what ran has run out


def test_where_anothers_jobs_fill_the_queue_they_are_waited_for(sweep, cluster):
    """resources.slurm.max_jobs is a store's; what submits the rest begins when these have ended."""
    cluster.run("scontrol", "update", "PartitionName=main", "State=DOWN")  # so that none ends meanwhile
    for seed in (1, 2):
        sweep(*ANSWERS, f"eval.seed={seed}").submit()
    assert len(cluster.queue()) == 2
    last = sweep(*ANSWERS, "eval.seed=3", resources__slurm__max_jobs=2)
    assert "wait for room" in last.submit()
    assert len(cluster.queue()) == 3  # and the one that submits the rest
    cluster.run("scontrol", "update", "PartitionName=main", "State=UP")
    last.wait()
    last.check()


def test_an_arrays_jobs_are_counted_one_by_one(sweep, cluster, tmp_path):
    """As Slurm's limits count them."""
    store = Store(tmp_path)
    number = cluster.submit("--array=0-7", "--hold", f"--comment=evolve:{slurm.tag(store)}:key", wrap="true")
    [(key, queued)] = slurm.queue(store).items()
    assert (key, queued.id, queued.tasks, queued.user) == ("key", number, 8, str(os.getuid()))


def test_an_arrays_shares_are_seen(sweep, cluster):
    """Each of two makes half of the answers; the job that follows finds them, and makes none again."""
    slurm = sweep(*ANSWERS, "data.eval_prompts=200", **{"+resources.slurm.needs.respond.shards": 2})
    slurm.submit()
    shown = cluster.wait_until(
        lambda: [one.progress for one in seen(slurm).states.values() if "shares" in one.progress], PATIENCE
    )
    assert re.fullmatch(r"(\d+/\d+ )?in [12] of 2 shares", shown[0])
    slurm.wait()
    slurm.check()
    paths = slurm.output.glob("jobs/*/[01]/events.jsonl")
    shares = [slurm.events(f"{path.parent.parent.name}/{path.parent.name}") for path in paths]
    assert [[event["event"] for event in events] for events in shares] == [["start", "stage", "done", "end"]] * 2


def test_hydras_own_launcher(sweep, cluster):
    """Each member is a job; what both need is made by one of them."""
    launcher = ["hydra/launcher=submitit_slurm", "hydra.launcher.cpus_per_task=2", "hydra.launcher.mem_gb=2"]
    slurm = sweep("-m", "loss=sft,both", *SMALL)
    own = [word for word in slurm.command if not re.match(r"hydra/launcher|\+?resources", word)]
    slurm.run([*own, *launcher, "resources.device=cpu"])
    logs = [path.read_text() for path in slurm.output.glob("hydra/.submitit/*/*_log.out")]
    ran = [re.findall(r"ran +(\d+) of \d+ new stages(?:, (\d+) by another process)?", text) for text in logs]
    view = seen(slurm)
    assert len(ran) == 2 and set(view.count) == {"done"}
    made = [int(number) for [(number, _)] in ran]
    assert sum(made) == len(view.states), ran


def test_a_search_goes_batch_by_batch(sweep, cluster):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    slurm = sweep("-m", *ANSWERS, "data.seed=range(0,1000)", "hydra/sweeper=search")
    shown = slurm.run([*slurm.command, "hydra.sweeper.n_trials=2", "hydra.sweeper.n_jobs=1"])
    assert shown.count("\nended ") == 2 and "\nbest " in shown
    assert len(list(slurm.output.glob("sweeps/*/table.md"))) == 2


USERS = [["setpriv", f"--reuid={name}", "--regid=nogroup", "--clear-groups"] for name in ("nobody", "_apt")]


def python() -> str:
    """One that any user may run."""
    for found in (Path(sys.executable), Path("/usr/bin/python3.11")):
        if found.exists() and all(folder.stat().st_mode & 1 for folder in found.resolve().parents):
            return str(found)
    pytest.skip("no Python 3.11 here that other users may run")


def test_two_users_share_an_output(cluster):
    """Each shared stage once, for all that their umask says: what a group may write to stays so.

    And where a job of one is to submit what is left of a sweep, the other may ask for that sweep, too.
    """
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        folder = Path(scratch)
        shutil.chown(folder, group="nogroup")
        folder.chmod(0o2775)
        words = [*SMALL, f"resources.slurm.python={python()}", "resources.slurm.max_jobs=5"]
        one, two = (Sweep(cluster, folder, "-m", f"loss={loss}", *words) for loss in ("sft", "both"))
        path = f"{ROOT}:{sysconfig.get_path('purelib')}"
        environment = one.environment | {"HOME": scratch, "EVOLVE_SNAPSHOT": "0", "PYTHONPATH": path}
        commands = [
            subprocess.Popen(
                [*user, *made.command], cwd=folder, env=environment, umask=0o022, stderr=subprocess.PIPE, text=True
            )
            for user, made in zip(USERS, (one, two), strict=True)
        ]
        assert [command.communicate(timeout=PATIENCE)[1] for command in commands] == ["", ""]
        assert "evolve-rest" in {job.name for job in cluster.queue()}
        for user, made in zip(USERS, (two, one), strict=True):
            subprocess.run([*user, *made.command], cwd=folder, env=environment, umask=0o022, check=True)
        one.wait()
        one.check()
        for sweep in one.output.glob("sweeps/*"):
            assert set(look(load(sweep)).count) == {"done"}
        assert len({path.owner() for path in one.output.glob("store/*/*/record.json")}) == 2


def test_an_output_that_only_another_user_may_write(cluster, tmp_path):
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        folder = Path(scratch)
        folder.chmod(0o755)
        slurm = Sweep(cluster, folder, *ANSWERS)
        (slurm.output / "store" / "respond").mkdir(parents=True)
        for path in (slurm.output, slurm.output / "store"):
            path.chmod(0o777)
        environment = slurm.environment | {"HOME": scratch, "EVOLVE_SNAPSHOT": "0"}
        command = [*USERS[0], *slurm.command]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"can't be written to: {slurm.output}/store/respond is root's" in done.stderr
        assert not cluster.queue()
