"""Identity, record, atomic commit, lease: where results live, and why one can believe them.

Identity. A stage's id is the hash of canonical JSON of: its kind and version, its config fields that are not at their
default and not marked RUNTIME, and the ids of its inputs, down to the content hashes of weights and data that came
from outside. Paths, hosts, devices, micro-batches, logging and retries never enter. What can't be serialised stably
raises. A default that changed under an old record is an error, not a wrong reuse.

Commit. A stage is built in a temporary folder beside its final one; its files are synced, then its record
(`record.json`, with the size and hash of each file) is written as the last file, then the folder takes its final name
by one rename. So a folder that has its name is whole; readers check all the same: the record's own checksum and the
files' sizes when planning, the files' hashes before a stage reads them. What fails the check is moved to
`quarantine/` and made again.

Lease. A stage that is being built has a lease: a file that appears by an atomic hard link, touched as a heartbeat. It
is taken over when its process is gone (same machine) or its heartbeat is (another machine, or a damaged file). It only
saves work: were two to build the same stage, the first commit stands.

    <output>/store/<kind>/<hash>/record.json, ...      .tmp-*  being built      .<hash>.lease  held
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import psutil
from pydantic import BaseModel

from evolve.config import RUNTIME, ConfigError, Section

RECORD = "record.json"
LATE = 65.0  # seconds after which every machine sees what is in a folder: NFS's acdirmax, 60, and some


class Corrupt(Exception):
    """A result whose files are not what its record says."""


def canonical(value: Any) -> str:
    """Canonical JSON. Raises TypeError or ValueError for whatever has no one stable form (sets, objects, NaN)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def seal(value: Mapping[str, Any], indent: int | None = 1) -> str:
    """JSON that says whether it is still what was written: with a checksum of the rest."""
    return json.dumps({**value, "checksum": digest(value)}, indent=indent) + "\n"


def unseal(text: bytes) -> dict[str, Any]:
    """What was sealed. Raises Corrupt if it isn't what was written; takes what never had a checksum as it is."""
    try:
        value = json.loads(text)
        if not isinstance(value, dict):
            raise ValueError("no object")
    except ValueError as error:
        raise Corrupt(f"unreadable ({error})") from None
    checksum = value.pop("checksum", None)
    if checksum is not None and checksum != digest(value):
        raise Corrupt("not what was written")
    return value


def append(path: Path, value: Mapping[str, Any]) -> None:
    """One more sealed line, apart from one that was left half written."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + seal(value, indent=None).encode())


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """What `append` wrote. Lines that aren't as they were written, or not yet, are left out."""
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with contextlib.suppress(Corrupt):
            yield unseal(line)


def replace(path: Path, text: str) -> None:
    """A file's content, whole or not at all, whenever this process is killed or the disk is full."""
    temporary = path.parent / f".tmp-{uuid.uuid4().hex[:8]}-{path.name}"
    try:
        temporary.write_text(text)
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)


def refresh(folders: Iterable[Path]) -> None:
    """Returns once this machine sees what was in folders when it was called, whatever it knew of them before.

    A client of NFS believes for up to a minute what it has cached of a folder, also that something isn't there; but not
    of one that it has itself changed since. Where it may not, the minute is waited for.
    """
    blind = False
    for place in {place: None for folder in folders for place in (folder.parent, folder)}:
        probe = place / f".tmp-lease-{uuid.uuid4().hex}"
        try:
            probe.touch()
            probe.unlink()
        except (FileNotFoundError, NotADirectoryError):  # nor is anything in it
            continue
        except OSError:
            blind = True
    if blind:
        time.sleep(LATE)


def open_up(folder: Path, like: Path) -> None:
    """Gives a folder's files the rights of one that was just written: safetensors writes for its owner alone,
    whatever the umask says, and a store may have several users."""
    for path in folder.rglob("*"):
        if path.is_file() and (mode := path.stat().st_mode) | like.stat().st_mode != mode:
            path.chmod(mode | like.stat().st_mode)


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings(section: BaseModel, *, defaults: bool) -> dict[str, Any]:
    """The fields of a section that decide what comes out: without RUNTIME ones and, unless asked, without defaults."""
    found: dict[str, Any] = {}
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if RUNTIME in info.metadata:
            continue
        if not defaults and not info.is_required() and value == info.default:
            continue
        found[name] = settings(value, defaults=defaults) if isinstance(value, BaseModel) else value
        if isinstance(value, tuple):
            found[name] = list(value)
    return found


