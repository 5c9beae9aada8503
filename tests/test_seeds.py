"""Settings that are run several times: what counts as a run, and differences over runs."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evolve.store import Store
from sweeps import figures, results, seeds, summary
from sweeps.collect import Measurement, MemberResult, Sweep

PHASES = ("base", "offline", "iteration 1")


def estimate(value):
    return {"value": value, "low": None, "high": None, "n": 1}


def measurement(phase: str, name: str, direct: float, refined: float) -> Measurement:
    turns = [{"reward": estimate(value), "accuracy": None} for value in (direct, refined)]
    gain = {"reward": estimate(refined - direct), "accuracy": None}
    metrics = {"benchmark": "refinement", "turns": turns, "gain": gain}
    return Measurement(phase, f"evaluate/{name}-{phase}", metrics, {"dropped": {}})


def member(loss: str, seed: int, values: list[tuple[float, float]], **changes) -> MemberResult:
    """values: (direct, refined) of each phase. changes: of the configuration, as SECTION__KEY."""
    config = {
        "seed": seed,
        "loss": loss,
        "data": {"seed": seed, "prompts": 8},
        "eval": {"seed": seed, "turns": 2},
        "model": {"name": "embedded", "path": f"weights/{seed}", "revision": None},
    }
    for path, value in changes.items():
        section, _, key = path.partition("__")
        config[section] = {**config[section], key: value} if key else value
    name = " ".join(
        [f"loss={loss} seed={seed}", *(f"{key.replace('__', '.')}={value}" for key, value in changes.items())]
    )
    steps = [
        {"phase": phase, "kind": "evaluate", "id": f"{name}-{phase}", "benchmark": "refinement"} for phase in PHASES
    ]
    made = [measurement(phase, name, *of) for phase, of in zip(PHASES, values, strict=False)]
    return MemberResult(name, config, steps, made, [], {})


def sweep(*members: MemberResult) -> Sweep:
    return Sweep(Path("sweep"), Store(Path("store")), list(members))


def changed(one: MemberResult, **metrics) -> MemberResult:
    """With other metrics in every measurement."""
    made = [replace(measurement, metrics=measurement.metrics | metrics) for measurement in one.measurements]
    return replace(one, measurements=made)


def sharing(one: MemberResult, *others: MemberResult) -> list[MemberResult]:
    """Members that have the measurements of the first, as those have whose stages no seed is part of."""
    return [one, *(replace(other, measurements=one.measurements) for other in others)]


def asked(made: Sweep, judge: str = "", **how) -> dict[tuple[str, str], seeds.Row]:
    found = seeds.rows(made, seeds.groups(made), "refinement", judge, "reward", **how)
    return {(row.question, row.setting): row for row in found}


def test_runs_of_a_setting_differ_in_seeds_alone():
    made = sweep(*(member(loss, seed, []) for loss in ("both", "none") for seed in (1, 2)))
    assert {name: len(runs) for name, runs in seeds.groups(made).items()} == {"loss=both": 2, "loss=none": 2}
    assert seeds.groups(sweep(member("both", 1, []), member("none", 1, []))) == {}  # one run of each
    # More answers of the same models are no more runs.
    assert seeds.groups(sweep(member("both", 1, []), member("both", 1, [], eval__seed=2))) == {}
    # Another model with the same seeds is another setting, not another run.
    models = [member("both", seed, [], model__path=path) for seed in (1, 2) for path in ("a", "b")]
    found = seeds.groups(sweep(*models))
    assert {name: len(runs) for name, runs in found.items()} == {f"loss=both model.path={path}": 2 for path in "ab"}
    assert seeds.groups(sweep(*models[:2])) == {}
    # Another number of prompts is another setting.
    other = seeds.groups(sweep(member("both", 1, []), member("both", 2, []), member("both", 3, [], data__prompts=9)))
    assert {name: len(runs) for name, runs in other.items()} == {"loss=both": 2, "loss=both data.prompts=9": 1}


RUNS = st.lists(st.tuples(*[st.tuples(*[st.floats(0, 1).map(lambda x: round(x, 3))] * 2)] * 6), min_size=2, max_size=6)


@given(RUNS)
def test_differences_are_t_tests_over_runs(runs):
    """Each question is asked of the numbers of each run, and corrected over the settings alone."""
    members = [member("both", seed, list(of[:3])) for seed, of in enumerate(runs)]
    members += [member("none", seed, list(of[3:])) for seed, of in enumerate(runs)]
    made = sweep(*members)
    found = {key: row.difference for key, row in asked(made, every_phase=True).items()}
    both, none = [of[:3] for of in runs], [of[3:] for of in runs]
    expected = {
        ("self-refinement", "loss=none"): [of[2][1] - of[2][0] for of in none],
        ("self-improvement", "loss=both"): [of[2][0] - of[0][0] for of in both],
        ("iterations", "loss=both"): [of[2][1] - of[1][1] for of in both],
        ("offline after base", "loss=none"): [of[1][1] - of[0][1] for of in none],
        ("self-refinement, offline", "loss=both"): [of[1][1] - of[1][0] for of in both],
        ("against loss=both", "loss=none"): [b[2][1] - a[2][1] for a, b in zip(both, none, strict=True)],
    }
    assert ("against loss=both", "loss=both") not in found
    for key, differences in expected.items():
        one = found[key]
        assert one.n == len(runs) and one.value == pytest.approx(sum(differences) / len(runs), abs=1e-9)
        if len({round(difference, 9) for difference in differences}) > 1:
            assert one.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue, rel=1e-6)
        tests = [found[question, name].p for question, name in found if question == key[0]]
        assert one.p <= one.p_corrected <= min(1.0, one.p * len(tests)) + 1e-12


def test_a_run_that_has_not_got_there_is_left_out():
    """Of both sides of a pair, not of the table's other numbers."""
    members = [member("both", seed, [(0.5, 0.5), (0.5, 0.6), (0.5, 0.7 + seed / 100)]) for seed in range(3)]
    members += [member("none", seed, [(0.5, 0.5)] * (2 if seed == 2 else 3)) for seed in range(3)]
    made = sweep(*members)
    found = asked(made)
    assert found["against loss=both", "loss=none"].difference.n == 2
    assert found["self-refinement", "loss=both"].difference.n == 3
    [by_phase, differences] = seeds.shown(made)
    header, *rows = by_phase.rows
    assert header == ["setting", "answers", *PHASES] and len(rows) == 6
    assert rows[1][:2] == ["loss=both", "refined"] and rows[1][-1].startswith("0.710 ±")
    assert len(rows[1][-1].records) == 3 and len(rows[4][-1].records) == 2
    assert rows[4][-1].endswith("(2 runs)") and not any("run" in cell for cell in rows[1])
    assert "mean over 3 runs" in by_phase.title and "corrected within each question" in differences.title
    [row] = [row for row in differences.rows if row[:2] == ["against loss=both", "loss=none"]]
    assert all(len(cell.records) == 4 for cell in row[2:])  # a number leads to all that it comes from


