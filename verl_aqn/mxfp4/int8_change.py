"""How much a base changes when the rollout holds it in int8, and how much change is allowed. Imports no torch.

A block is 32 weights with one MXFP4 scale. The error of a block is the Euclidean norm of its change divided by its own
norm: 0 if nothing changes, 1 if all of its weights become zero. The error of several blocks is the root mean square of
theirs. So a few very large weights cannot hide that the small blocks beside them are lost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LIMIT_BASE = 0.005
"""Largest error of all blocks together. On the embedded model, an error of this size in every block changes log-probs
by 0.053 nats a token, and computing in bfloat16 instead of float32 by 0.050 (docs/devices.md)."""
LIMIT_MATRIX = 0.02
"""Largest error of one matrix. MXFP4 itself rounds with an error of about 0.11, which has 30 times the energy."""
INSTEAD = "set aqn.mxfp4.rollout_weight_format=bf16, which holds every base exactly"


@dataclass(frozen=True)
class Change:
    """The number of blocks, the number of blocks that change, and the sum of the squared errors of the blocks."""

    blocks: int = 0
    changed: int = 0
    squares: float = 0.0

    @property
    def error(self) -> float:
        """Root mean square of the errors of the blocks."""
        return math.sqrt(self.squares / self.blocks) if self.blocks else 0.0

    def __add__(self, other: Change) -> Change:
        return Change(self.blocks + other.blocks, self.changed + other.changed, self.squares + other.squares)


def worst(changes: Mapping[str, Change]) -> str:
    """Return the name of the matrix with the largest error; the first one in order of name if several have it."""
    return max(sorted(changes), key=lambda name: changes[name].error)


def summary(changes: Mapping[str, Change]) -> dict[str, int | float | str]:
    """Return what a record keeps of the changes of all matrices."""
    total, name = sum(changes.values(), Change()), worst(changes)
    return {
        "blocks": total.blocks,
        "changed": total.changed,
        "error": total.error,
        "matrix": name,
        "matrix_error": changes[name].error,
    }


def sentence(found: Mapping[str, int | float | str]) -> str:
    """Say in one line how a base in int8 differs from the packed one; `found` is a `summary`."""
    if not found["changed"]:
        return f"all {found['blocks']:,} blocks have the packed base's values in int8"
    share = float(found["changed"]) / float(found["blocks"])
    return (
        f"{found['changed']:,} of {found['blocks']:,} blocks ({100 * share:.2g} %) have other values in int8 than in "
        f"the packed base, with an error of {100 * float(found['error']):.2g} % over all blocks and at most "
        f"{100 * float(found['matrix_error']):.2g} % in a matrix ({found['matrix']})"
    )


def matrix_fault(name: str, error: float) -> str:
    """Say that a matrix changes too much in int8, in which module, and what to do; "" if its change is allowed."""
    if error <= LIMIT_MATRIX:
        return ""
    return (
        f"{name} would change by {100 * error:.2g} % in int8, more than {100 * LIMIT_MATRIX:g} %, because its rows "
        f"hold weights of too different sizes: {INSTEAD}, or keep the layer, and those that vLLM "
        "fuses with it, in 16 bits with aqn.mxfp4.exclude"
    )


def base_fault(error: float) -> str:
    """Say that the base as a whole changes too much in int8, and what to do; "" if its change is allowed."""
    if error <= LIMIT_BASE:
        return ""
    return f"the base would change by {100 * error:.2g} % in int8, more than {100 * LIMIT_BASE:g} %: {INSTEAD}"
