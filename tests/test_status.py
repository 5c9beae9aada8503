"""How a sweep stands, where no Slurm is: from the store and the sweep's folder alone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter

import pytest
from conftest import sweep_here

from evolve import status
from evolve.config import ROOT, ConfigError

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
    content = json.loads((swept / "sweep.json").read_text())
    content["needs"] |= {"score/0000000000000000": [], "evaluate/0000000000000000": ["score/0000000000000000"]}
    folder = tmp_path / "sweeps" / "one"
    folder.mkdir()
    (folder / "sweep.json").write_text(json.dumps(content))
    found = status.states(status.load(folder))
    assert found["score/0000000000000000"].state == "missing"
    assert found["evaluate/0000000000000000"].state == "blocked"
    assert "score/0000000000000000" in found["evaluate/0000000000000000"].message
    assert command(folder)[0] == 1


def test_no_sweep_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="no sweep"):
        status.load(tmp_path)
    code, _, error = command(tmp_path)
    assert code == 2 and error.count("\n") == 1 and "no sweep" in error
