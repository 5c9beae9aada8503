"""Which GPUs this machine has for us, found without torch: who plans and deals needs neither it nor a GPU's memory."""

from __future__ import annotations

import os
import re
import subprocess

from evolve.config import Resources


def gpus(resources: Resources) -> tuple[str, ...]:
    """Ids as CUDA_VISIBLE_DEVICES has them; none where there are none, or none are to be used.

    Numbers are whole GPUs. Where one is cut up (MIG) it is not sure that CUDA counts as nvidia-smi does, so all are
    named by their UUIDs: the parts of those that are, and the others whole.
    """
    if resources.device == "cpu":
        return ()
    if (given := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        ids = [name.strip() for name in given.split(",")]
        unknown = [place for place, name in enumerate(ids) if name in ("", "-1", "NoDevFiles")]
        return tuple(ids[: unknown[0]] if unknown else ids)  # as CUDA reads it: what comes behind doesn't count
    try:
        said = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ()
    if said.returncode:  # there is no driver
        return ()
    # GPU 0: NVIDIA A100 (UUID: GPU-b1...)
    #   MIG 3g.20gb     Device  0: (UUID: MIG-c2...)
    found = re.findall(r"^(\s*)(?:GPU|MIG)\b.*\(UUID: ([^)]+)\)", said.stdout, re.MULTILINE)
    if not any(indent for indent, _ in found):
        return tuple(str(number) for number in range(len(found)))
    following = [*(indent for indent, _ in found[1:]), ""]
    return tuple(name for (indent, name), after in zip(found, following, strict=True) if indent or not after)
