"""The command as a person types it: `python evolve/main.py ...`, from any folder, writing only what it was asked to."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from evolve.config import ROOT

MAIN = ROOT / "evolve" / "main.py"


def evolve(cwd: Path, *words: str, python: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    """The command, run in `cwd` with its output below it."""
    return subprocess.run(
        [sys.executable, *python, MAIN, *words, f"output={cwd / 'out'}"],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


WRONG = {
    "loss.alph=0.5": ["loss.alph: unknown key", "did you mean loss.alpha?"],
    "+loss.alph=0.5": ["loss.alph: unknown key", "did you mean loss.alpha?"],
    "loss.alpha=1.5": ["loss.alpha=1.5", "less than or equal to 1"],
    "strategy=forest": ["strategy=forest: no such choice", "chain, few_shot, parallel, tree"],
    "filter=rule strategy=tree": ["strategy.expand=best", "strategy.expand=every"],
    "data=ultrafeedback data.path=no.jsonl": ["data.path=no.jsonl: no such file"],
    "strategy=chain,tree": ["strategy=chain,tree", "--multirun"],
    "strategy=null": ["strategy"],
    "-m strategy=chain,tree loss.alpha=0.5,1.5": ["loss.alpha=1.5", "less than or equal to 1"],
    "-m strategy=chain,forest": ["strategy=forest: no such choice", "chain, few_shot, parallel, tree"],
    "-m strategy=chain,tree filter=verifier,rule": ["strategy.expand=best", "strategy.expand=every"],
    "-m loss.alph=0.5,1": ["loss.alph: unknown key", "did you mean loss.alpha?"],
    "experiment=figure5 filter=rule": ["filter.name=rule", "strategy.name=parallel"],
}


@pytest.mark.parametrize("command", WRONG)
def test_wrong_command_is_one_line_and_writes_nothing(tmp_path: Path, command: str) -> None:
    done = evolve(tmp_path, *command.split())
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert [part for part in WRONG[command] if part not in done.stderr] == []
    assert not list(tmp_path.iterdir())


LOOKS = {
    "--help": ["strategy=chain,tree", "few_shot", "beta_refine"],
    "--cfg job": ["alpha: 0.8", "name: chain"],
    "dry_run=true resources=slurm": ["warning: resources are Slurm's, but stages run right here"],
    "dry_run=true": ["1 member:", "0 reused", "first data", "strategy=chain loss=both"],
    "-m dry_run=true strategy=chain,tree loss=sft,both": ["4 members", "strategy=tree loss=both", "iteration 3"],
    "experiment=figure5 dry_run=true": ["4 members", "strategy=few_shot"],
}


@pytest.mark.parametrize("command", LOOKS)
def test_looking_writes_nothing_and_imports_nothing_heavy(tmp_path: Path, command: str) -> None:
    done = evolve(tmp_path, *command.split(), python=("-X", "importtime"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert [part for part in LOOKS[command] if part not in done.stdout] == []
    imported = {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines() if "import time:" in line}
    assert "omegaconf" in imported
    assert imported.isdisjoint({"torch", "transformers", "trl", "datasets", "wandb", "matplotlib"})
    assert [line for line in done.stderr.splitlines() if "import time:" not in line] == []
    assert not list(tmp_path.iterdir())


def test_plan_is_a_matrix_of_members_and_phases(tmp_path: Path) -> None:
    done = evolve(tmp_path, "-m", "dry_run=true", "iteration.count=1", "strategy=chain,tree", "loss=both,sft_only")
    rows = {row[0]: row[1:] for line in done.stdout.splitlines() if len(row := cells(line)) > 1}
    assert rows["member"] == ["setup", "base", "sft", "offline", "iteration 1"]
    first = rows["strategy=chain loss=both"]
    assert all(cell.endswith(" new") for cell in first)
    shared = [f"~{cell.removesuffix(' new')}" for cell in first]
    assert rows["strategy=chain loss=sft_only"][1:] == [*shared[1:3], "-", "-"]
    assert rows["strategy=tree loss=both"][1:4] == shared[1:4]
    assert " new + ~" in rows["strategy=tree loss=both"][4]  # new answers, to the same prompts


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.replace("┃", "│").split("│")[1:-1]]


def test_plan_without_the_hub(tmp_path: Path) -> None:
    """The paper's size can be planned where its weights are not: what is open is said."""
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    done = evolve(tmp_path, "scale=paper", "dry_run=true", **nowhere)
    assert done.returncode == 0, done.stderr[-500:]
    assert "warning: model.path=meta-llama/Llama-3.1-8B: the hub can't be reached" in done.stdout
    assert "iteration 3" in done.stdout


def test_run_without_the_hub_is_refused(tmp_path: Path) -> None:
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    done = evolve(tmp_path, "scale=paper", "engine=hf", **nowhere)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr[-500:]
    assert "model.path=meta-llama/Llama-3.1-8B: not in the local cache" in done.stderr
    assert not (tmp_path / "out").exists()


def test_paths_are_the_users_first(tmp_path: Path) -> None:
    """A path given on the command line is looked for where the command is given."""
    (tmp_path / "mine.txt").write_text("Q: {prompt}\nA: {response}\n")
    done = evolve(tmp_path, "template.path=mine.txt", "dry_run=true")
    assert (done.returncode, done.stderr) == (0, "")
    subprocess.run([sys.executable, MAIN, "dry_run=true"], cwd=tmp_path, check=True, capture_output=True, timeout=300)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("tool", ["sweeps.report", "sweeps.wandb_log", "sweeps.workspace"])
def test_tools_explain_themselves(tmp_path: Path, tool: str) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", tool, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)

    assert run("--help").returncode == 0 and "FOLDER" in run("--help").stdout
    assert run().returncode == 2
    wrong = run(str(tmp_path))
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1) and "no sweep.json" in wrong.stderr
