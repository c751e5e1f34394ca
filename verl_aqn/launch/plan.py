"""The file of a plan: arms, seeds, the pairs to compare, and when to stop."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from verl_aqn.config.compose import read_yaml
from verl_aqn.config.schema import typed
from verl_aqn.errors import ConfigError
from verl_aqn.runs.stats.arms import FACTOR

LEAST = 3  # seeds at a look: with two, the test of seeds errs twice as often as its level says, where that is below 1 %


@dataclass(frozen=True)
class When:
    """A condition: the mean accuracy of `arm` is above that of `above`, over the seeds that both have finished.

    It is no statistical test.
    """

    arm: str
    above: str


@dataclass(frozen=True)
class ArmOfPlan:
    """A recipe with its own overrides. `when`: run it only if this condition on other arms holds."""

    recipe: str = ""
    overrides: tuple[str, ...] = ()
    when: When | None = None


@dataclass(frozen=True)
class Plan:
    """An experiment: arms, seeds, and pairs of arms to compare.

    Runs go through all arms seed by seed, so that an interrupted plan has as many seeds for each arm; arms with a
    condition come last. `contrasts` are pairs [arm, control]; by default each arm against the first. In each pair only
    settings under `factors` may differ. `overrides` apply to all arms, followed by those of the command line.

    `looks`: numbers of seeds. When all arms have so many, the plan ends if every contrast has a verdict; a number that
    is not below that of the seeds never comes. The rule is fixed before the first run, and intervals are corrected for
    all looks and the end, so that looking makes no verdict more likely to be wrong.
    """

    arms: dict[str, ArmOfPlan]
    seeds: tuple[int, ...] = (0,)
    contrasts: tuple[tuple[str, ...], ...] = ()
    factors: tuple[str, ...] = (FACTOR,)
    overrides: tuple[str, ...] = ()
    looks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        names, free = list(self.arms), [name for name, arm in self.arms.items() if not arm.when]
        for name, arm in self.arms.items():
            if not re.fullmatch(r"[\w.-]+", name) or not arm.recipe:
                raise ConfigError(f"arms.{name}: an arm needs a name of letters, digits, ., - and _, and a recipe")
            for other in (arm.when.arm, arm.when.above) if arm.when else ():
                if other not in names:
                    raise ConfigError(
                        f"arms.{name}.when names {other!r}, which is not an arm: use one of {', '.join(free)}"
                    )
                if other not in free:
                    raise ConfigError(
                        f"arms.{name}.when names {other!r}, which has a condition itself: name an arm without one"
                    )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds={list(self.seeds)}: give at least one seed, and each seed once")
        self._check_looks()
        for pair in self.contrasts:
            if len(set(pair)) != 2 or len(pair) != 2 or not set(pair) <= set(names):
                raise ConfigError(f"contrasts: {list(pair)} is not a pair [arm, control] of two of {', '.join(names)}")

    def _check_looks(self) -> None:
        if list(self.looks) != sorted(set(self.looks)) or min(self.looks, default=LEAST) < LEAST:
            raise ConfigError(f"looks={list(self.looks)}: give growing numbers of seeds, from {LEAST} on")
        conditional = [name for name, arm in self.arms.items() if arm.when]
        if self.looks and conditional:
            raise ConfigError(
                f"looks and arms.{conditional[0]}.when: a plan that may end early has no conditional arms"
            )

    @property
    def early(self) -> tuple[int, ...]:
        """The looks that may end the plan before its last seed."""
        return tuple(count for count in self.looks if count < len(self.seeds))

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Pairs (arm, control), one for each contrast."""
        first, *others = self.arms
        return [(arm, control) for arm, control in self.contrasts] or [(arm, first) for arm in others]

    def runs(self, conditional: bool) -> Iterator[tuple[str, int]]:
        """Yield (arm, seed) in order, for the arms with a condition or for those without."""
        for seed in self.seeds:
            yield from ((name, seed) for name, arm in self.arms.items() if (arm.when is not None) == conditional)


def read_plan(path: Path, overrides: list[str]) -> Plan | None:
    """Return the plan in a file; None if the file is a recipe. An override `seeds=[0, 1]` replaces the plan's seeds.

    Raises:
        ConfigError: a key, name or value that a plan cannot have.
    """
    raw = read_yaml(path)
    if not isinstance(raw, dict) or "arms" not in raw:
        return None
    rest = []
    for override in overrides:
        if override.startswith("seeds="):
            raw["seeds"] = _seeds(override)
        else:
            rest.append(override)
    _refuse_own(path, overrides)
    if not isinstance(raw["arms"], dict) or not raw["arms"]:
        raise ConfigError(f"{path.name}: arms must be a mapping from names to blocks with a recipe")
    try:
        plan = typed(Plan, raw | {"overrides": raw.get("overrides") or []}, "")
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from error
    _refuse_own(path, [*plan.overrides, *(override for arm in plan.arms.values() for override in arm.overrides)])
    return replace(plan, overrides=(*plan.overrides, *rest))


def _refuse_own(path: Path, overrides: list[str]) -> None:
    """Reject overrides of settings that the plan sets for each run itself: they would be ignored silently."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if key == "aqn.seed":
            raise ConfigError(f"{path.name}: {override}: a plan sets the seed of each run: give seeds=[{value}]")
        if key == "trainer.experiment_name":
            raise ConfigError(f"{path.name}: {override}: a plan names each run after its arm: rename the arm")


def _seeds(override: str) -> Any:
    try:
        return yaml.safe_load(override.removeprefix("seeds="))
    except yaml.YAMLError as error:
        raise ConfigError(f"{override} is not a YAML list: give seeds=[0,1,2]") from error
