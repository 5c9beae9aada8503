"""Runs a program that a model wrote, shut in by bubblewrap, and says whether it came to its end.

    passes("def add(a, b): return a + b\\n\\nassert add(1, 1) == 2")  ->  True

Inside there are this Python's own files and the system's libraries, read-only, and an empty /tmp: no home, no checkout,
no environment, no network, no other process. Time, memory, processes and what is written are limited; output goes
nowhere. All that the program has started is gone when `passes` returns.

A program that leaves early (os._exit(0), sys.exit()) has not passed: behind its last line a token is given out that it
isn't told. It stands in the same process, so a program that looks for it there finds it. Nothing here holds against one
that was written to cheat this test; what it can reach is what is kept from it.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from functools import cache
from pathlib import Path
from subprocess import PIPE, Popen
from tempfile import TemporaryFile
from threading import Timer

SECONDS = 10  # of the clock: a machine that is busy counts too
MEMORY = 2**30
DISK = 2**26
LIMITS = {
    "RLIMIT_AS": MEMORY,  # bytes of each process
    "RLIMIT_CPU": SECONDS,
    "RLIMIT_NPROC": 16,  # all sandboxes' together where root starts them
    "RLIMIT_FSIZE": DISK,
    "RLIMIT_NOFILE": 64,
    "RLIMIT_CORE": 0,
}
NOBODY = 65534
READY = b"ready"
PROTOCOL = f"programs have {SECONDS} s, {MEMORY // 2**30} GiB and the standard library"
LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")

RUNNER = f"""
import os, resource, sys
with open("/proc/self/oom_score_adj", "w") as file:  # where memory ends all the same, this goes first
    file.write("1000")
if os.getuid() == 0:  # whom no limit of processes holds
    os.setgroups([]), os.setgid({NOBODY}), os.setuid({NOBODY})
for name, most in {LIMITS}.items():
    resource.setrlimit(getattr(resource, name), (most, most))
token, program = sys.stdin.buffer.read().decode().split("\\n", 1)
said, nowhere = os.dup(1), os.open("/dev/null", os.O_RDWR)
for stream in range(3):
    os.dup2(nowhere, stream)
os.write(said, {READY!r})
exec(compile(program, "program", "exec"), {{"__name__": "__main__"}})
os.write(said, token.encode())
"""


def passes(program: str) -> bool:
    """Whether the program runs to its end. Raises RuntimeError where the sandbox itself fails."""
    token = secrets.token_hex(16)
    with TemporaryFile() as given, TemporaryFile() as errors:
        given.write(f"{token}\n{program}".encode(errors="replace"))
        given.seek(0)
        with Popen(_command(), stdin=given, stdout=PIPE, stderr=errors) as process:
            assert process.stdout is not None
            timer = Timer(SECONDS, process.kill)
            timer.start()
            said = process.stdout.read(len(READY) + len(token))  # no more, whatever it says
            timer.cancel()
            process.kill()
        if not said.startswith(READY):
            errors.seek(0)
            why = errors.read().decode(errors="replace").strip().splitlines()
            raise RuntimeError(f"the sandbox did not start: {why[-1] if why else f'nothing in {SECONDS} s'}")
    return said == READY + token.encode()


@cache
def missing() -> str | None:
    """What keeps programs from being run here, as a line."""
    if not shutil.which("bwrap"):
        return "needs bubblewrap: apt install bubblewrap"
    try:
        works, why = passes("import json"), "Python finds nothing of its own in it"
    except RuntimeError as error:
        works, why = False, str(error)
    return None if works else f"needs bubblewrap, which does not work here: {why}"


def _command() -> list[str]:
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    words = ["bwrap", "--die-with-parent", "--new-session", "--clearenv"]
    words += [f"--unshare-{what}" for what in ("ipc", "pid", "net", "uts", "cgroup-try")]
    words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.getuid() == 0 else ["--unshare-user"]
    for folder in reversed(Path(sys.base_prefix).parents):  # or only its owner may look for Python in /root
        words += ["--perms", "0755", "--dir", str(folder)]
    for path in (*LIBRARIES, sys.base_prefix):
        words += ["--ro-bind-try", path, path]
    words += ["--proc", "/proc", "--dev", "/dev", "--perms", "1777", "--size", str(DISK), "--tmpfs", "/tmp"]
    words += ["--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp"]
    return [*words, "--", str(python), "-I", "-S", "-c", RUNNER]
