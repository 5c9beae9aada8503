"""Sweeps run for real, at their smallest: reuse, failure, kill at any moment, damage, two at once, stock launchers."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from evolve import launch, world
from evolve.config import ROOT
from evolve.store import Store, hash_file

SMALL = {
    "debug": "fast",
    "data.eval_prompts": 8,
    "data.sft_pairs": 16,
    "data.offline_pairs": 16,
    "data.prompts": 8,
    "eval.turns": 2,
    "trainer.batch_size": 8,
    "trainer.micro_batch": 8,
}
SWEEP = ["-m", "strategy=chain,tree", "loss=sft,both"]
MEMBER = ["strategy=chain", "loss=both"]  # one of them, alone
PATIENCE = 300  # seconds; nothing here should take a tenth of it


def command(out: Path, *words: str) -> list[str]:
    small = [f"{key}={value}" for key, value in SMALL.items()]
    return [sys.executable, str(ROOT / "evolve" / "main.py"), *words, *small, f"output={out}"]


def evolve(out: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(out, *words), cwd=out.parent, capture_output=True, text=True, timeout=PATIENCE)


@contextlib.contextmanager
def started(out: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own; whatever is left of it is killed at the end."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command(out, *words),
        cwd=out.parent,
        stdout=pipe,
        stderr=pipe,
        text=True,
        start_new_session=True,
        # Tests that are run in the background inherit an ignored SIGINT, and Python then leaves it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.002)
    raise TimeoutError


def builder(out: Path, kind: str) -> int | None:
    """The process that is in the middle of a stage of this kind."""
    for lease in out.glob(f"store/{kind}/.*.lease"):
        with contextlib.suppress(FileNotFoundError, ValueError):
            pid = json.loads(lease.read_text())["pid"]
            if list(lease.parent.glob(f".tmp-{lease.stem[1:]}-*")):
                return pid
    return None


def all_gone(processes: list[psutil.Process]) -> bool:
    def gone(process: psutil.Process) -> bool:
        try:
            return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return all(map(gone, processes))


def records(out: Path) -> dict[str, dict[str, Any]]:
    store = Store(out / "store")
    return {stage_id: store.read(stage_id) or {} for stage_id in store.ids()}


def contents(out: Path) -> dict[str, dict[str, Any]]:
    """What stages made, by id: each file's size and hash."""
    return {stage_id: record["files"] for stage_id, record in records(out).items()}


def times(out: Path) -> dict[Path, int]:
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.glob("store/*/*/record.json")}


def left_over(out: Path) -> list[Path]:
    return [*out.glob("store/*/.*"), *out.glob("store/quarantine/*")]


@contextlib.contextmanager
def watched(out: Path) -> Iterator[Counter[str]]:
    """Counts how often each stage is built, by the folders that appear while it is."""
    seen: set[str] = set()
    builds: Counter[str] = Counter()
    stop = threading.Event()

    def look() -> None:
        while not stop.wait(0.001):
            found = out.glob("store/*/.tmp-*-*")
            seen.update(path.name for path in found if path.suffix != ".owner" and ".tmp-lease" not in path.name)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield builds
    finally:
        stop.set()
        thread.join()
        builds.update(name.split("-")[1] for name in seen)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of one small sweep that nothing disturbed; read, or copied, by the others."""
    out = tmp_path_factory.mktemp("finished") / "out"
    done = evolve(out, *SWEEP)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (out.parent / "stdout").write_text(done.stdout)
    return out


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


# ---- a sweep that nothing disturbs, and reuse


@pytest.mark.slow
def test_losses_of_other_papers_run(tmp_path: Path) -> None:
    """Each first step's value is checked while they train (evolve/trainer.py), so the references are the right ones."""
    out = tmp_path / "out"
    done = evolve(out, "-m", "loss=rpo,ipo,simpo,sppo,srpo")
    assert done.returncode == 0, done.stdout + done.stderr
    (folder,) = (out / "sweeps").iterdir()
    trained = {}
    for member in json.loads((folder / "sweep.json").read_text())["members"]:
        last = [step["id"] for step in member["steps"] if step["kind"] == "train"][-1]
        trained[member["name"]] = contents(out)[last]["model.safetensors"]
    assert len({str(weights) for weights in trained.values()}) == len(trained) == 5


