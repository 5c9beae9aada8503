"""python -m sweeps.report FOLDER: the table and figures of a sweep, from its folder and the store's records."""

from __future__ import annotations

import sys
from pathlib import Path

from evolve.show import console as make_console
from sweeps import collect, differences, figures, pooled, tables


def show(folder: Path) -> None:
    """Prints the table, writes table.md, table.csv and the figures into the folder, and says where they lie."""
    sweep = collect.load(folder)
    console = make_console()
    if not any(member.measurements for member in sweep.members):
        console.print("nothing has been measured yet, so there is no table")
        return
    found = tables.shown(sweep) + pooled.shown(sweep) + differences.shown(sweep)
    for table in found:
        console.print(tables.rich_table(table))
    for line in tables.overlaps(sweep):
        console.print(line, soft_wrap=True)
    written = tables.write(sweep, found) + differences.write(sweep) + figures.write(sweep)
    missing = sum(len(member.missing) for member in sweep.members)
    if missing:
        console.print(f"missing {missing} measurements: the sweep's command, given again, makes them", style="yellow")
    console.print(f"folder  {sweep.folder}", soft_wrap=True)
    console.print(f"        {', '.join(path.name for path in written)}", soft_wrap=True)


def main() -> int:
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(sys.argv) else 2
    try:
        show(Path(sys.argv[1]))
    except FileNotFoundError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
