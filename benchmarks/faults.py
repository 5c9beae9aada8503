"""python -m benchmarks.faults: a tiny sweep under random faults, each followed by the same command until all is done.

Needs root (tmpfs, namespaces) and, for what they are needed for, libfaketime and Slurm (tests/slurm); what is missing
is said and left out. One sweep runs undisturbed; then, in rounds that each have a folder of their own:

    rest    a finished store, of which some results were taken away; files of every sort are cut short or a byte of
            them is changed (the time of change stays, as when a disk rots), the report is drawn, the command given
    live    while it runs: kill -9 of the command or a worker, damage to whatever file is there just then
    ranks   kill -9 of ranks, of torchrun, of the worker that started it; two devices train
    full    a tmpfs that has no room left, and after each failure has a little more
    clock   two commands on one store, each with a wall clock that jumps by hours (libfaketime, and /proc/stat's btime
            in a mount namespace; the file system's clock goes on as it was)
    slurm   nodes lose power, slurmctld is killed, submitting commands, jobs' processes and workers are, files of jobs
            and of the store are damaged

    --only ROUND ...   --seed 0   --faults 200 (all rounds together)   --folder /tmp/evolve-faults
    --fork             rest, live and full with commands that are forks of one process, their stages in them: a tenth of
                       the time on a machine that has other things to do; a worker's death is then a command's
    --resume           adds to what was found in that folder: by another seed, other rounds, or side by side

The kernel (inotify) tells what becomes of every result. In benchmarks/results/faults.json, by round and in total:

    lost            results that were whole and went away, or that never came
    corrupt_served  results or tables that differ from the undisturbed sweep's, byte for byte, in the end or as drawn
                    from a damaged store
    run_twice       stages that ran to their end while a whole result of theirs was there
    unclear         commands that failed with anything but lines of their own (a traceback), or did not end
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from evolve.config import ROOT
from evolve.store import Store, hash_file

FILE = ROOT / "benchmarks" / "results" / "faults.json"
SWEEP = ["debug=fast", "data.eval_prompts=8", "data.prompts=8", "eval.turns=2", "loss=both", "wandb.mode=disabled"]
JUDGED = ["eval.benchmarks=[refinement,alpaca_eval]", "annotator=server", "annotator.model=judge"]
HERE = ["resources.device=cpu", "trainer.checkpoint_minutes=0", "resources.lease_timeout=10"]
RANKS = ["debug=fast", "data.eval_prompts=8", "eval.turns=2", "loss=sft", "iteration.count=0", "trainer.devices=2"]
TABLES = ("table.csv", "table.md", "differences.csv")
SHARE = {"rest": 90, "live": 44, "ranks": 8, "full": 8, "clock": 16, "slurm": 34}  # of 200 faults
PATIENCE = 900  # seconds, on a machine that has other things to do
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")

CREATE, MOVED_FROM, MOVED_TO = 0x100, 0x40, 0x80  # of <sys/inotify.h>


class Journal(threading.Thread):
    """What becomes of a store's results, in order: (what, stage's id).

    ended: a builder wrote the record; committed; aside: it was moved away; damaged: we are about to.
    """

    def __init__(self, store: Path):
        super().__init__(daemon=True)
        self.events: list[tuple[str, str]] = []
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._file = self._libc.inotify_init1(0)
        self._folders: dict[int, Path] = {}
        self.store = store
        store.mkdir(parents=True, exist_ok=True)
        self._add(store)
        self.start()

    def _add(self, folder: Path) -> None:
        mark = self._libc.inotify_add_watch(self._file, str(folder).encode(), CREATE | MOVED_FROM | MOVED_TO)
        if mark < 0:
            return
        self._folders[mark] = folder
        with suppress(OSError):
            for path in folder.iterdir():
                self._created(path)

    def _created(self, path: Path) -> None:
        place = path.relative_to(self.store).parts
        if place[0] in ("quarantine", "digests"):
            return
        if (len(place) == 1 or (len(place) == 2 and place[1].startswith(".tmp-"))) and path.is_dir():
            self._add(path)
        elif len(place) == 3 and place[2] == "record.json" and place[1].startswith(".tmp-"):
            self.events.append(("ended", f"{place[0]}/{place[1].split('-')[1]}"))

    def wait_for(self, count: int, seconds: float = 30) -> None:
        """Until there are so many events, or the time is up."""
        end = time.monotonic() + seconds
        while len(self.events) < count and time.monotonic() < end:
            time.sleep(0.05)

    def run(self) -> None:
        while True:
            data = os.read(self._file, 1 << 16)
            while data:
                mark, mask, _, length = struct.unpack("iIII", data[:16])
                name, data = data[16 : 16 + length].rstrip(b"\0").decode(), data[16 + length :]
                folder = self._folders.get(mark)
                if folder is None or not name:
                    continue
                if mask & CREATE:
                    self._created(folder / name)
                elif folder.parent == self.store and not name.startswith("."):
                    self.events.append(("committed" if mask & MOVED_TO else "aside", f"{folder.name}/{name}"))


def account(there: Iterable[str], events: Iterable[tuple[str, str]]) -> tuple[list[str], list[str]]:
    """(lost, run twice) of results, by what a journal says; `there`: those that were whole before."""
    whole, lost, twice = set(there), [], []
    for what, stage in events:
        if what == "ended" and stage in whole:
            twice.append(stage)
        if what == "aside" and stage in whole:
            lost.append(stage)
        if what == "committed":
            whole.add(stage)
        elif what != "ended":
            whole.discard(stage)
    return lost, twice


def results(output: Path) -> dict[str, Any]:
    """Every result's files, by what their bytes are now, and what its record says of them; and the tables."""
    store, found = Store(output / "store"), {}
    for stage in store.ids():
        files = {
            path.relative_to(store.folder(stage)).as_posix(): hash_file(path)
            for path in sorted(store.folder(stage).rglob("*"))
            if path.is_file() and path.name != "record.json"
        }
        record = json.loads((store.folder(stage) / "record.json").read_bytes())
        record["values"].pop("from the cache", None)  # of judges' replies: who asked first isn't the result's
        found[stage] = [files, *(record[key] for key in ("identity", "files", "values", "tokens", "dropped"))]
    return found


