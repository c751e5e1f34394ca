"""Stack traces of all Python processes of a run, by thread: each process writes its own when it gets a signal."""

import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER = "VERL_AQN_STACKS"  # environment variable: where the processes of a run write their stacks
SIGNAL = signal.SIGUSR2  # Ray and vLLM do not use it
WAIT_S = 5
_CRASH = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)


def folder_in(temporary: str | Path) -> Path:
    """Return the value of FOLDER for a run with this temporary folder."""
    return Path(temporary) / "stacks"


def listen() -> None:
    """Make `SIGNAL` write this process's stacks to FOLDER/<pid>.txt from now on; the process then goes on.

    C code writes them without the interpreter's lock and without allocating memory, so that this works in a process
    that hangs, too. If the process crashes in native code, the reason and the place go to the same file (`crash`). Do
    nothing outside a run or if already active.
    """
    folder = os.environ.get(FOLDER)
    if not folder or not Path(folder).is_dir():  # another node of a cluster has its own folder
        return
    path = Path(folder) / f"{os.getpid()}.txt"
    if not path.exists():
        file = path.open("w")
        faulthandler.register(SIGNAL, file=file, all_threads=True)
        faulthandler.enable(file=file)


def listening(folder: Path) -> set[int]:
    """Return the ids of all processes that called `listen`, including dead ones."""
    return {int(path.stem) for path in folder.glob("*.txt")}


def crash(folder: Path, pid: int) -> str:
    """Return what a process recorded about its crash: "Segmentation fault, folder/file.py:12"; "" for no crash."""
    path = folder / f"{pid}.txt"
    text = path.read_text(errors="replace") if path.exists() else ""
    if (why := _CRASH.search(text)) is None:
        return ""
    where = re.search(r'\(most recent call first\):\n +File "(.+)", line (\d+)', text[why.end() :])
    return f"{why[1]}, {'/'.join(Path(where[1]).parts[-2:])}:{where[2]}" if where else why[1]


def crashes(folder: Path) -> str:
    """Return the stacks of all processes that crashed."""
    told = {pid: (folder / f"{pid}.txt").read_text(errors="replace") for pid in sorted(listening(folder))}
    return "\n".join(f"== {pid} crashed\n{text}" for pid, text in told.items() if _CRASH.search(text))


def collect(folder: Path, processes: Mapping[int, str]) -> str:
    """Return the stacks, as text, of those of `processes` (pid → description) that listen and are alive."""
    signalled = []
    for pid in sorted(listening(folder) & set(processes)):
        try:
            os.kill(pid, SIGNAL)
        except ProcessLookupError:
            continue
        signalled.append(pid)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and not all((folder / f"{pid}.txt").stat().st_size for pid in signalled):
        time.sleep(0.1)
    time.sleep(0.2 if signalled else 0)  # the last one may still be writing
    told = {pid: (folder / f"{pid}.txt").read_text(errors="replace") for pid in signalled}
    return "\n".join(f"== {pid} {processes[pid]}\n{told[pid] or '(no answer)'}" for pid in signalled)
