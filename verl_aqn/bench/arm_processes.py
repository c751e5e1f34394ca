"""The actor and the rollout of a measured run: their memory, and whether they are still there."""

import threading
import time
from contextlib import suppress

import psutil

from verl_aqn.errors import EnvironmentFault
from verl_aqn.runs.processes import title

KINDS = {"ray::WorkerDict": "actor", "VLLM::Worker": "rollout"}  # how a process names itself → what it is
ALONE_S = 60  # how long a run may take to end after its actor or rollout has ended


class ArmProcesses:
    """Look once a second, while entered, at this process's descendants; this costs them no time.

    `peak`: bytes, of resident memory for `actor` and `rollout`, of the decrease of the machine's available memory for
    `all`.
    """

    def __init__(self, peak: dict[str, int]) -> None:
        self.peak = peak
        self._before = psutil.virtual_memory().available
        self._seen: dict[psutil.Process, str] = {}
        self._lost: dict[psutil.Process, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "ArmProcesses":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(1):
            self.look()

    def look(self) -> None:
        """Look at all descendants once."""
        used = self._before - psutil.virtual_memory().available
        self.peak["all"] = max(self.peak.get("all", 0), used)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if kind := KINDS.get(title(process)):
                    self.peak[kind] = max(self.peak.get(kind, 0), process.memory_info().rss)
                    self._seen[process] = kind

    def raise_if_missing(self, what: str) -> None:
        """Raise if the run goes on without its actor or its rollout. Stock verl then waits for ever.

        Raises:
            EnvironmentFault: one of them ended more than `ALONE_S` ago. The message begins with `what`.
        """
        now = time.monotonic()
        for process, kind in list(self._seen.items()):
            if _ended(process) and now - self._lost.setdefault(process, now) > ALONE_S:
                raise EnvironmentFault(
                    f"{what}: the run's {kind} (process {process.pid}) ended, perhaps for want of memory, and the run "
                    "did not"
                )


def _ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
