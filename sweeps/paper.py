"""python -m sweeps.paper [OUTPUT]: the paper's tables and figures: where ours lie, or which command makes them.

OUTPUT is what `output=` says, by default outputs.
"""

from __future__ import annotations

import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from evolve.config import CONF, ConfigError, runs_alike
from sweeps import collect
from sweeps.collect import Sweep

SIZES = ("embedded", "paper")


def missing(sweep: Sweep) -> list[str]:
    """As lines: what has not been measured of which members, and the command that does it. Empty where all has."""
    lines = []
    for member in sweep.members:
        phases: dict[str, list[str]] = defaultdict(list)
        for phase, benchmark in member.missing:
            phases[benchmark].append(phase)
        lines += [f"missing {member.name}: {benchmark} after {', '.join(of)}" for benchmark, of in phases.items()]
    if lines:
        lines.append(f"made by {sweep.command or 'the command that made this sweep, given again'}")
    return lines


def command(experiment: str, size: str, output: str) -> str:
    """What makes an experiment's tables and figures, as it is typed."""
    words = ["python", "evolve/main.py", f"experiment={experiment}", *([f"scale={size}"] if size != "embedded" else [])]
    return shlex.join([*words, *([f"output={output}"] if output != "outputs" else [])])


def listing(output: str) -> Iterator[str]:
    """A paragraph for each experiment: what it is, how far it is at each size, and sweeps that changed it."""
    sweeps = [sweep for sweep in map(_load, sorted(Path(output).glob("sweeps/*/sweep.json"))) if sweep]
    for file in sorted((CONF / "experiment").glob("*.yaml")):
        yield f"{file.stem}: {_about(file)}"
        own = [sweep for sweep in sweeps if sweep.experiment == file.stem]
        for size in SIZES:
            found = [sweep for sweep in own if not changed(sweep) and _size(sweep) == size]
            for sweep in found:
                drawn = sorted({path.stem for ending in ("tex", "pdf") for path in sweep.folder.glob(f"*.{ending}")})
                names = f"{', '.join(drawn)} (.txt .md .tex .csv; .png .svg .pdf)"
                state = missing(sweep) or [names if drawn else f"drawn by python -m sweeps.report {sweep.folder}"]
                yield f"  {size:<9} {sweep.folder}: {_what(sweep)}"
                yield from (f"            {line}" for line in state)
            if not found:
                yield f"  {size:<9} missing all of it, made by {command(file.stem, size, output)}"
        for sweep in own:
            if words := changed(sweep):
                yield f"  changed   {sweep.folder}: {_what(sweep)}, by {shlex.join(words)}"


def changed(sweep: Sweep) -> list[str]:
    """Words of a sweep's command that make it something else than its experiment, wherever and however it runs."""
    return [word for word in shlex.split(sweep.command or "")[2:] if not _leaves(word)]


def _leaves(word: str) -> bool:
    """Whether a word of a command leaves an experiment as it is."""
    key = word.lstrip("+~").partition("=")[0]
    if key.startswith(("hydra/", "hydra.")):
        return not key.startswith(("hydra/sweeper", "hydra.sweeper", "hydra.mode"))
    return word in ("-m", "--multirun") or key in ("experiment", "scale", "output") or runs_alike(key)


def _about(file: Path) -> str:
    """The comment that an experiment begins with, up to its command."""
    lines = takewhile(lambda line: line.startswith("# ") and "main.py" not in line, file.read_text().splitlines())
    return " ".join(line[2:] for line in lines if "@package" not in line)


def _what(sweep: Sweep) -> str:
    """How much was run of what."""
    members = f"{len(sweep.members)} member{'s' if len(sweep.members) > 1 else ''}"
    used = [dict.fromkeys(member.config[part]["name"] for member in sweep.members) for part in ("model", "data")]
    return f"{members}, {', '.join(used[0])} on {', '.join(used[1])}"


def _load(file: Path) -> Sweep | None:
    """A sweep that is an experiment."""
    try:
        sweep = collect.load(file.parent)
    except ConfigError as error:
        print(f"left out: {error}", file=sys.stderr)
        return None
    return sweep if sweep.experiment else None


def _size(sweep: Sweep) -> str:
    return "embedded" if sweep.members[0].config["data"]["path"] == "embedded" else "paper"


def main() -> int:
    if len(sys.argv) > 2 or {"-h", "--help"} & set(sys.argv):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    for line in listing(sys.argv[1] if len(sys.argv) == 2 else "outputs"):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
