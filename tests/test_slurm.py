"""What is asked of Slurm and made of its answers, with scripts in the place of its commands."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import load

from evolve import cancel, launch, simulate, slurm, states, status
from evolve.config import ConfigError, Resources, Slurm
from evolve.slurm_job import PATIENCE, Rest, Run
from evolve.stages import data
from evolve.store import Report, Source, Stage, StageConfig, Store, append, lines, refresh, seal
from evolve.workers import Setting

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


def sweep(out: Path, name: str, **jobs: tuple[str, str]) -> Path:
    """The folder of a sweep that has submitted jobs: (key, Slurm's id) by stage."""
    folder = out / "sweeps" / name
    folder.mkdir(parents=True)
    needs = {f"score/{stage}": [] for stage in jobs}
    members = [{"name": name, "steps": [{"phase": "base", "id": stage} for stage in needs]}]
    (folder / "sweep.json").write_text(seal({"store": "../../store", "needs": needs, "members": members}))
    if jobs:
        slurm.note(folder, stages={f"score/{stage}": job for stage, job in jobs.items()})
    return folder


def queue(script: Script, store: Store, *jobs: str) -> None:
    """What squeue says: jobs as 'id|state|user|key'."""
    said = [line.split("|") for line in jobs]
    lines = "".join(
        f"{number}|{state}|None|{user}|evolve:{slurm.tag(store)}:{key}\n" for number, state, user, key in said
    )
    script("squeue", f"cat <<'END'\n{lines}END")


def test_cancel_leaves_other_users_jobs(script, tmp_path, capsys, monkeypatch):
    me, other = os.getuid(), os.getuid() + 1
    folder = sweep(tmp_path, "one", a=("mine", "1"), b=("theirs", "2"), c=("wanted", "3"))
    sweep(tmp_path, "two", c=("wanted", "3"))
    store = Store(tmp_path / "store")
    rest = f"4|PENDING|{other}|{slurm.rest(folder)}"
    queue(script, store, f"1|RUNNING|{me}|mine", f"2|RUNNING|{other}|theirs", f"3|RUNNING|{other}|wanted", rest)
    script("scancel", 'case "$*" in *2*|*4*) echo "Access/permission denied" >&2; exit 1;; esac')
    monkeypatch.setattr(sys, "argv", ["cancel", str(folder)])
    assert cancel.main() == 0
    said = "1 jobs stopped; 1 go on, for other sweeps (--all stops them too); 2 go on, which are other users'\n"
    assert capsys.readouterr().out == said
    assert calls(tmp_path, "scancel") == ["1"]


def test_a_sweep_is_cancelled_though_slurm_says_no(script, tmp_path):
    """So that another sweep's cancel ends what both wanted."""
    folder = sweep(tmp_path, "one", a=("key", "1"))
    queue(script, Store(tmp_path / "store"), f"1|RUNNING|{os.getuid()}|key")
    script("scancel", "echo 'scancel: error: no' >&2; exit 1")
    assert states.wanted(folder) == {("key", "1")}
    with pytest.raises(ConfigError, match="scancel: error: no"):
        cancel.cancel(folder, every=False)
    assert states.wanted(folder) == set()


@pytest.fixture
def signals() -> Iterator[None]:
    """A job's handlers are not this process's."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR2)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Run:
    """Of one stage of seconds, in this process."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    rows = {"pool": "eval", "start": 0, "count": 8, "reserve": 8, "tail": 0, "seed": 0, "split": "train"}
    config = data.Config(**rows, eval_split=None, max_characters=None)
    made = Stage("data", data.VERSION, config, {"data": Source("data", "embedded", "embedded")})
    resources = Resources(workers=1, threads=1, device="cpu", retries=0, lease_timeout=60, slurm=Slurm())
    return Run((made,), Setting(Store(tmp_path / "store"), resources, folder, {}), folder)


def test_a_job_that_can_say_nothing_goes_back_all_the_same(script, tmp_path, monkeypatch, capsys, signals):
    """Its folder can't be written to, as on a full disk."""
    script("scontrol")
    run = job(tmp_path, monkeypatch, tmp_path / "gone")
    with pytest.raises(SystemExit):
        run.checkpoint()
    assert calls(tmp_path, "scontrol")[-1] == "requeue 7"
    assert "this is not written: [Errno 2]" in capsys.readouterr().err


def said(folder: Path, event: str) -> list[str]:
    """The messages of such events of a job."""
    return [line["message"] for line in lines(folder / "events.jsonl") if line["event"] == event]


@pytest.mark.parametrize(
    "known, why",
    [
        ("RunTime=01:02:03 TimeLimit=1-04:00:00 PreemptTime=None", "SIGUSR2, not by Slurm"),
        ("RunTime=1-03:58:00 TimeLimit=1-04:00:00 PreemptTime=2026-01-01T00:00:00", "preemption"),
        ("RunTime=1-03:58:00 TimeLimit=UNLIMITED PreemptTime=None", "SIGUSR2, not by Slurm"),
        ("", "time limit or preemption"),
    ],
    ids=["early", "preempted", "no limit", "no answer"],
)
def test_only_time_limits_without_progress_are_a_failure(script, tmp_path, monkeypatch, signals, known, why):
    run = job(tmp_path, monkeypatch, tmp_path)
    script("scontrol", f'[ "$1" = requeue ] || echo "JobId=7 JobState=RUNNING {known}" | grep RunTime')
    for _ in range(PATIENCE + 1):
        with pytest.raises(SystemExit):
            run.checkpoint()
    assert said(tmp_path, "back") == [f"told to go: {why}"] * (PATIENCE + 1) and not said(tmp_path, "failed")
    script("scontrol", "echo JobId=7 JobState=RUNNING RunTime=1-03:58:00 TimeLimit=1-04:00:00 PreemptTime=None")
    for _ in range(PATIENCE - 1):
        with pytest.raises(SystemExit):
            run.checkpoint()
    run.checkpoint()  # which submitit takes for a failure
    assert said(tmp_path, "back")[-1] == "told to go: time limit"
    assert ["time limit 3 times" in message for message in said(tmp_path, "failed")] == [True]


TWO = ["debug=fast", "data.eval_prompts=8", "eval.turns=1", "loss=none", "loss.pt=none", "loss.sft_direct=0"]


@pytest.fixture
def left_over(script, tmp_path, monkeypatch) -> tuple[launch.Planned, Rest]:
    """A plan of two jobs, of which none is submitted, and what is to submit them; the queue is empty."""
    words = [*TWO, f"output={tmp_path}", "resources=slurm", "wandb.mode=disabled"]
    members = [[*words, f"data.seed={seed}"] for seed in (1, 2)]
    planned = launch.plan_members([load(*member) for member in members], [[f"data.seed={seed}"] for seed in (1, 2)])
    launch.write_sweep(planned)
    where = slurm.folder(planned.store, slurm.rest(planned.folder))
    where.mkdir(parents=True)
    plan = where / "plan.pkl"
    plan.write_bytes(pickle.dumps(planned))
    plan.with_suffix(".tried").write_text("")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for command in ("squeue", "srun", "scontrol"):
        script(command)
    return planned, Rest(plan)


def takes(script: Script, tmp_path: Path, refusal: str) -> None:
    """sbatch takes one job, and refuses those after it."""
    first = f"[ -e {tmp_path}/one ] || {{ touch {tmp_path}/one; echo Submitted batch job 1; exit 0; }}"
    script("sbatch", f"{first}\necho 'sbatch: error: {refusal}' >&2\nexit 1")


def test_what_slurm_refuses_for_good_is_a_failure_of_what_submits_the_rest(script, tmp_path, left_over, capsys):
    """It ends; and what it has submitted, and has failed since, it submits no second time."""
    planned, rest = left_over
    takes(script, tmp_path, "Batch job submission failed: Invalid account or account/partition combination specified")
    for _ in range(2):
        with pytest.raises(ConfigError, match="Invalid account"):
            rest()
    assert calls(tmp_path, "scontrol") == []
    submitted = states.submitted(planned.folder)
    assert {number for _, number in submitted.values()} == {"1"}
    assert set(rest.plan.with_suffix(".tried").read_text().split()) == submitted.keys()
    assert len(calls(tmp_path, "sbatch")) == 3
    view = status.watch(planned.folder, every=0.1)
    found = {stage: one for stage, one in view.states.items() if stage not in submitted and one.state == "failed"}
    assert found and all("not submitted: sbatch: error" in one.message and one.job == "7" for one in found.values())
    assert "Invalid account" in capsys.readouterr().out


@pytest.mark.parametrize(
    "refusal",
    [
        "Batch job submission failed: Socket timed out on send/recv operation",
        "Batch job submission failed: Unexpected missing socket error",
        "Batch job submission failed: Zero Bytes were transmitted or received",
        "(job submit limit) QOSMaxSubmitJobPerUser",
    ],
)
def test_what_may_go_well_later_is_tried_again(script, tmp_path, left_over, signals, refusal):
    """And what was submitted before that is not: the second time nothing of it is left to do."""
    planned, rest = left_over
    takes(script, tmp_path, refusal)
    for _ in range(2):
        with pytest.raises(SystemExit):
            rest()
    assert calls(tmp_path, "scontrol") == ["requeue 7"] * 2
    assert set(rest.plan.with_suffix(".tried").read_text().split()) == states.submitted(planned.folder).keys()
    assert {number for _, number in states.submitted(planned.folder).values()} == {"1"}
    assert not said(rest.plan.parent, "failed")


class Old:
    """What a client of NFS sees of folders: nothing in them, until it has changed them itself."""

    def __init__(self, *folders: Path):
        self.folders = folders
        for folder in folders:
            os.utime(folder, (0, 0))

    def shows(self, folder: Path) -> bool:
        return folder not in self.folders or folder.stat().st_mtime != 0


class Numbered(StageConfig):
    number: int


def test_what_another_machine_has_just_written_is_not_lost(tmp_path, monkeypatch, signals):
    """By a job's end that the next one was waiting for."""
    store = Store(tmp_path / "store")
    before = Stage("score", 1, Numbered(number=1), {"data": Source("data", "x", "x")})
    after = Stage("score", 1, Numbered(number=2), {"scores": before})
    for made in (before, after):
        with store.build(made) as folder:
            store.commit(made, folder, Report(), {})
    old, record = Old(store.root / "score"), store.record
    monkeypatch.setattr(store, "record", lambda stage: record(stage) if old.shows(store.root / "score") else None)
    run = job(tmp_path, monkeypatch, tmp_path)
    run = Run((after,), replace(run.setting, store=store), tmp_path)
    run()
    assert [line["event"] for line in lines(tmp_path / "events.jsonl")] == ["start", "end"]


def test_a_job_that_another_machine_has_just_submitted_is_whole(script, tmp_path, monkeypatch):
    store = Store(tmp_path / "store")
    place = slurm.folder(store, "key")
    place.mkdir(parents=True)
    (place / "1_submitted.pkl").touch()
    old, glob = Old(place), Path.glob
    monkeypatch.setattr(Path, "glob", lambda path, pattern: glob(path, pattern) if old.shows(path) else iter(()))
    script("scancel")
    there = {"key": slurm.Queued("1", "PENDING", "None", str(os.getuid()))}
    assert slurm._whole(store, there) == there
    assert calls(tmp_path, "scancel") == []


def test_a_sweep_is_watched_until_its_results_can_be_seen(script, tmp_path, monkeypatch):
    folder = sweep(tmp_path, "one", a=("key", "1"))
    queue(script, Store(tmp_path / "store"))
    record = tmp_path / "store" / "score" / "a" / "record.json"
    record.parent.mkdir(parents=True)
    record.write_text('{"seconds": 1.0}')
    old, exists = Old(tmp_path / "store" / "score"), Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: exists(path) and (path != record or old.shows(path.parent.parent)))
    assert states.look(states.load(folder)).states["score/a"].state == "missing"
    assert status.watch(folder, every=0.1).states["score/a"].state == "done"


def test_a_stage_that_its_job_says_is_done_is_not_missing_yet(script, tmp_path):
    folder = sweep(tmp_path, "one", a=("key", "1"), b=("other", "2"))
    store = Store(tmp_path / "store")
    queue(script, store)
    for key, number, stage, ago in (("key", "1", "a", 10), ("other", "2", "b", 100)):
        slurm.folder(store, key).mkdir(parents=True)
        own = {"time": time.time() - ago, "job": number, "restarts": 0}
        append(
            slurm.folder(store, key) / "events.jsonl", {**own, "event": "done", "stage": f"score/{stage}", "seconds": 1}
        )
    found = states.look(states.load(folder)).states
    assert [found[stage].state for stage in ("score/a", "score/b")] == ["ending", "missing"]


def test_where_a_folder_cannot_be_changed_a_minute_is_waited_for(tmp_path, monkeypatch):
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    refresh([tmp_path, tmp_path / "gone" / "below"])
    assert waited == [] and list(tmp_path.iterdir()) == []

    def touch(path: Path) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "touch", touch)
    refresh([tmp_path])
    assert [seconds > 60 for seconds in waited] == [True]
