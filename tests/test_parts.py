"""Work in parts: what was finished is kept whatever happens, and who made a row changes nothing."""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve import parts
from evolve.config import HF, Sampling, Strategy
from evolve.stages import Context, ModelSettings, module, read_rows, stage, write_rows


def here(folder, progress=lambda done, total: None):
    return Context("cpu", progress, folder / "partial")


def square(stop, numbers, emit, context):
    for number in numbers:
        if number == stop:
            raise RuntimeError("enough")
        emit(number, {"square": number**2, "text": "ä\u2028\n\t\x00"})


EXPECTED = [{"square": number**2, "text": "ä\u2028\n\t\x00"} for number in range(7)]


@pytest.mark.parametrize("stop", range(7))
def test_what_was_finished_is_not_made_again(tmp_path, stop):
    with pytest.raises(RuntimeError, match="enough"):
        parts.run(square, stop, 7, here(tmp_path))
    asked = []

    def rest(argument, numbers, emit, context):
        asked.extend(numbers)
        square(argument, numbers, emit, context)

    assert parts.run(rest, None, 7, here(tmp_path)) == EXPECTED
    assert asked == list(range(stop, 7))
    assert parts.run(rest, None, 7, here(tmp_path)) == EXPECTED
    assert asked == list(range(stop, 7))


