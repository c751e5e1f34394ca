"""The errors of a run's processes, each written down where it was raised.

The trainer often sees only what followed: a dead actor, a missing answer, a time-out. So every process of a run adds
its own errors to `errors.jsonl` in the run's folder: those that it answers a call with, that it logs, and that end a
thread or the process. Most of them are handled somewhere; `verl_aqn.launch.cause` finds the one that a run ended by.
"""

import logging
import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from verl_aqn.errors import AqnError, first_line
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.processes import title

FILE = "errors.jsonl"
PLACE = "VERL_AQN_ERRORS"  # environment variable: that file, for the processes of a run
BURST = 100  # errors that a process may note at once; later ones one a second: of a reward that always fails
TEXT, FULL = 1000, 8000  # characters
# After these words a process, or what it does for the run, has come to its end. Data that could not be put are lost,
# but who wants to read them is told that they are there.
LAST_WORDS = re.compile(
    r"^(EngineCore (failed|encountered)|WorkerProc )|: (ZMQ Proxy unexpected error|put_data failed)"
)
_SERVING = ("/transfer_queue/", "/vllm/")  # a thread of theirs that ends leaves others waiting for it
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_watching = False
_noted, _since = 0, time.monotonic()


def in_run() -> bool:
    """Whether this process is one of a run's."""
    return bool(os.environ.get(PLACE))


def watch() -> None:
    """Note the errors of this process from now on. Does nothing outside a run, and nothing the second time."""
    global _watching
    if _watching or not in_run():
        return
    _watching = True
    make = logging.getLogRecordFactory()
    hook, thread_hook = sys.excepthook, threading.excepthook

    def noting(*args: Any, **named: Any) -> logging.LogRecord:
        record = make(*args, **named)
        if record.levelno >= logging.ERROR:
            error = record.exc_info[1] if record.exc_info else sys.exc_info()[1]
            if isinstance(error, Exception):
                note(error, ends=LAST_WORDS.search(str(record.msg)) is not None)
        return record

    def ends_process(kind: Any, error: BaseException, frames: Any) -> None:
        if isinstance(error, Exception):
            note(error, ends=True)
        hook(kind, error, frames)

    def ends_thread(args: Any) -> None:
        if isinstance(args.exc_value, Exception):
            files = [frame.filename for frame in traceback.extract_tb(args.exc_traceback)]
            note(args.exc_value, ends=any(part in file for file in files for part in _SERVING))
        thread_hook(args)

    logging.setLogRecordFactory(noting)
    sys.excepthook, threading.excepthook = ends_process, ends_thread


def note(error: Exception, *, ends: bool = False) -> None:
    """Write an error down, once in each process. Never raises, and does nothing outside a run.

    `ends`: the process, or what it does for the run, ends by it.
    """
    global _noted
    if not in_run() or _is_ray_s(error):  # Ray's is of another process, which has noted it
        return
    if getattr(error, "_aqn_noted", None) == (os.getpid(), ends):
        return
    if not ends and _noted > BURST + time.monotonic() - _since:
        return
    _noted += 1
    with suppress(Exception):  # whatever it is about, the error itself matters more
        RunFolder(Path(os.environ[PLACE]).parent).append(FILE, describe(error) | {"ends": ends})
        error._aqn_noted = (os.getpid(), ends)  # type: ignore[attr-defined]


def describe(error: BaseException) -> dict[str, Any]:
    """An error of this process as plain values.

    time, process and pid; type and text, one line; where, file:line, "" where nobody knows; full, the text with those
    of the errors that it names as its causes; ours, whether it is one that says itself what to do.
    """
    root = error
    while _is_ray_s(root) and isinstance(cause := getattr(root, "cause", None), BaseException):
        root = cause
    return {
        "time": time.time(),
        "process": own_name(),
        "pid": os.getpid(),
        "type": type(root).__name__,
        "text": one_line(root)[:TEXT],
        "where": place_of(root),
        "full": _full(error)[-FULL:],
        "ours": isinstance(root, AqnError),
    }


def _is_ray_s(error: BaseException) -> bool:
    """Whether Ray brought it from another process; its class is one of Ray's and the error's own."""
    return type(error).__name__.startswith("RayTaskError")


def own_name() -> str:
    """What this process calls itself, or what its parent called it."""
    name = title(psutil.Process())
    process = multiprocessing.current_process().name
    return name if name.startswith(("ray::", "VLLM::")) or process == "MainProcess" else process


def one_line(error: BaseException) -> str:
    """What an error says, in one line: its first, with the next where that is only a heading."""
    if callable(found := getattr(error, "errors", None)):  # pydantic's, whose first line is a count
        with suppress(Exception):
            first = found()[0]
            return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".splitlines()[0]
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else first_line(error)


def place_of(error: BaseException) -> str:
    """The line of the last file that is not in an installed package, else the last line of all: folder/file:line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    own = [frame for frame in own if "/lib/python3" not in frame.filename]
    if not frames:
        return ""
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def _full(error: BaseException | None) -> str:
    """Not what was being handled when an error was raised (`__context__`): that may have nothing to do with it."""
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(f"{type(error).__name__}: {_COLOURS.sub('', str(error))}")
        error = error.__cause__
    return "\n".join(texts)
