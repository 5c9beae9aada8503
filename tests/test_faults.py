"""The campaign of faults can find something: what counts as lost, as served though damaged, as run twice."""

import contextlib
import os
import random
import subprocess
import time

import pytest

from benchmarks.faults import Journal, account, damage, different, results
from evolve.config import Resources
from evolve.stages import data
from evolve.store import Report, Source, Stage, StageConfig, Store
from evolve.workers import Outcome, Setting, Workers


class Config(StageConfig):
    size: int


def made(store: Store, size: int, content: str = "rows", pause: float = 0.0) -> Stage:
    stage = Stage("data", 1, Config(size=size))
    with store.build(stage) as folder:
        (folder / "rows.jsonl").write_text(content)
        time.sleep(pause)
        store.commit(stage, folder, Report(), {})
    return stage


@pytest.mark.parametrize(
    ("events", "lost", "twice"),
    [
        (["ended", "committed"], 0, 0),
        (["ended", "ended", "committed"], 0, 0),  # the first was killed before it had its name
        (["ended", "committed", "damaged", "aside", "ended", "committed"], 0, 0),
        (["ended", "committed", "aside", "ended", "committed"], 1, 0),
        (["ended", "committed", "ended"], 0, 1),
    ],
)
def test_what_a_journal_amounts_to(events, lost, twice):
    found = account([], [(what, "data/1") for what in events])
    assert [len(stages) for stages in found] == [lost, twice]


def test_the_kernel_tells_what_becomes_of_results(tmp_path):
    store = Store(tmp_path / "store")
    journal = Journal(store.root)
    first = made(store, 1, pause=0.5)  # as long as a stage takes at least: a folder is watched from then on
    store.quarantine(first.id)
    made(store, 1, pause=0.5)
    with store.build(first) as folder:
        time.sleep(0.5)
        store.commit(first, folder, Report(), {})  # the one that is there stands
    journal.wait_for(6)
    assert [what for what, _ in journal.events] == ["ended", "committed", "aside", "ended", "committed", "ended"]
    assert account([], journal.events) == ([first.id], [first.id])


def test_a_full_disk_is_said_in_a_line_and_the_stage_is_made_once_there_is_room(tmp_path, capfd):
    """Its log lies on that disk, too."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]).returncode:
        pytest.skip("mounting needs root")
    rows = {"pool": "eval", "start": 0, "count": 8, "reserve": 8, "tail": 0, "seed": 0, "split": "train"}
    config = data.Config(**rows, eval_split=None, max_characters=None)
    stage = Stage("data", data.VERSION, config, {"data": Source("data", "embedded", "embedded")})
    resources = Resources(workers=1, threads=1, device="cpu", retries=0, lease_timeout=60)
    pool = Workers(Setting(Store(tmp_path / "store"), resources, tmp_path / "logs", {}))

    def ran() -> Outcome:
        pool.start(stage)
        while True:
            for _, news in pool.wait(1):
                if isinstance(news, Outcome):
                    return news

    try:
        for pages in (0, 1, 2):  # that are free: for a lease, and for a note of who builds
            filler = tmp_path / "filler"
            with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, filler.stat().st_size - 4096 * pages)
            outcome = ran()
            assert outcome.status == "failed" and "No space left on device" in outcome.message
            filler.unlink()
        assert ran().status == "done"
    finally:
        pool.close()
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_changed_byte_is_noticed(tmp_path):
    store = Store(tmp_path / "store")
    stages = [made(store, size) for size in (1, 2)]
    want = results(tmp_path)
    path = store.folder(stages[0].id) / "rows.jsonl"
    before = path.stat().st_mtime_ns
    assert damage(path, random.Random(0))
    assert path.stat().st_mtime_ns == before and different(want, results(tmp_path)) == ([], [stages[0].id])
    store.quarantine(stages[1].id)
    assert different(want, results(tmp_path))[0] == [stages[1].id]
    os.truncate(path, 0)
    assert damage(path, random.Random(0)) == ""
