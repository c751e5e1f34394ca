"""verl's reward managers with better errors: this module has a class for each, by verl's name (`rewarding.dapo`).

verl can load a manager from a module (`reward.reward_manager.source=importlib`). The classes here are subclasses of
verl's. An error of the reward function names the line in the user's file, and a reward that is not a finite number
raises an error; verl would use it in the gradients.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from omegaconf import DictConfig, open_dict
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.experimental.reward_loop.reward_manager.registry import REWARD_MANAGER

from verl_aqn.errors import ConfigError, RewardError, first_line
from verl_aqn.runs.accuracy import reward_in
from verl_aqn.tasks.user_lines import user_line


def use_telling_manager(config: DictConfig) -> None:
    """Make verl load the recipe's reward manager from this module; a user's own manager is not changed."""
    manager = config.reward.reward_manager
    if manager.source == "register":
        with open_dict(manager):
            manager.source = "importlib"
            manager.module = {"path": f"pkg://{__name__}"}


def __getattr__(name: str) -> type:
    """Return the class with better errors for verl's manager `name`."""
    if name not in REWARD_MANAGER:
        raise AttributeError(name)
    return _telling(name)


@cache
def _telling(name: str) -> type:
    verls: Any = get_reward_manager_cls(name)

    class Telling(verls):
        def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Callable[..., Any], **more: Any) -> None:
            path = str(config.reward.custom_reward_function.path or "")
            call = _checked_async if inspect.iscoroutinefunction(compute_score) else _checked
            super().__init__(config, tokenizer, partial(call, compute_score, path), **more)

        async def run_single(self, data: Any) -> dict[str, Any]:
            found = await super().run_single(data)
            told = found["reward_extra_info"]
            # This manager returns 0 instead of raising. A function's own dict may have an `error` too, but has a score.
            if name == "rate_limited" and "error" in told and "score" not in told:
                raise RewardError(told["error"])
            return found

    Telling.__name__ = f"Telling{verls.__name__}"
    return Telling


def _checked(function: Callable[..., Any], path: str, **told: Any) -> Any:
    """Call the reward function and return its result.

    Raises:
        RewardError: the function raises an error, or its result has no finite number.
    """
    try:
        return _sound(function(**told))
    except Exception as error:  # the user's function may raise any error
        raise _told(error, path) from None


async def _checked_async(function: Callable[..., Any], path: str, **told: Any) -> Any:
    """Do the same as `_checked` for an asynchronous reward function."""
    try:
        return _sound(await function(**told))
    except Exception as error:
        raise _told(error, path) from None


def _sound(result: Any) -> Any:
    reward_in(result)
    return result


def _told(error: Exception, path: str) -> RewardError:
    if isinstance(error, ConfigError):
        return RewardError(str(error))
    place = user_line(error, path)
    return RewardError(f"{f'{place}: ' if place else ''}{type(error).__name__}: {first_line(error)}")
