"""How much of what the adapter does an export shows, measured on log-probabilities of tokens of answers.

Four models say how probable the same tokens are: the trainer's model with the adapter (a) and without (b), and vLLM on
the export (c) and on the bare base (d). The adapter's effect is e = a − b and what the export shows is s = c − d, each
over all tokens. The error is ‖s − e‖ / ‖e‖: 0 for an export that does all that the adapter does and nothing else, and 1
for the bare base, which shows nothing. The floor is ‖d − b‖ / ‖e‖: how far apart two implementations are on equal
weights.

Measured with vLLM on a CPU: a tiny random model with a random adapter (two layers, 32 answers of 6 tokens by the
trainer's model), with B of standard deviation 0.05 and 0.01. Equal: of the answers that the base does not give. Gap:
the farthest from a tie at which an answer parts, in nats (–: not among the likeliest tokens).

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

The effect was 2.5 and 0.42 nats a token, the floor 0.013 and 0.092; the error of a right export was 1.4 times the floor
both times, as of two independent errors of that size. So at most `ERROR`, or twice the floor where that is more, is
allowed, and where the floor is above `FLOOR` the error decides nothing.

So it is with SmolLM2-135M after two steps of the embedded task (12 answers of the run): the effect was 0.042 nats a
token and the floor 0.50. Errors were 0.49 (right), 0.51 to 0.60 (a layer missing, α × 1.25, half, adapter of step 1)
and 1 (base). `shown` was 0.92 (right), 0.84, 1.14, 0.70, 0.71 and 0 there: it is on record but not judged.
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
    """`size`: mean |e| in nats a token, over `tokens` tokens. `apart`: mean |d − b|. `shown`: ⟨s, e⟩ / ‖e‖², the share
    of the effect that the export shows. `error`, `floor`: see the module; None where the adapter has no effect on these
    tokens."""

    tokens: int
    size: float
    apart: float
    shown: float | None
    error: float | None
    floor: float | None

    @property
    def allowed(self) -> float | None:
        """The bound of `error`; None where the floor hides the effect, so that nothing can be told from the error."""
        if self.floor is None or not self.floor <= FLOOR:
            return None
        return max(ERROR, 2 * self.floor)


def measure(reference: Reference, shown: Logprobs, base: Logprobs) -> Effect:
    """The effect by the log-probabilities of vLLM on the export and on the base.

    Of each answer the tokens count that all have: an engine's context may end before an answer does.

    Raises:
        EvidenceError: vLLM scored no token of an answer, or a log-probability is no finite number.
    """
    effects, differences, floors = [], [], []
    for number, (a, b) in enumerate(zip(reference.exported, reference.base, strict=True)):
        c, d = shown[number], base[number]
        if a and not (c and d):
            raise EvidenceError(f"vLLM gave no probability for the answer to prompt {number}")
        for of_trainer, without, of_export, of_base in zip(a, b, c, d, strict=False):
            four = of_trainer, without, of_export, of_base
            if not all(value is not None and math.isfinite(value) for value in four):
                raise EvidenceError(
                    f"a log-probability of the answer to prompt {number} is no number: trainer {of_trainer}, its base "
                    f"{without}, export {of_export}, base {of_base}"
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
