"""Choice of the linear layers that get an adapter: layers that PEFT can adapt and that vLLM has an adapter slot for.

`verl_aqn.preflight.expert_adapters` handles mixture-of-experts models.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError
from verl_aqn.preflight.expert_adapters import keep_adapter_off_experts

_NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.|$)")


def place_adapter(config: DictConfig, answer: dict[str, Any] | None) -> None:
    """Restrict the adapter to layers that both the actor and the rollout can adapt.

    `answer` is what vLLM reports about the model (`verl_aqn.preflight.vllm_says`), or None if vLLM was not asked. With
    `all-linear` the layers that cannot be adapted are added to `model.exclude_modules`, and the rollout is told the
    remaining ones. The config stays unchanged if all layers can be adapted.

    Raises:
        ConfigError: the recipe names layers that cannot have an adapter, or no layer is left.
    """
    keep_adapter_off_experts(config)
    model = config.actor_rollout_ref.model
    if model.lora_rank <= 0 or answer is None or "without_slot" not in answer:
        return
    from verl_aqn.checkpoints.building import linear_layers  # imports transformers

    linears = linear_layers(Path(model.path))
    faults = peft_refuses(Path(model.path), linears)
    faults |= {name: "vLLM has no adapter slot for this layer" for name in answer["without_slot"] if name in linears}
    excluded = OmegaConf.select(model, "exclude_modules")
    wanted = [name for name in linears if _targets(model.target_modules, name)]
    refused = {name: why for name, why in faults.items() if name in wanted}
    if not refused:
        if answer.get("head_is_embedding"):
            _tell_rollout(config, wanted)
        return
    if model.target_modules != "all-linear":
        refused = {name: why for name, why in refused.items() if not (excluded and _targets(excluded, name))}
        if refused and not _by_experts(config):
            name = min(refused)
            raise ConfigError(
                f"actor_rollout_ref.model.target_modules: {name} cannot have an adapter ({refused[name]}; "
                f"{len(refused)} such layers): set it to all-linear, or name other layers"
            )
    kept = [name for name in wanted if name not in faults]
    if not kept:
        raise ConfigError(
            f"no linear layer of {model.path} can have an adapter ({'; '.join(sorted(set(faults.values())))}): choose "
            "another model"
        )
    pattern = _pattern(refused, kept)
    if excluded and pattern and pattern not in str(excluded):
        users = excluded if isinstance(excluded, str) else "|".join(rf"(.*\.)?{re.escape(one)}" for one in excluded)
        pattern = f"{users}|{pattern}"
    if pattern:
        OmegaConf.update(model, "exclude_modules", pattern, force_add=True)
    _tell_rollout(config, kept)


def _tell_rollout(config: DictConfig, kept: Collection[str]) -> None:
    """Set the layers for which vLLM allocates adapter slots; without this vLLM also allocates some in the embedding."""
    leaves = sorted({name.rpartition(".")[2] for name in kept})
    OmegaConf.update(config.actor_rollout_ref, "rollout.engine_kwargs.vllm.lora_target_modules", leaves, force_add=True)


def peft_refuses(folder: Path, linears: Collection[str]) -> dict[str, str]:
    """Return the names in `linears` that PEFT refuses to adapt in this model, with the reason."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import _check_lora_target_modules_mamba

    from verl_aqn.checkpoints.loading import empty_model

    model, config = empty_model(folder), LoraConfig()
    said: dict[str, str] = {}
    for leaf in {name.rpartition(".")[2] for name in linears}:
        try:
            _check_lora_target_modules_mamba(config, model, leaf)
        except ValueError:
            said[leaf] = "PEFT refuses to adapt it in this model"
    return {name: said[leaf] for name in linears if (leaf := name.rpartition(".")[2]) in said}


def _by_experts(config: DictConfig) -> bool:
    """Return whether the layers were chosen by `keep_adapter_off_experts` and not by the recipe."""
    chosen = OmegaConf.select(config, "actor_rollout_ref.rollout.engine_kwargs.vllm.lora_target_modules")
    return chosen is not None and chosen == config.actor_rollout_ref.model.target_modules


def _targets(targets: Any, name: str) -> bool:
    """Return whether PEFT's `target_modules` or `exclude_modules` matches the module `name`."""
    if isinstance(targets, str):
        return targets == "all-linear" or bool(re.fullmatch(targets, name))
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _pattern(refused: Collection[str], kept: Collection[str]) -> str:
    """Return a regular expression that matches all of `refused` and none of `kept`.

    Layer numbers become \\d+ where the result still matches none of `kept`.
    """
    patterns = set()
    for name in refused:
        parts = name.split(".")
        # The shortest prefix without a kept layer: this can be a whole tower of the model.
        for end in range(1, len(parts) + 1):
            prefix = ".".join(parts[:end])
            if not any(one == prefix or one.startswith(f"{prefix}.") for one in kept):
                break
        general = _NUMBER.sub(r"\\d+", re.escape(prefix)) + r"(\..*)?"
        fits_kept = any(re.fullmatch(general, one) for one in kept)
        patterns.add(re.escape(prefix) + r"(\..*)?" if fits_kept else general)
    return "|".join(sorted(patterns))
