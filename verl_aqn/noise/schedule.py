"""The noise schedule of AQN: σ as a function of the RL step. Standard library only.

Source of the exponential kind: QeRL (arXiv 2510.11696). Its scheduler keeps σ at 0 in the first of K equal stages and
then decreases σ geometrically from `sigma_start` to `sigma_end`, with one value per stage.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, get_args

from verl_aqn.errors import ConfigError

Kind = Literal["exponential", "linear", "cosine", "logarithmic", "constant"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# End of the geometric part, as a share of sigma_start, when sigma_end is 0, because a geometric fall never reaches 0.
# A fall by two decades is that of experiment E12 (0.05 -> 5e-4).
FLOOR_RATIO = 0.01


@dataclass(frozen=True)
class SigmaSchedule:
    """The schedule σ(step) over `total_steps` RL steps; `step` counts the updates done so far, from 0.

    The T = `total_steps` steps are divided into K = `num_stages` stages with one σ each: a warm-up with σ = 0, then
    n = K-1 noisy stages (n = 1 if K is 1 or 2). Noisy stage j = 1 … n has σ = f(x) at x = (j-1)/(n-1), or x = 0 if
    n is 1:

    ============  ==================================================================================================
    exponential   f(x) = σ_start · (σ_end/σ_start)^x
    linear        f(x) = σ_start - (σ_start - σ_end) · x
    cosine        f(x) = σ_end + (σ_start - σ_end) · (1 + cos πx) / 2: slow at both ends
    logarithmic   f(x) = σ_start - (σ_start - σ_end) · log10(1 + 9x): half of the way at x = 0.24, slow at the end
    constant      f(x) = σ_start in one stage; `sigma_end` and `num_stages` have no effect
    ============  ==================================================================================================

    The schedule reaches both ends exactly. `num_stages` = T + 1 with `warmup` = 0 gives every step its own σ.

    - `warmup` None is the warm-up of QeRL: one of K stages of equal length T/K, stage = min(floor(step / (T/K)), K-1).
      With K = 1, and for `constant`, there is no warm-up. With a share w in [0, 1) the warm-up is the first floor(w·T)
      steps, and the n noisy stages divide the other steps equally.
    - K = 1: `sigma_start` at all steps. K = 2: warm-up, then `sigma_start`.
    - `sigma_end` = 0: σ is exactly 0 in the last stage. An exponential schedule falls from `sigma_start` to 1 % of it
      before the last stage (K = 3: `sigma_start`, then 0). K = 2 has only one noisy stage and stays at `sigma_start`.
    - `off_from_step` s: σ is 0 at every step >= s, in one more stage after all others.
    - Steps >= T are in the last stage.
    - `epoch_aware`: T is split into `epochs` equal parts, each with its own warm-up and n noisy stages. In part e of E,
      x goes from e/E to (e+1)/E, so that σ falls once from σ_start to σ_end over all parts.

    Raises:
        ConfigError: a σ is negative or not finite, or σ rises; a count is below 1; the warm-up is outside [0, 1);
            `off_from_step` is never reached; or the kind is unknown.
    """

    sigma_start: float
    sigma_end: float
    num_stages: int
    total_steps: int
    kind: Kind = "exponential"
    epoch_aware: bool = False
    epochs: int = 1
    warmup: float | None = None
    off_from_step: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"aqn.noise.kind is {self.kind!r}: choose one of {', '.join(KINDS)}")
        for name in ("sigma_start", "sigma_end"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0:
                raise ConfigError(f"aqn.noise.{name} is {value!r}: give a finite number that is 0 or more")
        for name in ("num_stages", "total_steps", "epochs"):
            if not _is_count(getattr(self, name)):
                raise ConfigError(
                    f"{name} of the noise schedule is {getattr(self, name)!r}: give a whole number that is 1 or more"
                )
        if self.sigma_start < self.sigma_end:
            raise ConfigError(
                f"aqn.noise.sigma_start {self.sigma_start} is below aqn.noise.sigma_end {self.sigma_end}: "
                "σ falls during a run, so swap them or make them equal"
            )
        if self.warmup is not None and not (_is_number(self.warmup) and 0 <= self.warmup < 1):
            raise ConfigError(
                f"aqn.noise.warmup is {self.warmup!r}: give null for one stage, or a share of the steps from 0 to "
                "below 1"
            )
        off = self.off_from_step
        if off is not None and not (_is_count(off) and off < self.total_steps):
            raise ConfigError(
                f"aqn.noise.off_from_step is {off!r}, but the run takes {self.total_steps} steps: give a step from 1 "
                f"to {self.total_steps - 1}, or null"
            )

    def stage(self, step: int) -> int:
        """Return the stage at `step`.

        Stage 0 is the warm-up, even if it has no steps. With `epoch_aware` the numbers continue from part to part.
        """
        if step < 0:
            raise ConfigError(f"the noise schedule has no step {step}: steps count from 0")
        if self._is_off(step):
            return self._parts * self._stages
        part, stage = self._place(step)
        return part * self._stages + stage

    def sigma(self, step: int) -> float:
        """Return σ at `step`, a standard deviation in the unit of the noise specification."""
        if self._is_off(step):
            return 0.0
        part, stage = divmod(self.stage(step), self._stages)
        noisy = stage if self._stages > self._noisy else stage + 1  # from 1; 0 is the warm-up
        if noisy == 0:
            return 0.0
        falling = self._noisy
        if self.kind == "exponential" and self.sigma_end == 0 and part == self._parts - 1 and falling > 1:
            if noisy == falling:
                return 0.0
            falling -= 1  # the last one is 0
        within = Fraction(noisy - 1, falling - 1) if falling > 1 else Fraction(0)
        return self._fall((part + within) / self._parts)

    def table(self, steps: int | None = None) -> list[dict[str, int | float]]:
        """Return one row for each of the first `steps` steps (all T if None).

        The rows are [{"step": 0, "stage": 0, "sigma": 0.0}, …].
        """
        count = self.total_steps if steps is None else steps
        return [{"step": step, "stage": self.stage(step), "sigma": self.sigma(step)} for step in range(count)]

    @property
    def _parts(self) -> int:
        return self.epochs if self.epoch_aware else 1

    @property
    def _noisy(self) -> int:
        """Number of noisy stages in a part."""
        return 1 if self.kind == "constant" else max(1, self.num_stages - 1)

    @property
    def _stages(self) -> int:
        """Number of stages in a part, including its warm-up."""
        without = self.warmup is None and (self.num_stages == 1 or self.kind == "constant")
        return self._noisy + (not without)

    def _is_off(self, step: int) -> bool:
        return self.off_from_step is not None and step >= self.off_from_step

    def _place(self, step: int) -> tuple[int, int]:
        """Return the part and the stage in it, in integer arithmetic.

        Floating-point arithmetic would place some boundaries one step late.
        """
        total, parts = self.total_steps, self._parts
        if self.warmup is None:
            stages = parts * self._stages
            return divmod(min(step * stages // total, stages - 1), self._stages)
        step = min(step, total - 1)
        part = step * parts // total
        begin, end = -(-part * total // parts), -(-(part + 1) * total // parts)
        # Recover the intended share: 0.29 and 1/6 have no exact binary form, and floor would give one step too few.
        share = Fraction(self.warmup).limit_denominator(10**6)
        warm = min(int(share * (end - begin)), end - begin - 1)
        if step - begin < warm:
            return part, 0
        return part, 1 + min((step - begin - warm) * self._noisy // (end - begin - warm), self._noisy - 1)

    def _fall(self, x: Fraction) -> float:
        """Return f(x) for 0 <= x <= 1; the values at both ends are exact."""
        start, end = float(self.sigma_start), float(self.sigma_end)
        if x == 0 or self.kind == "constant" or start == 0:
            return start
        if self.kind == "exponential":
            end = end or start * FLOOR_RATIO
            return end if x == 1 else start * (end / start) ** float(x)
        if x == 1:
            return end
        if self.kind == "cosine":
            return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
        return start - (start - end) * (float(x) if self.kind == "linear" else math.log10(1 + 9 * float(x)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
