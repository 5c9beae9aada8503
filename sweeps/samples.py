"""Sample chains: prompts with each turn's answer and what it scored, chosen by a rule that nobody's taste is in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sweeps.collect import Measurement, Sweep

PROMPTS = 3  # of each model
CHAINS = 360  # on a page, whatever the number of members
TURNS = 8  # of a chain, or answers of several
CHARACTERS = 1500  # of a prompt or an answer
ENDS = {"length": "cut off at the token limit", "too long": "not made: no room in the context"}


@dataclass(frozen=True)
class Turn:
    text: str
    score: str
    about: str  # its tokens, and how it ended where not by itself


@dataclass(frozen=True)
class Chain:
    """A prompt and the answers of one model; members that share the model share the chain."""

    members: tuple[int, ...]  # by their place in the sweep
    phase: str
    benchmark: str
    record: str  # of the evaluation
    answers: str  # the record of the stage that made them
    id: str
    prompt: str
    turns: list[Turn]
    more: int  # answers that are not shown

    @property
    def long(self) -> bool:
        """Whether its answers want wide columns."""
        return any(len(turn.text) > 300 for turn in self.turns)


def chains(sweep: Sweep) -> tuple[list[Chain], str]:
    """The chains that a page shows, and how they were chosen in words.

    Of each model the prompts whose ids have the lowest hashes, so that all models show the same ones. Where that is too
    many, members' last models come before their first, and these before those between.
    """
    models = list(_models(sweep))
    wanted = sorted(models, key=lambda model: model[0])
    made: dict[str, list[Chain]] = {}
    left = 0
    for _, measurement, members in wanted:
        if sum(map(len, made.values())) + PROMPTS > CHAINS:
            left += 1
            continue
        made[measurement.id] = list(_of(sweep, measurement, members))
    ordered = [chain for _, measurement, _ in models for chain in made.get(measurement.id, ())]
    said = (
        f"Of each model the {PROMPTS} prompts whose ids have the lowest SHA-256, so no one chose them, and all models "
        "of a benchmark show the same; members that share a model share its chains."
    )
    if left:
        said += (
            f" {len(made):,} of {len(wanted):,} models are shown: first each member's last one, then its first, "
            "then those between, in the order of the sweep."
        )
    return ordered, said


def _models(sweep: Sweep) -> Iterator[tuple[int, Measurement, tuple[int, ...]]]:
    """Each measurement of text answers once, and whose it is; 0 for a member's last, 1 for its first, 2 for others."""
    found: dict[str, tuple[Measurement, list[int]]] = {}
    ranks: dict[str, int] = {}
    for place, member in enumerate(sweep.members):
        for benchmark in sweep.benchmarks:
            measured = [one for one in member.of(benchmark) if "answers" in one.record["inputs"]]
            for number, one in enumerate(measured):
                rank = 0 if number == len(measured) - 1 else 1 if number == 0 else 2
                ranks[one.id] = min(rank, ranks.get(one.id, rank))
                found.setdefault(one.id, (one, []))[1].append(place)
    yield from ((ranks[one], measurement, tuple(whose)) for one, (measurement, whose) in found.items())


def _of(sweep: Sweep, measurement: Measurement, members: tuple[int, ...]) -> Iterator[Chain]:
    inputs = measurement.record["inputs"]
    found = sweep.rows(inputs["answers"], "answers.jsonl") or []  # none: pruned; the numbers stand without
    rows = sorted(found, key=lambda row: hashlib.sha256(row["id"].encode()).digest())[:PROMPTS]
    say = _scorer(sweep, measurement)
    for row in rows:
        answers = row["answers"]
        turns = [
            Turn(cut(answer["text"]), say(row["id"], number, len(answers)), _about(answer))
            for number, answer in enumerate(answers[:TURNS], 1)
        ]
        about = (measurement.phase, measurement.benchmark, measurement.id, inputs["answers"])
        yield Chain(members, *about, row["id"], cut(row["prompt"]), turns, len(answers) - len(turns))


def _scorer(sweep: Sweep, measurement: Measurement) -> Callable[[str, int, int], str]:
    """What is said of an answer by (prompt's id, its number, of how many): its score, or the benchmark's metrics."""
    scored = measurement.record["inputs"].get("scores")
    if rows := sweep.rows(scored, "scores.jsonl") if scored else None:
        scores = {row["id"]: row for row in rows}

        def graded(key: str, number: int, of: int) -> str:
            value, correct = (scores[key][what][number - 1] for what in ("scores", "correct"))
            said = "no score" if value is None else f"{value:.3f}"
            return said if correct is None else f"{said}, {'right' if correct else 'wrong'}"

        return graded
    items, titles = sweep.items(measurement), measurement.titles

    def measured(key: str, number: int, of: int) -> str:
        kind = "direct" if number == 1 else "refined" if number == of else ""
        worth = {metric: values[key] for metric, values in items.get(kind, {}).items() if key in values}
        return ", ".join(f"{titles.get(metric, metric)} {value:.3g}" for metric, value in worth.items())

    return measured


def _about(answer: Mapping[str, Any]) -> str:
    return "; ".join([f"{answer['tokens']} tokens", *([ENDS[answer["end"]]] if answer["end"] in ENDS else [])])


def cut(text: str) -> str:
    """At most CHARACTERS of it, and how many more there are; what can't be seen is shown by signs of its own."""
    more = len(text) - CHARACTERS
    return _seen(text[:CHARACTERS]) + (f" [and {more:,} more characters]" if more > 0 else "")


# Control characters but for tab and newline as their pictures; halves of characters, which no file can hold, as a mark.
_SIGNS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {127: 0x2421}
_SIGNS |= dict.fromkeys(range(0xD800, 0xE000), 0xFFFD)


def _seen(text: str) -> str:
    return text.translate(_SIGNS)
