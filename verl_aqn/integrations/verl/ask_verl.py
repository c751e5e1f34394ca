"""Check which settings of a config the installed verl rejects, before a run.

Use: `python -m verl_aqn.integrations.verl.ask_verl`.

Standard input is the resolved config as JSON; the last line of standard output is the answer as JSON (see
`verl_aqn.preflight.verl_says`). The module creates verl's own objects as verl's trainer and workers do, and calls
verl's own functions with a few invented numbers. An error here would also occur in the run.
"""

import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import numpy as np
import torch
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from verl import DataProto
from verl.experimental.agent_loop import agent_loop
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    FixedKLController,
    get_kl_controller,
    get_policy_loss_fn,
    kl_penalty,
)
from verl.trainer.ppo.ray_trainer import apply_kl_penalty
from verl.trainer.ppo.reward import load_reward_manager, resolve_reward_manager_cls
from verl.trainer.ppo.rollout_corr_helper import compute_rollout_correction_and_add_to_batch
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.config import omega_conf_to_dataclass, validate_config

from verl_aqn.errors import first_line

Fault = dict[str, str]
_NAMED = "change the setting that the message names"


def faults(config: DictConfig) -> list[Fault]:
    """Return the settings of a resolved `config` that verl rejects, in the order in which a run would meet them.

    Each fault is {what, found, fix}, as in a `Finding`.
    """
    algorithm, loss = config.algorithm, config.actor_rollout_ref.actor.policy_loss.loss_mode
    questions: list[tuple[str, Callable[[], Any], str]] = [
        ("actor_rollout_ref, critic, data and trainer", partial(_validate, config), _NAMED),
        ("actor_rollout_ref.rollout", partial(omega_conf_to_dataclass, config.actor_rollout_ref.rollout), _NAMED),
        *_of_kl(config),
        ("algorithm and trainer", partial(_trainer, config), _NAMED),
        ("reward.reward_manager and reward.reward_kwargs", partial(_manager, config), _NAMED),
        (
            f"actor_rollout_ref.actor.policy_loss.loss_mode={loss}",
            partial(_loss, config),
            _NAMED,
        ),
        *_of_agents(config),
    ]
    if _corrects(config):
        questions.append(("algorithm.rollout_correction", partial(_correction, config), _NAMED))
    found: dict[str, Fault] = {}  # one setting may cause the same error in several of verl's objects
    for what, ask, fix in questions:
        if said := _fault_of(ask):
            found.setdefault(said, {"what": what, "found": f"verl rejects it: {said}", "fix": fix})
    if said := _fault_of(partial(_advantage, config)):
        able = [name for name in sorted(ADV_ESTIMATOR_REGISTRY) if not _fault_of(partial(_advantage, config, name))]
        found[said] = {
            "what": f"algorithm.adv_estimator={algorithm.adv_estimator}",
            "found": f"verl cannot compute it with these settings: {said}",
            "fix": f"choose one that works with these settings: {', '.join(able)}",
        }
    return list(found.values())


def _fault_of(ask: Callable[[], Any]) -> str:
    """Call `ask` and return the error that verl raises, in one line, or "" if it raises none."""
    try:
        ask()
    except Exception as error:  # any error of verl is the answer
        while isinstance(error, InstantiationException) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if not str(error).strip():  # an error without a message: return verl's line of code
            return traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        line = first_line(error)
        return line if isinstance(error, AssertionError | ValueError) else f"{type(error).__name__}: {line}"
    return ""


def _validate(config: DictConfig) -> None:
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))


def _trainer(config: DictConfig) -> None:
    """Construct verl's trainer, with its sampler and its pools of devices; this does not need Ray."""
    PPOTrainerSync(config)._init_resource_pool_mgr()


def _manager(config: DictConfig) -> None:
    """Construct the reward manager, except a user's own (only looked up) and `remote` (it starts Ray's processes)."""
    manager = config.reward.reward_manager
    cls = resolve_reward_manager_cls(config)
    if manager.source == "importlib":
        if not (isinstance(cls, type) and issubclass(cls, RewardManagerBase)):
            raise TypeError(f"{manager.name} is not a subclass of {RewardManagerBase.__module__}.RewardManagerBase")
    elif manager.name != "remote":
        load_reward_manager(config, object())


