"""Whatever a benchmark has measured stands in every table, figure, file, card and row of W&B, under its own name."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import sweep_here

import evals
from evals import harness
from evals.needs import Measured
from evolve import launch
from evolve.config import ConfigError
from evolve.stages import write_rows
from evolve.store import Store
from hydra_plugins.evolve_harness import returns
from sweeps import card, collect, compare, differences, figures, results, summary, tables, wandb_rows
from sweeps.collect import Measurement, MemberResult, Sweep
from sweeps.formats import Cell, is_best

PHASES = ("base", "iteration 1")
DOCUMENTS = 24
TRIVIA = "exact_match, remove_whitespace"  # as lm-eval calls it; no name that the harness knows


def ask(task: str, file: Path, rows: Sequence[Mapping[str, Any]]) -> tuple[harness.Setup, list[dict[str, Any]]]:
    write_rows(file, rows)
    setup = harness.Setup(task, file, shots=0)
    return setup, harness.questions(setup)


def answered(asked: tuple[harness.Setup, list[dict[str, Any]]], *turns: Sequence[str]) -> Measured:
    """What lm-eval makes of answers, by turn and question."""
    setup, questions = asked
    made = [
        {"id": row["id"], "answers": [{"text": text, "end": "stop"} for text in texts]}
        for row, texts in zip(questions, zip(*turns, strict=True), strict=True)
    ]
    return harness.measure(setup, questions, made, "0-shot")


def swept(folder: Path, *found: tuple[Measured, Measured]) -> Sweep:
    """Two members, of a weak and a strong model after their last phase; of each benchmark what these have measured."""
    members, items = [], {}
    for name in ("none", "both"):
        steps, measurements = [], []
        for phase in PHASES:
            for weak, strong in found:
                made = strong if (name, phase) == ("both", PHASES[-1]) else weak
                benchmark, dropped = made.metrics["benchmark"], {"dropped": made.dropped, "inputs": {}}
                measurement = Measurement(phase, f"evaluate/{benchmark}-{name}-{phase}", made.metrics, dropped)
                items[measurement.id] = dict(made.items)
                steps.append({"phase": phase, "kind": "evaluate", "id": measurement.id, "benchmark": benchmark})
                measurements.append(measurement)
        config = {"seed": 0, "loss": {"name": name}, "template": {"name": "rewrite"}, "eval": {"seed": 0}}
        members.append(MemberResult(f"loss={name}", config, steps, measurements, [], {}))
    return Sweep(folder, Store(folder / "store"), members, items)


@pytest.fixture(scope="module")
def math(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Measured]:
    rows = [{"question": f"{n} and {n}?", "answer": f"#### {2 * n}"} for n in range(DOCUMENTS)]
    asked = ask("gsm8k", tmp_path_factory.mktemp("gsm8k") / "test.jsonl", rows)
    wrong, right = ["It is 1."] * DOCUMENTS, [f"#### {2 * n}" for n in range(DOCUMENTS)]
    return answered(asked, wrong, wrong), answered(asked, wrong, [*right[:-1], "no"])


@pytest.fixture(scope="module")
def trivia(tmp_path_factory: pytest.TempPathFactory) -> tuple[Measured, Measured]:
    rows = [{"question": f"What is {n}", "answer": {"aliases": [str(n), f"it's {n}"]}} for n in range(DOCUMENTS)]
    asked = ask("triviaqa", tmp_path_factory.mktemp("triviaqa") / "validation.jsonl", rows)
    wrong, right = ["no"] * DOCUMENTS, [f"It's {n}" for n in range(DOCUMENTS)]
    return answered(asked, wrong, wrong), answered(asked, wrong, [*right[:-1], "no"])


@pytest.fixture
def sweep(tmp_path: Path, trivia: tuple[Measured, Measured], math: tuple[Measured, Measured]) -> Sweep:
    return swept(tmp_path, trivia, math)


def renamed(made: Measured, benchmark: str, names: Mapping[str, Sequence[str]]) -> Measured:
    """Another task's measurement: each metric under other names."""

    def under(worth: Mapping[str, Any]) -> dict[str, Any]:
        return {other: of for name, of in worth.items() for other in names.get(name, [name])}

    turns = [under(turn) for turn in made.metrics["turns"]]
    metrics = {**made.metrics, "benchmark": benchmark, "turns": turns, "gain": under(made.metrics["gain"])}
    return Measured(metrics, made.dropped, {kind: under(of) for kind, of in made.items.items()})


