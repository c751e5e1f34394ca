"""The `aqn:` block of a recipe, typed; and how a recipe, a profile and overrides become one config.

Imports neither torch, verl, vLLM nor Ray: reading and checking a recipe takes a fraction of a second.
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
_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?(\w[\w.]*)(?:,[^${}]*)?\}")  # a value that is another setting's
# `${divide:A,B}` in recipes: A / B, rounded down, at least 1. OmegaConf itself does not calculate.
OmegaConf.register_new_resolver("divide", lambda a, b: max(1, int(a) // int(b)), replace=True)


@dataclass(frozen=True)
class NoiseConfig:
    """Noise on the weights of the rollout (`aqn.noise`): when (`SigmaSchedule`), where and how much (`NoiseOrder`)."""

    enabled: bool = True
    kind: str = "exponential"
    sigma_start: float = 0.05
    sigma_end: float = 1.0e-5
    # KL(clean || noisy) in nats a token: σ_start becomes what has it, σ_end keeps its ratio (`verl_aqn.probe`).
    target_kl: float | None = None
    probe: bool = False  # measure σ_start before a run starts and refuse what teaches nothing; holds the model in fp32
    num_stages: int = 10
    epoch_aware: bool = False
    warmup: float | None = None  # a share of the steps; null is one stage of the schedule, as QeRL has it
    off_from_step: int | None = None  # no noise from this RL step (from 0) on
    unit: str = "absolute"  # "rms" and "multiplicative" are in units of the module's own clean weight
    targets: tuple[str, ...] = ("norm",)  # and "linear": σ of 0.005 and more collapsed training there, 0.001 was stable
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    router_norms: bool = False
    layers: Layers = field(default_factory=Layers)
    apply_to: str = "rollout"  # "rollout+actor": old log-probs and the update see the noise of the batch's rollout
    seed: int = 0

    def __post_init__(self) -> None:
        if self.target_kl is not None and not 0 < self.target_kl < math.inf:
            raise ConfigError(f"aqn.noise.target_kl is {self.target_kl}: give a number above 0 (nats a token), or null")
        if self.enabled and not self.targets:
            raise ConfigError("aqn.noise.targets is empty: choose from norm, linear, or set aqn.noise.enabled=false")
        if self.in_actor and "linear" in self.targets:
            raise ConfigError(
                "aqn.noise.targets has `linear`, which the actor's packed layers cannot carry: set "
                "aqn.noise.apply_to=rollout, or targets=[norm]"
            )

    @property
    def in_actor(self) -> bool:
        """Whether the actor's forward has the rollout's noise."""
        return self.enabled and self.apply_to == "rollout+actor"


@dataclass(frozen=True)
class Mxfp4Config:
    """The quantised base (`aqn.mxfp4`)."""

    enabled: bool = True
    scale_rule: str = "mse"
    activation: str = "none"  # or "mxfp4": W4A4, activations rounded in trainer and rollout alike
    # How an engine with 4-bit activations rounds them; a profile says what its kernels do.
    activation_scale_rule: str = "even"
    activation_rounding: str = "nearest"
    serve: str = "auto"  # the form in the rollout: packed, or bf16 with the same values (`verl_aqn.serving`)
    keep_dense: bool = False  # the actor keeps 16-bit weights beside the packed ones: faster, five times the memory
    exclude: tuple[str, ...] = ("lm_head", "embed_tokens")
    # Texts on which rounding makes up for its errors (GPTQ): JSONL files or `embedded`; none: plain rounding.
    calibrate: tuple[str, ...] = ()

    @property
    def activation_arithmetic(self) -> str:
        """`none` for W4A16, `RULE/ROUNDING` for W4A4: what actor and rollout are told, and what they answer."""
        return "none" if self.activation == "none" else f"{self.activation_scale_rule}/{self.activation_rounding}"


@dataclass(frozen=True)
class ParityConfig:
    """How far trainer and rollout without noise may be apart (`aqn.parity`).

    `warn`, `stop`: mean |Δ log-prob| in nats a token, on the same tokens, above which a step is warned of, and above
    which the run stops before it updates (`verl_aqn.verl_api.tripwire`). Healthy models were measured at 0.002 to 0.1.
    """

    rescore: int = 16  # one in so many samples is scored again without noise, to tell noise from kernels; 0: none
    warn: float = 0.2
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.warn <= self.stop:
            raise ConfigError(
                f"aqn.parity.warn is {self.warn:g} and stop {self.stop:g}: give nats a token, 0 < warn <= stop "
                "(inf: no limit)"
            )
        if self.rescore < 0:
            raise ConfigError(f"aqn.parity.rescore is {self.rescore}: give 0 or more, 0 for none")


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives, and what becomes of it in trouble (`aqn.run`).

    `restarts`: how often a run that lost a process, or hung, is resumed by itself. `patience`: a phase that takes so
    many times its usual hangs; 0: none does. `allow_failed`: the share of the answers of one step, or of one
    validation, whose generation or reward may fail before the run stops.
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
            raise ConfigError(f"aqn.run.patience is {self.patience}: give 0 or more, 0 for never")
        if not 0 <= self.allow_failed < 1:
            raise ConfigError(
                f"aqn.run.allow_failed is {self.allow_failed}: give a share of answers from 0 to below 1, 0 for none"
            )


@dataclass(frozen=True)
class TargetConfig:
    """The accuracy that a recipe's experiment wants to exceed, and the task that it is an accuracy of (`aqn.target`).

    `accuracy`: a fraction of 1; null: no target, and a finished run prints no verdict about one. A run of another task
    is not judged: `model` must be part of the name or path of the run's model, `source` the only data source of its
    validation rows, and `problems` their number. null: any.
    """

    accuracy: float | None = None
    model: str | None = None
    source: str | None = None
    problems: int | None = None

    def __post_init__(self) -> None:
        if self.accuracy is not None and not 0 < self.accuracy < 1:
            percent = f" ({self.accuracy / 100:g} for {self.accuracy:g} %)" if 1 < self.accuracy < 100 else ""
            raise ConfigError(
                f"aqn.target.accuracy is {self.accuracy:g}: give a fraction between 0 and 1{percent}, or "
                "null for no target"
            )
        if self.problems is not None and self.problems < 1:
            raise ConfigError(f"aqn.target.problems is {self.problems}: give 1 or more, or null for any number")
        for key in ("model", "source"):
            if getattr(self, key) == "":
                raise ConfigError(f"aqn.target.{key} is empty: give a name, or null for any")

    @property
    def task(self) -> str:
        """Return in words what the target is an accuracy of; "" where a run of any task is judged."""
        problems = f"{self.problems:,} problems" if self.problems else ""
        words = (f"model {self.model}" if self.model else "", f"data {self.source}" if self.source else "", problems)
        return ", ".join(filter(None, words))


@dataclass(frozen=True)
class AqnConfig:
    """The whole `aqn:` block. `seed`: of noise, adapters before training, order of the data, and the rollout's samples.

    Two runs of one seed draw the same noise, begin with the same adapter and ask for each answer with the same seed, so
    that they differ only where floating point does. Without `request_seeds` samples depend on the order in which
    requests reach vLLM.
    """

    seed: int = 0
    request_seeds: bool = True
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    mxfp4: Mxfp4Config = field(default_factory=Mxfp4Config)
    parity: ParityConfig = field(default_factory=ParityConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
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

# verl's own settings that are whole numbers from 1 on: checks, schedule and trainer reckon with them.
_ROLLOUT = "actor_rollout_ref.rollout"
_COUNTS = (
    "trainer.n_gpus_per_node", "trainer.nnodes", "trainer.total_epochs", "trainer.total_training_steps",
    "data.train_batch_size", "data.gen_batch_size", "data.max_prompt_length", "data.max_response_length",
    "actor_rollout_ref.actor.ppo_mini_batch_size", f"{_ROLLOUT}.n", f"{_ROLLOUT}.val_kwargs.n",
    f"{_ROLLOUT}.tensor_model_parallel_size", f"{_ROLLOUT}.data_parallel_size", f"{_ROLLOUT}.expert_parallel_size",
    f"{_ROLLOUT}.max_model_len", f"{_ROLLOUT}.max_num_seqs", f"{_ROLLOUT}.max_num_batched_tokens",
)  # fmt: skip
_OR_NULL = ("trainer.total_training_steps", "data.gen_batch_size", f"{_ROLLOUT}.max_model_len")
# Those with a number below 1 that means something.
_OR_LOWER = {
    "trainer.test_freq": (-1, "the last step alone"),
    "trainer.save_freq": (-1, "never"),
    "data.train_max_samples": (-1, "all"),
    "data.val_max_samples": (-1, "all"),
    "actor_rollout_ref.model.lora_rank": (0, "no adapter"),
}

# Names that verl looks up once a run is under way, and what of it this trainer holds. Only these two engines hold a
# packed base (`verl_api.engine`).
STRATEGIES = ("fsdp", "fsdp2")
_NAMES = {
    "trainer.logger": LOGGERS,
    "actor_rollout_ref.actor.strategy": STRATEGIES,
    "critic.strategy": STRATEGIES,
    "trainer.v1.trainer_mode": ("sync",),  # the others generate while noise and adapter change
    "trainer.resume_mode": ("auto", "disable", "resume_path"),
    f"{_ROLLOUT}.name": ("vllm",),
    "reward.reward_manager.source": ("register", "importlib"),
}
REWARD_MANAGERS = ("dapo", "gdpo", "naive", "rate_limited", "remote")  # in verl's own register


def nearest(name: str, valid: list[str]) -> str:
    """`did you mean 'x'?` for the nearest valid name, or the list of them."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(sorted(valid))}"


