"""Overrides of the command line, `key=value` in Hydra's grammar: read before anything is composed of them."""

import shlex
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from verl_aqn.errors import ConfigError, first_line


def check_overrides(overrides: Iterable[str]) -> None:
    """Raise ConfigError for the first override that Hydra cannot read, with how it is to be written.

    A value with = or ( in it, as a path may have, wants quotes of Hydra's own, which a shell must not take.
    """
    for override in overrides:
        try:
            several = _parser.parse_override(override).is_sweep_override()
        except HydraException as error:
            key, _, value = override.partition("=")
            raise ConfigError(f"{override}: {first_line(error)}{_quoted(key, value)}") from error
        if several:
            key, _, value = override.partition("=")
            raise ConfigError(
                f"{override} gives several values: write {shlex.quote(f'{key}=[{value}]')} for a list"
                f"{_quoted(key, value).replace(': write', ', or')}"
            )


def _quoted(key: str, value: str) -> str:
    """How to write a value, where quotes help."""
    escaped = value.replace('"', '\\"')
    written = f'{key}="{escaped}"'
    try:
        _parser.parse_override(written)
    except HydraException:
        return ""
    return f": write {shlex.quote(written)}"


_parser = OverridesParser.create()