def flatten(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, Mapping):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


@dataclass(frozen=True)
class Source:
    """Something from outside: weights or data. It is its content's hash (or the hub's commit), not its name or path."""

    kind: str
    path: str
    digest: str

    @property
    def id(self) -> str:
        return f"{self.kind}@{self.digest}"


class StageConfig(Section):
    """What decides a stage's result: the base of each kind's Config. What it says of the kind enters no identity.

    LIGHT: takes seconds, and no GPU. SHARED: several jobs can make its rows at once (parts.py). SPREADS: its ranks can
    be on several machines. COUNTED: which of its record's values says how much it did; None: none does. FOLLOWS: what
    the names of the inputs begin with that this follows from.
    """

    LIGHT: ClassVar[bool] = False
    SHARED: ClassVar[bool] = False
    SPREADS: ClassVar[bool] = False
    COUNTED: ClassVar[str | None] = None
    FOLLOWS: ClassVar[str | None] = None

    @property
    def light(self) -> bool:
        return self.LIGHT

    @property
    def gpus(self) -> int:
        """How many GPUs it uses, on a machine that has some."""
        return 0 if self.light else 1

    @property
    def ranks(self) -> int:
        """How many processes, each with a device, run it together (ranks.py)."""
        return 1


@dataclass(frozen=True, eq=False)
class Stage:
    """One node of the graph: `(typed config, input artefacts) -> one folder`."""

    kind: str
    version: int
    config: StageConfig
    inputs: Mapping[str, Stage | Source] = field(default_factory=dict)

    def __getstate__(self) -> dict[str, Any]:
        """Without the identity: who reads it back finds out by itself, from what it is going to run."""
        return {"kind": self.kind, "version": self.version, "config": self.config, "inputs": self.inputs}

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "version": self.version,
            "config": settings(self.config, defaults=False),
            "inputs": {name: item.id for name, item in self.inputs.items()},
        }

    @cached_property
    def id(self) -> str:
        return f"{self.kind}/{digest(self.identity)[:16]}"

    @cached_property
    def roots(self) -> frozenset[str]:
        """Ids of everything from outside that went into it, however far up."""
        above = [item.roots if isinstance(item, Stage) else frozenset([item.id]) for item in self.inputs.values()]
        return frozenset().union(*above)

    @property
    def stages(self) -> list[Stage]:
        """The inputs that are stages themselves."""
        return [item for item in self.inputs.values() if isinstance(item, Stage)]


@dataclass
class Report:
    """What a stage says of its own work: counts of what it dropped and why, tokens it spent, values to show, timing."""

    dropped: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    timing: dict[str, float] = field(default_factory=dict)  # where its time went: the one part that no two runs share


