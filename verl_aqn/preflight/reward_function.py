"""Load a recipe's reward function (`reward.custom_reward_function`) as verl does, and check it before a run."""

import asyncio
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.schema import nearest
from verl_aqn.errors import ConfigError, RewardError, first_line
from verl_aqn.runs.accuracy import acc_in, judged, reward_in
from verl_aqn.tasks.user_lines import user_line

OURS = "verl_aqn.tasks.gsm8k"
KEY = "reward.custom_reward_function"
GIVEN = ("data_source", "solution_str", "ground_truth", "extra_info")
"""The names of the arguments with which verl's reward managers call the function."""
ASYNC_TIMEOUT_S = 60


def reward_of(config: DictConfig) -> Callable[..., Any]:
    """Return the recipe's reward function, which is called with keyword arguments as in verl, plus its `reward_kwargs`.

    The returned function raises RewardError, with the line of the user's file, if the user's function raises. It raises
    TimeoutError if an async function does not return within `ASYNC_TIMEOUT_S`.

    Raises:
        ConfigError: there is no such function, or it cannot be loaded.
    """
    function, custom = load_reward(config), config.reward.custom_reward_function
    more: Any = OmegaConf.to_container(custom.get("reward_kwargs") or OmegaConf.create({}), resolve=True)
    waits = inspect.iscoroutinefunction(function)

    def called(**told: Any) -> Any:
        try:
            result = function(**(told | more))  # as in verl, `reward_kwargs` take precedence
            return asyncio.run(_awaited(result)) if waits else result
        except (Exception, SystemExit) as error:  # whatever the user's function raises
            if waits and isinstance(error, TimeoutError):
                raise
            place = user_line(error, str(custom.path)) or f"{KEY}.name={custom.name}"
            raise RewardError(f"{place}: {type(error).__name__}: {first_line(error)}") from error

    return called


async def _awaited(result: Any) -> Any:
    return await asyncio.wait_for(result, ASYNC_TIMEOUT_S)


def load_reward(config: DictConfig) -> Callable[..., Any]:
    """Return the function that the recipe names, without `reward_kwargs`.

    Raises:
        ConfigError: the file, module or function does not exist, or its module raises on import.
    """
    custom = config.reward.custom_reward_function
    path, name = str(custom.path or ""), str(custom.name)
    if not path.startswith("pkg://") and not file_of(path).is_file():
        raise ConfigError(f"{KEY}.path={path}: no such file: give a Python file, or pkg://PACKAGE.MODULE")
    try:
        if path.startswith("pkg://"):
            module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
        else:
            spec = importlib.util.spec_from_file_location("verl_aqn_custom_reward", file_of(path))
            if spec is None or spec.loader is None:
                raise ImportError("its name does not end in .py")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's module raises on import; a script exits
        place = user_line(error, path)
        raise ConfigError(
            f"{KEY}.path={path} cannot be loaded: {f'{place}: ' if place else ''}{type(error).__name__}: "
            f"{first_line(error)}: correct the path or the module"
        ) from error
    if not callable(function := getattr(module, name, None)):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        what = "is not a function" if function is not None else "does not exist in it"
        raise ConfigError(f"{KEY}.path={path}: {KEY}.name={name} {what}: {nearest(name, names) if names else 'add it'}")
    return function


def file_of(path: str) -> Path:
    """Return the file for a `path` without `pkg://`."""
    return Path(path.removeprefix("file://")).expanduser()


def is_ours(config: DictConfig) -> bool:
    """Return whether the reward is the rule for GSM8K's format, given as a module or as a file."""
    path = str(config.reward.custom_reward_function.path or "")
    if path.startswith("pkg://"):
        return path.removeprefix("pkg://").replace("/", ".") == OURS
    ours = Path(__file__).parents[1] / "tasks" / "gsm8k.py"
    return bool(path) and file_of(path).resolve() == ours.resolve()


