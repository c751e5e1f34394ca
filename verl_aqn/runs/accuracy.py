"""Decide whether an answer is right, from a reward function's result or from a recorded line.

The trainer, `probe`, `compare`, `report`, the verdict and `eval` all use this module. `acc` is 0 or 1. A reward of -1
and +1, partial credit, null and NaN are not accuracies, and they are never converted into one: neither the sign of a
reward nor "above 0" is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from verl_aqn.errors import ConfigError

REMEDY = "return {'score': REWARD, 'acc': 1 if the answer is right else 0}"


def is_right(acc: object) -> bool | None:
    """Return True for 1 and False for 0 (bool, int, float, or a numpy or torch scalar), and None for anything else."""
    acc = _plain(acc)
    return bool(acc) if isinstance(acc, Real) and acc in (0, 1) else None


def _plain(value: Any) -> Any:
    """Convert a numpy or torch scalar to a Python value."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def judged(values: Sequence[object], key: str = "acc") -> list[bool]:
    """Return `is_right` for each answer, given the values that the reward function returned as `key`.

    Raises:
        ConfigError: a value is neither 0 nor 1. The message has the first such value and their number.
    """
    found = [is_right(value) for value in values]
    if None in found:
        bad = values[found.index(None)]
        raise ConfigError(
            f"reward.custom_reward_function returned {key}={_shown(bad)} for {found.count(None)} of "
            f"{len(found)} responses, which is neither 0 nor 1: {REMEDY}"
        )
    return [bool(one) for one in found]


def recorded(line: Mapping[str, Any]) -> bool | None:
    """Whether the answer of a line on record is right; None where that is not on record, as in some older ones."""
    return is_right(line.get("acc"))


def acc_in(result: object) -> bool:
    """Return whether a response is right, given what the reward function returned for it.

    For a dict, this is its `acc`. verl uses any other reward as the accuracy, which is only possible for 0 and 1.

    Raises:
        ConfigError: the value is neither 0 nor 1, or a dict has no `acc`.
    """
    if not isinstance(result, Mapping):
        if (right := is_right(result)) is None:
            raise ConfigError(
                f"reward.custom_reward_function returned {_shown(result)}, which contains no accuracy and is "
                f"not itself 0 or 1: {REMEDY}"
            )
        return right
    if "acc" not in result:
        raise ConfigError(f"reward.custom_reward_function returned {_shown(dict(result))} without 'acc': {REMEDY}")
    return judged([result["acc"]])[0]


def reward_in(result: Any) -> float:
    """Return the reward that training uses from the reward function's result; for a dict, this is `score`.

    Raises:
        ConfigError: there is no reward, or it is not a finite number.
    """
    value = _plain(result.get("score") if isinstance(result, Mapping) else result)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise ConfigError(
        f"reward.custom_reward_function returned {_shown(result)}, which has no finite number as the reward: {REMEDY}"
    )


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
