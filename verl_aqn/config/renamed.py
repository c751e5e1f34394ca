"""Old names of settings in the `aqn:` block: accepted for one version, with a warning."""

import sys
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_aqn.errors import ConfigError

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


def rename_keys(config: DictConfig) -> None:
    """Give old keys of a composed config their new names. The recipe's value wins over the default of the new key.

    Raises:
        ConfigError: a key is not a block where the new one is.
    """
    for old, new in _NEW.items():
        value = OmegaConf.select(config, old)
        if value is None:
            continue
        if isinstance(OmegaConf.select(config, new), DictConfig) and not isinstance(value, DictConfig):
            raise ConfigError(f"{old} is called {new} now, and is a block of keys")
        _warn(old, new)
        OmegaConf.update(config, new, value, merge=True)
        block, _, key = old.rpartition(".")
        with open_dict(config):
            del OmegaConf.select(config, block)[key]


def rename_plain(block: dict[Any, Any]) -> dict[str, Any]:
    """Return the `aqn:` block of a recorded config, as plain values, with today's names of keys."""
    out = {key: dict(value) if isinstance(value, dict) else value for key, value in block.items()}
    for old, new in _NEW.items():
        *path, name = old.split(".")[1:]
        holder = out.get(path[0]) if path else out
        if isinstance(holder, dict) and name in holder:
            value = holder.pop(name)
            holder.setdefault(new.rpartition(".")[2], value)
    return out


@cache
def _warn(old: str, new: str) -> None:
    """Say once that a setting has a new name."""
    print(f"warning: {old} is called {new} now; the old name will be refused in version 0.3", file=sys.stderr)