@given(st.data())
def test_a_damaged_part_loses_its_damaged_rows_alone(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("parts")
    parts.run(square, None, 7, here(folder))
    (part,) = (folder / "partial").iterdir()
    whole = part.read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    if data.draw(st.booleans()):
        part.write_bytes(whole[:place])
    else:
        part.write_bytes(whole[:place] + bytes([whole[place] ^ data.draw(st.integers(1, 255))]) + whole[place + 1 :])
    found = parts.read(folder / "partial")
    assert all(EXPECTED[number] == value for number, value in found.items())
    untouched = whole[:place].count(b"\n")
    assert found.keys() >= set(range(untouched))
    assert parts.run(square, None, 7, here(folder)) == EXPECTED


def test_rows_that_were_not_made_are_an_error(tmp_path):
    def lazy(argument, numbers, emit, context):
        emit(1, None)

    with pytest.raises(RuntimeError, match="2 of 3 rows were not finished"):
        parts.run(lazy, None, 3, here(tmp_path))


def responding(tiny, template, tmp_path, **engine):
    """The stage `respond` on 12 prompts, and its inputs."""
    (tmp_path / "prompts").mkdir(exist_ok=True)
    write_rows(tmp_path / "prompts" / "rows.jsonl", ({"id": f"p{n}", "prompt": f"{n % 4} {n // 4}"} for n in range(12)))
    made = stage(
        "respond",
        {},
        model=ModelSettings(dtype="float32", chat_template=None, trust_remote_code=False),
        engine=HF(name="hf", batch_size=2, **engine),
        strategy=Strategy(name="chain", answers=3, branching=None, expand=None),
        template=template,
        sampling=Sampling(temperature=1.0, top_k=0, top_p=1.0),
        scorer=None,
        max_prompt_tokens=50,
        max_new_tokens=12,
        max_length=200,
        seed=0,
    )
    return made.config, {"model": tiny, "prompts": tmp_path / "prompts"}


@pytest.fixture(scope="module")
def alone(tiny, template, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone")
    config, inputs = responding(tiny, template, out)
    report = module("respond").run(config, inputs, out, here(out))
    return read_rows(out / "answers.jsonl"), report


@pytest.mark.slow
def test_how_many_share_the_work_changes_nothing(tiny, template, tmp_path, alone):
    config, inputs = responding(tiny, template, tmp_path, processes=3)
    shown = []
    report = module("respond").run(config, inputs, tmp_path, here(tmp_path, lambda *news: shown.append(news)))
    assert (read_rows(tmp_path / "answers.jsonl"), report) == alone
    assert shown[-1] == (36, 36)


def kill_one(folder):
    """A progress callback that kills one process, once, when some rows are there; and whom it killed."""
    killed = []

    def works(child):
        with contextlib.suppress(psutil.Error):  # one that has just ended has no command line any more
            return "evolve.processes" in child.cmdline()

    def progress(done, total):
        children = [child for child in psutil.Process().children() if works(child)]
        if not killed and children and parts.read(folder / "partial"):
            killed.append(children[-1])
            children[-1].kill()

    return progress, killed


@pytest.mark.slow
def test_a_process_that_is_killed_is_started_again_for_what_it_left(tiny, template, tmp_path, alone):
    config, inputs = responding(tiny, template, tmp_path, processes=2)
    progress, killed = kill_one(tmp_path)
    report = module("respond").run(config, inputs, tmp_path, here(tmp_path, progress))
    assert killed
    assert (read_rows(tmp_path / "answers.jsonl"), report) == alone


@pytest.mark.slow
def test_without_retries_the_others_finish_and_the_next_attempt_goes_on(tiny, template, tmp_path, alone):
    config, inputs = responding(tiny, template, tmp_path, processes=2, retries=0)
    progress, killed = kill_one(tmp_path)
    with pytest.raises(RuntimeError, match="ended with no error of its own"):
        module("respond").run(config, inputs, tmp_path, here(tmp_path, progress))
    assert killed
    kept = parts.read(tmp_path / "partial")
    assert len(kept) >= 6  # all of the other's
    config, inputs = responding(tiny, template, tmp_path)
    report = module("respond").run(config, inputs, tmp_path, here(tmp_path))
    assert (read_rows(tmp_path / "answers.jsonl"), report) == alone


@pytest.mark.slow
def test_a_command_deals_its_stages_to_processes(tmp_path):
    """Through the workers, which start stages that train on several devices in another way."""
    command = [sys.executable, "evolve/main.py", "debug=fast", "filter=reward_model", f"output={tmp_path}"]
    given = ["engine.processes=2", "reward_model.processes=2", "loss=pt_only", "data.offline_pairs=0"]
    done = subprocess.run([*command, *given], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "result  iteration 1" in done.stdout
    records = [json.loads(path.read_text()) for path in tmp_path.glob("store/*/*/record.json")]
    devices: dict[str, set[int]] = {}
    for record in records:  # a verifier scores in one process
        kind = record["id"].split("/")[0]
        name = f"score {record['config']['scorer']}" if kind == "score" else kind
        devices.setdefault(name, set()).add(record["devices"])
    asked = ("respond", "score reward_model", "score verifier", "pair", "train")
    assert [devices[name] for name in asked] == [{2}, {2}, {1}, {1}, {1}]


def group_seen(progress):
    return {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}


def test_a_group_that_this_process_is_in_is_not_its_calls(monkeypatch):
    """What a cluster's launcher, or torchrun, has left in the environment."""
    from evolve.processes import Call

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    call = Call(group_seen, ())
    while call.running:
        time.sleep(0.05)
    try:
        assert call.result() == {"RANK": None, "WORLD_SIZE": None}
    finally:
        call.stop()


@pytest.mark.slow
def test_a_process_ends_with_the_one_that_started_it(tiny, template, tmp_path):
    config, inputs = responding(tiny, template, tmp_path, processes=2)
    config = config.model_copy(update={"strategy": Strategy(name="chain", answers=64, branching=None, expand=None)})
    (tmp_path / "job").write_bytes(pickle.dumps((config, inputs, tmp_path, tmp_path / "partial")))
    program = (
        "import pickle, sys; from evolve.stages import Context, module;"
        "config, inputs, out, partial = pickle.loads(open(sys.argv[1], 'rb').read());"
        "module('respond').run(config, inputs, out, Context('cpu', print, partial))"
    )
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    starter = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "job")], env=environment, stdout=subprocess.PIPE
    )
    assert starter.stdout is not None
    starter.stdout.readline()
    family = psutil.Process(starter.pid).children(recursive=True)
    assert len(family) >= 2
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
        assert time.monotonic() < deadline, "a process outlives its starter"
        time.sleep(0.5)
