"""What a command runs is what there was when it was given: edits of code and configuration wait for the next one."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolve.config import ROOT
from evolve.snapshot import COPIED, UNUSED

# Every process that imports the package says from where; what runs after that is none of its business.
PROBE = """
import os
with open(os.environ["PROBE"], "a") as probe:
    probe.write(os.path.dirname(__file__) + "\\n")
"""
SMALL = ["debug=fast", "iteration.count=0", "loss=none", "data.eval_prompts=8", "eval.turns=2", "wandb.mode=disabled"]
PATIENCE = 300


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout of its own, whose package says where it is imported from."""
    made = tmp_path / "checkout"
    for part in COPIED:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, made / part, ignore=shutil.ignore_patterns("__pycache__", "local"))
        else:
            shutil.copy(ROOT / part, made / part)
    shutil.copy(ROOT / ".gitignore", made)
    with (made / "evolve" / "__init__.py").open("a") as file:
        file.write(PROBE)
    git(made, "init", "--quiet")
    commit(made)
    return made


def git(checkout: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=checkout, check=True, capture_output=True, text=True).stdout.strip()


def commit(checkout: Path) -> str:
    git(checkout, "add", "--all")
    git(checkout, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "--message", "a")
    return git(checkout, "rev-parse", "HEAD")


MAIN = ("evolve/main.py",)


def start(
    checkout: Path,
    *words: str,
    python: tuple[str, ...] = MAIN,
    preexec_fn: Callable[[], None] | None = None,
    **env: str,
) -> subprocess.Popen[str]:
    """The command as a person gives it, in the checkout and with the checkout on the path: the worst case."""
    return subprocess.Popen(
        [sys.executable, *python, *words],
        cwd=checkout,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([".", str(checkout)]),
            "PROBE": str(checkout.parent / "imported"),
            **env,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=preexec_fn,
    )


def finish(process: subprocess.Popen[str], status: int = 0) -> tuple[str, str]:
    try:
        stdout, stderr = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == status, stdout + stderr
    return stdout, stderr


def evolve(checkout: Path, *words: str, status: int = 0, **settings: Any) -> tuple[str, str]:
    return finish(start(checkout, *words, **settings), status)


def copies(checkout: Path) -> list[Path]:
    return sorted((checkout / ".snapshots").glob("[!.]*"))


def imported(checkout: Path) -> Counter[str]:
    """How many processes imported the package from where, relative to the checkout."""
    lines = (checkout.parent / "imported").read_text().splitlines()
    return Counter(os.path.relpath(line, checkout) for line in lines)


def spoil(checkout: Path) -> None:
    """Every module raises, and nothing composes."""
    for part in COPIED:
        for path in (checkout / part).rglob("*"):
            if path.suffix in (".py", ".yaml"):
                path.write_text("raise SystemExit('edited')\n" if path.suffix == ".py" else "{edited: [\n")
    (checkout / "evolve" / "embedded" / "config.json").write_text("edited")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        [],
        ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
        ["hydra/launcher=submitit_local", "hydra.launcher.timeout_min=30"],
    ],
    ids=["local", "joblib", "submitit_local"],
)
def test_edit_reaches_the_next_command_alone(checkout: Path, launcher: list[str]) -> None:
    words = [*(["-m", "strategy=chain,parallel", *launcher] if launcher else []), *SMALL]
    process = start(checkout, *words)
    deadline = time.monotonic() + PATIENCE
    while not copies(checkout):
        assert process.poll() is None and time.monotonic() < deadline, finish(process)
        time.sleep(0.001)
    spoil(checkout)
    stdout, _ = finish(process)
    assert "report.html" in stdout
    (copy,) = copies(checkout)
    seen = imported(checkout)
    assert seen.pop("evolve") == 1  # the process that was started, before it made the copy
    assert set(seen) == {f".snapshots/{copy.name}/evolve"} and seen.total() >= 2
    records = [path.read_text() for path in checkout.glob("outputs/store/*/*/record.json")]
    assert records and not any(".snapshots" in text for text in records)
    made_by = [json.loads(text)["code"] for text in records]
    assert made_by == [{"commit": git(checkout, "rev-parse", "HEAD"), "dirty": False}] * len(records)

    _, stderr = finish(start(checkout, *words), status=1)
    assert stderr == "edited\n"


@pytest.fixture
def quick(checkout: Path) -> Path:
    """The checkout with a command that says what it was given where it would import the heavy packages."""
    main = checkout / "evolve" / "main.py"
    head, _, _ = main.read_text().partition("import hydra")
    main.write_text(f"{head}print(sys.argv[1:], sys.flags.optimize, os.environ['PYTHONPATH'])\n")
    return checkout


