"""Check overrides of the command line, `key=value` in Hydra's grammar, before a config is composed from them."""

import shlex
from collections.abc import Iterable

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from verl_aqn.errors import ConfigError, first_line


def check_overrides(overrides: Iterable[str]) -> None:
    """Raise ConfigError for the first override that Hydra cannot read; the message shows how to write it.

    A value that contains = or (, such as a path, needs Hydra's own quotes, which must be protected from the shell.
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
                f"{override} contains several values: write {shlex.quote(f'{key}=[{value}]')} for a "
                f"list{_quoted(key, value).replace(': write', ', or')}"
            )


def _quoted(key: str, value: str) -> str:
    """Return a text that shows how to quote a value, or "" if quotes do not help."""
    escaped = value.replace('"', '\\"')
    written = f'{key}="{escaped}"'
    try:
        _parser.parse_override(written)
    except HydraException:
        return ""
    return f": write {shlex.quote(written)}"


_parser = OverridesParser.create()
