"""Benchmarks that judges decide, from the command to the tables: stand-ins, a server, a broken server, wrong files."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from conftest import load, sweep_here
from test_judges import SECRET, Fake

from evals import alpaca_annotations, arena_hard
from evals.needs import Measured
from evolve import launch, plan, sources
from evolve.config import ConfigError
from evolve.stages import Context, module, stage, write_rows
from sweeps import card, collect, differences, pooled, tables

SMALL = ["debug=fast", "loss=sft_only", "data.eval_prompts=8", "data.sft_pairs=16", "eval.turns=3"]
JUDGED = ["eval.benchmarks=[alpaca_eval,arena_hard]", "eval.alpaca_eval.limit=12", "eval.arena_hard.limit=6"]
JUDGED += ["eval.arena_hard.temperature=0.7"]
KEY = "EVOLVE_TEST_KEY"


def run(out: Path, *members: list[str]) -> launch.Planned:
    return sweep_here([[*SMALL, *JUDGED, *member, f"output={out}"] for member in members])


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> launch.Planned:
    """Judged by the verifier in one member, by a reward model in the other."""
    members = [["annotator.scorer=verifier"], ["annotator.scorer=reward_model", "eval.judged=all"]]
    return run(tmp_path_factory.mktemp("judged"), *members)


@pytest.fixture(scope="module")
def sweep(planned: launch.Planned) -> collect.Sweep:
    launch.report(planned)
    return collect.load(planned.folder)


def test_which_turns_are_judged(sweep: collect.Sweep) -> None:
    for member, turns in zip(sweep.members, ([1, 3], [1, 2, 3]), strict=True):
        for measurement in member.measurements:
            assert [turn["turn"] for turn in measurement.metrics["turns"]] == turns


def test_two_judges_never_share_a_table(sweep: collect.Sweep) -> None:
    ledger, trained = sweep.judges("alpaca_eval")
    assert ledger == "a stand-in, ledger" and re.fullmatch("a stand-in, trained reward model [0-9a-f]{6}", trained)
    for made in tables.shown(sweep):
        assert ("judged by a stand-in, ledger" in made.title) != ("judged by a stand-in, trained reward" in made.title)
        assert len({row[0] for row in made.rows[1:]}) == 1


def test_others_can_score_what_was_judged(sweep: collect.Sweep, capsys: pytest.CaptureFixture[str]) -> None:
    for measurement in [one for member in sweep.members for one in member.measurements]:
        folder = sweep.store.folder(measurement.id)
        for turn in measurement.metrics["turns"]:
            if measurement.benchmark == "alpaca_eval":
                file = folder / f"annotations_turn_{turn['turn']}.json"
                alpaca_annotations.main(["--annotations", str(file), "--no-length-control"])
                again = json.loads(capsys.readouterr().out)
                assert again["win_rate"] == pytest.approx(turn["win_rate"])
            else:
                file = folder / f"judgments_turn_{turn['turn']}.jsonl"
                arena_hard.main(["--judgments", str(file)])
                [again] = json.loads(capsys.readouterr().out)["models"]
                assert again["score"] == pytest.approx(turn["score"])


def test_refinement_and_improvement_are_told_apart(sweep: collect.Sweep) -> None:
    member = sweep.members[0]
    base, last = member.of("alpaca_eval")
    found = {row.question: row.difference for row in differences.rows(sweep, "alpaca_eval", base.judge, "win_rate")}
    assert set(found) == {"self-refinement", "self-improvement"}
    assert found["self-refinement"].value == pytest.approx(last.metrics["gain"]["win_rate"]["value"])
    before, after = (sweep.items(one)["direct"]["win_rate"] for one in (base, last))
    assert found["self-improvement"].value == pytest.approx(fmean(after[key] - before[key] for key in before))
    assert all(one.p_corrected >= one.p for one in found.values())


def test_members_are_compared_with_the_first(tmp_path: Path) -> None:
    made = run(tmp_path, ["seed=0"], ["seed=0", "trainer.epochs.sft=3"])
    sweep = collect.load(made.folder)
    rows = differences.rows(sweep, "alpaca_eval", "a stand-in, ledger", "win_rate")
    [against] = [row for row in rows if row.question.startswith("against ")]
    first, second = (member.of("alpaca_eval")[-1] for member in sweep.members)
    assert against.member == sweep.members[1].name and against.records == (second.id, first.id)
    with (differences.write(sweep)[0]).open() as file:
        lines = list(csv.DictReader(file))
    assert {line["benchmark"] for line in lines} == {"alpaca_eval", "arena_hard"}
    assert {line["phase"] for line in lines if line["question"] == "self-refinement"} == {"base", "sft"}


def test_templates_and_seeds_are_pooled_by_prompt(tmp_path: Path) -> None:
    seeds = [["eval.benchmarks=[refinement]", f"eval.seed={seed}"] for seed in (0, 1)]
    made = run(tmp_path, *seeds, ["eval.benchmarks=[refinement]", "seed=5"])
    sweep = collect.load(made.folder)
    reward, accuracy = pooled.shown(sweep)
    name = "embedded, 2 seeds"
    assert [row[:2] for row in reward.rows[1:]] == [[name, "base"], [name, "sft"]]
    first, second = (sweep.items(member.of("refinement")[0]) for member in sweep.members[:2])
    values = [
        fmean([first["turn 2"]["reward"][prompt], second["turn 2"]["reward"][prompt]])
        for prompt in first["turn 2"]["reward"]
    ]
    assert reward.rows[0] == ["members", "phase", "gain", "turn 1", "turn 2", "turn 3"]
    assert reward.rows[1][4].startswith(f"{fmean(values):.3f} ") and len(reward.rows[1]) == len(accuracy.rows[1]) == 6
    last, direct = (
        fmean(value for items in (first, second) for value in items[turn]["reward"].values())
        for turn in ("turn 3", "turn 1")
    )
    assert reward.rows[1][2].startswith(f"{last - direct:.3f} ")
    # As if nothing had been trained, and one asked with another template: that of the other two has a row, too.
    one, two, third = (
        replace(member, steps=[step for step in member.steps if step["kind"] != "activate"]) for member in sweep.members
    )
    third = replace(third, config={**one.config, "template": {**one.config["template"], "name": "another"}})
    table, _ = pooled.shown(replace(sweep, members=[one, two, third]))
    assert [row[0] for row in table.rows[1::2]] == ["embedded, 2 templates x 2 seeds", name]


def test_models_that_were_trained_by_other_templates_are_not_pooled(sweep: collect.Sweep) -> None:
    """Their templates are part of what they are; those of one base model, which was asked in several ways, are not."""
    one = sweep.members[0]
    other = replace(one, config={**one.config, "template": {**one.config["template"], "name": "another"}})
    again = replace(one, config={**one.config, "eval": {**one.config["eval"], "seed": 1}})
    untrained = [
        replace(member, steps=[step for step in member.steps if step["kind"] != "activate"])
        for member in (one, other, again)
    ]
    trained = replace(sweep, members=[one, other, again])
    assert [len(group) for group in pooled.groups(trained)] == [2, 1]
    assert [len(group) for group in pooled.groups(replace(sweep, members=untrained))] == [3]


def test_a_score_that_is_no_number_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever finds it, the statistics or the last look before items are written."""
    rows = [{"id": str(n), "answers": [{"text": "1", "tokens": 1, "end": "stop"}] * 2} for n in range(3)]
    scores = [{"id": row["id"], "scores": [1.0, 0.5], "correct": [True, False]} for row in rows]
    scores[1]["scores"] = [1.0, math.nan]
    write_rows(tmp_path / "answers.jsonl", rows)
    write_rows(tmp_path / "scores.jsonl", scores)
    config = module("evaluate").Config(benchmark="refinement", protocol="a chain")
    context = Context("cpu", lambda done, total: None, tmp_path / "partial")
    given = {"answers": tmp_path, "scores": tmp_path}
    with pytest.raises(ValueError, match=r"^refinement: prompt 1: nan is no finite number"):
        module("evaluate").run(config, given, tmp_path, context)
    items = {"direct": {"reward": {"0": 1.0, "1": math.inf}}}
    monkeypatch.setattr("evals.refinement.measure", lambda **given: Measured({}, {}, items))
    with pytest.raises(ValueError, match=r"^refinement: prompt 1: reward, direct, is inf$"):
        module("evaluate").run(config, given, tmp_path, context)
    assert not (tmp_path / "items.json").exists()


