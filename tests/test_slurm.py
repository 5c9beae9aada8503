"""What is asked of Slurm and made of its answers, with scripts in the place of its commands."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from evolve import simulate, slurm
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