def test_runs_that_share_a_measurement_are_one():
    """A number that was measured once has no interval over runs, and no test."""
    ours = [member("both", seed, [(0.5, 0.5), (0.5, 0.6), (0.5, 0.7 + seed / 100)]) for seed in range(4)]
    once = sharing(*(member("none", seed, [(0.5, 0.6)] * 3) for seed in range(4)))
    made = sweep(*ours, *once)
    [by_phase, _] = seeds.shown(made)
    cells = {(setting, kind): cells for setting, kind, *cells in by_phase.rows[1:]}
    assert cells["loss=none", "refined"] == ["0.600 (1 run)"] * 3
    found = asked(made)
    assert ("self-refinement", "loss=none") not in found and ("self-refinement", "loss=both") in found
    assert found["against loss=both", "loss=none"].difference.n == 4  # the other side differs
    # The base model, which no run trains, is one measurement too; what is trained is not.
    base = [replace(one, measurements=[ours[0].measurements[0], *one.measurements[1:]]) for one in ours]
    [by_phase, _] = seeds.shown(sweep(*base))
    assert by_phase.rows[1][2:] == ["0.500 (1 run)", "0.500 ±0.000", "0.500 ±0.000"]


def test_runs_that_share_a_seed_are_not_independent(tmp_path):
    """Nine runs of three seeds and three draws of data are one: no interval, no test, and a line that says why."""

    def crossed(loss: str, seeds, data) -> list[MemberResult]:
        same_model = {"model__path": "weights", "eval__seed": 0}
        return [
            member(loss, seed, [(0.5, 0.5), (0.5, 0.6), (0.5, 0.6 + seed / 10 + of / 100)], data__seed=of, **same_model)
            for seed in seeds
            for of in data
        ]

    grid = Sweep(tmp_path, Store(tmp_path), crossed("both", range(3), range(3)) + crossed("none", range(3), range(3)))
    [by_phase] = seeds.shown(grid)
    assert len(seeds.groups(grid)["loss=both"]) == 9 and asked(grid, every_phase=True) == {}
    row = by_phase.rows[2]
    assert row[:2] == ["loss=both", "refined"] and [cell.estimate["n"] for cell in row[2:]] == [1] * 3
    assert row[-1] == "0.710" and len(row[-1].records) == 9
    assert by_phase.title == (
        "mean reward, mean over the runs of each setting (seeds); seed and data.seed are crossed, so no two runs are "
        "independent, and there is no interval or test over runs; 'data.seed=${seed}' sweeps them together"
    )
    assert [path.name for path in seeds.write(grid)] == ["means.csv"]
    assert {one.note for one in figures.write(grid)} == {seeds.crossed(grid)}
    # With one draw of data for all, or a draw for each, every run is one.
    for runs in (crossed("both", range(3), [0]), [*crossed("both", [0], [4]), *crossed("both", [1], [5])]):
        found = asked(sweep(*runs))["self-refinement", "loss=both"].difference
        assert found.n == len(runs) and seeds.crossed(sweep(*runs)) == ""
    # Two that share their data are one beside a third; each differs from the other setting's runs of the same seeds.
    some = [(0, 0), (1, 0), (2, 1)]
    both, none = ([one for pair in some for one in crossed(loss, pair[:1], pair[1:])] for loss in ("both", "none"))
    both = [changed(one, gain={"reward": estimate(0.3 if "seed=2" in one.name else 0.1)}) for one in both]
    made = sweep(*both, *none)
    [by_phase, _] = seeds.shown(made)
    assert by_phase.rows[3][-1].startswith("0.200 ±") and by_phase.rows[3][-1].estimate["n"] == 2
    assert by_phase.title.startswith("mean reward, mean over 2 runs")
    assert asked(made)["self-refinement", "loss=both"].difference.n == 2


