"""A sweep's folder and the store's records -> members with their measurements.

Reads, but for an evaluation that is not what its record says: that is moved aside, so that the sweep's command makes it
again. Where it can't be (another user's store), it counts as missing all the same.
"""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import evals
from evolve import plan, states
from evolve.config import ROOT
from evolve.store import Corrupt, Store, hash_file


@dataclass(frozen=True)
class Measurement:
    """One benchmark of one model: the phase it stands after, its metrics, and the record they come from."""

    phase: str
    id: str
    metrics: dict[str, Any]
    record: dict[str, Any]

    @property
    def benchmark(self) -> str:
        return str(self.metrics["benchmark"])

    @property
    def titles(self) -> dict[str, str]:
        """What the metrics are called that were measured, the main one first."""
        return evals.titles(self.benchmark, [self.metrics])

    @property
    def judge(self) -> str:
        """Who judged or scored: numbers of different ones never stand in one column."""
        return str(self.metrics.get("judge", ""))

    @property
    def headline(self) -> dict[str, Any]:
        """What is said of the model: {direct, refined, gain, or what the benchmark has: {metric: estimate}}.

        Of a chain of one turn direct answers alone: nothing was refined.
        """
        found = dict(evals.load(self.benchmark).headline(self.metrics))
        alone = len(self.metrics.get("turns", ())) == 1
        return {kind: worth for kind, worth in found.items() if not (alone and kind in ("refined", "gain"))}


def role(judge: str) -> str:
    """A judge in words that hold for all runs: which trained reward model it is depends on a run's seeds."""
    return re.sub(r"trained reward model [0-9a-f]{6}", "trained reward model", judge)


@dataclass(frozen=True)
class MemberResult:
    """A member and what has been measured of it so far; `missing` names the (phase, benchmark) that have not been.

    `generated` has the tokens that were drawn for training up to each phase's end, those for evaluation apart.
    """

    name: str
    config: dict[str, Any]
    steps: list[dict[str, str]]
    measurements: list[Measurement]
    missing: list[tuple[str, str]]
    generated: dict[str, int]

    def phases(self, benchmark: str) -> list[str]:
        """Those after which a benchmark is measured, whether it has been or not."""
        asked = [step for step in self.steps if step["kind"] == "evaluate"]
        return [step["phase"] for step in asked if step.get("benchmark", "refinement") == benchmark]

    def of(self, benchmark: str, judge: str | None = None) -> list[Measurement]:
        """One benchmark's measurements, by phase; those by one judge, where one is named."""
        found = [measurement for measurement in self.measurements if measurement.benchmark == benchmark]
        return [measurement for measurement in found if judge in (None, measurement.judge)]

    def last(self, benchmark: str, judge: str | None = None) -> Measurement | None:
        """What is measured after the last phase that the benchmark is asked after; None as long as it isn't."""
        asked = self.phases(benchmark)[-1:]
        found = [one for one in self.of(benchmark, judge) if [one.phase] == asked]
        return found[0] if found else None


