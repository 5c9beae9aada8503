"""A sweep's command on a cluster, for tests of what becomes of it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from evolve.config import ROOT
from evolve.store import Store

from .cluster import Cluster, Job

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
        self.environment = {**os.environ, **cluster.environment, "PYTHONPATH": str(ROOT)}

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

    def wait(self, seconds: float = PATIENCE) -> None:
        """Until no job is left."""
        self.cluster.wait_until(lambda: not self.cluster.queue(), seconds)

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
        undone = {stage: of for stage, of in self.status().items() if of["state"] != "done"}
        assert not undone, undone
        assert set(self.made().values()) == {1}
        store = Store(self.output / "store", 10)
        for stage in store.ids():
            store.verify(stage)
        left = [path for path in store.litter() if not path.name.startswith(".tmp-")]  # what a dead node was building
        assert left == []
        assert self.cluster.queue() == []


def results(output: Path) -> dict[str, dict[str, Any]]:
    """The files of every result, by stage: their sizes and hashes."""
    store = Store(output / "store", 10)
    return {stage: found["files"] for stage in store.ids() if (found := store.read(stage)) is not None}


def restarts(cluster: Cluster) -> int:
    """How often jobs that are known went back into the queue."""
    return sum(map(int, re.findall(r"Restarts=(\d+)", cluster.run("scontrol", "show", "job").stdout)))
