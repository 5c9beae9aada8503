"""A real Slurm on one machine: virtual nodes that can lose power, fake GPUs, preemption, limits.

    with Cluster(logs=folder, nodes=2) as cluster:
        job = cluster.submit("--gres=gpu:1", wrap="hostname")
        cluster.wait_until(lambda: not cluster.queue(), seconds=20)

Every daemon is the child of a pid namespace of its own, so one SIGKILL ends it and all that it started: for a node that
is a power failure. They die with the thread that started them, too, so that not even a killed test leaves one behind.
Slurm 22.05 (Debian 12) is what this was written for.
"""

import os
import random
import re
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

import psutil

from . import install

T = TypeVar("T")

SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Job:
    """What squeue says of a job; of an array, a line for each element (12_3). Values as squeue prints them."""

    id: str
    state: str
    reason: str
    comment: str
    dependency: str
    name: str
    node: str
    partition: str


# squeue's letters for Job's fields
COLUMNS = SEPARATOR.join(("%i", "%T", "%r", "%k", "%E", "%j", "%N", "%P"))


class Cluster:
    """A cluster, idle once started. As a context manager it starts and stops.

    logs        folder of the daemons' logs, which stay; all else is in a folder under /tmp and goes when it stops
    nodes       node1, node2, ...
    cpus, gpus  of each node; none has to exist (a GPU is a device file that reads as empty)
    memory      MB of each node
    accounting  whether there is a slurmdbd (and its MariaDB), hence sacct and limits per user
    max_submit  jobs that a user may have in the queue at once (QOS normal; needs accounting)
    hold        seconds that Slurm holds a requeued job before it may start again; its own default is 120
    grace       seconds between a preempted job's SIGTERM and its end
    settings    other lines of slurm.conf, such as {"MaxJobCount": 10, "MaxArraySize": 5}

    Partitions: `main` (the default), whose jobs push those of `low` off, to be requeued.
    """

    def __init__(
        self,
        logs: Path,
        *,
        nodes: int = 3,
        cpus: int = 4,
        memory: int = 4000,
        gpus: int = 2,
        accounting: bool = False,
        max_submit: int | None = None,
        hold: int = 120,
        grace: int = 2,
        settings: Mapping[str, object] | None = None,
    ):
        if max_submit is not None and not accounting:
            raise ValueError("max_submit is a limit of the accounting: set accounting=True")
        self.logs = logs
        self.nodes = [f"node{n}" for n in range(1, nodes + 1)]
        self.cpus, self.memory, self.gpus = cpus, memory, gpus
        self.accounting, self.max_submit = accounting, max_submit
        self.hold, self.grace, self.settings = hold, grace, dict(settings or {})
        self._daemons: dict[str, subprocess.Popen] = {}
        self._started: dict[str, float] = {}  # when each node was, in seconds since 1970

    # Life

    def start(self) -> None:
        """Returns once every node is idle. Raises Unavailable where there can be no cluster, RuntimeError."""
        if self._daemons:
            raise RuntimeError(f"this cluster runs already: {self.folder}")
        install.require(self.accounting)
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # a socket's path has 107 characters at most
        try:
            self._ports = Ports(len(self.nodes) + 2)
            self._write()
            self._start_munge()
            if self.accounting:
                self._start_accounting()
            self.start_controller()
            for node in self.nodes:
                self._start_node(node)
            self._await_idle(self.nodes)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Ends every process, jobs' too, and removes the folder. Does nothing where nothing runs."""
        for name in list(self._daemons):
            self._kill(name)
        if hasattr(self, "_ports"):
            self._ports.release()
        shutil.rmtree(getattr(self, "folder", ""), ignore_errors=True)

    def __enter__(self) -> "Cluster":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def reset(self) -> None:
        """As after start, but for the numbers of jobs: none in the queue, every node up and idle."""
        if not self._alive("slurmctld"):
            self.start_controller()
        dead = [node for node in self.nodes if not self._alive(node)]
        self.run("scancel", "--user=root")
        self.wait_until(lambda: not [job for job in self.queue() if job.node not in dead], 20)
        for node in dead:
            self._start_node(node)
        self._await_idle(self.nodes)

    # Faults

    def kill_node(self, node: str, *, noticed: bool = False) -> None:
        """A power failure. Slurm finds out by itself after some 10 s, or at once where it is `noticed`."""
        self._kill(self.nodes[self.nodes.index(node)])
        if noticed:
            self.run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=power")

    def start_node(self, node: str) -> None:
        """Returns once the node takes jobs again."""
        self._start_node(node)
        self._await_idle([node])

    def kill_controller(self, *, orderly: bool = False) -> None:
        """slurmctld ends; jobs run on. Unless it is told to (`orderly`), it forgets its last 10 seconds or so:
        jobs submitted then are lost, their numbers given again, and those started then are killed and start anew."""
        self._kill("slurmctld", signal.SIGTERM if orderly else signal.SIGKILL)

    def start_controller(self) -> None:
        self._spawn("slurmctld", "slurmctld", "-D")
        self._await("slurmctld", lambda: not self.run("scontrol", "ping", check=False).returncode, 30)

    def hurry(self) -> None:
        """Jobs that wait for their time, such as requeued ones, may start now."""
        for job in self.queue():
            if job.state == "PENDING" and job.reason in ("BeginTime", "None"):  # None: just requeued
                self.run("scontrol", "update", f"JobId={job.id}", "StartTime=now")

    # Use

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to use this cluster."""
        return {"SLURM_CONF": str(self.folder / "slurm.conf")}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands; it fails with what the command said."""
        environment = os.environ | self.environment
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr.strip()}")
        return done

    def submit(self, *options: str, wrap: str) -> str:
        """The job's number. Its output is dropped unless --output is among sbatch's options."""
        return self.run("sbatch", "--parsable", "--output=/dev/null", *options, f"--wrap={wrap}").stdout.strip()

    def queue(self, *options: str) -> list[Job]:
        """Jobs that are not done, by squeue; with "--states=all" also those that it still knows."""
        lines = self.run("squeue", "--noheader", "--array", f"--format={COLUMNS}", *options).stdout.splitlines()
        return [Job(*line.split(SEPARATOR)) for line in lines]

    def wait_until(self, predicate: Callable[[], T], seconds: float) -> T:
        """The predicate's first true value. Raises TimeoutError, with the queue."""
        end = time.monotonic() + seconds
        while not (value := predicate()):
            if time.monotonic() > end:
                queue = self.run("squeue", "--states=all", check=False).stdout
                raise TimeoutError(f"not so within {seconds} s; logs are in {self.logs}, and squeue says:\n{queue}")
            time.sleep(0.05)
        return value

    # Daemons

    def _spawn(self, name: str, *command: str, environment: Mapping[str, str] | None = None) -> None:
        if self._alive(name):
            raise RuntimeError(f"{name} runs already")
        program, *words = command
        path = shutil.which(program, path=install.PATH)
        # setpriv: dies with the thread that starts it. unshare: the program is its namespace's first process.
        contained = ["setpriv", "--pdeathsig=KILL", "unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child"]
        with (self.logs / f"{name}.out").open("a") as out:
            self._daemons[name] = subprocess.Popen(
                [*contained, "--mount-proc", path or program, *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | self.environment | dict(environment or {}),
                start_new_session=True,
            )

    def _alive(self, name: str) -> bool:
        return name in self._daemons and self._daemons[name].poll() is None

    def _kill(self, name: str, number: signal.Signals = signal.SIGKILL) -> None:
        """Returns once the last process of its namespace is gone: unshare waits for that."""
        daemon = self._daemons.pop(name, None)
        if daemon is None or daemon.poll() is not None:
            return
        first = psutil.Process(daemon.pid).children()  # none in the instant before unshare has forked
        for process in first or [daemon]:
            process.send_signal(number)
        daemon.wait()

    def _await(self, name: str, ready: Callable[[], bool], seconds: float) -> None:
        """Waits for what a daemon does when it is up; says what it wrote where it is not."""
        end = time.monotonic() + seconds
        while not ready():
            if not self._alive(name) or time.monotonic() > end:
                said = [line for log in sorted(self.logs.glob(f"{name}.*")) for line in log.read_text().splitlines()]
                state = "did not come up" if self._alive(name) else "ended"
                nodes = self.run("sinfo", "--Node", "--format=%N %T %E", check=False).stdout
                raise RuntimeError("\n".join([f"{name} {state}; its logs are in {self.logs}:", *said[-20:], nodes]))
            time.sleep(0.02)

    def _start_munge(self) -> None:
        files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munge.seed"}
        options = [f"--{option}={self.folder / file}" for option, file in files.items()]
        self._spawn("munged", "munged", "--foreground", "--force", *options, f"--log-file={self.logs / 'munged.log'}")
        self._await("munged", lambda: answers(self.folder / "munge.sock"), 20)

    def _start_accounting(self) -> None:
        data, mysql = self.folder / "mysql", self.folder / "mysql.sock"
        make = ["mariadb-install-db", "--no-defaults", "--user=root", f"--datadir={data}", "--skip-test-db"]
        self.run(*make, "--auth-root-authentication-method=socket")
        mariadbd = ["mariadbd", "--no-defaults", "--user=root", "--skip-networking", f"--datadir={data}"]
        files = [f"--socket={mysql}", f"--pid-file={self.folder / 'mariadbd.pid'}"]
        fast = ["--innodb-doublewrite=0", "--innodb-flush-log-at-trx-commit=0", "--innodb-flush-method=nosync"]
        asked = "--innodb-lock-wait-timeout=900"  # by slurmdbd
        self._spawn("mariadbd", *mariadbd, *files, *fast, asked)
        self._await("mariadbd", lambda: answers(mysql), 60)
        # StorageHost=localhost is a socket, and this variable says which.
        self._spawn("slurmdbd", "slurmdbd", "-D", environment={"MYSQL_UNIX_PORT": str(mysql)})
        self._await("slurmdbd", lambda: not self.run("sacctmgr", "-n", "show", "cluster", check=False).returncode, 60)
        self.run("sacctmgr", "-i", "add", "cluster", "tests")
        if self.max_submit is not None:
            self.run("sacctmgr", "-i", "modify", "qos", "normal", "set", f"MaxSubmitJobsPerUser={self.max_submit}")

    def _start_node(self, node: str) -> None:
        # A shell is the first process, so that those whose parents end are waited for.
        up = 'hostname "$0" && mount --bind "$1" /etc/hosts && slurmd -D -N "$0" & wait'
        self._started[node] = time.time()
        self._spawn(node, "sh", "-c", up, node, str(self.folder / "hosts"), environment={"PATH": install.PATH})

    def _await_idle(self, nodes: list[str]) -> None:
        def idle(node: str) -> bool:
            # Only the start's time tells whether the controller speaks of this slurmd or of the one before.
            shown = self.run("scontrol", "--oneliner", "show", "node", node).stdout
            state, started = (re.search(rf" {field}=(\S+)", shown) for field in ("State", "SlurmdStartTime"))
            if not (state and started) or state[1] not in ("IDLE", "IDLE+PLANNED") or started[1] == "None":
                return False
            return datetime.fromisoformat(started[1]).timestamp() >= int(self._started[node])

        for node in nodes:
            self._await(node, lambda node=node: idle(node), 60)

    # Files

    def _write(self) -> None:
        self.folder.chmod(0o755)
        for folder in ("state", "dev", *(f"spool-{node}" for node in self.nodes)):
            (self.folder / folder).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(secrets.token_bytes(128))
        for gpu in range(self.gpus):  # a GPU has to be a device: these are further names of /dev/null
            os.mknod(self.folder / "dev" / f"gpu{gpu}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        hosts = [Path("/etc/hosts").read_text(), *(f"127.0.0.1 {node}\n" for node in self.nodes)]
        (self.folder / "hosts").write_text("".join(hosts))
        (self.folder / "slurm.conf").write_text(self._slurm_conf())
        (self.folder / "gres.conf").write_text(self._gres_conf())
        if self.accounting:
            accounting = self.folder / "slurmdbd.conf"
            accounting.touch(mode=0o600)
            accounting.write_text(self._slurmdbd_conf())

    def _slurm_conf(self) -> str:
        controller, accounting = self._ports.numbers[:2]
        munge = self.folder / "munge.sock"
        lines = {
            "ClusterName": "tests",
            "SlurmctldHost": f"{socket.gethostname().split('.')[0]}(127.0.0.1)",
            "SlurmctldPort": controller,
            "SlurmUser": "root",
            "SlurmdUser": "root",
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={munge},cred_expire={self.hold}",  # how long a requeued job is held, too
            "StateSaveLocation": self.folder / "state",
            "SlurmdSpoolDir": self.folder / "spool-%n",
            "SlurmctldPidFile": self.folder / "slurmctld.pid",
            "SlurmdPidFile": self.folder / "slurmd-%n.pid",
            "SlurmctldLogFile": self.logs / "slurmctld.log",
            "SlurmdLogFile": self.logs / "%n.log",
            # What a node has is what is written here.
            "SlurmdParameters": "config_overrides",
            "SelectType": "select/cons_tres",
            "SelectTypeParameters": "CR_CPU_Memory",
            "DefMemPerCPU": max(1, self.memory // self.cpus),
            "GresTypes": "gpu",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "MpiDefault": "none",
            # A test waits for all of these.
            "SlurmdTimeout": 3,
            "MessageTimeout": 3,
            "KillWait": 1,
            "SchedulerParameters": "sched_interval=1,bf_interval=1,batch_sched_delay=0",
            "ReturnToService": 2,
            "PreemptType": "preempt/partition_prio",
            "PreemptMode": "REQUEUE",
        }
        if self.accounting:
            lines |= {
                "AccountingStorageType": "accounting_storage/slurmdbd",
                "AccountingStorageHost": "127.0.0.1",
                "AccountingStoragePort": accounting,
                "AccountingStoragePass": munge,
                "AccountingStorageTRES": "gres/gpu",
                "JobAcctGatherType": "jobacct_gather/linux",
            }
        if self.max_submit is not None:
            lines["AccountingStorageEnforce"] = "limits,qos"
        shape = f"CPUs={self.cpus} Sockets=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={self.memory}"
        gpus = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        return "\n".join(
            [
                *(f"{name}={value}" for name, value in (lines | self.settings).items()),
                *(f"NodeName={node} NodeAddr=127.0.0.1 Port={port} {shape}{gpus}" for node, port in self._node_ports()),
                "PartitionName=main Nodes=ALL Default=YES PriorityTier=2 PreemptMode=OFF",
                f"PartitionName=low Nodes=ALL PriorityTier=1 PreemptMode=REQUEUE GraceTime={self.grace}",
                "",
            ]
        )

    def _node_ports(self) -> Iterator[tuple[str, int]]:
        return zip(self.nodes, self._ports.numbers[2:], strict=True)

    def _gres_conf(self) -> str:
        files = f"{self.folder}/dev/gpu[0-{self.gpus - 1}]"
        nodes = ",".join(self.nodes)
        return "AutoDetect=off\n" + (f"NodeName={nodes} Name=gpu File={files}\n" if self.gpus else "")

    def _slurmdbd_conf(self) -> str:
        lines = {
            "AuthType": "auth/munge",
            "AuthInfo": f"socket={self.folder / 'munge.sock'}",
            "DbdHost": "localhost",
            "DbdPort": self._ports.numbers[1],
            "SlurmUser": "root",
            "PidFile": self.folder / "slurmdbd.pid",
            "LogFile": self.logs / "slurmdbd.log",
            "StorageType": "accounting_storage/mysql",
            "StorageHost": "localhost",
            "StorageUser": "root",
            "StorageLoc": "slurm",
        }
        return "".join(f"{name}={value}\n" for name, value in lines.items())


class Ports:
    """Free TCP ports that no other cluster of this class takes: it holds the UDP port of each number meanwhile.

    They lie below those that the system gives to whoever connects, which could take a dead daemon's before it is back.
    """

    def __init__(self, count: int):
        self._held: list[socket.socket] = []
        for port in random.SystemRandom().sample(range(10_000, 32_768), k=2000):
            if len(self._held) == count:
                break
            held = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            try:
                with socket.socket() as probe:
                    held.bind(("", port))
                    probe.bind(("", port))
            except OSError:
                held.close()
            else:
                self._held.append(held)
        self.numbers = [held.getsockname()[1] for held in self._held]

    def release(self) -> None:
        for held in self._held:
            held.close()


def answers(path: Path) -> bool:
    """Whether a daemon listens at this Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0