def test_sweep_ends_with_table_figures_and_records(finished: Path) -> None:
    (folder,) = (finished / "sweeps").iterdir()
    members = json.loads((folder / "sweep.json").read_text())["members"]
    names = [f"strategy={strategy} loss={loss}" for strategy in ("chain", "tree") for loss in ("sft", "both")]
    assert [member["name"] for member in members] == names
    rows = list(csv.DictReader((folder / "table.csv").open()))
    phases = ["base", "sft", "offline", "iteration 1"]
    assert {(row["member"], row["phase"]) for row in rows} == {(name, phase) for name in names for phase in phases}
    assert all(float(row["low"]) <= float(row["value"]) <= float(row["high"]) for row in rows)
    assert_generated(finished, rows)
    table = (folder / "table.md").read_text()
    assert all(name in table for name in names) and "missing" not in table and "| generated | 0 | 0 | 0 |" in table
    figures = [f"{kind}-{metric}.png" for kind in ("iterations", "turns") for metric in ("reward", "accuracy")]
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in figures)
    stdout = (finished.parent / "stdout").read_text()
    assert "strategy=tree loss=both" in stdout and str(folder) in stdout


def assert_generated(out: Path, rows: list[dict[str, str]]) -> None:
    """Each row says what its member had generated for training by then: evaluation's answers are not among it."""
    (folder,) = (out / "sweeps").iterdir()
    made = records(out)
    for member in json.loads((folder / "sweep.json").read_text())["members"]:
        expected = 0
        for step in member["steps"]:
            if step["kind"] == "reinforce":
                expected += made[step["id"]]["tokens"]["generated"]
            if step["kind"] == "pair":
                expected += made[made[step["id"]]["inputs"]["answers"]]["tokens"]["generated"]
            if step["kind"] == "evaluate":
                told = {r["generated"] for r in rows if (r["member"], r["phase"]) == (member["name"], step["phase"])}
                assert told == {str(expected)}
        assert expected > 0


def test_records_are_whole(finished: Path) -> None:
    made = records(finished)
    (folder,) = (finished / "sweeps").iterdir()
    steps = {step["id"] for m in json.loads((folder / "sweep.json").read_text())["members"] for step in m["steps"]}
    assert made.keys() == steps
    for stage_id, record in made.items():
        stage = finished / "store" / stage_id
        said = {"versions", "code", "host", "started", "seconds", "devices", "inputs", "dropped", "tokens"}
        assert said <= record.keys()
        assert record["files"].keys() == {path.name for path in stage.iterdir()} - {"record.json"}
        assert all(hash_file(stage / name) == entry["sha256"] for name, entry in record["files"].items())
        inputs = [item for item in record["inputs"].values() if "/" in item]
        assert all(item in made for item in inputs)
    assert left_over(finished) == []


def test_same_command_runs_nothing(finished: Path) -> None:
    before = times(finished)
    done = evolve(finished, *SWEEP)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"{len(before)} reused, 0 new" in done.stdout and "\nran " not in done.stdout
    assert times(finished) == before
    assert len(list((finished / "sweeps").iterdir())) == 1


def test_another_member_runs_only_what_is_new(copied: Path) -> None:
    before = times(copied)
    done = evolve(copied, "-m", "strategy=chain,tree,parallel", "loss=sft")
    assert (done.returncode, done.stderr) == (0, "")
    after = times(copied)
    assert {path: after[path] for path in before} == before
    new = {str(path).split("/")[1] for path in after.keys() - before.keys()}
    assert new == {"respond", "score", "pair", "reference", "train", "evaluate"}
    assert f" {len(after) - len(before)} new" in done.stdout
    made = [record["identity"] for stage_id, record in records(copied).items() if stage_id.startswith("pair/")]
    assert len(made) == len(list((copied / "store" / "pair").iterdir())) == 5


def test_plan_says_why(finished: Path) -> None:
    before = times(finished)
    done = evolve(finished, *MEMBER, "loss.alpha=0.5", "dry_run=true")
    assert done.returncode == 0 and "loss.alpha: 0.8 -> 0.5" in done.stdout
    assert "seed: 0 -> 7" in evolve(finished, *MEMBER, "seed=7", "dry_run=true").stdout
    assert times(finished) == before and len(list((finished / "sweeps").iterdir())) == 1


