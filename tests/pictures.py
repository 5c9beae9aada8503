"""python tests/pictures.py: docs/pictures/ as this commit's code draws them: figures and page of the README's sweep.

Two minutes on two cores. Needs Chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import chromium

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "pictures"
FIGURES = ("iterations-accuracy",)
SECTIONS = "Math.round(document.getElementById('s1-%s').getBoundingClientRect().top + scrollY)"


def shots(report: Path) -> None:
    """The page on a desk, part by part, and on a phone."""
    with chromium.page() as page:
        page.look(1100, 900)
        page.open(report.as_uri())
        for name, width, height in (("tables", 1100, 800), ("figures", 660, 780), ("samples", 900, 400)):
            top = page.run(SECTIONS % name) - 16
            page.picture(PICTURES / f"page-{name}.png", {"x": 0, "y": top, "width": width, "height": height})
        page.look(390, 844)
        page.open(report.as_uri())
        top = page.run(SECTIONS % "tables") - 16
        page.picture(PICTURES / "page-phone.png", {"x": 0, "y": top, "width": 390, "height": 844})


def main() -> int:
    if chromium.FOUND is None:
        print("error: there is no Chromium here, which the page's pictures need", file=sys.stderr)
        return 2
    PICTURES.mkdir(exist_ok=True)
    with TemporaryDirectory() as out:
        sweep = [sys.executable, "evolve/main.py", "-m", "strategy=chain,tree", "loss=sft,pt,both", f"output={out}"]
        subprocess.run([*sweep, "wandb.mode=disabled"], cwd=ROOT, check=True)
        [folder] = Path(out).glob("sweeps/*")
        for name in FIGURES:
            shutil.copy(folder / f"{name}.png", PICTURES)
        shots(folder / "report.html")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
