"""Prepare a run: put its model on disk, and check its settings as far as possible without starting anything."""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cache import cache_dir
from verl_aqn.config.compose import megatron_lora
from verl_aqn.config.noise_settings import order_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import check_activations, check_int8_device, fit_engine, int8_changes, prepare_serving
from verl_aqn.errors import ConfigError, ModelError, first_line
from verl_aqn.preflight.packed_source import settle_rounding
from verl_aqn.preflight.placing import place_adapter
from verl_aqn.preflight.settings import uses_critic
from verl_aqn.preflight.text_part import use_text_alone
from verl_aqn.preflight.vllm_says import ask
from verl_aqn.terminal import progress_bar


def prepare_model(config: DictConfig) -> Path:
    """Make `actor_rollout_ref.model.path` a folder on disk, quantised if the recipe says so, and return the source.

    Raises:
        ModelError: the folder or hub name does not exist, there are no weights, a file cannot be read, or a packed
            folder has changed since this project made it.
        DataError, ModelError: as in `take_adapter` and `settle_rounding`.
    """
    from verl_aqn.checkpoints.cached import check_made, quantized_cache
    from verl_aqn.checkpoints.foreign import foreign_layout
    from verl_aqn.checkpoints.packing import is_packed
    from verl_aqn.checkpoints.storage import read_config
    from verl_aqn.preflight.adapter_folder import check_new_adapter, take_adapter

    refuse_unread(config)
    check_activations(parse_aqn(config))
    check_int8_device(config)
    source = find_model(config)
    settle_rounding(config, source)
    take_adapter(config, source)  # before the base is quantised, which may take minutes
    check_new_adapter(config, source)
    mxfp4 = parse_aqn(config).mxfp4
    path = source
    if mxfp4.enabled and not is_packed(source):
        with progress_bar("packed base:") as progress:  # takes minutes with calibration
            path = quantized_cache(
                source, cache_dir() / "mxfp4", mxfp4.scale_rule, mxfp4.exclude, mxfp4.calibrate, progress,
                (mxfp4.keep.worst, mxfp4.keep.by),
            )  # fmt: skip
    elif mxfp4.enabled:
        with progress_bar("checking the packed base:") as progress:
            check_made(source, progress)
    elif not mxfp4.enabled and foreign_layout(read_config(source), source):
        raise ModelError(f"{source} is an MXFP4 checkpoint, but aqn.mxfp4.enabled=false requires an unquantised base")
    config.actor_rollout_ref.model.path = str(path)
    prepare_serving(config)
    use_text_alone(config, path)
    tell_workers(config)
    answer = ask(config, path)
    place_adapter(config, answer)
    fit_engine(config, answer)
    _bound_context(config.actor_rollout_ref.rollout, path)
    return source


def refuse_unread(config: DictConfig) -> None:
    """Reject settings of verl whose effect this trainer cannot read back from the rollout, or does not support.

    Raises:
        ConfigError: the first such setting.
    """
    rollout, block = config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"
    if "dummy" in str(rollout.load_format):
        # The norms at the start are kept as the clean ones: with random weights, random norms would return after every
        # step.
        raise ConfigError(f"{block}.load_format={rollout.load_format}: vLLM reads the base from disk: set safetensors")
    if rollout.data_parallel_size > 1:
        raise ConfigError(
            f"{block}.data_parallel_size={rollout.data_parallel_size}: only the first of these vLLM engines can "
            "be read back: set 1; verl starts as many replicas as the devices allow"
        )
    if path := OmegaConf.select(config, "trainer.v1.sampler.custom_sampler.path"):
        raise ConfigError(f"trainer.v1.sampler.custom_sampler.path={path}: noise and evidence need verl's own sampler")
    if config.actor_rollout_ref.model.lora.merge:
        # verl would discard the rollout's weights while it sleeps, and then send merged weights in bf16.
        raise ConfigError(
            "actor_rollout_ref.model.lora.merge=true: adapters are sent and read back unmerged: set false"
        )
    refuse_adapter_settings(config)


