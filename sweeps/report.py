"""python -m sweeps.report FOLDER [FOLDER ...]: tables and figures of sweeps, and a page with all of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from evolve.config import ConfigError
from evolve.show import console as make_console
from sweeps import collect, differences, figures, page, paper, results, seeds, style, tables
from sweeps.formats import rich_table

PAGE = "report.html"  # of a sweep, in its folder
SEVERAL = "report-of-{}.html"  # sweeps


def show(folders: Sequence[Path], out: Path | None = None) -> None:
    """Prints the tables that say most, and where everything lies that it writes.

    Into each folder go its tables and figures; into `out`, or else into the first folder, the page of all, which is not
    the first one's own. `out`: a file's name, or a folder.
    """
    sweeps = [collect.load(folder) for folder in folders]
    console = make_console()
    for sweep in sweeps:
        if not sweep.benchmarks:
            console.print(f"{sweep.folder}: nothing has been measured yet, so there is no table", soft_wrap=True)
            for line in paper.missing(sweep)[-1:]:
                console.print(line, style="yellow", soft_wrap=True)
            continue
        for table in results.first(sweep):
            console.print(rich_table(table))
        for line in tables.overlaps(sweep):
            console.print(line, soft_wrap=True)
        written = tables.write(sweep, results.every(sweep)) + differences.write(sweep) + seeds.write(sweep)
        drawn = [one.name for one in figures.write(sweep)]
        for line in paper.missing(sweep):
            console.print(line, style="yellow", soft_wrap=True)
        console.print(f"folder  {sweep.folder}", soft_wrap=True)
        console.print(f"        all tables: {_named(written)}", soft_wrap=True)
        if drawn:
            console.print(f"        figures (.{', .'.join(style.FORMATS)}): {', '.join(drawn)}", soft_wrap=True)
    if any(sweep.benchmarks for sweep in sweeps):
        target = folders[0] if out is None else out
        name = PAGE if len(sweeps) == 1 else SEVERAL.format(len(sweeps))
        path = page.write(sweeps, target if target.suffix == ".html" else target / name)
        console.print(f"page    {path}", soft_wrap=True)


def _named(files: Sequence[Path]) -> str:
    """table.txt .md .tex, cells.csv"""
    return ", ".join(
        " ".join([next(group).name, *(file.suffix for file in group)])
        for _, group in groupby(sorted(files, key=lambda file: file.stem), key=lambda file: file.stem)
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m sweeps.report", description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a sweep's: outputs/sweeps/NAME")
    parser.add_argument("--out", type=Path, help="where the page goes: a file.html or a folder; else the first FOLDER")
    asked = parser.parse_args()
    try:
        show(asked.folders, asked.out)
    except PermissionError as error:
        print(f"error: {error.filename}: {error.strerror}; --out says where the page goes", file=sys.stderr)
        return 2
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
