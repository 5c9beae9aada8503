"""Contamination: how many of an evaluation's prompts stand in what a member trains on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from evolve.stages import Context, read_rows
from evolve.store import Report, StageConfig

VERSION = 1


class Config(StageConfig):
    LIGHT = True

    words: int  # of a stretch that counts as overlap


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from evals.overlap import overlap

    asked = read_rows(inputs["evaluation"] / "rows.jsonl")
    evaluation = [{"id": row["id"], "prompt": row.get("text", row["prompt"])} for row in asked]
    training = [row for use in inputs if use != "evaluation" for row in read_rows(inputs[use] / "rows.jsonl")]
    found = overlap(training, evaluation, config.words)
    (out / "overlap.json").write_text(json.dumps(found, indent=1) + "\n")
    return Report(values={key: value for key, value in found.items() if isinstance(value, int)})
