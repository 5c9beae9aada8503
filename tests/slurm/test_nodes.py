"""A training over two nodes of a real Slurm: the same as with as many processes on one machine, whatever breaks."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from evolve.config import ROOT

from .cluster import Cluster
from .conftest import running
from .test_sweeps import HOLD, PATIENCE, Sweep, restarts, results

TRAINING = ["loss=none", "loss.pt=none", "debug=fast", "eval.benchmarks=[]", "data.eval_prompts=8"]
TRAINING += ["trainer.batch_size=8", "trainer.micro_batch=4", "trainer.devices=2"]
TRAINING += ["trainer.epochs.sft=20", "trainer.checkpoint_minutes=0.01"]
NODES = {"+resources.slurm.needs.activate.nodes": 2}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """Slurm finds out that a node is dead some time after its peers have noticed, as anywhere."""
    with running(tmp_path_factory.mktemp("slurm"), hold=HOLD, settings={"SlurmdTimeout": 15}) as made:
        yield made


@pytest.fixture(scope="module")
def expected(cluster, tmp_path_factory) -> dict[str, dict[str, object]]:
    """What two processes on one machine make, without Slurm."""
    folder = tmp_path_factory.mktemp("local")
    sweep = Sweep(cluster, folder, *TRAINING)
    local = [word for word in sweep.command if "slurm" not in word and not word.startswith("resources.")]
    subprocess.run([*local, "resources.device=cpu"], cwd=folder, check=True, timeout=PATIENCE, capture_output=True)
    return results(sweep.output)


def left(cluster: Cluster) -> list[psutil.Process]:
    """Processes of jobs, on all nodes."""
    found = []
    for process in psutil.process_iter():
        try:
            environment = process.environ()
        except psutil.Error:
            continue
        mine = environment.get("SLURM_CONF") == cluster.environment["SLURM_CONF"]
        if mine and "SLURM_JOB_ID" in environment and process.status() != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def ranks(cluster: Cluster) -> list[psutil.Process]:
    return [process for process in left(cluster) if "evolve.processes" in process.cmdline()[:5]]


def checkpoint(sweep: Sweep) -> int:
    """The step of the newest whole one."""
    found = (sweep.output / "store").glob("activate/.partial-*/**/checkpoint-*/complete")
    return max((int(path.parent.name.split("-")[1]) for path in found), default=0)


def test_two_nodes_train_as_one_machine(cluster, tmp_path, expected):
    """Told to go, then with a node dead: it goes on from its checkpoint. Neither is a failure of the stage."""
    sweep = Sweep(cluster, tmp_path, *TRAINING, **NODES)
    sweep.submit()
    cluster.wait_until(lambda: checkpoint(sweep), PATIENCE)
    assert sweep.running("activate").node == "node[1-2]"
    spaces = [Path(f"/proc/{process.pid}/ns/pid").readlink() for process in ranks(cluster)]
    assert len(spaces) == len(set(spaces)) == 2  # one on each
    cluster.run("scancel", "--signal=USR2", sweep.running("activate").id)
    cluster.wait_until(lambda: restarts(cluster) == 1, PATIENCE)
    cluster.wait_until(lambda: not left(cluster), 20)
    kept = checkpoint(sweep)
    assert kept
    cluster.wait_until(lambda: checkpoint(sweep) > kept, PATIENCE)
    cluster.kill_node("node2")
    cluster.wait_until(lambda: restarts(cluster) == 2, PATIENCE)
    assert checkpoint(sweep) > kept
    sweep.wait()
    sweep.check()
    [job] = [key for key in sweep.output.glob("jobs/*") if "activate" in (key / "stages.json").read_text()]
    left_by = ("back", "ended")  # whether it goes by itself or Slurm is faster
    events = [event["event"] for event in sweep.events(job.name) if event["event"] not in left_by]
    assert events == ["start", "stage"] * 3 + ["done", "end"]
    assert results(sweep.output) == expected
    cluster.wait_until(lambda: not left(cluster), 20)


@pytest.fixture(autouse=True)
def _paths(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
