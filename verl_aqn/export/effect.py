"""How much of what the adapter does an export shows, measured on log-probabilities of tokens of answers.

Four models say how probable the same tokens are: the trainer's model with the adapter (a) and without (b), and vLLM on
the export (c) and on the bare base (d). The adapter's effect is e = a − b and what the export shows is s = c − d, each
over all tokens. The error is ‖s − e‖ / ‖e‖: 0 for an export that does all that the adapter does and nothing else, and 1
for the bare base, which shows nothing. The floor is ‖d − b‖ / ‖e‖: how far apart two implementations are on equal
weights.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from verl_aqn.errors import EvidenceError
from verl_aqn.export.reference import Logprobs, Reference

ERROR = 0.1
FLOOR = 0.25


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
