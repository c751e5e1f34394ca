"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""

import errno
import os


class AqnError(Exception):
    """Base of all errors that the user can fix. The command line prints such an error as one line."""


class ConfigError(AqnError, ValueError):
    """A recipe or an override is wrong. It is rejected before any work starts."""


class DataError(AqnError, ValueError):
    """A data file is missing, unreadable, or lacks a column."""


class ModelError(AqnError, ValueError):
    """A model folder cannot be used: no weights, a damaged file, a shape that MXFP4 cannot hold."""


class EnvironmentFault(AqnError, RuntimeError):
    """The machine or its installation cannot run this: versions, plugin not loaded, memory, ports."""


class BusyError(AqnError, RuntimeError):
    """Another process works on this run."""


class ProcessFault(AqnError, RuntimeError):
    """A process of the run died or does not answer. Another attempt may succeed (`--restarts`)."""


class EvidenceError(AqnError, RuntimeError):
    """A value that was read back from a process is not the expected one. The run stops."""


class StrengthError(AqnError, RuntimeError):
    """The noise is so strong that no response is left to learn from."""


class RewardError(AqnError, RuntimeError):
    """The reward of a response failed: the function raised, or returned a value that is no reward."""


class TrainingError(AqnError, RuntimeError):
    """Training cannot go on, or would teach nothing, although every part of it works."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Stopped(Exception):
    """Ctrl-C or SIGTERM ended a run cleanly; `signal` is the signal's number.

    This is not an AqnError, because there is nothing to fix.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal


_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS)


def is_full(error: OSError) -> bool:
    """Return whether the error means that there was no space for a file."""
    return error.errno in _NO_ROOM


def system_line(error: OSError, cache: str = "") -> str:
    """Return a system error as one line: where, why, and what to do.

    `cache`: the folder that VERL_AQN_CACHE can move.
    """
    where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    if where and isinstance(error.filename2, str | bytes):  # both ends of a rename
        where += f" → {os.fsdecode(error.filename2)}"
    line = f"{where}: {reason(error)}" if where else reason(error)
    # `where` may also be the first missing folder on the path to the cache.
    if cache and where and (where.startswith(cache) or (cache.startswith(where) and not os.path.exists(where))):
        return f"{line}: set VERL_AQN_CACHE to a folder with free space that you can write to"
    return f"{line}: {todo}" if (todo := remedy(error)) else line


def reason(error: OSError) -> str:
    """Return the system's own reason for a refusal."""
    return (error.strerror or first_line(error)).splitlines()[0]


def remedy(error: OSError) -> str:
    """Return what to do about a system error; "" if that depends on the situation."""
    if is_full(error):
        return "free some space, or choose a folder on another disk"
    if error.errno in _NOT_ALLOWED:
        return "check its permissions, or choose another folder"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit of open files (ulimit -n)"
    return ""
