"""The causes of failed Ray calls. The driver imports this module, so it must stay light."""

from typing import Any

import ray

from verl_aqn.runs.faults import in_run, note


def root_cause(error: BaseException) -> BaseException:
    """Return the original error inside Ray's wrappers."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def note_task_errors() -> None:
    """Record every error that a Ray task or actor method in this process raises, before Ray sends it to the caller.

    Ray may lose the error on the way: if the error cannot be pickled, or if the creation of an actor fails and the
    caller only learns that the actor died. Ray always wraps such an error in a RayTaskError in the process that raised
    it, so this function patches RayTaskError's constructor.
    """
    make: Any = ray.exceptions.RayTaskError.__init__
    if getattr(make, "notes", False) or not in_run():
        return

    def noting(self: Any, function_name: str, traceback_str: str, cause: Any, *args: Any, **named: Any) -> None:
        # An error from another process has more arguments; an error that is passed on has lost its traceback.
        if not args and isinstance(cause, Exception) and cause.__traceback__ is not None:
            note(cause, ends=function_name == "__init__")
        make(self, function_name, traceback_str, cause, *args, **named)

    noting.notes = True  # type: ignore[attr-defined]
    ray.exceptions.RayTaskError.__init__ = noting
