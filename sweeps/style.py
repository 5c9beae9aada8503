"""How figures look: colours and markers that stay apart in print and for the colour-blind, sizes of a printed page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours: apart for the colour-blind too; markers tell them apart in print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
WIDTH = 6.75  # inches of a page's text, so that 8 points are 8 points in print
FORMATS = ("png", "svg", "pdf")
STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "svg.hashsalt": "evolve",  # equal figures are equal bytes
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # no member's name is a formula, whatever signs are in it
    "pdf.fonttype": 42,  # letters as letters, which journals ask for
}
UNDATED: dict[str, dict[str, Any]] = {
    "png": {"Software": None},
    "svg": {"Date": None},
    "pdf": {"CreationDate": None},
}


def styles(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """{name: (colour, marker)}: of two settings the first has the colour, the second the marker."""
    words = [name.split(" ") for name in names]
    if names and all(len(word) == 2 for word in words):
        first, second = (list(dict.fromkeys(part)) for part in zip(*words, strict=True))
        if len(second) > 1 and max(len(first), len(second)) <= len(COLOURS):
            return {f"{a} {b}": (COLOURS[first.index(a)], MARKERS[second.index(b)]) for a, b in words}
    size = len(COLOURS)
    return {name: (COLOURS[n % size], MARKERS[(n + n // size) % size]) for n, name in enumerate(names)}


def errors(estimates: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """How far an interval reaches down and up; nothing where there is none."""
    low = [e["value"] - (e["value"] if e["low"] is None else e["low"]) for e in estimates]
    high = [(e["value"] if e["high"] is None else e["high"]) - e["value"] for e in estimates]
    return [low, high]


@dataclass(frozen=True)
class Point:
    """A number of a figure: at which x, where that is in words, and the records that it comes from."""

    x: float
    where: str
    estimate: Mapping[str, Any]
    records: Sequence[str]


@dataclass(frozen=True)
class Mark:
    """A point as it is drawn: of which line (its name and number), so far from the figure's left and top in points."""

    series: str
    line: int
    where: str
    estimate: Mapping[str, Any]
    records: Sequence[str]
    x: float
    y: float


@dataclass(frozen=True)
class Drawn:
    """A figure that lies in a folder as NAME.png, .svg, .pdf; width and height in points."""

    name: str
    title: str
    note: str
    width: float
    height: float
    marks: list[Mark]


def line(ax: Any, name: str, points: Sequence[Point], look: tuple[str, str], **more: Any) -> Any:
    """Points with their intervals. They stay with what is drawn, so that a page leads from each to its record."""
    estimates = [point.estimate for point in points]
    values, (colour, marker) = [estimate["value"] for estimate in estimates], look
    look_of_all = {"color": colour, "marker": marker, "elinewidth": 0.7} | more
    bars = ax.errorbar([point.x for point in points], values, yerr=errors(estimates), **look_of_all)
    bars.lines[0].series, bars.lines[0].points = name, points
    return bars


def legend(fig: Any, handles: Mapping[str, Any], title: str | None = None) -> None:
    """Below the panels, in as many columns as have room."""
    longest = max(map(len, handles), default=1)
    columns = max(1, min(len(handles), int(fig.get_figwidth() * 72 / (longest * 4.4 + 32))))
    fig.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=columns, title=title)


def _lines(figure: Any) -> list[Any]:
    """What `line` has drawn."""
    return [one for ax in figure.axes for one in ax.containers if hasattr(one.lines[0], "points")]


def estimates(figure: Any) -> list[Mapping[str, Any]]:
    """Of all its points."""
    return [point.estimate for one in _lines(figure) for point in one.lines[0].points]


def save(figure: Any, folder: Path, name: str, title: str, note: str = "") -> Drawn:
    """A figure in every format. Equal figures are equal files: none says when it was drawn."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ConstrainedLayoutEngine().execute(figure)  # once: a figure with an engine of its own is drawn twice for each format
    width, height = (72 * float(inches) for inches in figure.get_size_inches())
    marks = []
    for number, one in enumerate(_lines(figure)):
        drawn = one.lines[0]
        for part in (drawn, *one.lines[2]):
            part.set_gid(f"line-{number}")
        places = drawn.get_transform().transform(drawn.get_xydata()) * 72 / figure.dpi
        for point, (x, y) in zip(drawn.points, places.tolist(), strict=True):
            about = (point.where, point.estimate, list(point.records))
            marks.append(Mark(drawn.series, number, *about, round(x, 1), round(height - y, 1)))
    for form in FORMATS:
        figure.savefig(folder / f"{name}.{form}", dpi=200, metadata=UNDATED[form])
    return Drawn(name, title, note, width, height, marks)
