"""A benchmark's metrics from answers and their scores or verdicts, and the same by prompt (items.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from evals.games import Replies, Reply
from evals.statistics import NotFinite
from evolve.config import RUNTIME, Strategy
from evolve.stages import Context, read_rows
from evolve.store import Report, StageConfig

VERSION = 4
# Inputs by the file that `measure` gets the rows of; any other is a file itself.
ROWS = {"questions": "rows.jsonl"} | {use: f"{use}.jsonl" for use in ("answers", "likelihoods", "verdicts")}
ROWS |= dict.fromkeys(("scores", "select", "gold", "proxy"), "scores.jsonl")
ROWS |= dict.fromkeys(("policy", "base"), "log_probabilities.jsonl")
ROWS |= {"samples": "answers.jsonl", "best_answers": "answers.jsonl", "best_verdicts": "verdicts.jsonl"}


class Config(StageConfig):
    LIGHT = True

    benchmark: str
    # What to quote a number with: the inputs' identities say the same, and names in it are only names.
    protocol: Annotated[str, RUNTIME]
    judge: Annotated[str, RUNTIME] = ""  # who judged or scored, of the same kind
    strategy: Strategy | None = None  # how the answers were made, where the numbers depend on it
    verifier: str | None = None  # who extracts what an answer says
    settings: dict[str, Any] = Field(default_factory=dict)  # what else `measure` goes by


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    import evals
    from evolve import verifiers

    benchmark = evals.load(config.benchmark)
    given: dict[str, Any] = dict(config.settings)
    for use, path in inputs.items():
        given[use] = read_rows(path / ROWS[use]) if use in ROWS else str(path)
    if config.strategy is not None:
        given["strategy"] = config.strategy
    if config.verifier is not None:
        given["extract"] = verifiers.load(config.verifier).extract
    if "verdicts" in inputs:
        given |= {"replies": _replies(inputs["verdicts"]), "judge": config.judge}
    if "best_verdicts" in inputs:
        given["best_replies"] = _replies(inputs["best_verdicts"])
    try:
        measured = benchmark.measure(protocol=config.protocol, **given)
    except NotFinite as error:
        raise ValueError(f"{config.benchmark}: prompt {error}") from None
    for kind, metrics in measured.items.items():
        for metric, by_prompt in metrics.items():
            for prompt, value in by_prompt.items():
                if not math.isfinite(value):  # no test could be made of it
                    raise ValueError(f"{config.benchmark}: prompt {prompt}: {metric}, {kind}, is {value}")
    (out / "metrics.json").write_text(json.dumps(measured.metrics | {"judge": config.judge}, indent=1) + "\n")
    (out / "items.json").write_text(json.dumps(measured.items) + "\n")
    if measured.records:
        measured.records(out)
    main = next(iter(evals.titles(config.benchmark, [measured.metrics])), None)
    maximised = main not in measured.metrics.get("less_is_better", ())  # by a search, whose objective `values` are
    found = benchmark.headline(measured.metrics) if maximised else {}
    values = {name: worth[main]["value"] for name, worth in found.items() if name != "gain" and worth.get(main)}
    return Report(dropped=measured.dropped, values=values)


def _replies(comparison: Path) -> Replies:
    """What the judge said to each ask, by prompt's id and turn; nothing of a scorer in a judge's place."""
    found: Replies = {}
    path = comparison / "replies.jsonl"
    for row in read_rows(path) if path.exists() else ():
        reply = Reply(**row["reply"]) if row["reply"] else None
        found.setdefault(row["id"], {}).setdefault(str(row["turn"]), []).append(reply)
    return found