def test_the_same_stages_are_not_tested_against_each_other():
    """A setting that shares all its stages with the first adds no test, which would weaken the others' correction."""
    runs = [member("both", seed, [(0.5, 0.5), (0.5, 0.6), (0.5, 0.7 + seed / 100)]) for seed in range(3)]
    same = [replace(member("same", seed, []), measurements=one.measurements) for seed, one in enumerate(runs)]
    other = [member("none", seed, [(0.5, 0.5), (0.5, 0.6), (0.5, 0.6 + seed / 90)]) for seed in range(3)]
    found = {key: row.difference for key, row in asked(sweep(*runs, *same, *other)).items() if key[0].startswith("aga")}
    assert list(found) == [("against loss=both", "loss=none")]
    assert found["against loss=both", "loss=none"].p_corrected == found["against loss=both", "loss=none"].p


def test_every_number_over_runs_leads_back_to_its_records(tmp_path):
    members = [member("both", seed, [(0.5, 0.5), (0.5, 0.6), (0.4, 0.7 + seed / 10)]) for seed in range(3)]
    made = Sweep(tmp_path, Store(tmp_path / "store"), members)
    means, tests = ([*csv.DictReader(path.open())] for path in seeds.write(made))
    assert {(line["phase"], line["answers"]) for line in means} == {
        (phase, kind) for phase in PHASES for kind in ("direct", "refined", "gain")
    }
    records = {phase: [one.id for of in members for one in of.measurements if one.phase == phase] for phase in PHASES}
    for line in means:
        assert line["records"] == " ".join(records[line["phase"]]) and (line["n"], line["runs"]) == ("3", "3")
    [last] = [line for line in means if (line["phase"], line["answers"]) == (PHASES[-1], "refined")]
    assert float(last["value"]) == pytest.approx(0.8) and float(last["low"]) < 0.8 < float(last["high"])
    sides = {line["question"]: (line["records after"], line["records before"]) for line in tests}
    last, before, base = (" ".join(records[phase]) for phase in reversed(PHASES))
    assert sides["self-refinement"] == (last, last) and sides["iterations"] == (last, before)
    assert sides["self-improvement"] == (last, base) and sides["offline after base"] == (before, base)


