"""The noise specification of one rollout, which the trainer sends to every process. Imports no heavy packages.

The specification contains every setting of the noise. No process reads these settings from a config of its own.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from verl_aqn.errors import ConfigError

Unit = Literal["absolute", "rms", "multiplicative"]
TargetKind = Literal["norm", "linear"]
LayerKind = Literal["uniform", "targeted", "variable", "inverse", "zones"]
UNITS: tuple[Unit, ...] = get_args(Unit)
TARGETS: tuple[TargetKind, ...] = get_args(TargetKind)
LAYER_KINDS: tuple[LayerKind, ...] = get_args(LayerKind)

_LAYERS = re.compile(r"\d+(-\d+)?")
_LAYER_OF = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_EXPERTS = re.compile(r"\.(experts|shared_experts?)\.")


@dataclass(frozen=True)
class Zone:
    """Modules that share one multiplier `before` the boundary and one `after` it. `modules` is as in `Layers`."""

    modules: tuple[str, ...] = ()
    before: float = 1.0
    after: float = 1.0


@dataclass(frozen=True)
class Layers:
    """The multiplier of σ for each module.

    The layer of a module is the first number in its name. A module without a number (the last norm of a model) belongs
    to the last layer. Layers are numbered 0 … L-1. `modules` lists layers ("3", "0-7", both ends included) or shell
    patterns of module names ("*.q_norm"); each entry must match a module that gets noise.

    ========  =======================================================================================================
    uniform   1
    targeted  `multiplier` for `modules`, `others` for the rest
    variable  a straight line over depth, from `first` in layer 0 to `last` in layer L-1
    inverse   1 / (a + b · layer), from `first` in layer 0 down to `last` in layer L-1
    zones     the multiplier of the first zone that contains the module: `before` for steps before `boundary` · T,
              `after` from that step on; `others` for modules in no zone
    ========  =======================================================================================================

    A multiplier of 0 means no noise.

    Raises:
        ConfigError: a number is negative, a key has no effect with this kind, or `inverse` does not fall.
    """

    kind: LayerKind = "uniform"
    modules: tuple[str, ...] = ()
    multiplier: float = 1.0
    others: float = 1.0
    first: float = 1.0
    last: float = 1.0
    boundary: float = 0.5  # as a share of the run's steps
    zones: tuple[Zone, ...] = ()

    def __post_init__(self) -> None:
        keys = {
            "uniform": (),
            "targeted": ("modules", "multiplier", "others"),
            "variable": ("first", "last"),
            "inverse": ("first", "last"),
            "zones": ("zones", "boundary", "others"),
        }
        if self.kind not in keys:
            raise ConfigError(f"aqn.noise.layers.kind is {self.kind!r}: choose one of {', '.join(LAYER_KINDS)}")
        for field in fields(self):
            if field.name not in ("kind", *keys[self.kind]) and getattr(self, field.name) != field.default:
                raise ConfigError(
                    f"aqn.noise.layers.{field.name} has no effect with kind {self.kind!r}: it is a key of "
                    f"{' and '.join(kind for kind, names in keys.items() if field.name in names)}"
                )
        numbers = {name: getattr(self, name) for name in ("multiplier", "others", "first", "last")}
        for number, zone in enumerate(self.zones):
            numbers |= {f"zones[{number}].before": zone.before, f"zones[{number}].after": zone.after}
        for name, value in numbers.items():
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"aqn.noise.layers.{name} is {value}: a multiplier of σ must be 0 or more")
        if not 0 <= self.boundary <= 1:
            raise ConfigError(f"aqn.noise.layers.boundary is {self.boundary}: give a share of the steps, from 0 to 1")
        if self.kind == "inverse" and not self.first >= self.last > 0:
            raise ConfigError(
                f"aqn.noise.layers: kind inverse must fall from first to last, but first is {self.first} and last is "
                f"{self.last}: swap them, or use kind variable"
            )
        if not self.modules and self.kind == "targeted":
            raise ConfigError("aqn.noise.layers: kind targeted needs modules, for example ['0-7'] or ['*.q_norm']")
        if self.kind == "zones" and not (self.zones and all(zone.modules for zone in self.zones)):
            raise ConfigError(
                "aqn.noise.layers: kind zones needs zones, and each zone needs modules, for example ['0-7']"
            )

    def multiplier_of(self, name: str, layers: int, share: float) -> float:
        """Return the multiplier of module `name` in a model of `layers` layers, at `share` = step / T of the run."""
        layer = layer_of(name, layers)
        depth = layer / (layers - 1) if layers > 1 else 0.0
        if self.kind == "targeted":
            return self.multiplier if _in(self.modules, name, layer) else self.others
        if self.kind == "variable":
            return self.first + (self.last - self.first) * depth
        if self.kind == "inverse":
            return 1 / (1 / self.first + (1 / self.last - 1 / self.first) * depth)
        for zone in self.zones:
            if _in(zone.modules, name, layer):
                return zone.after if share >= self.boundary else zone.before
        return self.others if self.kind == "zones" else 1.0

    def check(self, names: Sequence[str], layers: int) -> None:
        """Check that each entry of `modules` matches one of `names`.

        Raises:
            ConfigError: an entry matches no name.
        """
        for entry in (*self.modules, *(entry for zone in self.zones for entry in zone.modules)):
            if not any(_in((entry,), name, layer_of(name, layers)) for name in names):
                hint = f"layers are 0 to {layers - 1}" if _LAYERS.fullmatch(entry) else nearest_name(entry, names)
                raise ConfigError(f"aqn.noise.layers: {entry!r} matches no module that gets noise; {hint}")


@dataclass(frozen=True)
class NoiseSpec:
    """The noise specification of one rollout.

    `step` is the RL step, from 0. `sigma` is the standard deviation; 0 means no noise. `unit` defines the noisy weight,
    with z ~ N(0, 1) for every element and w the clean effective weight (1 + the parameter in the norms of Gemma):

    ==============  ====================================================================================
    absolute        w + σz, as QeRL does
    rms             w + σ · rms(w) · z, rms over the module: σ means the same in every layer and model
    multiplicative  w · (1 + σz)
    ==============  ====================================================================================

    `targets`: kinds of modules that get noise: "norm" (RMSNorms, as in QeRL, and LayerNorms, whose bias gets no noise)
    and "linear" (packed MXFP4 layers, on their dequantised weights); empty in a run without noise.
    `include`, `exclude`: shell patterns of module names; an empty `include` means all modules. `router_norms`: whether
    the norms that feed the router of a mixture of experts get noise too. `layers`: multipliers of σ by module.
    `share`: step / steps of the run, which decides on which side of a zone's boundary the step is.

    Raises:
        ConfigError: a value is invalid, or `from_dict` got an unknown key.
    """

    step: int
    seed: int
    sigma: float
    unit: str
    targets: tuple[str, ...] = ("norm",)
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    router_norms: bool = False
    layers: Layers = Layers()
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.unit not in UNITS:
            raise ConfigError(f"aqn.noise.unit is {self.unit!r}: choose one of {', '.join(UNITS)}")
        if not set(self.targets) <= set(TARGETS) or (self.sigma and not self.targets):
            raise ConfigError(f"aqn.noise.targets is {list(self.targets)}: choose from {', '.join(TARGETS)}")
        if not math.isfinite(self.sigma) or self.sigma < 0 or self.step < 0:
            raise ConfigError(f"noise spec has step {self.step} and sigma {self.sigma}: both must be 0 or more")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NoiseSpec:
        """Build the specification from the result of `to_dict`, also after JSON has turned tuples into lists."""
        return _build(cls, values, "noise spec")

    def selects(self, name: str) -> bool:
        """Return whether `include` and `exclude` select the module."""
        included = not self.include or any(fnmatchcase(name, pattern) for pattern in self.include)
        return included and not any(fnmatchcase(name, pattern) for pattern in self.exclude)

    def check_patterns(self, names: Sequence[str]) -> None:
        """Check that each pattern of `include` and `exclude` matches one of `names`.

        Raises:
            ConfigError: a pattern matches no name.
        """
        for key in ("include", "exclude"):
            for pattern in getattr(self, key):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise ConfigError(f"aqn.noise.{key}: {pattern!r} matches no module; {nearest_name(pattern, names)}")


NoiseOrder = NoiseSpec  # the name until version 0.1


def layer_of(name: str, layers: int) -> int:
    """Return the layer number in a module's name, or the last layer if the name has no number."""
    found = _LAYER_OF.search(name)
    return int(found[1]) if found else layers - 1


