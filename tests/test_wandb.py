"""What W&B is told: runs of a finished sweep, read back from their files, and sent to servers, whole and broken."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from evolve.config import ROOT
from evolve.store import seal, unseal
from sweeps import collect, figures, samples, style, wandb_log, wandb_rows
from tests.wandb_server import serve

KEY = "0123456789abcdef0123456789abcdef01234567"  # nobody's
SWEEP = ["-m", "loss=none,sft_only", "debug=fast", "data.eval_prompts=8", "data.sft_pairs=16", "data.offline_pairs=0"]
SWEEP += ["eval.turns=2", "iteration.count=0"]


def run(cwd: Path, *words: str, **more: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": KEY, **more}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def sweep(out: Path, mode: str, **more: str) -> str:
    words = [*SWEEP, f"output={out}", f"wandb.mode={mode}"]
    return run(out.parent, str(ROOT / "evolve" / "main.py"), *words, **more)


def log_again(folder: Path) -> str:
    return run(ROOT, "-m", "sweeps.wandb_log", str(folder))


def sync(folder: Path, url: str) -> None:
    environment = {**os.environ, "WANDB_API_KEY": KEY, "WANDB_BASE_URL": url}
    command = [sys.executable, "-m", "wandb", "sync", f"{folder}/wandb"]
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=300)


def read(path: Path) -> Iterator[Record]:
    """The records of a .wandb file: a 7-byte header, then LevelDB's log format in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def runs(folder: Path) -> list[dict[str, Any]]:
    """Each run in a sweep's folder: id, group, name, kind, config, the rows it logged, its artefacts by type."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        told: dict[str, Any] = {"rows": [], "artifacts": {}, "files": path.parent / "files"}
        for record in read(path):
            if record.WhichOneof("record_type") == "run":
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                told |= {"id": record.run.run_id, "group": record.run.run_group, "name": record.run.display_name}
                told |= {"config": config, "tags": list(record.run.tags), "kind": record.run.job_type}
            elif record.WhichOneof("record_type") == "artifact":
                told["artifacts"].setdefault(record.artifact.type, []).append(record.artifact)
            elif record.WhichOneof("record_type") == "history":
                told["rows"].append(row := {})
                for item in record.history.item:
                    *within, key = item.nested_key or [item.key]
                    (row.setdefault(within[0], {}) if within else row)[key] = json.loads(item.value_json)
        found.append(told)
    return found


def members(folder: Path) -> list[dict[str, Any]]:
    return [one for one in runs(folder) if one["kind"] == "member"]


def value(told: dict[str, Any], key: str) -> dict[str, Any]:
    """What a run logged last under a key."""
    return [row[key] for row in told["rows"] if key in row][-1]


def numbers(row: dict[str, Any]) -> dict[str, Any]:
    return {key: of for key, of in row.items() if key[0] != "_" and not key.startswith("timing/")}


def table(told: dict[str, Any], name: str) -> list[dict[str, Any]]:
    content = json.loads((told["files"] / value(told, name)["path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep's, logged by the sweep's own command."""
    out = tmp_path_factory.mktemp("wandb") / "out"
    stdout = sweep(out, "offline")
    assert "2 members logged" in stdout and "offline, so not sent; wandb sync" in stdout
    (found,) = (out / "sweeps").iterdir()
    return found


def test_one_run_for_each_member(folder: Path) -> None:
    whose, told = collect.load(folder).members, members(folder)
    assert {one["id"] for one in told} == {wandb_rows.member_id(member) for member in whose} and len(told) == 2
    assert {one["name"] for one in told} == {member.name for member in whose} == {"loss=none", "loss=sft_only"}
    assert {one["group"] for one in told} == {folder.name}
    for one in told:
        (member,) = [member for member in whose if wandb_rows.member_id(member) == one["id"]]
        config = {key: value for key, value in one["config"].items() if key != "_wandb"}
        assert config == {k: v for k, v in member.config.items() if k not in ("wandb", "output", "dry_run")}
        assert {"embedded", "chain", member.config["loss"]["name"]} <= set(one["tags"])


