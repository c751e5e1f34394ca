"""Before a run: its model as files, and every check of its settings that can be made without starting anything."""

import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_aqn.cache import cache_dir
from verl_aqn.config.compose import megatron_lora
from verl_aqn.config.noise_settings import order_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.config.serving import fit_engine, prepare_serving
from verl_aqn.errors import ConfigError, ModelError, first_line
from verl_aqn.preflight.placing import place_adapter
from verl_aqn.preflight.text_part import use_text_alone
from verl_aqn.preflight.vllm_says import ask
from verl_aqn.terminal import progress_bar


def prepare_model(config: DictConfig) -> Path:
    """Make `actor_rollout_ref.model.path` a folder on disk, quantised if the recipe says so. Returns the source.

    Raises:
        ModelError: no such folder or hub name, no weights, a file that cannot be read, a packed folder that is no
            longer what it was when this project made it.
        DataError, ModelError: as `take_adapter`.
    """
    from verl_aqn.checkpoints.cached import check_made, quantized_cache
    from verl_aqn.checkpoints.foreign import foreign_layout
    from verl_aqn.checkpoints.packing import is_packed
    from verl_aqn.checkpoints.storage import read_config
    from verl_aqn.preflight.adapter_folder import check_new_adapter, take_adapter

    refuse_unread(config)
    source = find_model(config)
    take_adapter(config, source)  # before the base is quantised, which may take minutes
    check_new_adapter(config, source)
    mxfp4 = parse_aqn(config).mxfp4
    path = source
    if mxfp4.enabled and not is_packed(source):
        with progress_bar("packed base:") as progress:  # minutes where it is calibrated
            path = quantized_cache(
                source, cache_dir() / "mxfp4", mxfp4.scale_rule, mxfp4.exclude, mxfp4.calibrate, progress
            )
    elif mxfp4.enabled:
        with progress_bar("checking the packed base:") as progress:
            check_made(source, progress)
    elif not mxfp4.enabled and foreign_layout(read_config(source), source):
        raise ModelError(f"{source} is an MXFP4 checkpoint, but aqn.mxfp4.enabled=false asks for an unquantised base")
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
    """What verl can do but this trainer could not read back from the rollout, or would not do.

    Raises:
        ConfigError: the first such setting.
    """
    rollout, block = config.actor_rollout_ref.rollout, "actor_rollout_ref.rollout"
    if "dummy" in str(rollout.load_format):
        # The norms that are kept as clean are those of the start: random ones would come back after every step.
        raise ConfigError(f"{block}.load_format={rollout.load_format}: vLLM reads the base from disk: set safetensors")
    if rollout.data_parallel_size > 1:
        raise ConfigError(
            f"{block}.data_parallel_size={rollout.data_parallel_size}: vLLM answers for the first such engine only, "
            "and the others could not be read back: set 1; verl starts as many replicas as there are devices for"
        )
    if path := OmegaConf.select(config, "trainer.v1.sampler.custom_sampler.path"):
        raise ConfigError(f"trainer.v1.sampler.custom_sampler.path={path}: noise and evidence need verl's own sampler")
    if config.actor_rollout_ref.model.lora.merge:
        # verl would let the rollout discard its weights in its sleep, and send merged ones in bf16 for them.
        raise ConfigError(
            "actor_rollout_ref.model.lora.merge=true: the adapter is sent and read back as one: set false"
        )
    refuse_adapter_settings(config)


def refuse_adapter_settings(config: DictConfig) -> None:
    """What a recipe says of adapters that the actor does not do, or that contradicts itself.

    Raises:
        ConfigError: the first such setting.
    """
    model, block = config.actor_rollout_ref.model, "actor_rollout_ref.model"
    for key, (value, default) in megatron_lora(config).items():
        # The server's slots are of lora.rank where that is set, and the actor's adapter is of lora_rank.
        if key not in ("merge", "fully_sharded_loras") and (key, value) != ("rank", model.lora_rank):
            fsdp = {"rank": "lora_rank", "alpha": "lora_alpha", "adapter_path": "lora_adapter_path"}.get(key, key)
            instead = f"set {block}.{fsdp}, and this back" if fsdp in model else "set it back"
            raise ConfigError(
                f"{block}.lora.{key}={value} is for Megatron, the FSDP actor does not read it: {instead} to {default}"
            )
    if model.lora_rank > 0 and not (isinstance(model.lora_alpha, int | float) and model.lora_alpha > 0):
        raise ConfigError(f"{block}.lora_alpha={model.lora_alpha} is not a number above 0: adapters are scaled by it")
    if OmegaConf.select(config, "critic.model.lora_adapter_path"):
        raise ConfigError("critic.model.lora_adapter_path: the critic begins with an adapter of its own: set null")


