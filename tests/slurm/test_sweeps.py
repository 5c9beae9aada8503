"""Sweeps under a real Slurm: the same results as without, and nothing lost or made twice, whatever breaks meanwhile."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from .cluster import Cluster
from .conftest import running
from .sweep import HOLD, ONE, PATIENCE, SMALL, Sweep, restarts, results

README = ["-m", "strategy=chain,tree", "loss=sft,pt,both"]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Slurm's default holds a job that went back into the queue for two minutes."""
    with running(tmp_path_factory.mktemp("slurm"), hold=HOLD) as made:
        yield made


@pytest.fixture
def sweep(cluster, tmp_path) -> Callable[..., Sweep]:
    return lambda *words, **settings: Sweep(cluster, tmp_path, *words, **settings)


@pytest.mark.timeout(1800)
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
    slurm.wait(1200)  # 44 jobs
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


@pytest.mark.parametrize("accounting", [True, False], ids=["limit of a user", "limit of the cluster"])
def test_more_jobs_than_the_site_takes(make_cluster, tmp_path, accounting):
    limits = {"accounting": True, "max_submit": 4} if accounting else {}
    cluster = make_cluster(hold=HOLD, **limits)
    slurm = Sweep(cluster, tmp_path, *ONE, **({} if accounting else {"resources__slurm__max_jobs": 4}))
    said = slurm.submit()
    assert "wait for room" in said
    assert len(cluster.queue()) <= 4
    slurm.wait()
    slurm.check()


def test_where_other_jobs_of_the_user_fill_the_queue(make_cluster, tmp_path):
    """What is left over is not lost: the command says that nothing submits it; the job that is to submit it waits."""
    cluster = make_cluster(hold=HOLD, accounting=True, max_submit=3)
    words = ["-m", "eval.seed=1,2,3,4", "loss=none", "loss.pt=none", "loss.sft_direct=0", *SMALL]
    slurm = Sweep(cluster, tmp_path, *words)

    def others() -> list[str]:
        return [cluster.submit("--hold", wrap="true") for _ in range(2)]

    filling = others()
    assert re.search(r"1 submitted; \d find no room in the queue, and nothing submits them", slurm.submit())
    cluster.run("scancel", *filling)
    assert "wait for room" in slurm.submit()
    [rest] = [job for job in cluster.queue() if job.name == "evolve-rest"]
    cluster.run("scontrol", "hold", rest.id)
    cluster.wait_until(lambda: len(cluster.queue()) == 1, PATIENCE)
    filling = others()
    cluster.run("scontrol", "release", rest.id)
    cluster.wait_until(lambda: restarts(cluster), PATIENCE)
    assert any("no room" in state["message"] for state in slurm.status().values())
    cluster.run("scancel", *filling)
    slurm.wait()
    slurm.check()


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
