"""Find what the runs of this pytest left on the machine, whatever other runs on the machine do at the same time.

Shared memory and temporary files do not say who made them. So `Leftovers` looks at the machine while the runs live: a
path is ours as soon as a process of ours was seen to use it. A process is ours if it descends from this pytest or has
this pytest's mark in its environment, which a process keeps when it is detached from its parent.
"""

import os
import threading
import uuid
from contextlib import suppress
from pathlib import Path

import psutil

MARK = "VERL_AQN_PYTEST"
_LOOKS = 20  # a path that no process of ours used at so many looks is another run's
_EVERY_S = 0.5


class Leftovers:
    """Processes and paths that this pytest made.

    Args:
        patterns: the folders to look into, each with the pattern of the names that a run may make there.
        runs: the folder that all runs of this pytest are in. A temporary folder that says in its file `run` that it
            belongs to one of them is ours, as `verl_aqn.runs.temporary` writes it.
    """

    def __init__(self, patterns: list[tuple[Path, str]], runs: Path):
        self.mark = uuid.uuid4().hex
        self._patterns, self._runs = patterns, runs
        self._ours: set[Path] = set()
        self._looked: dict[Path, int] = {}
        self._marked: dict[tuple[int, float], bool] = {}
        self._earlier: set[psutil.Process] = set()
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Mark the processes that start from now on, and look at the machine every half a second."""
        os.environ[MARK] = self.mark
        with self._lock:  # what is there already is not ours
            self._looked = dict.fromkeys(self._paths(), _LOOKS)
            self._earlier = set(_descendants())
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def expect(self, pid: int) -> None:
        """Count the process `pid` as one that was there before."""
        self._earlier.add(psutil.Process(pid))

    def stop(self) -> None:
        """End the looking."""
        self._stop.set()
        if self._thread:
            self._thread.join()
        os.environ.pop(MARK, None)

    def found(self) -> set[str]:
        """Return the descendants of this pytest that began since `start` and live, and the paths of ours that exist."""
        self.look()
        with self._lock:
            paths = {str(path) for path in self._ours if os.path.lexists(path)}
        return {*paths, *(f"process {child.pid}" for child in _descendants() if child not in self._earlier)}

    def look(self) -> None:
        """Claim the new paths that a process of ours uses at this moment, or that name one of our runs."""
        with self._lock:
            now = self._paths()
            self._looked = {path: looks for path, looks in self._looked.items() if path in now}
            new = [path for path in now - self._ours if self._looked.get(path, 0) < _LOOKS]
            if not new:
                return
            used = [_uses(process) for process in self._processes()]
            for path in new:
                names = (str(path), _inode(path))
                if self._is_of_a_run(path) or any(name in use for use in used for name in names if name):
                    self._ours.add(path)
                self._looked[path] = self._looked.get(path, 0) + 1

    def _watch(self) -> None:
        while not self._stop.wait(_EVERY_S):
            self.look()

    def _paths(self) -> set[Path]:
        return {path for folder, pattern in self._patterns for path in folder.glob(pattern)}

    def _processes(self) -> list[psutil.Process]:
        """Return this pytest's descendants and the processes with its mark."""
        known, found = self._marked, {process.pid: process for process in _descendants()}
        self._marked = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                key = (process.pid, process.create_time())
                # Once ours, always ours: a process may start a program with another environment.
                marked = known.get(key) or process.environ().get(MARK) == self.mark
                self._marked[key] = marked
                if marked and process.pid != os.getpid():
                    found[process.pid] = process
        return list(found.values())

    def _is_of_a_run(self, path: Path) -> bool:
        with suppress(OSError, UnicodeDecodeError):
            return Path((path / "run").read_text()).is_relative_to(self._runs)
        return False


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _uses(process: psutil.Process) -> str:
    """Return the files that a process has mapped or open, its environment, and its sockets, as one text to search."""
    parts: list[str] = []
    with suppress(psutil.Error, OSError):
        parts.append(Path(f"/proc/{process.pid}/maps").read_text())
    with suppress(psutil.Error, OSError):
        parts.append(str(process.environ()))
    with suppress(psutil.Error, OSError):
        parts += [str(place.laddr) for place in process.net_connections("unix")]
    with suppress(OSError):
        for handle in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):
                parts.append(os.readlink(handle))
    return "\n".join(parts)


def _inode(path: Path) -> str:
    """Return device and inode as /proc/PID/maps shows them: a semaphore is mapped under another name than it has."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return f" {os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x} {status.st_ino} "
