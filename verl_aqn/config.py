"""The typed `aqn:` block of a recipe, and the composition of recipe, profile and overrides into one config.

This module imports neither torch, verl, vLLM nor Ray: reading and checking a recipe takes a fraction of a second.
"""

import difflib
import json
import math
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from verl_aqn.errors import ConfigError, EnvironmentFault, first_line
from verl_aqn.order import LAYER_KINDS, TARGETS, UNITS, Layers, NoiseOrder
from verl_aqn.overrides import check_overrides
from verl_aqn.schedule import KINDS, SigmaSchedule
from verl_aqn.trackers import LOGGERS
from verl_aqn.verl_keys import check_keys, leaves, reason_against

PROFILES = ("cpu", "cuda", "npu")
EXPERIMENTS = ("embedded", "gsm8k", "none")
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?(\w[\w.]*)(?:,[^${}]*)?\}")  # a value that is copied from another setting
# `${divide:A,B}` in recipes: A / B, rounded down, at least 1. OmegaConf itself has no arithmetic.
OmegaConf.register_new_resolver("divide", lambda a, b: max(1, int(a) // int(b)), replace=True)


@dataclass(frozen=True)
class NoiseConfig:
    """Noise on the weights of the rollout (`aqn.noise`): when (`SigmaSchedule`), where and how much (`NoiseOrder`)."""

    enabled: bool = True
    kind: str = "exponential"
    sigma_start: float = 0.05
    sigma_end: float = 1.0e-5
    # KL(clean || noisy) in nats a token. σ_start is set to the σ with this KL, and σ_end keeps its ratio to it
    # (`verl_aqn.probe`).
    target_kl: float | None = None
    # measure σ_start before a run starts and reject a σ that gives no training signal; needs the model in fp32
    probe: bool = False
    num_stages: int = 10
    epoch_aware: bool = False
    warmup: float | None = None  # a fraction of the steps; null is one stage of the schedule, as in QeRL
    off_from_step: int | None = None  # no noise from this RL step (from 0) on
    unit: str = "absolute"  # "rms" and "multiplicative" are relative to the module's own clean weight
    # also "linear": there, σ of 0.005 and more collapsed training, 0.001 was stable
    targets: tuple[str, ...] = ("norm",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    router_norms: bool = False
    layers: Layers = field(default_factory=Layers)
    apply_to: str = "rollout"  # "rollout+actor": old log-probs and the update use the same noise as the batch's rollout
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target_kl is not None and not 0 < self.target_kl < math.inf:
            raise ConfigError(f"aqn.noise.target_kl is {self.target_kl}: give a number above 0 (nats a token), or null")
        if self.enabled and not self.targets:
            raise ConfigError("aqn.noise.targets is empty: choose from norm and linear, or set aqn.noise.enabled=false")
        if self.in_actor and "linear" in self.targets:
            raise ConfigError(
                "aqn.noise.targets has `linear`, which the actor's packed layers do not support: set "
                "aqn.noise.apply_to=rollout, or targets=[norm]"
            )

    @property
    def in_actor(self) -> bool:
        """Return whether the actor's forward uses the rollout's noise."""
        return self.enabled and self.apply_to == "rollout+actor"


@dataclass(frozen=True)
class Mxfp4Config:
    """The quantised base (`aqn.mxfp4`)."""

    enabled: bool = True
    scale_rule: str = "mse"
    activation: str = "none"  # or "mxfp4": W4A4, activations rounded in both trainer and rollout
    # How an engine with 4-bit activations rounds them; a profile sets what its kernels do.
    activation_scale_rule: str = "even"
    activation_rounding: str = "nearest"
    serve: str = "auto"  # the weight format in the rollout: packed, or bf16 with the same values (`verl_aqn.serving`)
    # the actor keeps 16-bit weights in addition to the packed ones: faster, five times the memory
    keep_dense: bool = False
    exclude: tuple[str, ...] = ("lm_head", "embed_tokens")
    # Calibration texts with which rounding compensates its errors (GPTQ): JSONL files or `embedded`; empty: plain
    # rounding.
    calibrate: tuple[str, ...] = ()

    @property
    def activation_arithmetic(self) -> str:
        """Return `none` for W4A16 or `RULE/ROUNDING` for W4A4, the value that actor and rollout receive and report."""
        return "none" if self.activation == "none" else f"{self.activation_scale_rule}/{self.activation_rounding}"


@dataclass(frozen=True)
class ParityConfig:
    """Limits for the mismatch of trainer and rollout without noise (`aqn.parity`).

    `warn`, `stop`: mean |Δ log-prob| in nats a token, on the same tokens. Above `warn` a step gets a warning; above
    `stop` the run stops before its update (`verl_aqn.verl_api.tripwire`). Healthy models were measured at 0.002 to 0.1.
    """

    rescore: int = 16  # one in this many samples is rescored without noise, to separate noise from kernels; 0: none
    warn: float = 0.2
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.warn <= self.stop:
            raise ConfigError(
                f"aqn.parity.warn is {self.warn:g} and stop {self.stop:g}: give nats a token with 0 < warn <= "
                "stop (inf: no limit)"
            )
        if self.rescore < 0:
            raise ConfigError(f"aqn.parity.rescore is {self.rescore}: give 0 or more; 0 disables it")


@dataclass(frozen=True)
class RunConfig:
    """Where a run is stored, and how it handles faults (`aqn.run`).

    `restarts`: maximum number of automatic restarts after a crash or a hang. `patience`: a phase that takes this many
    times its usual duration counts as a hang; 0 disables this. `allow_failed`: the fraction of the responses of one
    step, or of one validation, whose generation or reward may fail before the run stops.
    """

    dir: str | None = None
    fresh: bool = False
    restarts: int = 0
    patience: float = 10.0
    allow_failed: float = 0.0

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"aqn.run.restarts is {self.restarts}: give 0 or more")
        if not self.patience >= 0:
            raise ConfigError(f"aqn.run.patience is {self.patience}: give 0 or more; 0 disables it")
        if not 0 <= self.allow_failed < 1:
            raise ConfigError(
                f"aqn.run.allow_failed is {self.allow_failed}: give a fraction of responses from 0 to below 1; "
                "0 allows none"
            )


@dataclass(frozen=True)
class AqnConfig:
    """The whole `aqn:` block.

    `seed`: for noise, initial adapters, order of the data, and the rollout's samples. Two runs with the same seed draw
    the same noise, begin with the same adapter and request each response with the same seed, so they differ only
    because of floating-point rounding. Without `request_seeds`, samples depend on the order in which requests reach
    vLLM.
    """

    seed: int = 0
    request_seeds: bool = True
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    mxfp4: Mxfp4Config = field(default_factory=Mxfp4Config)
    parity: ParityConfig = field(default_factory=ParityConfig)
    run: RunConfig = field(default_factory=RunConfig)
    profile: str = "auto"
    experiment: str = "auto"


_CHOICES = {
    "aqn.noise.kind": KINDS,
    "aqn.noise.unit": UNITS,
    "aqn.noise.targets": TARGETS,
    "aqn.noise.layers.kind": LAYER_KINDS,
    "aqn.noise.apply_to": ("rollout", "rollout+actor"),
    "aqn.mxfp4.scale_rule": ("mse", "even", "floor", "rceil"),
    "aqn.mxfp4.activation": ("none", "mxfp4"),
    "aqn.mxfp4.activation_scale_rule": ("mse", "even", "floor", "rceil"),
    "aqn.mxfp4.activation_rounding": ("nearest", "half_away"),
    "aqn.mxfp4.serve": ("auto", "packed", "bf16"),
    "aqn.profile": ("auto", *PROFILES),
    "aqn.experiment": ("auto", *EXPERIMENTS),
}

# verl's own settings that must be integers of at least 1: checks, schedule and trainer calculate with them.
_ROLLOUT = "actor_rollout_ref.rollout"
_COUNTS = (
    "trainer.n_gpus_per_node", "trainer.nnodes", "trainer.total_epochs", "trainer.total_training_steps",
    "data.train_batch_size", "data.gen_batch_size", "data.max_prompt_length", "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size", f"{_ROLLOUT}.n", f"{_ROLLOUT}.val_kwargs.n",
    f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.data_parallel_size", f"{_ROLLOUT}.expert_parallel_size",
    f"{_ROLLOUT}.max_model_len", f"{_ROLLOUT}.max_num_seqs", f"{_ROLLOUT}.max_num_batched_tokens",
)  # fmt: skip
_OR_NULL = ("trainer.total_training_steps", "data.gen_batch_size", f"{_ROLLOUT}.max_model_len")
# Settings for which a number below 1 has a meaning.
_OR_LOWER = {
    "trainer.test_freq": (-1, "the last step only"),
    "trainer.save_freq": (-1, "never"),
    "data.train_max_samples": (-1, "all"),
    "data.val_max_samples": (-1, "all"),
    "actor_rollout_ref.model.lora_rank": (0, "no adapter"),
}

# Names that verl looks up only during a run, and the values that this trainer supports. Only these two engines support
# a packed base (`verl_api.engine`).
STRATEGIES = ("fsdp", "fsdp2")
_NAMES = {
    "trainer.logger": LOGGERS,
    "actor_rollout_ref.actor.strategy": STRATEGIES,
    "critic.strategy": STRATEGIES,
    "trainer.v1.trainer_mode": ("sync",),  # the other modes generate while noise and adapter change
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    f"{_ROLLOUT}.name": ("vllm",),
    "reward.reward_manager.source": ("register", "importlib"),
}
REWARD_MANAGERS = ("dapo", "gdpo", "naive", "rate_limited", "remote")  # the managers in verl's own registry


def nearest(name: str, valid: list[str]) -> str:
    """Return "did you mean 'x'?" with the nearest valid name, or the list of valid names."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def typed(cls: type, raw: Any, where: str) -> Any:
    """Build a dataclass from plain values.

    Raises ConfigError for an unknown key (with the nearest valid one), a wrong type, an invalid choice, or a missing
    key.
    """
    if not isinstance(raw, dict):
        raise ConfigError(f"{where} must be a block of keys, got {raw!r}")
    known, hints = {f.name for f in fields(cls)}, get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        path = f"{where}.{key}" if where else str(key)
        if key not in known:
            raise ConfigError(f"unknown key {path}: {nearest(str(key), list(known))}")
        value = _convert(hints[key], value, path)
        for item in value if isinstance(value, tuple) else (value,):
            if path in _CHOICES and item not in _CHOICES[path]:
                raise ConfigError(f"{path}={item!r} is not one of {', '.join(_CHOICES[path])}")
        values[key] = value
    for one in fields(cls):
        if one.name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{where}.{one.name} is missing".lstrip("."))
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Convert `value` to the annotation `hint` of a field: a block, a list of names or blocks, a number, null."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return typed(hint, value, path)
    options = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or (options[0] is str and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{path} must be a list of {_elements(options[0], path)}, got {value!r}")
        return tuple(_convert(options[0], item, f"{path}[{number}]") for number, item in enumerate(value))
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a block of keys, got {value!r}")
        if numbers := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{path}.{numbers[0]}: quote the name")
        return {key: _convert(options[1], item, f"{path}.{key}") for key, item in value.items()}
    if type(None) in options:
        (kind,) = set(options) - {type(None)}
        return None if value is None else _convert(kind, value, path)
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} must be a {hint.__name__}, got {value!r}")
    return value


def _elements(kind: Any, path: str) -> str:
    """Describe the elements of a list at `path` in words."""
    if path.rpartition(".")[2] == "overrides":
        return "key=value"
    return "lists" if get_origin(kind) is tuple else {str: "names", int: "whole numbers"}.get(kind, "blocks")


def parse_aqn(config: DictConfig | dict) -> AqnConfig:
    """Read the `aqn:` block of a composed config.

    Raises:
        ConfigError: a key does not exist (the message has the nearest valid key), a value has the wrong type,
            or a choice is not available.
    """
    block = (config if OmegaConf.is_config(config) else OmegaConf.create(config)).get("aqn")
    if block is None:
        raise ConfigError("the config has no aqn: block; the defaults of a recipe must start with `base`")
    return typed(AqnConfig, OmegaConf.to_container(block, resolve=True), "aqn")


def check_numbers(config: DictConfig) -> None:
    """Check the numbers in verl's blocks that verl or our checks calculate with.

    Raises ConfigError for the first fault.
    """
    for key in (*_COUNTS, *_OR_LOWER):
        value = OmegaConf.select(config, key, default=1)  # records of older versions lack some of these keys
        if value is None and key in _OR_NULL:
            continue
        lowest, meaning = _OR_LOWER.get(key, (1, ""))
        if type(value) is not int or value < lowest:
            other = f", or {lowest} for {meaning}" if meaning else ""
            shown = "null" if value is None else value
            raise ConfigError(f"{key}={shown}: give an integer of 1 or more{other}")


def check_names(config: DictConfig) -> None:
    """Check those names in verl's blocks whose valid values are all known. Raises ConfigError for the first fault."""
    for key, known in _NAMES.items():
        value = OmegaConf.select(config, key, default=known[0])
        for name in value if OmegaConf.is_list(value) else [value]:
            if name not in known:
                raise ConfigError(f"{key} has {name!r}: {nearest(str(name), list(known))}")
    manager = OmegaConf.select(config, "reward.reward_manager")
    if manager and manager.source == "register" and manager.name not in REWARD_MANAGERS:
        hint = nearest(str(manager.name), list(REWARD_MANAGERS))
        raise ConfigError(
            f"reward.reward_manager.name has {manager.name!r}: {hint}; your own manager needs "
            "reward.reward_manager.source=importlib and reward.reward_manager.module.path=FILE"
        )


def schedule_of(config: DictConfig | dict, total_steps: int) -> SigmaSchedule:
    """Return the schedule of σ over `total_steps` RL steps. If noise is disabled, σ is 0 at every step."""
    noise = parse_aqn(config).noise
    epochs = int(OmegaConf.select(OmegaConf.create(config), "trainer.total_epochs") or 1)
    return SigmaSchedule(
        sigma_start=noise.sigma_start if noise.enabled else 0.0,
        sigma_end=noise.sigma_end if noise.enabled else 0.0,
        num_stages=noise.num_stages,
        total_steps=total_steps,
        kind=noise.kind if noise.enabled else "constant",
        epoch_aware=noise.epoch_aware and noise.enabled,
        epochs=epochs,
        warmup=noise.warmup,
        off_from_step=noise.off_from_step if noise.enabled else None,
    )


def order_of(noise: NoiseConfig, schedule: SigmaSchedule, step: int) -> NoiseOrder:
    """Return the complete noise specification of RL step `step` (from 0), so that no process needs its own config."""
    if not noise.enabled:
        return NoiseOrder(step, noise.seed, 0.0, noise.unit, targets=())
    return NoiseOrder(
        step=step,
        seed=noise.seed,
        sigma=schedule.sigma(step),
        unit=noise.unit,
        targets=noise.targets,
        include=noise.include,
        exclude=noise.exclude,
        router_norms=noise.router_norms,
        layers=noise.layers,
        share=step / schedule.total_steps,
    )


def recipe_dirs() -> list[Path]:
    """Return the folders in which a recipe name is looked up: of the installed package or of the checkout."""
    package = Path(__file__).resolve().parent
    return [path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()]


def recipe_names() -> list[str]:
    """Return the names of the recipes in the package."""
    return sorted(p.stem for folder in recipe_dirs() for p in folder.glob("*.yaml") if p.stem != "base")


def plan_names() -> list[str]:
    """Return the names of the plans in the package."""
    return sorted(p.stem for folder in recipe_dirs() for p in folder.glob("plans/*.yaml"))


def find_recipe(recipe: str, *, plans: bool = True) -> Path:
    """Return the file of a recipe or plan, given by path or by name.

    `plans`: whether the suggestions in an error message include plans.
    """
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        path = Path(recipe).expanduser()
        if path.suffix != ".yaml":  # Hydra finds no other ending
            raise ConfigError(f"no recipe file {recipe}: the name of a recipe must end in .yaml")
        if not path.is_file():
            raise ConfigError(f"no recipe file {recipe}")
        return path.resolve()
    for path in (folder / place / f"{recipe}.yaml" for folder in recipe_dirs() for place in ("", "plans")):
        if path.is_file():
            return path
    raise ConfigError(f"no recipe {recipe!r}: {nearest(recipe, [*recipe_names(), *(plan_names() if plans else ())])}")


def read_yaml(path: Path) -> Any:
    """Return the content of a recipe's or plan's file. Raises ConfigError if it is not YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: it is not UTF-8 ({first_line(error)}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {first_line(error)}") from error


def _refuse_plan(recipe: str, raw: Any) -> None:
    if not isinstance(raw, dict) or "arms" not in raw:
        return
    arms = raw["arms"].values() if isinstance(raw["arms"], dict) else ()
    recipes = dict.fromkeys(str(arm["recipe"]) for arm in arms if isinstance(arm, dict) and "recipe" in arm)
    raise ConfigError(
        f"{recipe} is a plan: run `verl-aqn train {recipe}`; this command needs a single recipe"
        + (f" (its arms: {', '.join(recipes)})" if recipes else "")
    )


def detect_profile() -> str:
    """Return `npu` or `cuda` if the tool of such a device runs successfully, else `cpu`."""
    for tool, profile in (("npu-smi", "npu"), ("nvidia-smi", "cuda")):
        if shutil.which(tool) and subprocess.run([tool], capture_output=True, check=False).returncode == 0:
            return profile
    return "cpu"


def _verl_config_dir() -> Path:
    # find_spec of a top-level package does not import it; importing verl takes seconds.
    spec = find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        raise EnvironmentFault("verl is not installed: run `bash scripts/setup.sh`")
    return Path(spec.submodule_search_locations[0]) / "trainer" / "config"


def megatron_lora(config: DictConfig) -> dict[str, tuple[Any, Any]]:
    """Return the settings that a recipe changes in `actor_rollout_ref.model.lora`: {key: (value, verl's default)}.

    verl uses this block for Megatron.
    """
    block: Any = OmegaConf.load(_verl_config_dir() / "model" / "hf_model.yaml").lora
    lora = config.actor_rollout_ref.model.lora
    return {key: (value, block.get(key)) for key, value in lora.items() if value != block.get(key)}


def load_recipe(recipe: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose recipe + profile + experiment + overrides, and check the `aqn:` block.

    `profile=`, `experiment=` and `correction=` among the overrides select those files. Otherwise the recipe's file may
    name profile and experiment (`aqn.profile`, `aqn.experiment`). If it does not, the profile is detected, the
    experiment is `embedded` on a CPU and `gsm8k` on accelerators, and the rollout correction is the recipe's own. All
    other overrides are Hydra overrides. The recipe's file takes precedence over profile and experiment.

    Raises: ConfigError: the recipe, a key, or a value does not exist or is invalid.
    """
    path = find_recipe(recipe, plans=False)
    raw = read_yaml(path)
    _refuse_plan(recipe, raw)
    profile, experiment, groups, rest = _groups(overrides or [])
    check_overrides(rest)
    _refuse_open(path, raw, rest)
    try:
        config = _compose(path, [*groups, *rest])
        _check_base(config, path)
        check_names(config)  # first, because another engine adds keys that are unknown here
        check_keys(config, _plain(find_recipe("base"), *groups))
        _check_keys(config, path, groups, rest)
        parse_aqn(config)
        check_numbers(config)
    except (HydraException, OmegaConfBaseException) as error:
        if "Could not override 'profile'" in str(error):  # the group is defined in `base`
            raise _without_base(path) from error
        raise ConfigError(f"{path.name}: {_hydra_message(error, path, groups)}") from error
    # The value comes from the recipe's file, or from a file that it builds on.
    for key, used in (("profile", profile), ("experiment", experiment)):
        said, asked = config.aqn.get(key, "auto"), (f"{key}=", f"aqn.{key}=")
        if said not in ("auto", used) and not any(o.startswith(asked) for o in overrides or []):
            return load_recipe(recipe, [f"{key}={said}", *(overrides or [])])
    OmegaConf.update(config, "aqn.profile", profile)
    for key, count in _workers(int(config.trainer.nnodes)).items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, count)
    with open_dict(config):
        del config.aqn.experiment  # everything from the experiment is in the config now
    if config.trainer.experiment_name is None:
        config.trainer.experiment_name = path.stem
    return config


def _workers(nodes: int) -> dict[str, int]:
    """Return the number of processes of each kind that verl distributes over nodes, for keys that are not set."""
    return {
        "actor_rollout_ref.rollout.agent.num_workers": 8 * nodes,
        "reward.num_workers": 8 * nodes,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": max(8, 2 * nodes),
    }


def _refuse_open(path: Path, raw: Any, overrides: list[str]) -> None:
    """Raise ConfigError if a recipe has `???` that no override sets; OmegaConf would keep the value from before."""
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for key, value in leaves(raw) if isinstance(raw, dict) else ():
        if value == "???" and key not in given:
            raise ConfigError(f"{path.name} has no value for {key} (???): set it")


def _groups(overrides: list[str]) -> tuple[str, str, list[str], list[str]]:
    """Split overrides: names of profile and experiment, Hydra's overrides that select these files, and the rest.

    A correction is selected in the same way.
    """
    chosen: dict[str, str | None] = {"profile": "auto", "experiment": None, "correction": None}
    rest = []
    for override in overrides:
        key, sep, value = override.partition("=")
        if not key or not sep:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        if key == "seeds":
            raise ConfigError("seeds= is for plans; for a recipe, set for example aqn.seed=0")
        key = key.removeprefix("aqn.") if key in ("aqn.profile", "aqn.experiment") else key
        if key in chosen:
            chosen[key] = value
        else:
            rest.append(override)
    profile = chosen["profile"] if chosen["profile"] not in (None, "auto") else detect_profile()
    usual = "embedded" if profile == "cpu" else "gsm8k"
    experiment = chosen["experiment"] if chosen["experiment"] not in (None, "auto") else usual
    conf = Path(__file__).resolve().parent / "conf"
    groups = []
    for group, name in (("profile", profile), ("experiment", experiment), ("correction", chosen["correction"])):
        if name is None:
            continue
        names = [p.stem for p in (conf / group).glob("*.yaml")]
        if name not in names:
            raise ConfigError(f"no {group} {name!r}: {nearest(name, names)}")
        # `base` includes the first two below the recipe's file; a correction is applied on top of the recipe.
        groups.append(f"+{group}={name}" if group == "correction" else f"{group}={name}")
    return profile, experiment, groups, rest


def _check_base(config: DictConfig, path: Path) -> None:
    """Check that a recipe builds on `base`; profile and experiment define only a part of these blocks."""
    if "profile" not in (config.get("aqn") or {}) or "project_name" not in (config.get("trainer") or {}):
        raise _without_base(path)


def _without_base(path: Path) -> ConfigError:
    return ConfigError(f"{path.name} does not build on `base`: start it with `defaults: [base, _self_]`")


def _check_keys(config: DictConfig, path: Path, groups: list[str], overrides: list[str]) -> None:
    """Check that every key in a recipe's file exists: Hydra checks the keys of overrides, but not those of the file.

    A block that is empty or null in verl or `base` may contain any key, as may arguments of a class (`…_kwargs`), and
    an override with + may add any key. `aqn` is checked by its types.
    """
    known, verls = _plain(find_recipe("base"), *groups), compose_verl()
    added = [override.lstrip("+").partition("=")[0] for override in overrides if override.startswith("+")]
    for key in _dotted(OmegaConf.to_container(config)):
        if key.startswith("aqn.") or "_kwargs." in key or any(_within(key, one) or _within(one, key) for one in added):
            continue
        if not _has(known, key.split(".")) and not _has(verls, key.split(".")):
            raise ConfigError(f"{path.name}: {unknown_key(key, known)}")


@cache
def _plain(path: Path, *groups: str) -> Any:
    return OmegaConf.to_container(_compose(path, list(groups)))


def compose_verl() -> Any:
    """Return verl's own defaults as a plain dict, with unresolved interpolations. The result must not be modified."""
    return _plain(_verl_config_dir() / "ppo_trainer.yaml")


def compose_base(profile: str | None) -> Any:
    """Return `base` as a plain dict, with or without a profile. The result must not be modified."""
    return _plain(find_recipe("base"), *([f"profile={profile}"] if profile else []))


def _within(key: str, block: str) -> bool:
    return f"{key}.".startswith(f"{block}.")


def _has(block: Any, key: list[str]) -> bool:
    if not key or block in (None, {}, []):
        return True
    return isinstance(block, dict) and key[0] in block and _has(block[key[0]], key[1:])


def unknown_key(key: str, known: Any) -> str:
    """Return the message for a key that `known` does not have, with the nearest valid key."""
    if reason := reason_against(key):
        return f"unknown key {key}: {reason}"
    *parents, name = key.split(".")
    block = known
    for parent in parents:
        block = block.get(parent) if isinstance(block, dict) else None
    siblings = [str(one) for one in (block or ())]
    elsewhere = [one for one in _dotted(known) if one.rpartition(".")[2] == name]
    if elsewhere and not difflib.get_close_matches(name, siblings):
        return f"unknown key {key}: did you mean {' or '.join(elsewhere[:4])}?"
    return f"unknown key {key}: {nearest(name, siblings)}"


def _compose(path: Path, overrides: list[str]) -> DictConfig:
    folders = [Path(__file__).resolve().parent / "conf", _verl_config_dir(), *recipe_dirs()]
    searchpath = ",".join(json.dumps(f"file://{folder}", ensure_ascii=False) for folder in folders)
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=str(path.parent), version_base=None):
        return compose(config_name=path.stem, overrides=[f"hydra.searchpath=[{searchpath}]", *overrides])


def _hydra_message(error: Exception, path: Path, groups: list[str]) -> str:
    """Return one line of Hydra's message; for a key that does not exist, with the nearest valid key."""
    cause = error.__cause__ or error.__context__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    key = next((line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")), "")
    if "is not in struct" in lines[0] and key:
        config = _compose(path, groups)
        _check_base(config, path)
        return unknown_key(key, OmegaConf.to_container(config))
    return lines[0] + (f" ({key})" if key and key not in lines[0] else "")


@cache
def followers(recipe: str, profile: str) -> dict[str, str]:
    """Return the settings of `recipe`, with either experiment, that copy another setting, with the key of that setting.

    A run's config.yaml is resolved and no longer contains this.
    """
    found = {}
    for experiment in ("embedded", "gsm8k"):
        raw: Any = OmegaConf.to_container(load_recipe(recipe, [f"profile={profile}", f"experiment={experiment}"]))
        for key in _dotted(raw):
            value = reduce(lambda block, part: block[part], key.split("."), raw)
            if isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
                found[key] = match[1]
    return found


def _dotted(block: Any, prefix: str = "") -> Iterator[str]:
    """Yield all dotted keys, including those of blocks."""
    for key, value in block.items() if isinstance(block, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted(value, f"{prefix}{key}.")
