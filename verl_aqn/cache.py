"""Where everything that can be made again is kept."""

import os
from pathlib import Path

from verl_aqn.errors import EnvironmentFault

NO_HOME = "/nonexistent"  # the home folder of who has none


def cache_dir() -> Path:
    """`VERL_AQN_CACHE`, or `verl-aqn` in the user's cache folder.

    Raises:
        EnvironmentFault: nothing says where the user's home folder is.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    own = os.environ.get("VERL_AQN_CACHE") or None
    user = xdg if os.path.isabs(xdg) else "~/.cache"  # a relative one is to be ignored, as its standard says
    try:
        path = Path(own or f"{user}/verl-aqn").expanduser().absolute()  # runs record paths within it
    except RuntimeError:
        path = Path(NO_HOME)
    if Path(NO_HOME) in (path, *path.parents):
        raise EnvironmentFault(
            "no home folder is known (HOME is not set, and this user is not in /etc/passwd): set VERL_AQN_CACHE to a "
            "folder that you may write"
        )
    return path
