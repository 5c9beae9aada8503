"""python -m benchmarks.report: what the page of a large sweep costs.

A member of the embedded world is run for real; then all its records are copied under other ids, with another seed, for
every member: 100 members with 4 iterations each, about 4,500 stages with files of real sizes. Then, in a process of its
own, the page alone is written, as `python -m sweeps.report` does it after its tables.

    --members N   (100)
    --sweep FOLDER   a sweep's, whose first member is copied; without, one is run

Printed, and kept in benchmarks/results/report.json: wall and CPU seconds, the peak of resident memory in MiB, the
page's size in MB, and how many members, stages and sample chains there were.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.scale import measured
from evolve.config import ROOT
from evolve.store import RECORD, digest, seal, unseal

FILE = ROOT / "benchmarks" / "results" / "report.json"
ONE = ["iteration.count=4", "wandb.mode=disabled"]
WRITE = """
import sys
from pathlib import Path
from sweeps import collect, page
print(page.write([collect.load(Path(sys.argv[1]))], Path(sys.argv[2])))
"""


def copies(source: Path, output: Path, members: int) -> Path:
    """A sweep's folder under `output` with a store beside it: the first member of another sweep, many times."""
    content = unseal((source / "sweep.json").read_bytes())
    store, copied = (source / content["store"]).resolve(), output / "store"
    first = content["members"][0]
    made = []
    for seed in range(members):
        ids = {step["id"]: f"{step['kind']}/{digest([step['id'], seed])[:16]}" for step in first["steps"]}
        for old, new in ids.items():
            _copy(store / old, copied / new, ids, seed)
        steps = [{**step, "id": ids[step["id"]]} for step in first["steps"]]
        made.append({"name": f"seed={seed}", "config": {**first["config"], "seed": seed}, "steps": steps})
    folder = output / "sweeps" / "copies"
    folder.mkdir(parents=True)
    (folder / "sweep.json").write_text(seal({**content, "store": "../../store", "members": made}))
    return folder


def _copy(old: Path, new: Path, ids: dict[str, str], seed: int) -> None:
    new.mkdir(parents=True)
    record = json.loads((old / RECORD).read_text())
    del record["checksum"]
    record["id"] = f"{new.parent.name}/{new.name}"
    record["inputs"] = {use: ids.get(one, one) for use, one in record["inputs"].items()}
    if record["config"].get("seed") is not None:
        record["config"]["seed"] += seed
    for name in record["files"]:
        (new / name).parent.mkdir(parents=True, exist_ok=True)
        os.link(old / name, new / name)  # the space of one
    (new / RECORD).write_text(json.dumps({**record, "checksum": digest(record)}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--sweep", type=Path)
    asked = parser.parse_args()
    with TemporaryDirectory(dir=asked.sweep.resolve().parent if asked.sweep else None) as scratch:
        source = asked.sweep
        if source is None:
            command = [sys.executable, "evolve/main.py", *ONE, f"output={scratch}/one"]
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
            [source] = Path(scratch).glob("one/sweeps/*")
        folder = copies(source, Path(scratch) / "many", asked.members)
        page = folder / "report.html"
        cost, _ = measured("-c", WRITE, str(folder), str(page))
        planned = unseal((folder / "sweep.json").read_bytes())["members"]
        stages = {step["id"] for member in planned for step in member["steps"]}
        html = page.read_text()
        results = {
            "members": asked.members,
            "stages": len(stages),
            "chains": html.count('<article class="chain'),
            "records": html.count('<article class="record'),
            "megabytes": round(page.stat().st_size / 1e6, 2),
            **cost,
            "cores": os.cpu_count(),
        }
    FILE.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
