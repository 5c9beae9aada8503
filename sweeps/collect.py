"""A sweep's folder and the store's records -> members with their measurements. Reads records only."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import evals
from evolve.store import Corrupt, Store


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
        """What the benchmark's metrics are called, the main one first."""
        return dict(evals.load(self.benchmark).METRICS)

    @property
    def judge(self) -> str:
        """Who judged or scored: numbers of different ones never stand in one column."""
        return str(self.metrics.get("judge", ""))

    @property
    def headline(self) -> dict[str, Any]:
        """What is said of the model: {direct, refined, gain, or what the benchmark has: {metric: estimate}}."""
        return dict(evals.load(self.benchmark).headline(self.metrics))


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


@dataclass(frozen=True)
class Sweep:
    folder: Path
    store: Store
    members: list[MemberResult]
    _items: dict[str, Any] = field(default_factory=dict, repr=False)

    def record(self, stage_id: str) -> dict[str, Any] | None:
        """A stage's record; None where it has not run."""
        return _record(self.store, stage_id)

    def items(self, measurement: Measurement) -> dict[str, dict[str, dict[str, float]]]:
        """{kind of answer: {metric: {prompt's id: value}}}."""
        if measurement.id not in self._items:
            path = self.store.folder(measurement.id) / "items.json"
            self._items[measurement.id] = json.loads(path.read_text())
        return self._items[measurement.id]

    @property
    def benchmarks(self) -> list[str]:
        """Every benchmark that has been measured."""
        return list(dict.fromkeys(m.benchmark for member in self.members for m in member.measurements))

    def judges(self, benchmark: str) -> list[str]:
        """Everyone who has judged a benchmark's answers."""
        return list(dict.fromkeys(m.judge for member in self.members for m in member.of(benchmark)))

    @property
    def phases(self) -> list[str]:
        """Every phase that some member measures, in the order of the longest run."""
        longest = max(self.members, key=lambda member: len(member.measurements) + len(member.missing))
        order = [step["phase"] for step in longest.steps if step["kind"] == "evaluate"]
        for member in self.members:
            order += [step["phase"] for step in member.steps if step["kind"] == "evaluate"]
        return list(dict.fromkeys(order))


def load(folder: Path) -> Sweep:
    """Raises FileNotFoundError with a line of its own where no sweep has been started in `folder`."""
    try:
        content = json.loads((folder / "sweep.json").read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{folder}: no sweep.json, so no sweep's folder; outputs/sweeps/ has them") from None
    except ValueError:
        raise FileNotFoundError(f"{folder}: its sweep.json is damaged; the sweep's command writes it again") from None
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
    return Sweep(folder, store, members)


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
    metrics = json.loads((store.folder(step["id"]) / "metrics.json").read_text())
    return Measurement(step["phase"], step["id"], metrics, record)