def test_metrics_of_each_phase(folder: Path) -> None:
    whose = {wandb_rows.member_id(member): member for member in collect.load(folder).members}
    for one in members(folder):
        rows = [row for row in one["rows"] if "reward/direct" in row]
        measured = whose[one["id"]].measurements
        assert [row["phase"] for row in rows] == list(range(len(measured))) == [0, 1]
        for row, measurement in zip(rows, measured, strict=True):
            turns = measurement.metrics["turns"]
            assert row["reward/direct"] == turns[0]["reward"]["value"]
            assert row["reward/refined"] == turns[-1]["reward"]["value"]
            assert row["accuracy/gain"] == measurement.metrics["gain"]["accuracy"]["value"]
            assert row["reward/refined_low"] <= row["reward/refined"] <= row["reward/refined_high"]


def test_steps_of_training(folder: Path) -> None:
    """What a training stage keeps of its optimiser steps, numbered through the member's phases."""
    whose = {wandb_rows.member_id(member): member for member in collect.load(folder).members}
    for one in members(folder):
        (step,) = [step for step in whose[one["id"]].steps if step["kind"] == "activate"]
        kept = [
            json.loads(line) for line in (folder / "../../store" / step["id"] / "steps.jsonl").read_text().splitlines()
        ]
        rows = [row for row in one["rows"] if "activate/loss" in row]
        assert [row["optimiser_step"] for row in rows] == [row["step"] for row in kept] == list(range(1, len(kept) + 1))
        assert [row["activate/loss"] for row in rows] == [row["loss"] for row in kept]


def test_sample_chains(folder: Path) -> None:
    """The page's own: each turn's answer with its score, and the records that both come from."""
    found = collect.load(folder)
    shown, chosen = samples.chains(found)
    for one in members(folder):
        (place,) = [n for n, member in enumerate(found.members) if wandb_rows.member_id(member) == one["id"]]
        turns = [(chain, turn) for chain in shown if place in chain.members for turn in chain.turns]
        rows = table(one, "samples")
        assert [(row["phase"], row["id"], row["answer"]) for row in rows] == [(c.phase, c.id, t.text) for c, t in turns]
        assert [row["score"] for row in rows] == [turn.score for _, turn in turns] and len(rows) == 2 * 2 * 3
        assert value(one, "samples chosen") == chosen
        for row in rows:
            (answer,) = [
                made["answers"][row["turn"] - 1]["text"]
                for line in found.store.content(row["answers"], "answers.jsonl").splitlines()
                if (made := json.loads(line))["id"] == row["id"]
            ]
            assert row["answer"] == answer
            assert found.store.read(row["record"])["inputs"]["answers"] == row["answers"]  # type: ignore[index]


def test_figures_and_page_belong_to_the_sweep(folder: Path) -> None:
    """To a run of its own, for no member has them alone."""
    (told,) = [one for one in runs(folder) if one["kind"] == "sweep"]
    assert (told["name"], told["group"]) == (folder.name, folder.name)
    (row,) = told["rows"]
    drawn = {path.stem: path for path in folder.glob("*.png")}
    assert {key for key in row if key.startswith("figures/")} == {f"figures/{name}" for name in drawn} and drawn
    for name, path in drawn.items():
        assert (told["files"] / row[f"figures/{name}"]["path"]).read_bytes() == path.read_bytes()
    assert (told["files"] / row["report"]["path"]).read_bytes() == (folder / "report.html").read_bytes()


def test_artefacts_by_reference(folder: Path) -> None:
    """The last model and what it was trained on: where they lie and what the record says, and not a byte of them."""
    found = collect.load(folder)
    whose = {wandb_rows.member_id(member): member for member in found.members}
    for one in members(folder):
        (model,), (data,) = one["artifacts"]["model"], one["artifacts"]["dataset"]
        (trained,) = [step["id"] for step in whose[one["id"]].steps if step["kind"] == "activate"]
        record = found.store.read(trained)
        assert record is not None
        for artifact, stage in ((model, trained), (data, record["inputs"]["pairs"])):
            kept = found.store.read(stage)
            assert kept is not None and artifact.name == stage.replace("/", "-")
            assert json.loads(artifact.metadata) == {
                "stage": stage,
                **{key: kept[key] for key in ("identity", "files")},
            }
            referred = {entry.path: entry for entry in artifact.manifest.contents}
            assert referred.keys() == {*kept["files"], "record.json"}
            for name, entry in referred.items():
                assert entry.ref == (found.store.folder(stage) / name).as_uri() and not entry.local_path
    weights = next((folder / "../../store/activate").resolve().glob("*/model.safetensors")).read_bytes()
    assert not [path for path in folder.rglob("*") if path.is_file() and weights[-256:] in path.read_bytes()]


