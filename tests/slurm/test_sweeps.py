"""Sweeps under a real Slurm: the same results as without, and nothing lost or made twice, whatever breaks meanwhile."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from evolve.config import ROOT
from evolve.store import Store

from .cluster import Cluster, Job
from .conftest import running

README = ["-m", "strategy=chain,tree", "loss=sft,pt,both"]
SMALL = ["debug=fast", "data.eval_prompts=8", "data.prompts=8", "eval.turns=2"]
ONE = ["strategy=chain", "loss=both", *SMALL]
HOLD = 8  # seconds
PATIENCE = 400  # seconds, on a machine with two cores that has other things to do
# A node has four CPUs: a job of stages takes one whole, and a small one goes beside it.
HERE = {
    "hydra/launcher": "slurm",
    "resources": "slurm",
    "resources.device": "cpu",
    "resources.threads": 1,
    "resources.retries": 0,
    "resources.lease_timeout": 10,
    "resources.slurm.needs.default.cpus": 3,
    "resources.slurm.needs.default.memory": "2500M",
    "resources.slurm.needs.small.memory": "1G",
    "wandb.mode": "disabled",
}


class Sweep:
    """A sweep's command, in a folder of its own, on a cluster."""

    def __init__(self, cluster: Cluster, folder: Path, *words: str, **settings: Any):
        self.cluster, self.folder, self.output = cluster, folder, folder / "out"
        here = HERE | {name.replace("__", "."): value for name, value in settings.items()}
        self.command = [
            sys.executable,
            str(ROOT / "evolve" / "main.py"),
            *words,
            *(f"{name}={value}" for name, value in here.items()),
            f"output={self.output}",
        ]
        self.environment = {**os.environ, **cluster.environment}

    def submit(self) -> str:
        """What the command prints; it returns at once."""
        return self.run(self.command)

    def run(self, command: list[str], code: int = 0) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout

    def status(self) -> dict[str, dict[str, Any]]:
        """Every stage's state, by id."""
        command = [sys.executable, "-m", "evolve.status", str(self.output), "--json"]
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode in (0, 1), done.stderr
        return dict(json.loads(done.stdout))

    def count(self) -> Counter[str]:
        return Counter(state["state"] for state in self.status().values())

    def wait(self) -> None:
        """Until no job is left."""
        self.cluster.wait_until(lambda: not self.cluster.queue(), PATIENCE)

    def running(self, kind: str = "") -> Job | None:
        """A job that has begun a stage (of a kind) which is not done."""
        here = {job.comment.split(":")[-1]: job for job in self.cluster.queue() if job.state == "RUNNING"}
        for key, job in here.items():
            events = self.events(key)
            if events and events[-1]["event"] == "stage" and events[-1]["stage"].startswith(kind):
                return job
        return None

    def events(self, key: str) -> list[dict[str, Any]]:
        path = self.output / "jobs" / key / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def made(self) -> Counter[str]:
        """How often each stage was made, over all jobs."""
        every = [event for path in self.output.glob("jobs/*/events.jsonl") for event in self.events(path.parent.name)]
        return Counter(event["stage"] for event in every if event["event"] == "done")

    def check(self) -> None:
        """All is done, each stage once, whole, and nothing is left behind."""
        assert set(self.count()) == {"done"}
        assert set(self.made().values()) == {1}
        store = Store(self.output / "store", 10)
        for stage in store.ids():
            store.verify(stage)
        left = [path for path in store.litter() if not path.name.startswith(".tmp-")]  # what a dead node was building
        assert left == []
        assert self.cluster.queue() == []


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Slurm's default holds a job that went back into the queue for two minutes."""
    with running(tmp_path_factory.mktemp("slurm"), hold=HOLD) as made:
        yield made


@pytest.fixture
def sweep(cluster, tmp_path) -> Callable[..., Sweep]:
    return lambda *words, **settings: Sweep(cluster, tmp_path, *words, **settings)


def results(output: Path) -> dict[str, dict[str, Any]]:
    """The files of every result, by stage: their sizes and hashes."""
    store = Store(output / "store", 10)
    return {stage: found["files"] for stage in store.ids() if (found := store.read(stage)) is not None}


def test_the_readmes_sweep_loses_a_node_and_the_controller_and_is_byte_identical(sweep, cluster, tmp_path):
    slurm = sweep(*README)
    said = slurm.submit()
    assert "jobs submitted" in said or "submitted" in said
    job = cluster.wait_until(lambda: slurm.running("train") or slurm.running("reference"), PATIENCE)
    cluster.kill_node(job.node, noticed=True)
    cluster.wait_until(lambda: slurm.running(), PATIENCE)
    cluster.kill_controller()
    cluster.start_controller()
    cluster.start_node(job.node)
    slurm.wait()
    slurm.check()
    local = [*(word for word in slurm.command if "slurm" not in word), "resources=local"]
    command = [word for word in local if not word.startswith(("resources.", "output="))] + [f"output={tmp_path}/local"]
    slurm.run([*command, "resources.device=cpu"])
    assert results(slurm.output) == results(tmp_path / "local")