def test_items_of_old_records_that_are_no_numbers_are_left_out(
    sweep: collect.Sweep, capsys: pytest.CaptureFixture[str]
) -> None:
    one = sweep.members[0].of("alpaca_eval")[0]
    fresh = replace(sweep, _items={})
    prompt, *others = fresh.items(one)["direct"]["win_rate"]
    file = sweep.store.folder(one.id) / "items.json"
    whole = file.read_text()
    broken = json.loads(whole)
    broken["direct"]["win_rate"][prompt] = math.nan
    file.write_text(json.dumps(broken))
    fresh = replace(sweep, _items={})
    assert list(fresh.items(one)["direct"]["win_rate"]) == others and differences.shown(fresh)
    file.write_text(whole)
    said = capsys.readouterr().err
    assert said == f"{one.id}: prompt {prompt}: win_rate, direct, is nan; left out of its tests\n"


def test_a_missing_end_is_not_taken_for_another(sweep: collect.Sweep) -> None:
    """Without the base nothing has improved on it; without a last phase nothing is said of what stands there."""
    first, judge = sweep.members[0], sweep.judges("alpaca_eval")[0]
    second = replace(first, name="second", measurements=[replace(one, id=f"{one.id}'") for one in first.measurements])
    for one, copied in zip(first.measurements, second.measurements, strict=True):
        sweep._items[copied.id] = sweep.items(one)

    def asked(*members: collect.MemberResult) -> list[str]:
        made = replace(sweep, members=list(members))
        return sorted(row.question for row in differences.rows(made, "alpaca_eval", judge, "win_rate"))

    def without(member: collect.MemberResult, phase: str) -> collect.MemberResult:
        return replace(member, measurements=[one for one in member.measurements if one.phase != phase])

    refinement, improvement = "self-refinement", "self-improvement"
    each = [improvement, refinement]
    assert asked(first, second) == sorted([*each, *each, f"against {first.name}"])
    assert asked(without(first, "base")) == [refinement]
    assert asked(without(first, "sft"), second) == each
    assert asked(first, without(second, "sft")) == each


