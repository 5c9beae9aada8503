import fcntl
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve.config import ROOT, RUNTIME, ConfigError, Section
from evolve.store import (
    RECORD,
    Corrupt,
    Lease,
    Report,
    Source,
    Stage,
    StageConfig,
    Store,
    append,
    canonical,
    digest,
    ended,
    flatten,
    lines,
    seal,
    settings,
    this_process,
    unseal,
)


class Inner(Section):
    rate: float
    boost: float = 1.0


class Config(StageConfig):
    inner: Inner
    size: int
    words: tuple[str, ...] = ()
    device: Annotated[str, RUNTIME] = "cpu"


def stage(kind="data", inputs=(), version=1, **changes):
    config = Config(**{"inner": {"rate": 0.5}, "size": 3, **changes})
    return Stage(kind, version, config, dict(inputs))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def commit(store, node, content="result", report=None):
    with store.build(node) as folder:
        (folder / "rows.jsonl").write_text(content)
        (folder / "deep").mkdir()
        (folder / "deep" / "model.bin").write_bytes(bytes(range(256)))
        return store.commit(node, folder, report or Report(dropped={"empty": 2}, values={"x": 0.1}), {"host": "here"})


# Identity


@given(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.text())
def test_canonical_json_comes_back(number, whole, text):
    value = {"b": [number, whole, True, None], "a": text}
    assert json.loads(canonical(value)) == value
    assert canonical(dict(reversed(value.items()))) == canonical(value)


@pytest.mark.parametrize("value", [{1}, object(), float("nan"), float("inf"), b"x", Config, {(1,): 2}])
def test_what_has_no_stable_form_raises(value):
    with pytest.raises((TypeError, ValueError)):
        digest({"value": value})


def test_an_identity_holds_what_decides_the_result():
    assert stage(device="cuda").identity == {
        "kind": "data",
        "version": 1,
        "config": {"inner": {"rate": 0.5}, "size": 3},
        "inputs": {},
    }
    assert stage(words=("a",), inner={"rate": 0.5, "boost": 2}).identity["config"] == {
        "inner": {"rate": 0.5, "boost": 2.0},
        "size": 3,
        "words": ["a"],
    }


def test_the_same_settings_give_the_same_id():
    """A record made today must be found tomorrow, so what is hashed is written down here."""
    same = [stage(), stage(device="cuda"), stage(words=()), stage(inner={"rate": 0.5, "boost": 1}), stage(size="3")]
    text = b'{"config":{"inner":{"rate":0.5},"size":3},"inputs":{},"kind":"data","version":1}'
    assert {node.id for node in same} == {"data/" + hashlib.sha256(text).hexdigest()[:16]}


def test_a_whole_number_is_one_float():
    assert stage(inner={"rate": 1}).id == stage(inner={"rate": 1.0}).id == stage(inner={"rate": "1e0"}).id


def test_what_decides_the_result_changes_the_id():
    source, other = Source("model", "here", "abc"), Source("model", "here", "abd")
    nodes = [
        stage(),
        stage(size=4),
        stage(inner={"rate": 0.25}),
        stage(inner={"rate": 0.5, "boost": 2}),
        stage(words=("a",)),
        stage(version=2),
        stage(kind="score"),
        stage(inputs={"model": source}),
        stage(inputs={"model": other}),
        stage(inputs={"policy": source}),
        stage(inputs={"model": stage()}),
        stage(inputs={"model": stage(size=4)}),
    ]
    assert len({node.id for node in nodes}) == len(nodes)
    moved = Source("model", "elsewhere", "abc")
    assert stage(inputs={"model": moved}).id == stage(inputs={"model": source}).id


