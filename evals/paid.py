"""Replies that were paid for, kept for whoever asks the same again, and what a judge has cost so far.

A reply is kept under the hash of what was asked (model, messages, fields, which attempt), as soon as it arrives and
before it is used, so that no answer is paid twice, whichever sweep asked first and however it ended.

    <cache>/3f/3fa8...json          one reply: the request, what was said, tokens, dollars, a checksum
    <cache>/3f/3fa8...asking        a process asks for it now, so that no other does
    <cache>/ledger/<model>/*.json   what each process has spent on a model, and has reserved for requests under way

Cost. Before a request is sent, the most that it may cost (its bytes as tokens, and max_tokens) is reserved in the
process's own file; then all processes' files are added up. So of two that reserve at once, one at least sees both, and
the cap is not passed. A try that was cut off without an answer may have been charged, and counts as the most it may
have cost; so does what a dead process had reserved, unless the reply that it paid for is in the cache.
Relies on: rename(2) being atomic, a file that is opened after it showing the new content, and exclusive creation.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from evals.games import Reply
from evolve.store import Corrupt, digest, ended, seal, this_process, unseal


@dataclass(frozen=True)
class Paid:
    """A reply as the cache holds it; `by` is the ledger's file of who paid. Tokens are None where no server said."""

    reply: Reply
    read: int | None
    generated: int | None
    dollars: float
    by: str


class OverCap(Exception):
    """The cap leaves no room for a request; `spent` dollars are settled, the request may cost `bound`."""

    def __init__(self, spent: float, bound: float):
        self.spent, self.bound = spent, bound


class Stopped(Exception):
    """Something else has ended the asking."""


def _write(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON file that is there as a whole or not at all, even after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{uuid.uuid4().hex}"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)


def _dead(claim: Path) -> bool:
    """Whether the process that claims is known to have ended: not of one whose claim is damaged, or being written."""
    try:
        return bool(ended(unseal(claim.read_bytes())))
    except (FileNotFoundError, Corrupt, KeyError, TypeError):
        return False


class Cache:
    """Replies by what was asked, shared by any number of processes."""

    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Paid | None:
        """None if there is none, or it is not what was written, which is said."""
        try:
            found = json.loads(self.path(key).read_bytes())
            if found.pop("checksum") == digest(found) and digest(found.pop("request")) == key:
                return Paid(Reply(**found.pop("reply")), **found)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError):
            pass
        print(f"{self.path(key)}: not what was written; asked again", flush=True)
        return None

    @contextlib.contextmanager
    def asking(self, key: str, stop: threading.Event, patience: float) -> Iterator[Paid | None]:
        """The right to ask for a reply, or the reply that another process has got while it had the right.

        patience: seconds after which the right of another machine's process is taken for a dead one's. Raises Stopped.
        """
        claim = self.path(key).with_suffix(".asking")
        claim.parent.mkdir(parents=True, exist_ok=True)
        since = time.monotonic()
        while True:
            try:
                with claim.open("x") as file:
                    file.write(seal(this_process()))
                break
            except FileExistsError:
                pass
            except OSError:  # the disk is full
                claim.unlink(missing_ok=True)
                raise
            if (found := self.get(key)) is not None:
                yield found
                return
            if stop.is_set():
                raise Stopped
            if _dead(claim) or time.monotonic() - since > patience:
                claim.unlink(missing_ok=True)
                continue
            stop.wait(0.1)
        try:
            yield self.get(key)
        finally:
            claim.unlink(missing_ok=True)

    def put(self, key: str, request: Mapping[str, Any], paid: Paid) -> None:
        entry = {"request": request, **asdict(paid)}
        _write(self.path(key), {**entry, "checksum": digest(entry)})


class Ledger:
    """What one judge model has cost, all processes' files together. This process's file is written by it alone.

    Args:
        cap: dollars, None for no end.
        cache: where the replies are that settle what a dead process had reserved.
        patience: seconds after which another machine's reservation that never changes is taken for spent.
    """

    def __init__(self, folder: Path, model: str, cap: float | None, cache: Cache, patience: float):
        self.folder, self.model, self.cap, self.cache, self.patience = folder, model, cap, cache, patience
        self.name = uuid.uuid4().hex
        self._spent, self._reserved = 0.0, dict[str, float]()
        self._process = this_process()
        self._closed: dict[str, float] = {}  # what others spent that have ended in order, and so never changes
        self._changed = threading.Condition()

    def reserve(self, key: str, bound: float, stop: threading.Event) -> None:
        """Waits for room while others' requests under way may leave some. Raises OverCap if there is none."""
        seen, since = (-1.0, -1.0), time.monotonic()
        while not stop.is_set():
            with self._changed:
                self._reserved[key] = bound
                self._save()
                if self.cap is None:
                    return
                spent, held = self.total()
                if spent + held <= self.cap:
                    return
                self._settle(key, 0.0)
                if spent + bound > self.cap or held <= bound:
                    raise OverCap(spent, bound)
                if (spent, held) != seen:
                    seen, since = (spent, held), time.monotonic()
                elif time.monotonic() - since > self.patience:
                    raise OverCap(spent + held - bound, bound)
                self._changed.wait(0.2)
        raise Stopped

    def settle(self, key: str, dollars: float) -> None:
        """Puts what a request cost in the place of what was reserved for it."""
        with self._changed:
            self._settle(key, dollars)
            self._changed.notify_all()

    def _settle(self, key: str, dollars: float) -> None:
        del self._reserved[key]
        self._spent += dollars
        self._save()

    def close(self) -> None:
        """Nothing more will be spent under this name."""
        with self._changed:
            if self._spent and not self._reserved:
                self._save(closed=True)

    def total(self) -> tuple[float, float]:
        """Dollars spent, and reserved for what is under way. Raises RuntimeError for a file that can't be read."""
        spent: list[float] = []
        held: list[float] = []
        for path in self.folder.glob("*.json"):
            if path.stem in self._closed:
                continue
            try:
                found = unseal(path.read_bytes())
                process, reserved = found["process"], dict(found["reserved"])
                if found["closed"]:
                    self._closed[path.stem] = float(found["spent"])
                else:
                    spent.append(float(found["spent"]))
            except (Corrupt, ValueError, KeyError, TypeError) as error:
                raise RuntimeError(f"{path}: can't be read ({error}), so what was spent isn't known") from None
            for key, bound in reserved.items():
                paid = self.cache.get(key) if path.stem != self.name else None
                if paid is not None and paid.by == path.stem:
                    spent.append(paid.dollars)
                else:
                    (spent if path.stem != self.name and ended(process) else held).append(bound)
        return math.fsum([*spent, *self._closed.values()]), math.fsum(held)

    def _save(self, closed: bool = False) -> None:
        state = {"spent": self._spent, "reserved": self._reserved, "closed": closed}
        content = {"model": self.model, "process": self._process, **state}
        _write(self.folder / f"{self.name}.json", {**content, "checksum": digest(content)})