@pytest.mark.slow
def test_losses_on_pairs_and_on_rewards_in_one_sweep(tmp_path: Path) -> None:
    """They stand in one table, with the same activation and prompts, and with what each has generated."""
    out = tmp_path / "out"
    words = ["-m", "loss=grpo,gspo,none", "iteration.count=2", "wandb.mode=offline"]
    done = evolve(out, *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (folder,) = (out / "sweeps").iterdir()
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert_generated(out, rows)
    phases = {name: [r["phase"] for r in rows if r["member"] == name] for name in ("loss=grpo", "loss=gspo")}
    assert [list(dict.fromkeys(found)) for found in phases.values()] == [
        ["base", "sft", "iteration 1", "iteration 2"]
    ] * 2
    made = contents(out)
    assert len([stage_id for stage_id in made if stage_id.startswith("activate/")]) == 1
    prompts = {record["inputs"]["prompts"] for name, record in records(out).items() if name.startswith("reinforce/")}
    assert prompts < {
        record["inputs"]["prompts"] for name, record in records(out).items() if name.startswith("respond/")
    }
    assert left_over(out) == []
    again = evolve(out, *words)
    assert again.returncode == 0 and " 0 new" in again.stdout


# ---- failure


def test_failure_stops_only_what_depends_on_it(tmp_path: Path) -> None:
    """One pair in eight is too long: allowed by one member, not by the other."""
    rows = world.rows(64, seed=0)
    for row in rows[::8]:
        row["chosen"] = " ".join([row["chosen"]] * 20)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ["-m", "trainer.max_dropped=0.5,0", "data.path=rows.jsonl", "loss=both"]
    done = evolve(out, *words)
    assert done.returncode == 1, done.stdout + done.stderr
    failed = [line for line in done.stdout.splitlines() if "FAILED" in line]
    assert failed and all("longer than data.max_length" in line and "max_dropped=0)" in line for line in failed)
    log = Path(done.stdout.split("log: ")[1].splitlines()[0])
    assert "Traceback" in log.read_text()
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "tries again" in done.stderr
    (folder,) = (out / "sweeps").iterdir()
    measured = {(row["member"], row["phase"]) for row in csv.DictReader((folder / "table.csv").open())}
    assert ("trainer.max_dropped=0.5", "iteration 1") in measured and ("trainer.max_dropped=0", "base") in measured
    assert ("trainer.max_dropped=0", "sft") not in measured and "missing" in (folder / "table.md").read_text()
    assert left_over(out) == []

    before = times(out)
    again = evolve(out, *words)
    assert again.returncode == 1 and again.stdout.count("FAILED") == len(failed)
    assert times(out) == before


@pytest.mark.slow
def test_killed_worker_fails_its_stage_alone(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with started(out, *MEMBER) as process:
        os.kill(wait_for(lambda: builder(out, "activate")), signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1, stdout + stderr
    assert "its worker process ended by signal 9" in stdout and "error: 1 stage(s) failed (activate/" in stderr
    assert [stage_id for stage_id in contents(out) if stage_id.startswith("evaluate/")] != []  # the base's
    completes_as(finished, out)


def completes_as(finished: Path, out: Path) -> None:
    """The same command, given again, ends as if nothing had happened, byte for byte."""
    done = evolve(out, *MEMBER)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    (folder,) = (out / "sweeps").iterdir()
    steps = {step["id"] for step in json.loads((folder / "sweep.json").read_text())["members"][0]["steps"]}
    made, expected = contents(out), contents(finished)
    assert made.keys() == steps and made == {stage_id: expected[stage_id] for stage_id in steps}
    # A kill in the instant in which a lease is taken leaves a file of some bytes that `evolve.store prune` removes.
    assert [path for path in left_over(out) if not path.name.startswith(".tmp-lease-")] == []


@pytest.mark.parametrize(
    ("whom", "when"), [("main", "activate"), pytest.param("group", "train", marks=pytest.mark.slow)]
)
def test_killed_command_goes_on_where_it_was(finished: Path, tmp_path: Path, whom: str, when: str) -> None:
    out = tmp_path / "out"
    with started(out, *MEMBER) as process:
        wait_for(lambda: builder(out, when))
        family = psutil.Process(process.pid).children(recursive=True)
        (os.kill if whom == "main" else os.killpg)(process.pid, signal.SIGKILL)
        process.wait(PATIENCE)
        assert family
        wait_for(lambda: all_gone(family))
    completes_as(finished, out)


@pytest.mark.parametrize("when", ["data", "activate"])
def test_interrupted_command_leaves_nothing_behind(tmp_path: Path, when: str) -> None:
    out = tmp_path / "out"
    with started(out, *MEMBER) as process:
        wait_for(lambda: builder(out, when))
        family = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, stderr = process.communicate(timeout=PATIENCE)
        assert process.returncode == 130
        assert stderr == "stopped; what was finished is kept, and the same command goes on from there\n"
        wait_for(lambda: all_gone(family))
    assert left_over(out) == []
    assert all(contents(out).values())


# ---- damage


@pytest.mark.slow
def test_damaged_result_is_never_used(copied: Path, finished: Path) -> None:
    (model,) = copied.glob("store/activate/*/model.safetensors")
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    words = [*MEMBER, "loss.alpha=0.5"]
    done = evolve(copied, *words)
    assert done.returncode == 1
    assert "model.safetensors is not what was written" in done.stdout and "the same command" in done.stdout
    assert not model.exists() and list(copied.glob("store/quarantine/activate-*"))
    assert contents(copied).items() <= contents(finished).items()  # nothing was made of it

    done = evolve(copied, *words)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    made, expected = contents(copied), contents(finished)
    assert {stage_id: made[stage_id] for stage_id in expected} == expected


@pytest.mark.parametrize("damage", ["cut", "removed", "record"])
def test_plan_sees_what_is_damaged(copied: Path, damage: str) -> None:
    (model,) = copied.glob("store/activate/*/model.safetensors")
    if damage == "cut":
        model.write_bytes(model.read_bytes()[:-1])
    elif damage == "removed":
        model.unlink()
    else:
        record = model.with_name("record.json")
        record.write_text(record.read_text().replace('"epochs": 1', '"epochs": 2'))
    done = evolve(copied, *MEMBER, "dry_run=true")
    assert done.returncode == 0 and " 1 new" in done.stdout and "a damaged result" in done.stdout


def test_a_report_that_breaks_hides_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def breaks(planned: launch.Planned) -> None:
        raise KeyError("a table")

    monkeypatch.setattr(launch, "report", breaks)
    planned: Any = SimpleNamespace(folder=tmp_path)
    with pytest.raises(launch.Failed, match=r"^2 stages failed$"):
        launch.conclude(planned, "2 stages failed")
    said = capsys.readouterr().err
    assert said == f"no report: KeyError: 'a table'; python -m sweeps.report {tmp_path} tries again\n"
    with pytest.raises(KeyError):
        launch.conclude(planned)


# ---- several processes


@pytest.mark.slow
def test_two_commands_at_once_share_the_work(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with watched(out) as builds, started(out, *SWEEP) as one, started(out, *SWEEP) as other:
        ended = [process.communicate(timeout=PATIENCE) for process in (one, other)]
    assert [process.returncode for process in (one, other)] == [0, 0], ended
    assert contents(out) == contents(finished)
    assert set(builds.values()) == {1}
    ran = [int(stdout.split("\nran ")[1].split()[0]) for stdout, _ in ended]
    assert sum(ran) == len(contents(finished)), "each stage is run by one command, and counted there"
    assert left_over(out) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30"],
    ],
    ids=["joblib", "submitit_local"],
)
def test_stock_launchers_compute_each_stage_once(finished: Path, tmp_path: Path, launcher: list[str]) -> None:
    out = tmp_path / "out"
    with watched(out) as builds:
        done = evolve(out, *SWEEP, *launcher)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(out) == contents(finished)
    assert set(builds.values()) == {1}
    (folder,) = [path for path in (out / "sweeps").iterdir() if (path / "table.md").exists()]
    (expected,) = (finished / "sweeps").iterdir()
    assert (folder / "table.md").read_text() == (expected / "table.md").read_text()
