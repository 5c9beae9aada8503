"""Hydra plugins (Hydra looks for them in this package): sweepers that check or search, launchers that run one graph.

Any launcher goes with the sweeper, and any sweeper with the launcher: under Hydra's stock launchers each member is a
job of its own, and the store's leases see to it that a stage which several members need is computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import OverrideType
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from evolve import config, launch
from evolve.config import ConfigError
from evolve.launch import Planned


def _if_embedded(embedded: str, other: str, *, _root_: DictConfig) -> str:
    """${if_embedded:A,B}, in an experiment's lists: A where data=embedded, else B."""
    return embedded if _root_.hydra.runtime.choices["data"] == "embedded" else other


OmegaConf.register_new_resolver("if_embedded", _if_embedded, replace=True)


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


class SearchSweeper(Sweeper):
    """Optuna's: it asks the launcher for some members at a time, and says at its end which was best."""

    def __init__(self, sampler: DictConfig, **settings: Any):
        self.sampler, self.settings = sampler, settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        try:
            import optuna
            from hydra_plugins.hydra_optuna_sweeper.optuna_sweeper import OptunaSweeper
        except ImportError:
            missing = "hydra/sweeper=search: Optuna is not there; pip install -c constraints.txt -e '.[search]'"
            raise ConfigError(missing) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.found = Path(config.hydra.sweep.dir) / "optimization_results.yaml"
        self.optuna = OptunaSweeper(sampler=instantiate(self.sampler), **self.settings)
        self.optuna.setup(hydra_context=hydra_context, task_function=task_function, config=config)

    def sweep(self, arguments: list[str]) -> None:
        self.optuna.sweep(arguments)
        found = OmegaConf.load(self.found)
        best = " ".join(f"{name}={value}" for name, value in found.best_params.items())
        print(f"best    {found.best_value:.4g} by {best}\n        {self.found}")


class LocalLauncher(Launcher):
    """All members as one graph, each stage once, in worker processes on this machine."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.config = hydra_context, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """For sweepers that search: runs a batch, and returns each member's objective (launch.objective)."""
        configs = compose(self.hydra_context, self.config, job_overrides)
        try:
            planned = self.run(configs, [list(job) for job in job_overrides])
        except launch.Failed as error:  # of some members: how many are too many is the sweeper's to say
            return returns(error.planned, job_overrides, error)
        if planned.config.dry_run:
            raise ConfigError("dry_run=true: that is a search's first batch; what comes next goes by its results")
        Path(self.config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # for what a sweeper writes of its search
        return returns(planned, job_overrides)

    def run(self, configs: Sequence[config.Config], overrides: Sequence[Sequence[str]]) -> Planned:
        return launch.sweep(configs, overrides)


class SlurmLauncher(LocalLauncher):
    """All members as one graph of Slurm jobs. `wait`: whether the command stays until they have ended."""

    def __init__(self, wait: bool):
        self.wait = wait

    def run(self, configs: Sequence[config.Config], overrides: Sequence[Sequence[str]]) -> Planned:
        """It waits: a search has to see how a batch did before it says what comes next."""
        return launch.submit(configs, overrides, wait=True)


class Failure(JobReturn):
    """A member that has failed: Hydra's own would print its overrides before our one line."""

    @property  # type: ignore[misc]  # theirs can be set, too
    def return_value(self) -> Any:
        raise self._return_value


def returns(
    planned: Planned, job_overrides: Sequence[Sequence[str]], error: launch.Failed | None = None
) -> list[JobReturn]:
    """Each member's objective, for a sweeper that searches; of one that has none, the error.

    Raises ConfigError where it has none without an error.
    """
    found = [launch.objective(planned, number) for number in range(len(job_overrides))]
    if error is None and None in found:
        first = next(iter(planned.graph.members[found.index(None)].config.eval.benchmarks), "none")
        raise ConfigError(f"eval.benchmarks: the first ({first}) has no number that a search could maximise")
    return [
        JobReturn(overrides=job, status=JobStatus.COMPLETED, _return_value=value)
        if value is not None or error is None
        else Failure(overrides=job, status=JobStatus.FAILED, _return_value=error)
        for job, value in zip(job_overrides, found, strict=True)
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
