"""Where actor and rollout meet for a sync: a socket in the run's own temporary folder."""

import os

_SHARED = "ipc:///tmp/"


def of_this_run(handle: str) -> str:
    """verl's socket, moved out of /tmp.

    verl names it by Ray's job, which is 01000000 in every run that starts a Ray of its own: of two such runs on a
    machine each would remove the other's socket, and wait for ever or take the other's adapter.
    """
    assert handle.startswith(_SHARED), handle
    return f"ipc://{os.environ['TMPDIR']}/{handle.removeprefix(_SHARED)}"
