import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from .cluster import Cluster, Job


def job(cluster: Cluster, number: str) -> Job:
    [found] = [job for job in cluster.queue("--states=all") if job.id == number]
    return found


def comes_to(cluster: Cluster, number: str, state: str, seconds: float = 20) -> Job:
    cluster.wait_until(lambda: job(cluster, number).state == state, seconds)
    return job(cluster, number)


def processes(cluster: Cluster) -> list[psutil.Process]:
    """Those that have the cluster in their environment: its daemons and its jobs."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_CONF") == cluster.environment["SLURM_CONF"]:
                found.append(process)
        except psutil.Error:  # it has ended
            continue
    return found


def test_every_node_runs_jobs_under_its_own_name(cluster, tmp_path):
    numbers = [
        cluster.submit(f"--nodelist={node}", f"--output={tmp_path / node}", wrap="hostname; srun hostname")
        for node in cluster.nodes
    ]
    for number in numbers:
        comes_to(cluster, number, "COMPLETED")
    assert {node: (tmp_path / node).read_text().split() for node in cluster.nodes} == {n: [n, n] for n in cluster.nodes}


def test_a_gpu_has_one_job_at_a_time(cluster, tmp_path):
    def submit(name):
        options = ["--nodelist=node1", "--gres=gpu:1", f"--output={tmp_path / name}"]
        wrap = f"echo $CUDA_VISIBLE_DEVICES; until [ -e {tmp_path}/end ]; do sleep .1; done"
        return cluster.submit(*options, wrap=wrap)

    first, second, third = submit("first"), submit("second"), submit("third")
    comes_to(cluster, first, "RUNNING")
    comes_to(cluster, second, "RUNNING")
    cluster.wait_until(lambda: job(cluster, third).reason == "Resources", 20)
    (tmp_path / "end").touch()
    comes_to(cluster, third, "COMPLETED")
    assert {(tmp_path / name).read_text().strip() for name in ("first", "second")} == {"0", "1"}


def test_a_dead_nodes_job_ends_on_another(cluster, tmp_path):
    ran = tmp_path / "ran"
    wrap = f"echo $SLURM_RESTART_COUNT $(hostname) >> {ran}; sleep 2; echo end >> {ran}"
    number = cluster.submit(wrap=wrap)
    cluster.wait_until(lambda: ran.exists() and ran.read_text().endswith("\n"), 20)
    node = job(cluster, number).node
    cluster.kill_node(node)
    cluster.wait_until(lambda: job(cluster, number).reason == "BeginTime", 60)  # Slurm has noticed, and holds it
    cluster.hurry()
    other = comes_to(cluster, number, "COMPLETED").node
    assert other != node
    assert ran.read_text().split("\n") == [node, f"1 {other}", "end", ""]


def test_a_node_that_is_back_takes_jobs(cluster):
    cluster.kill_node("node2", noticed=True)
    number = cluster.submit("--nodelist=node2", wrap="true")
    cluster.wait_until(lambda: "ReqNodeNotAvail" in job(cluster, number).reason, 20)
    cluster.start_node("node2")
    assert comes_to(cluster, number, "COMPLETED").node == "node2"


def test_preemption_requeues(cluster):
    low = cluster.submit("--partition=low", "--nodelist=node1", "--gres=gpu:2", wrap="sleep 60")
    comes_to(cluster, low, "RUNNING")
    high = cluster.submit("--nodelist=node1", "--gres=gpu:2", wrap="sleep 1")
    comes_to(cluster, high, "COMPLETED")
    assert comes_to(cluster, low, "PENDING").reason == "BeginTime"
    cluster.hurry()
    comes_to(cluster, low, "RUNNING")


def test_a_controller_that_dies_keeps_its_jobs(cluster, tmp_path):
    ending = cluster.submit(wrap=f"until [ -e {tmp_path}/end ]; do sleep .1; done")
    running = cluster.submit("--comment=runs on", wrap="sleep 60")
    held = cluster.submit("--hold", wrap="true")
    for number in ending, running:
        comes_to(cluster, number, "RUNNING")
    known, written = time.time(), cluster.folder / "state" / "job_state"
    cluster.run("scontrol", "update", f"JobId={held}", "Comment=something to be written")
    cluster.wait_until(lambda: written.exists() and written.stat().st_mtime > known, 30)
    cluster.kill_controller()
    (tmp_path / "end").touch()
    refused = cluster.run("sbatch", "--wrap=true", check=False)
    assert refused.returncode == 1 and "Unable to contact slurm controller" in refused.stderr
    cluster.start_controller()
    comes_to(cluster, ending, "COMPLETED")
    assert (job(cluster, running).state, job(cluster, running).comment) == ("RUNNING", "runs on")
    assert (job(cluster, held).state, job(cluster, held).reason) == ("PENDING", "JobHeldUser")


def test_a_controller_told_to_end_forgets_nothing(cluster):
    number = cluster.submit("--hold", wrap="true")
    cluster.kill_controller(orderly=True)
    cluster.start_controller()
    assert job(cluster, number).reason == "JobHeldUser"


def test_a_failed_dependency_cancels_or_waits_for_ever(cluster):
    failing = cluster.submit("--hold", wrap="exit 3")
    after = f"--dependency=afterok:{failing}"
    cancelled = cluster.submit(after, "--kill-on-invalid-dep=yes", wrap="true")
    waiting = cluster.submit(after, wrap="true")
    assert job(cluster, waiting).dependency == f"afterok:{failing}(unfulfilled)"
    cluster.run("scontrol", "release", failing)
    assert comes_to(cluster, cancelled, "CANCELLED").reason == "DependencyNeverSatisfied"
    cluster.wait_until(lambda: job(cluster, waiting).reason == "DependencyNeverSatisfied", 20)
    assert job(cluster, waiting).state == "PENDING"


def test_no_accounting_no_history(cluster):
    done = cluster.run("sacct", check=False)
    assert done.returncode == 1 and "accounting storage is disabled" in done.stderr


def test_accounting_knows_jobs_and_enforces_a_users_limit(make_cluster):
    cluster = make_cluster(nodes=1, accounting=True, max_submit=2)
    numbers = [cluster.submit("--gres=gpu:1", wrap="sleep 1") for _ in range(2)]
    refused = cluster.run("sbatch", "--wrap=true", check=False)
    assert refused.returncode == 1
    assert "QOSMaxSubmitJobPerUserLimit" in refused.stderr
    assert "Batch job submission failed: Job violates accounting/QOS policy (job submit limit" in refused.stderr
    for number in numbers:
        comes_to(cluster, number, "COMPLETED")
    columns = ["--noheader", "--parsable2", "--allocations", "--format=JobID,State,AllocTRES"]
    listed = cluster.wait_until(lambda: (s := cluster.run("sacct", *columns).stdout).count("COMPLETED") == 2 and s, 20)
    assert [line.split("|")[:2] for line in listed.splitlines()] == [[number, "COMPLETED"] for number in numbers]
    assert listed.count("gres/gpu=1") == 2
    cluster.submit(wrap="true")


def test_a_limit_of_slurm_conf(make_cluster):
    cluster = make_cluster(nodes=1, settings={"MaxArraySize": 5})
    refused = cluster.run("sbatch", "--array=0-5", "--wrap=true", check=False)
    assert refused.returncode == 1 and "Invalid job array specification" in refused.stderr
    number = cluster.submit("--array=0-4", "--hold", wrap="true")
    assert [job.id for job in cluster.queue()] == [f"{number}_{n}" for n in range(5)]


def test_clusters_do_not_see_each_others_jobs(cluster, make_cluster):
    other = make_cluster(nodes=1)
    cluster.submit("--job-name=here", "--hold", wrap="true")
    other.submit("--job-name=there", "--hold", wrap="true")
    assert [job.name for job in cluster.queue()] == ["here"]
    assert [job.name for job in other.queue()] == ["there"]


def test_stop_leaves_no_process(make_cluster):
    cluster = make_cluster(nodes=2)
    number = cluster.submit(wrap="setsid sleep 1000 & sleep 1000")
    comes_to(cluster, number, "RUNNING")
    cluster.wait_until(lambda: Counter(process.name() for process in processes(cluster))["sleep"] == 2, 10)
    before = Counter(process.name() for process in processes(cluster))
    assert {"munged", "slurmctld", "slurmd"} <= set(before)
    cluster.stop()
    assert not processes(cluster)
    assert not cluster.folder.exists()
    cluster.stop()


def test_a_killed_test_leaves_no_process(cluster, tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from slurm.cluster import Cluster
        cluster = Cluster(Path(sys.argv[1]), nodes=1)
        cluster.start()
        print(cluster.folder, flush=True)
        time.sleep(1000)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as test:
        folder = test.stdout.readline().strip()
        of = Cluster(tmp_path)
        of.folder = Path(folder)
        assert processes(of)
        test.kill()
    cluster.wait_until(lambda: not processes(of), 10)
    shutil.rmtree(folder)


def test_a_daemon_that_fails_says_why(make_cluster):
    with pytest.raises(RuntimeError, match=r"slurmctld ended(.|\n)*MaxJobCount"):
        make_cluster(nodes=1, settings={"MaxJobCount": "many"})
