"""GPUs of a machine: which there are, and that workers that run at once share none."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from evolve import devices, launch
from evolve.config import Resources
from evolve.stages import Context
from evolve.store import Report, Stage, StageConfig, Store
from evolve.workers import Setting, Workers

# A kind of stage which says what it sees: this file stands for its module, in workers too: they read its config.
sys.modules["evolve.stages.look"] = sys.modules[__name__]


class Config(StageConfig):
    name: str
    used: int

    @property
    def gpus(self) -> int:
        return self.used


def run(config: Config, inputs: dict[str, Path], out: Path, context: Context) -> Report:
    began = time.time()
    time.sleep(0.5)
    seen = {"gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": began, "ended": time.time()}
    (out / "seen.json").write_text(json.dumps(seen))
    return Report()


class Quiet:
    """Nobody is told."""

    def __getattr__(self, name: str):
        return lambda *about: None


def resources(**settings) -> Resources:
    return Resources(**{"workers": 4, "threads": 1, "device": "auto", "retries": 0, "lease_timeout": 60, **settings})


def look(folder: Path, wanted: dict[str, int], **settings) -> dict[str, dict]:
    """What stages that use so many GPUs see, by name."""
    store = Store(folder / "store", 60)
    stages = {name: Stage("look", 1, Config(name=name, used=used), {}) for name, used in wanted.items()}
    pool = Workers(Setting(store, resources(**settings), folder / "logs", {}))
    try:
        outcomes = launch.run(list(stages.values()), store, pool, Quiet(), retries=0)
    finally:
        pool.close()
    assert {outcome.status for outcome in outcomes.values()} == {"done"}, outcomes
    return {name: json.loads((store.folder(stage.id) / "seen.json").read_text()) for name, stage in stages.items()}


@pytest.mark.slow
def test_each_stage_sees_its_own_gpus(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-b1,7")
    seen = look(tmp_path, {"two": 2, "two more": 2, "one": 1, "none": 0, "too many": 5})
    ids = {name: found["gpus"].split(",") if found["gpus"] else [] for name, found in seen.items()}
    assert {name: len(found) for name, found in ids.items()} == {
        "two": 2,
        "two more": 2,
        "one": 1,
        "none": 0,
        "too many": 3,  # all there are; what it uses will say that these are too few
    }
    assert ids["two"] == ["3", "GPU-b1"]
    for name, found in seen.items():
        for other, beside in seen.items():
            if name != other and found["began"] < beside["ended"] and beside["began"] < found["ended"]:
                assert not set(ids[name]) & set(ids[other]), (name, other)
    assert seen["none"]["ended"] < seen["two more"]["began"]  # a slot was free, and it waits for no GPU
    assert seen["two more"]["began"] < seen["one"]["ended"]  # which didn't go ahead of it


@pytest.mark.slow
def test_one_gpu_is_one_stages_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = look(tmp_path, {"one": 1, "another": 1, "none": 0})
    assert {name: found["gpus"] for name, found in seen.items()} == {"one": "3", "another": "3", "none": ""}
    first, second = sorted((seen["one"], seen["another"]), key=lambda found: found["began"])
    assert first["ended"] < second["began"]
    assert seen["none"]["began"] < second["began"]  # which needs no GPU, so it waits for none


def test_on_the_cpu_nothing_is_dealt(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    assert look(tmp_path, {"one": 1}, device="cpu")["one"]["gpus"] == "3,7"


@pytest.mark.parametrize(
    "given, found",
    [
        ("0,1", ("0", "1")),
        ("7, GPU-b1", ("7", "GPU-b1")),
        ("MIG-c2", ("MIG-c2",)),
        ("", ()),
        ("-1", ()),
        ("NoDevFiles", ()),
        ("0,-1,2", ("0",)),
    ],
)
def test_what_the_environment_names_counts(monkeypatch, given, found):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert devices.gpus(resources()) == found
    assert devices.gpus(resources(device="cpu")) == ()


WHOLE = """GPU 0: NVIDIA H200 (UUID: GPU-a0)
GPU 1: NVIDIA H200 (UUID: GPU-b1)
"""
PARTS = """GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-a0)
  MIG 3g.20gb     Device  0: (UUID: MIG-a1)
  MIG 3g.20gb     Device  1: (UUID: MIG-a2)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-b0)
"""


@pytest.mark.parametrize(
    "said, code, found",
    [
        (WHOLE, 0, ("0", "1")),
        (PARTS, 0, ("MIG-a1", "MIG-a2", "GPU-b0")),
        ("", 0, ()),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", 9, ()),
        (None, 0, ()),
    ],
    ids=["whole", "parts", "none", "no driver", "no nvidia-smi"],
)
def test_what_nvidia_smi_says(tmp_path, monkeypatch, said, code, found):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if said is not None:
        (tmp_path / "said").write_text(said)
        (tmp_path / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$*" = -L ] && /bin/cat {tmp_path}/said\nexit {code}\n')
        (tmp_path / "nvidia-smi").chmod(0o755)
    assert devices.gpus(resources()) == found
