"""Closed-loop σ: every step's σ follows a measurement of the policy towards a target. Standard library only.

The rule multiplies σ by a power of target / measurement: σ(t) = σ(t-1) · (target(t) / measured(t-1))^gain. On ln σ
this is an integral controller in its velocity form (Åström and Murray, Feedback Systems, 2nd edition, chapter 11). It
remembers the σ that was ordered, and no sum of errors. So it cannot wind up: at a bound, σ is the bound, and leaves it
with the first error of the other sign. To steer noise on weights by the policy's reaction is an idea of Plappert et al.
(Parameter Space Noise for Exploration, arXiv 1706.01905), where σ changes by one constant factor up or down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

from verl_aqn.errors import ConfigError
from verl_aqn.noise.schedule import SigmaSchedule

Measure = Literal["entropy", "kl"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
METRICS: dict[str, str] = {"entropy": "aqn/mismatch/rollout_entropy_sampled", "kl": "aqn/mismatch/noise/kl_k3"}
"""The metric of a step that each target is compared with, in nats a token."""

RELEASE = 0.5
"""A σ that moves stops when the error is within this share of the dead band."""

START, OFF, MOVED = "start", "no noise in this step", "moved"
HELD, AT_MIN, AT_MAX = "held: within the dead band", "at sigma_min", "at sigma_max"
WAS_OFF, UNMEASURED = "held: no noise in the step before", "held: no measurement of the step before"


@dataclass(frozen=True)
class Point:
    """The target at one RL step, which counts from 0."""

    step: int
    value: float


@dataclass(frozen=True)
class Decision:
    """σ of one step, whether it is on its way to the target, and why σ is what it is."""

    sigma: float
    moving: bool
    why: str


@dataclass(frozen=True)
class SigmaControl:
    """The rule of `aqn.noise.control`.

    - `target`: what is measured in each step, in nats a token. "entropy": of the policy that samples, with its noise
      (mean -log p of the sampled tokens, an unbiased estimate). "kl": KL(rollout with noise ‖ rollout without), by
      Schulman's k3 on the tokens that are scored again without noise.
    - `value`: the target; or points, between which the target follows a straight line on a logarithmic scale. Before
      the first point and after the last one it is constant.
    - `gain`: by how much ln σ changes for an error of 1 in ln(target / measurement). If the measurement grows like σ^n,
      the error shrinks by the factor 1 - n · gain a step: no overshoot for gain <= 1/n, stable for gain < 2/n. A KL
      grows like σ² while σ is small; `verl-aqn probe` measures KL and entropy at several σ.
    - `dead_band`: σ starts to move if |ln(target / measurement)| is above it, and moves until that is at most half of
      it (hysteresis). 0.1 means within about 10 %.
    - `max_change`: the largest factor by which σ changes in one step, up or down.
    - `sigma_min`, `sigma_max`: the bounds of σ, in the unit of the noise.

    The measurement of a step decides about the next step, whose target counts. σ and target are rounded to six
    digits, so that another machine's logarithm gives the same numbers.

    Raises:
        ConfigError: a number is outside its range, the points do not ascend, or the bounds are not 0 < min < max.
    """

    target: Measure
    value: float | tuple[Point, ...]
    sigma_min: float
    sigma_max: float
    gain: float = 0.25
    dead_band: float = 0.1
    max_change: float = 2.0

    def __post_init__(self) -> None:
        if self.target not in METRICS:
            raise _wrong("target", self.target, f"choose one of {', '.join(MEASURES)}")
        if isinstance(self.value, tuple) and not self.value:
            raise _wrong("value", [], "give a number, or points such as [{step: 0, value: 0.1}]")
        for point in self._points:
            if not (math.isfinite(point.value) and point.value > 0):
                raise _wrong("value", point.value, "give a number above 0, in nats a token")
        steps = [point.step for point in self._points]
        if steps[0] < 0 or any(later <= step for step, later in pairwise(steps)):
            raise _wrong("value", f"at the steps {steps}", "give steps that ascend, from 0")
        if not (math.isfinite(self.sigma_min) and self.sigma_min > 0):
            raise _wrong("sigma_min", self.sigma_min, "give a number above 0, because σ changes by a factor")
        if not (math.isfinite(self.sigma_max) and self.sigma_max > self.sigma_min):
            raise _wrong("sigma_max", self.sigma_max, f"give a number above sigma_min={self.sigma_min:g}")
        if not (math.isfinite(self.gain) and 0 < self.gain <= 10):
            raise _wrong("gain", self.gain, "give a number above 0 and up to 10; 0.25 suits a KL")
        if not (math.isfinite(self.dead_band) and self.dead_band >= 0):
            raise _wrong("dead_band", self.dead_band, "give 0 or more; 0.1 is about 10 % of the target")
        if not (math.isfinite(self.max_change) and self.max_change > 1):
            raise _wrong("max_change", self.max_change, "give a factor above 1; 2 lets σ double or halve in a step")

    @property
    def _points(self) -> tuple[Point, ...]:
        return self.value if isinstance(self.value, tuple) else (Point(0, self.value),)

    def check_start(self, sigma: float) -> None:
        """Raise ConfigError if a run cannot start with `sigma`, because it is outside the bounds."""
        if not self.sigma_min <= sigma <= self.sigma_max:
            raise ConfigError(
                f"aqn.noise.sigma_start is {sigma:g}, outside aqn.noise.control.sigma_min={self.sigma_min:g} and "
                f"sigma_max={self.sigma_max:g}: choose a start between them, or move the bounds"
            )

    def target_at(self, step: int) -> float:
        """Return the target at RL step `step` (from 0), in nats a token."""
        points = self._points
        after = next((at for at, point in enumerate(points) if point.step > step), len(points))
        if after in (0, len(points)):
            return points[min(after, len(points) - 1)].value
        one, other = points[after - 1 : after + 1]
        share = (step - one.step) / (other.step - one.step)
        return _rounded(one.value * (other.value / one.value) ** share)

    def ends(self, steps: int) -> str:
        """Return the target of the first and the last of `steps` RL steps, such as '0.1 → 0.001 nats a token'."""
        ends = dict.fromkeys(f"{self.target_at(step):g}" for step in (0, steps - 1))
        return f"{' → '.join(ends)} nats a token"

    def follow(self, before: Decision, measured: float | None, step: int) -> Decision:
        """Return the decision about RL step `step` (from 0).

        Args:
            before: the decision about the step before, whose σ is above 0.
            measured: the measurement of the step before, in nats a token; None, NaN or infinite: there is none.
        """
        if measured is None or not math.isfinite(measured):
            return replace(before, why=UNMEASURED)
        error = math.log(self.target_at(step) / measured) if measured > 0 else math.inf
        if abs(error) <= self.dead_band * (RELEASE if before.moving else 1):
            return Decision(before.sigma, False, HELD)
        limit = math.log(self.max_change)
        wanted = _rounded(before.sigma * math.exp(max(-limit, min(limit, self.gain * error))))
        if wanted >= self.sigma_max:
            return Decision(self.sigma_max, True, AT_MAX)
        return Decision(self.sigma_min, True, AT_MIN) if wanted <= self.sigma_min else Decision(wanted, True, MOVED)


class ControlledSigma:
    """σ of each step of a run with `aqn.noise.control`, from the measurements of the steps before.

    It has the methods of `SigmaSchedule` that the order of a step needs. σ is a pure function of the measurements that
    were added for earlier steps. So each process that reads the same records, a resumed run too, decides the same. A
    step that is repeated after a resume replaces its measurement; later ones that were abandoned have no effect on it.
    """

    def __init__(self, control: SigmaControl, schedule: SigmaSchedule) -> None:
        """`schedule`: has σ_start, and says which steps have no noise (warm-up, `off_from_step`)."""
        control.check_start(schedule.sigma_start)
        self.control, self.schedule = control, schedule
        self._measured: dict[int, float | None] = {}
        self._decided = [Decision(float(schedule.sigma_start), False, START)]  # by step, without steps of no noise

    @property
    def total_steps(self) -> int:
        """Return the number of RL steps of the run."""
        return self.schedule.total_steps

    def stage(self, step: int) -> int:
        """Return the stage at `step`: 0 for the warm-up, if there is one, and one more for the noise."""
        return self.schedule.stage(step)

    def sigma(self, step: int) -> float:
        """Return σ at `step`, a standard deviation in the unit of the noise specification."""
        return self.decision(step).sigma

    def decision(self, step: int) -> Decision:
        """Return the decision about `step`, from the measurements of the steps before it."""
        while len(self._decided) <= step:
            self._decided.append(self._next(len(self._decided)))
        return Decision(0.0, False, OFF) if self._is_off(step) else self._decided[step]

    def add(self, step: int, measured: float | None) -> None:
        """Add the measurement of RL step `step` (from 0), or None if it has none."""
        self._measured[step] = measured
        del self._decided[step + 1 :]

    def record(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the evidence of RL step `step` (from 0), given its metrics.

        `step` counts from 1, as verl does. `source`, `target`, `measured` (nats a token; None with a `reason`), `sigma`
        and its `decision`.
        """
        name = METRICS[self.control.target]
        measured, reason = metrics.get(name), ""
        if not isinstance(measured, int | float) or not math.isfinite(measured):
            reason = f"{name} is {'not among the metrics of the step' if measured is None else measured}"
        decision = self.decision(step)
        return {
            "step": step + 1,
            "source": self.control.target,
            "target": self.control.target_at(step),
            "measured": None if reason else measured,
            "reason": reason,
            "sigma": decision.sigma,
            "decision": decision.why,
        }

    def _is_off(self, step: int) -> bool:
        return self.schedule.sigma(step) == 0

    def _next(self, step: int) -> Decision:
        before = self._decided[step - 1]
        if self._is_off(step - 1):
            # After a warm-up σ begins at its start; the measurement without noise says nothing about σ.
            return before if before.why == START else replace(before, why=WAS_OFF)
        return self.control.follow(before, self._measured.get(step - 1), step)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _wrong(key: str, value: object, fix: str) -> ConfigError:
    return ConfigError(f"aqn.noise.control.{key} is {value}: {fix}")
