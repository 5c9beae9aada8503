"""How long new stages will take and how many tokens they come to, before any has run: by records, or by assumptions.

    assumed         by `resources.rates`, for kinds that it names
    same settings   by records of the same kind, settings, weights and data
    same model      by records of the same kind on the same weights (of kinds that load none: same kind)
    unknown         by nothing, and said so

Records count by what was done: seconds per answer of so many tokens, per pair and sequence. What there will be to do is
known from a plan as a limit alone (no prompt is left out, each gives a pair), so where that counts, estimates err
upwards. So do those that go by much smaller runs, whose loading and starting is taken to grow with the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import evals
from evolve.config import DIRECT_TERMS, Rates
from evolve.stages.questions import EMBEDDED
from evolve.store import Corrupt, Source, Stage, Store, canonical, settings

Record = Mapping[str, Any]


class Measured(NamedTuple):
    """A record that an estimate goes by."""

    id: str
    host: str
    started: str


@dataclass(frozen=True)
class Estimate:
    """Of one stage. seconds: None where nothing is known. tokens: generated, trained, read, as far as they are known.

    most: whether the tokens are a limit, rather than expected. grown: how many times the largest of those measured the
    stage is.
    """

    how: str = "unknown"
    seconds: float | None = None
    tokens: Mapping[str, float] = field(default_factory=dict)
    most: bool = True
    measured: tuple[Measured, ...] = ()
    grown: float = 1.0


def estimates(
    stages: Mapping[str, Stage],
    new: Collection[str],
    store: Store,
    newest: Callable[[str], Sequence[Record]],
    questions: Mapping[str, int],
    rates: Rates | None = None,
) -> dict[str, Estimate]:
    """Of the new ones of a plan's stages, by id.

    newest: the records of a kind that count. questions: how many there are, by the id of the stage that makes them,
    where that is known.
    """
    found = _Estimates(stages, new, store, newest, questions, rates)
    return {stage.id: found.of(stage) for stage in stages.values() if stage.id in new}


@dataclass(frozen=True)
class _Sum:
    """What records have taken and done together; most: of one of them."""

    measured: tuple[Measured, ...]
    seconds: float
    work: float
    most: float
    tokens: Mapping[str, float]


class _Estimates:
    def __init__(
        self,
        stages: Mapping[str, Stage],
        new: Collection[str],
        store: Store,
        newest: Callable[[str], Sequence[Record]],
        questions: Mapping[str, int],
        rates: Rates | None,
    ):
        self.stages, self.new, self.store, self.newest = stages, new, store, newest
        self.questions, self.rates = questions, rates
        self._read: dict[str, Record | None] = {}
        self._peers: dict[str, dict[Any, list[Record]]] = {}
        self._none: list[Record] = []
        self._sums: dict[int, _Sum] = {}  # by list of records (its id): thousands of stages share them

    def record(self, key: str) -> Record | None:
        """None where there is none that can be read."""
        if key not in self._read:
            try:
                self._read[key] = self.store.read(key)
            except Corrupt:
                self._read[key] = None
        return self._read[key]

    def peers(self, kind: str) -> dict[Any, list[Record]]:
        """The records of a kind, by what they have in common, and by all that a stage of the same settings has, too."""
        if kind not in self._peers:
            found = self._peers[kind] = {}
            for record in self.newest(kind):
                self._read[record["id"]] = record
                common = self.common(record["id"], record["config"])
                for key in (common, (common, *record["roots"], canonical(record["identity"]["config"]))):
                    found.setdefault(key, []).append(record)
        return self._peers[kind]

    def sum(self, stage: Stage, found: list[Record]) -> _Sum:
        """Of records that stages of this kind are estimated by."""
        if id(found) not in self._sums:
            counted = stage.config.COUNTED
            heavy = [] if stage.config.light else found
            done = [work(stage.kind, record["config"], record["values"][counted])[0] for record in heavy]
            tokens: dict[str, float] = {}
            for record in found:
                for name, count in record["tokens"].items():
                    tokens[name] = tokens.get(name, 0) + count
            self._sums[id(found)] = _Sum(
                tuple(Measured(record["id"], record["host"], record["started"]) for record in found),
                sum(record["seconds"] for record in found),
                sum(done),
                max(done, default=0),
                tokens,
            )
        return self._sums[id(found)]

    def of(self, stage: Stage) -> Estimate:
        config, count = settings(stage.config, defaults=True), self.count(stage)
        amount, tokens = (None, {}) if count is None else work(stage.kind, config, count, self.rates)
        if self.rates and (assumed := self.rates.rates.get(stage.kind)):
            seconds = assumed.seconds
            if assumed.tokens_per_second is not None:
                if not tokens:
                    return Estimate()
                seconds += sum(tokens.values()) / (assumed.tokens_per_second * max(1, stage.config.gpus))
            return Estimate("assumed", seconds, tokens, most=self.rates.answer_tokens is None)
        common, peers = self.common(stage.id, config), self.peers(stage.kind)
        same = peers.get((common, *sorted(stage.roots), canonical(stage.identity["config"])), self._none)
        found = same or peers.get(common, self._none)
        how = "same settings" if same else "same model" if self.weights(stage.id) else "same kind"
        past = self.sum(stage, found)
        if stage.config.light:  # seconds, whatever their size
            return Estimate(how, past.seconds / len(found), measured=past.measured) if found else Estimate()
        if amount is None or not past.work:
            return Estimate(tokens=tokens)
        share = amount / past.work
        expected = {name: share * past.tokens.get(name, 0) for name in tokens}
        return Estimate(how, share * past.seconds, expected, False, past.measured, amount / past.most)

    def count(self, stage: Stage) -> int | None:
        """How many rows, answers, pairs (COUNTED) a stage is for, at most; None where that can't be known yet."""
        config: Any = stage.config
        if stage.id not in self.new and (record := self.record(stage.id)) is not None:
            return int(record["values"][stage.config.COUNTED])
        if stage.kind == "data":
            return int(config.count)
        if stage.kind == "questions":
            if any(isinstance(item, Source) and item.path == "embedded" for item in stage.inputs.values()):
                return int(config.limit or EMBEDDED)
            return self.questions.get(stage.id, config.limit)
        if stage.config.FOLLOWS is None:
            return None
        above = [item for name, item in stage.inputs.items() if name.startswith(stage.config.FOLLOWS)]
        counts = [self.count(item) for item in above if isinstance(item, Stage)]
        if None in counts:
            return None
        found = sum(count for count in counts if count is not None)
        if stage.kind == "respond":
            return found * int(config.strategy.answers)
        if stage.kind == "reinforce":
            return found * int(config.answers)
        if stage.kind in ("pick", "pair", "compare"):
            of: Any = above[0]
            each = 1 if of.kind == "pick" else of.config.strategy.answers
            if stage.kind == "pick":
                return found // int(each)
            if stage.kind == "compare":
                return found // each * len(config.turns) * len(evals.load(config.benchmark).stand_in(0))
            return found // each * (each * (each - 1) // 2 if config.filter.several else 1)
        return found

    def weights(self, key: str) -> str | None:
        """The weights from outside that a stage's model came from; None where it has none, or nobody knows any more."""
        while key and "@" not in key:
            stage, record = self.stages.get(key), None if key in self.stages else self.record(key)
            inputs = stage.identity["inputs"] if stage else record["inputs"] if record else {}
            key = next((inputs[name] for name in ("model", "reward_model", "judge") if name in inputs), "")
        return key or None

    def common(self, key: str, config: Mapping[str, Any]) -> tuple[Any, ...]:
        """What stages have to share for the speed of one to tell another's."""
        judge = config.get("judge") or {}
        engine = judge.get("engine") or config.get("engine") or {}
        scorer = config.get("scorer")
        return (
            key.split("/")[0],
            self.weights(key),
            engine if isinstance(engine, str) else engine["name"] if engine else None,
            scorer if isinstance(scorer, str) else scorer and scorer["scorer"],
            (config.get("endpoint") or {}).get("model"),
        )


