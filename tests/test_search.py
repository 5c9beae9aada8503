"""A search over settings: it goes by what members achieved, and goes on from the store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from test_cli import evolve

from evolve.store import Store

pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")

SPACE = ["-m", "hydra/sweeper=search", "loss.alpha=interval(0,1)", "model.beta=interval(0.1,1)"]
SMALL = ["debug=fast", "data.eval_prompts=8", "data.prompts=8", "eval.turns=2", "hydra.sweeper.n_jobs=2"]


def objectives(out: Path) -> dict[str, float]:
    """By member, the refined reward of its last evaluation."""
    store, found = Store(out / "store"), {}
    for sweep in out.glob("sweeps/*/sweep.json"):
        for member in json.loads(sweep.read_text())["members"]:
            last = [step["id"] for step in member["steps"] if step["id"].startswith("evaluate/")][-1]
            found[member["name"]] = store.read(last)["values"]["refined"]
    return found


@pytest.mark.slow
def test_the_best_member_is_named_and_the_same_search_makes_nothing_anew(tmp_path: Path) -> None:
    command = [*SPACE, *SMALL, "hydra.sweeper.n_trials=3"]
    done = evolve(tmp_path, *command)
    assert done.returncode == 0, done.stderr
    reward = objectives(tmp_path / "out")
    assert len(reward) == 3 and done.stdout.count("\nplan ") + done.stdout.startswith("plan ") == 2
    best = yaml.safe_load((tmp_path / "out" / "hydra" / "optimization_results.yaml").read_text())
    assert best["best_value"] == max(reward.values())
    name = " ".join(f"{key}={value}" for key, value in best["best_params"].items())
    assert reward[name] == best["best_value"] and f"by {name}\n" in done.stdout
    again = evolve(tmp_path, *command)
    assert again.stdout.count(" 0 new") == 2 and objectives(tmp_path / "out") == reward


@pytest.mark.slow
def test_a_member_that_fails_ends_the_search(tmp_path: Path) -> None:
    done = evolve(tmp_path, *SPACE, *SMALL, "trainer.max_loss_growth=1.0000001")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: 1 stage(s) failed")  # Optuna's sweeper says it, too
    assert "Traceback" not in done.stderr and "overrides" not in done.stderr


def test_a_searchs_plan_is_its_first_batchs(tmp_path: Path) -> None:
    done = evolve(tmp_path, *SPACE, *SMALL, "dry_run=true")
    assert done.returncode == 2 and "2 members" in done.stdout
    assert done.stderr.startswith("error: dry_run=true") and done.stderr.count("\n") == 1
    assert not list(tmp_path.glob("out/store/*/*/record.json"))
