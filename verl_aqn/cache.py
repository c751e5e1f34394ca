"""Where everything that can be made again is kept."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`VERL_AQN_CACHE`, or `verl-aqn` in the user's cache folder."""
    if path := os.environ.get("VERL_AQN_CACHE"):
        return Path(path).expanduser().absolute()  # runs record paths within it
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser().absolute() / "verl-aqn"
