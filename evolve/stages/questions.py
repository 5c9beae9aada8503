"""A benchmark's own prompts, with the reference answers where a judge compares with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolve.config import Section
from evolve.stages import Context, write_rows
from evolve.store import Report

VERSION = 1
EMBEDDED = 256  # questions of the embedded world, where no limit says else


class Config(Section):
    benchmark: str
    limit: int | None
    settings: dict[str, Any]


def embedded(count: int) -> list[dict[str, Any]]:
    """The embedded world's: held-out prompts, each with an answer of its noisy teacher."""
    from evolve import data, world

    about = {"dataset": "embedded", "generator": "noisy teacher", "of": count}
    rows = world.references(count, seed=0)
    return [{"id": data.row_id(row["prompt"]), **row, **about, "index": index} for index, row in enumerate(rows)]


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    import evals

    if str(inputs.get("path")) == "embedded":
        rows = embedded(config.limit or EMBEDDED)
    else:
        rows = evals.load(config.benchmark).questions(**inputs, limit=config.limit, **config.settings)
    write_rows(out / "rows.jsonl", rows)
    return Report(values={"questions": len(rows)})
