"""Why a call of Ray's failed. Light: the driver imports it."""

from typing import Any

import ray

from verl_aqn.runs.faults import in_run, note


def root_cause(error: BaseException) -> BaseException:
    """The first error behind Ray's wrappers."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def note_task_errors() -> None:
    """Note each error that a task or an actor's method of this process raises, before Ray makes an answer of it.

    On its way Ray may lose it: where it cannot be pickled, or where an actor's creation fails and the caller is told no
    more than that the actor died. Every such answer is a RayTaskError, made where the error was raised.
    """
    make: Any = ray.exceptions.RayTaskError.__init__
    if getattr(make, "notes", False) or not in_run():
        return

    def noting(self: Any, function_name: str, traceback_str: str, cause: Any, *args: Any, **named: Any) -> None:
        # One that comes from another process has more arguments; one that is passed on has lost its traceback.
        if not args and isinstance(cause, Exception) and cause.__traceback__ is not None:
            note(cause, ends=function_name == "__init__")
        make(self, function_name, traceback_str, cause, *args, **named)

    noting.notes = True  # type: ignore[attr-defined]
    ray.exceptions.RayTaskError.__init__ = noting
