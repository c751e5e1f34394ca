"""What is known of a run's end while it is watched: errors that its processes noted, and their deaths."""

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

WORD_S = 3  # for a run to say itself that it ends, after an error of a process that it cannot do without


class Witness:
    """Told of the run's records (`record`); `cause` says what it ended by."""

    def __init__(self, temporary: Path, watchdog: Watchdog) -> None:
        self.temporary = temporary
        self.watchdog = watchdog
        self.faults: list[Fault] = []
        self.oom_before = oom_kills()

    def record(self, name: str, record: dict[str, Any]) -> None:
        """Keep what a process noted."""
        if name == faults.FILE:
            self.faults.append(Fault.of(record))

    def must_end(self) -> Fault | None:
        """Return an error by which a process that the run needs came to its end, while the run does not say so.

        Nobody may be waiting for that process, or everybody for long.
        """
        if self.watchdog.phase == ENDING:
            return None
        late = time.time() - WORD_S
        return next((fault for fault in self.faults if fault.ends and fault.name and fault.time < late), None)

    def cause(self, last: Fault) -> Fault:
        """What `last`, by which the run ended, came from."""
        return find_cause(last, [*self.faults, *self.deaths(last.time)])

    def deaths(self, end: float) -> list[Fault]:
        """The processes of the run that died, with the signal or exit code where it is known.

        `end`: when the run began to end. Of those that were missed only then nobody knows why; Ray's servers are the
        first that a run itself ends.
        """
        vital, seen = self.watchdog.vital, self.watchdog.seen
        found = [
            death(one["time"], vital[one["pid"]], one["pid"], one["status"])
            for one in self._ends()
            if one["status"] and one["pid"] in vital
        ]
        forked = (self.temporary / ENDS).exists()
        # Of those that a zygote forked, it says how and when they ended; of others, when they were last seen.
        for pid, missed in self.watchdog.missed.items():
            late = missed > end
            if not (late if vital[pid] in RAY else forked):
                silent = death(seen[pid], vital[pid], pid, None, crash(self.watchdog.stacks, pid))
                found.append(replace(silent, late=late))
        return found

    def told(self, cause: Fault) -> str:
        """The one line of a run that ended by `cause`."""
        if not cause.died:
            return cause.told()
        killed = "SIGKILL" in cause.text or "without a word" in cause.text
        oom = " (the kernel ended a process for want of memory meanwhile)" if oom_kills() > self.oom_before else ""
        return f"{cause.told()} during {self.watchdog.where_at(cause.time)}{oom if killed else ''}"

    def _ends(self) -> list[dict[str, Any]]:
        path = self.temporary / ENDS
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]
