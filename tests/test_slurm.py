"""What is asked of Slurm and made of its answers, with scripts in the place of its commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import load

from evolve import launch, simulate, slurm
from evolve.store import Store

Script = Callable[..., None]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Puts shell lines in the place of one of Slurm's commands; `calls` under tmp_path says how each was called."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def put(name: str, lines: str = "") -> None:
        path = folder / name
        path.write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path / "calls"}\n{lines}\n')
        path.chmod(0o755)

    return put


def calls(tmp_path: Path, name: str) -> list[str]:
    """The words of each call of a command."""
    path = tmp_path / "calls"
    found = [line.split(" ", 1) for line in path.read_text().splitlines()] if path.exists() else []
    return [words for command, words in found if command == name]


def test_a_byte_in_anybodys_comment_that_is_no_utf_8_does_no_harm(script, tmp_path):
    store = Store(tmp_path / "store")
    comments = [b"caf\xe9: 5 \xb5s".decode("latin-1"), f"evolve:{slurm.tag(store)}:key"]
    lines = "".join(f"{number}|RUNNING|None|1|{comment}\n" for number, comment in enumerate(comments))
    (tmp_path / "queue").write_bytes(lines.encode("latin-1"))
    script("squeue", f"cat {tmp_path / 'queue'}")
    assert [(key, queued.id) for key, queued in slurm.queue(store).items()] == [("key", "1")]
    script("sinfo", r"printf 'node\351|main*|4|100|gpu:2\nnode2|main*|4|100|gpu:2\n'")
    assert simulate.machines({None}) == [(2, 4, 100)] * 2


def test_a_plan_that_no_machine_has_room_for_now_is_shown_all_the_same(script, tmp_path, capsys):
    """The one that has is down, or drained, and so isn't counted."""
    script("sinfo", "echo 'node1|main*|2|1000|(null)'")
    member = ["debug=fast", "data.eval_prompts=8", f"output={tmp_path}", "dry_run=true", "resources=slurm"]
    launch.submit([load(*member)], [member], wait=False)
    said = capsys.readouterr().out
    assert "warning: resources.slurm.needs: a job wants" in said
    assert "the largest has 0 / 2 / 1000, of those that are in order now" in said
    assert "plan    " in said and "job     " in said


def test_partitions_may_be_named_several_at_a_time(script):
    """As sbatch takes them."""
    script("sinfo", "printf 'n1|a|4|100|gpu:2\\nn2|b*|4|100|gpu:1\\nn3|c|4|100|gpu:4\\n'")
    assert simulate.machines({"a,b"}) == [(2, 4, 100), (1, 4, 100)]
    assert simulate.machines({"c,a", None}) == [(2, 4, 100), (1, 4, 100), (4, 4, 100)]
