"""python benchmarks/kills.py [N]: kill -9 at N random moments of a sweep (20), each followed by the same command.

One sweep runs undisturbed, the same sweep in another folder is killed N times (the command alone: its workers have to
notice) and then left to end. Printed, and kept in benchmarks/results/kills.json:

    kills        how often it was killed while running
    lost         stages of the undisturbed sweep that are not in the end state
    broken       results whose files are not what their record says
    different    results whose files are not byte for byte the undisturbed sweep's
    run_twice    stages that were committed and then built again: their record changed after it was first seen
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from evolve.store import Corrupt, Store

ROOT = Path(__file__).resolve().parent.parent
SWEEP = ["-m", "strategy=chain,tree", "loss=sft,pt,both", "wandb.mode=disabled"]


def start(output: Path) -> subprocess.Popen:
    command = [sys.executable, "evolve/main.py", *SWEEP, f"output={output}"]
    log = (output.parent / f"{output.name}.log").open("a")
    return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def records(output: Path) -> dict[str, dict]:
    store = Store(output / "store")
    found = {}
    for stage_id in store.ids():
        try:
            if record := store.read(stage_id):
                found[stage_id] = record
        except Corrupt:
            pass
    return found


def main() -> int:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    chance = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        quiet, killed = Path(scratch) / "undisturbed", Path(scratch) / "killed"
        began = time.time()
        if start(quiet).wait():
            print((Path(scratch) / "undisturbed.log").read_text()[-2000:])
            return 1
        whole = time.time() - began
        print(f"undisturbed: {whole:.0f} s, {len(records(quiet))} stages", flush=True)
        seen: dict[str, str] = {}
        run_twice: set[str] = set()

        def look() -> int:
            now = records(killed)
            for stage_id, record in now.items():
                stamp = f"{record['started']} {record['seconds']}"
                if seen.setdefault(stage_id, stamp) != stamp:
                    run_twice.add(stage_id)
            return len(now)

        done = 0
        while done < kills:
            process = start(killed)
            # Start-up takes about 10 s of each: some kills come before any stage is done, most after a few.
            time.sleep(chance.uniform(5, 20 + 2 * whole / kills))
            if process.poll() is not None:
                break  # it had ended: nothing left to kill
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            done += 1
            print(f"kill {done}: {look()} stages", flush=True)
        last = start(killed).wait()
        look()
        again = start(killed).wait()
        look()
        want, have = records(quiet), records(killed)
        store, broken = Store(killed / "store"), 0
        for stage_id in store.ids():
            try:
                store.verify(stage_id)
            except Corrupt:
                broken += 1
        result = {
            "kills": done,
            "stages": len(want),
            "lost": len(want.keys() - have.keys()),
            "broken": broken,
            "different": sum(
                want[stage_id]["files"] != have[stage_id]["files"] for stage_id in want.keys() & have.keys()
            ),
            "run_twice": len(run_twice),
            "exit_status": [last, again],
        }
    print(json.dumps(result))
    (ROOT / "benchmarks" / "results").mkdir(exist_ok=True)
    (ROOT / "benchmarks" / "results" / "kills.json").write_text(json.dumps(result, indent=1) + "\n")
    return int(any(result[key] for key in ("lost", "broken", "different", "run_twice")) or last or again)


if __name__ == "__main__":
    sys.exit(main())
