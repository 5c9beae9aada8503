"""Stages as jobs: every stage in one job, after what it needs, and nothing held up by what it doesn't need."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evolve import jobs
from evolve.config import CONF, ConfigError, Need, Resources, Slurm
from evolve.slurm_job import Run
from evolve.stages import KINDS, data, module
from evolve.store import Corrupt, Source, Stage, StageConfig, Store
from evolve.workers import Setting

HEAVY = ("respond", "score", "reference", "train")


class Settings(StageConfig):
    number: int
    used: int = 1

    @property
    def gpus(self) -> int:
        return 0 if self.light else self.used

    @property
    def ranks(self) -> int:
        return self.used


# Each kind with what it says of itself.
SETTINGS = {
    kind: type(kind, (Settings,), {name: getattr(module(kind).Config, name) for name in ("LIGHT", "SHARED")})
    for kind in KINDS
}


def resources(**needs: Need) -> Resources:
    return site({name: need.model_dump(exclude_unset=True) for name, need in needs.items()})


def site(needs, **settings) -> Resources:
    slurm = Slurm(needs=needs, **settings)
    return Resources(workers=1, threads=1, device="auto", retries=0, lease_timeout=60, slurm=slurm)


@st.composite
def graphs(draw) -> list[Stage]:
    """Stages of any kinds, each built on some before it or on one of two sources."""
    made: list[Stage] = []
    for number in range(draw(st.integers(1, 25))):
        kind = draw(st.sampled_from(KINDS))
        inputs = draw(st.lists(st.sampled_from(made), max_size=3)) if made else []
        named = {f"input_{place}": item for place, item in enumerate(inputs)}
        source = Source("data", "somewhere", draw(st.sampled_from("ab")))
        config = SETTINGS[kind](number=number, used=draw(st.integers(0, 2)))
        made.append(Stage(kind, 1, config, named or {"data": source}))
    return made


def stage(kind: str, *inputs: Stage, gpus: int = 1, number: int = 0) -> Stage:
    named = {f"input_{place}": item for place, item in enumerate(inputs)}
    return Stage(kind, 1, SETTINGS[kind](number=number, used=gpus), named or {"data": Source("data", "x", "x")})


def kinds(made: list[jobs.Job]) -> list[list[str]]:
    return [[stage.kind for stage in job.stages] for job in made]


@given(graphs())
def test_every_stage_is_in_one_job_after_its_inputs(graph):
    made = jobs.group(graph, resources())
    seen: set[str] = set()
    for job in made:
        for item in job.stages:
            assert {needed.id for needed in item.stages} <= seen
            assert item.id not in seen
            seen.add(item.id)
    assert seen == {item.id for item in graph}


@given(graphs())
def test_a_job_that_others_wait_for_is_needed_whole(graph):
    """So `afterok` holds nothing up: what a job's last stage stands for is all that others take of it."""
    made = jobs.group(graph, resources())
    for job in made:
        *first, last = job.stages
        heavy = any(not item.config.light for item in job.stages)
        for other in made:
            if other is not job and (heavy or job.inputs):
                assert not other.inputs & {item.id for item in first}
        if heavy or job.inputs:  # and its last stage needs all of its own
            above: set[str] = set()
            todo = [last]
            while todo:
                item = todo.pop()
                above.add(item.id)
                todo += [needed for needed in item.stages if needed in job.stages]
            assert above == {item.id for item in job.stages}


@given(graphs())
def test_stages_of_a_job_want_the_same(graph):
    for job in jobs.group(graph, resources(train=Need(gpus=8, memory="400G"))):
        wants = {
            want.model_copy(update={"minutes": 1, "shards": 1}).model_dump_json()
            for item in job.stages
            if (want := jobs.need(item, resources(train=Need(gpus=8, memory="400G"))))
        }
        assert len(wants) <= 1


def test_what_is_there_already_is_nobodys():
    made = stage("respond")
    scored = stage("score", made)
    [job] = jobs.group([scored], resources())
    assert job.stages == (scored,) and job.inputs == {made.id}


def test_an_iteration_where_all_want_the_same_is_one_job():
    answers = stage("respond")
    scores = stage("score", answers)
    pairs = stage("pair", answers, scores)
    references = [stage("reference", pairs, number=number) for number in range(2)]
    trained = stage("train", pairs, *references)
    graph = [answers, scores, pairs, *references, trained]
    assert kinds(jobs.group(graph, resources())) == [[item.kind for item in graph]]


def test_resources_part_an_iteration():
    """Training gets eight GPUs; pairs of answers, which take a second, go with the scores."""
    answers = stage("respond")
    scores = stage("score", answers)
    pairs = stage("pair", answers, scores)
    reference = stage("reference", pairs)
    trained = stage("train", pairs, reference, gpus=8)
    made = jobs.group([answers, scores, pairs, reference, trained], resources())
    assert kinds(made) == [["respond", "score", "pair"], ["reference"], ["train"]]
    assert [job.need.gpus for job in made] == [1, 1, 8]
    assert jobs.after(made)[made[2].key] == {made[0].key, made[1].key}


def test_a_judge_behind_a_server_holds_no_gpu():
    answers = stage("respond")
    verdicts = stage("compare", answers, gpus=0)
    measured = stage("evaluate", answers, verdicts)
    made = jobs.group([answers, verdicts, measured], resources())
    assert kinds(made) == [["respond"], ["compare", "evaluate"]]
    assert [job.need.gpus for job in made] == [1, 0]


def test_slices_of_one_data_set_are_one_small_job():
    """But for one that a single job needs, which makes it itself."""
    slices = [stage("data", number=number) for number in range(4)]
    users = [stage("respond", *slices[:3], number=number) for number in range(2)]
    made = jobs.group([*slices, *users, stage("train", slices[3])], resources())
    assert kinds(made) == [["data"] * 3, ["respond"], ["respond"], ["data", "train"]]
    assert made[0].need == resources().slurm.needs["small"]


