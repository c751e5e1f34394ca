"""Recording the errors of a run's processes where they are raised.

The trainer often sees only a consequence: a dead actor, a missing answer, a time-out. So every process of a run adds
its own errors to `errors.jsonl` in the run folder: errors that it returns to a caller, that it logs, and that end a
thread or the process. Most of them are handled somewhere; `verl_aqn.launch.cause` finds the one that ended the run.
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
PLACE = "VERL_AQN_ERRORS"  # environment variable: path of that file, for the processes of a run
BURST = 100  # errors that a process may record at once; then one per second, for a reward that always fails
TEXT, FULL = 1000, 8000  # characters
# These log messages mean that a process, or what it does for the run, has ended. Data that could not be put are lost,
# although readers are told that they exist.
LAST_WORDS = re.compile(
    r"^(EngineCore (failed|encountered)|WorkerProc )|: (ZMQ Proxy unexpected error|put_data failed)"
)
_SERVING = ("/transfer_queue/", "/vllm/")  # if a thread of these packages ends, other threads wait for it forever
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")

_watching = False
_noted, _since = 0, time.monotonic()


def in_run() -> bool:
    """Return whether this process belongs to a run."""
    return bool(os.environ.get(PLACE))


def watch() -> None:
    """Record the errors of this process from now on. Do nothing outside a run or if already active."""
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
    """Record an error, once in each process. Never raise; do nothing outside a run.

    `ends`: the error ends the process, or what the process does for the run.
    """
    global _noted
    if not in_run() or _is_ray_s(error):  # Ray's copy comes from another process, which has recorded it
        return
    if getattr(error, "_aqn_noted", None) == (os.getpid(), ends):
        return
    if not ends and _noted > BURST + time.monotonic() - _since:
        return
    _noted += 1
    with suppress(Exception):  # a failure to record must not hide the error itself
        RunFolder(Path(os.environ[PLACE]).parent).append(FILE, describe(error) | {"ends": ends})
        error._aqn_noted = (os.getpid(), ends)  # type: ignore[attr-defined]


def describe(error: BaseException) -> dict[str, Any]:
    """Return an error of this process as plain values.

    The keys are `time`, `process` and `pid`; `type`; `text`, one line; `where`, file:line, "" if unknown; `full`, the
    text together with the texts of its causes (`__cause__`); `ours`, whether the error's class is one of ours, whose
    message says what to do.
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
    """Return whether Ray brought the error from another process. Its class then derives from Ray's and the original."""
    return type(error).__name__.startswith("RayTaskError")


def own_name() -> str:
    """Return how this process names itself, or the name that its parent gave it."""
    name = title(psutil.Process())
    process = multiprocessing.current_process().name
    return name if name.startswith(("ray::", "VLLM::")) or process == "MainProcess" else process


def one_line(error: BaseException) -> str:
    """Return an error's message as one line: the first, with the second added if the first is only a heading."""
    if callable(found := getattr(error, "errors", None)):  # a pydantic error, whose first line is only a count
        with suppress(Exception):
            first = found()[0]
            return f"{'.'.join(map(str, first['loc']))}: {first['msg']}".splitlines()[0]
    lines = [line.strip() for line in _COLOURS.sub("", str(error)).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else first_line(error)


def place_of(error: BaseException) -> str:
    """Return folder/file:line of the last frame outside installed packages, else of the last frame."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and not frame.filename.startswith("<")]
    own = [frame for frame in own if "/lib/python3" not in frame.filename]
    if not frames:
        return ""
    frame = (own or frames)[-1]
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}"


def _full(error: BaseException | None) -> str:
    """Return the texts of an error and its causes.

    Errors that were being handled when it was raised (`__context__`) are left out: they may be unrelated.
    """
    texts: list[str] = []
    while error is not None and len(texts) < 10:
        texts.append(f"{type(error).__name__}: {_COLOURS.sub('', str(error))}")
        error = error.__cause__
    return "\n".join(texts)