def test_what_is_sent_is_what_lies_in_the_folder(folder: Path, tmp_path: Path) -> None:
    """Online is offline and then `wandb sync`, so here what the server gets is compared with the folder's files."""
    copy = shutil.copytree(folder, tmp_path / "copy", symlinks=True)
    with serve("whole") as server:
        sync(copy, server.url)
    assert server.history.keys() == {one["id"] for one in runs(folder)}
    for one in runs(folder):
        got = [row for _, row in sorted(server.history[one["id"]].items())]
        assert got == one["rows"] and [row["_step"] for row in got] == list(range(len(got)))
    sent = [v["input"]["artifactCollectionName"] for name, v in server.asked if name == "CreateArtifact"]
    assert {name for name in sent if not name.startswith("run-")} == {
        artifact.name for one in members(folder) for kind in ("model", "dataset") for artifact in one["artifacts"][kind]
    }


@pytest.mark.slow
def test_online_sweep_is_sent_once(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent.parent / "store", tmp_path / "out" / "store")
    with serve("whole") as server:
        stdout = sweep(tmp_path / "out", "online", WANDB_BASE_URL=server.url)
        (mine,) = (tmp_path / "out" / "sweeps").iterdir()
        assert f"W&B     2 members logged in group {mine.name}, sent\n" in stdout
        assert server.history.keys() == {one["id"] for one in runs(mine)}
        asked = len(server.asked)
        assert "W&B" not in sweep(tmp_path / "out", "online", WANDB_BASE_URL=server.url)
        assert len(server.asked) == asked


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refusing", "failing", "silent"])
def test_sweep_ends_well_without_wandb(folder: Path, tmp_path: Path, kind: Any) -> None:
    """Every result is there, the command ends with 0 in bounded time, and a line says what sends the runs later."""
    shutil.copytree(folder.parent.parent / "store", tmp_path / "out" / "store")
    with serve("failing" if kind == "refusing" else kind) as server:
        url = "http://127.0.0.1:9" if kind == "refusing" else server.url  # nobody listens at discard
        stdout = sweep(
            tmp_path / "out", "online", WANDB_BASE_URL=url, WANDB_X_GRAPHQL_RETRY_MAX="1", WANDB_HTTP_TIMEOUT="2"
        )
    (mine,) = (tmp_path / "out" / "sweeps").iterdir()
    reason = {"refusing": "connection refused", "failing": "HTTP 500", "silent": "exceeded"}[kind]
    (line,) = [line for line in stdout.splitlines() if line.startswith("W&B")]
    assert reason in line and line.endswith(f"so not sent; wandb sync {mine}/wandb sends them")
    assert (mine / "report.html").exists() and not any(member.missing for member in collect.load(mine).members)
    with serve("whole") as server:
        sync(mine, server.url)
        assert server.history.keys() == {one["id"] for one in runs(mine)}


def test_nothing_is_logged_twice(folder: Path) -> None:
    before = sorted(folder.glob("wandb/**/*"))
    assert log_again(folder) == ""
    assert "W&B" not in sweep(folder.parent.parent, "offline")
    assert sorted(folder.glob("wandb/**/*")) == before


@pytest.mark.slow
def test_resumed_sweep_goes_on_in_the_same_runs(folder: Path, tmp_path: Path) -> None:
    """What is measured later is logged as later rows, and W&B gets the run as if it had been logged at once."""
    shutil.copytree(folder.parent.parent, tmp_path / "out", symlinks=True)
    copy = tmp_path / "out" / "sweeps" / folder.name
    shutil.rmtree(copy / "wandb")
    (member, other) = collect.load(copy).members
    shutil.rmtree(tmp_path / "out" / "store" / member.measurements[-1].id)
    assert "2 members logged" in log_again(copy)
    assert "1 member logged" in sweep(tmp_path / "out", "offline")
    with serve("whole") as server:
        sync(copy, server.url)
    whole = {one["id"]: one["rows"] for one in members(folder)}
    for one in (member, other):
        rows = [row for _, row in sorted(server.history[wandb_rows.member_id(one)].items())]
        assert [row["_step"] for row in rows] == list(range(len(rows)))
        known = [row for row in whole[wandb_rows.member_id(one)] if "samples" not in row]
        assert [numbers(row) for row in rows if "samples" not in row] == [numbers(row) for row in known]