def test_a_changed_default_is_no_wrong_reuse(store):
    """The identity leaves defaults out, so the record says what they were."""
    commit(store, stage())
    assert flatten(store.record(stage())["config"])["inner.boost"] == 1.0

    class Later(Inner):
        boost: float = 2.0

    class Changed(Config):
        inner: Later

    changed = Stage("data", 1, Changed(inner={"rate": 0.5}, size=3))
    assert changed.id == stage().id
    with pytest.raises(ConfigError, match=r"default of inner\.boost was 1\.0 .* and is 2\.0 now") as error:
        store.record(changed)
    assert "\n" not in str(error.value)


def test_a_new_field_with_a_default_keeps_old_records(store):
    commit(store, stage())

    class Grown(Config):
        extra: int = 7

    assert store.record(Stage("data", 1, Grown(inner={"rate": 0.5}, size=3))) is not None
    assert Stage("data", 1, Grown(inner={"rate": 0.5}, size=3, extra=8)).id != stage().id


def test_settings_are_read_only_facts():
    assert settings(stage().config, defaults=True) == {"inner": {"rate": 0.5, "boost": 1.0}, "size": 3, "words": []}


# Commit


def test_a_commit_is_read_back(store):
    node = stage(inputs={"model": Source("model", "/weights", "abc")})
    assert store.record(node) is None
    with pytest.raises(Corrupt, match="gone"):
        store.open(node)
    written = commit(store, node)
    assert store.record(node) == store.read(node.id) == written
    assert written["files"].keys() == {"rows.jsonl", "deep/model.bin"}
    assert written["files"]["rows.jsonl"]["bytes"] == 6
    assert (written["dropped"], written["values"], written["host"]) == ({"empty": 2}, {"x": 0.1}, "here")
    assert (written["inputs"], written["sources"]) == ({"model": "model@abc"}, {"model": "/weights"})
    assert (store.open(node) / "rows.jsonl").read_text() == "result"
    assert list(store.ids()) == [node.id]
    assert store.litter() == []


def test_a_result_is_for_all_whom_the_umask_lets_read(store):
    """safetensors writes files that only their owner may read."""
    before = os.umask(0o027)
    try:
        with store.build(stage()) as folder:
            (folder / "model.safetensors").write_text("weights")
            (folder / "model.safetensors").chmod(0o600)
            store.commit(stage(), folder, Report(), {})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in everything(store)} == {0o640}


def everything(store):
    return sorted(path for path in store.root.rglob("*") if path.is_file())


def test_a_build_that_raises_leaves_nothing(store):
    with pytest.raises(ZeroDivisionError), store.build(stage()) as folder:
        (folder / "rows.jsonl").write_text("half")
        raise ZeroDivisionError
    assert store.record(stage()) is None
    assert everything(store) == []
    assert store.litter() == []


def test_a_report_that_is_no_number_is_not_committed(store):
    with pytest.raises(ValueError, match="JSON"):
        commit(store, stage(), report=Report(values={"loss": float("nan")}))
    assert everything(store) == []