@pytest.mark.parametrize(
    "python",
    [MAIN, ("-X", "utf8", "-OO", *MAIN), ("-OO", "-m", "cProfile", *MAIN), ("-OO", "-m", "evolve.main")],
    ids=["script", "options", "cProfile", "module"],
)
def test_python_is_started_again_as_it_was(quick: Path, python: tuple[str, ...]) -> None:
    stdout, stderr = evolve(quick, "-m", "seed=1,2", python=python)
    (copy,) = copies(quick)
    path = os.pathsep.join([str(copy), ".", str(quick)])
    assert stdout.splitlines()[0] == f"['-m', 'seed=1,2'] {2 * ('-OO' in python)} {path}"
    assert ("function calls" in stdout) == ("cProfile" in python)
    assert stderr == ""
    assert imported(quick) == {"evolve": 1, f".snapshots/{copy.name}/evolve": 1}
    evolve(quick, python=(str(copy / "evolve" / "main.py"),))  # what ran then can be run again
    assert copies(quick) == [copy] and imported(quick) == {"evolve": 1, f".snapshots/{copy.name}/evolve": 2}


NOT_WANTED = {
    "switch": {"EVOLVE_SNAPSHOT": "0"},
    "help": {"words": ["--help"]},
    "config": {"words": ["--cfg", "job"]},
    "plan": {"words": ["-m", "seed=1,2", "dry_run=true"]},
    "debugger": {"python": ("-m", "pdb", "-c", "continue", *MAIN)},
    "tracer": {"python": ("-m", "trace", "--listfuncs", *MAIN)},
}


@pytest.mark.parametrize("how", NOT_WANTED)
def test_no_copy_where_none_is_wanted(quick: Path, how: str) -> None:
    settings = dict(NOT_WANTED[how])
    _, stderr = evolve(quick, *settings.pop("words", []), **settings)
    assert "warning" not in stderr
    assert imported(quick) == {"evolve": 1} and not copies(quick)


@pytest.mark.parametrize("why", ["read-only", "full", "unknown start"])
def test_without_a_copy_it_runs_and_says_so(quick: Path, why: str) -> None:
    def full() -> None:  # what a file may hold: less than the largest of those that are copied
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    if why == "read-only":  # to whomever: root can write to any folder
        (quick / ".snapshots").write_text("")
    run = "import runpy; runpy.run_path('evolve/main.py', run_name='__main__')"
    python = ("-c", run) if why == "unknown start" else MAIN
    stdout, stderr = evolve(quick, "seed=1", python=python, preexec_fn=full if why == "full" else None)
    assert stdout.startswith("['seed=1']")
    assert stderr.startswith("warning: this command is not protected from edits") and stderr.count("\n") == 1
    assert imported(quick) == {"evolve": 1}
    assert not list(quick.glob(".snapshots/.*"))


# ---- copies


