"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

import errno
import os


class AqnError(Exception):
    """Base of every error raised for a reason the user can mend. The command line prints it as one line."""


class ConfigError(AqnError, ValueError):
    """A recipe or an override is wrong: the run is refused before any work starts."""


class DataError(AqnError, ValueError):
    """A data file is missing, unreadable, or lacks a column."""


class ModelError(AqnError, ValueError):
    """A model folder cannot be used: no weights, a damaged file, a shape that MXFP4 cannot hold."""


class EnvironmentFault(AqnError, RuntimeError):
    """The machine or its installation cannot run this: versions, plugin not loaded, memory, ports."""


class BusyError(AqnError, RuntimeError):
    """Another process is at this run."""


class ProcessFault(AqnError, RuntimeError):
    """A process of the run died or does not answer. Another attempt may go well (`--restarts`)."""


class EvidenceError(AqnError, RuntimeError):
    """What was read back from a process is not what was asked of it. The run stops."""


class StrengthError(AqnError, RuntimeError):
    """The noise is so strong that no answer is left to learn from."""


class RewardError(AqnError, RuntimeError):
    """The reward of an answer failed: the function raised, or returned what is no reward."""


class TrainingError(AqnError, RuntimeError):
    """Training cannot go on or would teach nothing, though every part of it works."""


def first_line(error: BaseException) -> str:
    """What an error of others says first; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a run in order; `signal` is its number. No AqnError: nothing is to be mended."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_full(error: OSError) -> bool:
    """Whether there was no room for a file."""
    return error.errno in _NO_ROOM


def system_line(error: OSError, cache: str = "") -> str:
    """What the system said: where, why, and what to do. `cache`: the folder that VERL_AQN_CACHE can move."""
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if where and isinstance(error.filename2, str | bytes):  # both ends of a rename
        where += f" → {os.fsdecode(error.filename2)}"
    line = f"{where}: {reason(error)}" if where else reason(error)
    # `where` may also be the first folder on the way there that is missing.
    if cache and where and (where.startswith(cache) or (cache.startswith(where) and not os.path.exists(where))):
        return f"{line}: set VERL_AQN_CACHE to a folder with room that you may write"
    return f"{line}: {todo}" if (todo := remedy(error)) else line


def reason(error: OSError) -> str:
    """Why the system refused, in its own words."""
    return (error.strerror or first_line(error)).splitlines()[0]


def remedy(error: OSError) -> str:
    """What to do about an error of the system's; "" where it depends on who meets it."""
    if is_full(error):
        return "free some space, or choose a place on another disk"
    if error.errno in _NOT_ALLOWED:
        return "see that you may use it, or choose another place"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return ""
