"""Child processes: each ends when this process does, and everything they leave behind is removed."""

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
    """Start `python -m MODULE ARGUMENTS…` in its own session and append its output to `log`."""
    with open(open_own(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT), "ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", module, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def end_with_parent() -> None:
    """Make the kernel send SIGTERM to this new child when its parent dies for any reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def adopt_orphans() -> None:
    """Become the parent of orphaned descendants, in place of init, so that they can be found."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def ended_children() -> Iterator[tuple[int, int]]:
    """Collect children that have ended: yield process id and exit code, negative for a signal."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        yield pid, os.waitstatus_to_exitcode(status)


def end_descendants() -> None:
    """End all processes that this one started, directly or not: by SIGTERM, then by SIGKILL."""
    for send, wait in (("terminate", GRACE_S), ("kill", 5)):
        told: set[psutil.Process] = set()
        # A process that is ending can still start another one, so repeat until there is none that was not told.
        for _ in range(3):
            processes = psutil.Process().children(recursive=True)
            if not processes:
                return
            if told.issuperset(processes):
                break
            told.update(processes)
            for process in processes:
                try:
                    getattr(process, send)()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(processes, timeout=wait)
            for _ in ended_children():  # so that none remains as a zombie
                pass


def memory_of_children() -> int:
    """Return the bytes of private memory that the descendants of this process hold."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            total += process.memory_full_info().uss
    return total


def oom_kills() -> int:
    """Return how many processes the kernel has killed because memory ran out, in this container or on the machine."""
    for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat"):
        with suppress(OSError, ValueError):
            counts = dict(line.split() for line in Path(path).read_text().splitlines())
            if "oom_kill" in counts:
                return int(counts["oom_kill"])
    return 0


class SharedMemory:
    """The files of /dev/shm that processes of a run were seen to have mapped.

    Only these are removed after the run: containers may share /dev/shm, so a file that looks left behind may be in use
    by processes that cannot be seen from here. Files are identified by device and inode and not by name, because a
    semaphore is first mapped under a temporary name. The files seen are also recorded in the folder `temporary`, for a
    later clean-up if this process is killed.
    """

    def __init__(self, temporary: Path) -> None:
        self._file = temporary / "shared-memory"
        self.seen = self._kept()

    def _kept(self) -> set[tuple[int, int]]:
        try:
            with open(open_own(self._file, os.O_RDONLY)) as file:
                lines = file.read().split("\n")[:-1]  # without an incomplete line of a killed process
        except (EnvironmentFault, OSError):
            return set()
        return {(int(device), int(inode)) for device, inode in map(str.split, lines)}

    def look(self, processes: Iterable[psutil.Process] | None = None) -> None:
        """Record what these processes (default: this one and its descendants) have mapped, and what others recorded."""
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
        """Unlink the recorded files made after the time `since` that belong to this user and are no longer mapped."""
        left = {}
        for pattern in ("psm_*", "sem.mp-*", "verl_weights_*", "vllm_dist_*"):
            for path in Path("/dev/shm").glob(pattern):
                with suppress(FileNotFoundError):  # removed meanwhile by its owner
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
    """Return device and inode of each file of /dev/shm that a process has mapped."""
    try:
        maps = Path(f"/proc/{process}/maps").read_bytes()
    except OSError:  # ended meanwhile, or another user's
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
    """Return how a process names itself: "ray::AqnActorWorker", "VLLM::Worker", "raylet"."""
    line = process.cmdline()
    if not line:
        return process.name()
    first = line[0].split()[0] if line[0].startswith(("ray::", "VLLM::")) else Path(line[0]).name
    if first.startswith("python") and "-m" in line[:-1]:
        return line[line.index("-m") + 1]
    # While a named actor is created, its title has its name, too: "ray::agent_loop_worker_0:AgentLoopWorker.__init__".
    return f"ray::{first.rpartition(':')[2].partition('.')[0]}" if first.startswith("ray::") else first
