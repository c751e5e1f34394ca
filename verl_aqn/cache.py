"""The folder for everything that can be made again."""

import os
from pathlib import Path

from verl_aqn.errors import EnvironmentFault

NO_HOME = "/nonexistent"  # home folder of a user without one


def cache_dir() -> Path:
    """Return `VERL_AQN_CACHE`, or `verl-aqn` in the user's cache folder.

    Raises:
        EnvironmentFault: the user's home folder is not known.
    """
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    own = os.environ.get("VERL_AQN_CACHE") or None
    user = xdg if os.path.isabs(xdg) else "~/.cache"  # the XDG standard says to ignore a relative path
    try:
        path = Path(own or f"{user}/verl-aqn").expanduser().absolute()  # absolute, because runs record paths below it
    except RuntimeError:
        path = Path(NO_HOME)
    if Path(NO_HOME) in (path, *path.parents):
        raise EnvironmentFault(
            "no home folder is known (HOME is not set, and this user is not in /etc/passwd): set VERL_AQN_CACHE to a "
            "folder that you can write to"
        )
    return path