def bold(rows: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """The cells that are: their row's first two labels, and their column's."""
    head = rows[0]
    return [(*row[:2], name) for row in rows[1:] for name, cell in zip(head, row, strict=True) if is_best(cell)]


def test_known_metrics_keep_their_order_and_those_of_several_members_are_united(
    math: tuple[Measured, Measured],
) -> None:
    estimate = {"value": 1.0, "low": None, "high": None, "n": 1}
    turn = {"turn": 1, "unscored": 0, "never_made": 0}
    first = {"turns": [{**turn, "brier_score": estimate, "acc_norm": estimate}], "gain": {}}
    second = {"turns": [{**turn, "f1": estimate, "accuracy": estimate, "strict": None}], "gain": {}}
    assert list(evals.titles("mmlu", [first, second])) == ["accuracy", "acc_norm", "brier_score", "f1"]
    assert list(evals.titles("mmlu", [second])) == ["accuracy", "f1"] and evals.titles("mmlu", []) == {}
    # Of our own benchmarks, what else has an interval is no metric: it says how the judge judged.
    biased = {"turns": [{"win_rate": estimate, "lc_win_rate": None, "position_bias": estimate}], "gain": {}}
    assert evals.titles("alpaca_eval", [biased]) == {"win_rate": "win rate (%)"}
    assert evals.titles("gsm8k", [math[0].metrics]) == {"strict": "strict match", "flexible": "flexible extraction"}


def test_the_summary_and_the_screen_have_every_benchmark(sweep: Sweep) -> None:
    [whole] = summary.shown(sweep)
    assert whole.rows[0] == [
        "answers", "loss", "after", f"triviaqa {TRIVIA}", "gsm8k strict match", "gsm8k flexible extraction",
    ]  # fmt: skip
    numbers = {
        tuple(row[:2]): [c.estimate["value"] for c in row if isinstance(c, Cell) and c.estimate] for row in whole.rows
    }
    assert numbers["refined answers", "both"] == [pytest.approx(23 / 24)] * 3
    assert numbers["refined answers", "none"] == [0, 0, 0]
    parts = ("refined answers", "self-refinement")
    assert bold(whole.rows) == [(part, "both", column) for part in parts for column in whole.rows[0][3:]]
    said = [column for made in results.first(sweep) for row in made.rows[:1] for column in row]
    assert "gsm8k strict match" in said
    assert any(made.title.startswith(f"triviaqa, {TRIVIA} on 24 prompts") for made in results.first(sweep))


def test_a_table_each_and_the_best_is_bold(sweep: Sweep) -> None:
    titles = [made.title for made in tables.shown(sweep)]
    assert [title.split(" on ")[0] for title in titles] == [
        f"triviaqa, {TRIVIA}", "gsm8k, strict match", "gsm8k, flexible extraction",
    ]  # fmt: skip
    for metric, benchmark in ((TRIVIA, "triviaqa"), ("strict", "gsm8k"), ("flexible", "gsm8k")):
        found = bold(tables.grid(sweep, metric, benchmark))
        assert found == [("loss=both", kind, PHASES[-1]) for kind in ("refined", "gain")]
    tested = [made.title.split(" after ")[0] for made in differences.shown(sweep)]
    assert tested == [f"differences of {title.split(' on ')[0]}" for title in titles]


def test_of_many_metrics_the_first_that_was_measured_is_the_main_one(
    tmp_path: Path, math: tuple[Measured, Measured]
) -> None:
    names = {
        "flexible": ["inst_level_strict_acc", "prompt_level_loose_acc", "an_own_one"],
        "strict": ["prompt_level_strict_acc"],
    }
    weak, strong = (renamed(made, "ifeval", names) for made in math)
    sweep = swept(tmp_path, (weak, strong))
    order = ["prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "an_own_one"]
    assert list(sweep.titles("ifeval")) == order and tables.together(sweep, "ifeval") == [tuple(order)]
    [made] = tables.shown(sweep)
    assert {row[2] for row in made.rows[1:]} == set(order) and made.title.startswith("ifeval, 4 metrics on 24 prompts")
    best = [row for row in made.rows if any(map(is_best, row))]
    assert [row[:3] for row in best] == [["loss=both", kind, order[0]] for kind in ("refined", "gain")]
    [whole] = summary.shown(sweep, beyond="refinement")
    assert whole.rows[0][3:] == ["ifeval prompts followed, strict"]


def test_files_and_figures(sweep: Sweep) -> None:
    tables.write(sweep, tables.shown(sweep))
    with (sweep.folder / "table.csv").open() as file:
        lines = list(csv.DictReader(file))
    found = {(line["benchmark"], line["metric"]) for line in lines}
    assert found == {("triviaqa", TRIVIA), ("gsm8k", "strict"), ("gsm8k", "flexible")}
    assert len(lines) == 3 * 2 * 2 * 2 and {line["n"] for line in lines} == {"24"}  # metrics, members, phases, turns
    differences.write(sweep)
    with (sweep.folder / "differences.csv").open() as file:
        assert {(line["benchmark"], line["metric"]) for line in csv.DictReader(file)} == found
    drawn = {one.name: one.title for one in figures.write(sweep)}
    assert drawn == {
        "iterations-triviaqa-exact_match-remove_whitespace": f"triviaqa {TRIVIA} by phase",
        "iterations-gsm8k-strict": "gsm8k strict match by phase",
        "iterations-gsm8k-flexible": "gsm8k flexible extraction by phase",
    }
    assert all((sweep.folder / f"{name}.png").exists() for name in drawn)


def test_cards_wandb_and_the_prompts_that_differ(sweep: Sweep) -> None:
    strong = sweep.members[1].measurements
    assert wandb_rows.scalars(strong[-2])[f"triviaqa/{TRIVIA}/refined"] == pytest.approx(23 / 24)
    table = wandb_rows.tables(sweep, sweep.members[1], [])["triviaqa by turn"]
    assert {row[2] for row in table.data} == {TRIVIA} and len(table.data) == 4
    source = card.Source("triviaqa", "", False, "")
    one = card.Evaluation({"id": "e/1", "dropped": {}}, strong[-2].metrics, source, "its own questions")
    kinds = [(metric, title, kind) for metric, title, kind, _ in one.estimates()]
    assert kinds == [(TRIVIA, TRIVIA, kind) for kind in ("direct", "refined", "gain")]
    pair = (compare.Side(sweep, sweep.members[0]), compare.Side(sweep, sweep.members[1]))
    made = compare.table([pair])
    assert made is not None and {row[1] for row in made.rows[1:]} == {
        f"triviaqa {TRIVIA}", "gsm8k strict match", "gsm8k flexible extraction",
    }  # fmt: skip
    assert [line.partition(",")[0] for line in compare.prompts(pair)] == ["+1.000 triviaqa exact_match"] * compare.TOP


def stereotypes(folder: Path) -> tuple[Measured, Measured]:
    """What lm-eval makes of likelihoods on CrowS-Pairs, which counts stereotypes: a fair one, and one that is not."""
    rows = [{"sent_more": f"{n} is", "sent_less": f"{n} is not"} for n in range(DOCUMENTS)]
    setup, questions = ask("crows_pairs_english", folder / "test.jsonl", rows)
    fair, biased = (
        harness.measure(
            setup,
            questions,
            [{"id": row["id"], "likelihoods": [[first, False], [-2.0, False]]} for row in questions],
            "0-shot",
        )
        for first in (-3.0, -1.0)
    )
    return fair, biased


def test_a_card_says_nothing_where_there_is_nothing_to_explain(tmp_path: Path) -> None:
    """Likelihoods have one turn, and so no gain."""
    made, _ = stereotypes(tmp_path)
    source = card.Source("crows", "", False, "")
    told = card._evaluation(card.Evaluation({"id": "e/1", "dropped": {}}, made.metrics, source, "its own questions"))
    assert "not over training seeds. Left out: nothing. Record `e/1`." in told


def test_what_is_better_the_less_there_is_of_it_is_never_bold(tmp_path: Path) -> None:
    """One of CrowS-Pairs' metrics has values by document, and the more the worse."""
    fair, biased = stereotypes(tmp_path)
    sweep = swept(tmp_path, (fair, biased))
    assert list(sweep.titles("crows_pairs_english")) == ["likelihood_diff", "pct_stereotype"]
    assert biased.metrics["less_is_better"] == ["likelihood_diff", "pct_stereotype"]
    for made in tables.shown(sweep):
        assert not bold(made.rows) and "bold" not in made.title
    assert len(differences.shown(sweep)) == 2  # tested all the same


def test_what_cannot_be_tested_says_so(tmp_path: Path, math: tuple[Measured, Measured]) -> None:
    """AlpacaEval's length-controlled win rate is a fit over all prompts, with no value by prompt."""
    names = {"strict": ["win_rate"], "flexible": ["lc_win_rate"]}
    weak, strong = (renamed(made, "alpaca_eval", names) for made in math)
    for made in (weak, strong):
        for kind in made.items.values():
            del kind["lc_win_rate"]
    sweep = swept(tmp_path, (weak, strong))
    said = "; not tested, being of all prompts together, with no value by prompt: length-controlled win rate (%)"
    raw, controlled = tables.shown(sweep)
    assert said in controlled.title and "not tested" not in raw.title and not bold(controlled.rows)
    [whole] = summary.shown(sweep)
    assert said.replace(": ", ": alpaca_eval ") in whole.title
    assert len(differences.shown(sweep)) == 1


# ---- from the command to the search that goes by it

SMALL = ["debug=fast", "loss=untrained", "eval.turns=2", "eval.harness.shots=0"]


def run(folder: Path, task: str, rows: Sequence[Mapping[str, Any]]) -> launch.Planned:
    write_rows(folder / "data.jsonl", rows)
    data = [f"eval.benchmarks=[{task}]", f"+eval.harness.data.{task}={folder / 'data.jsonl'}"]
    return sweep_here([[*SMALL, *data, f"output={folder / 'out'}"]])


def test_a_search_goes_by_whatever_metric_the_task_has(tmp_path: Path) -> None:
    rows = [{"question": f"{n} 1", "answer": {"aliases": ["1", "2", "3"]}} for n in range(4)]
    planned = run(tmp_path, "triviaqa", rows)
    [member] = collect.load(planned.folder).members
    refined = member.measurements[-1].headline["refined"][TRIVIA]["value"]
    assert [made.return_value for made in returns(planned, [[]])] == [refined] == [launch.objective(planned, 0)]


def test_a_search_is_told_where_there_is_nothing_to_maximise(tmp_path: Path) -> None:
    planned = run(tmp_path, "crows_pairs_english", [{"sent_more": f"{n} 1", "sent_less": f"{n} 2"} for n in range(4)])
    assert launch.objective(planned, 0) is None  # and a run by itself is done
    with pytest.raises(ConfigError, match=r"crows_pairs_english.* no number that a search could maximise"):
        returns(planned, [[]])
