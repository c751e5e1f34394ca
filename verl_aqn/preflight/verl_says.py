"""Find the settings of a recipe that the installed verl rejects, by asking verl in its own process.

verl takes seconds to import and chooses a platform for its process, so the question is asked by
`verl_aqn.integrations.verl.ask_verl`. Good answers are stored.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

import verl_aqn
from verl_aqn.cache import cache_dir
from verl_aqn.errors import EnvironmentFault
from verl_aqn.preflight.asking import ask_module, keep, kept, version_of
from verl_aqn.preflight.findings import Finding

ASK = Path(__file__).parents[1] / "integrations" / "verl" / "ask_verl.py"
TIMEOUT_S = 600
# The blocks that verl's checks read; other settings may differ between runs without effect on verl.
BLOCKS = ("actor_rollout_ref", "algorithm", "critic", "data", "distillation", "global_profiler", "reward", "trainer")
NOT_ASKED = (
    "actor_rollout_ref.model.path", "actor_rollout_ref.rollout.seed", "critic.model", "data.seed",
    "data.train_files", "data.val_files", "trainer.experiment_name", "trainer.project_name", "trainer.save_freq",
    "trainer.test_freq", "trainer.total_training_steps", "trainer.default_local_dir", "trainer.logger",
    "reward.custom_reward_function.path",  # checked in this process (`verl_aqn.preflight.reward_function`)
)  # fmt: skip


def check_verl(config: DictConfig) -> Iterator[Finding]:
    """Check the recipe's settings with verl's own checks, if verl is installed."""
    if (version := verl_version()) is None:
        yield Finding("verl's checks", "not checked: verl is not installed here")
        return
    try:
        found = ask(config, version)
    except EnvironmentFault as error:
        yield Finding("verl's checks", str(error), "repair the installation (bash scripts/setup.sh)")
        return
    yield from found or [Finding("verl's checks", f"verl {version} accepts all settings")]


def verl_version() -> str | None:
    """Return the version of the installed verl, or None."""
    return version_of("verl")


def ask(config: DictConfig, version: str) -> list[Finding]:
    """Return the faults that verl finds; an answer without faults is stored.

    Raises:
        EnvironmentFault: verl's process ended without an answer.
    """
    blocks = question(config)
    text = json.dumps([blocks, version, verl_aqn.__version__], sort_keys=True, default=str)
    key = hashlib.sha256(text.encode() + ASK.read_bytes()).hexdigest()[:24]
    file = cache_dir() / "verl" / f"{key}.json"
    own = config.reward.reward_manager.source == "importlib"  # a file of the user's, which may change
    if not own and kept(file, _fits):
        return []
    env = {**os.environ, "VERL_PLATFORM": "cpu"}  # nothing is computed that needs a device
    about = "verl whether it accepts the settings"
    answer = ask_module(
        "verl_aqn.integrations.verl.ask_verl", about, text=json.dumps(blocks), env=env, timeout=TIMEOUT_S, fits=_fits
    )
    if not answer["faults"] and not own:
        keep(file, answer)
    return [Finding(**fault) for fault in answer["faults"]]


def _fits(answer: Any) -> bool:
    return isinstance(answer, dict) and "faults" in answer


def question(config: DictConfig) -> dict[str, Any]:
    """Return the resolved blocks that verl is asked about, without settings that do not affect its checks."""
    blocks = OmegaConf.create(OmegaConf.to_container(config, resolve=True))
    for key in NOT_ASKED:
        if OmegaConf.select(blocks, key) is not None:
            OmegaConf.update(blocks, key, None)
    container: Any = OmegaConf.to_container(blocks)
    return {block: container[block] for block in BLOCKS if block in container}
