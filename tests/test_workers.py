"""What a stage prints goes to its log, which is the lease's holder's alone and keeps every attempt."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import pytest

from evolve.config import RUNTIME, Resources
from evolve.stages import Context
from evolve.store import Report, Stage, StageConfig, Store
from evolve.workers import Outcome, Setting, execute

# A kind of stage which says something and may fail: this file stands for its module.
sys.modules["evolve.stages.speak"] = sys.modules[__name__]


class Config(StageConfig):
    says: Annotated[str, RUNTIME] = ""
    fails: Annotated[str, RUNTIME] = ""


def run(config: Config, inputs: dict[str, Path], out: Path, context: Context) -> Report:
    if config.says:
        os.write(1, config.says.encode())  # as a native library does
    if config.fails:
        raise ValueError(config.fails)
    return Report()


@pytest.fixture
def setting(tmp_path) -> Setting:
    resources = Resources(workers=1, threads=1, device="cpu", retries=0, lease_timeout=60)
    return Setting(Store(tmp_path / "store"), resources, tmp_path / "logs", {})


def stage(**settings: str) -> Stage:
    return Stage("speak", 1, Config(**settings), {})


def log(setting: Setting) -> Path:
    return setting.logs / f"{stage().id.replace('/', '-')}.log"


def attempt(setting: Setting, **settings: str) -> Outcome:
    return execute(stage(**settings), setting, lambda done, total: None)


@pytest.mark.parametrize("said", ["", "the other command's\n"])
def test_another_commands_log_is_left_alone(setting, said):
    setting.logs.mkdir()
    log(setting).write_text(said)
    with setting.store.lease(stage()):
        assert attempt(setting, says="ours").status == "busy"
    assert log(setting).read_text() == said


def test_a_log_keeps_every_attempt(setting, capfd):
    with capfd.disabled():  # whose standard error is no descriptor's
        first = attempt(setting, says="one\n", fails="too small")
        second = attempt(setting, says="two\n", fails="too large")
        third = attempt(setting, says="three\n")
    assert [outcome.status for outcome in (first, second, third)] == ["failed", "failed", "done"]
    assert (first.message, first.log) == ("too small", log(setting))
    one, two, three = log(setting).read_text().split("\n--- again, ")
    assert "one\n" in one and "ValueError: too small" in one
    assert "two\n" in two and "ValueError: too large" in two
    assert three.endswith("three\n")


def test_a_stage_that_says_nothing_leaves_no_log(setting):
    assert attempt(setting).status == "done"
    assert list(setting.logs.iterdir()) == []
