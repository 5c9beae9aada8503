"""A figure's SVG file as a part of a page: its points are links that say what they are, its ids no one else's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from sweeps.style import Drawn, Mark
from sweeps.tables import number


def count(mark: Mark) -> str:
    return f"{mark.estimate['n']:,}" if mark.estimate.get("n") else ""


def label(mark: Mark) -> str:
    said = f"{mark.series}, {mark.where}: {number(mark.estimate)}"
    return f"{said}, n = {n}" if (n := count(mark)) else said


def markup(folder: Path, drawn: Drawn, name: str, links: Mapping[str, str]) -> Markup:
    """`name`: the figure's, of which a page has one; `links`: by record the id of its entry, where it has one."""
    marks = Markup("").join(
        Markup('<a class="pt"{} data-l="{}" aria-label="{}"><circle cx="{:.1f}" cy="{:.1f}" r="8"/></a>').format(
            _href(links.get(mark.records[0])), mark.line, label(mark), mark.x, mark.y
        )
        for mark in drawn.marks
    )
    body = _body((folder / f"{drawn.name}.svg").read_text(encoding="utf-8"), name)
    return Markup(f'<svg viewBox="0 0 {drawn.width:.0f} {drawn.height:.0f}">{body}{marks}</svg>')


def _href(entry: str | None) -> Markup:
    return Markup(' href="#{}"').format(entry) if entry else Markup("")


def _body(svg: str, name: str) -> str:
    """matplotlib's SVG without what a page has no use for; black is the page's text colour, white its background."""
    body = svg[svg.index(">", svg.index("<svg")) + 1 : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="line-(\d+)"', r'<g data-l="\1"', body)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = body.replace(' xlink:href="#', ' href="#')
    body = re.sub(r'(<[^<>]* id="|<[^<>]* href="#|url\(#)(?=[mphc]?[0-9a-f]{10})', rf"\1{name}-", body)
    body = re.sub(r"(fill|stroke): #000000", r"\1: currentColor", body).replace("fill: #ffffff", "fill: none")
    return re.sub(r"\s*\n\s*", "\n", body)
