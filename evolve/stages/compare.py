"""Answers are compared with a benchmark's reference answers: by a judge behind a server, or by a scorer in its place.

What the judge is asked and how its words are read is the benchmark's (evals/games.py). Replies are kept beside the
store, by what was asked (evals/paid.py), so a comparison that was killed, or another sweep's, pays for none twice.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

import evals
from evals.judges import Judge, Verdict
from evolve import parts
from evolve.config import Endpoint
from evolve.scorers import TOKENS
from evolve.stages import Context, read_rows, score, write_rows
from evolve.store import Report, StageConfig

VERSION = 1


class Config(StageConfig):
    """settings: what the benchmark's `asks` take beside prompt, answer and reference. reading: the same of `read`.

    turns: which are judged, from 1.
    """

    COUNTED = "verdicts"
    FOLLOWS = "answers"

    benchmark: str
    settings: dict[str, Any]
    reading: dict[str, Any] = Field(default_factory=dict)
    turns: tuple[int, ...]
    endpoint: Endpoint | None
    scorer: score.Config | None  # in a judge's place: the answer with the higher score is the better one

    @property
    def gpus(self) -> int:
        judge = self.endpoint or self.scorer
        assert judge is not None
        return judge.gpus

    @model_validator(mode="after")
    def _has_one_judge(self) -> Config:
        if (self.endpoint is None) == (self.scorer is None):
            raise ValueError("endpoint, scorer: a comparison is judged by one of them")
        return self


@dataclass(frozen=True)
class Answer:
    """One that is judged: of which prompt and turn, and what it is compared with. text: None where it was not made."""

    id: str
    turn: int
    prompt: str
    text: str
    reference: str
    gold: str | None


def run(config: Config, inputs: Mapping[str, Path], out: Path, context: Context) -> Report:
    benchmark = evals.load(config.benchmark)
    rows = read_rows(inputs["answers"] / "answers.jsonl")
    questions = {row["id"]: row for row in read_rows(inputs["questions"] / "rows.jsonl")}
    answers = list(_answers(rows, questions, config.turns))
    compare = _judged if config.endpoint is not None else _scored
    made, report = compare(config, benchmark, answers, inputs, out, context)
    verdicts = {(answer.id, answer.turn): games for answer, games in zip(answers, made, strict=True)}
    # Of an answer that was not made there are as many verdicts as of any other, and none says anything.
    nothing = [None] * len(benchmark.stand_in(0))
    write_rows(
        out / "verdicts.jsonl",
        (
            {
                "id": row["id"],
                "verdicts": {str(turn): verdicts.get((row["id"], turn), nothing) for turn in config.turns},
            }
            for row in rows
        ),
    )
    if missing := (len(rows) * len(config.turns) - len(answers)) * len(nothing):
        report.dropped["verdicts unscored: no answer was made"] = missing
    report.values = {"verdicts": sum(map(len, made)) + missing, **report.values}
    return report


def _answers(
    rows: Sequence[Mapping[str, Any]], questions: Mapping[str, Mapping[str, Any]], turns: Sequence[int]
) -> Iterator[Answer]:
    """Those that were made, each with its reference. Raises ValueError where there is none."""
    for row in rows:
        question = questions.get(row["id"], {})
        if question.get("reference") is None:
            raise ValueError(f"question {row['id']}: has no reference answer to compare with")
        for turn in turns:
            for answer in row["answers"][turn - 1 : turn]:  # a chain may have ended early
                if answer["end"] != "too long":
                    gold = question.get("gold")
                    yield Answer(row["id"], turn, row["prompt"], answer["text"], question["reference"], gold)


def _judged(
    config: Config,
    benchmark: Any,
    answers: Sequence[Answer],
    inputs: Mapping[str, Path],
    out: Path,
    context: Context,
) -> tuple[list[list[Any]], Report]:
    """The verdicts of each answer's games."""
    assert config.endpoint is not None
    if context.shared is None:
        raise ValueError("a judge's replies are kept beside the store, and there is none")
    games = [benchmark.asks(one.prompt, one.text, one.reference, **config.settings) for one in answers]
    asks = [ask for each in games for ask in each]
    found: dict[int, Verdict] = {}
    with contextlib.closing(Judge(config.endpoint, context.shared, inputs.get("judge"))) as judge:
        for index, verdict in judge.ask(asks, partial(benchmark.read, **config.reading)):
            found[index] = verdict
            context.progress(len(found), len(asks))
    verdicts = iter([found[index] for index in range(len(asks))])
    made = [[next(verdicts) for _ in each] for each in games]
    write_rows(
        out / "replies.jsonl",
        (
            {
                "id": one.id,
                "turn": one.turn,
                "answer_first": ask.answer_first,
                "reply": asdict(verdict.reply) if verdict.reply else None,
                "tokens": {"read": verdict.read, "generated": verdict.generated},
                "dollars": verdict.dollars,
                "attempts": verdict.attempts,
                "unscored": verdict.why,
            }
            for one, each, given in zip(answers, games, made, strict=True)
            for ask, verdict in zip(each, given, strict=True)
        ),
    )
    whys = Counter(verdict.why for verdict in found.values() if verdict.why is not None)
    report = Report(
        dropped={f"verdicts unscored: {why}": count for why, count in sorted(whys.items())},
        tokens={
            "generated": sum(verdict.generated for verdict in found.values()),
            "read": sum(verdict.read for verdict in found.values()),
        },
        values={
            "from the cache": sum(verdict.cached for verdict in found.values()),
            "dollars": math.fsum(verdict.paid for verdict in found.values()),
        },
    )
    return [[verdict.verdict for verdict in given] for given in made], report


def _scored(
    config: Config,
    benchmark: Any,
    answers: Sequence[Answer],
    inputs: Mapping[str, Path],
    out: Path,
    context: Context,
) -> tuple[list[list[Any]], Report]:
    """The scorer's word in place of the judge's: each answer and its reference, graded as the stage `score` does."""
    assert config.scorer is not None
    pairs = [
        {
            "prompt": one.prompt,
            "gold": one.gold,
            "answers": [{"text": one.text, "end": "stop"}, {"text": one.reference, "end": "stop"}],
        }
        for one in answers
    ]
    graded = parts.run(score.grade, (config.scorer, inputs, pairs), len(pairs), context, **config.scorer.shards)
    made: list[list[Any]] = []
    unscored = 0
    counts: Counter[str] = Counter()
    for (answer, _, of_answer), (reference, _, of_reference) in graded:
        counts.update(of_answer)
        counts.update(of_reference)
        known = None not in (answer, reference)
        games = benchmark.stand_in((answer > reference) - (answer < reference) if known else 0)
        made.append(games if known else [None] * len(games))
        unscored += 0 if known else len(games)
    tokens = {"generated": counts.pop(TOKENS)} if TOKENS in counts else {}
    return made, Report({"verdicts unscored: no score": unscored} if unscored else {}, tokens, dict(counts))
