"""Where stages run, and what they get there. Nothing here changes a result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from evolve.config.section import HERE, Count, Positive, Rate, Section, Weight, find

Option = str | int | float | bool


def size(memory: Any) -> str:
    """A size as sbatch --mem has it. Raises ValueError for what is none."""
    text = str(memory)
    if not (text.rstrip("KMGTkmgt").isdigit() and len(text) - len(text.rstrip("KMGTkmgt")) <= 1):
        raise ValueError(f"{HERE}={memory}: a number of MiB, or one with K, M, G or T, as sbatch --mem has it")
    return text


class Need(Section):
    """What a stage's job gets on each of its nodes. gpus: None for as many as the stage uses. The rest is sbatch's.

    nodes: that a training's devices are spread over evenly. shards: jobs of an array that deal the stage's rows among
    them, before one job makes the whole of it.
    """

    nodes: Positive = 1
    shards: Positive = 1
    gpus: Count | None = None
    cpus: Positive = 8
    memory: str = "64G"
    minutes: Positive = 240
    partition: str | None = None
    options: dict[str, Option] = Field(default_factory=dict)

    _memory = field_validator("memory", mode="before")(size)


class Node(Section):
    """What a machine has, for `simulate`. memory: as sbatch --mem has it."""

    gpus: Positive = 8
    cpus: Positive = 96
    memory: str = "1T"

    _memory = field_validator("memory", mode="before")(size)


class Slurm(Section):
    """How a site wants its jobs, and what each kind of stage gets.

    needs: by kind of stage, each with what it has otherwise than `default`; `small`: of jobs of nothing but stages of
    seconds. options, of a need too: of sbatch, by their long names.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    options: dict[str, Option] = Field(default_factory=dict)
    setup: tuple[str, ...] = ()
    python: str | None = None
    signal_seconds: Annotated[int, Field(ge=10)] = 120
    max_minutes: Positive | None = None
    max_jobs: Annotated[int, Field(ge=2)] | None = None  # one of them may be the job that submits the rest
    simulate: tuple[Positive, ...] | None = None
    node: Node = Node()
    startup_seconds: Weight = 5.0
    needs: dict[str, Need] = Field(default_factory=dict, validate_default=True)

    @field_validator("needs", mode="before")
    @classmethod
    def _inherit(cls, needs: Any) -> Any:
        from evolve.stages import KINDS

        if not isinstance(needs, dict):
            return needs
        for name in needs:
            if name not in (*KINDS, "default", "small"):
                raise ValueError(f"{HERE}.{name}: no kind of stage; those are {', '.join(KINDS)}, default, small")
        needs = {
            name: need.model_dump() if isinstance(need, Need) else dict(need or {}) for name, need in needs.items()
        }
        default, small = needs.pop("default", {}), {**SMALL, **needs.pop("small", {})}
        return {"default": default, "small": small, **{name: {**default, **need} for name, need in needs.items()}}

    @model_validator(mode="after")
    def _options_are_no_others(self) -> Slurm:
        from evolve.stages import KINDS, module

        for where, options in [
            ("", self.options),
            *((f".needs.{name}", need.options) for name, need in self.needs.items()),
        ]:
            for name in sorted(OURS & {name.replace("_", "-").lstrip("-") for name in options}):
                raise ValueError(
                    f"{HERE}{where}.options.{name}: has a setting of its own or is the launcher's; leave it out"
                )
        for name, need in self.needs.items():
            if need.nodes > 1 and name not in (able := [kind for kind in KINDS if module(kind).Config.SPREADS]):
                raise ValueError(
                    f"{HERE}.needs.{name}.nodes={need.nodes}: runs on one node; only training spreads over several, so "
                    f"set it for {' and '.join(able)} alone"
                )
            minutes = min(need.minutes, self.max_minutes or need.minutes)
            if self.signal_seconds + EARLY >= 60 * minutes:
                raise ValueError(
                    f"{HERE}.signal_seconds={self.signal_seconds}: a job of {HERE}.needs.{name}, of {minutes} minutes, "
                    f"would be told to go as it starts (Slurm does so {EARLY} to {2 * EARLY} s early)"
                )
            if self.max_jobs is not None and 1 < need.shards > self.max_jobs - 2:
                raise ValueError(
                    f"{HERE}.needs.{name}.shards={need.shards}: with the job that follows and the one that submits the "
                    f"rest more than {HERE}.max_jobs={self.max_jobs}"
                )
        return self


EARLY = 30  # seconds that slurmctld sends a signal before it is due, and up to as many more: it looks twice a minute
SMALL = {"gpus": 0, "cpus": 1, "memory": "4G", "minutes": 60}
OURS = {
    *("array", "comment", "dependency", "job-name", "output", "error", "requeue", "no-requeue", "signal", "nodes"),
    *("time", "mem", "cpus-per-task", "partition", "account", "qos", "constraint"),
}


class Assumed(Section):
    """How fast a kind of stage is taken to be: seconds of any such stage, and tokens a second on each GPU it uses."""

    seconds: Weight = 0.0
    tokens_per_second: Rate | None = None


class Rates(Section):
    """A file of assumptions. prompt_tokens, answer_tokens: mean lengths; None: as long as the limits let them be."""

    path: str
    prompt_tokens: Positive | None = None
    answer_tokens: Positive | None = None
    rates: dict[str, Assumed]

    @model_validator(mode="before")
    @classmethod
    def _read(cls, values: Any) -> Any:
        if not isinstance(values, str):
            return values
        if (file := find(values)) is None or not file.is_file():
            raise ValueError(f"{HERE}={values}: no such file")
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError):
            raise ValueError(f"{HERE}={values}: neither YAML nor JSON") from None
        if not isinstance(content, dict):
            raise ValueError(f"{HERE}={values}: no mapping with rates, prompt_tokens, answer_tokens")
        return {**content, "path": values}

    @field_validator("rates")
    @classmethod
    def _are_kinds(cls, rates: dict[str, Assumed]) -> dict[str, Assumed]:
        from evolve.stages import KINDS

        for name in rates:
            if name not in KINDS:
                raise ValueError(f"{HERE}.{name}: no kind of stage; those are {', '.join(KINDS)}")
        return rates


class Resources(Section):
    workers: Positive
    threads: Positive
    device: Literal["auto", "cpu", "cuda"]
    retries: Count
    lease_timeout: Annotated[float, Field(ge=5)]
    slurm: Slurm | None = None
    rates: Rates | None = None
