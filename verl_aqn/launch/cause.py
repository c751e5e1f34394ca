"""Finding the error that ended a run: the first one, in any process, and not one of its consequences.

Known are the error that the training process ended with, the errors that all processes recorded
(`verl_aqn.runs.faults`), most of which were handled, and deaths of processes. An error counts as the cause only if a
chain of links leads to it from the end of the run. A link is an error that quotes another one, or an error that only
says that another process is gone.
"""

import re
import signal
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

# How a process names itself → what it is.
NAMES = {
    "ray::WorkerDict": "actor",
    "ray::AqnAgentLoopWorker": "agent loop",
    "ray::AqnHttpServer": "rollout server",
    "ray::AqnTaskRunner": "trainer",
    "ray::GlobalRequestLoadBalancer": "request router",
    "ray::RewardLoopWorker": "reward worker",
    "ray::SimpleStorageUnit": "storage",
    "ray::TransferQueueController": "storage's controller",
    "VLLM::EngineCore": "rollout engine",
    "VLLM::Worker": "rollout worker",
    "EngineCore": "rollout engine",
    "VllmWorker": "rollout worker",
    "gcs_server": "Ray's head",
    "raylet": "Ray's node",
    "verl_aqn.launch.driver": "driver",
}
# Errors that only say that another process failed or did not answer.
_GONE_TYPES = (
    "ActorDiedError",
    "ActorUnavailableError",
    "EngineDeadError",
    "LocalRayletDiedError",
    "NodeDiedError",
    "ObjectLostError",
    "OwnerDiedError",
    "ProcessFault",
    "RaySystemError",
    "RpcError",
    "WorkerCrashedError",
)
_GONE = re.compile(
    r"^cancelled$|Worker failed with error|[Ss]ee (the )?(root cause|stack trace)|Executor failed|"
    r"actor died unexpectedly"
)
# verl's trainer aborts itself if one of its workers is gone (verl/single_controller/base/worker_group.py).
_GAVE_UP = re.compile(r"^ray::AqnTaskRunner was killed by SIGABRT|\bbase/worker_group\.py:")
_DEAD = re.compile(r"^\s*pid: (\d+)$", re.MULTILINE)  # in an ActorDiedError
_PID = re.compile(r"\bpid[:=] ?(\d+)")
_QUIET = 8  # minimum characters of a text to search for in another one


@dataclass(frozen=True)
class Fault:
    """An error of a process, as `faults.describe` returns it, or (`died`) a death without an error message.

    `ends`: the error ended the process, or what the process does for the run. `silent`: it is not known how the process
    died. `late`: it is also not known whether the process died before the run began to end.
    """

    time: float
    process: str
    pid: int
    type: str
    text: str
    where: str = ""
    full: str = ""
    ours: bool = False
    ends: bool = False
    died: bool = False
    silent: bool = False
    late: bool = False

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Fault":
        """Build a fault from a record of errors.jsonl."""
        return cls(**{field.name: record[field.name] for field in fields(cls) if field.name in record})

    @property
    def name(self) -> str:
        """What the process is, in words; "" if it is not one of the kinds that a run starts."""
        return next((name for start, name in NAMES.items() if self.process.startswith(start)), "")

    @property
    def gone(self) -> bool:
        """Whether the fault says only that another process is gone or failed."""
        if self.died:
            return _GAVE_UP.search(f"{self.process} {self.text}") is not None
        return self.type in _GONE_TYPES or _GONE.search(self.text) is not None

    @property
    def by_chance(self) -> bool:
        """Whether another attempt may succeed: the fault is not a request that cannot be fulfilled."""
        return not self.ours or self.type == "ProcessFault"

    @property
    def line(self) -> str:
        """What went wrong, without the process."""
        return self.text if self.ours or self.died else f"{self.type}: {self.text}"

    @property
    def source(self) -> str:
        """The process, and the line of code if it is known."""
        who = f"{self.name} ({self.process}, process {self.pid})" if self.name else f"{self.process} ({self.pid})"
        return f"{who}, {self.where}" if self.where else who

    def told(self) -> str:
        """Return the fault as one line. An error class of ours already says what to do, and where."""
        if self.ours:
            return self.line
        return f"{self.source} {self.line}" if self.died else f"{self.source}: {self.line}"


