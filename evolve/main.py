"""python evolve/main.py [-m] [group=choice ...] [key=value ...]: compose, freeze, plan, run. See conf/config.yaml."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# Run as a script, Python puts evolve/ itself first on the path, where its modules could shadow others' packages.
sys.path = [str(ROOT), *(folder for folder in sys.path if os.path.realpath(folder) != str(HERE))]

from evolve import snapshot  # noqa: E402

if __name__ == "__main__":
    snapshot.enter()
    os.environ |= snapshot.environment()  # whatever process starts from here imports what this one does

if find_spec("hydra") is None:  # a Python that isn't the project's
    sys.exit("error: this Python has no hydra; source .venv/bin/activate (`make setup` makes it)")

import hydra  # noqa: E402
from omegaconf import DictConfig  # noqa: E402

from evolve import config, launch, workers  # noqa: E402

raised: list[Exception] = []  # by `member`, when it is the whole command: Hydra would wrap it in lines of its own


@hydra.main(version_base="1.3", config_path=str(ROOT / "conf"), config_name="config")
def member(composed: DictConfig) -> float | None:
    """One member: the whole command, or a job of one of Hydra's stock launchers."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    job = HydraConfig.get()
    alone = job.mode == RunMode.RUN
    # In another process this function came by value, with ROOT, and the modules by name.
    if config.ROOT != ROOT:
        raise config.ConfigError(f"this job imports evolve from {config.ROOT}, not {ROOT}: it has lost PYTHONPATH")
    try:
        configs, overrides = [config.load(composed)], [list(job.overrides.task)]
        if alone and job.launcher._target_.endswith(".SlurmLauncher"):
            planned = launch.submit(configs, overrides, job.launcher.wait)
        else:
            planned = launch.sweep(configs, overrides, inline=not alone)
    except (config.ConfigError, launch.Failed, OSError) as error:
        if not alone or (isinstance(error, OSError) and not _machines(error)):
            raise
        raised.append(error)
        return None
    return launch.objective(planned, 0)


def _machines(error: Exception) -> str:
    """A machine's own trouble, in a line."""
    if isinstance(error, OSError) and error.errno in workers.FULL:
        return f"{error.strerror}; the same command goes on once there is room"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename}: {error.strerror}; look at its rights (ls -l)"
    return ""


def _hydras(error: Exception) -> bool:
    """Whether Hydra refused the command: by an error of its own, or by a plain one that it raised."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raiser = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return f"{type(error).__module__}.".startswith(("hydra.", "omegaconf.")) or raiser.startswith("hydra._internal")


def main() -> int:
    """The exit status: 0 done, 1 a stage failed, 2 the command is wrong, 130 interrupted."""
    sys.argv[1:] = sorted(sys.argv[1:], key=lambda word: word not in ("-m", "--multirun"))  # Hydra wants it first
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises what it would print, and we print one line
    try:
        member()
        if raised:
            raise raised[0]
    except config.ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except launch.Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        said = str(stop) or "stopped; what was finished is kept, and the same command goes on from there"
        print(said, file=sys.stderr)
        return 130
    except Exception as error:
        if said := _machines(error):
            print(f"error: {said}", file=sys.stderr)
            return 1
        if not _hydras(error):
            raise
        print(f"error: {config.one_line(error, sys.argv[1:])}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