@dataclass(frozen=True, eq=False)  # two are never compared, and so one can be a cache's key
class Sweep:
    folder: Path
    store: Store
    members: list[MemberResult]
    _items: dict[str, Any] = field(default_factory=dict, repr=False)
    command: str | None = None  # that made it, to be given again
    experiment: str | None = None  # of conf/experiment, where it is one
    damaged: set[str] = field(default_factory=set, repr=False)  # stages of which a file couldn't be read

    def record(self, stage_id: str) -> dict[str, Any] | None:
        """A stage's record; None where it has not run."""
        return _record(self.store, stage_id)

    def rows(self, stage_id: str, name: str) -> list[dict[str, Any]] | None:
        """A JSONL file of a stage, read against its record; None where there is none.

        None, too, where it isn't what was written, which is said in a line, of each stage once.
        """
        try:
            record = self.store.read(stage_id)
            if record is None or name not in record["files"]:
                return None
            return [json.loads(line) for line in self.store.content(stage_id, name).splitlines()]
        except (Corrupt, OSError) as error:
            if stage_id not in self.damaged:
                why = error if isinstance(error, Corrupt) else f"{stage_id}: {name} can't be read ({error.strerror})"
                print(f"{why}; left out, and numbers made of it before stand", file=sys.stderr)
            self.damaged.add(stage_id)
            return None

    def items(self, measurement: Measurement) -> dict[str, dict[str, dict[str, float]]]:
        """{kind of answer: {metric: {prompt's id: value}}}, without those that are no finite numbers, which is said."""
        if measurement.id not in self._items:
            path = self.store.folder(measurement.id) / "items.json"
            found = json.loads(path.read_text())
            for kind, metrics in found.items():
                for metric, values in metrics.items():
                    for prompt in [prompt for prompt, value in values.items() if not math.isfinite(value)]:
                        said = f"prompt {prompt}: {metric}, {kind}, is {values.pop(prompt)}"
                        print(f"{measurement.id}: {said}; left out of its tests", file=sys.stderr)
            self._items[measurement.id] = found
        return self._items[measurement.id]

    @property
    def benchmarks(self) -> list[str]:
        """Every benchmark that has been measured."""
        return list(dict.fromkeys(m.benchmark for member in self.members for m in member.measurements))

    def titles(self, benchmark: str) -> dict[str, str]:
        """What the metrics are called that some member has of a benchmark, the main one first."""
        return evals.titles(benchmark, (m.metrics for member in self.members for m in member.of(benchmark)))

    def judges(self, benchmark: str) -> list[str]:
        """Everyone who has judged a benchmark's answers."""
        return list(dict.fromkeys(m.judge for member in self.members for m in member.of(benchmark)))

    def judged(self, benchmark: str, judge: str) -> Sweep:
        """The same sweep, with what one judge (or one `role`) has judged of a benchmark, and no other."""

        def kept(one: Measurement) -> bool:
            return one.benchmark != benchmark or judge in (one.judge, role(one.judge))

        members = [replace(m, measurements=[one for one in m.measurements if kept(one)]) for m in self.members]
        return replace(self, members=members)

    @property
    def phases(self) -> list[str]:
        """Every phase that some member measures, in the method's order."""
        asked = {step["phase"] for member in self.members for step in member.steps if step["kind"] == "evaluate"}
        return sorted(asked, key=plan.place)


def code(ending: str = "*") -> dict[str, str]:
    """What makes tables and figures of records: the hash of each file of sweeps/ and evals/ with that ending."""
    files = [file for folder in ("sweeps", "evals") for file in (ROOT / folder).glob(f"*.{ending}")]
    return {str(file.relative_to(ROOT)): hash_file(file) for file in files}


def load(folder: Path) -> Sweep:
    """Raises ConfigError where no sweep has been started in `folder`."""
    content = states.read(folder)
    store = Store((folder / content["store"]).resolve())
    known: dict[str, Measurement | None] = {}
    members = []
    for member in content["members"]:
        found, missing = [], []
        for step in member["steps"]:
            if step["kind"] != "evaluate":
                continue
            if step["id"] not in known:
                known[step["id"]] = _measurement(store, step)
            if measurement := known[step["id"]]:
                found.append(Measurement(step["phase"], measurement.id, measurement.metrics, measurement.record))
            else:
                missing.append((step["phase"], step.get("benchmark", "refinement")))
        generated = _generated(store, member["steps"])
        members.append(MemberResult(member["name"], member["config"], member["steps"], found, missing, generated))
    return Sweep(folder, store, members, command=content.get("command"), experiment=content.get("experiment"))


def _record(store: Store, stage_id: str) -> dict[str, Any] | None:
    try:
        return store.read(stage_id)
    except Corrupt:
        return None


def _generated(store: Store, steps: list[dict[str, str]]) -> dict[str, int]:
    """By phase, up to the first that lacks a record. Of `respond`, the answers that pairs are made of count."""
    total, found = 0, dict[str, int]()
    for step in steps:
        if step["kind"] == "evaluate":
            found[step["phase"]] = total
        elif step["kind"] in ("pair", "reinforce"):
            record = _record(store, step["id"])
            if record is not None and step["kind"] == "pair":
                record = _record(store, record["inputs"]["answers"])
            if record is None:
                break
            total += record["tokens"]["generated"]
    return found


def _measurement(store: Store, step: dict[str, str]) -> Measurement | None:
    record = _record(store, step["id"])
    if record is None:
        return None
    try:
        store.verify(step["id"])
    except Corrupt as error:  # no stage builds on it, so nobody else would find out
        done = f"moved to {store.root / 'quarantine'}"
        try:
            store.quarantine(step["id"])
        except OSError as refused:
            done = f"left out, for it can't be moved aside ({refused.strerror})"
        print(f"{error}; {done}", file=sys.stderr)
        return None
    metrics = json.loads((store.folder(step["id"]) / "metrics.json").read_text())
    return Measurement(step["phase"], step["id"], metrics, record)