def typed(cls: type, raw: Any, where: str) -> Any:
    """A dataclass from plain values.

    ConfigError: an unknown key (with the nearest), a wrong type, no such choice, a key that must be there and is not.
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
    """`value` as the annotation `hint` of a field says: a block, a list of names or blocks, a number, null."""
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
    """What a list at `path` holds, in words."""
    if path.rpartition(".")[2] == "overrides":
        return "key=value"
    return "lists" if get_origin(kind) is tuple else {str: "names", int: "whole numbers"}.get(kind, "blocks")


def parse_aqn(config: DictConfig | dict) -> AqnConfig:
    """Read the `aqn:` block of a composed config.

    Raises:
        ConfigError: a key that does not exist (with the nearest that does), a value of the wrong type,
            a choice that is not offered.
    """
    block = (config if OmegaConf.is_config(config) else OmegaConf.create(config)).get("aqn")
    if block is None:
        raise ConfigError("the config has no aqn: block; a recipe's defaults start with `base`")
    return typed(AqnConfig, OmegaConf.to_container(block, resolve=True), "aqn")


def check_numbers(config: DictConfig) -> None:
    """The numbers of verl's blocks that verl or a check of ours would stumble over. ConfigError for the first."""
    for key in (*_COUNTS, *_OR_LOWER):
        value = OmegaConf.select(config, key, default=1)  # records of older versions lack some
        if value is None and key in _OR_NULL:
            continue
        lowest, meaning = _OR_LOWER.get(key, (1, ""))
        if type(value) is not int or value < lowest:
            other = f", or {lowest} for {meaning}" if meaning else ""
            shown = "null" if value is None else value
            raise ConfigError(f"{key}={shown}: give a whole number that is 1 or more{other}")