def sequences(kind: str, config: Mapping[str, Any]) -> tuple[int, ...]:
    """What runs through the model for one pair, answer or question: how many answers each sequence holds."""
    loss = config.get("loss") or {}
    if kind == "activate":
        return (1,) * (loss["direct"] > 0) + (2,) * (loss["refine"] > 0)
    if kind == "train":
        seen = len(DIRECT_TERMS[loss["direct"]].refines) if loss["direct"] else 0
        refine = {"both": 4, "rejected": 2}.get(loss["refine_contexts"], seen)
        return (1,) * (2 if loss["direct"] else loss["nll"] > 0) + (2,) * refine
    if kind == "reference":
        return (1, 1) if config["contexts"] == "direct" else (2,) * 4
    return (1, 1) if kind == "reward_model" else (1,)


def work(
    kind: str, config: Mapping[str, Any], count: int, lengths: Rates | None = None
) -> tuple[int, dict[str, float]]:
    """(how much there is to do, in units that only compare within a kind; how many tokens that is at most).

    With `lengths`, tokens of prompts and answers as long as those say.
    """
    prompt, answer = (lengths.prompt_tokens, lengths.answer_tokens) if lengths else (None, None)
    longest = (config["scorer"] or {}).get("max_length") if kind == "compare" else config.get("max_length")

    def length(answers: int) -> float:
        known = prompt + answers * answer if prompt and answer else None
        return min(length for length in (known, longest) if length) if known or longest else 0

    judge = config.get("judge")
    if kind == "score" and judge:
        amount = count * judge["samples"] * judge["max_new_tokens"]
        return amount, {"generated": amount}
    if kind in ("respond", "reinforce"):
        tokens: dict[str, float] = {
            "generated": count * min(config["max_new_tokens"], answer or config["max_new_tokens"])
        }
        if kind == "reinforce":
            tokens["trained"] = count * config["loss"]["updates"] * length(1)
        return count * config["max_new_tokens"], tokens
    if kind == "compare" and config["endpoint"]:
        return count, {}
    each, passes = sequences(kind, config), config.get("epochs", 1)
    found = count * passes * sum(map(length, each))
    return count * passes * len(each), {"trained" if "epochs" in config else "read": found} if found else {}