def test_faults_one_after_another_and_the_same_command(sweep, cluster):
    """The submitting process killed; a job told to go as at a time limit; one pushed off; one cancelled."""
    slurm = sweep(*ONE, "iteration.count=3", resources__slurm__partition="low")
    with subprocess.Popen(slurm.command, cwd=slurm.folder, env=slurm.environment, stdout=subprocess.DEVNULL) as process:
        cluster.wait_until(lambda: len(cluster.queue()) > 2, PATIENCE)
        process.send_signal(signal.SIGKILL)
    slurm.submit()
    comments = [job.comment for job in cluster.queue()]
    assert len(comments) == len(set(comments)) > 2

    def told() -> bool:
        """Tells a job to go, as Slurm does before a time limit; whether one has gone back into the queue."""
        if job := slurm.running():
            cluster.run("scancel", "--signal=USR2", job.id)
        return restarts(cluster) > 0

    def pushed() -> bool:
        """Takes all nodes for a second; whether a job of ours had to make room."""
        if slurm.running():
            pushing = cluster.submit("--partition=main", "--exclusive", "--nodes=3", wrap="sleep 1")
            cluster.wait_until(lambda: pushing not in {job.id for job in cluster.queue()}, PATIENCE)
        return restarts(cluster) > before

    cluster.wait_until(told, PATIENCE)
    before = restarts(cluster)
    cluster.wait_until(pushed, PATIENCE)
    cluster.run("scancel", cluster.wait_until(slurm.running, PATIENCE).id)
    slurm.wait()
    cluster.wait_until(lambda: slurm.count()["missing"], PATIENCE)  # once its lease has run out
    slurm.submit()
    slurm.wait()
    slurm.check()


def restarts(cluster: Cluster) -> int:
    """How often jobs that are known went back into the queue."""
    return sum(map(int, re.findall(r"Restarts=(\d+)", cluster.run("scontrol", "show", "job").stdout)))


@pytest.mark.parametrize("accounting", [True, False], ids=["limit of a user", "limit of the cluster"])
def test_more_jobs_than_the_site_takes(make_cluster, tmp_path, accounting):
    limits = {"accounting": True, "max_submit": 4} if accounting else {}
    with contextlib.ExitStack():
        cluster = make_cluster(hold=HOLD, **limits)
        slurm = Sweep(cluster, tmp_path, *ONE, **({} if accounting else {"resources__slurm__max_jobs": 4}))
        said = slurm.submit()
        assert "wait for room" in said
        assert len(cluster.queue()) <= 4
        slurm.wait()
        slurm.check()


def test_an_array_of_jobs_makes_a_stages_rows(sweep):
    """Each of two makes half of the answers; the job that follows finds them, and makes none again."""
    shards = {"+resources.slurm.needs.respond.shards": 2}
    slurm = sweep("loss=none", "loss.pt=none", "loss.sft_direct=0", *SMALL, "data.eval_prompts=32", **shards)
    slurm.submit()
    slurm.wait()
    slurm.check()
    shares = [
        slurm.events(f"{path.parent.parent.name}/{path.parent.name}")
        for path in slurm.output.glob("jobs/*/[01]/events.jsonl")
    ]
    assert len(shares) == 2
    assert all([event["event"] for event in events] == ["start", "stage", "done", "end"] for events in shares)


def test_two_sweeps_at_once_make_what_they_share_once(sweep, cluster):
    one = sweep("-m", "loss=sft", *SMALL)
    two = sweep("-m", "loss=both", *SMALL)
    processes = [
        subprocess.Popen(made.command, cwd=made.folder, env=made.environment, stdout=subprocess.PIPE, text=True)
        for made in (one, two)
    ]
    said = [process.communicate(timeout=PATIENCE)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert any("under way already" in text for text in said)
    one.wait()
    for folder in (one.output / "sweeps").iterdir():
        one.run([sys.executable, "-m", "evolve.status", str(folder)])
    assert set(one.made().values()) == {1}
    one.check()


def test_a_stage_that_fails_stops_what_needs_it_alone(sweep, cluster):
    """One of two members can't be trained: its loss grows too much at once. The other ends."""
    slurm = sweep("-m", "trainer.max_loss_growth=1.0000001,10", *ONE)
    slurm.submit()
    slurm.wait()
    count = slurm.count()
    assert count["failed"] == 1 and count["blocked"] > 0 and "missing" not in count
    [failed] = [state for state in slurm.status().values() if state["state"] == "failed"]
    assert "max_loss_growth" in failed["message"] and Path(failed["log"]).exists()


def test_cancel_stops_it(sweep, cluster):
    slurm = sweep(*ONE)
    slurm.submit()
    cluster.wait_until(slurm.running, PATIENCE)
    said = slurm.run([sys.executable, "-m", "evolve.cancel", str(slurm.output)])
    assert "jobs stopped" in said
    cluster.wait_until(lambda: not cluster.queue(), 60)
    cluster.wait_until(lambda: slurm.count()["missing"], PATIENCE)  # once the lease of what ran has run out


@pytest.fixture(autouse=True)
def _paths(monkeypatch) -> Iterator[None]:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    time.sleep(0)
