"""In which form the rollout holds the base (packed, or as the same values in bf16), and in which slots adapters.

The actor always trains on the packed base. An engine without kernels for MXFP4 serves its exact bf16 equal (on a CPU
vLLM has none for experts), and vllm-ascend wants the packed bytes under other names; both are folders of their own in
the cache.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_aqn.cache import cache_dir
from verl_aqn.config.schema import AqnConfig, parse_aqn
from verl_aqn.errors import ConfigError
from verl_aqn.mxfp4.chips import chip_name, has_mx_units
from verl_aqn.terminal import progress_bar

# Where in the model's override_config the rollout finds the folder that it serves, if that is not the actor's.
SERVED = "served_path"
ASCEND = "ascend"  # vllm-ascend's name of its quantisation by description
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's `MaxLoRARanks`; tests/contract/test_preflight_ray.py


def served_rank(rank: int) -> int:
    """`max_lora_rank` for an adapter of `rank`: vLLM's slots are of ranks that it knows, the next one from it."""
    return next((known for known in ADAPTER_RANKS if known >= rank), rank)


def form_of(aqn: AqnConfig, chip: Callable[[], str] = chip_name, packed_experts: bool = False) -> str:
    """`packed` or `bf16`: what `aqn.mxfp4.rollout_weight_format` says, or for `auto` what the device can compute with.

    `chip`: the Ascend device's name; asked only for `auto` on NPUs. `packed_experts`: the base is that of a MoE model
    whose experts are packed.
    """
    if aqn.mxfp4.rollout_weight_format != "auto":
        return aqn.mxfp4.rollout_weight_format
    if aqn.profile == "cpu" and packed_experts:
        return "bf16"
    return "packed" if aqn.profile != "npu" or has_mx_units(chip()) else "bf16"


def fit_engine(config: DictConfig, answer: dict[str, Any] | None) -> None:
    """Set what the engine needs for this model, by what vLLM says of it (`verl_aqn.preflight.vllm_says`; None: nothing).

    Where all layers have a window, vLLM's attention on a CPU works in blocks of 16. The state of layers that carry one
    is kept in float32, as the actor computes it: vLLM's kernel on a CPU takes no other.
    """
    if answer is None:
        return
    rollout = config.actor_rollout_ref.rollout
    engine = OmegaConf.select(rollout, "engine_kwargs.vllm") or {}
    if answer.get("all_windowed") and parse_aqn(config).profile == "cpu" and engine.get("block_size") != 16:
        OmegaConf.update(rollout, "engine_kwargs.vllm.block_size", 16, force_add=True)
    if answer.get("hybrid") and not engine.get("mamba_ssm_cache_dtype"):
        OmegaConf.update(rollout, "engine_kwargs.vllm.mamba_ssm_cache_dtype", "float32", force_add=True)


def prepare_serving(config: DictConfig, chip: Callable[[], str] = chip_name) -> None:
    """Make the folder that the rollout serves from the packed one in `model.path`, and put both forms into `config`.

    On an Ascend 950 `auto` turns `aqn.mxfp4.activation` on: vllm-ascend's dense MXFP4 always rounds activations.

    Raises:
        ConfigError: activations are to be rounded where the rollout has a bf16 base, or not on an Ascend 950; experts
            are to be served packed on a CPU; noise is to go to packed layers of a bf16 base.
        EnvironmentFault: `auto` on a machine where no Ascend device answers.
    """
    from verl_aqn.checkpoints.cached import dequantized_cache, modelslim_cache
    from verl_aqn.checkpoints.loading import has_packed_experts, has_packed_stacks

    aqn, actor_rollout = parse_aqn(config), config.actor_rollout_ref
    engine = "rollout.engine_kwargs.vllm.quantization"
    with open_dict(actor_rollout):  # an evaluation's config is that of a run, which may have served another form
        actor_rollout.model.override_config.pop(SERVED, None)
        if OmegaConf.select(actor_rollout, engine) == ASCEND:
            del actor_rollout.rollout.engine_kwargs.vllm.quantization
    if not aqn.mxfp4.enabled:
        return
    path = Path(actor_rollout.model.path)
    experts = has_packed_experts(path)
    if (
        aqn.profile == "cpu"
        and experts
        and (aqn.mxfp4.rollout_weight_format == "packed" or aqn.mxfp4.activation != "none")
    ):
        raise ConfigError(
            "on a CPU vLLM has no kernel for packed experts, so that this base is served in bf16: set "
            "aqn.mxfp4.rollout_weight_format=auto and aqn.mxfp4.activation=none"
        )
    stacks = has_packed_stacks(path)
    if stacks and (aqn.mxfp4.rollout_weight_format == "packed" or aqn.mxfp4.activation != "none"):
        raise ConfigError(
            f"the experts of {path} are packed in one stack a layer (gpt-oss), which vLLM does not read, so that this "
            "base is served in bf16: set aqn.mxfp4.rollout_weight_format=auto and aqn.mxfp4.activation=none"
        )
    form = "bf16" if stacks else form_of(aqn, chip, experts)
    ascend = form == "packed" and aqn.profile == "npu"
    if ascend and aqn.mxfp4.rollout_weight_format == "auto":
        config.aqn.mxfp4.activation = "mxfp4"
    elif ascend and aqn.mxfp4.activation == "none":
        raise ConfigError(
            "aqn.mxfp4.rollout_weight_format=packed on NPUs rounds activations too (vllm-ascend has W4A4_MXFP4 only): set "
            "aqn.mxfp4.activation=mxfp4, or aqn.mxfp4.rollout_weight_format=bf16"
        )
    if form == "bf16" and aqn.mxfp4.activation != "none":
        raise ConfigError(
            "aqn.mxfp4.activation=mxfp4 needs aqn.mxfp4.rollout_weight_format=packed: on a bf16 base the rollout rounds no activations"
        )
    if form == "bf16" and aqn.noise.enabled and "linear" in aqn.noise.targets:
        raise ConfigError(
            "aqn.noise.targets has `linear`, but the rollout's base is in bf16 and has no packed layer: take it out"
        )
    config.aqn.mxfp4.rollout_weight_format = form
    if ascend:
        with progress_bar("the rollout's base:") as progress:
            served = modelslim_cache(path, cache_dir() / "modelslim", progress)
        OmegaConf.update(actor_rollout, engine, ASCEND, force_add=True)
    elif form == "bf16":
        with progress_bar("the rollout's base:") as progress:
            served = dequantized_cache(path, cache_dir() / "bf16", progress)
    else:
        return
    OmegaConf.update(actor_rollout, f"model.override_config.{SERVED}", str(served), force_add=True)