def test_a_card_has_every_benchmark(sweep: collect.Sweep) -> None:
    """And of who judged no folder of this machine."""
    [trained] = {step["id"] for member in sweep.members for step in member.steps if step["kind"] == "activate"}
    model = card.load(sweep.store, trained)
    text = card.readme(model, "a-model")
    assert text.count("Benchmark alpaca_eval: ") == text.count("Benchmark arena_hard: ") == 2
    assert "prompts of embedded `embedded-1`, its own questions" in text
    judges = {re.sub(" [0-9a-f]{6}(?=,|$)", "", one.metrics["judge"]) for one in model.evaluations}
    assert judges == {f"a stand-in, {who}{of}" for who in ("ledger", "trained reward model") for of in ("", ", v0.1")}


def test_overlap_is_counted_and_shown(sweep: collect.Sweep, tmp_path: Path) -> None:
    assert tables.overlaps(sweep)[0].startswith("overlap ")
    assert all(": 0 of " in line for line in tables.overlaps(sweep))  # the world's parts are disjoint
    for name, prompts in (("evaluation", ["One two", "unlike", "three"]), ("training", ["one  TWO", "nothing"])):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "rows.jsonl", [{"id": text, "prompt": text} for text in prompts])
    context = Context("cpu", lambda done, total: None, tmp_path / "partial")
    inputs = {"evaluation": tmp_path / "evaluation", "training_0": tmp_path / "training"}
    report = module("overlap").run(stage("overlap", {}, words=13).config, inputs, tmp_path, context)
    assert report.values == {"evaluation": 3, "training": 2, "exact": 1, "ngram": 1}


def test_another_benchmark_leaves_the_overlap_of_the_first() -> None:
    def overlaps(benchmarks: str) -> set[str]:
        config = load(*SMALL, *JUDGED, f"eval.benchmarks=[{benchmarks}]")
        steps = plan.build("member", config, sources.Resolver(None)).steps
        return {step.stage.id for step in steps if step.stage.kind == "overlap"}

    assert overlaps("alpaca_eval") < overlaps("alpaca_eval,arena_hard")


# ---- a judge behind a server


def decides(body: dict[str, Any]) -> dict[str, Any]:
    """Verdicts of both benchmarks, by a hash of what is asked."""
    share = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[0] / 256
    if not body.get("logprobs"):
        label = ("A>>B", "A>B", "A=B", "B>A", "B>>A")[int(share * 5)]
        return {"message": {"role": "assistant", "content": f"I compare.\n[[{label}]]"}}
    logs = [{"token": token, "logprob": -0.1 - gap} for token, gap in (("m", share), ("M", 1 - share), ("x", 5))]
    content = [{"token": "m", "logprob": -0.1, "top_logprobs": logs}]
    return {"message": {"role": "assistant", "content": "m"}, "logprobs": {"content": content}}


def breaks(body: dict[str, Any], number: int) -> Any:
    """Something else goes wrong with each request, and at the third try nothing does."""
    kind = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[1] % 6
    if number > 2:
        return decides(body)
    return [
        (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
        (500, "oops"),
        "cut",
        "closed",
        (200, ""),
    ][kind % 5]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Fake]:
    monkeypatch.setenv(KEY, SECRET)
    with Fake() as fake:
        fake.trouble = lambda body, number: decides(body)
        threading.Thread(target=fake.serve_forever, args=(0.05,), daemon=True).start()
        yield fake
        fake.shutdown()


def annotator(server: Fake, **more: Any) -> list[str]:
    given = {"url": server.url, "model": "judge", "key": KEY, "price.input": 1000, "price.output": 4000, **more}
    return ["annotator=server", *(f"annotator.{key}={value}" for key, value in given.items())]


def numbers(planned: launch.Planned) -> list[Any]:
    member = collect.load(planned.folder).members[0]
    return [(one.phase, one.benchmark, one.metrics["turns"], one.metrics["gain"]) for one in member.measurements]


