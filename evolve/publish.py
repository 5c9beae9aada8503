"""Publishes a trained model, with a card that holds its record, as a folder or a repository of the hub.

    python -m evolve.publish                                           what can be published
    python -m evolve.publish train/ab12                                its card, on the terminal
    python -m evolve.publish train/ab12 --to FOLDER                    a stage: its folder, or any clear start of its id
    python -m evolve.publish SWEEP MEMBER --to FOLDER                  a member's last model; or --phase "iteration 2"
    python -m evolve.publish SWEEP MEMBER --to hub:USER/NAME --private

SWEEP is a sweep's folder or its name; MEMBER a name, words that no other member's name has, or a number; a sweep of one
member needs none. The hub's token is the environment's or `hf auth login`'s. The same command again changes nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from evolve.config import ROOT, ConfigError
from evolve.stages import KINDS, module
from evolve.store import RECORD, Corrupt, Store, hash_file
from sweeps import card, collect

MODELS = tuple(kind for kind in KINDS if "checkpoint_dtype" in module(kind).Config.model_fields)  # that save weights
Content = Path | bytes  # of a file: where it lies, or what it holds


class Failed(Exception):
    """The hub, or this machine, did not do what was asked."""


def show(output: Path) -> None:
    """Prints every model: of each sweep's members by phase, then the store's others."""
    store = Store(output / "store")
    others = [stage_id for stage_id in store.ids() if stage_id.split("/")[0] in MODELS]
    print(f"{len(others)} models in {store.root}; --output is for sweeps with another output=")
    for folder in sorted(path.parent for path in output.glob("sweeps/*/sweep.json")):
        print(folder)
        for number, member in enumerate(collect.load(folder).members):
            print(f"  {number}  {member.name}")
            for step in member.steps:
                if step["kind"] in MODELS:
                    made = store.folder(step["id"]).is_dir()
                    print(f"       {step['phase']:<13} {step['id']}{'' if made else '  not made yet'}")
                    others = [stage_id for stage_id in others if stage_id != step["id"]]
    for stage_id in others:
        print(f"in no sweep's folder: {stage_id}")


def choose(output: Path, what: str, member: str | None, phase: str | None) -> tuple[Store, str]:
    """The store and id of the model that is meant. Raises ConfigError, with the choices where there are any."""
    for folder in (Path(what), output / "sweeps" / what):
        if (folder / "sweep.json").is_file():
            return _member(collect.load(folder), member, phase)
    if member or phase:
        raise ConfigError(f"{what}: no sweep's folder, so it has no member or phase; {output / 'sweeps'} has them")
    store = Store(output / "store")
    if (Path(what) / RECORD).is_file():
        folder = Path(what).resolve()
        store, what = Store(folder.parents[1]), f"{folder.parent.name}/{folder.name}"
    found = [one for one in store.ids() if one.startswith(what) or one.split("/")[1].startswith(what)]
    models = [one for one in found if one.split("/")[0] in MODELS]
    if len(models) == 1:
        return store, models[0]
    if models:
        raise ConfigError(f"{what}: {len(models)} models start so: {', '.join(models)}")
    if found:
        raise ConfigError(f"{what}: {found[0]} is no model; {', '.join(MODELS)} are")
    raise ConfigError(f"{what}: no sweep's folder, no stage of {store.root}; without arguments, all models are listed")


def _member(sweep: collect.Sweep, member: str | None, phase: str | None) -> tuple[Store, str]:
    names = [one.name for one in sweep.members]
    if member is None or member in names:
        found = [number for number, name in enumerate(names) if member in (None, name)]
    elif member.isdigit():
        found = [number for number in range(len(names)) if number == int(member)]
    else:
        found = [number for number, name in enumerate(names) if {*member.split()} <= {*name.split()}]
    if len(found) != 1:
        choices = "; ".join(f"{number}: {name}" for number, name in enumerate(names))
        raise ConfigError(f"{sweep.folder}: name one member ({choices}); {member or 'none named'} fits {len(found)}")
    models = [step for step in sweep.members[found[0]].steps if step["kind"] in MODELS]
    # A reward model belongs to the setup; it can be asked for, but is nobody's last model.
    fit = [step for step in models if (step["phase"] == phase if phase else step["phase"] != "setup")]
    if not fit:
        phases = ", ".join(step["phase"] for step in models) or "none"
        raise ConfigError(f"{names[found[0]]}: no model of phase {phase or 'sft or later'}; it trains: {phases}")
    if not sweep.store.folder(fit[-1]["id"]).is_dir():
        raise ConfigError(f"{fit[-1]['phase']}: {fit[-1]['id']} is not made yet; the sweep's command makes it")
    return sweep.store, fit[-1]["id"]


def contents(model: card.Model, name: str) -> dict[str, Content]:
    """What is published: the stage's files as they are, its card, and its records.

    Raises Failed if one of them names a folder of this machine.
    """
    files: dict[str, Content] = {file: model.folder / file for file in model.record["files"]}
    files |= {card.CARD: card.readme(model, name).encode(), card.RECORDS: card.records(model).encode()}
    homes = {str(path) for path in (Path.home(), Path.cwd(), ROOT, model.folder.resolve().parents[1])} - {"/"}
    private = re.compile("|".join(rf"{re.escape(home)}(?![\w.-])" for home in homes).encode())
    for file, content in files.items():
        if file in (card.CARD, card.RECORDS) or file.endswith("config.json"):
            found = private.search(content if isinstance(content, bytes) else content.read_bytes())
            if found:
                raise Failed(f"{file} names a folder of this machine, {found[0].decode()}; nothing is published")
    return files


def compare(files: Mapping[str, Content], there: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The files that a target lacks, and those that it has and should not, or not so.

    Args:
        there: the target's files with their hashes, SHA-256 (64 digits) or git's.
    """
    from huggingface_hub.utils.sha import git_hash

    def matches(content: Content, expected: str) -> bool:
        if len(expected) < 64:
            return git_hash(content if isinstance(content, bytes) else content.read_bytes()) == expected
        return (hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else hash_file(content)) == expected

    wrong = [file for file in there if file not in files or not matches(files[file], there[file])]
    return [file for file in files if file not in there], wrong


