"""Adapters in mixture-of-experts models: only the linear layers of attention get one, in the actor and the rollout.

PEFT 0.21 would also adapt the router, and it treats `gate_proj` and similar names as names of experts everywhere, also
in shared experts and dense layers. vLLM would allocate adapter slots for all of these, but its kernel for experts on a
CPU does not support adapters.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError


def keep_adapter_off_experts(config: DictConfig) -> None:
    """Restrict adapters to attention in the config of actor and rollout if `model.path` is a mixture of experts.

    Raises:
        ConfigError: the recipe asks for adapters on other layers.
    """
    actor_rollout = config.actor_rollout_ref
    model = actor_rollout.model
    known = attention_layers(Path(model.path)) if model.lora_rank > 0 else []
    if not known:
        return
    targets: Any = model.target_modules
    wanted = known if targets == "all-linear" else list(targets) if OmegaConf.is_list(targets) else [targets]
    unknown = sorted({str(name) for name in wanted} - set(known))
    if unknown or OmegaConf.select(model, "target_parameters"):
        if model.lora_adapter_path:
            raise ConfigError(
                f"{model.lora_adapter_path} changes {', '.join(unknown)}: in a MoE model only attention can have "
                f"adapters ({', '.join(known)}): give an adapter for these layers only"
            )
        what = f"target_modules has {', '.join(unknown)}" if unknown else "target_parameters is set"
        raise ConfigError(
            f"actor_rollout_ref.model.{what}: in a MoE model only attention can have adapters: set target_modules to "
            f"some of {', '.join(known)} (or to all-linear)"
        )
    model.target_modules = wanted
    OmegaConf.update(actor_rollout, "rollout.engine_kwargs.vllm.lora_target_modules", wanted, force_add=True)


def attention_layers(path: Path) -> list[str]:
    """Return the names of the linear layers in the attention of a MoE model; [] for a model without experts.

    These are all linear layers except the head, the routers and layers that are named like the matrices of experts.
    Only config.json is read.
    """
    from torch import nn

    from verl_aqn.checkpoints.loading import empty_model
    from verl_aqn.checkpoints.packing_plan import routers
    from verl_aqn.mxfp4.experts import is_fused
    from verl_aqn.mxfp4.names import EXPERT_MATRICES

    model = empty_model(path)
    if not any(is_fused(module) for module in model.modules()):
        return []
    head = model.get_output_embeddings()
    linears = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    leaves = {name.rpartition(".")[2] for name in set(linears) - routers(model)}
    return sorted(leaves - EXPERT_MATRICES)