def test_a_broken_server_gives_the_same_numbers_and_each_reply_is_paid_once(server: Fake, tmp_path: Path) -> None:
    healthy = run(tmp_path / "healthy", annotator(server))
    asked = set(server.whole)
    assert set(server.whole.values()) == {1}
    server.whole.clear(), server.asked.clear()
    server.trouble = breaks
    broken = run(tmp_path / "broken", annotator(server, retries=5))
    assert numbers(broken) == numbers(healthy)
    assert set(server.whole) == asked and set(server.whole.values()) == {1}
    text = (broken.folder / "sweep.json").read_text()
    assert "judged by judge" in str(
        [one.metrics["protocol"] for one in collect.load(broken.folder).members[0].of("arena_hard")]
    )
    assert KEY in text
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()


def test_a_server_that_stays_down_loses_nothing(server: Fake, tmp_path: Path) -> None:
    healthy = numbers(run(tmp_path / "healthy", annotator(server)))
    server.whole.clear()
    server.trouble = lambda body, number: decides(body) if body.get("logprobs") else (500, "down")
    with pytest.raises(launch.Failed, match="2 stage"):
        run(tmp_path / "out", annotator(server, retries=0))
    kept = dict(server.whole)
    server.trouble = lambda body, number: decides(body)
    assert numbers(run(tmp_path / "out", annotator(server, retries=0))) == healthy
    assert set(server.whole.values()) == {1} and kept.items() <= server.whole.items()


def test_the_plan_says_what_a_judge_will_cost(server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, [*annotator(server, max_dollars=1000), "dry_run=true"])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("judge "))
    # Two models, two turns: 12 verdicts each of AlpacaEval, two games of 6 questions each of Arena-Hard.
    assert "judge: up to 96 verdicts for 4 new comparisons" in line and "it stops at max_dollars=1000" in line
    run(tmp_path, [*annotator(server, max_dollars=0.0001), "dry_run=true"])
    assert "that is more than max_dollars=0.0001, where it stops" in capsys.readouterr().out
    run(tmp_path, annotator(server))
    run(tmp_path, [*annotator(server), "dry_run=true"])
    assert "verdicts" not in capsys.readouterr().out.split("plan ")[-1].split("\n")[1]


def test_verdicts_that_cannot_be_read_stand_beside_the_number(server: Fake, tmp_path: Path) -> None:
    def mumbles(body: dict[str, Any], number: int) -> dict[str, Any]:
        unsure = hashlib.sha256(json.dumps(body["messages"]).encode()).digest()[2] % 4 == 0
        return {"message": {"role": "assistant", "content": "hm"}} if unsure else decides(body)

    server.trouble = mumbles
    made = run(tmp_path, annotator(server))
    sweep = collect.load(made.folder)
    for benchmark in ("alpaca_eval", "arena_hard"):
        turns = [turn for one in sweep.members[0].of(benchmark) for turn in one.metrics["turns"]]
        unscored = sum(turn["unscored"] for turn in turns)
        assert unscored > 0
        shown = next(made for made in tables.shown(sweep) if made.title.startswith(benchmark))
        assert f"({turns[0]['unscored']} unscored)" in str(shown.rows) or not turns[0]["unscored"]
        assert "unscored)" in str(shown.rows)


# ---- wrong files, before anything is spent

QUESTION = {"instruction": "Say hello.", "output": "Hello.", "generator": "g", "dataset": "d"}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (None, "eval.alpaca_eval.path=.*no such file"),
        ([{"instruction": "Say hello."}], "row 1.*output"),
        ([QUESTION, QUESTION], "rows 1 and 2 have the same instruction"),
        ([], "no rows|empty|has no"),
    ],
)
def test_wrong_questions_are_one_line_before_any_work(tmp_path: Path, rows: Any, said: str) -> None:
    file = tmp_path / "reference.json"
    if rows is not None:
        file.write_text(json.dumps(rows))
    with pytest.raises(ConfigError, match=said) as error:
        run(tmp_path / "out", [f"eval.alpaca_eval.path={file}"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_an_unknown_evaluator_is_one_line_before_any_work(server: Fake, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^eval\.alpaca_eval\.evaluator: 'gpt4' is no evaluator") as error:
        run(tmp_path / "out", [*annotator(server), "eval.alpaca_eval.evaluator=gpt4"])
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_wrong_key_is_one_line(server: Fake, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.trouble = lambda body, number: (401, {"error": {"message": f"bad key {SECRET}"}})
    with pytest.raises(launch.Failed):
        run(tmp_path, annotator(server))
    shown = capsys.readouterr()
    assert f"the key in the environment variable {KEY} (annotator.key) is refused" in shown.out + shown.err
    assert SECRET not in shown.out + shown.err
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