def write(files: Mapping[str, Content], folder: Path, force: bool) -> bool:
    """Publishes into a folder, each file whole or not at all; False if it is there already.

    Raises ConfigError if something else is. `force` replaces what this command wrote there before, and nothing else.
    """
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--to {folder}: is a file")
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = [path.as_posix() for path in paths if path.parts[0][0] != "."]
    ours = _published(folder)
    if foreign := [file for file in names if file not in files and file not in ours]:
        raise ConfigError(f"--to {folder}: holds other files ({_some(foreign)}); name another folder")
    lacks, wrong = compare(files, {file: hash_file(folder / file) for file in names})
    if wrong and not (force and ours.issuperset(wrong)):
        raise ConfigError(f"--to {folder}: another {_some(wrong)} is there; --force replaces a model published there")
    for file in sorted([*lacks, *wrong], key=lambda file: file == card.RECORDS):  # last: it says what is ours
        if file not in files:
            (folder / file).unlink()
            continue
        content, temporary = files[file], folder / f".{Path(file).name}.tmp"
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, temporary)
        temporary.rename(folder / file)
    return bool(lacks or wrong)


def _published(folder: Path) -> set[str]:
    """The files that this command wrote into a folder."""
    try:
        return {*json.loads((folder / card.RECORDS).read_text())["files"], card.CARD, card.RECORDS}
    except (OSError, ValueError, KeyError, TypeError):  # not its folder
        return set()


def push(files: Mapping[str, Content], name: str, message: str, private: bool, force: bool) -> str | None:
    """Publishes to the hub, in one commit: never half a model. Returns its address, or None if it is there already.

    Raises ConfigError if something else is there (`force` replaces it; the repository's history keeps it), Failed with
    one line if the hub refuses or can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HTTPError
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        api = HfApi()
        api.create_repo(name, private=private or None, exist_ok=True)
        repository = api.model_info(name, files_metadata=True)
        if private and not repository.private:
            raise ConfigError(f"--to hub:{name}: is there and public, which --private does not change")
        siblings = [file for file in repository.siblings or [] if file.rfilename != ".gitattributes"]
        there = {file.rfilename: file.lfs.sha256 if file.lfs else str(file.blob_id) for file in siblings}
        lacks, wrong = compare(files, there)
        if wrong and not force:
            raise ConfigError(f"--to hub:{name}: another {_some(wrong)} is there; --force replaces it")
        if not lacks and not wrong:
            return None
        changes = [
            CommitOperationAdd(file, files[file]) if file in files else CommitOperationDelete(file)
            for file in [*lacks, *wrong]
        ]
        return api.create_commit(name, changes, commit_message=message, parent_commit=repository.sha).commit_url
    except (OSError, ValueError, RuntimeError, HTTPError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status == 401:
            raise Failed(f"hub:{name}: no token, or one that the hub doesn't know (401); `hf auth login`") from None
        if status == 403:
            raise Failed(f"hub:{name}: the token may not write there (403)") from None
        raise Failed(f"hub:{name}: {type(cause).__name__}: {' '.join(str(cause).split())}") from None


def _some(files: list[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")


def hub_name(target: str | None) -> str | None:
    """'hub:USER/NAME' -> 'USER/NAME'; None for a folder. Raises ConfigError."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    if not target or not target.startswith("hub:"):
        return None
    name = target.removeprefix("hub:")
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--to {target}: {error}") from None
    if "/" not in name:
        raise ConfigError(f"--to {target}: hub:USER/NAME is wanted")
    return name


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 0 done, 1 the model is damaged or the hub refused, 2 the command is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m evolve.publish", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", help="a stage, or a sweep")
    parser.add_argument("member", nargs="?", help="of the sweep")
    parser.add_argument("--phase", help="sft, offline, 'iteration 1', ... (default: the last); setup: the reward model")
    parser.add_argument("--to", metavar="TARGET", help="a folder, or hub:USER/NAME; without it, the card is printed")
    parser.add_argument("--private", action="store_true", help="a new repository is private")
    parser.add_argument("--force", action="store_true", help="replace another model that was published there")
    parser.add_argument("--output", type=Path, default=Path("outputs"), help="where sweeps and store are (outputs)")
    asked = parser.parse_args(words)
    try:
        hub = hub_name(asked.to)
        if asked.private and not hub:
            raise ConfigError("--private goes with --to hub:USER/NAME")
        if asked.what is None:
            if asked.to:
                raise ConfigError("say what to publish; without arguments, all models are listed")
            show(asked.output)
            return 0
        model = card.load(*choose(asked.output, asked.what, asked.member, asked.phase))
        if not asked.to:
            print(card.readme(model, "FOLDER"))
            return 0
        files, stage_id = contents(model, hub or Path(asked.to).resolve().name), model.record["id"]
        if hub:
            address = push(files, hub, f"{stage_id}, published by evolve", asked.private, asked.force)
            print(address or f"hub:{hub} has {stage_id} already")
        else:
            new = write(files, Path(asked.to), asked.force)
            print(f"{asked.to} has {stage_id}{'' if new else ' already'}")
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Corrupt, Failed, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
