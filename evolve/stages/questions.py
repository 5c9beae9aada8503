"""A benchmark's own prompts, with the reference answers where a judge compares with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolve.stages import Context, write_rows
from evolve.store import Report, StageConfig

VERSION = 1
EMBEDDED = 256  # questions of the embedded world, where no limit says else


class Config(StageConfig):
    LIGHT = True
    COUNTED = "questions"

    benchmark: str
    limit: int | None
    settings: dict[str, Any]


def rows(config: Config, files: Mapping[str, Path]) -> list[dict[str, Any]]:
    """{"id", "prompt", "reference"?, ...}. Raises ValueError or OSError for files that are not as they should be."""
    import evals

    if str(files.get("path")) == "embedded":
        return _embedded(config.limit or EMBEDDED)
    given = {use: str(path) for use, path in files.items()}
    return list(evals.load(config.benchmark).questions(**given, limit=config.limit, **config.settings))


def _embedded(count: int) -> list[dict[str, Any]]:
    """The embedded world's: held-out prompts, each with an answer of its noisy teacher."""
    from evolve import data, world

    made = world.references(count, seed=0)
    ids = [data.row_id(row["prompt"]) for row in made]
    about = {"dataset": "embedded", "generator": "noisy teacher", "of": count}
    return [{"id": ids[n], **row, **about, "index": n, "uid": ids[n]} for n, row in enumerate(made)]


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    found = rows(config, inputs)
    write_rows(out / "rows.jsonl", found)
    return Report(values={"questions": len(found)})
