"""Hydra plugins (Hydra looks for them in this package): the sweeper that checks, and the launcher that runs one graph.

Any launcher goes with the sweeper, and any sweeper with the launcher: under Hydra's stock launchers each member is a
job of its own, and the store's leases see to it that a stage which several members need is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from evolve import config, launch


class MemberSweeper(BasicSweeper):
    """The product of the comma lists; every member is composed, checked and planned before anything is written."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*self._parse_config(), *arguments])
        overrides = [job for batch in self.split_arguments(parsed, None) for job in batch]
        configs = [compose(self.hydra_context, self.config, job) for job in overrides]
        if isinstance(self.launcher, SlurmLauncher):
            return launch.submit(configs, overrides, self.launcher.wait)
        if isinstance(self.launcher, LocalLauncher) or all(member.dry_run for member in configs):
            return launch.sweep(configs, overrides)
        planned = launch.plan_members(configs, overrides)
        try:
            return super().sweep(arguments)
        finally:
            launch.report(planned)


class LocalLauncher(Launcher):
    """All members as one graph, each stage once, in worker processes on this machine."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """For sweepers that search: runs a batch, and returns each member's last refined reward."""
        configs = [compose(self.hydra_context, self.config, job) for job in job_overrides]
        return returns(launch.sweep(configs, [list(job) for job in job_overrides]), job_overrides)


class SlurmLauncher(LocalLauncher):
    """All members as one graph of Slurm jobs. `wait`: whether the command stays until they have ended."""

    def __init__(self, wait: bool):
        self.wait = wait

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """For sweepers that search, which have to see how a batch did before they say what comes next."""
        configs = [compose(self.hydra_context, self.config, job) for job in job_overrides]
        return returns(launch.submit(configs, [list(job) for job in job_overrides], wait=True), job_overrides)


def returns(planned: launch.Planned, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Each member's objective, for a sweeper that searches."""
    return [
        JobReturn(overrides=job, status=JobStatus.COMPLETED, _return_value=launch.objective(planned, number))
        for number, job in enumerate(job_overrides)
    ]


def compose(context: HydraContext, base: DictConfig, overrides: Sequence[str]) -> config.Config:
    composed = context.config_loader.load_sweep_config(base, list(overrides))
    return config.load(OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"]))