def _bound_context(rollout: DictConfig, model: Path) -> None:
    """Of a null max_model_len verl makes the model's whole context, for which vLLM sets memory aside.

    One token more than answers are long leaves room for scoring them again.
    """
    if rollout.max_model_len is None:
        longest = rollout.prompt_length + rollout.response_length + 1
        rollout.max_model_len = min(longest, positions_of(model) or longest)


def positions_of(model: Path) -> int | None:
    """Return the most tokens that a model's positions are for, by its config.json; None where that does not say."""
    shape = json.loads((model / "config.json").read_text())
    for block in (shape, shape.get("text_config") or {}):
        if (positions := block.get("max_position_embeddings")) is not None:
            return int(positions)
    return None


def find_model(config: DictConfig, *, weights: bool = True) -> Path:
    """The folder of the model that a recipe names. Without `weights` a hub's model is fetched without them.

    Raises:
        ModelError: neither a folder nor a hub name.
    """
    from verl_aqn.tasks.smollm2 import embedded_model

    name = str(config.actor_rollout_ref.model.path)
    source = embedded_model(cache_dir() / "models") if name == "embedded" else Path(name).expanduser()
    if source.is_dir():
        return source.absolute()  # who reads the run's record stands elsewhere, as a cluster's nodes do
    if name.count("/") != 1 or name.startswith((".", "~", "/")):
        raise ModelError(f"no model folder {name}: set actor_rollout_ref.model.path (MODEL_PATH in the scripts)")
    return _from_hub(name, weights)


def tell_workers(config: DictConfig) -> None:
    """Put what `aqn` says of the model's layers where verl's actor and vLLM's kernel look for it.

    Raises:
        ConfigError: 4-bit activations are asked for without a quantised base, noise in an actor that cannot have it,
            or a packed base without an adapter.
    """
    aqn, actor_rollout = parse_aqn(config), config.actor_rollout_ref
    mxfp4, noise = aqn.mxfp4, aqn.noise
    model = actor_rollout.model
    if mxfp4.enabled and model.lora_rank <= 0:
        # Without one verl lets the rollout discard its weights in its sleep, and sends others in bf16 for them.
        raise ConfigError("aqn.mxfp4 needs an adapter beside the packed base: set actor_rollout_ref.model.lora_rank=32")
    if noise.in_actor:
        if aqn.profile == "npu":
            # verl gives its norms a forward for NPU tensors before noise looks at them on the CPU (npu_patch.py).
            raise ConfigError("aqn.noise.apply_to=rollout+actor cannot be had on NPUs: set aqn.noise.apply_to=rollout")
        if actor_rollout.actor.strategy != "fsdp2":
            raise ConfigError(
                f"aqn.noise.apply_to=rollout+actor needs actor.strategy=fsdp2, not {actor_rollout.actor.strategy}"
            )
        OmegaConf.update(actor_rollout, "model.override_config.noise_in_actor", True, force_add=True)
    elif noise.enabled and "norm" in noise.targets and aqn.profile != "npu" and actor_rollout.actor.strategy == "fsdp2":
        # So that the trainer can measure once what noise does, and the rollout be held against that.
        OmegaConf.update(actor_rollout, "model.override_config.noise_measured", True, force_add=True)
    if mxfp4.keep_dense:
        OmegaConf.update(actor_rollout, "model.override_config.mxfp4_keep_dense", True, force_add=True)
    if mxfp4.activation == "none":
        return
    if not mxfp4.enabled:
        raise ConfigError("aqn.mxfp4.activation=mxfp4 needs the quantised base: set aqn.mxfp4.enabled=true")
    activation = mxfp4.activation_arithmetic
    OmegaConf.update(actor_rollout, "model.override_config.mxfp4_activation", activation, force_add=True)
    engine = "rollout.engine_kwargs.vllm"
    if aqn.profile == "cpu":
        OmegaConf.update(actor_rollout, f"{engine}.additional_config.mxfp4_activation", activation, force_add=True)
    elif OmegaConf.select(actor_rollout, f"{engine}.linear_backend") == "marlin":
        actor_rollout.rollout.engine_kwargs.vllm.linear_backend = "auto"  # Marlin leaves activations in 16 bits


