"""What W&B is told: offline runs of a finished sweep, read back from their files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from wandb.proto.wandb_internal_pb2 import Record

from evolve.config import ROOT
from sweeps import collect, wandb_log

KEY = "0123456789abcdef0123456789abcdef01234567"  # nobody's
SWEEP = ["-m", "loss=none,sft_only", "debug=fast", "data.eval_prompts=8", "data.sft_pairs=16", "data.offline_pairs=0"]
SWEEP += ["eval.turns=2", "iteration.count=0"]


def run(cwd: Path, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": KEY}
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def sweep(out: Path, mode: str) -> str:
    return run(out.parent, str(ROOT / "evolve" / "main.py"), *SWEEP, f"output={out}", f"wandb.mode={mode}")


def log_again(folder: Path) -> str:
    return run(ROOT, "-m", "sweeps.wandb_log", str(folder))


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
    """Each offline run in a sweep's folder: id, group, name, config, and the rows it logged."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        told: dict[str, Any] = {"rows": []}
        for record in read(path):
            if record.WhichOneof("record_type") == "run":
                config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                told |= {"id": record.run.run_id, "group": record.run.run_group, "name": record.run.display_name}
                told |= {"config": config, "tags": list(record.run.tags)}
            elif record.WhichOneof("record_type") == "history":
                items = record.history.item
                told["rows"].append({"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
        found.append(told)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep's, logged by the sweep's own command."""
    out = tmp_path_factory.mktemp("wandb") / "out"
    stdout = sweep(out, "offline")
    assert "2 runs logged offline" in stdout
    (found,) = (out / "sweeps").iterdir()
    return found


def test_one_run_for_each_member(folder: Path) -> None:
    members, told = collect.load(folder).members, runs(folder)
    assert {one["id"] for one in told} == {wandb_log.run_id(member) for member in members} and len(told) == 2
    assert {one["name"] for one in told} == {member.name for member in members} == {"loss=none", "loss=sft_only"}
    assert {one["group"] for one in told} == {folder.name}
    for one in told:
        (member,) = [member for member in members if wandb_log.run_id(member) == one["id"]]
        config = {key: value for key, value in one["config"].items() if key != "_wandb"}
        assert config == {k: v for k, v in member.config.items() if k not in ("wandb", "output", "dry_run")}
        assert {"embedded", "chain", member.config["loss"]["name"]} <= set(one["tags"])


def test_metrics_of_each_phase(folder: Path) -> None:
    members = {wandb_log.run_id(member): member for member in collect.load(folder).members}
    for one in runs(folder):
        rows = [row for row in one["rows"] if "reward/direct" in row]
        measured = members[one["id"]].measurements
        assert [row["phase"] for row in rows] == list(range(len(measured))) == [0, 1]
        for row, measurement in zip(rows, measured, strict=True):
            turns = measurement.metrics["turns"]
            assert row["reward/direct"] == turns[0]["reward"]["value"]
            assert row["reward/refined"] == turns[-1]["reward"]["value"]
            assert row["accuracy/gain"] == measurement.metrics["gain"]["accuracy"]["value"]
            assert row["reward/refined_low"] <= row["reward/refined"] <= row["reward/refined_high"]


def test_steps_of_training(folder: Path) -> None:
    """What a training stage keeps of its optimiser steps, numbered through the member's phases."""
    members = {wandb_log.run_id(member): member for member in collect.load(folder).members}
    for one in runs(folder):
        (step,) = [step for step in members[one["id"]].steps if step["kind"] == "activate"]
        kept = [
            json.loads(line) for line in (folder / "../../store" / step["id"] / "steps.jsonl").read_text().splitlines()
        ]
        rows = [row for row in one["rows"] if "activate/loss" in row]
        assert [row["optimiser_step"] for row in rows] == [row["step"] for row in kept] == list(range(1, len(kept) + 1))
        assert [row["activate/loss"] for row in rows] == [row["loss"] for row in kept]


def test_nothing_is_logged_twice(folder: Path) -> None:
    before = sorted(folder.glob("wandb/**/*"))
    assert log_again(folder) == ""
    assert "W&B" not in sweep(folder.parent.parent, "offline")
    assert sorted(folder.glob("wandb/**/*")) == before


def test_lost_marker_continues_the_same_run(folder: Path, tmp_path: Path) -> None:
    """Logged elsewhere, a member is the same run: its id comes from what it is, not from where or when."""
    shutil.copytree(folder.parent.parent, tmp_path / "out")
    copy = tmp_path / "out" / "sweeps" / folder.name
    shutil.rmtree(copy / "wandb")
    assert "2 runs logged offline" in log_again(copy)
    assert {one["id"] for one in runs(copy)} == {one["id"] for one in runs(folder)}


def test_disabled_writes_nothing(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder.parent.parent / "store", tmp_path / "out" / "store")
    assert "W&B" not in sweep(tmp_path / "out", "disabled")
    assert not list(tmp_path.rglob("*wandb*"))


def test_no_key_in_any_file(folder: Path) -> None:
    files = [path for path in folder.parent.parent.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
