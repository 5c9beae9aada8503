"""A sweep that runs two benchmarks, and every place that shows their numbers."""

from __future__ import annotations

import csv
from typing import Any

import pytest
from conftest import load, sweep_here

from evals import test_time
from evolve import launch
from sweeps import card, collect, tables, wandb_rows

SMALL = ["debug=fast", "loss=sft_only", "data.eval_prompts=8", "data.sft_pairs=16", "eval.turns=3"]
SMALL += ["eval=test_time", "eval.select=verifier", "eval.test_time.answers=4", "eval.stop=unchanged"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> launch.Planned:
    """Four draws against two chains of two turns, run in this process."""
    out = tmp_path_factory.mktemp("benchmarks")
    members = [["strategy@eval.test_time=parallel"], ["strategy@eval.test_time=chain", "eval.test_time.chains=2"]]
    return sweep_here([[*SMALL, *member, f"output={out}"] for member in members])


@pytest.fixture(scope="module")
def sweep(planned: launch.Planned) -> collect.Sweep:
    launch.report(planned)
    return collect.load(planned.folder)


def test_results_go_by_phase_and_benchmark(planned: launch.Planned, sweep: collect.Sweep) -> None:
    for number, member in enumerate(sweep.members):
        assert member.missing == []
        found = [(measurement.phase, measurement.benchmark) for measurement in member.measurements]
        assert found == [(phase, name) for phase in ("base", "sft") for name in ("refinement", "test_time")]
        refined = member.of("refinement")[-1].headline["refined"]["reward"]["value"]
        assert launch.objective(planned, number) == refined  # the first benchmark's
    first, second = sweep.members
    assert first.of("refinement") == second.of("refinement")
    assert first.of("test_time") != second.of("test_time")


def test_a_benchmark_that_is_not_done_is_missing(planned: launch.Planned, sweep: collect.Sweep) -> None:
    stage = planned.graph.members[0].evaluations["sft", "test_time"]
    record = planned.store.folder(stage.id) / "record.json"
    content = record.read_bytes()
    record.unlink()
    try:
        again = collect.load(sweep.folder)
    finally:
        record.write_bytes(content)
    assert again.members[0].missing == [("sft", "test_time")] and again.members[1].missing == []
    assert [row[3] for row in tables.grid(again, "reward", "test_time")[1:]][:3] == ["missing"] * 3
    assert "missing" not in str(tables.grid(again, "reward"))


def test_tables(sweep: collect.Sweep) -> None:
    def answers(rows: list[list[str]]) -> list[str]:
        return [row[1] for row in rows[1:]]

    one = ["direct", "refined", "gain", "turns made", "tokens made"]
    assert answers(tables.grid(sweep, "reward")) == one * 2
    kinds = [["single", "oracle", "majority"], ["single", "latest", "oracle", "majority"]]
    assert answers(tables.grid(sweep, "accuracy", "test_time")) == [*kinds[0], *kinds[1]]
    scaling = tables.scaling(sweep, "reward")
    assert scaling[0] == ["member", "answers used", "1", "2", "3", "4"]
    assert answers(scaling) == [*kinds[0], "tokens", *kinds[1], "tokens"]
    assert [row[2:] for row in scaling if row[1] == "tokens"][1][::2] == ["", ""]  # chains end with whole turns
    titles = [made.title for made in tables.shown(sweep)]
    assert len(titles) == 6
    assert all("held-out prompts, ±: 95 % interval" in title and "prompts unscored" in title for title in titles)
    assert "until the answer stays" in titles[0] and "2 chains of 2 turns" in titles[2] and "pass@n" in titles[2]
    assert [made.title in (sweep.folder / "table.md").read_text() for made in tables.shown(sweep)] == [True] * 6


def test_files(sweep: collect.Sweep) -> None:
    with (sweep.folder / "test_time.csv").open() as file:
        rows = list(csv.DictReader(file))
    measured = [(member, one) for member in sweep.members for one in member.of("test_time")]
    assert len(rows) == 2 * sum(len(s["worth"]) for _, one in measured for s in one.metrics["sizes"])
    for row in rows:
        assert float(row["low"]) <= float(row["value"]) <= float(row["high"])
        assert 0 < float(row["tokens"]) <= 12 * int(row["answers"]) and row["n"] == "8"
        assert row["record"].startswith("evaluate/") and "selected by ledger" in row["protocol"]
    for metric in ("reward", "accuracy"):
        assert (sweep.folder / f"test_time-{metric}.png").read_bytes().startswith(b"\x89PNG")


def test_what_wandb_is_told(sweep: collect.Sweep) -> None:
    found: dict[str, Any] = {}
    for measurement in sweep.members[1].measurements:
        found |= wandb_rows.scalars(measurement)
    kinds = {f"{metric}/{kind}" for metric in test_time.METRICS for kind in ("direct", "refined", "gain")}
    kinds |= {f"test_time/{m}/{kind}" for m in test_time.METRICS for kind in ("single", "latest", "oracle", "majority")}
    assert {key for key in found if not key.endswith(("_low", "_high"))} == kinds
    assert all(f"{key}_{end}" in found for key in kinds for end in ("low", "high"))


def test_a_card_has_both(planned: launch.Planned, sweep: collect.Sweep) -> None:
    (trained,) = {step["id"] for member in sweep.members for step in member.steps if step["kind"] == "activate"}
    text = card.readme(card.load(planned.store, trained), "a-model")
    assert "gain is refined - direct, paired" in text and "oracle is the best by the verifier" in text
    assert text.count("Benchmark test_time: ") == 2 and text.count("Benchmark refinement: ") == 1


def test_the_first_benchmark_is_what_a_search_maximises(planned: launch.Planned, sweep: collect.Sweep) -> None:
    out = f"output={planned.config.output}"
    overrides = [*SMALL, "eval.benchmarks=[test_time]", "strategy@eval.test_time=parallel", out]
    alone = launch.plan_members([load(*overrides)], [overrides])
    assert all(verdict.reused for verdict in alone.verdicts.values())
    wanted = sweep.members[0].of("test_time")[-1].headline["oracle"]["reward"]["value"]
    assert launch.objective(alone, 0) == wanted