def check_names(config: DictConfig) -> None:
    """The names in verl's blocks of which all are known here. ConfigError for the first that is none of them."""
    for key, known in _NAMES.items():
        value = OmegaConf.select(config, key, default=known[0])
        for name in value if OmegaConf.is_list(value) else [value]:
            if name not in known:
                raise ConfigError(f"{key} has {name!r}: {nearest(str(name), list(known))}")
    manager = OmegaConf.select(config, "reward.reward_manager")
    if manager and manager.source == "register" and manager.name not in REWARD_MANAGERS:
        hint = nearest(str(manager.name), list(REWARD_MANAGERS))
        raise ConfigError(
            f"reward.reward_manager.name has {manager.name!r}: {hint}; one of your own needs "
            "reward.reward_manager.source=importlib and reward.reward_manager.module.path=FILE"
        )


def schedule_of(config: DictConfig | dict, total_steps: int) -> SigmaSchedule:
    """σ over `total_steps` RL steps, as the recipe asks for it. With noise disabled σ is 0 throughout."""
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
    """The noise of RL step `step` (from 0): all of it, so that no process has to look into a config of its own."""
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
    """Folders in which a bare recipe name is looked up: the installed ones, or the checkout's."""
    package = Path(__file__).resolve().parent
    return [path for path in (package / "recipes", package.parent / "recipes") if path.is_dir()]


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(p.stem for folder in recipe_dirs() for p in folder.glob("*.yaml") if p.stem != "base")


