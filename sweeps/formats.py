"""A table in every form: screen, text, Markdown, LaTeX (booktabs), CSV. tables.py says what is in it."""

from __future__ import annotations

import csv
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import rich.table
from rich.text import Text

NUMBERS = ("value", "low", "high", "n")
PAGE = 40  # rows of a table that a printed page holds, below its caption


class Cell(str):
    """A number as it is shown, with its estimate, the ids of the stages that it comes from, and whether it is best.

    `best` is set where a paired, corrected test says that it is (best.py); it is then printed bold. `order`: what a
    page sorts by, where the text doesn't begin with it.
    """

    estimate: Mapping[str, Any] | None
    records: tuple[str, ...]
    best: bool
    order: float | None

    def __new__(
        cls,
        text: str,
        estimate: Mapping[str, Any] | None = None,
        records: Sequence[str] = (),
        order: float | None = None,
    ) -> Cell:
        made = super().__new__(cls, text)
        made.estimate, made.records, made.best, made.order = estimate, tuple(records), False, order
        return made


@dataclass(frozen=True)
class Table:
    """Rows of cells with the header first; `labels` columns name the row, the others are numbers.

    A title says after its first semicolon what the numbers need. `total`: a last row, of those that a page has.
    """

    title: str
    rows: list[list[str]]
    labels: int = 2
    total: Sequence[str] = ()


def is_best(cell: str) -> bool:
    return isinstance(cell, Cell) and cell.best


def _groups(made: Table) -> Iterator[tuple[bool, list[str]]]:
    """Rows but the header's, and whether each begins a group: rows of one first label, which is said once."""
    last: str | None = None
    for row in made.rows[1:]:
        yield last is not None and row[0] != last, [row[0] if row[0] != last else "", *row[1:]]
        last = row[0]


def rich_table(made: Table) -> rich.table.Table:
    table = rich.table.Table(title=Text(made.title), title_justify="left")
    for place, name in enumerate(made.rows[0]):
        number = place >= made.labels
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=number, overflow="fold")
    for begins, row in _groups(made):
        if begins:
            table.add_section()
        table.add_row(*(Text(cell, style="bold" if is_best(cell) else "") for cell in row))
    return table


def text(made: Table) -> str:
    """Columns beside one another, with *stars* about what is best."""
    rows = [made.rows[0], *(row for _, row in _groups(made))]
    marked = [[f"*{cell}*" if is_best(cell) else str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip_longest(*marked, fillvalue="")]
    lines = [made.title, ""]
    for row in marked:
        cells = [
            c.rjust(w) if p >= made.labels else c.ljust(w) for p, (c, w) in enumerate(zip(row, widths, strict=False))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(3, "-" * (sum(widths) + 2 * len(widths) - 2))
    return "\n".join(lines) + "\n"


def markdown(made: Table) -> str:
    def line(row: Sequence[str]) -> str:
        cells = [_one_line(cell).replace("|", "\\|") for cell in row]
        marked = [f"**{cell}**" if is_best(of) else cell for cell, of in zip(cells, row, strict=True)]
        return "| " + " | ".join(marked) + " |"

    lines = [f"**{_one_line(made.title)}**", "", line(made.rows[0]), "|" + "---|" * len(made.rows[0])]
    return "\n".join([*lines, *map(line, made.rows[1:])]) + "\n"


SPECIAL = {char: f"\\{char}" for char in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "`": r"\textasciigrave{}",
    '"': r"\textquotedbl{}",
    "[": "{[}",  # behind a row's \\ it would open an argument
    "*": "{*}",  # likewise
    "-": "{-}",  # two would become a dash
    "±": r"\ensuremath{\pm}",
    "×": r"\ensuremath{\times}",
}


def _one_line(value: str) -> str:
    """Without line breaks and characters that have no shape."""
    return re.sub(r"\s+", " ", "".join(" " if unicodedata.category(c) in ("Cc", "Cs") else c for c in value))


def escape(value: str) -> str:
    """Any string as LaTeX text that prints it. Beyond ASCII characters stand as they are: LaTeX reads UTF-8."""
    return "".join(SPECIAL.get(char, char) for char in _one_line(value))


def latex(made: Table, label: str) -> str:
    """Table environments with booktabs' rules, to be \\input: one for each page. The first one's label is tab:LABEL."""
    rows = made.rows[1:]
    parts = [rows[first : first + PAGE] for first in range(0, len(rows), PAGE)] or [[]]
    first, *more = (replace(made, rows=[made.rows[0], *part]) for part in parts)
    again = r"\addtocounter{table}{-1}"  # it stays the same table
    found = [_latex(first, [f"\\caption{{{escape(made.title)}}}", f"\\label{{tab:{label}}}"])]
    return "\n".join([*found, *(_latex(part, [again, r"\caption{continued}"]) for part in more)])


def _latex(made: Table, caption: Sequence[str]) -> str:
    def line(row: Sequence[str]) -> str:
        cells = [re.sub(r"^\{-\}(?=\d)", r"\\ensuremath{-}", escape(cell)) for cell in row]  # a minus, no hyphen
        return (
            " & ".join(f"\\textbf{{{cell}}}" if is_best(of) else cell for cell, of in zip(cells, row, strict=True))
            + r" \\"
        )

    columns = "l" * made.labels + "r" * (len(made.rows[0]) - made.labels)
    body = [part for begins, row in _groups(made) for part in ([r"\addlinespace"] if begins else []) + [line(row)]]
    lines = [r"\begin{table}", r"\centering\footnotesize", *caption]
    lines += [
        r"\begin{adjustbox}{max width=\linewidth}",
        f"\\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        line(made.rows[0]),
        r"\midrule",
    ]
    return "\n".join([*lines, *body, r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}", r"\end{table}"]) + "\n"


def write(folder: Path, found: Sequence[Table]) -> list[Path]:
    """table.txt, table.md, table.tex, and cells.csv, which leads from each number shown to its records. Returns all.

    Labels in table.tex are the folder's name and a number; what LaTeX or a reference can't read becomes a hyphen.
    """
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name)
    preamble = "% In the preamble: \\usepackage[T1]{fontenc} \\usepackage{adjustbox,booktabs}\n"
    content = {
        "table.txt": "\n".join(map(text, found)),
        "table.md": "\n".join(map(markdown, found)),
        "table.tex": preamble + "\n".join(latex(made, f"{label}-{n}") for n, made in enumerate(found, 1)),
    }
    for name, written in content.items():
        (folder / name).write_text(written, encoding="utf-8")
    write_csv(folder / "cells.csv", ["table", "row", "column", "shown", *NUMBERS, "best", "records"], _cells(found))
    return [*(folder / name for name in content), folder / "cells.csv"]


def _cells(found: Sequence[Table]) -> Iterator[list[Any]]:
    for made in found:
        header = made.rows[0]
        for row in made.rows[1:]:
            for column, cell in list(zip(header, row, strict=False))[made.labels :]:
                if isinstance(cell, Cell):
                    numbers = [(cell.estimate or {}).get(name) for name in NUMBERS]
                    about = [made.title, " / ".join(row[: made.labels]), column]
                    yield [*about, str(cell), *numbers, cell.best, " ".join(cell.records)]


def write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