def test_what_is_damaged_is_not_told(folder: Path, tmp_path: Path) -> None:
    """In a line of each file, and nothing else is lost."""
    copied = shutil.copytree(folder.parent.parent, tmp_path / "out") / "sweeps" / folder.name
    shutil.rmtree(copied / "wandb")
    damaged = list(copied.parent.parent.glob("store/activate/*/steps.jsonl"))
    for file in damaged:
        file.write_bytes(file.read_bytes()[::-1])
    for words in (["sweeps.workspace", str(copied), "--dry-run"], ["sweeps.wandb_log", str(copied)]):
        command = [sys.executable, "-m", *words]
        environment = {**os.environ, "WANDB_API_KEY": KEY}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("\n") == done.stderr.count("steps.jsonl is not what was written") == len(damaged) > 0
    rows = [row for one in members(copied) for row in one["rows"]]
    assert not [row for row in rows if "activate/loss" in row] and [row for row in rows if "reward/refined" in row]


@pytest.mark.parametrize("module", ["wandb_log", "workspace"])
def test_what_cannot_be_written_is_one_line(
    folder: Path, module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    command = importlib.import_module(f"sweeps.{module}")
    monkeypatch.setattr(figures, "write", full)
    monkeypatch.setattr(wandb_log, "pending", lambda sweep: [(sweep.members[0], sweep.members[0].measurements)])
    monkeypatch.setattr(wandb_log, "_run", full)
    monkeypatch.setattr(sys, "argv", [module, str(folder), *(["--dry-run"] if module == "workspace" else [])])
    assert command.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "No space left on device" in said and said.count("\n") == 1


def test_lost_marker_continues_the_same_run(folder: Path, tmp_path: Path) -> None:
    """Logged elsewhere, a member is the same run: its id comes from what it is, not from where or when."""
    shutil.copytree(folder.parent.parent, tmp_path / "out")
    copy = tmp_path / "out" / "sweeps" / folder.name
    shutil.rmtree(copy / "wandb")
    assert "2 members logged" in log_again(copy)
    assert {one["id"] for one in runs(copy)} == {one["id"] for one in runs(folder)}


def test_equal_members_are_one_run(folder: Path, tmp_path: Path) -> None:
    """Seeds of what draws nothing: the same stages, so the same numbers, which are logged once."""
    shutil.copytree(folder.parent.parent, tmp_path / "out")
    copy = tmp_path / "out" / "sweeps" / folder.name
    shutil.rmtree(copy / "wandb")
    content = unseal((copy / "sweep.json").read_bytes())
    first = content["members"][0]
    content["members"].append({**first, "name": "seed=1", "config": {**first["config"], "seed": 1}})
    (copy / "sweep.json").write_text(seal(content))
    assert "2 members logged" in log_again(copy)
    told, whole = (sorted(members(of), key=lambda one: one["name"]) for of in (copy, folder))
    for one, before in zip(told, whole, strict=True):
        assert (one["name"], one["id"]) == (before["name"], before["id"])
        assert list(map(numbers, one["rows"][:-1])) == list(map(numbers, before["rows"][:-1]))
        assert one["config"]["seed"] == before["config"]["seed"]
    assert log_again(copy) == ""


def test_a_phase_has_one_number_in_every_sweep(folder: Path) -> None:
    """Here nothing is trained offline, and no other member is either: 2 stays offline's."""
    found = collect.load(folder)
    for member in found.members:
        base, trained = member.measurements
        rows = wandb_rows.rows(found, member, [base, replace(trained, phase="iteration 1")])
        assert [row["phase"] for row in rows if "phase" in row] == [0, 3]


def test_disabled_writes_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent.parent / "store", tmp_path / "out" / "store")
    assert "W&B" not in sweep(tmp_path / "out", "disabled")
    assert not list(tmp_path.rglob("*wandb*"))


