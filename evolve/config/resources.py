"""Where stages run, and what they get there. Nothing here changes a result."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from evolve.config.section import HERE, Count, Positive, Section

Option = str | int | float | bool


class Need(Section):
    """What the job of a stage gets. gpus: None for as many as the stage uses. The rest is sbatch's.

    shards: jobs of an array that deal the stage's rows among them, before one job makes the whole of it.
    """

    shards: Positive = 1
    gpus: Count | None = None
    cpus: Positive = 4
    memory: str = "16G"
    minutes: Positive = 240
    partition: str | None = None
    options: dict[str, Option] = Field(default_factory=dict)

    @field_validator("memory", mode="before")
    @classmethod
    def _is_a_size(cls, memory: Any) -> Any:
        text = str(memory)
        if not (text.rstrip("KMGTkmgt").isdigit() and len(text) - len(text.rstrip("KMGTkmgt")) <= 1):
            raise ValueError(f"{HERE}={memory}: a number of MiB, or one with K, M, G or T, as sbatch --mem has it")
        return text


class Slurm(Section):
    """How a site wants its jobs, and what each kind of stage gets.

    needs: by kind of stage; `default` for kinds that aren't named, `small` for those that take seconds. options, of a
    need too: of sbatch, by their long names without dashes.
    """

    partition: str | None
    account: str | None
    qos: str | None
    constraint: str | None
    options: dict[str, Option]
    setup: tuple[str, ...]
    python: str | None
    signal_seconds: Annotated[int, Field(ge=10)]
    max_jobs: Annotated[int, Field(ge=2)] | None  # one of them may be the job that submits the rest
    needs: dict[str, Need]

    @field_validator("needs")
    @classmethod
    def _are_kinds(cls, needs: dict[str, Need]) -> dict[str, Need]:
        from evolve.stages import KINDS

        for name in needs:
            if name not in (*KINDS, "default", "small"):
                raise ValueError(f"{HERE}.{name}: no kind of stage; those are {', '.join(KINDS)}, default, small")
        return {"default": Need(), "small": Need(gpus=0, cpus=1, memory="4G", minutes=60), **needs}

    @model_validator(mode="after")
    def _options_are_no_others(self) -> Slurm:
        ours = {
            "array",
            "comment",
            "dependency",
            "job-name",
            "output",
            "error",
            "requeue",
            "no-requeue",
            "signal",
            "nodes",
        }
        for where, options in [
            ("", self.options),
            *((f".needs.{name}", need.options) for name, need in self.needs.items()),
        ]:
            for name in sorted(ours & {name.replace("_", "-").lstrip("-") for name in options}):
                raise ValueError(f"{HERE}{where}.options.{name}: is set for each job by the launcher; leave it out")
        return self


class Resources(Section):
    workers: Positive
    threads: Positive
    device: Literal["auto", "cpu", "cuda"]
    retries: Count
    lease_timeout: Annotated[float, Field(ge=5)]
    slurm: Slurm | None = None
