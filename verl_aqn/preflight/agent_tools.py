"""Find a recipe's agent loops and tools, and ask verl before a run whether it can load them.

verl loads them in each agent loop's worker, where a fault in a user's file only shows as a dead actor. verl also
silently accepts tools that no loop calls.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_aqn.errors import ConfigError
from verl_aqn.preflight.asking import ask_module

SINGLE = "single_turn_agent"
TOOLS = ("function_tool_path", "tool_config_path")
TIMEOUT_S = 120
_ROLLOUT = "actor_rollout_ref.rollout"


def loops_of(config: DictConfig, *sets: Any) -> set[str]:
    """Return the agent loops that answer the items of `sets`; an item may name its own loop as `agent_name`.

    For a data set of a user's own class, only the first item is read.
    """
    default, loops = config.actor_rollout_ref.rollout.agent.default_agent_loop, set()
    for items in sets:
        rows: Any = getattr(items, "rows", None)
        if hasattr(rows, "column_names"):
            loops |= set(rows.unique("agent_name")) if "agent_name" in rows.column_names else {default}
        else:
            loops.add(items[0].get("agent_name", default))
    return loops


def find_tools(config: DictConfig) -> None:
    """Make the paths of tools and agent loops absolute; verl's data set reads them too.

    Raises:
        ConfigError: a file or module does not exist.
    """
    rollout = config.actor_rollout_ref.rollout
    for key in TOOLS:
        if value := rollout.multi_turn.get(key):
            rollout.multi_turn[key] = str(_file_of(str(value), f"{_ROLLOUT}.multi_turn.{key}"))
    if own := rollout.agent.agent_loop_config_path:
        rollout.agent.agent_loop_config_path = str(_file_of(str(own), f"{_ROLLOUT}.agent.agent_loop_config_path"))


def prepare_tools(config: DictConfig, *sets: Any) -> None:
    """Ask verl whether it can load the agent loops and tools, and make their paths absolute.

    Args:
        sets: the items of training and validation data.

    Raises:
        ConfigError: a file does not exist, verl does not know or cannot load a loop, a tool or a format of calls,
            no loop calls the tools, or a loop with tools has none.
        EnvironmentFault: verl could not be asked.
    """
    rollout = config.actor_rollout_ref.rollout
    turns, loops = rollout.multi_turn, loops_of(config, *sets)
    find_tools(config)
    given = next((key for key in TOOLS if turns.get(key)), None)
    if loops == {SINGLE}:
        setting = f"multi_turn.{given}={turns[given]}" if given else "multi_turn.enable=true"
        if given or turns.enable:
            raise ConfigError(
                f"{_ROLLOUT}.{setting}, but {SINGLE} generates one response and calls no tool: set "
                f"{_ROLLOUT}.agent.default_agent_loop=tool_agent"
            )
        return
    turns.enable = True  # verl does not read this flag; our metrics of tools do
    if "tool_agent" in loops and not given:
        raise ConfigError(
            f"{_ROLLOUT}.agent.default_agent_loop=tool_agent has no tool: set {_ROLLOUT}.multi_turn.function_tool_path"
        )
    told = {"loops": sorted(map(str, loops)), "format": turns.format, "own": rollout.agent.agent_loop_config_path}
    arguments = [json.dumps(told | {key: turns.get(key) for key in TOOLS})]
    about = "verl whether it can load the tools"
    answer = ask_module("verl_aqn.integrations.verl.ask_tools", about, arguments, timeout=TIMEOUT_S, fits=_fits)
    if fault := answer["fault"]:
        raise ConfigError(f"{_ROLLOUT}.{fault}")


def _fits(answer: Any) -> bool:
    return isinstance(answer, dict) and "fault" in answer


def _file_of(value: str, key: str) -> Path:
    """Return the file for a path or for pkg://MODULE."""
    if value.startswith("pkg://"):
        module = value.removeprefix("pkg://").replace("/", ".")
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.origin:
            raise ConfigError(f"{key}={value}: module {module} does not exist")
        return Path(spec.origin)
    file = Path(value).expanduser().absolute()
    if not file.is_file():
        raise ConfigError(f"{key}={value}: this file does not exist")
    return file
