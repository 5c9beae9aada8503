"""python -m benchmarks.scale: what planning a large sweep costs, and a large store, beside the work itself.

A store of N records is made, each by Store.commit (but for the fsync) from a stage of the embedded world's loop, with
one small file. Then, each in a process of its own:

    plan          1,000 members from the command line (dry_run=true), the store being empty
    plan_against  the same members, a part of which is in the large store
    list          python -m evolve.store list (it counts the litter too)
    litter        what `prune` would remove, alone
    status        python -m evolve.status of a sweep of 10,000 stages that 2,500 jobs make, half of which are done;
                  where no Slurm can be asked
    overhead      the local launcher: 200 stages that take some milliseconds each; a stage's share of the wall time on
                  one warm worker, less its own seconds as the record has them

    --records N   in the large store (100000)
    --status      that alone; the other results stay as they are

Printed, and kept in benchmarks/results/scale.json: wall and CPU (user + system) seconds, the peak of resident memory
in MiB, and how many members, stages, records there were.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra import compose, initialize_config_dir

from evolve import config, launch, plan, snapshot, sources, store
from evolve.config import CONF, ROOT, Config
from evolve.show import Show
from evolve.store import Report, Stage, Store
from evolve.workers import Setting, Workers

FILE = ROOT / "benchmarks" / "results" / "scale.json"
MEMBERS = ["seed=range(0,250)", "strategy=chain,tree", "loss=sft,both"]
EACH = ["iteration.count=1"]
SHARED = 50  # of the seeds are in the large store


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return config.load(compose("config", overrides=[*EACH, *overrides]))


def stages(output: Path) -> Iterator[Stage]:
    """Of ever more members, each once: the first of the sweep's seeds, then others."""
    bases = [composed(f"strategy={one}", f"loss={two}") for one in ("chain", "tree") for two in ("sft", "both")]
    resolve = sources.Resolver(output / "store" / "digests")
    seen: set[str] = set()
    for seed in itertools.chain(range(SHARED), itertools.count(1000)):
        for base in bases:
            for step in plan.build("", base.model_copy(update={"seed": seed}), resolve).steps:
                if step.stage.id not in seen:
                    seen.add(step.stage.id)
                    yield step.stage


def fill(output: Path, records: int) -> None:
    made = Store(output / "store")
    sync, store._sync = store._sync, lambda path: None
    where = {"versions": {"python": "3.11"}, "code": {"commit": None}, "host": "here", "seconds": 1.5}
    try:
        for number, stage in enumerate(itertools.islice(stages(output), records)):
            built = output / f"built-{number}"
            built.mkdir(parents=True)
            (built / "rows.jsonl").write_text('{"prompt": "one"}\n')
            made.folder(stage.id).parent.mkdir(parents=True, exist_ok=True)
            made.commit(
                stage,
                built,
                Report(values={stage.config.COUNTED or "rows": 1}),
                {**where, "started": "2025-01-01T00:00:00Z"},
            )
    finally:
        store._sync = sync


