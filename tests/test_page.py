"""The page of a sweep: as a document, and in a real browser."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import chromium
import pytest
from conftest import sweep_here

from evolve.config import ROOT
from evolve.launch import begin
from evolve.stages import read_rows, write_rows
from evolve.store import digest, hash_file, seal, unseal
from sweeps import collect, figures, page, report, samples, tables

SMALL = ["debug=fast", "loss=sft_only", "data.eval_prompts=8", "data.sft_pairs=16", "eval.turns=3"]
SMALL += ["eval=test_time", "eval.select=verifier", "eval.test_time.answers=3"]
EVIL = "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'> & \"quoted\" ]]> \x1b[31m \u202e"
EVIL_NAME = "name=</title><b onclick=x> --> $x_{ #000000"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two members' sweep."""
    out = tmp_path_factory.mktemp("page")
    planned = sweep_here([[*SMALL, f"trainer.epochs.sft={epochs}", f"output={out}"] for epochs in (1, 2)])
    begin(planned)
    return planned.folder


@pytest.fixture(scope="module")
def evil(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, but every prompt and answer is an attempt, a member's name too, and one measurement is missing."""
    folder = tmp_path_factory.mktemp("evil") / "out"
    shutil.copytree(sweep.parent.parent, folder)
    for file in folder.glob("store/respond/*/answers.jsonl"):
        rows = read_rows(file)
        for row in rows:
            row["prompt"] = EVIL
            for answer in row["answers"]:
                answer["text"] = EVIL + "x" * 2 * samples.CHARACTERS
        write_rows(file, rows)
        record = json.loads((file.parent / "record.json").read_text())
        record["files"]["answers.jsonl"] = {"bytes": file.stat().st_size, "sha256": hash_file(file)}
        record["config"]["until"] = [EVIL]
        del record["checksum"]
        (file.parent / "record.json").write_text(json.dumps({**record, "checksum": digest(record)}))
    copied = folder / "sweeps" / sweep.name
    content = unseal((copied / "sweep.json").read_bytes())
    content["members"][1]["name"], content["command"] = EVIL_NAME, f"python evolve/main.py '{EVIL}'"
    (copied / "sweep.json").write_text(seal(content))
    last = [step["id"] for step in content["members"][1]["steps"] if step["kind"] == "evaluate"][-1]
    shutil.rmtree(folder / "store" / last)
    return copied


class Document(HTMLParser):
    """Its elements as (name, attributes), the text of each kind of element, and the document's headings' levels."""

    def __init__(self, path: Path):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in ("meta", "link", "img", "br"):
            self._open.append(tag)
            self.texts.setdefault(tag, []).append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]][-1] += data

    def of(self, tag: str) -> list[dict[str, str]]:
        return [about for name, about in self.elements if name == tag]

    @property
    def ids(self) -> list[str]:
        return [about["id"] for _, about in self.elements if "id" in about]


