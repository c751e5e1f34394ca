"""Errors that a user can act on: one line that says what is wrong, where, and what to do."""


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
