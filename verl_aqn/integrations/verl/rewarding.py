"""verl's reward managers, which say what failed: this module has a class by the name of each (`rewarding.dapo`).

verl takes a manager from a module (`reward.reward_manager.source=importlib`). Ours is verl's own, but an error of the
reward function comes with the line of the user's file, and a reward that is not a finite number is refused, which verl
would take into the gradients.
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
    """Let verl take the recipe's reward manager from here; one of the user's own stays what it is."""
    manager = config.reward.reward_manager
    if manager.source == "register":
        with open_dict(manager):
            manager.source = "importlib"
            manager.module = {"path": f"pkg://{__name__}"}


def __getattr__(name: str) -> type:
    """Return the telling form of the manager that verl has under `name`."""
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
            if "error" in found["reward_extra_info"] and name == "rate_limited":  # which makes a 0 of it
                raise RewardError(found["reward_extra_info"]["error"])
            return found

    Telling.__name__ = f"Telling{verls.__name__}"
    return Telling


def _checked(function: Callable[..., Any], path: str, **told: Any) -> Any:
    """Call the reward function and return what it returns.

    Raises:
        RewardError: it raises, or returns what holds no finite number.
    """
    try:
        return _sound(function(**told))
    except Exception as error:  # whatever the user's function raises
        raise _told(error, path) from None


async def _checked_async(function: Callable[..., Any], path: str, **told: Any) -> Any:
    """As `_checked`."""
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