class Store:
    """The results of stages under one folder, shared by every sweep that names it, by any number of processes."""

    def __init__(self, root: Path, lease_timeout: float = 60.0):
        self.root = root
        self.lease_timeout = lease_timeout

    def folder(self, stage_id: str) -> Path:
        return self.root / stage_id

    def record(self, stage: Stage) -> dict[str, Any] | None:
        """The record of a finished stage, or None. Checks the record's checksum, the files' sizes, and the defaults.

        Raises ConfigError when a default has changed since: the same identity would now mean something else.
        """
        record = self._whole(stage.id)
        if record is None:
            return None
        then, now = flatten(record["config"]), flatten(settings(stage.config, defaults=True))
        for key in now.keys() & then.keys():
            if then[key] != now[key]:
                raise ConfigError(
                    f"{stage.kind}: the default of {key} was {then[key]!r} when {stage.id} was made and is "
                    f"{now[key]!r} now; restore it, or raise the stage's VERSION"
                )
        return record

    def read(self, stage_id: str) -> dict[str, Any] | None:
        """The record under an id; None if there is none. Raises Corrupt if it or a file's size is not as written."""
        folder = self.folder(stage_id)
        try:
            record = json.loads((folder / RECORD).read_bytes())
            checksum = record.pop("checksum")
            whole = checksum == digest(record) and record["id"] == stage_id
        except FileNotFoundError:
            if folder.is_dir():
                raise Corrupt(f"{stage_id}: no record in {folder}") from None
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Corrupt(f"{stage_id}: unreadable record ({error})") from None
        if not whole:
            raise Corrupt(f"{stage_id}: its record is not what was written")
        for name, entry in record["files"].items():
            try:
                size = (folder / name).stat().st_size
            except FileNotFoundError:
                raise Corrupt(f"{stage_id}: {name} is missing") from None
            if size != entry["bytes"]:
                raise Corrupt(f"{stage_id}: {name} has {size} bytes, its record says {entry['bytes']}")
        return record

    def open(self, item: Stage | Source) -> Path:
        """The folder (or file) of an input, each file's hash checked. Raises Corrupt, after moving the result aside."""
        if isinstance(item, Source):
            from evolve import sources

            return sources.fetch(item, self.root / "digests")
        try:
            self.verify(item.id)
        except Corrupt as error:
            self.quarantine(item.id)
            raise Corrupt(f"{error}; moved to {self.root / 'quarantine'}, the same command makes it again") from None
        return self.folder(item.id)

    def verify(self, stage_id: str) -> None:
        """Reads every file of a result. Raises Corrupt if one is not what its record says, or there is no record."""
        record = self.read(stage_id)
        if record is None:
            raise Corrupt(f"{stage_id}: gone")
        for name, entry in record["files"].items():
            if hash_file(self.folder(stage_id) / name) != entry["sha256"]:
                raise Corrupt(f"{stage_id}: {name} is not what was written")

    def content(self, stage_id: str, name: str) -> bytes:
        """A file of a result. Raises Corrupt if it isn't what its record says, or there is no record."""
        record = self.read(stage_id)
        if record is None:
            raise Corrupt(f"{stage_id}: gone")
        content = (self.folder(stage_id) / name).read_bytes()
        if hashlib.sha256(content).hexdigest() != record["files"][name]["sha256"]:
            raise Corrupt(f"{stage_id}: {name} is not what was written")
        return content

    def quarantine(self, stage_id: str) -> None:
        """Moves a broken result out of the way; whoever is second finds nothing left to move."""
        aside = self.root / "quarantine" / f"{stage_id.replace('/', '-')}-{uuid.uuid4().hex[:8]}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            self.folder(stage_id).rename(aside)

    @contextlib.contextmanager
    def build(self, stage: Stage) -> Iterator[Path]:
        """A temporary folder to build a stage in, for the lease's holder; what `commit` doesn't move is removed."""
        final = self.folder(stage.id)
        final.parent.mkdir(parents=True, exist_ok=True)
        for note in final.parent.glob(f".tmp-{final.name}-*.owner"):  # of builds that were killed on this machine
            with contextlib.suppress(FileNotFoundError):
                try:
                    over = ended(unseal(note.read_bytes()))
                except (Corrupt, KeyError, TypeError):  # killed while it wrote the note; the lease is ours now
                    over = True
                if over:
                    shutil.rmtree(note.with_suffix(""), ignore_errors=True)
                    note.unlink(missing_ok=True)
        temporary = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
        owner = temporary.with_suffix(".owner")
        try:
            owner.write_text(seal(this_process()))
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            owner.unlink(missing_ok=True)

    @property
    def judgments(self) -> Path:
        """A folder beside the store for judges' replies, which all sweeps share."""
        return self.root.parent / "judgments"

    def partial(self, stage_id: str) -> Path:
        """A folder for what a stage can go on from after it was killed; it is removed once the stage is done."""
        kind, name = stage_id.split("/")
        return self.root / kind / f".partial-{name}"

    def commit(self, stage: Stage, built: Path, report: Report, provenance: Mapping[str, Any]) -> dict[str, Any]:
        """Writes the record as the last file and gives the folder its name. Returns the record that stands."""
        files = {}
        for path in sorted(path for path in built.rglob("*") if path.is_file()):
            _sync(path)
            files[path.relative_to(built).as_posix()] = {"bytes": path.stat().st_size, "sha256": hash_file(path)}
        record: dict[str, Any] = {
            "id": stage.id,
            "identity": stage.identity,
            "config": settings(stage.config, defaults=True),
            "inputs": {name: item.id for name, item in stage.inputs.items()},
            "roots": sorted(stage.roots),
            "sources": {name: item.path for name, item in stage.inputs.items() if isinstance(item, Source)},
            "files": files,
            **asdict(report),
            **provenance,
        }
        (built / RECORD).write_text(seal(record))
        open_up(built, like=built / RECORD)
        _sync(built / RECORD)
        for folder in [built, *(path for path in built.rglob("*") if path.is_dir())]:
            _sync(folder)
        final = self.folder(stage.id)
        for _ in range(3):
            try:
                built.rename(final)
                _sync(final.parent)
                shutil.rmtree(self.partial(stage.id), ignore_errors=True)
                break
            except OSError:  # something has the name: a result committed meanwhile, or a broken one
                with contextlib.suppress(Corrupt):
                    if standing := self.read(stage.id):
                        return standing
                self.quarantine(stage.id)
        else:
            raise OSError(f"{final}: could not be written; is something else writing there?")
        return record

    def lease(self, stage: Stage) -> Lease | None:
        """The right to build a stage, or None while another process has it."""
        path = self.folder(stage.id)
        return Lease.take(path.parent / f".{path.name}.lease", self.lease_timeout)

    def kinds(self) -> list[str]:
        """The folders that hold results."""
        names = sorted(os.listdir(self.root)) if self.root.is_dir() else []
        return [name for name in names if name not in ("quarantine", "digests") and (self.root / name).is_dir()]

    def ids(self) -> Iterator[str]:
        """Ids of all folders in the store, whole or not."""
        for kind in self.kinds():
            yield from (f"{kind}/{name}" for name in sorted(os.listdir(self.root / kind)) if name[0] != ".")

    def records(self) -> Iterator[tuple[str, dict[str, Any] | None]]:
        """Every id in the store with its record; None for a result that is broken."""
        return ((stage_id, self._whole(stage_id)) for stage_id in self.ids())

    def _whole(self, stage_id: str) -> dict[str, Any] | None:
        try:
            return self.read(stage_id)
        except Corrupt:
            return None

    def newest(self, kind: str, count: int) -> list[dict[str, Any]]:
        """The records of a kind that were committed last, the newest first."""
        folder = self.root / kind
        if not folder.is_dir():
            return []
        with os.scandir(folder) as found:
            by_age = sorted(
                ((entry.stat().st_mtime, entry.name) for entry in found if entry.name[0] != "."), reverse=True
            )
        records = (self._whole(f"{kind}/{name}") for _, name in by_age)
        return list(itertools.islice((record for record in records if record is not None), count))

    def litter(self, days: float = 0) -> list[Path]:
        """What no record refers to: what was left over, and broken results. days: as `left_over` has it."""
        return self.left_over(days) + [self.folder(stage_id) for stage_id, record in self.records() if record is None]

    def left_over(self, days: float = 0) -> list[Path]:
        """Folders being built by nobody, dead leases, quarantined results.

        days: how long what a stage can go on from stays without being added to: under Slurm, its job may be waiting,
        and those that make shares of it hold no lease.
        """
        since = time.time() - 86400 * days
        found = list((self.root / "quarantine").glob("*"))
        # A builder has its lease before its folder, so leases are looked at after the folders have been listed.
        names = ((kind, name) for kind in self.kinds() for name in os.listdir(self.root / kind))
        hidden = [self.root / kind / name for kind, name in names if name[0] == "."]
        dead = Lease.dead((path for path in hidden if path.name.endswith(".lease")), self.lease_timeout)
        for path in hidden:
            name = path.name
            is_lease = name.endswith(".lease")
            if not (is_lease or name.startswith((".tmp-", ".partial-"))):
                continue  # the file system's own
            if name.startswith(".partial-") and days and _newest(path) > since:
                continue
            if name.startswith(".tmp-lease-") and not is_lease:  # of who takes one, which is no matter of hours
                found += [path] if _newest(path) < time.time() - 3600 else []
                continue
            lease = path if is_lease else path.with_name(f".{name.split('-')[1][:16]}.lease")
            if lease in dead or not (is_lease or lease.exists()):
                found.append(path)
        return found


