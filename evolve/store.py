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
is taken over when its process is gone (same machine) or its heartbeat is (another machine). It only saves work:
were two to build the same stage, the first commit stands.

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
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from pydantic import BaseModel

from evolve.config import RUNTIME, ConfigError, Section

RECORD = "record.json"


class Corrupt(Exception):
    """A result whose files are not what its record says."""


def canonical(value: Any) -> str:
    """Canonical JSON. Raises TypeError or ValueError for whatever has no one stable form (sets, objects, NaN)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=True)


def digest(value: Any) -> str:
    """SHA-256 of canonical JSON, hexadecimal."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()


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


@dataclass(frozen=True, eq=False)
class Stage:
    """One node of the graph: `(typed config, input artefacts) -> one folder`."""

    kind: str
    version: int
    config: Section
    inputs: Mapping[str, Stage | Source] = field(default_factory=dict)

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
            with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
                if ended(json.loads(note.read_text())):
                    shutil.rmtree(note.with_suffix(""), ignore_errors=True)
                    note.unlink(missing_ok=True)
        temporary = final.parent / f".tmp-{final.name}-{uuid.uuid4().hex[:8]}"
        owner = temporary.with_suffix(".owner")
        owner.write_text(json.dumps(this_process()))
        temporary.mkdir()
        try:
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
        (built / RECORD).write_text(json.dumps({**record, "checksum": digest(record)}, indent=1) + "\n")
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

    def litter(self) -> list[Path]:
        """What no record refers to: what was left over, and broken results."""
        return self.left_over() + [self.folder(stage_id) for stage_id, record in self.records() if record is None]

    def left_over(self) -> list[Path]:
        """Folders being built by nobody, dead leases, quarantined results."""
        found = list((self.root / "quarantine").glob("*"))
        for kind in self.kinds():
            folder = self.root / kind
            # A builder has its lease before its folder, so leases are looked at after the folders have been listed.
            for name in [name for name in os.listdir(folder) if name[0] == "."]:
                is_lease = name.endswith(".lease")
                if not (is_lease or name.startswith((".tmp-", ".partial-"))):
                    continue  # the file system's own
                lease = folder / (name if is_lease else f".{name.split('-')[1][:16]}.lease")
                stale = Lease.is_stale(lease, self.lease_timeout)
                if stale or not (is_lease or lease.exists()):
                    found.append(folder / name)
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
        mine.write_text(json.dumps({**this_process(), "token": token}))
        try:
            for _ in range(3):
                try:
                    os.link(mine, path)
                    lease = cls(path, token, timeout)
                    lease._thread.start()
                    return lease
                except FileExistsError:
                    judged = cls._content(path)
                    if judged is None:  # given back just now
                        continue
                    if not cls._is_stale(judged, path, timeout):
                        return None
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
        try:
            os.link(mine, clearing)
        except FileExistsError:
            if cls.is_stale(clearing, timeout):  # whoever cleared it was killed
                clearing.unlink(missing_ok=True)
            return
        try:
            if cls._content(path) == dead:
                path.unlink(missing_ok=True)
        finally:
            clearing.unlink(missing_ok=True)

    @staticmethod
    def _content(path: Path) -> bytes | None:
        try:
            return path.read_bytes()
        except FileNotFoundError:
            return None

    @classmethod
    def is_stale(cls, path: Path, timeout: float) -> bool:
        """Whether a lease is held by nobody who lives. False if there is none."""
        content = cls._content(path)
        return content is not None and cls._is_stale(content, path, timeout)

    @classmethod
    def _is_stale(cls, content: bytes, path: Path, timeout: float) -> bool:
        try:
            holder = json.loads(content)
            gone = ended(holder)
        except (ValueError, KeyError, TypeError):
            return True  # a lease appears whole, so this one is damaged
        if gone is not None:
            return gone
        try:
            # Both times are the file server's, so clocks that disagree do no harm.
            probe = path.parent / f".tmp-lease-{uuid.uuid4().hex}"
            probe.touch()
            now = probe.stat().st_mtime
            probe.unlink()
            return now - path.stat().st_mtime > timeout
        except FileNotFoundError:
            return False

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
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    me = psutil.Process()
    return {"host": f"{socket.gethostname()}:{space}", "pid": me.pid, "born": me.create_time()}


def ended(process: Mapping[str, Any]) -> bool | None:
    """Whether a process of `this_process` has ended; None where this machine can't tell."""
    if process["host"] != this_process()["host"]:
        return None
    try:
        found = psutil.Process(process["pid"])
        return abs(found.create_time() - process["born"]) > 1 or found.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def provenance(code: Mapping[str, Any], started: float) -> dict[str, Any]:
    """Where and with what a stage was made: for the record, never for the identity."""
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
        "seconds": round(time.time() - started, 3),
    }


def main() -> int:
    """python -m evolve.store [list | check | prune] [FOLDER]: the store under outputs/ or FOLDER.

    list    every finished stage: when, how long, how big
    check   reads every file and compares it with its record; exit 1 if something is broken
    prune   removes what no record refers to: half-built folders, checkpoints, dead leases, broken results; what is
            finished stays
    """
    import sys

    words = sys.argv[1:]
    if not words or words[0] not in ("list", "check", "prune") or len(words) > 2:
        print(main.__doc__)
        return 0 if {"-h", "--help"} & set(words) else 2
    root = Path(words[1] if len(words) == 2 else "outputs")
    root = root / "store" if (root / "store").is_dir() else root
    if not root.is_dir():
        print(f"error: {root}: no such folder", file=sys.stderr)
        return 2
    store = Store(root)
    if words[0] == "list":
        unreferred = len(store.left_over())
        for stage_id, record in store.records():
            if record is None:
                unreferred += 1
                continue
            size = sum(entry["bytes"] for entry in record["files"].values())
            print(f"{record['started']}  {record['seconds']:8.1f} s  {size / 2**20:9.2f} MiB  {stage_id}")
        print(f"{unreferred} things that no record refers to; prune removes them")
        return 0
    if words[0] == "check":
        broken = 0
        for stage_id in store.ids():
            try:
                store.verify(stage_id)
            except Corrupt as error:
                broken += 1
                print(error)
        print(f"{broken} broken results" + ("; prune removes them" if broken else ""))
        return 1 if broken else 0
    for path in store.litter():
        print(f"removed {path}")
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