def plan_names() -> list[str]:
    """Names of the shipped plans."""
    return sorted(p.stem for folder in recipe_dirs() for p in folder.glob("plans/*.yaml"))


def find_recipe(recipe: str, *, plans: bool = True) -> Path:
    """The file of a recipe or plan given by path or by bare name. `plans`: whether a plan is among the suggestions."""
    if recipe.endswith((".yaml", ".yml")) or os.sep in recipe:
        path = Path(recipe).expanduser()
        if path.suffix != ".yaml":  # Hydra finds no other
            raise ConfigError(f"no recipe file {recipe}: a recipe's name ends in .yaml")
        if not path.is_file():
            raise ConfigError(f"no recipe file {recipe}")
        return path.resolve()
    for path in (folder / place / f"{recipe}.yaml" for folder in recipe_dirs() for place in ("", "plans")):
        if path.is_file():
            return path
    raise ConfigError(f"no recipe {recipe!r}: {nearest(recipe, [*recipe_names(), *(plan_names() if plans else ())])}")


def read_yaml(path: Path) -> Any:
    """What a recipe's or plan's file holds. ConfigError where it is no YAML."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no YAML: it is not UTF-8 ({first_line(error)}): save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no YAML: {first_line(error)}") from error


def _refuse_plan(recipe: str, raw: Any) -> None:
    if not isinstance(raw, dict) or "arms" not in raw:
        return
    arms = raw["arms"].values() if isinstance(raw["arms"], dict) else ()
    recipes = dict.fromkeys(str(arm["recipe"]) for arm in arms if isinstance(arm, dict) and "recipe" in arm)
    raise ConfigError(
        f"{recipe} is a plan: `verl-aqn train {recipe}`; this command takes one recipe"
        + (f" (its arms: {', '.join(recipes)})" if recipes else "")
    )


def detect_profile() -> str:
    """`npu` or `cuda` where such a device answers, else `cpu`."""
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
    """What a recipe sets in `actor_rollout_ref.model.lora`, verl's block for Megatron: {key: (value, verl's own)}."""
    block: Any = OmegaConf.load(_verl_config_dir() / "model" / "hf_model.yaml").lora
    lora = config.actor_rollout_ref.model.lora
    return {key: (value, block.get(key)) for key, value in lora.items() if value != block.get(key)}


def load_recipe(recipe: str, overrides: list[str] | None = None) -> DictConfig:
    """Compose recipe + profile + experiment + overrides, and check the `aqn:` block.

    `profile=`, `experiment=` and `correction=` among the overrides choose those files; otherwise the recipe's file may
    name profile and experiment (`aqn.profile`, `aqn.experiment`), else the profile is detected, the experiment is
    `embedded` on a CPU and `gsm8k` on accelerators, and the rollout correction is the recipe's own. Everything else is
    a Hydra override. What the recipe's file says goes over profile and experiment.

    Raises:
        ConfigError: no such recipe, key, or value.
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
        check_names(config)  # first: another engine brings keys that are unknown here
        check_keys(config, _plain(find_recipe("base"), *groups))
        _check_keys(config, path, groups, rest)
        parse_aqn(config)
        check_numbers(config)
    except (HydraException, OmegaConfBaseException) as error:
        if "Could not override 'profile'" in str(error):  # which has its place in `base`
            raise _without_base(path) from error
        raise ConfigError(f"{path.name}: {_hydra_message(error, path, groups)}") from error
    # By the recipe's file, or by one that it builds on.
    for key, used in (("profile", profile), ("experiment", experiment)):
        said, asked = config.aqn.get(key, "auto"), (f"{key}=", f"aqn.{key}=")
        if said not in ("auto", used) and not any(o.startswith(asked) for o in overrides or []):
            return load_recipe(recipe, [f"{key}={said}", *(overrides or [])])
    OmegaConf.update(config, "aqn.profile", profile)
    for key, count in _workers(int(config.trainer.nnodes)).items():
        if OmegaConf.select(config, key) is None:
            OmegaConf.update(config, key, count)
    with open_dict(config):
        del config.aqn.experiment  # all that it brought is in the config now
    if config.trainer.experiment_name is None:
        config.trainer.experiment_name = path.stem
    return config