def tables(output: Path) -> dict[str, str]:
    """Their text, by name; numbers to ten digits, for the last depends on how memory happens to be aligned."""

    def short(number: re.Match[str]) -> str:
        return f"{float(number[0]):.10g}"

    paths = (path for name in TABLES for path in output.glob(f"sweeps/*/{name}"))
    return {path.name: re.sub(r"-?\d+\.\d{6,}(?:e-?\d+)?", short, path.read_text()) for path in paths}


def different(want: dict[str, Any], have: dict[str, Any]) -> tuple[list[str], list[str]]:
    """(missing, not the same)."""
    return sorted(want.keys() - have.keys()), sorted(name for name in want.keys() & have if want[name] != have[name])


def sort(path: Path, output: Path) -> str:
    """What a file is to the store."""
    place = path.relative_to(output).parts
    if len(place) < 3:
        return "other"
    if place[0] == "store":
        if place[1] == "digests":
            return "digest"
        if path.name.endswith(".lease"):
            return "lease"
        if place[2].startswith(".partial-"):
            return "partial"
        return "other" if place[2].startswith(".") else "record" if path.name == "record.json" else "artefact"
    if place[0] == "judgments":
        return "ledger" if "ledger" in place else "judgment"
    if place[0] == "jobs":
        return "job"
    return "sweep.json" if path.name == "sweep.json" else "sweep" if path.name in NOTES else "other"


NOTES = (".figures.json", "jobs.jsonl", "events.jsonl")


def damage(path: Path, chance: random.Random) -> str:
    """Cuts a file short or changes a byte of it, in place; says which. Empty: there was nothing to damage."""
    about = path.stat()
    if not about.st_size:
        return ""
    with path.open("r+b") as file:
        place = chance.randrange(about.st_size)
        if chance.random() < 0.35:
            file.truncate(place)
            how = f"cut to {place} of {about.st_size} bytes"
        else:
            file.seek(place)
            old = file.read(1)[0]
            file.seek(place)
            file.write(bytes([old ^ chance.randrange(1, 256)]))
            how = f"byte {place} of {about.st_size}"
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    return how


