"""A command's own copy of code and configuration, so that what is edited or pulled while it runs doesn't reach it.

    .snapshots/<hash>/    evolve/, conf/, ... as they were at the command's start; snapshot.json: commit, dirty, root

`enter` makes the copy, unless there is the same already, and starts the interpreter again on the copy's main.py, with
the same options and words: all that the command does or starts is done by the copy. What only looks needs none; under a
debugger, whose breakpoints are in the checkout's files, none is made; nor with EVOLVE_SNAPSHOT=0.

The standard library only: it runs before anything else is imported.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent  # of the code that runs: a checkout, or a copy of one
RECORD = "snapshot.json"
COPIED = ("evolve", "evals", "sweeps", "conf", "hydra_plugins", "pyproject.toml")
DAY = 24 * 3600
UNUSED = 30 * DAY  # seconds: an older copy is removed when a new one is made
LOOKS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--shell-completion", "-sc"}

_RECORD: dict[str, Any] | None = json.loads((ROOT / RECORD).read_text()) if (ROOT / RECORD).is_file() else None
CHECKOUT = Path(_RECORD["root"]) if _RECORD else ROOT  # where weights/ and the like lie, which no copy has
_held: threading.Thread | None = None


def enter() -> None:
    """The command goes on in a copy; returns where it is one already, or where none is wanted or can be made."""
    hold()
    words = sys.argv[1:]
    looks = any(word.split("=")[0] in LOOKS or word.lower() == "dry_run=true" for word in words)
    debugged = sys.gettrace() or not sys.modules.keys().isdisjoint(("bdb", "pydevd"))
    if _RECORD or looks or debugged or os.environ.get("EVOLVE_SNAPSHOT") == "0":
        return
    start = sys.orig_argv[1 : len(sys.orig_argv) - len(words)]  # Python's options, then how this file was named
    if start[-2:] == ["-m", "evolve.main"]:
        start[-2:] = [sys.argv[0]]
    try:
        if start[-1:] != sys.argv[:1]:
            raise OSError(f"can't tell how Python was started ({' '.join(sys.orig_argv)})")
        copy = make()
    except OSError as error:
        print(f"warning: this command is not protected from edits of the code while it runs: {error}", file=sys.stderr)
        return
    os.execv(sys.executable, [sys.executable, *start[:-1], str(copy / "evolve" / "main.py"), *words])


def make() -> Path:
    """This checkout's copy, there for the next minutes at least. Raises OSError."""
    files = _files(ROOT)
    record = {**code(), "root": str(ROOT)}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    home = ROOT / ".snapshots"
    copy = home / hashlib.sha256(json.dumps([record, hashes], sort_keys=True).encode()).hexdigest()[:16]
    with contextlib.suppress(FileNotFoundError):
        os.utime(copy / RECORD)  # from now on nobody removes it
        found = _files(copy)
        if found == files:
            return copy
        if found:
            _remove(copy)  # cut short by a machine's crash, or edited
    building = home / f".new-{os.urandom(8).hex()}"
    try:
        for name, content in files.items():
            target = building / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            target.chmod((ROOT / name).stat().st_mode & 0o555)  # a traceback names it: it is not what to edit
        (building / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        try:
            building.rename(copy)
        except OSError:
            if not (copy / RECORD).is_file():  # else another command was first
                raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    _prune(home)
    return copy


def _files(root: Path) -> dict[str, bytes]:
    """What of a checkout or a copy is code or configuration, by path."""
    found = {}
    for part in COPIED:
        for folder, folders, names in os.walk(root / part, followlinks=True):
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            for path in (Path(folder, name) for name in names if not name.startswith(".")):
                if path.is_file():  # no socket, no dead link
                    found[str(path.relative_to(root))] = path.read_bytes()
        if (root / part).is_file():
            found[part] = (root / part).read_bytes()
    return dict(sorted(found.items()))


def _prune(home: Path) -> None:
    """Removes what has not been used for long: copies that no process has begun to use, and what was never finished."""
    for copy in home.iterdir():
        with contextlib.suppress(OSError):  # another user's, or just being removed by another command
            if _unused(copy):
                _remove(copy, _unused)


def _unused(copy: Path) -> bool:
    """Whether no process has marked a copy for long. Opens its record: a client of NFS then asks the server."""
    try:
        with (copy / RECORD).open("rb") as file:
            marked = os.fstat(file.fileno()).st_mtime
    except FileNotFoundError:  # never finished
        marked = copy.stat().st_mtime
    return time.time() - marked >= UNUSED


def _remove(copy: Path, still: Callable[[Path], bool] = lambda gone: True) -> None:
    """still: asked once more when it has lost its name, which it gets back if the answer is no: whoever has marked it
    meanwhile goes on with it."""
    gone = copy.with_name(f".old-{os.urandom(8).hex()}")
    copy.rename(gone)  # at once: nobody finds half of it
    if not still(gone):
        with contextlib.suppress(OSError):  # another command has made the same again
            gone.rename(copy)
            return
    shutil.rmtree(gone, ignore_errors=True)  # another command may be at it, too


def hold() -> None:
    """Keeps the copy that this process runs from, if it does: marks it as used, now and every day of its life."""
    global _held
    if not _RECORD or _held:
        return
    _mark()
    _held = threading.Thread(target=_go_on_marking, daemon=True)
    _held.start()


def _mark() -> None:
    with contextlib.suppress(OSError):  # another user's copy: it ages as any other
        os.utime(ROOT / RECORD)


def _go_on_marking() -> None:
    while True:
        time.sleep(DAY)
        _mark()


def code() -> dict[str, Any]:
    """The commit that runs, and whether the working tree differs from it: of the checkout, when it was copied."""
    if _RECORD:
        return {"commit": _RECORD["commit"], "dirty": _RECORD["dirty"]}

    def git(*words: str) -> str | None:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        status = git("status", "--porcelain")
        return {"commit": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}
    except FileNotFoundError:
        return {"commit": None, "dirty": None}


def environment() -> dict[str, str]:
    """With what a process imports this very code, whatever is installed and whatever folder it starts in."""
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(ROOT)]
    return {"PYTHONPATH": os.pathsep.join([str(ROOT), *inherited]), "PYTHONSAFEPATH": "1"}


def frozen(path: Path) -> Path:
    """The copy of a file or folder of the checkout; where there is none, itself. `path`: absolute."""
    if path.is_relative_to(CHECKOUT) and (copy := ROOT / path.relative_to(CHECKOUT)).exists():
        return copy
    return path


def origin(path: Path) -> Path:
    """What `frozen` was given."""
    return CHECKOUT / path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
