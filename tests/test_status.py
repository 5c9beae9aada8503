"""How a sweep stands, where no Slurm is: from the store and the sweep's folder alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import sweep_here

from evolve import slurm
from evolve.config import ROOT, ConfigError
from evolve.states import load, look
from evolve.store import seal, unseal

MEMBER = ["loss=none", "loss.pt=none", "loss.sft_direct=0", "debug=fast", "data.eval_prompts=4", "eval.turns=1"]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep that has ended, of one member: answers of the base model, scored."""
    out = tmp_path_factory.mktemp("status")
    return sweep_here([[*MEMBER, f"output={out}"]]).folder


def command(*words):
    done = subprocess.run(
        [sys.executable, "-m", "evolve.status", *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    return done.returncode, done.stdout, done.stderr


def test_a_sweep_that_has_ended_is_done(swept):
    code, out, _ = command(swept)
    assert code == 0 and "4 done" in out
    assert command(swept.parent.parent)[1] == out  # an output's newest sweep
    code, out, _ = command(swept, "--json")
    assert code == 0 and Counter(state["state"] for state in json.loads(out).values()) == {"done": 4}


def test_what_needs_a_missing_stage_is_blocked(swept, tmp_path):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "store").symlink_to(swept.parent.parent / "store")
    content = unseal((swept / "sweep.json").read_bytes())
    content["needs"] |= {"score/0000000000000000": [], "evaluate/0000000000000000": ["score/0000000000000000"]}
    folder = tmp_path / "sweeps" / "one"
    folder.mkdir()
    (folder / "sweep.json").write_text(seal(content))
    found = look(load(folder)).states
    assert found["score/0000000000000000"].state == "missing"
    assert found["evaluate/0000000000000000"].state == "blocked"
    assert "score/0000000000000000" in found["evaluate/0000000000000000"].message
    assert command(folder)[0] == 1


def test_without_slurm_it_says_what_it_knows(swept, tmp_path):
    """Of a job that Slurm can't be asked about nothing is known, unless it said that it failed."""
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "store").symlink_to(swept.parent.parent / "store")
    content = unseal((swept / "sweep.json").read_bytes())
    open_, failed, after = (f"score/{number:016x}" for number in range(3))
    content["needs"] |= {open_: [], failed: [], after: [failed]}
    folder = tmp_path / "sweeps" / "one"
    folder.mkdir()
    (folder / "sweep.json").write_text(seal(content))

    def submitted(*stages: str) -> None:
        note = {"time": 0, "stages": {stage: [stage[-4:], stage[-2:]] for stage in stages}}
        (folder / "jobs.jsonl").write_text(json.dumps(note) + "\n")

    submitted(open_)
    found = look(load(folder))
    assert found.states[open_].state == "unknown" and "squeue" in found.away
    submitted(open_, failed, after)
    job = slurm.folder(load(folder).store, failed[-4:])
    job.mkdir(parents=True)
    own = {"time": 5.0, "job": failed[-2:], "restarts": 1}
    events = [
        {**own, "event": "start"},
        {**own, "event": "stage", "stage": failed},
        {**own, "event": "again", "stage": failed, "message": "no room"},
        {**own, "event": "failed", "stage": failed, "message": "no room at all"},
    ]
    (job / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events) + '{"time": 6.0, "ev')
    found = look(load(folder))
    assert {stage: found.states[stage].state for stage in (open_, failed, after)} == {
        open_: "unknown",
        failed: "failed",
        after: "blocked",
    }
    assert (found.states[failed].failures, found.states[failed].requeues) == (2, 1)
    code, out, _ = command(folder)
    assert code == 1 and "warning: " in out and "failed 2 times, requeued once  no room at all" in out
    code, out, error = command(folder, "--json")
    assert code == 1 and "squeue" in error and json.loads(out)[open_]["job"] == open_[-2:]


def test_every_stage_is_listed_with_its_time(swept):
    code, out, _ = command(swept, "--stages")
    stages = load(swept).needs
    assert code == 0 and all(stage in out for stage in stages)
    assert all((state.seconds or 0) > 0 for state in look(load(swept)).states.values())


def test_no_sweep_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no sweep"):
        load(tmp_path)
    code, _, error = command(tmp_path)
    assert code == 2 and error.count("\n") == 1 and "no sweep" in error
