"""What the installed verl itself refuses of a recipe, asked in a process of its own, and remembered.

verl takes seconds to import, and chooses a platform for its process: so it is asked by `verl_aqn.verl_api.ask`.
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import verl_aqn
from verl_aqn.cache import cache_dir
from verl_aqn.errors import EnvironmentFault
from verl_aqn.preflight.findings import Finding

ASK = Path(__file__).parents[1] / "verl_api" / "ask.py"
TIMEOUT_S = 600
# What verl's checks look at; of the rest a run differs from the next one without verl minding.
BLOCKS = ("actor_rollout_ref", "algorithm", "critic", "data", "distillation", "global_profiler", "reward", "trainer")
NOT_ASKED = (
    "actor_rollout_ref.model.path", "actor_rollout_ref.rollout.seed", "critic.model", "data.seed",
    "data.train_files", "data.val_files", "trainer.experiment_name", "trainer.project_name", "trainer.save_freq",
    "trainer.test_freq", "trainer.total_training_steps", "trainer.default_local_dir", "trainer.logger",
    "reward.custom_reward_function.path",  # asked in this process (`verl_aqn.rewards.custom`)
)  # fmt: skip


def check_verl(config: DictConfig) -> Iterator[Finding]:
    """What verl says of the recipe's settings. Asks only where verl is installed."""
    if (version := verl_version()) is None:
        yield Finding("verl's checks", "not asked: verl is not installed here")
        return
    try:
        found = ask(config, version)
    except EnvironmentFault as error:
        yield Finding("verl's checks", str(error), "mend the installation (bash scripts/setup.sh)")
        return
    yield from found or [Finding("verl's checks", f"verl {version} refuses nothing")]


def verl_version() -> str | None:
    """The installed verl's version, if there is one."""
    try:
        return importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError:
        return None


def ask(config: DictConfig, version: str) -> list[Finding]:
    """Return the faults that verl finds; an answer without any is remembered.

    Raises:
        EnvironmentFault: verl's process ended without an answer.
    """
    asked = question(config)
    text = json.dumps([asked, version, verl_aqn.__version__], sort_keys=True, default=str)
    key = hashlib.sha256(text.encode() + ASK.read_bytes()).hexdigest()[:24]
    file = cache_dir() / "verl" / key
    own = config.reward.reward_manager.source == "importlib"  # a file of the user's, which may change
    if file.exists() and not own:
        return []
    found = [Finding(**fault) for fault in _ask(asked)]
    if not found and not own:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        except OSError:
            pass  # then it is asked again
    return found


def question(config: DictConfig) -> dict[str, Any]:
    """Return the resolved blocks that verl is asked about, without what makes no difference to it."""
    asked = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for key in NOT_ASKED:
        if OmegaConf.select(asked, key) is not None:
            OmegaConf.update(asked, key, None)
    container: Any = OmegaConf.to_container(asked)
    return {block: container[block] for block in BLOCKS if block in container}


def _ask(asked: dict[str, Any]) -> list[dict[str, str]]:
    command = [sys.executable, "-m", "verl_aqn.verl_api.ask"]
    env = {**os.environ, "VERL_PLATFORM": "cpu"}  # nothing is computed that needs a device
    try:
        done = subprocess.run(
            command, input=json.dumps(asked), capture_output=True, text=True, errors="replace", env=env,
            timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise EnvironmentFault(f"verl did not say within {TIMEOUT_S} s what it thinks of the settings") from None
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])["faults"]
    except (IndexError, ValueError, TypeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise EnvironmentFault(
            f"verl could not be asked about the settings (exit code {done.returncode}: {last[:300]}): see "
            f"`{' '.join(command[1:])}`"
        ) from None
