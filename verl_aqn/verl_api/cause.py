"""Why a call of Ray's failed. Light: the driver imports it."""

import ray


def root_cause(error: BaseException) -> BaseException:
    """The first error behind Ray's wrappers."""
    while isinstance(error, ray.exceptions.RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error
