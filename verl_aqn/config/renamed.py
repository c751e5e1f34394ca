"""Old names of settings in the `aqn:` block: accepted for one version, with a warning."""

import sys
from functools import cache
from typing import Any

from omegaconf import DictConfig

# New name → old names. The old names will be refused in version 0.3.
RENAMED = {
    "aqn.mismatch": ("aqn.parity",),
    "aqn.mxfp4.cache_dequantized": ("aqn.mxfp4.keep_dense",),
    "aqn.mxfp4.rollout_weight_format": ("aqn.mxfp4.serve",),
    "aqn.run.hang_timeout_factor": ("aqn.run.patience",),
}
_NEW = {old: new for new, olds in RENAMED.items() for old in olds}


def current_override(override: str) -> str:
    """Return an override (`key=value`, perhaps with + or ~ before it) with today's name of its key."""
    key, equals, value = override.partition("=")
    bare = key.lstrip("+~")
    for old, new in _NEW.items():
        if bare == old or bare.startswith(old + "."):
            _warn(old, new)
            return key.replace(old, new, 1) + equals + value
    return override


def rename_keys(aqn: Any, *, warn: bool = False) -> None:
    """Give old keys of an `aqn:` block (a dict or a DictConfig) their new names, in place.

    The value of an old key wins over the value of the new key, which is a default where both are there.
    """
    for old, new in _NEW.items():
        *blocks, name = old.split(".")[1:]
        holder = aqn
        for block in blocks:
            holder = holder.get(block)
        if not isinstance(holder, dict | DictConfig) or name not in holder:
            continue
        if warn:
            _warn(old, new)
        key, value = new.rpartition(".")[2], holder.pop(name)
        default: Any = holder.get(key)
        both = isinstance(default, dict | DictConfig) and isinstance(value, dict | DictConfig)
        holder[key] = {**default, **value} if both else value


@cache
def _warn(old: str, new: str) -> None:
    """Say once that a setting has a new name."""
    print(f"warning: {old} is called {new} now; the old name will be refused in version 0.3", file=sys.stderr)
