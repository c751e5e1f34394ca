"""End a process together with everything that it started. Imports nothing but the standard library.

Processes are found in four ways, because each of them misses some: the process group; the tree of children; the
session; and a token in the environment, which children inherit, also those whose parent has died. A process is ended by
its id only, and only if it still has the start time that it was found with.
"""

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

TOKEN = "VERL_AQN_SELFTEST"
"""Environment variable that marks the processes of one rung."""
GRACE_S = 10.0
PROC = Path("/proc")
Found = dict[int, str]
"""Process id → start time since boot, in clock ticks."""


def end(process: subprocess.Popen, token: str, *, grace_s: float = GRACE_S) -> list[int]:
    """End `process` and its descendants by SIGTERM, after `grace_s` seconds by SIGKILL. Return ids that are left."""
    found = of_rung(process.pid, token)
    for number, wait_s in ((signal.SIGTERM, grace_s), (signal.SIGKILL, 5.0)):
        _send(process, found, number)
        until = time.monotonic() + wait_s
        while time.monotonic() < until:
            found |= of_rung(process.pid, token)
            found = {pid: started for pid, started in found.items() if _started(pid) == started}
            if not found:
                process.wait()
                return []
            time.sleep(0.1)
    return sorted(found)


def exit_code(process: subprocess.Popen) -> int | None:
    """Return the exit code of `process` (negative for a signal), None while it runs.

    Unlike `poll`, this leaves an ended process as a zombie, so that no other process can get its id before `end`.
    """
    if process.returncode is not None:
        return process.returncode
    ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def of_rung(pid: int, token: str) -> Found:
    """Return the living processes of a rung whose first process is, or was, `pid`."""
    parents, found = {}, {}
    for folder in PROC.glob("[0-9]*"):
        if (fields := _fields(int(folder.name))) is None:
            continue
        one, (state, parent, group, session), started = int(folder.name), fields[:4], fields[19]
        parents[one] = int(parent)
        if state != "Z" and (pid in (one, int(group), int(session)) or _marked(folder, token)):
            found[one] = started
    tree = {pid}
    while more := {one for one, parent in parents.items() if parent in tree} - tree:
        tree |= more
    for one in tree - {os.getpid()}:
        if one in parents and (fields := _fields(one)) is not None and fields[0] != "Z":
            found[one] = fields[19]
    found.pop(os.getpid(), None)
    return found


def _send(process: subprocess.Popen, found: Found, number: int) -> None:
    if process.returncode is None:  # not collected yet, so that its id is still its own
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
    for pid, started in found.items():
        if _started(pid) == started:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)


def _started(pid: int) -> str | None:
    fields = _fields(pid)
    return None if fields is None or fields[0] == "Z" else fields[19]


def _fields(pid: int) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name (state, parent, group, session, …), None without a process."""
    try:
        return (PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _marked(folder: Path, token: str) -> bool:
    try:
        return f"{TOKEN}={token}".encode() in (folder / "environ").read_bytes().split(b"\0")
    except OSError:  # another user's, or it has ended
        return False
