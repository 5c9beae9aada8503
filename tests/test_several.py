"""Several answers to each question of a benchmark: by hand, and from the command to the tables."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import sweep_here

from evals import arena_hard, harness, several
from evolve import launch, verifiers
from evolve.config import Strategy
from evolve.stages import Context, module, read_rows, stage, write_rows
from sweeps import collect, differences, tables, wandb_rows

PROBLEMS = [("Ann has 3 pens and buys 4. How many?", 7), ("2 boxes of 600?", 1200), ("9 less 5?", 4)]


def parallel(answers: int) -> Strategy:
    return Strategy(name="parallel", answers=answers, branching=None, expand=None)


def samples(questions: list[dict[str, Any]], *texts: tuple[str | None, ...]) -> list[dict[str, Any]]:
    """Rows of answers.jsonl; None for an answer that was not made. Each text has as many tokens as words."""
    return [
        {
            "id": row["id"],
            "prompt": row["prompt"],
            "answers": [
                {"text": text or "", "tokens": len((text or "").split()), "end": "too long" if text is None else "stop"}
                for text in given
            ],
        }
        for row, given in zip(questions, texts, strict=True)
    ]


def scores(questions: list[dict[str, Any]], *given: list[float | None]) -> list[dict[str, Any]]:
    return [{"id": row["id"], "scores": found} for row, found in zip(questions, given, strict=True)]


@pytest.fixture
def gsm8k(tmp_path: Path) -> Path:
    write_rows(tmp_path / "test.jsonl", [{"question": text, "answer": f"#### {gold}"} for text, gold in PROBLEMS])
    return tmp_path / "test.jsonl"


def test_each_metric_picks_by_its_own_extraction(gsm8k: Path) -> None:
    """Three problems, four answers each, worked out by hand."""
    setup = harness.Setup("gsm8k", gsm8k, 0)
    rows = harness.questions(setup)
    made = samples(
        rows,
        ("#### 3", "#### 7", "So 7.", "#### 7"),
        ("1,200", None, "no idea", "none"),  # what was not made and what can't be read have no vote
        ("#### 5", "#### 5", "#### 4", "#### 4"),  # the earlier of equals
    )
    likes = scores(rows, [1, 2, 3, 0], [None, None, 0.5, 0.1], [0, 0, 0, 1])
    measured = several.measure(setup, rows, made, parallel(4), select=likes, majority=True)
    sizes = measured.metrics["sizes"]
    assert [(size["answers"], size["tokens"]["value"]) for size in sizes] == [
        (1, pytest.approx(5 / 3)),
        (2, 3),
        (3, 5),
        (4, pytest.approx(20 / 3)),
    ]

    def values(size: int, metric: str) -> dict[str, float]:
        return {kind: worth[metric]["value"] for kind, worth in sizes[size - 1]["worth"].items()}

    third = pytest.approx(1 / 3)
    assert values(4, "strict") == {"single": third, "best": third, "majority": third, "oracle": pytest.approx(2 / 3)}
    two = pytest.approx(2 / 3)
    assert values(4, "flexible") == {"single": 0.5, "best": two, "majority": two, "oracle": 1}
    assert set(values(1, "strict").values()) == {0} and set(values(1, "flexible").values()) == {1 / 3}
    ids = [row["id"] for row in rows]
    assert measured.items["single"]["flexible"] == dict(zip(ids, [0.75, 0.25, 0.5], strict=True))
    assert measured.items["best"]["strict"] == dict(zip(ids, [0, 0, 1], strict=True))
    assert measured.items["majority"]["strict"] == dict(zip(ids, [1, 0, 0], strict=True))
    assert measured.items["majority"]["flexible"] == dict(zip(ids, [1, 1, 0], strict=True))
    for metric in ("strict", "flexible"):
        oracle = [values(size, metric)["oracle"] for size in (1, 2, 3, 4)]
        assert oracle == sorted(oracle)
    assert measured.dropped == {harness.NEVER_MADE: 1, harness.FAILED: 0}
    # Nobody scores, nobody votes: what is left is one answer, and any.
    bare = several.measure(setup, rows, made, parallel(4)).metrics["sizes"][-1]["worth"]
    assert bare == {kind: sizes[-1]["worth"][kind] for kind in ("single", "oracle")}


def test_mathematics_votes_by_value(tmp_path: Path) -> None:
    write_rows(tmp_path / "any.jsonl", [{"problem": "Halve 1.", "answer": "\\frac{1}{2}"}])
    setup = harness.Setup("math500", tmp_path / "any.jsonl")
    rows = harness.questions(setup)
    made = samples(rows, ("\\boxed{1}", "it is \\boxed{0.5}", "\\boxed{\\frac{2}{4}}", "none"))
    assert harness.extractions("math500") == {} and harness.verifier("math500") == "math"
    extract = verifiers.load("math").extract
    found = several.measure(setup, rows, made, parallel(4), majority=True, extract=extract).items
    assert found["majority"]["accuracy"] == {"math500/0": 1}
    assert found["single"]["accuracy"] == {"math500/0": 0.5}
    unread = several.measure(setup, rows, made, parallel(4), majority=True).items
    assert "majority" not in unread  # its filter leaves the whole answer, which is no vote


@pytest.mark.slow
def test_instructions_are_picked_and_then_pooled(tmp_path: Path) -> None:
    """IFEval: what the best are worth is what lm-eval says of them as a turn by themselves."""
    kinds = [["punctuation:no_comma"], ["punctuation:no_comma", "change_case:english_lowercase"]]
    rows = [
        {"key": key, "prompt": f"Say hello {key}.", "instruction_id_list": found, "kwargs": [{}] * len(found)}
        for key, found in enumerate(kinds)
    ]
    write_rows(tmp_path / "ifeval.jsonl", rows)
    setup = harness.Setup("ifeval", tmp_path / "ifeval.jsonl")
    asked = harness.questions(setup)
    words = "it was good to see you all and i hope that you will come back next year."
    made = samples(asked, ("Oh, no.", "Hello."), (words.upper(), f"oh, {words}"))
    measured = several.measure(setup, asked, made, parallel(2), select=scores(asked, [0, 1], [0, 1]))
    second = [{**row, "answers": row["answers"][1:]} for row in made]
    alone = harness.measure(setup, asked, second, "")
    assert measured.items["best"] == alone.items["direct"]
    worth = measured.metrics["sizes"][-1]["worth"]
    for metric, estimate in worth["best"].items():
        assert estimate == alone.metrics["turns"][0][metric]
    assert worth["best"]["inst_level_strict_acc"]["value"] == pytest.approx(2 / 3)
    assert worth["single"]["inst_level_strict_acc"]["value"] == pytest.approx((1 / 3 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("task", "invalid"), [("gsm8k", "[invalid]"), ("triviaqa", ""), ("ifeval", None), ("mbpp", None)]
)
def test_what_extracts(task: str, invalid: str | None) -> None:
    found = harness.extractions(task)
    assert bool(found) == (invalid is not None)
    assert all(invalid in nothing for nothing in found.values())
    assert harness.verifier(task) is None


def test_the_best_stands_alone(tmp_path: Path) -> None:
    """The stage `pick`: the earlier of equals; an answer without a score is never taken before one that has some."""
    found = [([None, 0.5, 1.0, 1.0], 2), ([None, -1.0], 1), ([None, None], 0)]
    answers = [
        {
            "id": str(n),
            "prompt": "p",
            "gold": "g",
            "answers": [{"text": f"{n} {k}", "tokens": k} for k in range(len(s))],
        }
        for n, (s, _) in enumerate(found)
    ]
    write_rows(tmp_path / "answers.jsonl", answers)
    write_rows(tmp_path / "scores.jsonl", [{"id": str(n), "scores": s} for n, (s, _) in enumerate(found)])
    (tmp_path / "out").mkdir()
    inputs, context = {"answers": tmp_path, "scores": tmp_path}, Context("cpu", lambda *_: None, tmp_path / "partial")
    report = module("pick").run(stage("pick", {}).config, inputs, tmp_path / "out", context)
    picked = read_rows(tmp_path / "out" / "answers.jsonl")
    assert [(row["place"], row["of"]) for row in picked] == [(place, len(s)) for s, place in found]
    assert [row["answers"] for row in picked] == [
        [row["answers"][place]] for row, (_, place) in zip(answers, found, strict=True)
    ]
    assert [row["tokens"] for row in picked] == [6, 1, 1] and {row["gold"] for row in picked} == {"g"}
    assert list(report.dropped.values()) == [1]


# ---- from the command to the tables

SMALL = ["debug=fast", "loss=none", "loss.pt=none", "loss.sft_direct=0", "data.reward_model_pairs=16", "eval.turns=2"]
SMALL += ["strategy@eval.test_time=parallel", "eval.test_time.answers=3"]


def judged(out: Path, *more: str) -> collect.Sweep:
    benchmarks = ["eval.benchmarks=[alpaca_eval,arena_hard]", "eval.alpaca_eval.limit=12", "eval.arena_hard.limit=6"]
    picks = ["eval.alpaca_eval.pick=[best]", "eval.arena_hard.pick=[best]", "annotator.scorer=verifier"]
    made = sweep_here([[*SMALL, *benchmarks, *picks, *more, f"output={out}"]])
    launch.report(made)
    return collect.load(made.folder)


def test_a_judges_benchmark_has_the_best_as_one_more_answer(tmp_path: Path) -> None:
    """Arena-Hard, both games of two questions: the first answers lose all, the best win one question and lose one."""
    labels = {"won": ["B>A", "A>B"], "lost": ["A>B", "B>A"]}
    questions = [{"id": key, "prompt": key, "reference": "r", "uid": key} for key in ("a", "b")]
    rows = samples(questions, ("one",), ("two words",))
    best = [{**row, "of": 8, "tokens": 9} for row in rows]
    first, picked = (
        [{"id": key, "verdicts": {"1": labels[game]}} for key, game in zip("ab", games, strict=True)]
        for games in (("lost", "lost"), ("won", "lost"))
    )
    more = {"best_answers": best, "best_verdicts": picked}
    plain = arena_hard.measure(questions, rows, first, "")
    found = arena_hard.measure(questions, rows, first, "", **more)
    assert plain.metrics == {key: value for key, value in found.metrics.items() if key != "sizes"}
    [size] = found.metrics["sizes"]
    assert (size["answers"], size["tokens"]["value"], size["worth"]["best"]["score"]["value"]) == (8, 9, 50)
    assert found.items == {**plain.items, "best": {"score": {"a": 100, "b": 0}}}
    assert arena_hard.summary(found.metrics).startswith("Arena-Hard v0.1 direct 0.0, refined 0.0, best 50.0")
    assert found.records is not None
    found.records(tmp_path)
    files = (tmp_path / "judgments_turn_1.jsonl", tmp_path / "best" / "judgments_turn_1.jsonl")
    assert [[game["score"] for game in read_rows(file)[0]["games"]] for file in files] == [
        labels["lost"],
        labels["won"],
    ]


@pytest.mark.slow
def test_the_best_is_judged_beside_direct_and_refined_answers(tmp_path: Path) -> None:
    sweep = judged(tmp_path)
    [member] = sweep.members
    for measurement, metric in zip(member.measurements, ("win_rate", "score"), strict=True):
        assert list(measurement.headline) == ["direct", "refined", "gain", "best"]
        assert (
            "picked from 3 answers (parallel) at temperature 0.7, best selected by trained reward model "
            in (measurement.metrics["protocol"])
        )
        items = sweep.items(measurement)
        best = measurement.headline["best"][metric]
        assert items["best"][metric].keys() == items["direct"][metric].keys()
        assert best["value"] == pytest.approx(fmean(items["best"][metric].values()))
        assert best["n"] == len(items["best"][metric])
        grid = tables.grid(sweep, metric, measurement.benchmark)
        assert [row[1] for row in grid[1:]] == ["direct", "refined", "gain", "best"]
        [row] = [
            row
            for row in differences.rows(sweep, measurement.benchmark, measurement.judge, metric)
            if row.question == "best of 3"
        ]
        gap = [items["best"][metric][key] - items["direct"][metric][key] for key in items["best"][metric]]
        assert row.difference.value == pytest.approx(fmean(gap))
        assert wandb_rows.scalars(measurement)[f"{measurement.benchmark}/{metric}/best"] == best["value"]
        assert list((sweep.store.folder(measurement.id) / "best").iterdir())
    # Of one answer the best is that one: the direct answer, where its temperature is the same.
    sweep = judged(tmp_path, "eval.test_time.answers=1", "eval.arena_hard.temperature=0.7")
    for measurement, metric in zip(sweep.members[0].measurements, ("win_rate", "score"), strict=True):
        items = sweep.items(measurement)
        assert items["best"][metric] == items["direct"][metric]


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 2])
def test_a_task_of_lm_eval_with_several_answers(tmp_path: Path, gsm8k: Path, turns: int) -> None:
    task = ["eval.benchmarks=[gsm8k]", f"eval.harness.data.gsm8k={gsm8k}", "eval.harness.shots=0"]
    more = ["eval.harness.pick=[best,majority]", f"eval.turns={turns}", f"output={tmp_path / 'out'}"]
    planned = sweep_here([[*SMALL, *task, *more]])
    launch.report(planned)
    sweep = collect.load(planned.folder)
    [measurement] = sweep.members[0].measurements
    turn = ["direct", "refined", "gain"] if turns > 1 else ["direct"]
    picked = ["single", "best", "majority", "oracle"]
    assert list(measurement.headline) == [*turn, *picked]
    assert "picked from 3 answers (parallel) at temperature 0.7" in measurement.metrics["protocol"]
    for metric in ("strict", "flexible"):
        assert [row[1] for row in tables.grid(sweep, metric, "gsm8k")[1:]] == [*turn, *picked]
        scaling = tables.scaling(sweep, metric, "gsm8k")
        assert scaling[0] == ["member", "answers used", "1", "2", "3"]
        assert [row[1] for row in scaling[1:]] == [*picked, "tokens"]
        asked = {row.question for row in differences.rows(sweep, "gsm8k", measurement.judge, metric)}
        assert asked - {"self-refinement"} == {"best of 3", "majority of 3", "oracle of 3"}
        assert (sweep.folder / f"test_time-gsm8k-{metric}.png").exists()
    titles = [made.title for made in tables.shown(sweep)]
    assert len(titles) == 4 and all("oracle: the best of all by the metric: pass@n" in title for title in titles)
    with (sweep.folder / "test_time.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {(line["benchmark"], line["kind"]) for line in lines} == {("gsm8k", kind) for kind in picked}
    text = json.loads((sweep.store.folder(measurement.id) / "items.json").read_text())
    assert text["single"]["flexible"].keys() == text["direct"]["flexible"].keys()