def judged(one: MemberResult, *won: float) -> MemberResult:
    """With AlpacaEval's win rates (direct, refined) after the last phase beside the refinement curve."""
    turns = [{"win_rate": estimate(value)} for value in won]
    metrics = {"benchmark": "alpaca_eval", "turns": turns, "gain": {"win_rate": estimate(won[1] - won[0])}}
    made = Measurement(PHASES[-1], f"evaluate/{one.name}-judged", metrics, {"dropped": {}})
    step = {"phase": PHASES[-1], "kind": "evaluate", "id": made.id, "benchmark": "alpaca_eval"}
    return replace(one, steps=[*one.steps, step], measurements=[*one.measurements, made])


def test_all_benchmarks_stand_over_runs_on_the_screen_and_in_the_summary():
    """A row for each setting, not for each run."""
    values = [(0.5, 0.5), (0.5, 0.6), (0.5, 0.7)]
    both = [judged(member("both", seed, values), 50.0, 60.0 + 10 * seed) for seed in range(3)]
    none = [judged(member("none", seed, values), 50.0, 40.0 + seed) for seed in range(2)]
    missing = replace(member("none", 2, values[:2]), missing=[(PHASES[-1], "alpaca_eval"), (PHASES[-1], "refinement")])
    made = sweep(*both, *none, missing)
    [whole] = summary.shown(made)
    won = "alpaca_eval win rate (%)"
    assert whole.rows[0] == ["answers", "loss", "after", "mean reward", won, f"published {won}"]
    rows = {tuple(row[:2]): row for row in whole.rows[1:]}
    assert list(rows) == [(part, loss) for part in summary.PARTS.values() for loss in ("both", "none")]
    *_, mean, published = rows["refined answers", "both"]
    assert mean.startswith("70.000 ±") and mean.estimate["n"] == len(mean.records) == 3
    assert published == "not published here"
    assert rows["refined answers", "none"][4].startswith("40.500 ±")
    assert rows["refined answers", "none"][4].endswith("(2 runs)")
    assert "mean over 3 runs of each setting (seeds), ±: 95 % interval over runs" in whole.title
    shown = results.first(made)
    assert [made.title.split(",")[0] for made in shown] == [
        "mean reward",
        "differences of mean reward after the last phase",
        "all benchmarks after the last phase",
    ]
    assert won in shown[-1].rows[0] and len(shown[-1].rows) == 1 + 6


def test_answers_drawn_again_are_averaged_within_their_run():
    values = [[(0.5, 0.5), (0.5, 0.6), (0.5, 0.7 + seed / 10 + again / 100)] for seed in range(3) for again in range(3)]
    members = [
        member("both", seed, values[3 * seed + again], eval__seed=again) for seed in range(3) for again in range(3)
    ]
    found = asked(sweep(*members))["self-refinement", "loss=both"].difference
    differences = [sum(values[3 * seed + again][2][1] - 0.5 for again in range(3)) / 3 for seed in range(3)]
    assert found.n == 3 and found.p == pytest.approx(stats.ttest_1samp(differences, 0).pvalue)


