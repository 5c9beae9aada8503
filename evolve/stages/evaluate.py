"""A benchmark's metrics from scored answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from evolve.config import RUNTIME, Section
from evolve.stages import Context, read_rows
from evolve.store import Report

VERSION = 1


class Config(Section):
    benchmark: Literal["refinement"]
    # What to quote a number with: the inputs' identities say the same, and names in it are only names.
    protocol: Annotated[str, RUNTIME]


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from evals import refinement

    answers = read_rows(inputs["answers"] / "answers.jsonl")
    scores = read_rows(inputs["scores"] / "scores.jsonl")
    metrics, unscored = refinement.measure(answers, scores, config.protocol)
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    first, last = metrics["turns"][0], metrics["turns"][-1]
    values = {"direct": first["reward"]["value"], "refined": last["reward"]["value"]}
    return Report(dropped=unscored, values=values)
