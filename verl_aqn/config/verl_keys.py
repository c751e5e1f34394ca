"""Decide how each key of verl's config is handled: passed on, owned by us, or refused. See `verl_keys.yaml`."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError

KINDS = ("passed", "owned", "refused")


@dataclass(frozen=True)
class Rule:
    """A rule of the table for one key, or for one block with everything below it.

    `accept`: values that are allowed in addition to the value from `base` and the profile. `like`: a key whose value is
    allowed too. `conditions`: the rule applies if each (key, values, wanted) has one of the values, or none of them if
    `wanted` is False.
    """

    kind: str
    key: str
    whole: bool
    reason: str = ""
    by: str = ""
    bad: Any = None
    accept: tuple[Any, ...] = ()
    like: str = ""
    beyond: bool = False
    conditions: tuple[tuple[str, tuple[Any, ...], bool], ...] = ()

    def covers(self, key: str) -> bool:
        """Return whether the rule applies to `key`."""
        return key == self.key or (self.whole and key.startswith(f"{self.key}."))

    def accepts(self, value: Any, config: DictConfig) -> bool:
        """Return whether a composed `config` may have this value."""
        return value in self.accept or (bool(self.like) and value == _select(config, self.like))

    def holds(self, config: DictConfig) -> bool:
        """Return whether the rule's conditions are met in a composed `config`."""
        return all((_select(config, key) in values) is wanted for key, values, wanted in self.conditions)


@cache
def rules() -> tuple[Rule, ...]:
    """Return the table, one rule for each key or block."""
    raw = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return tuple(rule for kind in KINDS for entry in raw[kind] for rule in _expand(kind, entry))


def _expand(kind: str, entry: dict[str, Any]) -> Iterator[Rule]:
    known = {"under", "keys", "why", "instead", "by", "bad", "accept", "like", "beyond", "when", "unless"}
    assert set(entry) <= known, f"verl_keys.yaml: {set(entry) - known}"
    for block in entry.get("under", [""]):
        conditions = [
            (_whole(key, block), tuple(values) if isinstance(values, list) else (values,), wanted)
            for name, wanted in (("when", True), ("unless", False))
            for key, values in entry.get(name, {}).items()
        ]
        for word in entry["keys"].split():
            key = ".".join(filter(None, (block, word.removesuffix("*").removesuffix("."))))
            yield Rule(
                kind, key, word.endswith("*"), entry.get("why") or entry.get("instead", ""), entry.get("by", ""),
                entry.get("bad"), tuple(entry.get("accept", ())), _whole(entry.get("like", ""), block),
                entry.get("beyond", False), tuple(conditions),
            )  # fmt: skip


def _whole(key: str, block: str) -> str:
    """Return the whole key; one that begins with a dot is in the block."""
    return f"{block}{key}" if key.startswith(".") else key


def rules_of(key: str) -> list[Rule]:
    """Return the rules about `key`: those of the nearest block that has any.

    verl builds a block from the class in `_target_`, which is passed on.
    """
    if key.endswith("._target_"):
        return [Rule("passed", key, whole=False)]
    found = [rule for rule in rules() if rule.covers(key)]
    nearest = max((len(rule.key) for rule in found), default=0)
    return [rule for rule in found if len(rule.key) == nearest]


def check_keys(config: DictConfig, usual: Any) -> None:
    """Reject settings of a composed config for keys that we own, or that have no effect here.

    Args:
        config: with unresolved interpolations, so that a setting that copies another one is recognised.
        usual: a plain config whose values the user did not set: `base` with profile and experiment.

    Raises:
        ConfigError: the first such key, with the reason and what to set instead.
    """
    for key, value in leaves(OmegaConf.to_container(config)):
        if _get(usual, key) == value:
            continue
        for rule in rules_of(key):
            if rule.kind != "passed" and not rule.accepts(_select(config, key), config) and rule.holds(config):
                raise ConfigError(f"{key}={_shown(config, key)}: {rule.reason}")


def reason_against(key: str) -> str:
    """Return why `key`, which is not in the config, is not supported, or "" if the table does not say."""
    return next((rule.reason for rule in rules_of(key) if rule.kind != "passed"), "")


def leaves(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of everything that is not a block, and of empty blocks."""
    for key, value in block.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _get(block: Any, key: str) -> Any:
    for part in key.split("."):
        block = block.get(part, ...) if isinstance(block, dict) else ...
    return block


def _select(config: DictConfig, key: str) -> Any:
    return OmegaConf.select(config, key, throw_on_missing=False)


def _shown(config: DictConfig, key: str) -> str:
    value = _select(config, key)
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return re.sub(r"\s+", " ", str(value))
