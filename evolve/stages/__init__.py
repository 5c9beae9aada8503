"""The kinds of stage, one file each. A stage is a pure function `(typed config, input artefacts) -> one folder`.

Each file has VERSION (raised when the same config would now give something else), Config (what decides its result),
and `run(config, inputs, out, context) -> Report`, which reads the inputs' folders and writes into `out`. Heavy imports
stay inside `run`, so that planning needs none.

    data         rows of a data set -> one slice of it                    rows.jsonl
    questions    a benchmark's files -> its prompts                       rows.jsonl
    reward_model pairs -> a small reward model                            a model's folder
    activate     model, pairs -> model                   (SFT)            a model's folder, steps.jsonl
    respond      model, prompts -> answers               (a strategy)     answers.jsonl
    likelihood   model, questions -> log-likelihoods of the choices       likelihoods.jsonl
    perplexity   model, answers -> their log-probabilities                log_probabilities.jsonl
    score        answers -> scores                       (a scorer)       scores.jsonl
    pick         answers, scores -> the best answer                       answers.jsonl
    compare      answers, questions -> verdicts          (a judge)        verdicts.jsonl, replies.jsonl
    pair         answers, scores -> pairs                (a filter)       rows.jsonl
    reference    model, pairs -> log-probabilities                        reference.safetensors
    train        model, pairs, references -> model       (PT)             a model's folder, steps.jsonl
    reinforce    model, prompts -> model                 (PT on rewards)  a model's folder, steps.jsonl
    evaluate     answers, scores or verdicts -> metrics  (a benchmark)    metrics.json, items.json
    overlap      evaluation's prompts, training rows -> contamination     overlap.json
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from evolve.config import Optimiser, Section, Template
from evolve.store import Report, Source, Stage, StageConfig

KINDS = (
    "data",
    "questions",
    "reward_model",
    "activate",
    "respond",
    "likelihood",
    "perplexity",
    "score",
    "pick",
    "compare",
    "pair",
    "reference",
    "train",
    "reinforce",
    "evaluate",
    "overlap",
)


@dataclass(frozen=True)
class Context:
    """Where a stage runs: nothing here may change its result.

    progress(done, total) is shown to whoever waits. partial: a folder, made by who uses it, for what the stage can go
    on from after it was killed. shared: the same for what the stages of all sweeps share, beside the store; None where
    there is no store. share: (k, n) where this is one of n jobs that make every nth row each, from the kth.
    """

    device: str
    progress: Callable[[int, int], None]
    partial: Path
    shared: Path | None = None
    share: tuple[int, int] | None = None


class Module(Protocol):
    VERSION: int

    class Config(StageConfig): ...

    @staticmethod
    def run(config: Any, inputs: Mapping[str, Path], out: Path, context: Context) -> Report: ...


def module(kind: str) -> Any:
    """The file of a kind of stage."""
    return importlib.import_module(f"evolve.stages.{kind}")


def stage(kind: str, inputs: Mapping[str, Stage | Source], **config: Any) -> Stage:
    """A node of the graph, its config checked against the kind's own."""
    return Stage(kind, module(kind).VERSION, module(kind).Config(**config), inputs)


class ModelSettings(Section):
    """How a model's folder is read."""

    dtype: str
    chat_template: str | None
    trust_remote_code: bool


class Fitting(StageConfig):
    """What activation and preference training have in common; `loss` is each one's own."""

    SPREADS = True
    model: ModelSettings
    checkpoint_dtype: str
    template: Template
    optimiser: Optimiser
    epochs: int
    learning_rate: float
    max_length: int
    max_dropped: float
    seed: int

    @property
    def ranks(self) -> int:
        return self.optimiser.devices

    @property
    def gpus(self) -> int:
        return self.optimiser.devices


def read_rows(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