def _newest(folder: Path) -> float:
    """When a folder, or anything in it, was last written."""
    found = 0.0
    for path in (folder, *folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):  # a checkpoint that a newer one has just replaced
            found = max(found, path.stat().st_mtime)
    return found


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Lease:
    """A file that says who builds a stage; held while its process lives and touches it.

    Relies on: link(2) failing if the name exists, and mtime set by the file server
    (docs/design.md, "On a shared file system").
    """

    def __init__(self, path: Path, token: str, timeout: float):
        self.path, self.token = path, token
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(timeout / 6,), daemon=True)

    @classmethod
    def take(cls, path: Path, timeout: float) -> Lease | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        token = uuid.uuid4().hex
        mine = path.parent / f".tmp-lease-{token}"
        try:
            mine.write_text(seal({**this_process(), "token": token, "timeout": timeout}))
            for _ in range(3):
                if cls._link(mine, path):
                    lease = cls(path, token, timeout)
                    lease._thread.start()
                    return lease
                judged = cls._content(path)
                if judged is None:  # given back just now
                    continue
                if not cls._dead({path: judged}, timeout, look_again=True):
                    return None
                os.utime(mine)  # a look at one that beats slowly takes longer than ours may be silent
                cls._clear(path, judged, mine, timeout)
            return None
        finally:
            mine.unlink(missing_ok=True)

    @classmethod
    def _clear(cls, path: Path, dead: bytes, mine: Path, timeout: float) -> None:
        """Removes a dead lease, if nobody else does or has: one process at a time, and only what it was judged by.

        Without that, of two that see a dead lease the later one would remove what the earlier one has taken since.
        """
        clearing = path.parent / f".tmp-lease-of{path.name}"
        if not cls._link(mine, clearing):
            if cls.is_stale(clearing, timeout):  # whoever cleared it was killed
                clearing.unlink(missing_ok=True)
            return
        try:
            if cls._content(path) == dead:
                path.unlink(missing_ok=True)
        finally:
            clearing.unlink(missing_ok=True)

    @classmethod
    def _link(cls, mine: Path, path: Path) -> bool:
        """Whether the name is ours now; over NFS it may be and exist, where the answer was lost and it asked again."""
        try:
            os.link(mine, path)
        except FileExistsError:
            return cls._content(path) == mine.read_bytes()
        return True

    @staticmethod
    def _content(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    @classmethod
    def is_stale(cls, path: Path, timeout: float) -> bool:
        """Whether a lease is held by nobody who lives, at one look. False if there is none. timeout: as in `dead`."""
        content = cls._content(path)
        return content is not None and bool(cls._dead({path: content}, timeout))

    @classmethod
    def dead(cls, paths: Iterable[Path], timeout: float) -> set[Path]:
        """Those held by nobody who lives, at two looks. timeout: of those that don't say how long they may be still."""
        contents = {path: content for path in paths if (content := cls._content(path)) is not None}
        return cls._dead(contents, timeout, look_again=True)

    @classmethod
    def _dead(cls, contents: Mapping[Path, bytes], timeout: float, look_again: bool = False) -> set[Path]:
        """look_again: after two beats of the slowest, for the server's clock may have jumped since the last one."""
        found, silent, beats = set[Path](), dict[Path, float](), 0.0
        for path, content in contents.items():
            limit = timeout
            try:
                holder = unseal(content)
                gone = ended(holder)
                limit = float(holder.get("timeout", timeout))
            except (Corrupt, KeyError, TypeError):
                gone = None  # damaged, by no process that holds or takes it: the heartbeat says whether one holds it
            if gone:
                found.add(path)
            if gone is not None:
                continue
            # Given back just now, or seen by one who may only look: not dead.
            with contextlib.suppress(FileNotFoundError, PermissionError):
                # Both times are the file server's, so clocks that disagree do no harm.
                probe = path.parent / f".tmp-lease-{uuid.uuid4().hex}"
                probe.touch()
                now = probe.stat().st_mtime
                probe.unlink()
                beat = path.stat().st_mtime
                if abs(now - beat) > limit:
                    silent[path] = beat
                    beats = max(beats, limit / 3)
        if look_again and silent:
            time.sleep(beats)
        for path, beat in silent.items():
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime == beat:
                    found.add(path)
        return found

    def _beat(self, every: float) -> None:
        while not self._stop.wait(every):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self._stop.set()
        if self.token.encode() in (self._content(self.path) or b""):
            self.path.unlink(missing_ok=True)

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def this_process() -> dict[str, Any]:
    """This process: its machine and pid namespace (only there does a pid mean the same process), pid, and birth."""
    try:
        space = f"{os.stat('/proc/self/ns/pid').st_ino}:{_BOOT.read_text().strip()}"
    except OSError:
        space = "0"
    return {"host": f"{socket.gethostname()}:{space}", "pid": os.getpid(), "born": _born(os.getpid())}


_BOOT = Path("/proc/sys/kernel/random/boot_id")


def _born(pid: int) -> float:
    """When a process began, by a clock that nobody sets: psutil's time moves with the machine's clock under Linux.

    Raises psutil.NoSuchProcess.
    """
    process = psutil.Process(pid)
    try:
        return float(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])  # ticks since boot
    except FileNotFoundError:
        if _BOOT.exists():
            raise psutil.NoSuchProcess(pid) from None
        return process.create_time()


