"""verl's own reward function, which judges the responses if a recipe names none: whether it knows the data."""

from typing import Any

from omegaconf import DictConfig
from verl.utils import reward_score

from verl_aqn.errors import ConfigError, first_line
from verl_aqn.preflight.run_data import needs_truth
from verl_aqn.runs.accuracy import acc_in, reward_in

RUNS_CODE = ("codecontests", "apps", "codeforces", "taco")
"""Data sources for which verl runs the response as a program."""


def judges(config: DictConfig) -> bool:
    """Return whether verl's own function judges the responses of a recipe."""
    return needs_truth(config) and not config.reward.custom_reward_function.path


def check_verls_reward(item: dict[str, Any], where: str) -> None:
    """Call verl's function with two responses to a row: an empty one, and one that contains the ground truth.

    Raises:
        ConfigError: the function does not know the data source, raises, or does not return accuracy and reward.
    """
    source, truth = item.get("data_source"), item["reward_model"]["ground_truth"]
    if source in RUNS_CODE:
        return
    for response in ("", f"#### {truth}"):
        told = {"solution_str": response, "ground_truth": truth, "extra_info": item.get("extra_info") or {}}
        try:
            result = reward_score.default_compute_score(data_source=source, **told)
            acc_in(result)
            reward_in(result)
        except ConfigError as error:
            fault = str(error).partition(" returned ")[2].partition(": return")[0]
            raise _fault(where, f"returned {fault}") from error
        except Exception as error:  # each data source has code and packages of its own
            raise _fault(where, f"raises {type(error).__name__} ({first_line(error)})") from error


def _fault(where: str, what: str) -> ConfigError:
    return ConfigError(
        f"{where}: verl's own reward function {what}: set reward.custom_reward_function.path to one of yours "
        "(docs/rewards.md)"
    )
