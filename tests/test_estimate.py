"""What new stages will take: by records of a real run, by assumptions, or not known; and what the plan prints of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import load, sweep_here

from evolve import estimate, launch, losses, plan, sources, trainer
from evolve.config import CONF, ConfigError, PreferenceWeights, SFTWeights
from evolve.estimate import Estimate
from evolve.stages import KINDS, module
from evolve.store import Stage, Store, settings

SMALL = ["debug=fast", "data.eval_prompts=8", "data.sft_pairs=16", "data.offline_pairs=0", "data.prompts=8"]
SMALL += ["eval.turns=2", "trainer.batch_size=8", "trainer.micro_batch=8", "reward_model.batch_size=8"]
RUN = ["filter=reward_model", "data.reward_model_pairs=16", "reward_model.micro_batch=8"]


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The records of one member."""
    folder = tmp_path_factory.mktemp("estimate")
    sweep_here([[*SMALL, *RUN, f"output={folder}"]])
    return folder


@pytest.fixture(scope="module")
def records(out: Path) -> dict[str, dict[str, Any]]:
    store = Store(out / "store")
    return {stage_id: record for stage_id in store.ids() if (record := store.read(stage_id))}


def planned(out: Path, *words: str) -> launch.Planned:
    member = [*SMALL, *RUN, *words, f"output={out}", "dry_run=true"]
    return launch.plan_members([load(*member)], [member])


def expected(out: Path, *words: str) -> dict[tuple[str, str], tuple[Stage, Estimate]]:
    """The first new stage of each phase and kind."""
    found = planned(out, *words)
    [member] = found.graph.members
    first: dict[tuple[str, str], tuple[Stage, Estimate]] = {}
    for step in member.steps:
        if step.stage.id in found.expected:
            first.setdefault((step.phase, step.stage.kind), (step.stage, found.expected[step.stage.id]))
    return first