def refuse_adapter_settings(config: DictConfig) -> None:
    """Reject settings of adapters that the actor does not support, or that contradict each other.

    Raises:
        ConfigError: the first such setting.
    """
    model, block = config.actor_rollout_ref.model, "actor_rollout_ref.model"
    for key, (value, default) in megatron_lora(config).items():
        # The server's slots use lora.rank if it is set, but the actor's adapter uses lora_rank.
        if key not in ("merge", "fully_sharded_loras") and (key, value) != ("rank", model.lora_rank):
            fsdp = {"rank": "lora_rank", "alpha": "lora_alpha", "adapter_path": "lora_adapter_path"}.get(key, key)
            instead = f"set {block}.{fsdp}, and reset this key" if fsdp in model else "reset it"
            raise ConfigError(
                f"{block}.lora.{key}={value} is for Megatron, and the FSDP actor does not read it: {instead} to "
                f"{default}"
            )
    if model.lora_rank > 0 and not (isinstance(model.lora_alpha, int | float) and model.lora_alpha > 0):
        raise ConfigError(f"{block}.lora_alpha={model.lora_alpha} is not a number above 0: adapters are scaled by it")
    if OmegaConf.select(config, "critic.model.lora_adapter_path"):
        raise ConfigError("critic.model.lora_adapter_path: the critic always begins with a new adapter: set null")


def _bound_context(rollout: DictConfig, model: Path) -> None:
    """Set max_model_len if it is null; verl would use the model's whole context, for which vLLM reserves memory.

    The length is one token more than the longest sequence, so that responses can be rescored.
    """
    if rollout.max_model_len is None:
        longest = rollout.prompt_length + rollout.response_length + 1
        rollout.max_model_len = min(longest, positions_of(model) or longest)


def positions_of(model: Path) -> int | None:
    """Return the maximum number of tokens of a model from its config.json, or None if the file does not say."""
    shape = json.loads((model / "config.json").read_text())
    for block in (shape, shape.get("text_config") or {}):
        if (positions := block.get("max_position_embeddings")) is not None:
            return int(positions)
    return None


def find_model(config: DictConfig, *, weights: bool = True) -> Path:
    """Return the folder of the recipe's model. Without `weights`, a model on the hub is downloaded without them.

    Raises:
        ModelError: the name is neither a folder nor a model on the hub.
    """
    from verl_aqn.tasks.smollm2 import embedded_model

    name = str(config.actor_rollout_ref.model.path)
    source = embedded_model(cache_dir() / "models") if name == "embedded" else Path(name).expanduser()
    if source.is_dir():
        # the record of the run is also read from other working directories, for example on a cluster's nodes
        return source.absolute()
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ModelError(
            f"model folder {name} does not exist: set actor_rollout_ref.model.path (MODEL_PATH in the scripts)"
        )
    return _from_hub(name, weights)


