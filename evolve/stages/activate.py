"""Activation by SFT [indirect]: -[log pi(y_w|x) + log pi(y_w|x,y_l,z)] on the data set's own pairs [reconstructed]."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from evolve.config import SFTWeights
from evolve.stages import Context, Fitting, read_rows
from evolve.store import Report

VERSION = 2


class Config(Fitting):
    COUNTED = "pairs"
    FOLLOWS = "pairs"

    loss: SFTWeights


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    from evolve.stages.train import fit
    from evolve.trainer import sft_objective

    rows = read_rows(inputs["pairs"] / "rows.jsonl")
    return fit(config, sft_objective(config.loss), rows, None, inputs["model"], out, context)