def _workers(nodes: int) -> dict[str, int]:
    """How many processes of each kind that verl spreads over the nodes, where neither recipe nor profile says so."""
    return {
        "actor_rollout_ref.rollout.agent.num_workers": 8 * nodes,
        "reward.num_workers": 8 * nodes,
        "transfer_queue.backend.SimpleStorage.num_data_storage_units": max(8, 2 * nodes),
    }


def _refuse_open(path: Path, raw: Any, overrides: list[str]) -> None:
    """Refuse a recipe with `???` that no override fills in: OmegaConf would take what stood there before."""
    given = {override.lstrip("+~").partition("=")[0] for override in overrides}
    for key, value in leaves(raw) if isinstance(raw, dict) else ():
        if value == "???" and key not in given:
            raise ConfigError(f"{path.name} leaves {key} open (???): set it")


def _groups(overrides: list[str]) -> tuple[str, str, list[str], list[str]]:
    """Names of profile and experiment, what chooses them and a correction for Hydra, and the other overrides."""
    chosen: dict[str, str | None] = {"profile": "auto", "experiment": None, "correction": None}
    rest = []
    for override in overrides:
        key, sep, value = override.partition("=")
        if not key or not sep:
            raise ConfigError(f"override {override!r} is not of the form key=value")
        if key == "seeds":
            raise ConfigError("seeds= is for plans; a recipe takes aqn.seed=0")
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
        # `base` has places for the first two, below what a recipe's file says; a correction is over the recipe.
        groups.append(f"+{group}={name}" if group == "correction" else f"{group}={name}")
    return profile, experiment, groups, rest


def _check_base(config: DictConfig, path: Path) -> None:
    """A profile and an experiment bring blocks of these names too, but not all that is in them."""
    if "profile" not in (config.get("aqn") or {}) or "project_name" not in (config.get("trainer") or {}):
        raise _without_base(path)


def _without_base(path: Path) -> ConfigError:
    return ConfigError(f"{path.name} does not build on `base`: start it with `defaults: [base, _self_]`")


def _check_keys(config: DictConfig, path: Path, groups: list[str], overrides: list[str]) -> None:
    """Hydra holds overrides against the keys that there are, but takes whatever key a recipe's file has.

    A block that verl or `base` leave empty or null may hold anything, arguments to somebody's class (`…_kwargs`) too,
    and with + an override may add what it likes. `aqn` is checked by its types.
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
    """Return verl's own defaults as a plain dict, interpolations unresolved. Not to be changed."""
    return _plain(_verl_config_dir() / "ppo_trainer.yaml")


def compose_base(profile: str | None) -> Any:
    """Return `base` as a plain dict, with a profile over it or without one. Not to be changed."""
    return _plain(find_recipe("base"), *([f"profile={profile}"] if profile else []))


def _within(key: str, block: str) -> bool:
    return f"{key}.".startswith(f"{block}.")


def _has(block: Any, key: list[str]) -> bool:
    if not key or block in (None, {}, []):
        return True
    return isinstance(block, dict) and key[0] in block and _has(block[key[0]], key[1:])


def unknown_key(key: str, known: Any) -> str:
    """A key that `known` lacks, with the nearest that it has."""
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
    """One line out of Hydra's many; for a key that does not exist, with the nearest that does."""
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
    """The settings that take their value from another one, with the key of that one, in `recipe` by either experiment.

    A run's config.yaml is resolved and no longer says so.
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
    """All dotted keys, of blocks too."""
    for key, value in block.items() if isinstance(block, dict) else ():
        yield f"{prefix}{key}"
        yield from _dotted(value, f"{prefix}{key}.")
