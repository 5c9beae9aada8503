"""A stage in several processes, one for each device: all run the same code, and what it trains with finds its peers.

    one machine         torchrun starts them
    a Slurm job's nodes srun starts as many on each, in a step of their own beside the job's (slurm_job.py)

What comes out goes by how many processes there are, not by where they are. The first one writes it.
"""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evolve.config import Section
from evolve.processes import Call, Died
from evolve.stages import Context, module
from evolve.store import Report, Stage

PATIENCE = 900  # seconds in which Slurm is to find out that a node is dead, and to end the job
# Slurm tells every process of a job to go by USR2, from the first moment on; it is the job's process that sees to it.
TASK = 'trap "" USR2; export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID; exec "$@"'


def run(
    stage: Stage,
    inputs: Mapping[str, Path],
    out: Path,
    context: Context,
    processes: int,
    nodes: int = 1,
    python: str | None = None,
) -> Report:
    """The stage's own `run` in that many processes. Raises ValueError or RuntimeError: the first error that one had.

    Args:
        out: of several nodes, all see it.
        nodes: of the Slurm job that this runs in, with the same number of processes on each.
        python: what starts Python on them (a container); None: this process's own.
    """
    here = processes // nodes
    if context.device == "cuda":
        import torch

        if torch.cuda.device_count() < here:
            raise RuntimeError(
                f"trainer.devices={processes}{f' on {nodes} nodes' * (nodes > 1)}: there are "
                f"{torch.cuda.device_count()} GPUs here"
            )
    arguments = (stage.kind, stage.config, dict(inputs), out, context.device, context.partial)
    if nodes == 1:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        call = Call(_rank, arguments, launcher=torchrun)
    else:
        from torch.distributed import TCPStore

        # Where they meet: held here from now on, so that no other job's can be at the same port.
        meeting = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        call = Call(
            _rank,
            arguments,
            launcher=[*_srun(nodes, here), "sh", "-c", TASK, "sh", *shlex.split(python or sys.executable)],
            environment={
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(here),
                "MASTER_ADDR": socket.gethostname(),
                "MASTER_PORT": str(meeting.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",  # none of the ranks is to hold it
            },
            scratch=out,
        )
    shown = None
    try:
        while call.running:
            time.sleep(0.2)
            if (news := call.progress) and news != shown:
                shown = news
                context.progress(*news)
        return Report(**call.result())
    except RuntimeError as error:
        if nodes > 1:
            _await_nodes(nodes)
        if isinstance(error, Died):
            raise RuntimeError(f"one of {processes} processes: {error}") from None
        raise
    finally:
        call.stop()


def _srun(nodes: int, each: int) -> list[str]:
    """A step on all of the job's nodes, with what the job has there: beside the one that this process is in."""
    cpus = max(1, int(os.environ["SLURM_CPUS_ON_NODE"]) // each)
    return [
        "srun",
        *("--overlap", f"--nodes={nodes}", f"--ntasks={nodes * each}", f"--ntasks-per-node={each}"),
        *(f"--cpus-per-task={cpus}", "--overcommit", "--cpu-bind=none", "--distribution=block"),
        *("--export=ALL", "--input=none", "--kill-on-bad-exit=1"),
    ]


def _await_nodes(nodes: int) -> None:
    """Returns at once where every node of the job answers.

    Where one doesn't, that is most likely what the processes ended by, and no failure of theirs: Slurm will find out,
    end this job and put it back into the queue.
    """
    deadline = time.monotonic() + PATIENCE
    probe = [*_srun(nodes, 1), "echo", "here"]  # srun's exit code can be 0 where it could start nothing
    while time.monotonic() < deadline:
        if len(subprocess.run(probe, stdout=subprocess.PIPE, text=True).stdout.split()) == nodes:
            return
        time.sleep(5)


def _rank(
    kind: str,
    config: Section,
    inputs: Mapping[str, Path],
    out: Path,
    device: str,
    partial: Path,
    progress: Callable[[int, int], None],
) -> dict[str, Any]:
    report = asdict(module(kind).run(config, inputs, out, Context(device, progress, partial)))
    import torch.distributed

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()  # or its threads may outlive what they use
    return report
