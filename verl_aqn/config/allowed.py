"""Numbers and names that verl's settings may have, checked before anything starts."""

import math
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.config.schema import nearest
from verl_aqn.config.trackers import LOGGERS
from verl_aqn.config.verl_keys import leaves
from verl_aqn.errors import ConfigError

# verl's own settings that must be integers of at least 1: checks, schedule and trainer calculate with them.
_ROLLOUT = "actor_rollout_ref.rollout"


_COUNTS = (
    "trainer.n_gpus_per_node", "trainer.nnodes", "trainer.total_epochs", "trainer.total_training_steps",
    "data.train_batch_size", "data.gen_batch_size", "data.max_prompt_length", "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size", f"{_ROLLOUT}.n", f"{_ROLLOUT}.val_kwargs.n",
    f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.data_parallel_size", f"{_ROLLOUT}.expert_parallel_size",
    f"{_ROLLOUT}.max_model_len", f"{_ROLLOUT}.max_num_seqs", f"{_ROLLOUT}.max_num_batched_tokens",
)  # fmt: skip


_OR_NULL = ("trainer.total_training_steps", "data.gen_batch_size", f"{_ROLLOUT}.max_model_len")


# Settings for which a number below 1 has a meaning.
_OR_LOWER = {
    "trainer.test_freq": (-1, "the last step only"),
    "trainer.save_freq": (-1, "never"),
    "data.train_max_samples": (-1, "all"),
    "data.val_max_samples": (-1, "all"),
    "actor_rollout_ref.model.lora_rank": (0, "no adapter"),
}


# Numbers of 0 or more, which may have a fraction.
_REALS = (
    f"{_ROLLOUT}.temperature", f"{_ROLLOUT}.top_p", f"{_ROLLOUT}.val_kwargs.temperature",
    "actor_rollout_ref.actor.optim.lr", "critic.optim.lr",
)  # fmt: skip


# Names that verl looks up only during a run, and the values that this trainer supports. Only these two engines support
# a packed base (`verl_aqn.integrations.verl.engine`).
STRATEGIES = ("fsdp", "fsdp2")


_NAMES = {
    "trainer.logger": LOGGERS,
    "actor_rollout_ref.actor.strategy": STRATEGIES,
    "critic.strategy": STRATEGIES,
    "trainer.v1.trainer_mode": ("sync",),  # the other modes generate while noise and adapter change
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    f"{_ROLLOUT}.name": ("vllm",),
    "reward.reward_manager.source": ("register", "importlib"),
}


REWARD_MANAGERS = ("dapo", "gdpo", "naive", "rate_limited", "remote")  # the managers in verl's own registry


def check_numbers(config: DictConfig) -> None:
    """Check the numbers in verl's blocks that verl or our checks calculate with.

    Raises ConfigError for the first fault.
    """
    for key in (*_COUNTS, *_OR_LOWER):
        value = OmegaConf.select(config, key, default=1)  # records of older versions lack some of these keys
        if value is None and key in _OR_NULL:
            continue
        lowest, meaning = _OR_LOWER.get(key, (1, ""))
        if type(value) is not int or value < lowest:
            other = f", or {lowest} for {meaning}" if meaning else ""
            shown = "null" if value is None else value
            raise ConfigError(f"{key}={shown}: give an integer of 1 or more{other}")
    for key in _REALS:
        value = OmegaConf.select(config, key, default=1)
        if type(value) not in (int, float) or not 0 <= value < math.inf:
            raise ConfigError(f"{key}={'null' if value is None else value}: give a number of 0 or more")


def check_types(config: Any, usual: Any) -> None:
    """Check that no text stands where `usual` has a number or a truth value: verl takes `no` for true.

    Both are plain dicts, `config` with resolved interpolations. Raises ConfigError for the first fault.
    """
    known = dict(leaves(usual))
    for key, value in leaves(config):
        kind = known.get(key)
        if isinstance(value, str) and isinstance(kind, bool | int | float) and ".env_vars." not in key:
            raise ConfigError(f"{key}={value!r}: give {'true or false' if isinstance(kind, bool) else 'a number'}")


def check_names(config: DictConfig) -> None:
    """Check those names in verl's blocks whose valid values are all known. Raises ConfigError for the first fault."""
    for key, known in _NAMES.items():
        value = OmegaConf.select(config, key, default=known[0])
        for name in value if OmegaConf.is_list(value) else [value]:
            if name not in known:
                raise ConfigError(f"{key} has {name!r}: {nearest(str(name), list(known))}")
    manager = OmegaConf.select(config, "reward.reward_manager")
    if manager and manager.source == "register" and manager.name not in REWARD_MANAGERS:
        hint = nearest(str(manager.name), list(REWARD_MANAGERS))
        raise ConfigError(
            f"reward.reward_manager.name has {manager.name!r}: {hint}; your own manager needs "
            "reward.reward_manager.source=importlib and reward.reward_manager.module.path=FILE"
        )
