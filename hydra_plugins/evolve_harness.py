"""Hydra plugins (Hydra looks for them in this package): the sweeper that checks, and the launcher that runs one graph.

Any launcher goes with the sweeper, and any sweeper with the launcher: under Hydra's stock launchers each member is a
job of its own, and the store's leases see to it that a stage which several members need is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evolve import config, launch


class MemberSweeper(BasicSweeper):
    """The product of the comma lists; every member is composed, checked and planned before anything is written."""

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None and self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides([*self._parse_config(), *arguments])
        overrides = [job for batch in self.split_arguments(parsed, None) for job in batch]
        configs = compose(self.hydra_context, self.config, overrides)
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
        configs = compose(self.hydra_context, self.config, job_overrides)
        return returns(launch.sweep(configs, [list(job) for job in job_overrides]), job_overrides)


class SlurmLauncher(LocalLauncher):
    """All members as one graph of Slurm jobs. `wait`: whether the command stays until they have ended."""

    def __init__(self, wait: bool):
        self.wait = wait

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """For sweepers that search, which have to see how a batch did before they say what comes next."""
        configs = compose(self.hydra_context, self.config, job_overrides)
        return returns(launch.submit(configs, [list(job) for job in job_overrides], wait=True), job_overrides)


def returns(planned: launch.Planned, job_overrides: Sequence[Sequence[str]]) -> list[JobReturn]:
    """Each member's objective, for a sweeper that searches."""
    return [
        JobReturn(overrides=job, status=JobStatus.COMPLETED, _return_value=launch.objective(planned, number))
        for number, job in enumerate(job_overrides)
    ]


def compose(context: HydraContext, base: DictConfig, jobs: Sequence[Sequence[str]]) -> list[config.Config]:
    """Each job's configuration. Raises as Hydra does, and ConfigError.

    Hydra's own composition takes 0.2 s, so it is made once for each choice of groups, and values are then set in place:
    jobs that set the same keys share it, as each sets all that the one before it has set.
    """
    loader = context.config_loader
    parse = cache(OverridesParser.create(config_loader=loader).parse_override)
    primary, hydras = base.hydra.job.config_name, list(base.hydra.overrides.hydra)
    is_group = cache(lambda key: bool(loader.get_group_options(key, config_name=primary, overrides=hydras)))
    shared: dict[tuple[Sequence[str], ...], DictConfig] = {}
    configs = []
    for job in jobs:
        overrides = [parse(word) for word in job]
        rest = [override for override in overrides if not is_group(override.key_or_group)]
        values = {override.key_or_group: override.value() for override in rest}
        choices = tuple(word for word, override in zip(job, overrides, strict=True) if override not in rest)
        composed = shared.get((choices, tuple(values)))
        if composed is None or not _set(composed, values):
            whole = loader.load_sweep_config(base, list(job))
            composed = OmegaConf.masked_copy(whole, [str(key) for key in whole if key != "hydra"])
            OmegaConf.set_struct(composed, True)
            # Whole sections are merged, and keys that are added or removed are so once: those jobs share nothing.
            if not any(override.type != OverrideType.CHANGE or isinstance(override.value(), dict) for override in rest):
                shared[choices, tuple(values)] = composed
        configs.append(config.load(composed))
    return configs


def _set(composed: DictConfig, values: Mapping[str, Any]) -> bool:
    """Whether all could be set; where one can't, Hydra says why."""
    try:
        for key, value in values.items():
            OmegaConf.update(composed, key, value)
    except OmegaConfBaseException:
        return False
    return True