def asked(checkout: Path, expression: str) -> subprocess.Popen[str]:
    """What the module of that checkout or copy says, in a process of its own that ends with its input."""
    program = f"import sys; from evolve import snapshot; print({expression}, flush=True); sys.stdin.read()"
    return subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout), "PROBE": os.devnull},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(checkout: Path, program: str, *words: str) -> None:
    """A program with the modules of that checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PROBE": os.devnull}
    done = subprocess.run([sys.executable, "-c", program, *words], cwd=checkout, env=environment, timeout=PATIENCE)
    assert done.returncode == 0


def say(checkout: Path, expression: str) -> str:
    return finish(asked(checkout, expression))[0].strip()


def content(copy: Path) -> dict[str, bytes]:
    return {str(path.relative_to(copy)): path.read_bytes() for path in copy.rglob("*") if path.is_file()}


def test_a_copy_knows_its_commit(checkout: Path) -> None:
    first = git(checkout, "rev-parse", "HEAD")
    clean = Path(say(checkout, "snapshot.make()"))
    assert set(content(clean)) == {*git(checkout, "ls-files").split(), "snapshot.json"} - {".gitignore"}
    (checkout / "README.md").write_text("More.\n")  # the same code, yet records say that the tree is another
    dirty = Path(say(checkout, "snapshot.make()"))
    second = commit(checkout)
    later = Path(say(checkout, "snapshot.make()"))
    said = {copy: eval(say(copy, "snapshot.code()")) for copy in (clean, dirty, later, checkout)}
    assert said == {
        clean: {"commit": first, "dirty": False},
        dirty: {"commit": first, "dirty": True},
        later: {"commit": second, "dirty": False},
        checkout: {"commit": second, "dirty": False},
    }


def test_a_sites_own_configuration_is_copied(checkout: Path) -> None:
    own = checkout / "conf" / "local" / "default.yaml"
    own.parent.mkdir(exist_ok=True)
    made = []
    for text in ("seed: 1", "seed: 2", "seed: 1"):
        own.write_text(text)
        made.append(Path(say(checkout, "snapshot.make()")))
    assert made[0] == made[2] != made[1]
    assert [(copy / "conf" / "local" / "default.yaml").read_text() for copy in made[:2]] == ["seed: 1", "seed: 2"]


def test_commands_at_once_share_a_copy(checkout: Path) -> None:
    commands = [asked(checkout, "snapshot.make()") for _ in range(4)]
    said = {finish(command)[0].strip() for command in commands}
    assert said == {str(path) for path in copies(checkout)} and len(said) == 1
    assert len(list((checkout / ".snapshots").iterdir())) == 1


def test_a_killed_command_leaves_no_copy_that_is_used(checkout: Path) -> None:
    whole = content(Path(say(checkout, "snapshot.make()")))
    shutil.rmtree(checkout / ".snapshots")
    command = asked(checkout, "snapshot.make()")
    while not list(checkout.glob(".snapshots/.new-*/evolve")):
        assert command.poll() is None
    command.kill()
    command.communicate()
    assert not copies(checkout)
    assert content(Path(say(checkout, "snapshot.make()"))) == whole


def test_a_damaged_copy_is_made_again(checkout: Path) -> None:
    copy = Path(say(checkout, "snapshot.make()"))
    whole = content(copy)
    (copy / "evolve" / "plan.py").chmod(0o644)
    (copy / "evolve" / "plan.py").write_text("")
    assert Path(say(checkout, "snapshot.make()")) == copy
    assert content(copy) == whole
    assert list((checkout / ".snapshots").iterdir()) == [copy]


LONG = UNUSED + 1


def age(copy: Path) -> None:
    """As if it had not been used for long."""
    os.utime(copy / "snapshot.json", (time.time() - LONG,) * 2)


def test_old_copies_go_unless_a_process_holds_them(checkout: Path) -> None:
    made = {}
    for name in ("old", "held", "recent"):
        (checkout / "conf" / "config.yaml").write_text(f"# {name}\n")
        made[name] = Path(say(checkout, "snapshot.make()"))
    unfinished = checkout / ".snapshots" / ".new-0123"
    unfinished.mkdir()
    os.utime(unfinished, (time.time() - LONG,) * 2)
    age(made["old"])
    age(made["held"])
    holder = asked(made["held"], "(setattr(snapshot, 'DAY', 0.05), snapshot.hold())")
    assert holder.stdout is not None and holder.stdout.readline() == "(None, None)\n"
    assert (
        Path(say(checkout, "snapshot.make()")) == made["recent"] and made["old"].exists()
    )  # nothing new, nothing gone
    (checkout / "conf" / "config.yaml").write_text("# new\n")
    new = Path(say(checkout, "snapshot.make()"))
    assert copies(checkout) == sorted([made["held"], made["recent"], new]) and not unfinished.exists()
    age(made["held"])  # it goes on holding it
    deadline = time.monotonic() + PATIENCE
    while time.time() - (made["held"] / "snapshot.json").stat().st_mtime > UNUSED:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finish(holder)
    age(made["held"])
    (checkout / "conf" / "config.yaml").write_text("# newer\n")
    newer = Path(say(checkout, "snapshot.make()"))
    assert copies(checkout) == sorted([made["recent"], new, newer])


def test_old_copies_go_where_a_file_system_has_no_locks(checkout: Path) -> None:
    copy = Path(say(checkout, "snapshot.make()"))
    age(copy)
    refused = "__import__('fcntl').__dict__.update(flock=lambda *_: (_ for _ in ()).throw(OSError('no locks')))"
    say(checkout, f"({refused}, snapshot._prune(__import__('pathlib').Path('{copy.parent}')))")
    assert not copies(checkout)


def test_a_copy_that_is_used_again_while_it_is_removed_stays(checkout: Path) -> None:
    """By a command that finds it in the very moment in which another one has found it old."""
    copy = Path(say(checkout, "snapshot.make()"))
    whole = content(copy)
    age(copy)
    program = """
import os, sys
from pathlib import Path
from evolve import snapshot
copy, rename = Path(sys.argv[1]), Path.rename
def used_first(path, target):
    if path == copy:
        os.utime(copy / "snapshot.json")
    return rename(path, target)
Path.rename = used_first
snapshot._prune(copy.parent)
"""
    run(checkout, program, str(copy))
    assert content(copy) == whole and list(copy.parent.iterdir()) == [copy]


CONTEND = """
import multiprocessing, os, sys
from pathlib import Path
from evolve import snapshot

def work(number, barrier, copy, whole):
    for _ in range(12):
        if number == 0:
            os.utime(copy / snapshot.RECORD, (0, 0))
        barrier.wait()
        if number % 2:
            snapshot._prune(copy.parent)
        else:
            assert snapshot.make() == copy
        barrier.wait()
        assert snapshot._files(copy) == whole
        barrier.wait()

if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    copy, barrier = snapshot.make(), context.Barrier(8, timeout=200)
    whole = snapshot._files(copy)
    workers = [context.Process(target=work, args=(number, barrier, copy, whole)) for number in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    sys.exit(any(worker.exitcode for worker in workers))
"""


@pytest.mark.slow
@pytest.mark.slow
def test_commands_that_use_an_old_copy_have_it_while_others_remove_it(checkout: Path) -> None:
    """Four of each at once, again and again: whoever was first, who uses it has a whole one in the end."""
    run(checkout, CONTEND)
    assert not list((checkout / ".snapshots").glob(".*"))
    assert len(copies(checkout)) == 1
