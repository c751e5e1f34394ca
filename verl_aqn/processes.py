"""Processes that this one starts: each goes when this one does, and nothing of theirs stays."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

GRACE_S = 20
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def start_module(module: str, arguments: Sequence[str | Path], env: Mapping[str, str], log: Path) -> subprocess.Popen:
    """`python -m MODULE ARGUMENTS…` in a session of its own, whose output is added to `log`."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )


def _end_with_parent() -> None:
    """For a child before it starts: it gets SIGTERM when this process dies, however that comes."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def adopt_orphans() -> None:
    """Orphans among the descendants become children of this process instead of init's, so that they can be found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ended_children() -> Iterator[tuple[int, int]]:
    """Collect children that have ended: process id and exit code, negative for a signal."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def end_descendants() -> None:
    """End every process that this one started, directly or not: first politely, then by SIGKILL."""
    for send, wait in (("terminate", GRACE_S), ("kill", 5)):
        # A dying process can still start another, so look again until there is none.
        for _ in range(3):
            processes = psutil.Process().children(recursive=True)
            if not processes:
                return
            for process in processes:
                try:
                    getattr(process, send)()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=wait)
            for _ in ended_children():  # so that none stays as a zombie
                pass


def oom_kills() -> int:
    """How many processes the kernel has ended for want of memory: in this container's group, else on the machine."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError, ValueError):
            counts = dict(line.split() for line in Path(path).read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


def remove_shared_memory(since: float) -> None:
    """Unlink what killed processes left in /dev/shm: made after `since`, ours, and mapped by no living process.

    By inode and not by name: whoever makes a semaphore has it mapped under a temporary name.
    """
    made = {}
    for pattern in ("psm_*", "sem.mp-*", "verl_weights_*", "vllm_dist_*"):
        for path in Path("/dev/shm").glob(pattern):
            with suppress(FileNotFoundError):  # gone meanwhile: its owner lives
                status = path.stat()
                if status.st_ctime >= since and status.st_uid == os.getuid():
                    made[status.st_ino] = path
    for process in Path("/proc").glob("[0-9]*") if made else ():
        try:
            maps = (process / "maps").read_text().splitlines()
        except OSError:
            continue
        for line in maps:
            if "/dev/shm/" in line:
                made.pop(int(line.split()[4]), None)
    for path in made.values():
        path.unlink(missing_ok=True)
