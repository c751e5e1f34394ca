"""Whether an answer is right: the one judgement of what a reward says of it, or what a line on record does.

Trainer, probe, compare, report, verdict and eval all ask here. `acc` is 0 or 1. A reward of -1 and +1, partial credit,
null or NaN is no accuracy, and nothing makes one of it: not its sign, and not whether it is above 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from verl_aqn.errors import ConfigError

REMEDY = "let it return {'score': REWARD, 'acc': 1 if the answer is right else 0}"


def is_right(acc: object) -> bool | None:
    """True of 1 and False of 0, as bool, int, float or a scalar of numpy or torch; None of anything else."""
    acc = _plain(acc)
    return bool(acc) if isinstance(acc, Real) and acc in (0, 1) else None


def _plain(value: Any) -> Any:
    """A scalar of numpy or torch as Python's own."""
    return value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value


def judged(values: Sequence[object], key: str = "acc") -> list[bool]:
    """Return `is_right` of what a reward gave as `key` for each answer.

    Raises:
        ConfigError: one is neither 0 nor 1; with the first such value, and how many there are.
    """
    found = [is_right(value) for value in values]
    if None in found:
        bad = values[found.index(None)]
        raise ConfigError(
            f"reward.custom_reward_function gave {key}={_shown(bad)} for {found.count(None)} of {len(found)} answers, "
            f"which is neither 0 nor 1: {REMEDY}"
        )
    return [bool(one) for one in found]


def recorded(line: Mapping[str, Any]) -> bool | None:
    """Whether the answer of a line on record is right; None where that is not on record, as in some older ones."""
    return is_right(line.get("acc"))


def acc_in(result: object) -> bool:
    """Whether an answer is right by what the reward function returned for it.

    Of a dict that is its `acc`. verl takes any other reward for the accuracy itself, which only 0 or 1 can be.

    Raises:
        ConfigError: that is neither 0 nor 1, or a dict has no `acc`.
    """
    if not isinstance(result, Mapping):
        if (right := is_right(result)) is None:
            raise ConfigError(
                f"reward.custom_reward_function returned {_shown(result)} without an accuracy, and no 0 or 1 that "
                f"could be taken for it: {REMEDY}"
            )
        return right
    if "acc" not in result:
        raise ConfigError(f"reward.custom_reward_function returned {_shown(dict(result))} without 'acc': {REMEDY}")
    return judged([result["acc"]])[0]


def reward_in(result: Any) -> float:
    """The reward that training uses, of what the reward function returned: `score` of a dict.

    Raises:
        ConfigError: there is none, or it is not a finite number.
    """
    value = _plain(result.get("score") if isinstance(result, Mapping) else result)
    if isinstance(value, Real) and math.isfinite(value):
        return float(value)
    raise ConfigError(
        f"reward.custom_reward_function returned {_shown(result)}, in which no finite number is the reward: {REMEDY}"
    )


def _shown(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