def test_reward_models_that_runs_train_for_themselves_are_one_judge(tmp_path):
    """Two other judges are two tables, and two figures."""
    values = [(0.5, 0.5), (0.5, 0.6), (0.4, 0.7)]
    own = [changed(member("both", seed, values), judge=f"trained reward model {seed}0000f") for seed in range(3)]
    [by_phase, differences] = seeds.shown(sweep(*own))
    assert "mean over 3 runs" in by_phase.title and len(differences.rows) > 1
    rule = [changed(member("none", seed, values), judge="a rule") for seed in range(3)]
    assert len(seeds.shown(sweep(*own, *rule))) == 4
    drawn = figures.write(Sweep(tmp_path, Store(tmp_path / "store"), [*own, *rule]))
    assert [one.title for one in drawn if one.name.startswith("iterations-reward")] == [
        "mean reward by phase, by trained reward model",
        "mean reward by phase, by a rule",
    ]


def test_chains_of_one_turn_refine_nothing():
    made = sweep(*(member("both", seed, [(0.5, 0.5), (0.5, 0.6), (0.6, 0.7)]) for seed in range(3)))
    direct = sweep(*(changed(one, turns=one.measurements[0].metrics["turns"][:1]) for one in made.members))
    [by_phase, _] = seeds.shown(direct)
    assert {row[1] for row in by_phase.rows[1:]} == {"direct"}
    assert {question for question, _ in asked(direct)} <= {"self-improvement", "iterations"}


@pytest.mark.parametrize("names", [("loss=a", "loss=b"), ("loss=a seed=1", "loss=a seed=2")])
def test_what_is_measured_by_another_benchmark_alone_is_drawn(tmp_path, names):
    """Nothing asks for a refinement curve where none was planned."""
    metrics = ("gold", "characters", "self_bleu", "kl")
    turns = [{metric: estimate(value) for metric in metrics} for value in (0.1, 0.2)]
    whole = {"benchmark": "drift", "turns": turns, "gain": turns[0], "protocol": "a chain"}
    members = []
    for number, name in enumerate(names):
        steps = [
            {"phase": phase, "kind": "evaluate", "id": f"{name}-{phase}", "benchmark": "drift"} for phase in PHASES
        ]
        made = [Measurement(step["phase"], step["id"], whole, {"dropped": {}, "config": {}}) for step in steps]
        one = member("a", number, [])
        config = one.config | ({"loss": name} if "seed" not in name else {})
        members.append(MemberResult(name, config, steps, made, [], {}))
    sweep = Sweep(tmp_path, Store(tmp_path / "store"), members)
    assert [one.name for one in figures.write(sweep)] == ["drift"]
    assert seeds.shown(sweep) == [] or "seed" in names[0]


@pytest.mark.parametrize("experiment", ["figure1", "figure3", None])
def test_figures_draw_settings_over_their_runs(tmp_path, experiment):
    """A line for each setting, not for each run; and the experiment's own figure has its name."""
    members = [member("both", seed, [(0.5, 0.5), (0.5, 0.6), (0.4, 0.7 + seed / 10)]) for seed in range(3)]
    members += [member("none", seed, [(0.5, 0.5)] * 3) for seed in range(3)]
    made = Sweep(tmp_path, Store(tmp_path / "store"), members, experiment=experiment)
    drawn = {one.name: one for one in figures.write(made)}
    assert figures.write(replace(made, experiment="turns")) and not any(
        tmp_path.glob("figure*")
    )  # under other names now
    by_phase, by_turn = ("iterations", "figure1") if experiment == "figure1" else (experiment or "iterations", "turns")
    assert drawn.keys() == {f"{by_phase}-reward", f"{by_turn}-reward", "compute-reward"}
    assert {one.note for one in drawn.values()} == {"bars: 95 % intervals over 3 runs"}
    lines = {mark.series for mark in drawn[f"{by_phase}-reward"].marks}
    assert lines == {f"loss={loss}, {kind}" for loss in ("both", "none") for kind in ("direct", "refined")}
    for name, at in (
        (f"{by_phase}-reward", ("loss=both, refined", PHASES[-1])),
        (f"{by_turn}-reward", ("loss=both", "turn 2")),
    ):
        [mark] = [mark for mark in drawn[name].marks if (mark.series, mark.where) == at]
        assert mark.estimate["value"] == pytest.approx(0.8) and mark.estimate["n"] == len(mark.records) == 3
