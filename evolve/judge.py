"""A language model as scorer: it grades each answer, or compares a prompt's answers with one another.

Graded: an answer's score is the mean of the grades that the judge gives it in `samples` draws [as Self-Rewarding LMs
(2401.10020) do, whose prompt adds up five points; the texts here are our own]. Pairwise: two answers to a prompt are
shown in both orders, and an answer's score is the share of its games that it wins, a tie being half a win.

A verdict that can't be read is left out and counted; an answer of which none can be read has no score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from statistics import fmean

from evolve import strategies, templates
from evolve.config import Judge as Settings
from evolve.engines import Completion, Engine, Request
from evolve.scorers import TOKENS, Item, Score

# A line that says so, marked up or not: "**Score (0-5):** 4/5", "Verdict: [[A]]". What only speaks of a score is none.
GRADE = re.compile(r"^\W*score\s*(?:\([^)\n]*\))?\W*:\W*?(-?\d+(?:\.\d+)?)\b", re.IGNORECASE | re.MULTILINE)
VERDICT = re.compile(r"^\W*verdict\W*:\W*(a|b|tie)\W*$", re.IGNORECASE | re.MULTILINE)
UNREAD = {"stop": "verdicts unread", "length": "verdicts cut off", "too long": "not asked: too long for the judge"}
WINS = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of the answer shown first


def grade(text: str, highest: float) -> float | None:
    """The last grade in the judge's text; None if there is none between 0 and `highest`."""
    found = [float(match[1]) for match in GRADE.finditer(text)]
    return found[-1] if found and 0 <= found[-1] <= highest else None


def verdict(text: str) -> float | None:
    """The share of the win that goes to the answer shown first, by the last verdict in the judge's text."""
    found = [match[1].lower() for match in VERDICT.finditer(text)]
    return WINS[found[-1]] if found else None


@dataclass(frozen=True)
class _Call:
    """One question to the judge: on one answer, or on two, the first of them shown first."""

    shown: tuple[int, ...]
    messages: templates.Messages
    seed: int


class Judge:
    def __init__(self, settings: Settings, engine: Engine, seed: int):
        self.settings, self.engine, self.seed = settings, engine, seed

    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[int, Score]]:
        """Pairwise, items in a row that have the same prompt are compared with one another."""
        calls = list(self._graded(items) if self.settings.mode == "graded" else self._pairwise(items))
        self.engine.submit([Request((number, 0), call.messages, call.seed) for number, call in enumerate(calls)])
        left = Counter(index for call in calls for index in call.shown)
        points: list[list[float]] = [[] for _ in items]
        counts: list[Counter[str]] = [Counter() for _ in items]
        yield from ((index, Score(None)) for index in range(len(items)) if not left[index])  # it has no rival
        while completions := self.engine.poll():
            for completion in completions:
                call = calls[completion.key[0]]
                self._count(call, completion, points, counts[call.shown[0]])
                for index in call.shown:
                    left[index] -= 1
                    if not left[index]:
                        yield index, Score(fmean(points[index]) if points[index] else None, counts=counts[index])

    def _count(self, call: _Call, completion: Completion, points: list[list[float]], counts: Counter[str]) -> None:
        counts[TOKENS] += completion.tokens
        counts["verdicts"] += 1
        graded = self.settings.mode == "graded"
        point = grade(completion.text, self.settings.highest or 0) if graded else verdict(completion.text)
        if point is None or completion.end != "stop":
            counts[UNREAD[completion.end]] += 1
            return
        points[call.shown[0]].append(point)
        if self.settings.mode == "pairwise":
            points[call.shown[1]].append(1 - point)
            counts["ties" if point == 0.5 else f"wins of the answer shown {'first' if point else 'second'}"] += 1

    def close(self) -> None:
        self.engine.close()

    def _graded(self, items: Sequence[Item]) -> Iterator[_Call]:
        for number, item in enumerate(items):
            text = templates.fill(self.settings.prompt.text, prompt=item.prompt, response=item.answer)
            for sample in range(self.settings.samples):
                yield _Call((number,), templates.direct(text), strategies.seed(self.seed, text, sample))

    def _pairwise(self, items: Sequence[Item]) -> Iterator[_Call]:
        for _, group in groupby(range(len(items)), key=lambda number: items[number].prompt):
            for one, other in combinations(group, 2):
                for shown in ((one, other), (other, one)):
                    first, second = (items[number].answer for number in shown)
                    text = templates.fill(
                        self.settings.prompt.text, prompt=items[one].prompt, first=first, second=second
                    )
                    for sample in range(self.settings.samples):
                        yield _Call(shown, templates.direct(text), strategies.seed(self.seed, text, sample))
