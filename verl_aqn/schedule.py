"""The noise schedule of AQN: σ as a function of the RL step. Standard library only.

Source: QeRL (arXiv 2510.11696), whose scheduler keeps σ at 0 for the first of K equal stages and then
lets it fall geometrically from `sigma_start` to `sigma_end`, one value a stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from verl_aqn.errors import ConfigError

KINDS = ("exponential", "constant")
# Where the geometric part ends, as a share of sigma_start, when sigma_end is 0: no ratio leads to 0.
# Two decades is the fall of experiment E12 (0.05 -> 5e-4).
FLOOR_RATIO = 0.01


@dataclass(frozen=True)
class SigmaSchedule:
    """σ(step) for `total_steps` RL steps, where `step` counts the updates done so far (from 0).

    `exponential`: K = `num_stages` equal stages, stage = min(floor(step / (T/K)), K-1).
    Stage 0 is warm-up (σ = 0), stage j >= 1 has σ_start · (σ_end/σ_start)^((j-1)/(K-2)).

    - K = 1: `sigma_start` at every step, no warm-up. K = 2: warm-up, then `sigma_start`.
    - `sigma_end` = 0: the last stage is exactly 0; stages 1 … K-2 fall geometrically from `sigma_start`
      to 1 % of it (K = 3: `sigma_start`, then 0; K = 2 has no stage to fall to and stays at `sigma_start`).
    - Steps >= T stay in the last stage.

    `constant`: `sigma_start` at every step, in one stage; `sigma_end` and `num_stages` have no effect.

    `epoch_aware`: T is split into `epochs` equal parts, and the way from σ_start to σ_end geometrically among
    them: with r = σ_end/σ_start, epoch e of E falls from σ_start·r^(e/E) to σ_start·r^((e+1)/E) over its own
    `num_stages` stages, the first of which is a warm-up at σ = 0 again. With `sigma_end` = 0, r is 1 % and the
    last stage of the last epoch is 0. With one stage an epoch, σ is the epoch's first value.

    Raises ConfigError for σ that are negative, not finite, or rising; counts below 1; an unknown kind.
    """

    sigma_start: float
    sigma_end: float
    num_stages: int
    total_steps: int
    kind: str = "exponential"
    epoch_aware: bool = False
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"noise.kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        for name in ("sigma_start", "sigma_end"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
                raise ConfigError(f"noise.{name} is {value!r}: give a finite number that is 0 or more")
        for name in ("num_stages", "total_steps", "epochs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} of the noise schedule is {value!r}: give a whole number that is 1 or more")
        if self.sigma_start < self.sigma_end:
            raise ConfigError(
                f"noise.sigma_start {self.sigma_start} is below noise.sigma_end {self.sigma_end}: "
                "σ falls during a run, so swap them or make them equal"
            )

    def stage(self, step: int) -> int:
        """Stage at `step`, from 0; under `epoch_aware` stages are numbered through: epoch · K + stage in it."""
        if step < 0:
            raise ConfigError(f"the noise schedule was asked for step {step}: steps count from 0")
        if self.kind == "constant":
            return 0
        # In whole numbers: floor(step / (T / n)) in floating point puts some boundaries one step late.
        stages = self.num_stages * self._parts
        return min(step * stages // self.total_steps, stages - 1)

    def sigma(self, step: int) -> float:
        """σ at `step`, a standard deviation in the unit of the noise order (absolute, or rms of the weight)."""
        epoch, stage = divmod(self.stage(step), self.num_stages)
        if self.kind == "constant":
            return float(self.sigma_start)
        first, last = self._at(epoch / self._parts), self._at((epoch + 1) / self._parts)
        if self.num_stages == 1:
            return first
        if stage == 0:
            return 0.0
        if stage == 1:
            return first
        falling = self.num_stages - 1  # stages after warm-up
        if self.sigma_end == 0 and epoch == self._parts - 1:
            if stage == self.num_stages - 1:
                return 0.0
            falling -= 1  # the last one is 0
        if stage == falling:
            return last
        return first * (last / first) ** ((stage - 1) / (falling - 1)) if first > 0 else 0.0

    def table(self, steps: int | None = None) -> list[dict[str, int | float]]:
        """One row a step for the first `steps` steps (all T when None): [{"step": 0, "stage": 0, "sigma": 0.0}, …]."""
        count = self.total_steps if steps is None else steps
        return [{"step": step, "stage": self.stage(step), "sigma": self.sigma(step)} for step in range(count)]

    @property
    def _parts(self) -> int:
        return self.epochs if self.epoch_aware else 1

    def _at(self, share: float) -> float:
        """Point of the geometric way from σ_start (share 0) to σ_end (share 1); its ends are exact."""
        end = self.sigma_end or self.sigma_start * FLOOR_RATIO
        if share in (0.0, 1.0) or self.sigma_start == 0:
            return float(end if share else self.sigma_start)
        return self.sigma_start * (end / self.sigma_start) ** share