def layer_and_kind(name: str) -> tuple[int | None, str]:
    """Return the layer number in a projection's name, if any, and the kind of the projection.

    The kind is the last part of the name. Projections of experts and of shared experts are separate kinds, different
    from a projection of the same name in a dense layer.
    """
    found, group = _LAYER_OF.search(name), _EXPERTS.search(name)
    return int(found[1]) if found else None, (f"{group[1]} " if group else "") + name.rpartition(".")[2]


def count_layers(names: Iterable[str]) -> int:
    """Return the number of layers that the names contain; at least 1."""
    return 1 + max((layer_of(name, 1) for name in names), default=0)


def nearest_name(pattern: str, names: Sequence[str]) -> str:
    """Return a hint for an error message with the module name nearest to a pattern."""
    bare = pattern.replace("*", "")
    close = difflib.get_close_matches(bare, names, n=1, cutoff=0.0)
    by_leaf = difflib.get_close_matches(bare.rpartition(".")[2], [n.rpartition(".")[2] for n in names], n=1)
    if by_leaf:
        close = [name for name in names if name.endswith(by_leaf[0])][:1]
    return f"the nearest is {close[0]!r}" if close else "there are no modules"


def _in(entries: Sequence[str], name: str, layer: int) -> bool:
    for entry in entries:
        if _LAYERS.fullmatch(entry):
            low, _, high = entry.partition("-")
            if int(low) <= layer <= int(high or low):
                return True
        elif fnmatchcase(name, entry):
            return True
    return False


def _build(cls: type, values: Mapping[str, Any], what: str) -> Any:
    known = {field.name: field for field in fields(cls)}
    if unknown := set(values) - set(known):
        raise ConfigError(f"{what} has the unknown key {min(unknown)!r}: do all processes run the same verl-aqn?")
    if missing := {n for n, f in known.items() if f.default is MISSING} - set(values):
        raise ConfigError(f"{what} lacks the key {min(missing)!r}: do all processes run the same verl-aqn?")
    built = {}
    for name, value in values.items():
        if name == "layers":
            value = _build(Layers, value, "layers of the noise spec")
        elif name == "zones":
            value = tuple(_build(Zone, zone, "zone of the noise spec") for zone in value)
        elif isinstance(value, list):
            value = tuple(value)
        built[name] = value
    return cls(**built)