def test_no_key_in_any_file(folder: Path) -> None:
    files = [path for path in folder.parent.parent.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


def workspace(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    command = [sys.executable, "-m", "sweeps.workspace", *words]
    home = {"HOME": "/nonexistent", "OMP_NUM_THREADS": "1"}  # no key in ~/.netrc
    return subprocess.run(command, cwd=ROOT, env=kept | home | more, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def payload(folder: Path) -> dict[str, Any]:
    done = workspace(str(folder), "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    made: dict[str, Any] = json.loads(done.stdout)
    return made


def panels(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for part in section["panelBankConfig"]["sections"] for panel in part["panels"]]


def named(panel: dict[str, Any]) -> Iterator[str]:
    """The keys of runs that a panel shows."""
    config = panel["config"]
    yield from config.get("metrics", [])
    yield from config.get("mediaKeys", [])
    yield from [config["xAxis"]] if "xAxis" in config else []
    if panel["viewType"] == "Weave":
        yield config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]


def test_panels_show_what_runs_log(folder: Path, payload: dict[str, Any]) -> None:
    logged = {key for one in runs(folder) for row in one["rows"] for key in row}
    section = payload["spec"]["section"]
    shown = {key for panel in panels(section) for key in named(panel)}
    assert shown <= logged
    left_out = {key for key in logged - shown if not key.startswith("_") and not key.endswith(("_low", "_high"))}
    assert left_out == {"samples chosen"}  # which is in the panel of text
    (text,) = [panel["config"]["value"] for panel in panels(section) if panel["viewType"] == "Markdown Panel"]
    assert text in {row["samples chosen"] for one in members(folder) for row in one["rows"] if "samples chosen" in row}
    (runset,) = section["runSets"]
    assert [name for name in runset["runFeed"]["columnOrder"] if name != "run:displayName"] == [
        "summary:reward/direct",
        "summary:reward/refined",
        "summary:reward/gain",
    ]


def test_lines_go_over_the_axis_that_their_rows_have(folder: Path, payload: dict[str, Any]) -> None:
    rows = [row for one in members(folder) for row in one["rows"]]
    lines = [panel["config"] for panel in panels(payload["spec"]["section"]) if "xAxis" in panel["config"]]
    assert {line["xAxis"] for line in lines} == {"phase", "optimiser_step"}
    for line in lines:
        (metric,) = line["metrics"]
        assert all(line["xAxis"] in row for row in rows if metric in row)


def test_runs_of_this_sweep_in_the_colours_of_its_figures(folder: Path, payload: dict[str, Any]) -> None:
    section = payload["spec"]["section"]
    (condition,) = section["runSets"][0]["filters"]["filters"]
    assert (condition["key"], condition["op"]) == ({"section": "run", "name": "name"}, "IN")
    assert set(condition["value"]) == {one["id"] for one in runs(folder)} and len(condition["value"]) == 3
    whose = collect.load(folder).members
    looks = style.styles([member.name for member in whose])
    assert section["customRunColors"] == {wandb_rows.member_id(one): looks[one.name][0] for one in whose}


def test_workspace_is_saved(folder: Path, payload: dict[str, Any]) -> None:
    with serve("whole") as server:
        done = workspace(str(folder), WANDB_API_KEY=KEY, WANDB_BASE_URL=server.url)
    assert (done.returncode, done.stderr) == (0, "")
    (view,) = [variables for name, variables in server.asked if name == "UpsertView2"]
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("someone", "evolve", folder.name)
    section = json.loads(view["spec"])["section"]
    assert [list(named(panel)) for panel in panels(section)] == [
        list(named(panel)) for panel in panels(payload["spec"]["section"])
    ]
    assert done.stdout.startswith(f"{server.url}/someone/evolve?nw=") and done.stdout.count("\n") == 1


def test_refusals_of_a_workspace_are_one_line(folder: Path, tmp_path: Path) -> None:
    for words, more, said in (
        ([str(tmp_path)], {}, "no sweep.json"),
        ([str(folder)], {}, "no key of W&B"),
        ([str(folder)], {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "connection refused"),
    ):
        done = workspace(*words, WANDB_X_GRAPHQL_RETRY_MAX="1", **more)
        assert done.returncode and done.stdout == "" and done.stderr.startswith("error: ")
        assert said in done.stderr and done.stderr.count("\n") == 1
