"""Waiting for what another node wrote to the shared disk.

A network disk may show a file of another node late: NFS keeps names and sizes for up to 60 s. Until then a file is
missing, old or short, which is not the same as a folder that is not shared.
"""

import os
import time
from collections.abc import Callable

from verl_aqn.errors import ConfigError

LIMIT = "VERL_AQN_DISK_WAIT_S"
DEFAULT_S = 90.0  # NFS's own limit is 60 s
_POLL_S = 0.25


def limit() -> float:
    """Return for how many seconds a node waits for files of other nodes.

    Raises:
        ConfigError: the environment variable is not a number of seconds.
    """
    text = os.environ.get(LIMIT) or str(DEFAULT_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"{LIMIT}={text} is not a number of seconds: use one such as {DEFAULT_S:g}")
    return seconds


def wait_until(seen: Callable[[], bool], began: float | None = None) -> bool:
    """Wait until `seen()` is true. Return False if it is not after `limit` seconds.

    `began`: the time (`time.monotonic`) from which the limit counts. `seen` is asked at least once.
    """
    end = (time.monotonic() if began is None else began) + limit()
    while not seen():
        if time.monotonic() > end:
            return False
        time.sleep(_POLL_S)
    return True


def slower() -> str:
    """Return the advice for a disk that is shared, but slower than the limit."""
    return f"if the disk is shared and only slow, set {LIMIT} to more than {limit():g}"