def tell_workers(config: DictConfig) -> None:
    """Copy the settings in `aqn` about the model's layers to where verl's actor and vLLM's kernel read them.

    Raises:
        ConfigError: rounded activations need a quantised base, or another key has another rounding; the actor does not
            support its noise; or a packed base has no adapter.
    """
    aqn, actor_rollout = parse_aqn(config), config.actor_rollout_ref
    mxfp4, noise = aqn.mxfp4, aqn.noise
    model = actor_rollout.model
    if mxfp4.enabled and model.lora_rank <= 0:
        # Without an adapter, verl discards the rollout's weights while it sleeps, and then sends others in bf16.
        raise ConfigError("aqn.mxfp4 needs an adapter on the packed base: set actor_rollout_ref.model.lora_rank=32")
    if noise.in_actor:
        if aqn.profile == "npu":
            # verl replaces the forward of its norms for NPU tensors before the noise code measures them on the CPU
            # (npu_patch.py).
            raise ConfigError(
                "aqn.noise.apply_to=rollout+actor is not supported on NPUs: set aqn.noise.apply_to=rollout"
            )
        if actor_rollout.actor.strategy != "fsdp2":
            raise ConfigError(
                f"aqn.noise.apply_to=rollout+actor needs actor.strategy=fsdp2, not {actor_rollout.actor.strategy}"
            )
        OmegaConf.update(actor_rollout, "model.override_config.noise_in_actor", True, force_add=True)
    elif noise.enabled and "norm" in noise.targets and aqn.profile != "npu" and actor_rollout.actor.strategy == "fsdp2":
        # The trainer can then measure the effect of noise once, as a reference for the rollout.
        OmegaConf.update(actor_rollout, "model.override_config.noise_measured", True, force_add=True)
    if keeps_forward(config):
        OmegaConf.update(actor_rollout, "model.override_config.update_keeps_forward", True, force_add=True)
    if mxfp4.cache_dequantized:
        OmegaConf.update(actor_rollout, "model.override_config.mxfp4_cache_dequantized", True, force_add=True)
    if mxfp4.activation == "none":
        return
    if not mxfp4.enabled:
        raise ConfigError(
            f"aqn.mxfp4.activation={mxfp4.activation} needs the quantised base: set aqn.mxfp4.enabled=true"
        )
    activation = mxfp4.activation_arithmetic
    OmegaConf.update(actor_rollout, "model.override_config.mxfp4_activation", activation, force_add=True)
    engine = "rollout.engine_kwargs.vllm"
    if aqn.profile == "cpu":
        key = f"{engine}.additional_config.mxfp4_activation"
        if (given := OmegaConf.select(actor_rollout, key)) not in (None, activation):
            raise ConfigError(
                f"actor_rollout_ref.{key}={given}, but aqn.mxfp4.activation={mxfp4.activation} rounds as {activation} "
                "in actor and rollout: remove the former"
            )
        OmegaConf.update(actor_rollout, key, activation, force_add=True)
    elif OmegaConf.select(actor_rollout, f"{engine}.linear_backend") == "marlin":
        actor_rollout.rollout.engine_kwargs.vllm.linear_backend = "auto"  # Marlin keeps activations in 16 bits


def keeps_forward(config: DictConfig) -> bool:
    """Return whether the update is of the same tokens and weights as the log-probs before it, on one process.

    It is if a batch is one mini-batch of one epoch. With gradient checkpointing there is no graph to keep, and with
    `bypass_mode` no log-probs are computed. A critic is updated in between, and needs the memory.
    """
    actor = config.actor_rollout_ref.actor
    ranks = int(config.trainer.n_gpus_per_node) * int(config.trainer.nnodes)
    bypass = OmegaConf.select(config, "algorithm.rollout_correction.bypass_mode")
    whole = int(actor.ppo_mini_batch_size) == int(config.data.train_batch_size) and int(actor.ppo_epochs) == 1
    alone = ranks == 1 and not uses_critic(config)
    return whole and alone and not bypass and not config.actor_rollout_ref.model.enable_gradient_checkpointing


def untell_workers(config: DictConfig) -> None:
    """Remove from a run's resolved config what `tell_workers` added: an evaluation may need other settings."""
    actor_rollout = config.actor_rollout_ref
    told, engine = actor_rollout.model.override_config, actor_rollout.rollout.engine_kwargs.vllm
    for key in ("noise_in_actor", "noise_measured", "update_keeps_forward", "mxfp4_cache_dequantized"):
        told.pop(key, None)
    if told.pop("mxfp4_activation", None) is None:
        return
    if "additional_config" in engine:
        engine.additional_config.pop("mxfp4_activation", None)
        if not engine.additional_config:
            del engine.additional_config
    if engine.get("linear_backend") == "auto":
        engine.linear_backend = "marlin"  # the value in the profile


