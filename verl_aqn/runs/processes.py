"""Processes that this one starts: each goes when this one does, and nothing of theirs stays."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from verl_aqn.errors import EnvironmentFault
from verl_aqn.safe_files import open_own

GRACE_S = 20
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def start_module(module: str, arguments: Sequence[str | Path], env: Mapping[str, str], log: Path) -> subprocess.Popen:
    """`python -m MODULE ARGUMENTS…` in a session of its own, whose output is added to `log`."""
    with open(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output:
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


class SharedMemory:
    """The files of /dev/shm that the processes of a run have been seen to have mapped.

    Only these are ever removed after it: containers may share /dev/shm, and then what looks like left behind is in use
    by processes that cannot be seen from here. Files are known by device and inode and not by name: whoever makes a
    semaphore has it mapped under a temporary name. What is seen is kept in the folder `temporary` too, for whoever
    cleans after this process was killed itself.
    """

    def __init__(self, temporary: Path) -> None:
        self._file = temporary / "shared-memory"
        self.seen = self._kept()

    def _kept(self) -> set[tuple[int, int]]:
        try:
            with open(open_own(self._file, os.O_RDONLY)) as file:
                lines = file.read().split("\n")[:-1]  # without one that a killed process left half
        except (EnvironmentFault, OSError):
            return set()
        return {(int(device), int(inode)) for device, inode in map(str.split, lines)}

    def look(self, processes: Iterable[psutil.Process] | None = None) -> None:
        """See what these processes, by default this one and its descendants, have mapped now, and what others saw."""
        if processes is None:
            this = psutil.Process()
            processes = (this, *this.children(recursive=True))
        self.seen |= self._kept()
        new = set().union(*(_mapped(str(process.pid)) for process in processes)) - self.seen
        self.seen |= new
        if new:
            text = "".join(f"{device} {inode}\n" for device, inode in sorted(new))
            with suppress(OSError), open(open_own(self._file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "a") as file:
                file.write(text)

    def remove(self, since: float) -> None:
        """Unlink what was seen, was made after the time `since`, is this user's, and no living process has mapped."""
        left = {}
        for pattern in ("psm_*", "sem.mp-*", "verl_weights_*", "vllm_dist_*"):
            for path in Path("/dev/shm").glob(pattern):
                with suppress(FileNotFoundError):  # gone meanwhile: its owner lives
                    status = path.lstat()
                    if status.st_ctime >= since and status.st_uid == os.getuid():
                        left[status.st_dev, status.st_ino] = path
        left = {file: path for file, path in left.items() if file in self.seen}
        for process in Path("/proc").glob("[0-9]*") if left else ():
            for file in _mapped(process.name):
                left.pop(file, None)
        for path in left.values():
            path.unlink(missing_ok=True)


def _mapped(process: str) -> set[tuple[int, int]]:
    """Device and inode of each file of /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{process}/maps").read_bytes()
    except OSError:  # gone meanwhile, or another user's
        return set()
    if b" /dev/shm/" not in maps:
        return set()
    found = set()
    for line in maps.splitlines():
        if b" /dev/shm/" in line:
            device, inode = line.split(maxsplit=5)[3:5]
            major, minor = device.split(b":")
            found.add((os.makedev(int(major, 16), int(minor, 16)), int(inode)))
    return found


def title(process: psutil.Process) -> str:
    """What a process calls itself: "ray::AqnActorWorker", "VLLM::Worker", "raylet"."""
    line = process.cmdline()
    if not line:
        return process.name()
    first = line[0].split()[0] if line[0].startswith(("ray::", "VLLM::")) else Path(line[0]).name
    if first.startswith("python") and "-m" in line[:-1]:
        return line[line.index("-m") + 1]
    # A named actor has its name, too, while it is created: "ray::agent_loop_worker_0:AgentLoopWorker.__init__".
    return f"ray::{first.rpartition(':')[2].partition('.')[0]}" if first.startswith("ray::") else first
