"""The effect of the adapter on log-probabilities of response tokens, compared between the trainer and an export.

Four models compute log-probabilities of the same tokens: the trainer's model with the adapter (a) and without it (b),
and vLLM on the export (c) and on the bare base (d). The effect of the adapter is e = a − b, and that of the export is
s = c − d, both over all tokens. The error is ‖s − e‖ / ‖e‖. It is 0 for an export with exactly the effect of the
adapter, and 1 for the bare base. The floor is ‖d − b‖ / ‖e‖: the difference between the two implementations with equal
weights.

Measurements with vLLM on a CPU, for a tiny random model with a random adapter (two layers, 32 responses of 6 tokens
from the trainer's model), with standard deviations of B of 0.05 and 0.01. "equal" counts equal responses among those
that the base does not give. "gap" is the largest distance from a tie, in nats, at which a response first differs (–:
the token is not among the most likely ones).

====================== ===== ======= ===== ===== ======= =====
export                 error equal   gap   error equal   gap
====================== ===== ======= ===== ===== ======= =====
right                  0.019 28 / 32 0.06  0.126 20 / 26 0.12
α × 1.25               0.21  6 / 32  1.12  0.26  12 / 26 0.31
α / 2                  0.38  0 / 32  –     0.48  3 / 26  0.75
α × 2                  1.36  0 / 32  –     0.96  1 / 26  1.75
second layer missing   0.25  4 / 32  2.0   0.20  10 / 26 0.31
first layer missing    0.91  0 / 32  –     0.98  0 / 26  1.06
layers swapped         1.51  0 / 32  –     1.37  1 / 26  2.75
every second module    0.56  0 / 32  2.3   0.44  6 / 26  0.81
attention only         0.30  0 / 32  –     0.42  8 / 26  0.75
bare base              1     0 / 32  –     1     0 / 26  0.94
====================== ===== ======= ===== ===== ======= =====

The effect was 2.5 and 0.42 nats per token, and the floor 0.013 and 0.092. In both cases the error of a right export was
1.4 times the floor, as expected for two independent errors of this size. The allowed error is therefore `ERROR`, or
twice the floor if that is larger. If the floor is above `FLOOR`, the error decides nothing.

This is the case for SmolLM2-135M after two steps of the embedded task (12 responses of the run): the effect was 0.042
nats per token and the floor 0.50. The errors were 0.49 (right), 0.51 to 0.60 (a layer missing, α × 1.25, half, adapter
of step 1) and 1 (base). `shown` was 0.92 (right), 0.84, 1.14, 0.70, 0.71 and 0: it is recorded but not judged.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from verl_aqn.errors import EvidenceError
from verl_aqn.evaluation.export.trained_model import Logprobs, Reference

ERROR = 0.1
FLOOR = 0.15


@dataclass(frozen=True)
class Effect:
    """The measured effect of an adapter.

    `size`: mean |e| in nats per token, over `tokens` tokens. `apart`: mean |d − b|. `shown`: ⟨s, e⟩ / ‖e‖², the share
    of the effect that the export has. `error`, `floor`: see the docstring of the module; None if the adapter has no
    effect on these tokens.
    """

    tokens: int
    size: float
    apart: float
    shown: float | None
    error: float | None
    floor: float | None

    @property
    def allowed(self) -> float | None:
        """The largest allowed `error`; None if the floor hides the effect, so that the error says nothing."""
        if self.floor is None or not self.floor <= FLOOR:
            return None
        return max(ERROR, 2 * self.floor)


def measure(reference: Reference, shown: Logprobs, base: Logprobs) -> Effect:
    """Compute the effect from log-probabilities of vLLM on the export and on the base.

    Only tokens that all four models have scored are used, because an engine's context may end before a response.

    Raises:
        EvidenceError: vLLM scored no token of a response, or a log-probability is not a finite number.
    """
    effects, differences, floors = [], [], []
    for number, (a, b) in enumerate(zip(reference.exported, reference.base, strict=True)):
        c, d = shown[number], base[number]
        if a and not (c and d):
            raise EvidenceError(f"vLLM returned no log-probability for the response to prompt {number}")
        for of_trainer, without, of_export, of_base in zip(a, b, c, d, strict=False):
            four = of_trainer, without, of_export, of_base
            if not all(value is not None and math.isfinite(value) for value in four):
                raise EvidenceError(
                    f"a log-probability of the response to prompt {number} is not a finite number: trainer "
                    f"{of_trainer}, its base {without}, export {of_export}, base {of_base}"
                )
            effects.append(of_trainer - without)
            differences.append(of_export - of_base)
            floors.append(of_base - without)
    norm = _norm(effects)
    if not norm:
        return Effect(len(effects), 0.0, _mean(floors), None, None, None)
    return Effect(
        tokens=len(effects),
        size=_mean(effects),
        apart=_mean(floors),
        shown=sum(s * e for s, e in zip(differences, effects, strict=True)) / norm**2,
        error=_norm(s - e for s, e in zip(differences, effects, strict=True)) / norm,
        floor=_norm(floors) / norm,
    )


def _mean(values: list[float]) -> float:
    return math.fsum(map(abs, values)) / len(values) if values else 0.0


def _norm(values: Iterable[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values))
