"""Evidence about the end of a run: errors that its processes recorded, and the deaths of its processes."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from verl_aqn.launch.cause import Fault, death, find_cause
from verl_aqn.launch.forkserver.server import ENDS
from verl_aqn.launch.watchdog import RAY, Watchdog
from verl_aqn.runs import faults
from verl_aqn.runs.phases import ENDING
from verl_aqn.runs.processes import oom_kills
from verl_aqn.runs.stacks import crash

WORD_S = 3  # for a run to report its end, after an error in a process that it needs


class Witness:
    """Collect the run's error records (`record`) and find out what ended the run (`cause`)."""

    def __init__(self, temporary: Path, watchdog: Watchdog) -> None:
        self.temporary = temporary
        self.watchdog = watchdog
        self.faults: list[Fault] = []
        self.oom_before = oom_kills()

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Keep an error that a process recorded."""
        if name == faults.FILE:
            self.faults.append(Fault.of(record))

    def must_end(self) -> Fault | None:
        """Return an error that ended a process that the run needs, if the run has not reported its own end.

        The other processes may wait for that process for a long time, or may not notice its end at all.
        """
        if self.watchdog.phase == ENDING:
            return None
        late = time.time() - WORD_S
        return next((fault for fault in self.faults if fault.ends and fault.name and fault.time < late), None)

    def cause(self, last: Fault) -> Fault:
        """Return the error or death that `last`, the fault that the run ended by, followed from."""
        return find_cause(last, [*self.faults, *self.deaths(last.time)])

    def deaths(self, end: float) -> list[Fault]:
        """Return the processes of the run that died, with signal or exit code if known.

        `end`: when the run began to end. A process that was first missing after that may have ended because of it, so
        its fault is marked `late`. Ray's servers are left out in this case, because a run ends them first itself.
        """
        vital, seen = self.watchdog.vital, self.watchdog.seen
        found = [
            death(one["time"], vital[one["pid"]], one["pid"], one["status"])
            for one in self._ends()
            if one["status"] and one["pid"] in vital
        ]
        forked = (self.temporary / ENDS).exists()
        # The zygote records how and when its forked processes ended; for others only the last sighting is known.
        for pid, missed in self.watchdog.missed.items():
            late = missed > end
            if not (late if vital[pid] in RAY else forked):
                silent = death(seen[pid], vital[pid], pid, None, crash(self.watchdog.stacks, pid))
                found.append(replace(silent, late=late))
        return found

    def told(self, cause: Fault) -> str:
        """Return the one-line message of a run that ended by `cause`."""
        if not cause.died:
            return cause.told()
        killed = "SIGKILL" in cause.text or "without an error message" in cause.text
        oom = " (meanwhile the kernel killed a process because memory ran out)" if oom_kills() > self.oom_before else ""
        return f"{cause.told()} during {self.watchdog.where_at(cause.time)}{oom if killed else ''}"

    def _ends(self) -> list[dict[str, Any]]:
        path = self.temporary / ENDS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
