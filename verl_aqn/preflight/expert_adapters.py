"""Adapters beside a mixture of experts: on the linear layers of attention, in actor and rollout alike.

PEFT 0.21 would put one on the router too, and takes `gate_proj` and its like for names of experts wherever they stand
(shared experts, dense layers). vLLM would make slots for all of these, and its kernel for experts on a CPU takes none.
"""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError


def keep_adapter_off_experts(config: DictConfig) -> None:
    """Name the layers with adapters to actor and rollout, where the model in `model.path` is a mixture of experts.

    Raises:
        ConfigError: the recipe wants adapters elsewhere.
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
                f"{model.lora_adapter_path} changes {', '.join(unknown)}: of a MoE model only attention has adapters "
                f"({', '.join(known)}): give one without"
            )
        what = f"target_modules has {', '.join(unknown)}" if unknown else "target_parameters is set"
        raise ConfigError(
            f"actor_rollout_ref.model.{what}: of a MoE model only attention has adapters, name some of "
            f"{', '.join(known)} in target_modules (or all-linear)"
        )
    model.target_modules = wanted
    OmegaConf.update(actor_rollout, "rollout.engine_kwargs.vllm.lora_target_modules", wanted, force_add=True)


def attention_layers(path: Path) -> list[str]:
    """What the linear layers of a MoE model's attention are called; [] of a model without experts.

    They are what is left without head, routers, and the names that experts' matrices have. Only config.json is read.
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