class Nursery:
    """Commands as forks of a process that has imported all they need: where cores are few, imports are most of a round.

    Stages then run in the command's own process. Everything else is as from a shell.
    """

    def __init__(self, environment: dict[str, str]):
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from benchmarks import faults; faults.nurse()"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Forked:
    """A command of a nursery's, with what of Popen is used here."""

    returncode: int | None = None

    def __init__(self, nursery: Nursery, words: Sequence[str], log: Path):
        self._nursery = nursery
        self.pid = int(nursery.ask([list(words), str(log)]))

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._nursery.ask(self.pid)
        return self.returncode

    def wait(self, seconds: float = PATIENCE) -> int:
        end = time.monotonic() + seconds
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("the command", seconds)
            time.sleep(0.1)
        return code

    def kill(self) -> None:
        os.kill(self.pid, 9)


def nurse() -> None:
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer  # noqa: F401

    from evolve import launch, trainer, workers  # noqa: F401
    from evolve import main as command
    from sweeps import report  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            ended, status = os.waitpid(asked, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
            continue
        words, log = asked
        pid = os.fork()
        if pid:
            print(pid, flush=True)
            continue
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for target in (0, 1, 2):
            os.dup2(file if target else os.open(os.devnull, os.O_RDONLY), target)
        launch.Workers = lambda setting: workers.Inline(setting)  # type: ignore
        sys.argv = ["evolve/main.py", *words]
        code = 1
        try:
            code = command.main()
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class House:
    """An output, the command that fills it, and what has befallen it."""

    nursery: Nursery | None = None

    def __init__(self, output: Path, words: Sequence[str], chance: random.Random, environment: dict[str, str]):
        self.output, self.words, self.chance, self.environment = output, words, chance, environment
        self.faults: list[dict[str, Any]] = []
        self.unclear: list[str] = []
        self.said: list[str] = []
        self.served: list[str] = []
        self.log = output.parent.parent / f"{output.parent.name}-{output.name}.log"  # never on a full disk
        output.parent.mkdir(parents=True, exist_ok=True)
        self.there = list(Store(output / "store").ids())
        self.journal = Journal(output / "store")

    def command(self) -> list[str]:
        return [sys.executable, str(ROOT / "evolve" / "main.py"), *self.words, f"output={self.output}"]

    def start(self, before: Sequence[str] = (), environment: dict[str, str] | None = None) -> Any:
        if self.nursery is not None:
            return Forked(self.nursery, self.command()[2:], self.log)
        log = self.log.open("ab")
        return subprocess.Popen(
            [*before, *self.command()],
            cwd=ROOT,
            env={**self.environment, **(environment or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )

    def run(self, *command: str) -> tuple[int, str]:
        """A command's end, and what it said; told apart: what it says of itself, and a traceback."""
        if self.nursery is not None and not command:
            return self._run_forked()
        try:
            done = subprocess.run(
                command or self.command(), cwd=ROOT, env=self.environment, capture_output=True, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            self.unclear.append(f"no end in {PATIENCE} s: {' '.join(command[1:4]) or 'the command'}")
            return 1, ""
        text = (done.stdout + done.stderr).decode(errors="replace")
        with self.log.open("a") as file:
            file.write(text)
        errors = done.stderr.decode(errors="replace").strip().splitlines()
        if "Traceback" in text:
            self.unclear.append(f"{' '.join(command[1:3]) or 'the command'}: {errors[-1][:300] if errors else ''}")
        elif done.returncode and errors:
            self.said.append(errors[-1][:300])
        return done.returncode, text

    def _run_forked(self) -> tuple[int, str]:
        before = self.log.stat().st_size if self.log.exists() else 0
        try:
            code = self.start().wait()
        except subprocess.TimeoutExpired:
            self.unclear.append(f"no end in {PATIENCE} s: the command")
            return 1, ""
        text = self.log.read_bytes()[before:].decode(errors="replace")
        errors = [line for line in text.splitlines() if line.startswith("error: ")]
        if "Traceback" in text or (code and not errors):
            self.unclear.append(f"the command: {text.strip().splitlines()[-1:]}")
        self.said += [line[:300] for line in errors]
        return code, text

    def fault(self, kind: str, what: str, how: str = "") -> None:
        self.faults.append({"kind": kind, "what": what, "how": how})

    def damage(self, path: Path) -> bool:
        """One fault; False where the file was gone or empty."""
        kind = sort(path, self.output)
        place = path.relative_to(self.output / "store").parts if kind in ("record", "artefact") else ()
        if place:
            self.journal.events.append(("damaged", "/".join(place[:2])))
        try:
            how = damage(path, self.chance)
        except OSError:
            return False
        if how:
            self.fault(kind, str(path.relative_to(self.output)), how)
            self.faults[-1]["after"] = len(self.journal.events)
        return bool(how)

    def files(self, *kinds: str) -> dict[str, list[Path]]:
        found: dict[str, list[Path]] = {}
        for path in sorted(self.output.rglob("*")):
            with suppress(OSError):
                kind = sort(path, self.output) if path.is_file() else ""
                if (not kinds and kind not in ("", "other")) or kind in kinds:
                    found.setdefault(kind, []).append(path)
        return found

    def finish(self, end: Callable[[], bool] = lambda: True, most: int = 12) -> None:
        """The same command until it has nothing left to do, `store check` between."""
        for _ in range(most):
            code, _ = self.run()
            if code or not end() or len(tables(self.output)) < len(TABLES):
                continue
            code, _ = self.run(sys.executable, "-m", "evolve.store", "check", str(self.output))
            if code == 0:
                return
        self.unclear.append(f"not done after the same command, {most} times")

    def outcome(self, want: dict[str, Any], drawn: dict[str, str]) -> dict[str, Any]:
        time.sleep(0.3)  # the journal's last lines
        lost, twice = account(self.there, self.journal.events)
        missing, changed = different(want, results(self.output))
        untold, redrawn = different(drawn, tables(self.output))
        for fault in self.faults:
            place = fault["what"].split("/")
            if after := fault.pop("after", None):
                later = self.journal.events[after:]
                path = self.output / fault["what"]
                again = ("aside", "/".join(place[1:3])) in later
                fault["became"] = "made again" if again else "is there" if path.exists() else "gone"
        return {
            "faults": self.faults,
            "lost": lost + missing + untold,
            "corrupt_served": self.served + changed + redrawn,
            "run_twice": twice,
            "unclear": self.unclear,
            "said": dict(Counter(self.said)),
        }


def ours(output: Path) -> list[tuple[str, psutil.Process]]:
    """The processes of commands on an output: command, worker, launcher (torchrun), rank, job (under Slurm)."""
    found = []
    heads: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            words = process.cmdline()
            text = " ".join(words)
            if f"output={output}" in words and "main.py" in text:
                heads.append(process)
                found.append(("command", process))
            elif "submitit.core._submit" in text and str(output) in text and words and "python" in words[0]:
                heads.append(process)
                found.append(("job", process))
    seen: set[int] = set()
    for head in heads:
        with suppress(psutil.Error):
            for child in head.children(recursive=True):
                with suppress(psutil.Error):
                    text = " ".join(child.cmdline())
                    if child.pid in seen or "resource_tracker" in text:
                        continue
                    seen.add(child.pid)
                    if "spawn_main" in text:
                        found.append(("worker", child))
                    elif "torch.distributed.run" in text:
                        found.append(("torchrun", child))
                    elif "evolve.processes" in text:
                        found.append(("rank", child))
    return found


def kill(house: House, *kinds: str) -> str:
    """kill -9 of one of our processes, of whichever kind there is; which."""
    there: dict[str, list[psutil.Process]] = {}
    for kind, process in ours(house.output):
        if kind in kinds:
            there.setdefault(kind, []).append(process)
    if not there:
        return ""
    kind = house.chance.choice(sorted(there))
    process = house.chance.choice(there[kind])
    with suppress(psutil.Error):
        process.kill()
        house.fault(f"kill {kind}", f"process {process.pid}")
        return kind
    return ""


# Rounds: each does about `count` faults to a house


def rest(house: House, count: int, want: dict[str, Any], drawn: dict[str, str]) -> None:
    stages = list(Store(house.output / "store").ids())
    for stage in house.chance.sample(stages, 4):
        house.journal.events.append(("damaged", stage))
        shutil.rmtree(house.output / "store" / stage)
    found = house.files("record", "artefact", "judgment", "digest", "sweep.json", "sweep", "ledger")
    while len(house.faults) < count and found:
        kinds = sorted(found)
        [kind] = house.chance.choices(kinds, [3 if kind in ("artefact", "record") else 1 for kind in kinds])
        path = house.chance.choice(found[kind])
        found[kind].remove(path)
        if not found[kind]:
            del found[kind]
        house.damage(path)
    for folder in house.output.glob("sweeps/*"):  # a reader that nothing has been verified for
        before = [name for name in TABLES if (folder / name).exists()]
        for name in before:
            (folder / name).unlink()
        house.run(sys.executable, "-m", "evolve.status", str(folder))
        code, said = house.run(sys.executable, "-m", "sweeps.report", str(folder))
        now = tables(house.output)
        if before and code == 0 and "missing" not in said and now != drawn:
            house.served += [f"as drawn: {name}" for name in different(drawn, now)[1]]
    house.finish()


def live(house: House, count: int, kinds: Sequence[str] = ("command", "worker")) -> None:
    process = house.start()
    began = time.monotonic()
    while len(house.faults) < count and time.monotonic() - began < PATIENCE:
        house.journal.wait_for(len(house.journal.events) + house.chance.randrange(5), house.chance.uniform(1, 20))
        if process.poll() is not None:
            if process.returncode == 0:
                break
            process = house.start()
        elif len(list((house.output / "store").glob("*/.*.lease"))) == 0:
            continue  # still starting
        elif kinds == ("command", "worker") and house.chance.random() < 0.5:
            found = house.files("lease", "partial", "judgment", "record", "artefact", "sweep.json")
            for kind in ("lease", "partial"):  # there for moments, so they come first
                if kind in found and house.chance.random() < 0.6:
                    found = {kind: found[kind]}
            if found:
                house.damage(house.chance.choice(found[house.chance.choice(sorted(found))]))
        elif kill(house, *kinds) == "command":
            process.wait()
    process.wait()
    house.finish()


def full(house: House, count: int) -> None:
    size = 200
    for _ in range(count):
        subprocess.run(["mount", "-o", f"remount,size={size}k", str(house.output.parent)], check=True)
        code, said = house.run()
        if code == 0:
            break
        house.fault("disk full", f"{size} KiB", house.said[-1] if house.said else "")
        if "space" not in said:
            house.unclear.append(f"disk full at {size} KiB, and not said: {said.strip().splitlines()[-1:]}")
        size += house.chance.randrange(100, 900)
    subprocess.run(["mount", "-o", "remount,size=200m", str(house.output.parent)], check=True)
    house.finish()


def clock(house: House, count: int) -> None:
    boot = Path("/proc/stat").read_text()
    before = int(boot.split("btime ")[1].split()[0])
    stats, offsets = [], []
    for number in range(2):
        stats.append(house.output.parent / f"stat-{house.output.name}-{number}")
        offsets.append(house.output.parent / f"offset-{house.output.name}-{number}")

    def jump(number: int, seconds: int) -> None:
        stats[number].write_text(boot.replace(f"btime {before}", f"btime {before + seconds}"))
        offsets[number].write_text(f"{seconds:+d}\n")

    def start(number: int) -> subprocess.Popen[bytes]:
        return house.start(
            ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/stat && exec "$@"', str(stats[number])],
            {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME_TIMESTAMP_FILE": str(offsets[number]),
                "FAKETIME_CACHE_DURATION": "1",
                "FAKETIME_DONT_FAKE_MONOTONIC": "1",
                "NO_FAKE_STAT": "1",
            },
        )

    for number in range(2):
        jump(number, 0)
    processes = [start(number) for number in range(2)]
    began = time.monotonic()
    while len(house.faults) < count and time.monotonic() - began < PATIENCE:
        time.sleep(house.chance.uniform(1, 5))
        for number, process in enumerate(processes):
            if process.poll() is not None and process.returncode:
                processes[number] = start(number)
        if all(process.poll() is not None for process in processes):
            break
        number, seconds = house.chance.randrange(2), house.chance.choice((-1, 1)) * house.chance.randrange(3600, 43200)
        jump(number, seconds)
        house.fault("clock", f"command {number}", f"{seconds:+d} s")
    for process in processes:
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            house.unclear.append("a command whose clock jumped did not end")
            process.kill()
    house.finish()


def slurm(house: House, count: int, cluster: Any, want: dict[str, Any]) -> None:
    def idle() -> bool:
        return all(process.poll() is not None for process in submitting) and not cluster.queue()

    def whole() -> bool:
        deadline = time.monotonic() + PATIENCE
        while cluster.queue() and time.monotonic() < deadline:
            time.sleep(1)
        return not set(want) - set(Store(house.output / "store").ids())

    submitting = [house.start()]
    began = time.monotonic()
    while len(house.faults) < count and time.monotonic() - began < PATIENCE:
        time.sleep(house.chance.uniform(2, 8))
        if idle():
            if whole():
                break
            submitting.append(house.start())
            continue
        what = house.chance.choice(("node", "controller", "job", "job", "worker", "submit", "file", "file", "store"))
        busy = sorted({job.node for job in cluster.queue() if job.state == "RUNNING"})
        if what == "node" and busy:
            node = house.chance.choice(busy)
            cluster.kill_node(node, noticed=True)
            house.fault("node", node)
            time.sleep(2)
            cluster.start_node(node)
        elif what == "controller":
            cluster.kill_controller()
            house.fault("slurmctld", "killed")
            time.sleep(1)
            cluster.start_controller()
        elif what in ("job", "worker"):
            kill(house, what)
        elif what == "submit" and submitting[-1].poll() is not None:
            submitting.append(house.start())
            time.sleep(house.chance.uniform(3, 25))
            if submitting[-1].poll() is None:
                submitting[-1].kill()
                house.fault("kill command", f"process {submitting[-1].pid}", "that submits")
        else:
            found = house.files(*(("job",) if what == "file" else ("record", "artefact", "lease", "partial", "sweep")))
            if found:
                house.damage(house.chance.choice(found[house.chance.choice(sorted(found))]))
    for process in submitting:
        process.wait()
    house.finish(whole)


@contextmanager
def tmpfs(folder: Path) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def rounds(only: Sequence[str], faults: int) -> list[tuple[str, int]]:
    """(round, how many faults it is to have)."""
    size = {"rest": 45, "live": 15, "ranks": 8, "full": 8, "clock": 8, "slurm": 17}
    found = []
    for name, share in SHARE.items():
        left = round(share * faults / sum(SHARE.values()))
        while name in only and left > 0:
            found.append((name, min(left, size[name])))
            left -= size[name]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHARE, default=list(SHARE))
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/evolve-faults"))
    parser.add_argument("--fork", action="store_true")
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    from tests.slurm.cluster import Cluster
    from tests.slurm.install import Unavailable
    from tests.test_judges import Fake

    began = time.monotonic()
    given.folder.mkdir(parents=True, exist_ok=True)
    scratch = given.folder / f"{os.getpid()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled", "ANNOTATOR_API_KEY": "none"}
    for path in () if given.resume else given.folder.glob("rounds-*.json"):
        path.unlink()
    known: list[dict[str, Any]] = []
    missing: list[str] = []
    with ExitStack() as opened:
        judge = opened.enter_context(Fake())
        threading.Thread(target=judge.serve_forever, daemon=True).start()
        model = given.folder / "model"
        shutil.copytree(ROOT / "evolve" / "embedded", model, dirs_exist_ok=True)
        (model / "notes.txt").write_text("large enough for its hash to be kept\n" * 40_000)
        words = [*SWEEP, *JUDGED, *HERE, f"model.path={model}", f"annotator.url={judge.url}"]
        sweeps = {"ranks": [*RANKS, *HERE, "wandb.mode=disabled"]}

        def reference(name: str) -> tuple[Path, dict[str, Any], dict[str, str]]:
            house = House(given.folder / name / "out", sweeps.get(name, words), random.Random(), environment)
            if len(tables(house.output)) < len(TABLES):
                code, said = house.run()
                if code:
                    raise SystemExit(said[-3000:])
            return house.output, results(house.output), tables(house.output)

        nursery = Nursery(environment) if given.fork else None
        todo = rounds(given.only, given.faults)
        whole = reference("undisturbed")
        print(f"undisturbed: {time.monotonic() - began:.0f} s, {len(whole[1])} stages", flush=True)
        cluster = None
        for number, (name, count) in enumerate(todo):
            chance = random.Random(f"{given.seed} {name} {number}")
            start = time.monotonic()
            output, want, drawn = reference("ranks") if name == "ranks" else whole
            place = scratch / f"{number}-{name}" / "out"
            local = [*sweeps.get(name, words), *(["resources.retries=2"] if name in ("live", "ranks") else [])]
            if name == "rest":
                shutil.copytree(output, place)
            if name == "clock":
                local.append("resources.workers=1")
                if not FAKETIME.exists():
                    missing.append(f"clock: no {FAKETIME} (Debian: libfaketime)")
                    continue
            if name == "slurm":
                from tests.slurm.sweep import HERE as CLUSTER

                if cluster is None:
                    try:
                        logs = scratch / "slurm"
                        logs.mkdir(parents=True)
                        cluster = opened.enter_context(Cluster(logs, hold=8))
                    except Unavailable as reason:
                        missing.append(f"slurm: {reason}")
                        continue
                local = [*words, *(f"{key}={value}" for key, value in CLUSTER.items())]
            with tmpfs(place.parent) if name == "full" else ExitStack():
                variables = environment | (cluster.environment if name == "slurm" and cluster else {})
                house = House(place, local, chance, variables)
                house.nursery = nursery if name in ("rest", "live", "full") else None
                if name == "rest":
                    rest(house, count, want, drawn)
                elif name == "slurm":
                    slurm(house, count, cluster, want)
                elif name == "ranks":
                    live(house, count, ("rank", "torchrun", "worker"))
                else:
                    {"live": live, "full": full, "clock": clock}[name](house, count)
                found = house.outcome(want, drawn)
            known.append({"round": name, "seed": given.seed, "seconds": round(time.monotonic() - start), **found})
            write(given.folder, known, missing)
            short = {key: value if key in ("unclear", "said") else len(value) for key, value in found.items()}
            print(name, json.dumps(short, indent=1), flush=True)
            if not any(found[key] for key in BAD) and name != "full":
                shutil.rmtree(place.parent)
    total = write(given.folder, known, missing)
    return int(any(total[key] for key in BAD))


BAD = ("lost", "corrupt_served", "run_twice", "unclear")


def write(folder: Path, mine: Sequence[dict[str, Any]], missing: Sequence[str]) -> dict[str, Any]:
    """The result of all that was run in a folder, by this process and others. Returns the totals."""
    (folder / f"rounds-{os.getpid()}.json").write_text(json.dumps({"rounds": mine, "left_out": missing}))
    every = [json.loads(path.read_text()) for path in sorted(folder.glob("rounds-*.json"))]
    known = [one for part in every for one in part["rounds"]]
    kinds = Counter(fault["kind"] for one in known for fault in one["faults"])
    total: dict[str, Any] = {"faults": kinds.total(), **{key: sum(len(one[key]) for one in known) for key in BAD}}
    content = {
        **total,
        "by_kind": dict(sorted(kinds.items())),
        "seeds": sorted({one["seed"] for one in known}),
        "seconds": sum(one["seconds"] for one in known),
        "left_out": [line for part in every for line in part["left_out"]],
        "rounds": known,
    }
    FILE.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(total), flush=True)
    return total


if __name__ == "__main__":
    sys.exit(main())
