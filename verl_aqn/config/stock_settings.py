"""What a stock run may say about its evidence (`+verl_aqn.…`), and which stock runs can be checked at all."""

import os
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError, EnvironmentFault

OPTION = "verl_aqn.stock"
"""verl's `actor_rollout_ref.model.external_lib` of a stock run that is to be checked."""
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
    """The block `verl_aqn` of a stock run's config; with Hydra: `+verl_aqn.on_fault=warn`.

    `dir`: a folder for records; by default the environment variable `VERL_AQN_EVIDENCE`, else a new folder in
    `./verl_aqn_evidence`. `on_fault`: "stop" or "warn". `warn`, `stop`: mean |Δ log-prob| between actor and rollout in
    nats a token, above which a step is warned of, and above which it is a fault.
    """

    dir: str | None = None
    on_fault: str = "stop"
    warn: float = 0.2
    stop: float = 1.0

    def __post_init__(self) -> None:
        if self.on_fault not in ("stop", "warn"):
            raise ConfigError(f"{BLOCK}.on_fault is {self.on_fault!r}: give stop or warn")
        bounds = (self.warn, self.stop)
        if not all(isinstance(one, int | float) for one in bounds) or not 0 < self.warn <= self.stop < float("inf"):
            raise ConfigError(
                f"{BLOCK}.warn is {self.warn} and {BLOCK}.stop {self.stop}: give nats a token, 0 < warn <= stop"
            )

    @property
    def base(self) -> Path:
        """The folder under which the run's own folder is made."""
        if named := self.dir or os.environ.get(DIR_VARIABLE):
            return Path(named).expanduser().absolute()
        return Path(DEFAULT_DIR).absolute() / f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{os.getpid()}"


def parse_settings(config: DictConfig) -> StockSettings:
    """Return the settings of a stock run's config. ConfigError where a key or a value is none."""
    found: Any = OmegaConf.to_container(config[BLOCK], resolve=True) if config.get(BLOCK) else {}
    known = [field.name for field in fields(StockSettings)]
    if unknown := [key for key in found if key not in known]:
        raise ConfigError(f"unknown key {BLOCK}.{unknown[0]}: the keys are {', '.join(known)}")
    return StockSettings(**found)


def is_stock(config: Any) -> bool:
    """Whether a recorded config (plain values) is that of a stock run with evidence."""
    block: Any = config
    for key in ("actor_rollout_ref", "model", "external_lib"):
        block = block.get(key) if isinstance(block, dict) else None
    return OPTION in (block if isinstance(block, list) else [block])


def check_supported(config: DictConfig) -> None:
    """Raise ConfigError, with the key, for a run of which nothing could be proved."""
    model, actor = config.actor_rollout_ref.model, config.actor_rollout_ref.actor
    rollout = config.actor_rollout_ref.rollout
    lora = model.get("lora") or {}
    extension = _extension(rollout) or EXTENSION
    wrong = [
        (config.trainer.v1.trainer_mode != "sync", "trainer.v1.trainer_mode", "sync"),
        (actor.strategy not in ("fsdp", "fsdp2"), "actor_rollout_ref.actor.strategy", "fsdp or fsdp2"),
        (rollout.name != "vllm", "actor_rollout_ref.rollout.name", "vllm"),
        (bool(lora.get("merge")), "actor_rollout_ref.model.lora.merge", "false: merged weights hold no adapter"),
        (model.lora_rank <= 0, "actor_rollout_ref.model.lora_rank", "1 or more: a sync of full weights is not checked"),
        (bool(model.get("target_parameters")), "actor_rollout_ref.model.target_parameters", "null"),
        (bool(rollout.get("quantization")), "actor_rollout_ref.rollout.quantization", "null: its base is rounded anew"),
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
                f"{OPTION} cannot check a run of {key}={OmegaConf.select(config, key)}: set it to {wanted}, or leave "
                "actor_rollout_ref.model.external_lib out"
            )


def adapt(config: DictConfig) -> list[str]:
    """Set in `config` what the checks need and training does not depend on; returns what was changed, to be told."""
    rollout, told = config.actor_rollout_ref.rollout, []
    key = "actor_rollout_ref.rollout"
    if not _extension(rollout):
        OmegaConf.update(config, f"{key}.engine_kwargs.vllm.worker_extension_cls", EXTENSION, force_add=True)
    if not rollout.calculate_log_probs:
        rollout.calculate_log_probs = True
        told.append(f"{key}.calculate_log_probs=true, so that actor and rollout can be compared")
    if "dummy" in rollout.load_format:
        told.append(
            f"{key}.load_format=safetensors in place of {rollout.load_format}, so that its base is seen loading"
        )
        rollout.load_format = "safetensors"
    return told


def _extension(rollout: DictConfig) -> str | None:
    return ((rollout.get("engine_kwargs") or {}).get("vllm") or {}).get("worker_extension_cls")


def model_folder(path: str) -> Path:
    """Return the folder of a model that verl was told as `path`: a folder, or a name of the hub that is cached here."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, local_files_only=True))
    except Exception as error:
        raise EnvironmentFault(
            f"the weights of {path} are in no cache of this node, so that no base can be compared with them: give "
            "actor_rollout_ref.model.path as a folder"
        ) from error
