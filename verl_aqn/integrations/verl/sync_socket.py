"""The socket between actor and rollout for a sync, in the run's own temporary folder."""

import os

_SHARED = "ipc:///tmp/"


def of_this_run(handle: str) -> str:
    """Return the address of verl's socket, moved from /tmp to the run's temporary folder.

    verl names the socket by the id of the Ray job, which is 01000000 in every run that starts its own Ray. Two such
    runs on one machine would remove each other's sockets, and then wait for ever or receive the other run's adapter.
    """
    assert handle.startswith(_SHARED), handle
    return f"ipc://{os.environ['TMPDIR']}/{handle.removeprefix(_SHARED)}"