@pytest.mark.parametrize("noted", ["whole", "half", "nothing"])
def test_a_build_clears_what_a_killed_one_left(store, noted):
    node = stage()
    left = store.folder(node.id).parent / f".tmp-{store.folder(node.id).name}-dead"
    left.mkdir(parents=True)
    (left / "rows.jsonl").write_text("half")
    gone = subprocess.run(
        [sys.executable, "-c", "import json; from evolve.store import this_process; print(json.dumps(this_process()))"],
        capture_output=True,
        text=True,
        check=True,
    )
    words = {"whole": gone.stdout, "half": gone.stdout[: len(gone.stdout) // 2], "nothing": ""}
    left.with_suffix(".owner").write_text(words[noted])
    commit(store, node)
    assert list(left.parent.glob(".tmp-*")) == []


def test_a_folder_without_record_is_never_served(store):
    folder = store.folder(stage().id)
    folder.mkdir(parents=True)
    (folder / "rows.jsonl").write_text("half")
    assert store.record(stage()) is None
    with pytest.raises(Corrupt, match="no record"):
        store.read(stage().id)
    commit(store, stage())  # the new result takes its place; the old one is put aside
    assert (store.open(stage()) / "rows.jsonl").read_text() == "result"
    assert [path.name for path in (store.root / "quarantine").glob("*/*")] == ["rows.jsonl"]


def truncate(folder):
    (folder / "rows.jsonl").write_text("resul")


def remove(folder):
    (folder / "deep" / "model.bin").unlink()


def flip(folder):
    file = folder / "deep" / "model.bin"
    file.write_bytes(bytes([1]) + file.read_bytes()[1:])


def flip_record(folder):
    """Still JSON, but a value is another."""
    file = folder / RECORD
    text = file.read_text()
    assert '"empty": 2' in text
    file.write_text(text.replace('"empty": 2', '"empty": 3'))


def halve_record(folder):
    file = folder / RECORD
    file.write_text(file.read_text()[:100])


def other_record(folder):
    (folder / RECORD).write_text("[1]")


@pytest.mark.parametrize("damage", [truncate, remove, flip, flip_record, halve_record, other_record])
def test_damage_is_found_put_aside_and_made_again(store, damage):
    node = stage()
    commit(store, node)
    damage(store.folder(node.id))
    if damage is not flip:  # which alone takes a look into every file
        assert store.record(node) is None
        with pytest.raises(Corrupt):
            store.read(node.id)
        assert store.litter() == [store.folder(node.id)]
    with pytest.raises(Corrupt, match="quarantine"):
        store.open(node)
    assert not store.folder(node.id).exists()
    assert store.litter() == list((store.root / "quarantine").iterdir()) != []
    commit(store, node)
    assert (store.open(node) / "rows.jsonl").read_text() == "result"


def test_the_first_of_two_commits_stands(store):
    node = stage()
    store.folder(node.id).parent.mkdir(parents=True)
    records = []
    for who in (1, 2):
        built = store.folder(node.id).parent / f"built by {who}"
        built.mkdir()
        (built / "rows.jsonl").write_text(f"by {who}")
        records.append(store.commit(node, built, Report(values={"who": who}), {}))
    assert records[0] == records[1] == store.record(node)
    assert (store.open(node) / "rows.jsonl").read_text() == "by 1"


def test_two_builds_at_once_do_each_other_no_harm(store):
    """Another machine took the lease over, as a stalled file server let our heartbeat lapse; we were still building."""
    with store.build(stage()) as ours:
        (ours / "rows.jsonl").write_text("ours")
        with store.build(stage()) as theirs:
            (theirs / "rows.jsonl").write_text("theirs")
            first = store.commit(stage(), ours, Report(values={"who": 1}), {})
            assert store.commit(stage(), theirs, Report(values={"who": 2}), {}) == first
    assert (store.open(stage()) / "rows.jsonl").read_text() == "ours"
    assert store.litter() == []


# Leases


def taken(store, node=None):
    lease = store.lease(node or stage())
    assert lease is not None
    return lease


def lease_file(store, node):
    folder = store.folder(node.id)
    return folder.parent / f".{folder.name}.lease"


def test_a_lease_is_one_holders_until_it_is_given_back(store):
    with taken(store) as held:
        assert store.lease(stage()) is None
        with taken(store, stage(size=4)):
            assert store.litter() == []
    held.release()  # again: no harm
    with taken(store):
        held.release()  # by one who has it no more: no harm either
        assert store.lease(stage()) is None
    assert everything(store) == []


HOLD = """
import sys, time
from pathlib import Path
from evolve.store import Lease
assert Lease.take(Path(sys.argv[1]), 60.0)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(store):
    """A process that holds the stage's lease."""
    path = lease_file(store, stage())
    with subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_killed_holders_lease_is_taken_over_at_once(store, holder):
    assert store.lease(stage()) is None
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert store.litter() == [lease_file(store, stage())]
    with taken(store):
        assert store.lease(stage()) is None


def test_a_killed_holder_that_nobody_buried_is_dead_too(store, holder):
    """A zombie: in a container whose first process collects no orphans, a killed holder stays one for good."""
    holder.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    taken(store).release()


def foreign(path, age, **more):
    """A lease of another machine, whose last heartbeat was so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"host": "elsewhere:1", "pid": os.getpid(), "born": 0.0, "token": "theirs", **more}))
    os.utime(path, (time.time() - age,) * 2)


@pytest.mark.parametrize("its_own", [False, True], ids=["by the reader's timeout", "by its own"])
def test_another_machines_lease_lives_by_its_heartbeat(tmp_path, its_own):
    def look(age, timeout):
        store = Store(tmp_path / "store", 1000 if its_own else timeout)
        path = lease_file(store, stage())
        foreign(path, age, **({"timeout": timeout} if its_own else {}))
        return store, path

    store, path = look(age=50, timeout=100)
    assert store.lease(stage()) is None
    assert store.litter() == []
    store, path = look(age=50, timeout=3)
    assert store.litter() == [path]
    with taken(store) as lease:
        assert json.loads(path.read_text())["token"] == lease.token


def test_a_lease_lives_as_long_as_its_holder_says(store):
    """Whoever looks may have been started with another timeout, as `prune` is; the holder beats by its own."""
    with Lease.take(lease_file(store, stage()), 600.0):
        assert unseal(lease_file(store, stage()).read_bytes())["timeout"] == 600
    path = lease_file(store, stage())
    foreign(path, age=500, timeout=600)
    assert store.litter() == []
    assert Store(store.root, 3).lease(stage()) is None
    assert not Lease.is_stale(path, 3)


def test_what_is_left_over_is_looked_at_twice(tmp_path):
    """As one that a stage's next builder would take over: the server's clock may have jumped since the last beat."""
    store = Store(tmp_path / "store", 1.5)
    beating, silent = (lease_file(store, stage(size=size)) for size in (1, 2))
    for path in (beating, silent):
        foreign(path, age=18000)
    beat = threading.Timer(0.1, os.utime, [beating])
    beat.start()
    assert store.litter() == [silent]
    beat.join()


def test_a_lease_has_a_heartbeat(tmp_path):
    path = tmp_path / ".x.lease"
    with Lease.take(path, timeout=0.6):
        os.utime(path, (0, 0))
        deadline = time.time() + 5
        while path.stat().st_mtime == 0:
            assert time.time() < deadline
            time.sleep(0.02)


def test_a_process_id_that_was_given_out_again_is_no_holder(store):
    """This process's own id, of a process that began at another time."""
    path = lease_file(store, stage())
    with taken(store):
        judged = unseal(path.read_bytes())
    path.write_text(seal({**judged, "born": judged["born"] - 100}))
    taken(store).release()


def test_an_unreadable_lease_is_taken_over_once_nobody_touches_it(store):
    path = lease_file(store, stage())
    path.parent.mkdir(parents=True)
    path.write_text("{")
    assert store.lease(stage()) is None  # whoever holds it goes on touching it
    os.utime(path, (time.time() - 100,) * 2)
    taken(Store(store.root, 3)).release()


def test_a_lease_that_changes_hands_during_a_look_is_not_stolen(store, monkeypatch):
    """The last holder gives it back and another takes it, between our two looks at the file."""
    path = lease_file(store, stage())
    leases = [taken(store)]

    def between(seen, *args, **kwargs):
        monkeypatch.undo()
        leases.pop().release()
        try:
            return seen.read_bytes(*args, **kwargs)
        finally:
            leases.append(taken(store))

    monkeypatch.setattr(Path, "read_bytes", between)
    mine = store.lease(stage())
    (theirs,) = leases
    with theirs:
        assert mine is None
        assert json.loads(path.read_text())["token"] == theirs.token


def contend(path, guard, start, until, found):
    """Takes and gives back a lease as fast as it can; `guard` is made and removed while it is held."""
    draw = random.Random(os.getpid())
    start.wait()
    held = clashes = 0
    while time.time() < until.value:
        lease = Lease.take(path, 3.0)
        if lease is None:
            continue
        try:
            os.close(os.open(guard, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            clashes += 1
        else:
            held += 1
            time.sleep(draw.random() * 0.002)
            os.unlink(guard)
        lease.release()
    found.put((held, clashes))


@pytest.mark.parametrize("left", ["nothing", "a dead lease"])
def test_eight_processes_hold_one_lease_one_at_a_time(tmp_path, left):
    context = multiprocessing.get_context("fork")
    path, guard = tmp_path / ".x.lease", tmp_path / "guard"
    if left == "a dead lease":
        foreign(path, age=1000)
    start, until, found = context.Barrier(8), context.Value("d", time.time() + 3), context.SimpleQueue()
    processes = [context.Process(target=contend, args=(path, guard, start, until, found)) for _ in range(8)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(20)
    assert [process.exitcode for process in processes] == [0] * 8
    counts = [found.get() for _ in processes]
    assert sum(clashes for _, clashes in counts) == 0
    assert sum(held for held, _ in counts) > 20
    assert sum(held > 0 for held, _ in counts) > 1
    assert not any(tmp_path.iterdir())


def build_all(root, log, seed):
    """Every stage, in an order of its own. A lock that ends with its process shows whether two hold one lease.

    A killed process is dead, and its lease with it, a moment before its last thread has let go of the lock.
    """
    store, draw = Store(root), random.Random(seed)
    todo = [stage(size=size) for size in range(STAGES)]
    while todo := [node for node in todo if store.record(node) is None]:
        for node in draw.sample(todo, len(todo)):
            lease = store.lease(node)
            if lease is None:
                continue
            with lease, (log / f"{node.config.size}.lock").open("w") as lock:
                owner = log / f"{node.config.size}.owner"
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    written = owner.with_suffix(f".{os.getpid()}")
                    written.write_text(json.dumps(this_process()))
                    written.rename(owner)
                except BlockingIOError:
                    if not ended(json.loads(owner.read_text())):
                        (log / f"{node.config.size}.clash").touch()
                if store.record(node) is None:
                    time.sleep(0.1)  # so that kills meet a build
                    commit(store, node, report=Report(values={"who": seed}))
                    with (log / f"{node.config.size}.commits").open("a") as commits:
                        commits.write(f"{seed}\n")


STAGES = 200


def test_sixteen_processes_of_which_some_are_killed_build_each_stage_once(tmp_path):
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    store, log = Store(tmp_path / "store"), tmp_path / "log"
    log.mkdir()

    def start(seed):
        process = context.Process(target=build_all, args=(store.root, log, seed))
        process.start()
        return process

    processes = [start(seed) for seed in range(16)]
    killed, deadline = 0, time.time() + 60
    while any(process.is_alive() for process in processes):
        assert time.time() < deadline
        time.sleep(draw.uniform(0.02, 0.1))
        number = draw.randrange(16)
        if killed < 30 and processes[number].is_alive():
            processes[number].kill()
            killed += 1
            processes[number].join()
            processes[number] = start(16 + killed)
    assert killed > 0
    assert [process.exitcode for process in processes] == [0] * 16
    assert len(list(store.ids())) == STAGES
    for node in (stage(size=size) for size in range(STAGES)):
        store.verify(node.id)
        commits = log / f"{node.config.size}.commits"  # one is missing if its writer was killed just before
        told = commits.read_text().split() if commits.exists() else []
        assert told in ([], [str(store.read(node.id)["values"]["who"])])
    assert list(log.glob("*.clash")) == []


def test_newest_records_come_first_and_broken_ones_never(store):
    nodes = [stage(size=size) for size in range(4)]
    for age, node in enumerate(nodes):
        commit(store, node)
        os.utime(store.folder(node.id), (1000 - age,) * 2)
    truncate(store.folder(nodes[1].id))
    assert [record["id"] for record in store.newest("data", 2)] == [nodes[0].id, nodes[2].id]
    assert store.newest("score", 2) == []


@pytest.mark.parametrize("before", ["nothing", "a dead lease"])
def test_a_link_whose_answer_is_lost_is_ours_all_the_same(store, monkeypatch, before):
    """Over NFS the client then asks again, and hears that the name exists."""
    path, link = lease_file(store, stage()), os.link

    def lossy(*names: Path) -> None:
        link(*names)
        raise FileExistsError

    if before == "a dead lease":
        foreign(path, age=1000)
    monkeypatch.setattr(os, "link", lossy)
    with taken(Store(store.root, 3)) as lease:
        assert json.loads(path.read_text())["token"] == lease.token
    assert list(path.parent.iterdir()) == []


def test_a_lease_that_is_being_taken_is_no_litter(store):
    """Who takes one over looks twice at it, up to a minute apart, with this file in its hands."""
    taking = lease_file(store, stage()).parent / ".tmp-lease-0123456789abcdef"
    taking.parent.mkdir(parents=True)
    taking.write_text("")
    assert store.litter() == []
    os.utime(taking, (time.time() - 3700,) * 2)
    assert store.litter() == [taking]


@pytest.mark.parametrize("kind", ["model", "file", "data"])
def test_a_source_that_this_machine_does_not_see_is_not_asked_of_the_hub(store, tmp_path, kind):
    gone = tmp_path / "elsewhere" / "rows.jsonl"
    with pytest.raises(RuntimeError, match=rf"^{gone}: not there as {socket.gethostname()} sees it; put it where"):
        store.open(Source(kind, str(gone), "0" * 64))


def test_litter_is_what_nothing_refers_to(tmp_path):
    store = Store(tmp_path / "store", 3)
    good, broken, building, dead = (stage(size=size) for size in (1, 2, 3, 4))
    commit(store, good)
    commit(store, broken)
    (store.folder(broken.id) / RECORD).unlink()
    foreign(lease_file(store, dead), age=1000)
    orphan = store.folder(dead.id).parent / f".tmp-{store.folder(dead.id).name}-0"
    orphan.mkdir()
    aside = store.root / "quarantine" / "data-x"
    aside.mkdir(parents=True)
    (store.root / "digests").mkdir()
    with taken(store, building), store.build(building):
        expected = [aside, lease_file(store, dead), orphan, store.folder(broken.id)]
        assert sorted(store.litter()) == sorted(expected)
    assert sorted(store.litter()) == sorted(expected)


def test_prune_leaves_what_a_waiting_job_goes_on_from(store, tmp_path):
    """Nobody holds a lease while the job of a stage is back in the queue, or while others make shares of its rows."""
    waiting, given_up = (store.partial(stage(size=size).id) for size in (1, 2))
    for folder, days in ((waiting, 6), (given_up, 8)):
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "checkpoint" / "weights").write_text("")
        then = time.time() - 86400 * days
        for path in (folder / "checkpoint" / "weights", folder / "checkpoint", folder):
            os.utime(path, (then, then))
    os.utime(given_up / "checkpoint" / "weights", (0, 0))

    def prune(*words: str) -> None:
        command = [sys.executable, "-m", "evolve.store", "prune", str(store.root), *words]
        subprocess.run(command, check=True, capture_output=True, cwd=ROOT)

    prune()
    assert (waiting / "checkpoint" / "weights").exists() and not given_up.exists()
    prune("--days=5")
    assert not waiting.exists()


# What is damaged where nobody looks


@given(st.binary(min_size=1, max_size=1), st.integers(0, 10**6))
def test_a_changed_byte_of_what_is_sealed_is_seen(byte, place):
    """Or changes nothing: it is between the words, or names the checksum itself."""
    value = {"times": 2, "text": "a b", "held": [1.5, None]}
    text = bytearray(seal(value).encode())
    text[place % len(text)] = byte[0]
    try:
        found = unseal(bytes(text))
    except Corrupt:
        return
    assert {name: found[name] for name in value} == value


@pytest.mark.parametrize("cut", [0, 1, 30])
def test_what_is_cut_short_is_no_content(cut):
    with pytest.raises(Corrupt):
        unseal(seal({"times": 2, "text": "a b"})[:cut].encode())


def test_a_line_that_was_half_written_spoils_no_other(tmp_path):
    path = tmp_path / "events.jsonl"
    assert list(lines(path)) == []
    append(path, {"event": 1})
    with path.open("a") as file:
        file.write('{"event": 2, "mess')  # the disk was full
    append(path, {"event": 3})
    path.write_text(path.read_text().replace('"event": 1', '"event": 7'))
    append(path, {"event": 4})
    assert list(lines(path)) == [{"event": 3}, {"event": 4}]


def test_check_puts_what_is_broken_aside_for_the_command_to_make_again(store):
    whole, broken = stage(size=1), stage(size=2)
    for node in (whole, broken):
        commit(store, node)
    path = store.folder(broken.id) / "rows.jsonl"
    path.write_text("resulT")  # as long as it was
    assert store.record(broken) is not None
    command = [sys.executable, "-m", "evolve.store", "check", str(store.root)]
    said = subprocess.run(command, capture_output=True, text=True)
    assert said.returncode == 1 and f"{broken.id}: rows.jsonl is not what was written" in said.stdout
    assert store.record(broken) is None and store.record(whole) is not None
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_a_damaged_lease_of_a_living_holder_is_not_stolen(store, holder):
    path = lease_file(store, stage())
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"pid": ', b'"pid": 9'))  # which is no process
    assert store.lease(stage()) is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="birth times are the kernel's ticks under Linux alone")
def test_a_holder_lives_whatever_the_clock_says(store, holder, tmp_path):
    """The machine's clock is set: for whoever asks then, the time when it booted has moved with it."""
    there = Path("/proc/stat").read_text()
    booted = int(there.split("btime ")[1].split()[0])
    stat = tmp_path / "stat"
    stat.write_text(there.replace(f"btime {booted}", f"btime {booted + 18000}"))
    look = "import sys, evolve.store as s; print(s.ended(s.unseal(open(sys.argv[1], 'rb').read())))"
    script = 'mount --bind "$0" /proc/stat && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", script, stat, sys.executable, "-c", look, lease_file(store, stage())]
    found = subprocess.run(command, capture_output=True, text=True)
    if "Operation not permitted" in found.stderr or "permission denied" in found.stderr:
        pytest.skip("mounting needs root")
    assert found.stdout == "False\n", found.stderr


@pytest.mark.parametrize("jump", [18000, -18000])
def test_another_machines_lease_outlives_a_jump_of_the_servers_clock(tmp_path, jump):
    """It looks dead until its next beat; a dead one is taken over, even if it beat in the future."""
    store = Store(tmp_path / "store", 1.5)
    path = lease_file(store, stage())
    foreign(path, age=jump)
    beating = threading.Timer(0.1, os.utime, [path])
    beating.start()
    assert store.lease(stage()) is None
    beating.join()
    os.utime(path, (time.time() - jump,) * 2)
    taken(store).release()


def test_a_stage_that_was_damaged_while_it_waited_is_another_one():
    """What is pickled is what will run: its identity is found out again, so no result has another's name."""
    node = stage(size=12345)
    known = node.id
    assert pickle.loads(pickle.dumps(node)).id == known
    damaged = pickle.dumps(node).replace((12345).to_bytes(2, "little"), (12346).to_bytes(2, "little"))
    assert pickle.loads(damaged).id != known
