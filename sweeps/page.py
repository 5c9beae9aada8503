"""One page for a sweep or several, in one file that needs nothing else: tables, figures, samples, costs, provenance.

A number leads to the record that it comes from. Nothing is loaded from elsewhere (the page's own policy forbids it),
and what models wrote is shown as text alone.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jinja2
from markupsafe import Markup

from evolve.store import digest, hash_file
from sweeps import collect, figures, provenance, results, samples, svg, tables
from sweeps.collect import Sweep
from sweeps.formats import Cell, Table, is_best
from sweeps.style import Drawn

HERE = Path(__file__).resolve().parent
SECTIONS = {
    "ran": "What ran",
    "tables": "Tables",
    "figures": "Figures",
    "samples": "Sample chains",
    "training": "Training curves",
    "dropped": "What was dropped",
    "cost": "Cost",
    "provenance": "Provenance",
    "differ": "What differs",
    "missing": "Missing runs",
}


@dataclass(frozen=True)
class Figure:
    """`data` has the same numbers as a table."""

    title: str
    about: str
    drawn: Drawn
    markup: Markup
    data: Table


@dataclass(frozen=True)
class Part:
    """A sweep as the page shows it."""

    name: str
    key: str  # what its elements' ids start with
    sweep: Sweep
    command: str | None
    ran: Mapping[str, str]
    tables: list[Table]
    overlaps: list[str]
    figures: list[Figure]
    chains: list[samples.Chain]
    rule: str
    training: list[Figure]
    dropped: tuple[Table | None, list[str]]
    cost: list[Table]
    groups: list[provenance.Group]
    links: Mapping[str, str]  # by record, the id of its entry; what has no entry is no link
    repeated: int  # stages that an earlier part's provenance has
    differing: Table | None
    missing: Table | None


def anchor(record: str, store: int = 0) -> str:
    """The id of a record's entry in the page; of which store: two may have a record of the same name."""
    return record.replace("/", "-") + (f"-{store}" if store else "")


def write(sweeps: Sequence[Sweep], path: Path) -> Path:
    """Writes the page of these sweeps, unless the file is that page already."""
    made_from = _fingerprint(sweeps)
    if path.exists() and f'content="{made_from}"' in path.open(encoding="utf-8").read(2000):
        return path
    stores = list(dict.fromkeys(sweep.store.root for sweep in sweeps))
    shown: set[str] = set()
    parts = [_part(one, f"s{place}", stores.index(one.store.root), shown) for place, one in enumerate(sweeps, 1)]
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = (HERE / "page.js").read_text()
    html = templates.get_template("page.html.jinja").render(
        parts=parts,
        sections=SECTIONS.items(),
        made_from="" if any(sweep.damaged for sweep in sweeps) else made_from,  # of a file that isn't read, not all
        split=_split,
        upper=_upper,
        is_best=is_best,
        css=(HERE / "page.css").read_text(),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8", errors="replace")
    return path


def _fingerprint(sweeps: Sequence[Sweep]) -> str:
    """Of what a page is made from: records never change, so the ids of those that are there say what they hold."""
    there = [
        [
            str(sweep.folder.resolve()),
            hash_file(sweep.folder / "sweep.json"),
            [e.id for e in provenance.entries(sweep) if e.record],
            [m.missing for m in sweep.members],  # what is damaged, too
        ]
        for sweep in sweeps
    ]
    return digest([collect.code(), there])


def _part(sweep: Sweep, key: str, store: int, shown: set[str]) -> Part:
    """store: the number of its own; shown: the entries that the page has, to which its own are added."""
    entries = provenance.entries(sweep)
    links = {entry.id: anchor(entry.id, store) for entry in entries if entry.record}
    fresh = [entry for entry in entries if links.get(entry.id) not in shown]
    shown |= set(links.values())
    chains, rule = samples.chains(sweep)
    drawn = figures.write(sweep)
    return Part(
        name=sweep.folder.resolve().name,
        key=key,
        sweep=sweep,
        command=sweep.command,
        ran=provenance.ran(sweep, entries),
        tables=[_linked(made) for made in results.every(sweep)],
        overlaps=tables.overlaps(sweep),
        figures=[_figure(sweep, key, one, links) for one in drawn if one.name != "training"],
        chains=chains,
        rule=rule,
        training=[_figure(sweep, key, one, links) for one in drawn if one.name == "training"],
        dropped=provenance.dropped(entries),
        cost=provenance.cost(entries),
        groups=provenance.groups(fresh),
        links=links,
        repeated=len(entries) - len(fresh),
        differing=provenance.differing(sweep),
        missing=_missing(sweep),
    )


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _split(text: str) -> tuple[str, str]:
    """A cell's number, and its interval and counts."""
    value, _, rest = text.partition(" ")
    return (value, rest) if rest.startswith(("±", "[", "(")) else (text, "")


def _linked(made: Table) -> Table:
    """A number leads to its records, but to the first alone where the number before it leads to all of them."""
    body = []
    for row in made.rows[1:]:
        cells: list[str] = []
        before: tuple[str, ...] = ()
        for cell in row:
            if isinstance(cell, Cell) and cell.records == before:
                once = Cell(cell, cell.estimate, cell.records[:1], cell.order)
                once.best = cell.best
                cells.append(once)
            else:
                cells.append(cell)
                before = cell.records if isinstance(cell, Cell) and cell.records else before
        body.append(cells)
    return replace(made, rows=[made.rows[0], *body])


def _figure(sweep: Sweep, key: str, drawn: Drawn, links: Mapping[str, str]) -> Figure:
    title = _upper(drawn.title)
    rows = [
        [mark.series, mark.where, Cell(tables.number(mark.estimate), records=mark.records), svg.count(mark)]
        for mark in drawn.marks
    ]
    data = Table(f"{title}: the numbers", [["series", "at", "value", "n"], *rows])
    about = f"{len(rows)} points of {len({mark.series for mark in drawn.marks})} series."
    return Figure(title, about, drawn, svg.markup(sweep.folder, drawn, f"{key}-{drawn.name}", links), data)


def _missing(sweep: Sweep) -> Table | None:
    rows = []
    for member in sweep.members:
        asked = {
            (step["phase"], step.get("benchmark", "refinement")): step["id"]
            for step in member.steps
            if step["kind"] == "evaluate"
        }
        rows += [[member.name, *missing, asked[missing]] for missing in member.missing]
    title = f"{len(rows)} measurement{'s are' if len(rows) > 1 else ' is'} missing"
    return Table(title, [["member", "phase", "benchmark", "stage"], *rows], labels=4) if rows else None
