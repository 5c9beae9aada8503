"""The programs of a Slurm cluster, from Debian's packages."""

import contextlib
import fcntl
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))  # daemons lie where users don't look

BASE = {"slurmctld": "slurmctld", "slurmd": "slurmd", "slurm-client": "sbatch", "munge": "munged"}
ACCOUNTING = {"slurmdbd": "slurmdbd", "mariadb-server": "mariadbd"}
MYSQL = "slurm-wlm-mysql-plugin"


class Unavailable(Exception):
    """No cluster can be started on this machine; the message says why."""


def require(accounting: bool) -> None:
    """Installs what a cluster lacks. Raises Unavailable where that, or a namespace, is not to be had."""
    if os.geteuid() != 0:
        raise Unavailable("a Slurm of virtual nodes needs root (namespaces, device files)")
    with Path("/run/lock/slurm-for-tests").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest's workers come here at the same time
        if lacking := missing(accounting):
            install(lacking)
    namespaces = ["unshare", "--pid", "--mount", "--uts", "--fork", "--mount-proc", "true"]
    probe = subprocess.run(namespaces, capture_output=True)
    if probe.returncode:
        raise Unavailable(f"virtual nodes need namespaces of their own: {probe.stderr.decode().strip()}")


def missing(accounting: bool) -> list[str]:
    wanted = BASE | (ACCOUNTING if accounting else {})
    packages = [package for package, program in wanted.items() if not shutil.which(program, path=PATH)]
    if accounting and not any(Path("/usr/lib").glob("*/slurm*/accounting_storage_mysql.so")):
        packages.append(MYSQL)
    return packages


def install(packages: list[str]) -> None:
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=300"]
    if not shutil.which("apt-get"):
        raise Unavailable(f"there is no apt-get to install {' '.join(packages)} with")
    with no_services():
        for command in ([*apt, "update"], [*apt, "install", "-y", "--no-install-recommends", *packages]):
            done = subprocess.run(
                command, capture_output=True, text=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
            )
            if done.returncode:
                raise Unavailable(f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")


@contextlib.contextmanager
def no_services() -> Iterator[None]:
    """Debian starts a package's service once it is installed, unless this file says no."""
    policy = Path("/usr/sbin/policy-rc.d")
    if policy.exists():
        yield
        return
    policy.write_text("#!/bin/sh\nexit 101\n")
    policy.chmod(0o755)
    try:
        yield
    finally:
        policy.unlink(missing_ok=True)