def untell_workers(config: DictConfig) -> None:
    """Take out of a run's resolved config what `tell_workers` put in: an evaluation of it may have to be told less."""
    actor_rollout = config.actor_rollout_ref
    told, engine = actor_rollout.model.override_config, actor_rollout.rollout.engine_kwargs.vllm
    for key in ("noise_in_actor", "noise_measured", "mxfp4_keep_dense"):
        told.pop(key, None)
    if told.pop("mxfp4_activation", None) is None:
        return
    if "additional_config" in engine:
        engine.additional_config.pop("mxfp4_activation", None)
        if not engine.additional_config:
            del engine.additional_config
    if engine.get("linear_backend") == "auto":
        engine.linear_backend = "marlin"  # as the profile has it


def _from_hub(name: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download

    files = ["*.json", "*.txt", "*.model", "*.jinja"] + ["*.safetensors"] * weights
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:
        raise ModelError(f"{name} is neither a folder nor a model that the hub gives: {first_line(error)}") from error


def check_steps(config: DictConfig, train_rows: int, left: str = "") -> int:
    """The RL steps that the run will take: those that the recipe states, or as many as the data have.

    verl ends a run after `rows // train_batch_size` steps an epoch, whatever group filtering did: a group that it drops
    costs data and not a step, and a loader that has come to its end starts over. So only the rows count, but those that
    verl keeps: prompts that are too long go. Called with the rows of the files before a run, and in the trainer with
    those that are left (`left` says so in the error).

    Raises:
        ConfigError: sizes that do not fit, or fewer steps in the data than the recipe wants: the run would end
            before its schedule and without its last validation.
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
    if generated and not (filtering or refilling) and batch % generated:  # with either, verl draws one by one
        raise ConfigError(f"data.train_batch_size={batch} is not a multiple of data.gen_batch_size={generated}")
    groups = config.algorithm.filter_groups
    if groups is not None and (groups.enable or refilling) and groups.max_num_gen_batches <= 0:
        raise ConfigError(
            f"algorithm.filter_groups.max_num_gen_batches={groups.max_num_gen_batches} would draw prompts for ever "
            "where no group's rewards differ, or all fail: set it to 10, say"
        )
    available = train_rows // batch * epochs
    wanted = config.trainer.total_training_steps
    steps = int(wanted) if wanted is not None else available
    if steps < 1 or steps > available:
        raise ConfigError(
            f"trainer.total_training_steps={wanted}, but {train_rows} training rows{left} at batch {batch} give "
            f"{available} steps in {epochs} epoch(s): lower it, or the batch, or add epochs"
        )
    order_of(parse_aqn(config).noise, schedule_of(config, steps), 0)  # what the first order would say is wrong
    return steps


def warnings_of(config: DictConfig) -> list[str]:
    """What a recipe asks for that runs but does not do what it seems to."""
    rollout, correction = config.actor_rollout_ref.rollout, config.algorithm.rollout_correction
    left_out = OmegaConf.select(config, "actor_rollout_ref.model.exclude_modules")
    told = [f"no adapter on {left_out}: the recipe, PEFT or vLLM leaves these layers out"] if left_out else []
    if config.actor_rollout_ref.model.lora_adapter_path and (
        config.actor_rollout_ref.actor.use_kl_loss or config.algorithm.use_kl_in_reward
    ):
        told.append("KL is taken against the base without lora_adapter_path: verl switches the whole adapter off")
    cut = [f"top_p={rollout.top_p:g}"] if rollout.top_p < 1 else []
    cut += [f"top_k={rollout.top_k}"] if rollout.top_k > 0 else []
    used = [key for key in ("rollout_is", "rollout_rs", "bypass_mode") if correction and correction.get(key)]
    if not cut:
        return told
    text = f"rollout.{' and '.join(cut)}: the rollout's probabilities are of the tokens that sampling left over"
    if used:
        biased = f"the importance ratio of rollout_correction.{' and '.join(used)} is biased downwards"
        return [*told, f"{text}, the trainer's of all: {biased}; use top_p=1 and top_k=-1, or correction=none"]
    return [*told, f"{text}: aqn/parity/* contains that, and noise is not told from kernels"]