def of_kind(records: dict[str, dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for key, record in records.items() if key.startswith(f"{kind}/")]


def test_nothing_is_expected_of_what_is_there(out):
    assert planned(out).expected == {}


def test_more_prompts_take_as_many_times_as_long(out, records):
    """The loop's own answers have these settings; evaluations have fewer turns."""
    [own] = [one for one in of_kind(records, "respond") if one["config"]["strategy"]["answers"] == 4]
    stage, found = expected(out, "data.prompts=24")["iteration 1", "respond"]
    assert stage.id != own["id"] and found.how == "same settings" and not found.most
    assert [record.id for record in found.measured] == [own["id"]]
    assert found.seconds == pytest.approx(3 * own["seconds"]) and found.grown == pytest.approx(3)
    assert found.tokens == pytest.approx({"generated": 3 * own["tokens"]["generated"]})


@pytest.mark.parametrize("known", [True, False])
def test_other_settings_of_the_same_model_go_by_what_there_is_to_do(out, records, known):
    """Epochs, sequences, and pairs: those that are there already, or else one from each prompt."""
    [trained] = of_kind(records, "train")
    assert len(losses.needed(PreferenceWeights(**trained["config"]["loss"]))) == 6
    words = ["loss=sft", "trainer.epochs.pt=5"] if known else ["loss=sft", "trainer.epochs.pt=5", "filter.margin=0.1"]
    _, found = expected(out, *words)["iteration 1", "train"]
    pairs = trained["values"]["pairs"]
    share = (5 * (pairs if known else 8) * 2) / (pairs * 6)
    assert pairs < 8 and found.how == "same model"
    assert found.seconds == pytest.approx(share * trained["seconds"])
    assert found.tokens == pytest.approx({"trained": share * trained["tokens"]["trained"]})


def test_stages_of_seconds_are_as_long_as_any(out, records):
    """Pairs, and a verifier's scores, of three times as many answers here."""
    verified = [record for record in of_kind(records, "score") if record["config"]["scorer"] == "verifier"]
    for made, (_, found) in (
        (of_kind(records, "pair"), expected(out, "filter.margin=0.1")["iteration 1", "pair"]),
        (verified, expected(out, "data.eval_prompts=24")["sft", "score"]),
    ):
        assert found.how in ("same kind", "same settings") and len(found.measured) == len(made)
        assert found.seconds == pytest.approx(sum(record["seconds"] for record in made) / len(made))


def test_another_models_records_say_nothing(out, tiny):
    found = expected(out, f"model.path={tiny}")
    for (_, kind), (_, one) in found.items():
        heavy = kind in ("respond", "activate", "train", "reference", "reward_model")
        assert (one.how == "unknown") == (one.seconds is None) == (heavy or (kind == "score" and one.seconds is None))
    answers = found["iteration 1", "respond"][1]
    assert answers.most and answers.tokens == {"generated": 8 * 4 * 12}


def test_a_scorers_speed_is_no_other_ones(out, records):
    """Evaluations are scored by the verifier, pairs by a reward model of the same base as the judge."""
    by: dict[str, set[str]] = {}
    for record in of_kind(records, "score"):
        by.setdefault(record["config"]["scorer"], set()).add(record["id"])
    assert by.keys() == {"verifier", "reward_model"}
    found = expected(out, "seed=5", "filter.margin=0.1")
    for phase, scorer in (("sft", "verifier"), ("iteration 1", "reward_model")):
        assert {record.id for record in found[phase, "score"][1].measured} == by[scorer]
    assert expected(out, "filter=judge", "judge=policy")["iteration 1", "score"][1].how == "unknown"


def test_limits_hold(out, records):
    """What a plan said before anything had run, of how much and how many tokens, was not exceeded."""
    member = plan.build("member", load(*SMALL, *RUN), sources.Resolver(None))
    stages = {step.stage.id: step.stage for step in member.steps}
    assert stages.keys() == records.keys()
    blank = estimate._Estimates(stages, stages.keys(), Store(out / "none"), lambda kind: [], {}, None)
    for key, record in records.items():
        stage = stages[key]
        if stage.config.COUNTED is None:
            continue
        count, done = blank.count(stage), record["values"][stage.config.COUNTED]
        assert count is not None and count >= done, key
        amount, tokens = estimate.work(stage.kind, settings(stage.config, defaults=True), count)
        assert amount >= estimate.work(stage.kind, record["config"], done)[0] > 0
        for name in record["tokens"].keys() & tokens.keys():
            assert tokens[name] >= record["tokens"][name] > 0, key


LOSSES = sorted(file.stem for file in (CONF / "loss").glob("*.yaml"))


@pytest.mark.parametrize("loss", LOSSES)
def test_sequences_are_those_that_training_runs(loss):
    config = load("debug=fast", f"loss={loss}", "filter=reward_model").loss
    if (weights := config.preference) is not None:
        found = estimate.sequences("train", {"loss": weights.model_dump()})
        assert found == tuple(1 if name in losses.DIRECT else 2 for name in losses.needed(weights))
    if config.sft is not None:
        names = trainer.sft_objective(config.sft).names
        assert estimate.sequences("activate", {"loss": config.sft.model_dump()}) == (1, 2)[: len(names)]


def test_sequences_of_single_terms():
    assert estimate.sequences("activate", {"loss": SFTWeights(direct=0, refine=1).model_dump()}) == (2,)
    weights = load("debug=fast", "loss.alpha=1", "loss.nll=0.5", "loss.refine_contexts=rejected").loss.preference
    assert weights is not None
    assert len(estimate.sequences("train", {"loss": weights.model_dump()})) == len(losses.needed(weights)) == 3


# ---- assumptions


RATES = """
prompt_tokens: 10
answer_tokens: 6
rates:
  respond: {tokens_per_second: 4, seconds: 30}
  train: {tokens_per_second: 8}
  evaluate: {seconds: 2}
"""


@pytest.fixture
def rates(tmp_path: Path) -> str:
    file = tmp_path / "rates.yaml"
    file.write_text(RATES)
    return f"resources.rates={file}"


def test_assumed_rates_go_before_records(out, rates):
    found = expected(out, rates, "data.prompts=16", "engine.processes=2")
    answers = found["iteration 1", "respond"][1]
    assert (answers.how, answers.tokens) == ("assumed", {"generated": 16 * 4 * 6}) and not answers.most
    assert answers.seconds == 30 + 16 * 4 * 6 / (4 * 2)  # of two GPUs
    trained = found["iteration 1", "train"][1]
    assert trained.tokens == {"trained": 16 * (2 * 16 + 4 * 22)} and trained.seconds == 16 * (2 * 16 + 4 * 22) / 8
    assert found["iteration 1", "evaluate"][1].seconds == 2
    assert found["iteration 1", "reference"][1].how == "same settings"


@pytest.mark.parametrize(
    "content, wrong",
    [
        ("rates: {moon: {seconds: 1}}", "moon: no kind of stage"),
        ("- 1", "no mapping"),
        ("a: [", "neither YAML nor JSON"),
        ("rates: {respond: {tokens_per_second: 0}}", "tokens_per_second=0"),
    ],
)
def test_a_wrong_file_of_rates_is_one_line(tmp_path, content, wrong):
    (tmp_path / "rates.yaml").write_text(content)
    with pytest.raises(ConfigError, match=wrong) as refused:
        load(f"resources.rates={tmp_path / 'rates.yaml'}")
    assert "resources.rates" in str(refused.value) and "\n" not in str(refused.value)
    with pytest.raises(ConfigError, match=r"resources\.rates=none.yaml: no such file"):
        load("resources.rates=none.yaml")


# ---- what is printed


def test_the_plan_names_what_it_goes_by(out, rates, capsys):
    member = [*SMALL, *RUN, "data.prompts=16", "model.beta=0.3", rates, f"output={out}", "dry_run=true"]
    launch.sweep([load(*member)], [member])
    said = " ".join(capsys.readouterr().out.split())
    assert "assumed: " in said and "record of the same settings" in said and "2 times as large" in said
    assert "tokens generated" in said and "CPU-hours" in said and " on 2 workers; never under " in said


def test_a_plan_that_nothing_is_known_of_says_so(tmp_path, capsys):
    member = [*SMALL, f"output={tmp_path}", "dry_run=true"]
    launch.sweep([load(*member)], [member])
    said = capsys.readouterr().out
    assert "unknown hours (no earlier record, and no resources.rates)" in said
    assert f"at most {8 * 4 * 12 + 3 * 8 * 2 * 12} tokens generated" in said and "time " not in said.split("stages:")[0]


def test_the_makespan_on_numbers_of_gpus_needs_no_slurm(out, rates, capsys):
    member = [*SMALL, *RUN, "data.prompts=16", rates, f"output={out}", "dry_run=true", "resources=slurm"]
    member += ["resources.slurm.simulate=[1,8]", "resources.slurm.startup_seconds=0"]
    launch.submit([load(*member)], [member], wait=False)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("time "))
    assert " on 1 GPUs (" in line and " on 8 GPUs (" in line and "; never under " in line


def test_every_kind_of_stage_says_what_it_is_counted_by():
    of = {kind: module(kind).Config for kind in KINDS}
    assert {kind for kind, config in of.items() if config.COUNTED is None} == {"evaluate", "overlap"}
    assert {kind for kind, config in of.items() if config.COUNTED and not config.FOLLOWS} == {"data", "questions"}
