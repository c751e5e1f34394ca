"""A recipe's reward function (`reward.custom_reward_function`): loaded as verl loads it, and asked before a run."""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError, first_line
from verl_aqn.runs.accuracy import acc_in, judged, reward_in

OURS = "verl_aqn.rewards.gsm8k"


def reward_of(config: DictConfig) -> Callable[..., Any]:
    """The recipe's reward function, called with names as verl does, its `reward_kwargs` filled in.

    Raises:
        ConfigError: there is none, or it cannot be loaded.
    """
    custom = config.reward.custom_reward_function
    path = str(custom.path or "")
    try:
        if path.startswith("pkg://"):
            module = importlib.import_module(path.removeprefix("pkg://").replace("/", "."))
        else:
            file = Path(path.removeprefix("file://")).expanduser()
            spec = importlib.util.spec_from_file_location("verl_aqn_custom_reward", file)
            if spec is None or spec.loader is None:
                raise ImportError("no Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        function = getattr(module, custom.name)
    except Exception as error:  # whatever the user's module does as it is imported
        raise ConfigError(f"reward.custom_reward_function {path!r} cannot be loaded: {first_line(error)}") from error
    more: Any = OmegaConf.to_container(custom.get("reward_kwargs") or OmegaConf.create({}), resolve=True)
    return partial(function, **more) if more else function


def is_ours(config: DictConfig) -> bool:
    """Whether the reward is the rule for GSM8K's form, named as a module or as a file."""
    custom = config.reward.custom_reward_function
    path = str(custom.path or "")
    if path.startswith("pkg://"):
        return path.removeprefix("pkg://").replace("/", ".") == OURS
    ours = Path(__file__).with_name("gsm8k.py")
    return bool(path) and Path(path.removeprefix("file://")).expanduser().resolve() == ours.resolve()


def check_reward(config: DictConfig, row: dict[str, Any], where: str) -> None:
    """Ask the reward function about two answers to a row of the data: an empty one, and one that gives the truth.

    It is not asked where it could not answer before the run has started: where it waits for other processes (async),
    or a reward model or a reward manager of the user's own stands before it. Where the recipe names none, verl's own
    is used. The trainer judges every answer of a validation in any case.

    Args:
        row: of a file of the data. where: the file and the number of the row, for errors.

    Raises:
        ConfigError: the function cannot be loaded, raises, or does not tell accuracy and reward.
    """
    reward = config.reward
    manager, model = (OmegaConf.select(reward, key) for key in ("reward_manager.source", "reward_model.enable"))
    if not reward.custom_reward_function.path or manager not in (None, "register") or model:
        return
    function = reward_of(config)
    if inspect.iscoroutinefunction(getattr(function, "func", function)):
        return
    truth = row["reward_model"]["ground_truth"]
    for answer in ("", f"#### {truth}"):
        extra = {**(row.get("extra_info") or {}), "num_turns": 2, "rollout_reward_scores": {}}
        told = {"data_source": row["data_source"], "ground_truth": truth, "extra_info": extra}
        try:
            result = function(solution_str=answer, **told)
        except Exception as error:
            raise ConfigError(
                f"reward.custom_reward_function raises {type(error).__name__} ({first_line(error)}) for the answer "
                f"{answer!r} to {where}: verl drops such answers, so let it return a reward for any text"
            ) from error
        acc_in(result)
        reward_in(result)
        if isinstance(result, dict) and "flexible" in result:
            judged([result["flexible"]], "flexible")
