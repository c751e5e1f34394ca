"""The settings of a stock run's evidence (`+verl_aqn.…`), and the check that a stock run can be checked at all."""

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError, EnvironmentFault

OPTION = "verl_aqn.stock"
"""Value of verl's `actor_rollout_ref.model.external_lib` in a stock run that is checked."""
BLOCK = "verl_aqn"
DEFAULT_DIR = "verl_aqn_evidence"
DIR_VARIABLE = "VERL_AQN_EVIDENCE"
EXTENSION = "verl_aqn.integrations.verl.worker_extension.StockWorkerExtension"
NOT_CHECKED = (
    "not checked in a stock run: the order of the data, validations and their scores, rewards and advantages, critic "
    "and reward models, and whether tokens of tools are left out of the loss"
)


@dataclass(frozen=True)
class StockSettings:
    """The block `verl_aqn` of a stock run's config. On Hydra's command line: `+verl_aqn.on_fault=warn`.

    `dir`: a folder for the records. By default this is the value of the environment variable `VERL_AQN_EVIDENCE`, or
    else a new folder in `./verl_aqn_evidence`. `on_fault`: "stop" or "warn". `warn`, `stop`: bounds of the mean
    |Δ log-prob| between actor and rollout, in nats per token. A step above `warn` gives a warning, a step above `stop`
    is a fault.
    """

    dir: str | None = None
    on_fault: str = "stop"
    warn: float = 0.2
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.on_fault not in ("stop", "warn"):
            raise ConfigError(f"{BLOCK}.on_fault is {self.on_fault!r}: set it to stop or warn")
        bounds = (self.warn, self.stop)
        if not all(isinstance(one, int | float) for one in bounds) or not 0 < self.warn <= self.stop < float("inf"):
            raise ConfigError(
                f"{BLOCK}.warn is {self.warn} and {BLOCK}.stop is {self.stop}: set both in nats per token, with "
                "0 < warn <= stop"
            )

    @property
    def base(self) -> Path:
        """Return the folder in which the run's own folder is created."""
        if named := self.dir or os.environ.get(DIR_VARIABLE):
            return Path(named).expanduser().absolute()
        return Path(DEFAULT_DIR).absolute() / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"


def parse_settings(config: DictConfig) -> StockSettings:
    """Return the evidence settings of a stock run's config.

    Raises:
        ConfigError: a key is unknown, or a value is not valid.
    """
    found: Any = OmegaConf.to_container(config[BLOCK], resolve=True) if config.get(BLOCK) else {}
    known = [field.name for field in fields(StockSettings)]
    if unknown := [key for key in found if key not in known]:
        raise ConfigError(f"unknown key {BLOCK}.{unknown[0]}: the keys are {', '.join(known)}")
    return StockSettings(**found)


def is_stock(config: Any) -> bool:
    """Return whether a recorded config (plain values) belongs to a stock run with evidence."""
    block: Any = config
    for key in ("actor_rollout_ref", "model", "external_lib"):
        block = block.get(key) if isinstance(block, dict) else None
    return OPTION in (block if isinstance(block, list) else [block])


def check_supported(config: DictConfig) -> None:
    """Raise ConfigError, with the key to change, for a run that the checks do not support."""
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    rollout = config.actor_rollout_ref.rollout
    lora = model.get("lora") or {}
    extension = _extension(rollout) or EXTENSION
    wrong = [
        (config.trainer.v1.trainer_mode != "sync", "trainer.v1.trainer_mode", "sync"),
        (actor.strategy not in ("fsdp", "fsdp2"), "actor_rollout_ref.actor.strategy", "fsdp or fsdp2"),
        (rollout.name != "vllm", "actor_rollout_ref.rollout.name", "vllm"),
        (bool(lora.get("merge")), "actor_rollout_ref.model.lora.merge", "false: merged weights have no adapter"),
        (model.lora_rank <= 0, "actor_rollout_ref.model.lora_rank", "1 or more: a sync of full weights is not checked"),
        (bool(model.get("target_parameters")), "actor_rollout_ref.model.target_parameters", "null"),
        (bool(rollout.get("quantization")), "actor_rollout_ref.rollout.quantization", "null: vLLM rounds the base"),
        (rollout.data_parallel_size > 1, "actor_rollout_ref.rollout.data_parallel_size", "1"),
        (rollout.pipeline_model_parallel_size > 1, "actor_rollout_ref.rollout.pipeline_model_parallel_size", "1"),
        (bool((rollout.get("disaggregation") or {}).get("enabled")), "actor_rollout_ref.rollout.disaggregation.enabled",
         "false"),
        ("verl_aqn" not in extension, "actor_rollout_ref.rollout.engine_kwargs.vllm.worker_extension_cls",
         f"null, or a subclass of {EXTENSION} with verl_aqn_stock in its name"),
    ]  # fmt: skip
    for is_wrong, key, wanted in wrong:
        if is_wrong:
            raise ConfigError(
                f"{OPTION} cannot check a run with {key}={OmegaConf.select(config, key)}: set it to {wanted}, or "
                "remove actor_rollout_ref.model.external_lib"
            )


def adapt(config: DictConfig) -> list[str]:
    """Change the settings in `config` that the checks need; none of them affects training.

    Returns:
        One line for each change that the user should see.
    """
    rollout, told = config.actor_rollout_ref.rollout, []
    key = "actor_rollout_ref.rollout"
    if not _extension(rollout):
        OmegaConf.update(config, f"{key}.engine_kwargs.vllm.worker_extension_cls", EXTENSION, force_add=True)
    if not rollout.calculate_log_probs:
        rollout.calculate_log_probs = True
        told.append(f"{key}.calculate_log_probs=true, so that log-probs of actor and rollout can be compared")
    if "dummy" in rollout.load_format:
        told.append(
            f"{key}.load_format=safetensors instead of {rollout.load_format}, so that the checks see the base loading"
        )
        rollout.load_format = "safetensors"
    return told


def _extension(rollout: DictConfig) -> str | None:
    return ((rollout.get("engine_kwargs") or {}).get("vllm") or {}).get("worker_extension_cls")


def model_folder(path: str) -> Path:
    """Return the folder of the model `path`: a folder, or a name on the Hugging Face hub that is in the local cache.

    Raises:
        EnvironmentFault: the model is neither a folder nor in the cache of this node.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception as error:
        raise EnvironmentFault(
            f"the weights of {path} are not in the cache of this node, so the base cannot be compared with them: set "
            "actor_rollout_ref.model.path to a folder"
        ) from error
