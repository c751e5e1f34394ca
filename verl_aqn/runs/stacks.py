"""Where every Python process of a run stands, by thread: each process promises to write it down when it is asked."""

import faulthandler
import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path

FOLDER = "VERL_AQN_STACKS"  # environment variable: where the processes of a run leave their stacks
SIGNAL = signal.SIGUSR2  # used by neither Ray nor vLLM
WAIT_S = 5
_CRASH = re.compile(r"^Fatal Python error: (.+)$", re.MULTILINE)


def folder_in(temporary: str | Path) -> Path:
    """What FOLDER says in a run with this temporary folder."""
    return Path(temporary) / "stacks"


def listen() -> None:
    """From now on `SIGNAL` makes this process write its stacks to FOLDER/<pid>.txt and go on.

    By C code that needs neither the interpreter's lock nor memory, so that it also tells of a process that hangs. Where
    the process crashes in native code, it writes there why, and where it was (`crash`).
    Does nothing outside a run, and nothing the second time.
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
    """Processes that can be asked, dead ones too."""
    return {int(path.stem) for path in folder.glob("*.txt")}


def crash(folder: Path, pid: int) -> str:
    """What a process that promised its stacks says of its crash: "Segmentation fault, folder/file.py:12"; else ""."""
    path = folder / f"{pid}.txt"
    text = path.read_text(errors="replace") if path.exists() else ""
    if (why := _CRASH.search(text)) is None:
        return ""
    where = re.search(r'\(most recent call first\):\n +File "(.+)", line (\d+)', text[why.end() :])
    return f"{why[1]}, {'/'.join(Path(where[1]).parts[-2:])}:{where[2]}" if where else why[1]


def crashes(folder: Path) -> str:
    """The stacks of all that crashed."""
    told = {pid: (folder / f"{pid}.txt").read_text(errors="replace") for pid in sorted(listening(folder))}
    return "\n".join(f"== {pid} crashed\n{text}" for pid, text in told.items() if _CRASH.search(text))


def collect(folder: Path, processes: Mapping[int, str]) -> str:
    """The stacks of those of `processes` (pid → what it is) that listen and live, as text."""
    asked = []
    for pid in sorted(listening(folder) & set(processes)):
        try:
            os.kill(pid, SIGNAL)
        except ProcessLookupError:
            continue
        asked.append(pid)
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline and not all((folder / f"{pid}.txt").stat().st_size for pid in asked):
        time.sleep(0.1)
    time.sleep(0.2 if asked else 0)  # the last one may still be writing
    told = {pid: (folder / f"{pid}.txt").read_text(errors="replace") for pid in asked}
    return "\n".join(f"== {pid} {processes[pid]}\n{told[pid] or '(no answer)'}" for pid in asked)
