"""The weight format of the base in the rollout (packed, or the same values in bf16) and the rank of adapter slots.

The actor always trains on the packed base. An engine without kernels for MXFP4 serves the base dequantised to bf16,
with exactly the same values (on a CPU vLLM has no MXFP4 kernel for experts). vllm-ascend expects the packed bytes under
other names, and on chips without MX units it can hold the base in int8 with nearly the same values
(`verl_aqn.mxfp4.int8_rows`), if the recipe asks for that. For each of these cases a folder is made in the cache.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from verl_aqn.cache import cache_dir
from verl_aqn.config.schema import AqnConfig, parse_aqn
from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.mxfp4.chips import chip_name, has_mx_units
from verl_aqn.mxfp4.int8_change import sentence, summary
from verl_aqn.terminal import progress_bar

# Key in the model's override_config with the folder that the rollout serves, if it is not the folder of the actor.
SERVED = "served_path"
ASCEND = "ascend"  # the quantisation method of vllm-ascend that reads a description file
_VLLM = "rollout.engine_kwargs.vllm"
ADAPTER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # vLLM's `MaxLoRARanks`; tests/contract/test_preflight_ray.py


def served_rank(rank: int) -> int:
    """Return `max_lora_rank` for an adapter of `rank`: the smallest supported rank of vLLM that is large enough."""
    return next((known for known in ADAPTER_RANKS if known >= rank), rank)


def form_of(aqn: AqnConfig, chip: Callable[[], str] = chip_name, packed_experts: bool = False) -> str:
    """Return the format of the rollout's weights: `packed`, `bf16` or `int8`.

    It is `aqn.mxfp4.rollout_weight_format`, or for `auto` what the device supports. `chip` returns the name
    of the Ascend device; it is called only for `auto` on NPUs. `packed_experts` says that the base is a MoE model with
    packed experts.
    """
    if aqn.mxfp4.rollout_weight_format != "auto":
        return aqn.mxfp4.rollout_weight_format
    if aqn.profile == "cpu" and packed_experts:
        return "bf16"
    return "packed" if aqn.profile != "npu" or has_mx_units(chip()) else "bf16"


def fit_engine(config: DictConfig, answer: dict[str, Any] | None) -> None:
    """Set the engine options that this model needs.

    `answer` is what vLLM reports about the model (`verl_aqn.preflight.vllm_says`); with None nothing is set. If all
    layers have windowed attention, vLLM on a CPU needs a KV-cache block size of 16. The state of recurrent layers is
    kept in float32, as the actor computes it; vLLM's kernel on a CPU supports no other dtype.
    """
    if answer is None:
        return
    rollout = config.actor_rollout_ref.rollout
    engine = OmegaConf.select(rollout, "engine_kwargs.vllm") or {}
    if answer.get("all_windowed") and parse_aqn(config).profile == "cpu" and engine.get("block_size") != 16:
        OmegaConf.update(rollout, "engine_kwargs.vllm.block_size", 16, force_add=True)
    if answer.get("hybrid") and not engine.get("mamba_ssm_cache_dtype"):
        OmegaConf.update(rollout, "engine_kwargs.vllm.mamba_ssm_cache_dtype", "float32", force_add=True)


def check_activations(aqn: AqnConfig, chip: Callable[[], str] = chip_name) -> None:
    """Check that the rollout's device can round activations as `aqn.mxfp4.activation` says, before any work.

    With the format `packed` the driver's machine may have no NPU; then only the profile is checked.

    Raises:
        ConfigError: the device cannot; the message says what to set.
        EnvironmentFault: the format is `auto` on NPUs and no Ascend device responds.
    """
    key = f"aqn.mxfp4.activation={aqn.mxfp4.activation}"
    if not aqn.mxfp4.enabled or aqn.mxfp4.activation == "none":
        return
    if aqn.mxfp4.activation == "mxfp8" and aqn.profile == "cuda":
        raise ConfigError(
            f"{key}: vLLM has no CUDA kernel for linear layers with MXFP4 weights and MXFP8 activations: set "
            "aqn.mxfp4.activation=none, or mxfp4 on Blackwell"
        )
    if form_of(aqn, chip) != "packed":
        raise ConfigError(
            f"{key} needs a packed base in the rollout: with a bf16 or int8 base (always on Ascend A2 and A3) the "
            "rollout does not round activations: set aqn.mxfp4.activation=none, or "
            "aqn.mxfp4.rollout_weight_format=packed elsewhere"
        )
    if aqn.profile == "npu":
        with suppress(EnvironmentFault):
            if not has_mx_units(name := chip()):
                raise ConfigError(
                    f"{key}: {name} has no MX units (only the Ascend 950 has): set aqn.mxfp4.activation=none and "
                    "aqn.mxfp4.rollout_weight_format=bf16"
                )


def check_int8_device(config: DictConfig, chip: Callable[[], str] = chip_name) -> None:
    """Check that the rollout's device and settings allow `aqn.mxfp4.rollout_weight_format=int8`.

    The driver's machine may have no NPU; then only the profile and the settings are checked.

    Raises:
        ConfigError: they do not; the message says what to set.
    """
    aqn, key = parse_aqn(config), "aqn.mxfp4.rollout_weight_format=int8"
    if not aqn.mxfp4.enabled or aqn.mxfp4.rollout_weight_format != "int8":
        return
    instead = "set aqn.mxfp4.rollout_weight_format=auto"
    if aqn.profile != "npu":
        raise ConfigError(
            f"{key} is a form of vllm-ascend for Ascend A2 and A3, and profile={aqn.profile} has no kernel for it: "
            f"{instead}"
        )
    with suppress(EnvironmentFault):
        if has_mx_units(name := chip()):
            raise ConfigError(
                f"{key} is for Ascend A2 and A3, but {name} holds the packed base itself in half the memory: {instead}"
            )
    layout = OmegaConf.select(config, "ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ASCEND_ENABLE_NZ")
    other = OmegaConf.select(config, f"actor_rollout_ref.{_VLLM}.additional_config.weight_nz_mode")
    if str(layout) != "0" or other not in (None, 0):
        raise ConfigError(
            f"{key}: weights in the layout NZ cannot be read back: set "
            "ray_kwargs.ray_init.runtime_env.env_vars.VLLM_ASCEND_ENABLE_NZ='0', and remove "
            f"actor_rollout_ref.{_VLLM}.additional_config.weight_nz_mode"
        )


def int8_changes(config: DictConfig) -> list[str]:
    """Return a line about the blocks that the rollout's int8 base changes, for a config that is prepared.

    Return [] if no block changes, and for other forms of the base.
    """
    served = OmegaConf.select(config, f"actor_rollout_ref.model.override_config.{SERVED}")
    if parse_aqn(config).mxfp4.rollout_weight_format != "int8" or not served:
        return []
    from verl_aqn.checkpoints.int8_base import read_changes

    found = summary(read_changes(Path(served)))
    return [f"the rollout's base in int8: {sentence(found)}"] if found["changed"] else []


def prepare_serving(config: DictConfig, chip: Callable[[], str] = chip_name) -> None:
    """Make the folder that the rollout serves from the packed base in `model.path`, and set the format in `config`.

    On an Ascend 950 `auto` sets `aqn.mxfp4.activation` if it is `none`, because the MXFP4 layers of vllm-ascend always
    round activations: to `mxfp8`, with which the embedded model learns and with `mxfp4` does not (docs/mxfp4.md), and
    for a model with experts to `mxfp4`, the only one that is read back there.

    Raises:
        ConfigError: as `check_activations`; `aqn.mxfp4.activation` is not set on an Ascend 950, or is `mxfp8` there for
            a model with experts; packed experts are requested on a CPU; or noise targets packed layers but the rollout
            serves a bf16 or int8 base.
        EnvironmentFault: the format is `auto` and no Ascend device responds.
        ModelError: int8 is requested for a base that it cannot hold, or that it would change too much.
    """
    from verl_aqn.checkpoints.cached import dequantized_cache, int8_cache, modelslim_cache
    from verl_aqn.checkpoints.int8_base import check_int8
    from verl_aqn.checkpoints.loading import has_packed_experts, has_packed_stacks

    aqn, actor_rollout = parse_aqn(config), config.actor_rollout_ref
    engine = f"{_VLLM}.quantization"
    with open_dict(actor_rollout):  # an evaluation uses the config of a run, which may have served another format
        actor_rollout.model.override_config.pop(SERVED, None)
        if OmegaConf.select(actor_rollout, engine) == ASCEND:
            del actor_rollout.rollout.engine_kwargs.vllm.quantization
    if not aqn.mxfp4.enabled:
        return
    check_activations(aqn, chip)
    check_int8_device(config, chip)
    path = Path(actor_rollout.model.path)
    experts = has_packed_experts(path)
    if (
        aqn.profile == "cpu"
        and experts
        and (aqn.mxfp4.rollout_weight_format == "packed" or aqn.mxfp4.activation != "none")
    ):
        raise ConfigError(
            "vLLM has no kernel for packed experts on a CPU, so this base must be served in bf16: set "
            "aqn.mxfp4.rollout_weight_format=auto and aqn.mxfp4.activation=none"
        )
    stacks = has_packed_stacks(path)
    if stacks and (aqn.mxfp4.rollout_weight_format == "packed" or aqn.mxfp4.activation != "none"):
        raise ConfigError(
            f"the experts of {path} are packed in one stack per layer (gpt-oss), which vLLM cannot read, so this "
            "base must be served in bf16: set aqn.mxfp4.rollout_weight_format=auto and aqn.mxfp4.activation=none"
        )
    form = form_of(aqn, chip, experts)
    form = "bf16" if stacks and form == "packed" else form
    ascend = form == "packed" and aqn.profile == "npu"
    if ascend and aqn.mxfp4.activation == "none" and aqn.mxfp4.rollout_weight_format == "auto":
        config.aqn.mxfp4.activation = "mxfp4" if experts else "mxfp8"
        parse_aqn(config)  # raises if the recipe has a rounding that mxfp8 does not have
    elif ascend and aqn.mxfp4.activation == "none":
        raise ConfigError(
            "aqn.mxfp4.rollout_weight_format=packed on NPUs rounds activations too (vllm-ascend has W4A8_MXFP and "
            "W4A4_MXFP4 only): set aqn.mxfp4.activation=mxfp8 or mxfp4, or aqn.mxfp4.rollout_weight_format=bf16"
        )
    if ascend and experts and aqn.mxfp4.activation == "mxfp8":
        raise ConfigError(
            f"aqn.mxfp4.activation=mxfp8 on NPUs is not for experts ({path}), whose rounding is not read back: set "
            "aqn.mxfp4.rollout_weight_format=bf16 and aqn.mxfp4.activation=none"
        )
    if form != "packed" and aqn.noise.enabled and "linear" in aqn.noise.targets:
        raise ConfigError(
            f"aqn.noise.targets has `linear`, but the rollout's base is in {form} and has no packed layer: remove "
            "`linear`"
        )
    if form == "int8":
        check_int8(path)
    config.aqn.mxfp4.rollout_weight_format = form
    if ascend:
        with progress_bar("preparing the rollout's base:") as progress:
            served = modelslim_cache(path, cache_dir() / "modelslim", progress, config.aqn.mxfp4.activation)
        OmegaConf.update(actor_rollout, engine, ASCEND, force_add=True)
    elif form == "int8":
        with progress_bar("preparing the rollout's base:") as progress:
            served = int8_cache(path, cache_dir() / "int8", progress)
        OmegaConf.update(actor_rollout, engine, ASCEND, force_add=True)
    elif form == "bf16":
        with progress_bar("preparing the rollout's base:") as progress:
            served = dequantized_cache(path, cache_dir() / "bf16", progress)
    else:
        return
    OmegaConf.update(actor_rollout, f"model.override_config.{SERVED}", str(served), force_add=True)
