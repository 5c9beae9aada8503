"""What comes from outside, pinned: weights, chat templates and data sets by content, not by name.

A local folder or file is the hash of its content; a hub id is the commit that its revision resolves to now.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from evals.needs import File
from evolve import snapshot
from evolve.config import ConfigError, Data, find
from evolve.data import EMBEDDED_VERSION, NO_PAIRS, DataError, Row, has_pair, is_file, ordered, read, same
from evolve.store import Corrupt, Source, digest, hash_file, replace, seal, unseal

WEIGHTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")


class Resolver:
    """Finds and pins sources; hashes of big files are kept beside the store, by path, size and time of change.

    `unpinned`: True lets a hub id stand by name where the hub can't be asked, for a plan that is only looked at.
    """

    def __init__(self, cache: Path | None, unpinned: bool = False):
        self.cache, self.unpinned = cache, unpinned
        self._seen: dict[tuple[Any, ...], Source] = {}
        self._usable_rows: dict[tuple[Any, ...], tuple[int, int] | None] = {}
        self._checked: set[tuple[int, ...]] = set()
        self.warnings: list[str] = []
        self._unreachable: Exception | None = None

    def model(self, path: str, revision: str | None, key: str) -> Source:
        """Weights in the hub's layout: a local folder, or a hub id. Raises ConfigError."""
        known = ("model", path, revision)
        if known not in self._seen:
            self._seen[known] = self._model(path, revision, key)
        return self._seen[known]

    def _model(self, path: str, revision: str | None, key: str) -> Source:
        folder = find(path)
        if folder is not None and folder.is_dir():
            if not (folder / "config.json").is_file():
                raise ConfigError(f"{key}={path}: no config.json in that folder, so no model in the hub's layout")
            if not any(folder.glob("*.safetensors")):
                raise ConfigError(f"{key}={path}: no *.safetensors in that folder; other weight formats are not read")
            files = sorted({file for pattern in WEIGHTS for file in folder.glob(pattern)})
            return Source("model", _name(folder), digest({file.name: self._hash(file) for file in files}))
        looks_local = path.count("/") != 1 or path.startswith((".", "/", "~", "weights/", "evolve/", "outputs/"))
        if looks_local:
            made = "; python -m evolve.smollm2 makes it" if path == "weights/smollm2_135m" else ""
            raise ConfigError(f"{key}={path}: no such folder{made}")
        commit = self._commit("model", path, revision, key)
        return Source("model", f"{path}@{commit}", commit)

    def data(self, data: Data) -> tuple[Source, Source | None]:
        """The data set, and the held-out one where it is another file. Raises ConfigError."""
        return self._data(data.path, data.revision, "data.path"), (
            self._data(data.eval_path, None, "data.eval_path") if data.eval_path else None
        )

    def _data(self, path: str, revision: str | None, key: str) -> Source:
        known = ("data", path, revision)
        if known not in self._seen:
            if path == "embedded":
                self._seen[known] = Source("data", path, f"embedded-{EMBEDDED_VERSION}")
            elif is_file(path):
                file = find(path)
                if file is None:
                    raise ConfigError(f"{key}={path}: no such file")
                self._seen[known] = Source("data", _name(file), self._hash(file))
            else:
                if path.count("/") != 1 or path.startswith((".", "/", "~")):
                    raise ConfigError(
                        f"{key}={path}: neither a .jsonl, .jsonl.gz or .json file, nor a hub id (owner/name), "
                        "nor 'embedded'"
                    )
                commit = self._commit("dataset", path, revision, key)
                self._seen[known] = Source("data", f"{path}@{commit}", commit)
        return self._seen[known]

    def file(self, file: File) -> Source:
        """A local file or folder, owner/name/file of a data set on the hub, or 'embedded'. Raises ConfigError."""
        known = ("file", file.path, file.revision)
        if known not in self._seen:
            local = find(file.path)
            owner, _, rest = file.path.partition("/")
            name, _, inner = rest.partition("/")
            if file.path == "embedded":
                self._seen[known] = Source("data", file.path, f"embedded-{EMBEDDED_VERSION}")
            elif local is not None:
                self._seen[known] = Source("file", _name(local), self._content(local))
            elif not inner or file.path.startswith((".", "/", "~")):
                raise ConfigError(f"{file.key}={file.path}: no such file")
            else:
                commit = self._commit("dataset", f"{owner}/{name}", file.revision, file.key)
                self._seen[known] = Source("file", f"{owner}/{name}@{commit}/{inner}", f"{commit}/{inner}")
        return self._seen[known]

    def commit(self, dataset: str, key: str) -> str:
        """What a data set's main branch is now. Raises ConfigError; `key`: what would name a file instead."""
        known = ("commit", dataset, None)
        if known not in self._seen:
            self._seen[known] = Source("data", dataset, self._commit("dataset", dataset, None, key))
        return self._seen[known].digest

    def chat_template(self, path: str | None) -> str | None:
        """A Jinja file's text. Raises ConfigError."""
        if path is None:
            return None
        file = find(path)
        if file is None or not file.is_file():
            raise ConfigError(f"model.chat_template={path}: no such file")
        return file.read_text(encoding="utf-8")

    def _check_embedded(self, data: Data, iterations: int) -> None:
        from evolve import world

        asked = (data.seed, data.eval_prompts, data.prompts * iterations, data.sft_pairs + data.offline_pairs)
        if asked in self._checked:  # most members of a sweep ask for the same
            return
        self._checked.add(asked)
        try:
            world.prompts(data.eval_prompts, data.seed, "test")
            world.prompts(data.prompts * iterations, data.seed, "train")
            world.rows(data.sft_pairs + data.offline_pairs, data.seed)
        except ValueError as error:
            raise ConfigError(f"data.path=embedded: {error}; make data.* or iteration.count smaller") from None

    def check_rows(self, data: Data, *, trained: bool, iterations: int, reward_model: bool) -> None:
        """That a local file has the rows which the splits ask for, before any work. Raises ConfigError."""
        if data.path == "embedded":
            self._check_embedded(data, iterations)
        found = self.usable(data)
        if found is None:
            return
        have, have_pairs = found
        wants = {
            "data.eval_prompts": 0 if data.eval_path else data.eval_prompts,
            "data.sft_pairs": data.sft_pairs if trained else 0,
            "data.offline_pairs": data.offline_pairs if trained else 0,
            f"data.prompts x {iterations} iterations": data.prompts * iterations,
            "data.reward_model_pairs": data.reward_model_pairs if reward_model else 0,
        }
        asked = [name for name, count in wants.items() if count and name.endswith("_pairs")]
        if asked and have_pairs < have:
            raise ConfigError(
                f"data.path={data.path}: {have - have_pairs} of {have} rows have no 'chosen' and 'rejected', and "
                f"{' and '.join(asked)} ask for such; {NO_PAIRS}"
            )
        if sum(wants.values()) > have:
            parts = " + ".join(f"{name} {count}" for name, count in wants.items() if count)
            raise ConfigError(
                f"data.path={data.path}: has {have} usable rows, and {parts} = {sum(wants.values())} are asked"
            )

    def usable(self, data: Data) -> tuple[int, int] | None:
        """How many usable rows there are whose prompts no file of held-out ones has, and how many with a pair.

        None where a plan can't know: a file is too large to be read now, or they are the hub's. Raises ConfigError.
        """
        known = (data.path, data.eval_path, data.split, data.prompt, data.gold, data.seed, data.max_characters)
        if known not in self._usable_rows:
            held_out = [] if data.eval_path is None else self._rows("data.eval_path", data.eval_path, data)
            rows = self._rows("data.path", data.path, data)
            if rows is not None and held_out is not None:
                prompts = {same(row["prompt"]) for row in held_out}
                rows = [row for row in rows if same(row["prompt"]) not in prompts]
                self._usable_rows[known] = len(rows), sum(map(has_pair, rows))
            else:
                self._usable_rows[known] = None
        return self._usable_rows[known]

    def _rows(self, key: str, path: str, data: Data) -> list[Row] | None:
        """A local file's usable rows; None if it is too large to be read now, or is none."""
        if not is_file(path):
            return None
        file = find(path)
        if file is None:
            raise ConfigError(f"{key}={path}: no such file")
        if file.stat().st_size > 100 * 2**20:
            return None  # reading it would take longer than a plan may; the data stages say the same, early
        try:
            return ordered(read(str(file), data.split, data.prompt, data.gold), data.seed, data.max_characters)[0]
        except (DataError, OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{key}={path}{str(error).removeprefix(str(file))}") from None

    def _content(self, path: Path) -> str:
        """Of a file, or of a folder's files with their names."""
        if path.is_file():
            return self._hash(path)
        return digest(
            {str(file.relative_to(path)): self._hash(file) for file in sorted(path.rglob("*")) if file.is_file()}
        )

    def _hash(self, file: Path) -> str:
        stat = file.stat()
        if self.cache is None or stat.st_size < 2**20:
            return hash_file(file)
        name = digest([str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino])[:32]
        entry = self.cache / f"{name}.json"
        try:
            return str(unseal(entry.read_bytes())["sha256"])
        except (FileNotFoundError, Corrupt, KeyError):
            value = hash_file(file)
        if not self.unpinned:  # a plan writes nothing
            with contextlib.suppress(OSError):  # it only saves work
                self.cache.mkdir(parents=True, exist_ok=True)
                replace(entry, seal({"sha256": value, "file": str(file)}))
        return value

    def _commit(self, kind: str, name: str, revision: str | None, key: str) -> str:
        import os

        from huggingface_hub import HfApi, constants
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if constants.HF_HUB_OFFLINE or os.environ.get("HF_DATASETS_OFFLINE"):
            self._unreachable = self._unreachable or OSError("offline")
        try:
            if self._unreachable:
                raise self._unreachable
            seconds = 1.5 if self.unpinned else 10
            return str(HfApi().repo_info(name, repo_type=kind, revision=revision, timeout=seconds).sha)
        except RevisionNotFoundError:
            raise ConfigError(f"{key}={name}: the hub has it, but no revision {revision}") from None
        except GatedRepoError:
            raise ConfigError(f"{key}={name}: gated; ask for access on the hub, then `hf auth login`") from None
        except RepositoryNotFoundError:
            raise ConfigError(f"{key}={name}: no such folder here and no such {kind} on the hub") from None
        except Exception as error:  # the hub's HTTP library has errors of its own, which change with its version
            if not isinstance(error, HfHubHTTPError):
                self._unreachable = error  # so a plan that names five hub ids waits once
                for cached in _cached(kind, name, revision):
                    return cached
            if self.unpinned:
                self.warnings.append(f"{key}={name}: the hub can't be reached, so its revision is open")
                return f"unresolved-{kind}-{name}-{revision or 'main'}"
            raise ConfigError(
                f"{key}={name}: not in the local cache, and the hub can't be reached ({type(error).__name__}); "
                f"give a local folder or file with {key}="
            ) from None


def _name(path: Path) -> str:
    """How records name it: what comes with the project by its place in the checkout, wherever it was read."""
    return str(snapshot.origin(path))


def fetch(source: Source, cache: Path) -> Path:
    """Where a source's content lies on this machine, downloaded if it is the hub's.

    Raises RuntimeError if a local source has changed since the plan was made, or isn't seen from here.
    """
    local = snapshot.frozen(Path(source.path))
    if source.path == "embedded":
        return local  # made, not read
    if local.exists():
        resolver = Resolver(cache)
        if source.kind == "model":
            now = resolver.model(str(local), None, "model.path").digest
        else:
            now = resolver._content(local)
        if now != source.digest:
            raise RuntimeError(f"{source.path} has changed since this sweep was started; start it again")
        return local
    if local.is_absolute():  # what is the hub's has no such name
        raise RuntimeError(
            f"{source.path}: not there as {socket.gethostname()} sees it; put it where all machines that run stages do"
        )
    if source.kind == "model":
        from huggingface_hub import snapshot_download

        name, _, commit = source.path.partition("@")
        return Path(snapshot_download(name, revision=commit, allow_patterns=list(WEIGHTS)))
    if source.kind == "file":
        from huggingface_hub import hf_hub_download

        name, _, rest = source.path.partition("@")
        commit, _, inner = rest.partition("/")
        return Path(hf_hub_download(name, inner, repo_type="dataset", revision=commit))
    return local  # data.read asks the hub for it


def _cached(kind: str, name: str, revision: str | None) -> Iterator[str]:
    """The commit of a snapshot that lies in the hub's cache: for when the hub can't be asked."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    if ref.is_file():
        yield ref.read_text().strip()
    elif revision and (folder / "snapshots" / revision).is_dir():
        yield revision