def death(time: float, process: str, pid: int, status: int | None, crash: str = "") -> Fault:
    """Return the fault for the end of a process.

    `status`: exit code, negative for a signal, None if unknown. `crash`: the process's own message about a crash in
    native code.
    """
    if crash:
        text = f"crashed: {crash}"
    elif status is None:
        text = "died without an error message: killed, out of memory, or a crash in native code"
    elif status < 0:
        text = f"was killed by {_signal_name(-status)}"
    else:
        text = f"ended with exit code {status}"
    ends, silent = status is None or status < 0, status is None
    return Fault(time, process, pid, "death", text, ends=ends, died=True, silent=silent)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def find_cause(last: Fault, faults: Iterable[Fault]) -> Fault:
    """Return the fault among `faults` of the same attempt that `last` followed from; `last` if there is no link.

    If an error class of ours quotes another error, it is returned itself, with the source of the other error added,
    because it says more.
    """
    known = sorted(faults, key=lambda fault: fault.time)
    # An error that ends a process that the run needs ends the run: whatever came later is a consequence.
    ended = [one for one in known if one.ends and not one.silent and one.name and one.time <= last.time]
    seen = [next((one for one in ended if not one.gone), last)]
    while (before := _step(seen[-1], known)) is not None and before not in seen:
        if seen[-1].ours and not before.ends:
            return replace(seen[-1], text=f"{seen[-1].text} [{before.source}]")
        seen.append(before)
    return seen[-1]


def _step(error: Fault, known: list[Fault]) -> Fault | None:
    """Return the fault that `error` directly followed from."""
    # Ray may report that a process is dead before its parent has collected it.
    dead = {int(pid) for pid in _DEAD.findall(error.full)}
    earlier = [one for one in known if one != error and (one.time <= error.time or (one.died and one.pid in dead))]
    if error.ours and not error.gone:
        return _quoted(error, earlier)
    if error.gone or (error.died and not error.ends):
        named = {int(pid) for pid in _PID.findall(error.full)} | ({error.pid} if error.died else set())
        ended = [fault for fault in earlier if fault.ends and not _explained(fault, earlier)]
        ended = [
            fault for fault in ended if fault.name or fault.pid in named
        ]  # not a process that the user's own code started
        ended += [fault for fault in earlier if fault.died and not fault.ends and fault.pid in named]
        if ended:
            return min(ended, key=lambda fault: (_doubt(fault), fault.pid not in named, fault.time))
    return _quoted(error, earlier) or _named_by_ray(error)


def _doubt(fault: Fault) -> int:
    """Rank how uncertain a fault is as a cause: higher if the kind of death is unknown, highest if its time is, too."""
    if fault.late:
        return 4
    if fault.gone:
        return 2
    return 1 if fault.silent else 0 if fault.ends else 3


def _named_by_ray(error: Fault) -> Fault | None:
    """Return the death of an actor that only Ray reported.

    The actor was on another machine, or the watchdog did not check in time.
    """
    name, pid = (re.search(rf"^\s*{key}: (\S+)$", error.full, re.MULTILINE) for key in ("class_name", "pid"))
    if error.type != "ActorDiedError" or name is None or pid is None:
        return None
    return death(error.time, f"ray::{name[1]}", int(pid[1]), None)


def _explained(fault: Fault, known: list[Fault]) -> bool:
    """Return whether a death is that of a process that recorded why it ended."""
    return fault.died and any(other.ends and not other.died and other.pid == fault.pid for other in known)


def _quoted(error: Fault, earlier: list[Fault]) -> Fault | None:
    """Return the latest error of another process whose text is part of `error`."""
    named = {int(pid) for pid in _PID.findall(error.full)}
    for fault in reversed(earlier):
        if fault.died or fault.pid == error.pid:
            continue
        if (
            named and fault.pid not in named and not error.ours
        ):  # an error of ours may quote what another process recorded
            continue
        if fault.text == error.text and (error.ours or not named):  # the same error passed on, or only a similar one
            continue
        worded = fault.text if error.gone and len(fault.text) >= _QUIET else f"{fault.type}: {fault.text}"
        if worded in error.full or worded in error.text:
            return fault
    return None
