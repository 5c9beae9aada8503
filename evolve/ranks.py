"""A stage in several processes, one for each device of this machine: torchrun starts them, and all run the same code.

What the stage trains with finds its peers through torchrun's environment; the first process writes the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from evolve.config import Section
from evolve.processes import Call, Died
from evolve.stages import Context, module
from evolve.store import Report, Stage


def run(stage: Stage, inputs: Mapping[str, Path], out: Path, context: Context, processes: int) -> Report:
    """The stage's own `run` in that many processes. Raises ValueError or RuntimeError: the first error that one had."""
    if context.device == "cuda":
        import torch

        if torch.cuda.device_count() < processes:
            raise RuntimeError(f"trainer.devices={processes}: there are {torch.cuda.device_count()} GPUs here")
    call = Call(
        _rank,
        (stage.kind, stage.config, dict(inputs), out, context.device, context.partial),
        launcher=["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"],
    )
    shown = None
    try:
        while call.running:
            time.sleep(0.2)
            if (news := call.progress) and news != shown:
                shown = news
                context.progress(*news)
        return Report(**call.result())
    except Died as error:
        raise RuntimeError(f"one of {processes} processes: {error}") from None
    finally:
        call.stop()


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