def test_minutes_are_for_all_of_a_jobs_stages():
    answers = stage("respond")
    made = jobs.group([answers, stage("score", answers)], resources(default=Need(minutes=50), small=Need(minutes=5)))
    assert [job.need.minutes for job in made] == [100]


@pytest.mark.parametrize("device, gpus", [("auto", 2), ("cpu", 0)])
def test_gpus_are_those_that_a_stage_uses_where_there_are_some(device, gpus):
    asked = resources().model_copy(update={"device": device})
    [job] = jobs.group([stage("train", gpus=2)], asked)
    assert job.need.gpus == gpus


def test_devices_spread_over_nodes():
    """As many GPUs on each; and what runs on one of them, a single GPU too, doesn't hold the others meanwhile."""
    references = stage("reference")
    trained = stage("train", references, gpus=2)
    again = stage("train", trained, gpus=2, number=1)
    made = jobs.group([references, trained, again], resources(train=Need(nodes=2)))
    assert kinds(made) == [["reference"], ["train", "train"]]
    assert [(job.need.nodes, job.need.gpus) for job in made] == [(1, 1), (2, 1)]


def test_devices_that_do_not_divide_over_nodes_are_refused():
    with pytest.raises(
        ConfigError, match=r"^resources\.slurm\.needs\.train\.nodes=2: trainer\.devices=3, .*multiple of 2$"
    ):
        jobs.group([stage("train", gpus=3)], resources(train=Need(nodes=2)))


def test_a_kind_has_what_default_has_but_for_what_it_says():
    needs = site({"default": {"partition": "a100", "memory": "120G"}, "train": {"minutes": 1440}}).slurm.needs
    assert needs["train"].model_dump() == {**needs["default"].model_dump(), "minutes": 1440}
    assert needs["small"].partition is None and needs["small"].memory == "4G"


def test_a_site_file_of_one_line_is_enough():
    assert Slurm(partition="a100").model_dump() == {**Slurm().model_dump(), "partition": "a100"}


def test_the_resources_file_says_what_the_defaults_are():
    written = yaml.safe_load((CONF / "resources" / "slurm.yaml").read_text())
    assert Slurm(**written["slurm"]) == Slurm()


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"options": {"mem": "5G"}}, "options.mem"),
        ({"options": {"--dependency": "x"}}, "options.dependency"),
        ({"max_jobs": 4, "needs": {"respond": {"shards": 3}}}, "max_jobs"),
        ({"needs": {"trian": {}}}, "no kind of stage"),
        ({"needs": {"respond": {"nodes": 2}}}, r"needs\.respond\.nodes=2: runs on one node; .* activate and train"),
        ({"needs": {"default": {"nodes": 2}}}, r"needs\.default\.nodes=2"),
    ],
    ids=["memory", "dependency", "shards", "kind", "nodes", "nodes of all"],
)
def test_what_cannot_be_is_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        Slurm(**settings)


def test_no_job_asks_for_longer_than_the_site_allows():
    answers = stage("respond")
    asked = site({"default": {"minutes": 1000}}, max_minutes=1440)
    [job] = jobs.group([answers, stage("score", answers)], asked)
    assert job.need.minutes == 1440


def test_an_array_shares_the_first_stage_whose_inputs_are_there():
    rows = stage("data")
    answers = stage("respond", rows)
    scores = stage("score", answers)
    made = jobs.group([rows, answers, scores], site({"respond": {"shards": 4}}))
    assert kinds(made) == [["data"], ["respond", "score"]]
    assert made[1].shared is answers and made[1].need.shards == 4


def test_what_is_shared_begins_a_job():
    """Behind another stage of a job, no array could make it: nothing would be there yet that it builds on."""
    answers = stage("respond")
    scores = stage("score", answers)
    pairs = stage("pair", answers, scores)
    for needs in ({"score": {"shards": 4}}, {"default": {"shards": 4}}):
        made = jobs.group([answers, scores, pairs], site(needs))
        assert kinds(made) == [["respond"], ["score", "pair"]]
        assert made[1].shared is scores and made[1].need.shards == 4


@given(graphs())
def test_every_stage_that_is_to_be_shared_is(graph):
    for job in jobs.group(graph, site({"default": {"shards": 4}})):
        dealt = [item for item in job.stages if not item.config.light and item.config.SHARED]
        assert job.shared in (*dealt, None) and len(dealt) <= 1 and bool(dealt) == (job.shared is not None)


def test_what_cannot_be_shared_takes_no_notice():
    rows = stage("data")
    [job] = jobs.group([rows, stage("train", rows)], site({"default": {"shards": 4}}))
    assert job.shared is None


def test_a_job_whose_file_was_damaged_in_the_queue_is_refused(tmp_path):
    """A changed setting would be run under the name of the one that was submitted."""
    rows = {"pool": "eval", "start": 12345, "count": 8, "reserve": 8, "tail": 0, "seed": 0, "split": "train"}
    config = data.Config(**rows, eval_split=None, max_characters=None)
    made = Stage("data", data.VERSION, config, {"data": Source("data", "embedded", "embedded")})
    run = Run((made,), Setting(Store(tmp_path), resources(), tmp_path, {}), Path("jobs/key"))
    written = pickle.dumps(run)
    assert pickle.loads(written).stages[0].id == made.id
    with pytest.raises(Corrupt, match="jobs/key: damaged since it was submitted"):
        pickle.loads(written.replace((12345).to_bytes(2, "little"), (12346).to_bytes(2, "little")))