@pytest.fixture(scope="module")
def made(sweep: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.write([collect.load(sweep)], tmp_path_factory.mktemp("made") / "report.html")


@pytest.fixture(scope="module")
def both(sweep: Path, evil: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return page.write([collect.load(sweep), collect.load(evil)], tmp_path_factory.mktemp("both") / "report.html")


def test_every_link_leads_somewhere_inside(made: Path, both: Path) -> None:
    for path in (made, both):
        document = Document(path)
        assert not [name for name, count in Counter(document.ids).items() if count > 1]
        links = [about["href"] for about in document.of("a")]
        assert links and {link.removeprefix("#") for link in links} <= set(document.ids)
        assert all("src" not in about for _, about in document.elements)
        assert not re.search(r"@import|url\((?!#)|srcset=", path.read_text())


@pytest.mark.parametrize("first", ["whole", "broken"])
def test_a_number_leads_to_the_store_that_it_comes_from(sweep: Path, evil: Path, tmp_path: Path, first: str) -> None:
    """Two stores have records of the same names, and one of them lacks some: each part of a page has its own."""
    folders = [sweep, evil] if first == "whole" else [evil, sweep]
    html = page.write([collect.load(folder) for folder in folders], tmp_path / "all.html").read_text()
    parts = re.split(r'<h2 id="s\d">', html)[1:]
    for folder, part in zip(folders, parts, strict=True):
        found = collect.load(folder)
        links = set(re.findall(r'<a [^>]*href="#([^"]+)"', part))
        assert links and links <= set(re.findall(r'<article class="record" id="([^"]+)"', part))
        made = [step["id"] for member in found.members for step in member.steps if found.record(step["id"])]
        assert made and all(f"<code>{found.store.folder(one)}</code>" in part for one in made)


def test_stages_that_sweeps_share_stand_once(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep.parent.parent, tmp_path / "out")
    copied = tmp_path / "out" / "sweeps" / sweep.name
    other = shutil.copytree(copied, copied.with_name("other"))
    path = page.write([collect.load(copied), collect.load(other)], tmp_path / "all.html")
    document = Document(path)
    assert len(set(document.ids)) == len(document.ids) and "stages that a sweep above shares" in path.read_text()
    assert {about["href"].removeprefix("#") for about in document.of("a")} <= set(document.ids)


def test_it_is_structured_for_those_who_hear_it(both: Path) -> None:
    document = Document(both)
    levels = [int(name[1]) for name, _ in document.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    tables = len(document.of("table"))
    assert tables == len(document.of("caption")) > 10
    assert all(about.get("scope") in ("row", "col") for about in document.of("th"))
    assert all(about.get("aria-label") for about in document.of("a") if about.get("class") == "pt")
    assert len(document.of("main")) == len(document.of("nav")) == len(document.of("header")) == 1


def test_numbers_are_the_tables_and_lead_to_their_records(sweep: Path, made: Path) -> None:
    found, html = collect.load(sweep), made.read_text()
    for metric in ("reward", "accuracy"):
        for row in tables.grid(found, metric)[1:]:
            for phase, text in zip(found.phases, row[2:], strict=True):
                [member] = [member for member in found.members if member.name == row[0]]
                [measurement] = [one for one in member.of("refinement") if one.phase == phase]
                value, _, interval = text.partition(" ")
                number = f'{value} <span class="ci">{interval}</span>' if interval else value
                assert row[1] == "generated" or f'<a href="#{page.anchor(measurement.id)}">{number}</a>' in html
    steps = {step["id"] for member in found.members for step in member.steps}
    assert steps and {page.anchor(one) for one in steps} <= set(Document(made).ids)
    for one in steps:
        entry = html[html.index(f'id="{page.anchor(one)}"') :].partition("</article>")[0]
        assert str(found.store.folder(one)) in entry and "torch " in entry


def test_a_figures_points_are_links_that_say_their_number(sweep: Path, made: Path) -> None:
    found = collect.load(sweep)
    points = [about for about in Document(made).of("a") if about.get("class") == "pt"]
    for member in found.members:
        for one in member.of("refinement"):
            for turn in one.metrics["turns"]:
                said = f"turn {turn['turn']}: {tables.number(turn['reward'])}, n = 8"
                assert [p for p in points if p["href"] == f"#{page.anchor(one.id)}" and p["aria-label"].endswith(said)]


def test_a_figure_says_what_its_bars_are(sweep: Path, made: Path) -> None:
    html, folder = made.read_text(), collect.load(sweep).folder
    for one in figures.write(collect.load(sweep)):
        said = "" if one.name == "training" else "bars: 95 % intervals over prompts, one training run"
        assert one.note == said and f'<span class="note">{said}</span>' in html
        assert said in " ".join(re.findall(r">([^<>]+)</text>", (folder / f"{one.name}.svg").read_text()))


def test_answers_used_are_drawn_and_tabled_with_their_records(sweep: Path, made: Path) -> None:
    document = Document(made)
    assert any(text.startswith("By answers used: mean reward") for text in document.texts["strong"])
    last = collect.load(sweep).members[1].of("test_time")[-1]
    points = [
        about["aria-label"]
        for about in document.of("a")
        if about["href"] == f"#{page.anchor(last.id)}" and "class" in about
    ]
    worth = tables.number(last.metrics["sizes"][-1]["worth"]["oracle"]["reward"])
    assert any(", sft, oracle, 3 answers, " in label and f": {worth}, n = 8" in label for label in points)


def test_what_models_wrote_is_text(both: Path) -> None:
    html, document = both.read_text(), Document(both)
    assert len(document.of("script")) == 1 and "<img" not in html and "<b onclick" not in html
    seen = EVIL.replace("\x1b", "␛")
    assert f"\n{seen}" in document.texts["pre"]
    cut = 2 * samples.CHARACTERS + len(EVIL) - samples.CHARACTERS
    assert any(text.endswith(f"x [and {cut:,} more characters]") for text in document.texts["pre"])
    assert EVIL_NAME in document.texts["th"] and EVIL_NAME in document.texts["option"]


def test_missing_runs_come_with_the_command(evil: Path, made: Path, tmp_path: Path) -> None:
    path = page.write([collect.load(evil)], tmp_path / "report.html")
    assert "1 measurement is missing" in path.read_text() and "main.py &#39;&lt;/script&gt;" in path.read_text()
    assert "everything that was planned has been measured" in made.read_text()
    begun = unseal((evil / "sweep.json").read_bytes())
    del begun["command"]
    (evil.parent / "older").mkdir()
    (evil.parent / "older" / "sweep.json").write_text(seal(begun))
    older = page.write([collect.load(evil.parent / "older")], tmp_path / "older.html").read_text()
    assert "not recorded" in older and "The sweep's command, given again" in older


def test_samples_are_chosen_by_hash_and_the_cap_is_said(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = collect.load(sweep)
    chains, rule = samples.chains(found)
    assert len(chains) == 18 and "models are shown" not in rule  # the base model is both's
    shared = chains[0]
    assert shared.members == (0, 1) and len(shared.turns) == 3
    rows = read_rows(found.store.folder(shared.answers) / "answers.jsonl")
    ids = sorted((row["id"] for row in rows), key=lambda one: hashlib.sha256(one.encode()).hexdigest())
    assert [chain.id for chain in chains[:3]] == [chain.id for chain in chains[3:6]] == ids[:3]
    [scores] = [
        row["scores"]
        for row in read_rows(
            found.store.folder(found.members[0].measurements[0].record["inputs"]["scores"]) / "scores.jsonl"
        )
        if row["id"] == ids[0]
    ]
    assert [turn.score.split(",")[0] for turn in shared.turns] == [f"{score:.3f}" for score in scores]
    monkeypatch.setattr(samples, "CHAINS", 6)
    fewer, rule = samples.chains(found)
    assert {chain.phase for chain in fewer} == {"sft"} and "2 of 6 models are shown" in rule


def test_the_command_writes_one_page_of_several(sweep: Path, evil: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sweeps.report",
        str(sweep),
        str(evil),
        "--out",
        str(tmp_path / "deep" / "all.html"),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first = (tmp_path / "deep" / "all.html").read_bytes()
    assert not (sweep / "report.html").exists() and first.count(b"<h2") == 2
    again = page.write([collect.load(sweep), collect.load(evil)], tmp_path / "again.html")
    assert again.read_bytes() == first  # to the byte, ids of figures too
    (tmp_path / "again.html").write_bytes(first[:2000])
    page.write([collect.load(sweep), collect.load(evil)], again)
    assert len(again.read_bytes()) == 2000  # nothing is new, so it is not written again
    page.write([collect.load(sweep)], again)
    assert again.read_bytes().count(b"<h2") > 2


def test_the_page_of_several_is_not_the_first_ones_own(sweep: Path, tmp_path: Path) -> None:
    shutil.copytree(sweep.parent.parent, tmp_path / "out")
    copied = tmp_path / "out" / "sweeps" / sweep.name
    report.show([copied])
    own = (copied / "report.html").read_bytes()
    report.show([copied, sweep])
    assert (copied / "report.html").read_bytes() == own
    assert (copied / "report-of-2.html").read_bytes().count(b"<h2 id=") == 2
    assert not (sweep / "report.html").exists()


def test_what_benchmarks_call_their_metrics_is_in_the_page(
    sweep: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So it is written and drawn again when that changes, and only then."""
    for name in ("evals", "sweeps"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.setattr(collect, "ROOT", tmp_path)
    shutil.copytree(sweep.parent.parent, tmp_path / "out")
    found = collect.load(tmp_path / "out" / "sweeps" / sweep.name)
    path = page.write([found], tmp_path / "report.html")
    drawn = found.folder / ".figures.json"

    def made() -> tuple[int, int]:
        page.write([found], path)
        return path.stat().st_mtime_ns, drawn.stat().st_mtime_ns

    before = made()
    assert made() == before
    with (tmp_path / "evals" / "refinement.py").open("a") as file:
        file.write("# another title\n")
    after = made()
    assert after[0] > before[0] and after[1] > before[1]


def test_what_is_broken_and_cannot_be_moved_is_missing(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a store of another user's: a line, and no number of it on the page or in a figure.

    Numbers whose answers have left the store stand, and lead no further.
    """
    shutil.copytree(sweep.parent.parent, tmp_path / "out")
    copied = tmp_path / "out" / "sweeps" / sweep.name
    whole = collect.load(copied)
    page.write([whole], tmp_path / "report.html")
    [broken] = [one for one in whole.members[1].of("refinement") if one.phase == "sft"]
    file = whole.store.folder(broken.id) / "metrics.json"
    file.write_bytes(file.read_bytes()[::-1])  # of the same size
    (whole.store.root / "quarantine").write_text("in the way of the folder")
    [other] = [one for one in whole.members[0].of("refinement") if one.phase == "sft"]
    shutil.rmtree(whole.store.folder(answers := other.record["inputs"]["answers"]))
    capsys.readouterr()
    found = collect.load(copied)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{broken.id}: metrics.json is not" in said and "can't be moved" in said
    assert file.exists() and found.members[1].missing == [("sft", "refinement")]
    html = page.write([found], tmp_path / "report.html").read_text()
    document = Document(tmp_path / "report.html")
    assert {about["href"].removeprefix("#") for about in document.of("a")} <= set(document.ids)
    assert f"<code>{answers}</code>" in html and f'id="{page.anchor(other.id)}"' in html
    marks = [mark for one in figures.write(found) for mark in one.marks]
    assert "1 measurement is missing" in html and marks and not any(broken.id in mark.records for mark in marks)


@pytest.mark.parametrize("damage", ["reversed", "cut", "removed"])
def test_what_is_damaged_is_left_out_and_said_once(
    sweep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    """Answers, scores and training steps, of which no number is made any more; whole again, they are shown again."""
    shutil.copytree(sweep.parent.parent, tmp_path / "out")
    copied = tmp_path / "out" / "sweeps" / sweep.name
    report.show([copied])
    whole = (copied / "report.html").read_text()
    found = collect.load(copied)
    inputs = found.members[1].of("refinement")[-1].record["inputs"]
    [trained] = [step["id"] for step in found.members[1].steps if step["kind"] == "activate"]
    files = {inputs["answers"]: "answers.jsonl", inputs["scores"]: "scores.jsonl", trained: "steps.jsonl"}
    paths = [found.store.folder(stage_id) / name for stage_id, name in files.items()]
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.unlink() if damage == "removed" else path.write_bytes(
            content[::-1] if damage == "reversed" else content[:-9]
        )
    (copied / "report.html").unlink()
    (copied / ".figures.json").unlink()
    capsys.readouterr()
    report.show([copied])
    said = capsys.readouterr().err
    assert all(sum(line.startswith(f"{stage_id}: ") for line in said.splitlines()) == 1 for stage_id in files)
    assert said.count("\n") == len(files)
    html = (copied / "report.html").read_text()
    assert html.count('<article class="chain') == whole.count('<article class="chain') - samples.PROMPTS
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    report.show([copied])
    assert capsys.readouterr().err == "" and (copied / "report.html").read_text() == whole


# ---- in a browser


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    if chromium.FOUND is None:
        pytest.skip("no Chromium here (apt-get install chromium)")
    with chromium.page() as opened:
        yield opened


@pytest.fixture
def opened(browser: chromium.Page, both: Path) -> chromium.Page:
    browser.look(1280, 900)
    browser.open("about:blank")
    browser.complaints.clear()
    browser.asked.clear()
    browser.open(both.as_uri())
    return browser


def test_nothing_runs_and_nothing_is_asked_for(opened: chromium.Page, both: Path) -> None:
    assert opened.run("typeof window.ran") == "undefined"
    assert opened.asked == [both.as_uri()]
    assert opened.complaints == []
    opened.run("document.body.append(Object.assign(document.createElement('img'), {src: 'https://example.org/x.png'}))")
    assert opened.run("new Promise((done) => setTimeout(() => done(1), 100))") == 1
    assert "Content Security Policy" in " ".join(opened.complaints)  # so that a complaint would have been heard


@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_never_scrolls_sideways(opened: chromium.Page, width: int) -> None:
    opened.look(width, 844)
    opened.run("for (const details of document.querySelectorAll('details')) details.open = true")
    assert opened.run("document.documentElement.scrollWidth") == width
    assert opened.run("[...document.querySelectorAll('.scroll')].some((one) => one.scrollWidth > one.clientWidth)") is (
        width == 390
    )


def test_columns_are_sorted_by_number(opened: chromium.Page) -> None:
    table = "[...document.querySelectorAll('table')].find((one) => one.tHead.rows[0].cells[2].textContent === 'base')"
    column = f"[...{table}.tBodies[0].rows].map((row) => parseFloat(row.cells[2].textContent))"
    header = f"{table}.tHead.rows[0].cells[2]"
    before = opened.run(column)
    for said, ordered in (("ascending", sorted(before)), ("descending", sorted(before, reverse=True))):
        opened.run(f"{header}.querySelector('button').focus()")
        opened.press("Enter")
        assert opened.run(f"{header}.getAttribute('aria-sort')") == said
        assert opened.run(column) == ordered != before


def test_the_keyboard_reaches_a_number_its_record_and_the_way_back(opened: chromium.Page) -> None:
    opened.press("Tab")
    assert opened.run("document.activeElement.className") == "skip"
    opened.run("document.querySelector('tbody a').focus()")
    place = "((cell) => [cell.cellIndex, cell.parentElement.rowIndex])(document.activeElement.closest('td'))"
    column, row = opened.run(place)
    opened.press("ArrowRight")
    opened.press("ArrowDown")
    assert opened.run(place) == [column + 1, row + 1]
    href = opened.run("document.activeElement.hash.slice(1)")
    opened.press("Enter")
    assert opened.run("new Promise((done) => setTimeout(() => done(document.activeElement.id), 100))") == href
    assert opened.run("document.activeElement.checkVisibility()")
    opened.run("history.back()")
    opened.run("new Promise((done) => setTimeout(done, 300))")
    assert opened.run(place) == [column + 1, row + 1]


def test_a_point_says_what_it_is(opened: chromium.Page) -> None:
    opened.run("document.querySelector('.pt').focus()")
    first = opened.run("document.getElementById('tip').textContent")
    assert re.fullmatch(r".*, direct, base: \d\.\d{3} .*, n = 8", first)
    opened.press("ArrowRight")
    assert opened.run("document.getElementById('tip').textContent") not in ("", first)
    opened.press("Escape")
    assert opened.run("document.getElementById('tip').hidden")
    stops = "[...document.querySelector('.plot').querySelectorAll('a.pt')].filter((link) => link.tabIndex === 0).length"
    assert opened.run(stops) == 1


def test_points_lie_on_their_marks(opened: chromium.Page) -> None:
    """Each link's circle has the centre of a mark of its line that matplotlib drew."""
    off = """[...document.querySelectorAll('.plot a.pt')].filter((link) => {
        const at = (one) => (({ x, y, width, height }) => [x + width / 2, y + height / 2])(one.getBoundingClientRect());
        const [x, y] = at(link.firstElementChild);
        const marks = [...link.closest('svg').querySelectorAll(`g[data-l="${link.dataset.l}"] use`)];
        return !marks.some((mark) => { const [mx, my] = at(mark); return Math.hypot(mx - x, my - y) < 2; });
    }).length"""
    assert opened.run("document.querySelectorAll('.plot a.pt').length") > 20
    assert opened.run(off) == 0


def test_chains_are_filtered(opened: chromium.Page) -> None:
    shown = (
        "[...document.querySelectorAll('.samples')[0].querySelectorAll('.chain')].filter((one) => !one.hidden).length"
    )
    choose = """(name, value) => { const form = document.querySelector('.filter'); form.elements[name].value = value;
        form.dispatchEvent(new Event('change')); }"""
    assert opened.run(shown) == 6
    opened.run(f"({choose})('phase', '')")
    assert opened.run(shown) == 12
    opened.run(f"({choose})('member', '')")
    assert opened.run(shown) == 18
    opened.run(f"({choose})('benchmark', 'test_time')")
    assert opened.run("document.querySelector('output').textContent") == "9 of 18 chains"


CONTRAST = """(() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const light = (colour) => {
        canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => v / 255)
            .map((v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (one) => {
        for (; one; one = one.parentElement) {
            const colour = getComputedStyle(one).backgroundColor;
            if (colour !== "rgba(0, 0, 0, 0)") return colour;
        }
    };
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), found = new Set();
    while (walk.nextNode()) {
        const one = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !one.checkVisibility()) continue;
        const style = getComputedStyle(one), svg = one instanceof SVGElement;
        const pair = [light(svg ? style.fill : style.color), light(behind(one))].sort((a, b) => b - a);
        const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
        if (ratio < 4.5) found.add(`${one.tagName}.${one.className}: ${ratio.toFixed(2)}`);
    }
    return [...found];
})()"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(opened: chromium.Page, scheme: str) -> None:
    """Contrast of all text with what is behind it, as WCAG's AA wants it."""
    opened.look(1280, 900, prefers_color_scheme=scheme)
    assert opened.run("matchMedia('(prefers-color-scheme: dark)').matches") is (scheme == "dark")
    opened.run("for (const details of document.querySelectorAll('details')) details.open = true")
    assert opened.run(CONTRAST) == []


def test_the_accessibility_tree_names_what_can_be_used(opened: chromium.Page) -> None:
    nodes = opened.send("Accessibility.getFullAXTree")["nodes"]
    used = [node for node in nodes if not node["ignored"]]
    roles = Counter(node["role"]["value"] for node in used)
    assert roles["main"] == roles["navigation"] == roles["banner"] == 1 and roles["table"] and roles["figure"]
    for node in used:
        if node["role"]["value"] in ("link", "button", "combobox", "table", "region", "heading"):
            assert node["name"]["value"].strip(), node