def _of_kl(config: DictConfig) -> Iterator[tuple[str, Callable[[], Any], str]]:
    """Yield the checks of the KL terms' names and of their controller, if the recipe uses them."""
    algorithm, actor, data = config.algorithm, config.actor_rollout_ref.actor, _proto(config)
    kinds = "set kl, abs, mse or low_var_kl"
    if algorithm.use_kl_in_reward:
        control = partial(get_kl_controller, algorithm.kl_ctrl)
        yield f"algorithm.kl_ctrl.type={algorithm.kl_ctrl.type}", control, "set fixed or adaptive"
        fixed = FixedKLController(0.1)
        penalty = partial(apply_kl_penalty, data, fixed, algorithm.kl_penalty)
        yield f"algorithm.kl_penalty={algorithm.kl_penalty}", penalty, kinds
    if actor.use_kl_loss:
        term = partial(kl_penalty, data.batch["old_log_probs"], data.batch["ref_log_prob"], actor.kl_loss_type)
        yield f"actor_rollout_ref.actor.kl_loss_type={actor.kl_loss_type}", term, kinds


def _of_agents(config: DictConfig) -> Iterator[tuple[str, Callable[[], Any], str]]:
    agent = config.actor_rollout_ref.rollout.agent
    name, known = agent.default_agent_loop, sorted(agent_loop._agent_loop_registry)
    if name not in known and not agent.agent_loop_config_path:

        def refuse() -> None:
            raise ValueError("no such agent loop")

        yield f"actor_rollout_ref.rollout.agent.default_agent_loop={name}", refuse, f"choose one of {', '.join(known)}"


def _loss(config: DictConfig) -> None:
    """Compute the actor's loss."""
    actor, data = omega_conf_to_dataclass(config.actor_rollout_ref.actor), _batch(config)
    actor.global_batch_info.update(
        dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=actor.loss_scale_factor
    )
    # In bypass mode verl uses another loss, with the settings of the correction (its `ppo_loss`).
    get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=data["old_log_probs"],
        log_prob=data["ref_log_prob"],
        advantages=data["rm_scores"],
        response_mask=data["response_mask"].bool(),
        loss_agg_mode=actor.loss_agg_mode,
        config=actor,
        rollout_is_weights=None,
    )


def _corrects(config: DictConfig) -> bool:
    correction = config.algorithm.rollout_correction
    return bool(correction) and config.actor_rollout_ref.rollout.calculate_log_probs and not correction.bypass_mode


def _correction(config: DictConfig) -> None:
    compute_rollout_correction_and_add_to_batch(_proto(config), config.algorithm.rollout_correction)


def _advantage(config: DictConfig, estimator: str = "") -> None:
    """Compute advantages from the fields that verl's V1 trainer has at that point (its `_compute_advantage`)."""
    samples = int(config.actor_rollout_ref.rollout.n)
    data, algorithm = _proto(config), config.algorithm
    compute_advantage_for_multi_trajectories(
        data,
        batch_keys=[f"{uid}_{n % samples}_0" for n, uid in enumerate(data.non_tensor_batch["uid"])],
        adv_estimator=estimator or algorithm.adv_estimator,
        gamma=algorithm.gamma,
        lam=algorithm.lam,
        num_repeat=samples,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
        config=algorithm,
    )


def _batch(config: DictConfig) -> dict[str, torch.Tensor]:
    """Return the fields [B, R] of an invented batch: two groups of three-token responses, every second one right."""
    count, chance = 2 * int(config.actor_rollout_ref.rollout.n), torch.Generator().manual_seed(0)

    def log_probs() -> torch.Tensor:
        return torch.rand(count, 3, generator=chance) - 1

    scores = torch.zeros(count, 3)
    scores[::2, -1] = 1
    fields = {"response_mask": torch.ones(count, 3, dtype=torch.int64), "rm_scores": scores}
    fields |= {name: log_probs() for name in ("old_log_probs", "rollout_log_probs", "ref_log_prob")}
    return fields | ({"values": log_probs()} if need_critic(config) else {})


def _proto(config: DictConfig) -> DataProto:
    fields = _batch(config)
    fields |= {"token_level_scores": fields["rm_scores"], "token_level_rewards": fields["rm_scores"].clone()}
    data = DataProto.from_dict(tensors=fields)
    samples = int(config.actor_rollout_ref.rollout.n)
    uids = [str(n // samples) for n in range(len(data))]
    data.non_tensor_batch["uid"] = np.array(uids, dtype=object)
    return data


def main() -> None:
    warnings.simplefilter("ignore")
    config = OmegaConf.create(json.load(sys.stdin))
    with redirect_stdout(sys.stderr):
        found = faults(config)
    print(json.dumps({"faults": found}), flush=True)


if __name__ == "__main__":
    main()