def ended(process: Mapping[str, Any]) -> bool | None:
    """Whether a process of `this_process` has ended; None where this machine can't tell."""
    if process["host"] != this_process()["host"]:
        return None
    try:
        pid = process["pid"]
        return abs(_born(pid) - process["born"]) > 1 or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def provenance(code: Mapping[str, Any], started: float, seconds: float, devices: int) -> dict[str, Any]:
    """Where and with what a stage was made: for the record, never for the identity.

    started: in seconds since 1970; seconds: what it took, by a clock that nobody sets; devices: that worked at once.
    """
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("torch", "transformers", "trl", "accelerate", "peft", "datasets", "tokenizers", "numpy", "scipy"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return {
        "versions": {"python": platform.python_version(), **versions},
        "code": dict(code),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
        "seconds": round(seconds, 3),
        "devices": devices,
    }


def main() -> int:
    """The store under outputs/ or FOLDER.

    list    every finished stage: when, how long, how big
    check   reads every file and compares it with its record; what is broken is moved to quarantine/, for the sweep's
            command to make again, and the exit status is 1
    prune   removes what no record refers to: half-built folders, dead leases, broken results, and what unfinished
            stages can go on from, once nothing was added to it for some days; what is finished stays
    """
    import argparse
    import sys

    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m evolve.store", description=main.__doc__, formatter_class=layout)
    parser.add_argument("what", choices=("list", "check", "prune"))
    parser.add_argument("folder", nargs="?", type=Path, default=Path("outputs"))
    parser.add_argument("--days", type=float, default=7, help="those days (7); a job may wait for so long in a queue")
    given = parser.parse_args()
    root = given.folder / "store" if (given.folder / "store").is_dir() else given.folder
    if not root.is_dir():
        print(f"error: {root}: no such folder", file=sys.stderr)
        return 2
    store = Store(root)
    if given.what == "list":
        unreferred = len(store.left_over(given.days))
        for stage_id, record in store.records():
            if record is None:
                unreferred += 1
                continue
            size = sum(entry["bytes"] for entry in record["files"].values())
            print(f"{record['started']}  {record['seconds']:8.1f} s  {size / 2**20:9.2f} MiB  {stage_id}")
        print(f"{unreferred} things that no record refers to; prune removes them")
        return 0
    if given.what == "check":
        broken = 0
        for stage_id in store.ids():
            try:
                store.verify(stage_id)
            except Corrupt as error:
                broken += 1
                print(error)
                store.quarantine(stage_id)
        aside = f"; moved to {root / 'quarantine'}, the sweep's command makes them again" if broken else ""
        print(f"{broken} broken results{aside}")
        return 1 if broken else 0
    for path in store.litter(given.days):
        print(f"removed {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
