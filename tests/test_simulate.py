"""When a plan's jobs would run: nothing before what it needs, no more than there is, and never faster than possible."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_jobs import SETTINGS, resources, stage

from evolve import jobs, simulate
from evolve.config import ConfigError, Need, Node
from evolve.simulate import Amounts, Schedule, Task
from evolve.store import Source, Stage

NODES: list[Amounts] = [(4, 16, 64), (2, 8, 256)]


@st.composite
def tasks(draw, largest: Amounts = (4, 8, 64), most: int = 1) -> list[Task]:
    """In an order where needs come first."""
    made: list[Task] = []
    for number in range(draw(st.integers(1, 25))):
        needs = draw(st.frozensets(st.sampled_from([task.key for task in made]), max_size=3)) if made else frozenset()
        wants = tuple(draw(st.integers(0, part)) for part in largest)
        seconds, limit = draw(st.integers(0, 50)), draw(st.integers(0, 100))
        made.append(Task(str(number), seconds, wants, needs, limit, draw(st.integers(1, most))))
    return made


def check(made: Schedule, given_: list[Task], nodes: list[Amounts], startup: float) -> None:
    named = {task.key: task for task in given_}
    assert made.starts.keys() == made.ends.keys() == named.keys()
    for task in given_:
        assert made.ends[task.key] == made.starts[task.key] + startup + task.seconds
        assert all(made.starts[task.key] >= made.ends[need] for need in task.needs)
        assert len(set(made.nodes[task.key])) == task.nodes
    for moment in made.starts.values():
        running = [task for task in given_ if made.starts[task.key] <= moment < made.ends[task.key]]
        for number, node in enumerate(nodes):
            for part in range(3):
                used = sum(task.wants[part] for task in running if number in made.nodes[task.key])
                assert used <= node[part]
    assert made.makespan >= made.path
    for part in range(3):
        work = sum(task.nodes * task.wants[part] * (startup + task.seconds) for task in given_)
        assert made.makespan * sum(node[part] for node in nodes) >= work
    assert 0 <= made.busy <= 1


@given(tasks(), st.integers(0, 5), st.none() | st.integers(1, 30))
def test_a_schedule_is_possible(given_, startup, most):
    check(simulate.simulate(given_, NODES, startup, most), given_, NODES, startup)


@given(tasks(largest=(2, 8, 64), most=3), st.integers(0, 5), st.none() | st.integers(1, 30))
def test_a_schedule_of_jobs_over_several_machines_is_possible(given_, startup, most):
    check(simulate.simulate(given_, [*NODES, NODES[0]], startup, most), given_, [*NODES, NODES[0]], startup)


@given(tasks(), st.integers(0, 5))
def test_on_one_slot_it_takes_the_sum(given_, startup):
    one = [Task(task.key, task.seconds, (1, 1, 1), task.needs, task.limit) for task in given_]
    made = simulate.simulate(one, [(1, 1, 1)], startup)
    assert made.makespan == sum(startup + task.seconds for task in one)
    assert made.busy == (1 if made.makespan else 0)
    starts = [made.starts[task.key] for task in one]
    assert starts == sorted(starts)  # inputs come first, so nothing has to be waited for


@given(tasks(), st.integers(0, 5))
def test_with_room_for_all_it_takes_the_longest_chain(given_, startup):
    made = simulate.simulate(given_, NODES[:1] * len(given_), startup)
    assert made.makespan == made.path


@given(tasks(), st.integers(1, 6))
def test_no_more_jobs_are_in_the_queue_than_may_be(given_, most):
    """Nothing that was submitted later starts before something has ended."""
    made = simulate.simulate(given_, NODES * 25, 0, most)
    check(made, given_, NODES * 25, 0)
    for place, task in enumerate(given_):
        ended = sum(end <= made.starts[task.key] for end in made.ends.values())
        assert place < most + ended


def one(key: str, seconds: float, gpus: int, limit: float = 0, needs: str = "") -> Task:
    return Task(key, seconds, (gpus, 1, 1), frozenset(needs.split()), limit)


def test_a_small_job_goes_ahead_of_a_large_one_that_it_does_not_put_off():
    node = [(4, 16, 64)]
    running, large = one("running", 100, 3), one("large", 10, 4)
    short, long = one("short", 50, 1), one("long", 200, 1)
    made = simulate.simulate([running, large, short], node)
    assert made.starts == {"running": 0, "large": 100, "short": 0}
    made = simulate.simulate([running, large, long], node)
    assert made.starts == {"running": 0, "large": 100, "long": 110}


def test_a_time_limit_is_what_slurm_knows_of_a_jobs_length():
    """It ends in time, but nobody could know."""
    jobs = [one("running", 100, 3), one("large", 10, 4), one("small", 50, 1, limit=101)]
    assert simulate.simulate(jobs, [(4, 16, 64)]).starts["small"] == 110


def test_what_is_left_beside_a_large_job_is_there_for_small_ones():
    jobs = [one("running", 100, 2), one("large", 10, 3), one("long", 300, 1), one("longer", 400, 1)]
    made = simulate.simulate(jobs, [(4, 16, 64)])
    assert (made.starts["large"], made.starts["long"], made.starts["longer"]) == (100, 0, 110)


def test_a_second_large_job_takes_nothing_from_what_the_first_waits_for():
    jobs = [one("running", 100, 3), one("large", 10, 4), one("middle", 10, 2), one("long", 200, 1)]
    made = simulate.simulate(jobs, [(4, 16, 64)])
    assert (made.starts["large"], made.starts["middle"], made.starts["long"]) == (100, 110, 110)


def test_a_job_over_two_machines_waits_for_both_and_is_not_put_off():
    """Of three machines it gets the two that will have room first; the third is there for whoever comes."""
    several = Task("several", 10, (4, 1, 1), nodes=2)
    jobs = [*(one(f"running {n}", 100 * n, 3) for n in (1, 2, 3)), several, one("small", 5, 1), one("long", 500, 1)]
    made = simulate.simulate(jobs, [(4, 16, 64)] * 3)
    assert made.nodes["several"] == (0, 1)
    assert {key: made.starts[key] for key in ("several", "small", "long")} == {"several": 200, "small": 0, "long": 0}
    assert made.nodes["long"] == (2,)


def test_the_job_that_submits_what_is_left_is_in_the_queue_too():
    made = simulate.simulate([one(str(number), 10, 1) for number in range(6)], [(8, 16, 64)], most=3)
    assert list(made.starts.values()) == [0, 0, 0, 10, 10, 20]


def test_a_job_that_no_machine_has_room_for_is_refused():
    with pytest.raises(ConfigError, match=r"resources.slurm.needs: a job wants 8 GPUs.*largest has 4 /"):
        simulate.simulate([one("large", 1, 8)], NODES)
    with pytest.raises(ConfigError, match=r"wants 4 GPUs.*which 1 of the 2 nodes that it needs have; the largest"):
        simulate.simulate([Task("several", 1, (4, 1, 1), nodes=2)], NODES)


def test_jobs_of_an_array_share_a_stage():
    answers = Stage("respond", 1, SETTINGS["respond"](number=0), {"data": Source("data", "x", "x")})
    scores = Stage("score", 1, SETTINGS["score"](number=1), {"answers": answers})
    made = jobs.group([answers, scores], resources(respond=Need(shards=4, minutes=30)))
    tasks = simulate.of_jobs(made, {answers.id: 100.0, scores.id: 7.0})
    *shares, whole = tasks
    assert [share.seconds for share in shares] == [25] * 4 and whole.seconds == 7
    assert whole.needs == {share.key for share in shares} and whole.key == made[0].key
    assert simulate.simulate(tasks, simulate.pool(4, Node(cpus=64))).makespan == 32


def test_jobs_over_several_machines_take_as_much_of_each():
    trained = stage("train", gpus=4)
    [task] = simulate.of_jobs(jobs.group([trained], resources(train=Need(nodes=2, cpus=3))), {trained.id: 10.0})
    assert (task.wants[:2], task.nodes) == ((2, 3), 2)
    assert simulate.simulate([task], simulate.pool(8, Node(gpus=4))).busy == 0.5


def test_workers_that_share_gpus_wait_for_them():
    made = [stage("train", gpus=gpus, number=number) for number, gpus in enumerate((2, 1, 0, 5))]
    tasks = simulate.of_stages(made, {item.id: 10.0 for item in made}, 2)
    starts = simulate.simulate(tasks, [(2, 4, 0)]).starts
    assert [starts[item.id] for item in made] == [0, 10, 0, 20]  # the last gets all there are


def test_gpus_come_in_machines():
    assert simulate.pool(20, Node(gpus=8, cpus=64, memory="2G")) == [(8, 64, 2048)] * 2 + [(4, 64, 2048)]


@pytest.mark.parametrize(
    "said, gpus",
    [("(null)", 0), ("gpu:4", 4), ("gpu:a100:8(S:0-1)", 8), ("gpu:a:2(S:0,1),gpu:b:1,shard:16", 3), ("mps:100", 0)],
)
def test_a_nodes_gpus(said, gpus):
    assert simulate.gpus_of(said) == gpus


@pytest.mark.parametrize("size, mib", [("64G", 65536), ("1T", 1048576), ("500", 500), ("512K", 1), ("3m", 3)])
def test_a_size_of_memory(size, mib):
    assert simulate.megabytes(size) == mib