def measured(*command: str) -> tuple[dict[str, float], str]:
    """What a command costs, and what it prints."""
    began = time.perf_counter()
    with TemporaryDirectory() as scratch:
        output = Path(scratch) / "stdout"
        with output.open("w") as file:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file)
            _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        cpu = used.ru_utime + used.ru_stime
        cost = {"wall_seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), "peak_mib": used.ru_maxrss // 1024}
        return cost, output.read_text()


def planned(output: Path) -> dict[str, Any]:
    cost, printed = measured("evolve/main.py", "-m", *MEMBERS, *EACH, "dry_run=true", f"output={output}")
    words = printed.splitlines()[0].split()  # plan 12008 stages for 1000 members (...): 0 reused, 12008 new...
    reused = next(words[place - 1] for place, word in enumerate(words) if word == "reused,")
    return {**cost, "members": int(words[4]), "stages": int(words[1]), "reused": int(reused)}


def status(output: Path, members: int = 500, steps: int = 20, each: int = 4) -> dict[str, Any]:
    """A sweep of `members` with `steps` stages of their own, `each` of which are a job."""
    fill(output, members * steps // 2)
    done = list(Store(output / "store").ids())
    ids = [*done, *(f"train/{number:016x}" for number in range(members * steps - len(done)))]
    folder = output / "sweeps" / "large"
    folder.mkdir(parents=True)
    described = [
        {
            "name": f"seed={member}",
            "steps": [{"phase": f"phase {n % 4}", "id": ids[member * steps + n]} for n in range(steps)],
        }
        for member in range(members)
    ]
    content = {"store": "../../store", "needs": {stage: [] for stage in ids}, "members": described}
    (folder / "sweep.json").write_text(json.dumps(content))
    with (folder / "jobs.jsonl").open("w") as notes:
        for number in range(0, len(ids), each):
            made, job = ids[number : number + each], output / "jobs" / f"{number:016x}"
            notes.write(json.dumps({"stages": {stage: [job.name, str(number)] for stage in made}}) + "\n")
            job.mkdir(parents=True)
            about = {"time": 1.0, "job": str(number), "restarts": 0}
            events = [{**about, "event": "start"}]
            for stage in made if number < len(done) else ():
                events += [{**about, "event": what, "stage": stage, "seconds": 1.0} for what in ("stage", "done")]
            (job / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    cost, printed = measured("-m", "evolve.status", str(folder))
    assert f"{len(done)} done" in printed, printed
    return {**cost, "stages": len(ids), "jobs": len(ids) // each}


def overhead(output: Path, count: int = 200) -> dict[str, Any]:
    """Seconds that the local launcher adds to a stage's own."""
    one = composed(f"output={output}", "resources.workers=1")
    resolve = sources.Resolver(output / "store" / "digests")
    members = []
    for seed in range(count + 1):
        config = one.model_copy(update={"data": one.data.model_copy(update={"seed": seed})})
        member = plan.build(f"data.seed={seed}", config, resolve)
        first = next(step for step in member.steps if step.stage.kind == "data")
        members.append(replace(member, steps=(first,)))
    target = Store(output / "store")
    setting = Setting(target, one.resources, output / "logs", snapshot.code())
    pool = Workers(setting)
    wall = []
    try:
        for some in (members[:1], members[1:]):  # the first starts the worker
            graph = plan.Graph(some)
            ready = launch.Planned(graph, target, plan.compare(graph, target, lambda kind: []))
            began = time.perf_counter()
            with redirect_stdout(io.StringIO()), Show(ready) as show:
                outcomes = launch.run(ready.new, target, pool, show, retries=0)
            wall.append(time.perf_counter() - began)
            assert all(outcome.status == "done" for outcome in outcomes.values()), outcomes
    finally:
        pool.close()
    records = [target.record(stage) for stage in graph.stages.values()]
    own = sum(record["seconds"] for record in records if record)
    return {
        "stages": len(records),
        "wall_seconds": round(wall[1], 2),
        "own_seconds": round(own, 2),
        "overhead_seconds_a_stage": round((wall[1] - own) / len(records), 4),
        "worker_start_seconds": round(wall[0], 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--status", action="store_true")
    given = parser.parse_args()
    records = given.records
    os.environ["WANDB_MODE"] = "disabled"
    results: dict[str, Any] = {"records": records, "cores": os.cpu_count()}
    with TemporaryDirectory() as scratch:
        own = {"status": status(Path(scratch) / "status")}
        if given.status:
            FILE.write_text(json.dumps(json.loads(FILE.read_text()) | own, indent=1) + "\n")
            print(json.dumps(own, indent=1))
            return 0
        results |= own
        small, large = Path(scratch) / "small", Path(scratch) / "large"
        results["overhead"] = overhead(Path(scratch) / "run")
        results["plan"] = planned(small)
        began = time.process_time()
        fill(large, records)
        results["make_a_record_cpu_seconds"] = round((time.process_time() - began) / records, 5)
        results["plan_against"] = planned(large)
        results["list"], printed = measured("-m", "evolve.store", "list", str(large))
        assert len(printed.splitlines()) == records + 1
        count = "import sys, evolve.store as s; print(len(s.Store(s.Path(sys.argv[1])).litter()))"
        results["litter"], printed = measured("-c", count, str(large / "store"))
        assert printed == "0\n", printed
    FILE.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