def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.txt", "*.model", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        raise ModelError(
            f"{name} is neither a folder nor a model that can be loaded from the hub: {first_line(error)}"
        ) from error


def check_steps(config: DictConfig, train_rows: int, left: str = "") -> int:
    """Return the RL steps of the run: the number in the recipe, or as many as the data allow.

    verl runs `rows // train_batch_size` steps per epoch, whatever group filtering does: a dropped group uses up data
    but no step, and a data loader that reaches its end starts over. So only the number of rows counts, without the
    prompts that verl removes because they are too long. This is called with the rows of the files before a run, and in
    the trainer with the remaining rows (`left` says so in the error message).

    Raises:
        ConfigError: sizes do not fit, or the data have fewer steps than the recipe needs: the run would end before
            its schedule and without its last validation.
    """
    batch, epochs = int(config.data.train_batch_size), int(config.trainer.total_epochs)
    actor = config.actor_rollout_ref.actor
    if batch % actor.ppo_mini_batch_size:
        raise ConfigError(
            f"data.train_batch_size={batch} is not a multiple of actor.ppo_mini_batch_size={actor.ppo_mini_batch_size}"
        )
    filtering = OmegaConf.select(config, "algorithm.filter_groups.enable")
    refilling = OmegaConf.select(config, "trainer.v1.sampler.sync_refill_failed_groups")
    generated = OmegaConf.select(config, "data.gen_batch_size")
    # with either setting, verl draws prompts one by one
    if generated and not (filtering or refilling) and batch % generated:
        raise ConfigError(f"data.train_batch_size={batch} is not a multiple of data.gen_batch_size={generated}")
    groups = config.algorithm.filter_groups
    if groups is not None and (groups.enable or refilling) and groups.max_num_gen_batches <= 0:
        raise ConfigError(
            f"algorithm.filter_groups.max_num_gen_batches={groups.max_num_gen_batches} would draw prompts "
            "without limit if all groups have equal rewards or fail: set it for example to 10"
        )
    available = train_rows // batch * epochs
    wanted = config.trainer.total_training_steps
    steps = int(wanted) if wanted is not None else available
    if steps < 1 or steps > available:
        raise ConfigError(
            f"trainer.total_training_steps={wanted}, but {train_rows} training rows{left} with batch size "
            f"{batch} give {available} steps in {epochs} epoch(s): lower it, or the batch size, or add epochs"
        )
    order_of(parse_aqn(config).noise, schedule_of(config, steps), 0)  # raises the same errors as the first step would
    return steps


def warnings_of(config: DictConfig) -> list[str]:
    """Return warnings about settings that are accepted but do not have the effect that they seem to have."""
    rollout, correction = config.actor_rollout_ref.rollout, config.algorithm.rollout_correction
    left_out = OmegaConf.select(config, "actor_rollout_ref.model.exclude_modules")
    told = [f"no adapter on {left_out}: the recipe, PEFT or vLLM excludes these layers"] if left_out else []
    told += int8_changes(config)
    if config.actor_rollout_ref.model.lora_adapter_path and (
        config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    ):
        told.append("KL is computed against the base without lora_adapter_path: verl disables the whole adapter")
    cut = [f"top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    cut += [f"top_k={rollout.top_k}"] if rollout.top_k > 0 else []
    used = [key for key in ("rollout_is", "rollout_rs", "bypass_mode") if correction and correction.get(key)]
    if not cut:
        return told
    text = f"rollout.{' and '.join(cut)}: the rollout's probabilities are over the tokens that remain after truncation"
    if used:
        biased = f"the importance ratio of rollout_correction.{' and '.join(used)} is biased downwards"
        return [*told, f"{text}, the trainer's over all tokens: {biased}; use top_p=1 and top_k=-1, or correction=none"]
    return [*told, f"{text}: aqn/mismatch/* includes this effect, and noise cannot be separated from kernels"]