def settle_reward(config: DictConfig) -> None:
    """Reject settings that a reward cannot have, and make the path of the function's file absolute.

    The path must be absolute because workers have another working directory.

    Raises:
        ConfigError: the first such setting, or a function that cannot be loaded or called as verl calls it.
    """
    reward = config.reward
    if reward.reward_model.enable:
        raise ConfigError(
            "reward.reward_model.enable=true: a reward model says how good a response is and not whether it is "
            "right, so validation would have no accuracy, and verl calls it by HTTP without a password: use a "
            f"function ({KEY}), which may call your own model"
        )
    _refuse_old_names(config)
    custom = reward.custom_reward_function
    if not custom.path:
        return
    function = load_reward(config)
    if not str(custom.path).startswith("pkg://"):
        custom.path = str(file_of(str(custom.path)).absolute())
    if reward.reward_manager.source != "register":
        return  # a user's own reward manager calls the function, not verl's
    if reward.reward_manager.name == "remote" and inspect.iscoroutinefunction(function):
        raise ConfigError(
            "reward.reward_manager.name=remote does not support async functions: set reward.reward_manager.name=naive"
        )
    _check_signature(function, sorted({*GIVEN, *(custom.get("reward_kwargs") or {})}), str(custom.name))


def _refuse_old_names(config: DictConfig) -> None:
    """Reject old names of settings: verl's own script moves them to `reward`, but its trainer does not read them."""
    moved = {"reward_manager": "reward_manager.name", "num_workers": "num_workers", "reward_kwargs": "reward_kwargs"}
    for block in ("custom_reward_function", "reward_model", "sandbox_fusion"):
        for key, value in _leaves(OmegaConf.to_container(config.get(block) or OmegaConf.create({}))):
            if value is not None:
                now = moved.get(key, f"reward_model.{key}") if block == "reward_model" else f"{block}.{key}"
                raise ConfigError(f"{block}.{key} is an old name, which verl's trainer does not read: set reward.{now}")


def _leaves(block: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in block.items():
        yield from _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]


def _check_signature(function: Callable[..., Any], names: list[str], name: str) -> None:
    try:
        inspect.signature(function).bind(**dict.fromkeys(names))
    except ValueError:  # a builtin without a signature
        return
    except TypeError as error:
        raise ConfigError(
            f"{KEY}.name={name} cannot be called as verl does, with the keyword arguments {', '.join(names)}: "
            f"{first_line(error)}: define it as `def {name}({', '.join(GIVEN)}, **kwargs)`"
        ) from error


def check_reward(config: DictConfig, row: dict[str, Any], where: str) -> None:
    """Call the reward function with two responses to a row of the data: an empty one, and one that contains the truth.

    The function is not called if a user's own reward manager is used, or if the recipe names no function and verl's own
    is used. The trainer checks every response of a validation in any case.

    Args:
        row: a row of a data file.
        where: the file and the number of the row, for error messages.

    Raises:
        ConfigError: the function cannot be loaded, raises, or does not return accuracy and reward.
    """
    reward = config.reward
    if not reward.custom_reward_function.path or reward.reward_manager.source != "register":
        return
    function = reward_of(config)
    truth = row["reward_model"]["ground_truth"]
    groups = config.algorithm.filter_groups
    metric = groups.metric if groups and groups.enable else "acc"
    for answer in ("", f"#### {truth}"):
        extra = {**(row.get("extra_info") or {}), **added_by_manager(config)}
        told = {"data_source": row["data_source"], "ground_truth": truth, "extra_info": extra}
        try:
            result = function(solution_str=answer, **told)
        except TimeoutError:
            return  # the function waits for something; during the run, the run's own limits apply
        except RewardError as error:
            raise ConfigError(
                f"{error}: for the response {answer!r} to {where}: return a reward for any text, because a run "
                "stops if the function raises"
            ) from error
        if inspect.isawaitable(result):
            raise ConfigError(f"{KEY} returned {type(result).__name__}: define it with `async def`, which verl awaits")
        acc_in(result)
        reward_in(result)
        if isinstance(result, dict) and "flexible" in result:
            judged([result["flexible"]], "flexible")
        if metric not in ("reward", "overlong_reward", *(result if isinstance(result, dict) else ("acc",))):
            raise ConfigError(
                f"{KEY} returned no {metric!r}, which is algorithm.filter_groups.metric: return it too, or set "
                "the metric to acc, score or reward"
            )


def added_by_manager(config: DictConfig) -> dict[str, Any]:
    """Return what verl's reward manager adds to `extra_info` before it calls the function."""
    name = config.reward.reward_manager.name
    if name in ("naive", "remote"):
        return {"num_turns": 2, "rollout_reward_scores": {}}
    return {"experiment_name": config.trainer.experiment_name} if name == "gdpo" else {}
