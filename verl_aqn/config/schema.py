"""The `aqn:` block of a recipe as typed dataclasses, and the errors for wrong keys and values."""

import difflib
import math
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf

from verl_aqn.errors import ConfigError
from verl_aqn.noise.control import SigmaControl
from verl_aqn.noise.schedule import Kind
from verl_aqn.noise.spec import Layers, TargetKind, Unit

Profile = Literal["cpu", "cuda", "npu"]
Experiment = Literal["embedded", "embedded_2", "embedded_3", "gsm8k", "none"]
PROFILES: tuple[Profile, ...] = get_args(Profile)
EXPERIMENTS: tuple[Experiment, ...] = get_args(Experiment)
ScaleRule = Literal["mse", "even", "floor", "rceil"]
KeepBy = Literal["sqnr", "loss"]
# Scale rule and rounding of 4-bit activations that each profile sets (`conf/profile`).
FOUR_BIT = {"cpu": ("even", "nearest"), "cuda": ("rceil", "nearest"), "npu": ("floor", "half_away")}


@dataclass(frozen=True)
class NoiseConfig:
    """Noise on the weights of the rollout (`aqn.noise`): when (`SigmaSchedule`), where and how much (`NoiseSpec`).

    `control`: σ follows a measurement instead of the schedule (`SigmaControl`). null: the schedule alone decides.
    """

    enabled: bool = True
    kind: Kind = "exponential"
    sigma_start: float = 0.05
    sigma_end: float = 1.0e-5
    # KL(clean || noisy) in nats a token. σ_start is set to the σ with this KL, and σ_end keeps its ratio to it
    # (`verl_aqn.preflight.probe`).
    target_kl: float | None = None
    # measure σ_start before a run starts and reject a σ that gives no training signal; needs the model in fp32
    probe: bool = False
    num_stages: int = 10
    epoch_aware: bool = False
    warmup: float | None = None  # a fraction of the steps; null is one stage of the schedule, as in QeRL
    off_from_step: int | None = None  # no noise from this RL step (from 0) on
    control: SigmaControl | None = None
    unit: Unit = "absolute"  # "rms" and "multiplicative" are relative to the module's own clean weight
    # also "linear": there, σ of 0.005 and more collapsed training, 0.001 was stable
    targets: tuple[TargetKind, ...] = ("norm",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    router_norms: bool = False
    layers: Layers = field(default_factory=Layers)
    # "rollout+actor": old log-probs and the update use the same noise as the batch's rollout
    apply_to: Literal["rollout", "rollout+actor"] = "rollout"
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
        if self.control is None:
            return
        if self.kind != "constant":
            raise ConfigError(
                f"aqn.noise.kind={self.kind} has no effect with aqn.noise.control, which decides σ after its start: "
                "set aqn.noise.kind=constant, or aqn.noise.control=null"
            )
        if self.target_kl is not None:
            raise ConfigError(
                f"aqn.noise.target_kl={self.target_kl:g} and aqn.noise.control both choose σ: set "
                "aqn.noise.target_kl=null (aqn.noise.control.target=kl holds a KL in every step)"
            )
        self.control.check_start(self.sigma_start)

    @property
    def controller(self) -> SigmaControl | None:
        """Return the rule by which σ follows a measurement, or None if the schedule alone decides, or without noise."""
        return self.control if self.enabled else None

    @property
    def in_actor(self) -> bool:
        """Return whether the actor's forward uses the rollout's noise."""
        return self.enabled and self.apply_to == "rollout+actor"


@dataclass(frozen=True)
class KeepConfig:
    """The layers that stay in 16 bits because rounding hurts them most (`aqn.mxfp4.keep`).

    `worst`: a share of the weights that would be packed; 0: none. `by`: `sqnr`, the error of the weights themselves, or
    `loss`, what the layer costs on calibration texts (`verl_aqn.checkpoints.keeping`).
    """

    worst: float = 0.0
    by: KeepBy = "sqnr"

    def __post_init__(self) -> None:
        if not 0 <= self.worst < 1:
            raise ConfigError(f"aqn.mxfp4.keep.worst is {self.worst:g}: give a share of the weights from 0 to below 1")


@dataclass(frozen=True)
class Mxfp4Config:
    """The quantised base (`aqn.mxfp4`)."""

    enabled: bool = True
    scale_rule: ScaleRule = "mse"
    # "mxfp8": W4A8, "mxfp4": W4A4; activations are rounded in both trainer and rollout
    activation: Literal["none", "mxfp8", "mxfp4"] = "none"
    # How an engine with 4-bit activations rounds them; a profile sets what its kernels do. MXFP8 has one arithmetic.
    activation_scale_rule: ScaleRule = "even"
    activation_rounding: Literal["nearest", "half_away"] = "nearest"
    # The weight format in the rollout: packed, bf16 with the same values, or int8 with nearly the same values on Ascend
    # A2 and A3 (`verl_aqn.config.serving`).
    rollout_weight_format: Literal["auto", "packed", "bf16", "int8"] = "auto"
    # the actor keeps 16-bit weights in addition to the packed ones: faster, five times the memory
    cache_dequantized: bool = False
    exclude: tuple[str, ...] = ("lm_head", "embed_tokens")
    # Calibration texts with which rounding compensates its errors (GPTQ): JSONL files or `embedded`; empty: plain
    # rounding.
    calibrate: tuple[str, ...] = ()
    keep: KeepConfig = field(default_factory=KeepConfig)

    @property
    def activation_arithmetic(self) -> str:
        """Return the value that actor and rollout receive and report.

        It is `none` for W4A16, `RULE/ROUNDING` for W4A4, and `mxfp8/floor/nearest` for W4A8.
        """
        if self.activation == "mxfp8":
            return "mxfp8/floor/nearest"  # `verl_aqn.mxfp4.mxfp8.ARITHMETIC`, which needs torch
        return "none" if self.activation == "none" else f"{self.activation_scale_rule}/{self.activation_rounding}"


@dataclass(frozen=True)
class MismatchConfig:
    """Limits for the mismatch of trainer and rollout without noise (`aqn.mismatch`).

    `warn`, `stop`: mean |Δ log-prob| in nats a token, on the same tokens. Above `warn` a step gets a warning; above
    `stop` the run stops before its update (`verl_aqn.integrations.verl.tripwire`). Healthy models were measured at
    0.002 to 0.1.
    """

    rescore: int = 16  # one in this many samples is rescored without noise, to separate noise from kernels; 0: none
    warn: float = 0.2
    stop: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.warn <= self.stop:
            raise ConfigError(
                f"aqn.mismatch.warn is {self.warn:g} and stop {self.stop:g}: give nats a token with 0 < warn <= "
                "stop (inf: no limit)"
            )
        if self.rescore < 0:
            raise ConfigError(f"aqn.mismatch.rescore is {self.rescore}: give 0 or more; 0 disables it")


@dataclass(frozen=True)
class RunConfig:
    """Where a run is stored, and how it handles faults (`aqn.run`).

    `restarts`: maximum number of automatic restarts after a crash or a hang. `hang_timeout_factor`: a phase that takes
    this many times its usual duration counts as a hang; 0 disables this. `allow_failed`: the fraction of the responses
    of one step, or of one validation, whose generation or reward may fail before the run stops.
    """

    dir: str | None = None
    fresh: bool = False
    restarts: int = 0
    hang_timeout_factor: float = 10.0
    allow_failed: float = 0.0

    def __post_init__(self) -> None:
        if self.restarts < 0:
            raise ConfigError(f"aqn.run.restarts is {self.restarts}: give 0 or more")
        if not self.hang_timeout_factor >= 0:
            raise ConfigError(
                f"aqn.run.hang_timeout_factor is {self.hang_timeout_factor}: give 0 or more; 0 disables it"
            )
        if not 0 <= self.allow_failed < 1:
            raise ConfigError(
                f"aqn.run.allow_failed is {self.allow_failed}: give a fraction of responses from 0 to below 1; "
                "0 allows none"
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
    mismatch: MismatchConfig = field(default_factory=MismatchConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    run: RunConfig = field(default_factory=RunConfig)
    profile: Literal["auto", Profile] = "auto"
    experiment: Literal["auto", Experiment] = "auto"

    def __post_init__(self) -> None:
        control = self.noise.controller
        if control and control.target == "kl" and not self.mismatch.rescore:
            raise ConfigError(
                "aqn.mismatch.rescore is 0, so there is no KL for aqn.noise.control.target=kl: set "
                "aqn.mismatch.rescore=16, or aqn.noise.control.target=entropy"
            )
        rounding = (self.mxfp4.activation_scale_rule, self.mxfp4.activation_rounding)
        if self.mxfp4.activation != "mxfp8" or self.profile == "auto":  # `load_recipe` checks again with the profile
            return
        if rounding not in (FOUR_BIT[self.profile], ("floor", "nearest")):
            raise ConfigError(
                f"aqn.mxfp4.activation_scale_rule={rounding[0]} and activation_rounding={rounding[1]} are not for "
                "aqn.mxfp4.activation=mxfp8, which has the scale rule floor and rounds to nearest: remove them"
            )


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
        values[key] = value
    for one in fields(cls):
        if one.name not in values and one.default is MISSING and one.default_factory is MISSING:
            raise ConfigError(f"{where}.{one.name} is missing: give it a value".lstrip("."))
    return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Convert `value` to the annotation `hint` of a field: a block, a list of names or blocks, a number, null."""
    if is_dataclass(hint):
        assert isinstance(hint, type)
        return typed(hint, value, path)
    options = get_args(hint)
    if get_origin(hint) is tuple:
        if not isinstance(value, list) or (_is_text(options[0]) and not all(isinstance(item, str) for item in value)):
            raise ConfigError(f"{path} must be a list of {_elements(options[0], path)}, got {value!r}")
        return tuple(_convert(options[0], item, f"{path}[{number}]") for number, item in enumerate(value))
    if get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{path} must be a block of keys, got {value!r}")
        if numbers := [key for key in value if not isinstance(key, str)]:
            raise ConfigError(f"{path}.{numbers[0]}: quote the name")
        return {key: _convert(options[1], item, f"{path}.{key}") for key, item in value.items()}
    if get_origin(hint) in (Union, UnionType):
        if value is None and type(None) in options:
            return None
        # at most one kind beside lists
        kinds = {get_origin(kind) is tuple: kind for kind in options if kind is not type(None)}
        return _convert(kinds.get(isinstance(value, list), next(iter(kinds.values()))), value, path)
    if get_origin(hint) is Literal:
        if value not in options:
            raise ConfigError(f"{path}={value!r} is not one of {', '.join(options)}")
        return value
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        raise ConfigError(f"{path} must be a {hint.__name__}, got {value!r}")
    return value


def _is_text(hint: Any) -> bool:
    return hint is str or get_origin(hint) is Literal


def _elements(kind: Any, path: str) -> str:
    """Describe the elements of a list at `path` in words."""
    if path.rpartition(".")[2] == "overrides":
        return "key=value"
    if get_origin(kind) is tuple:
        return "lists"
    return "names" if _is_text(kind) else "whole numbers" if kind is int else "blocks"


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
