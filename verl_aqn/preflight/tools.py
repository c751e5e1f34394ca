"""Agent loops and tools of a recipe: found, and asked of verl before a run.

verl loads them in each agent loop's worker, where a fault of a user's file would be an actor that died, and takes tools
that no loop calls without a word.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from verl_aqn.errors import ConfigError, EnvironmentFault

SINGLE = "single_turn_agent"
TOOLS = ("function_tool_path", "tool_config_path")
TIMEOUT_S = 120
_ROLLOUT = "actor_rollout_ref.rollout"


def loops_of(config: DictConfig, *sets: Any) -> set[str]:
    """Return the agent loops that answer the items of `sets`: an item may name its own as `agent_name`.

    Of a data set of the user's own class the first item speaks for all.
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
    """Make the paths of tools and agent loops absolute ones; verl's data set reads them too.

    Raises:
        ConfigError: a file or module that is not there.
    """
    rollout = config.actor_rollout_ref.rollout
    for key in TOOLS:
        if value := rollout.multi_turn.get(key):
            rollout.multi_turn[key] = str(_file_of(str(value), f"{_ROLLOUT}.multi_turn.{key}"))
    if own := rollout.agent.agent_loop_config_path:
        rollout.agent.agent_loop_config_path = str(_file_of(str(own), f"{_ROLLOUT}.agent.agent_loop_config_path"))


def prepare_tools(config: DictConfig, *sets: Any) -> None:
    """Ask verl whether it can load agent loops and tools, whose paths are made absolute ones.

    Args:
        sets: the items of training and validation data.

    Raises:
        ConfigError: a file that is not there, a loop, tool or format of calls that verl does not know or cannot load,
            tools that nothing calls, a loop with tools that has none.
        EnvironmentFault: verl could not be asked.
    """
    rollout = config.actor_rollout_ref.rollout
    turns, loops = rollout.multi_turn, loops_of(config, *sets)
    find_tools(config)
    given = next((key for key in TOOLS if turns.get(key)), None)
    if loops == {SINGLE}:
        asked = f"multi_turn.{given}={turns[given]}" if given else "multi_turn.enable=true"
        if given or turns.enable:
            raise ConfigError(
                f"{_ROLLOUT}.{asked}, but {SINGLE} answers once and calls no tool: set "
                f"{_ROLLOUT}.agent.default_agent_loop=tool_agent"
            )
        return
    turns.enable = True  # verl asks nowhere; our figures of tools do
    if "tool_agent" in loops and not given:
        raise ConfigError(
            f"{_ROLLOUT}.agent.default_agent_loop=tool_agent has no tool: set {_ROLLOUT}.multi_turn.function_tool_path"
        )
    question = {"loops": sorted(map(str, loops)), "format": turns.format, "own": rollout.agent.agent_loop_config_path}
    if fault := _ask(question | {key: turns.get(key) for key in TOOLS}):
        raise ConfigError(f"{_ROLLOUT}.{fault}")


def _file_of(value: str, key: str) -> Path:
    """Return the file behind a path, or behind pkg://MODULE."""
    if value.startswith("pkg://"):
        module = value.removeprefix("pkg://").replace("/", ".")
        try:
            spec = importlib.util.find_spec(module)
        except ModuleNotFoundError:
            spec = None
        if spec is None or not spec.origin:
            raise ConfigError(f"{key}={value}: there is no module {module}")
        return Path(spec.origin)
    file = Path(value).expanduser().absolute()
    if not file.is_file():
        raise ConfigError(f"{key}={value}: there is no such file")
    return file


def _ask(question: dict[str, Any]) -> str:
    """Return what verl finds wrong, "" where nothing is. In a process of its own: verl takes seconds to import."""
    command = [sys.executable, "-m", "verl_aqn.verl_api.tools", json.dumps(question)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
        return json.loads(done.stdout.strip().splitlines()[-1])["fault"]
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"verl did not say within {TIMEOUT_S} s whether it can load the tools") from None
    except (IndexError, ValueError, TypeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EnvironmentFault(
            f"verl could not be asked about the tools (exit code {done.returncode}: {last[:300]})"
        ) from None
