"""Check of closed-loop σ: whether every step has the σ that the controller gives for the measurements on record."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from verl_aqn.errors import EvidenceError
from verl_aqn.noise.control import METRICS, ControlledSigma


def check_control(record: Mapping[str, Any], rule: ControlledSigma | None) -> None:
    """Compare a step's record with the controller's decision, and add its measurement for later steps.

    Args:
        record: the result of `ControlledSigma.record`.
        rule: the controller with the measurements of the records before; None if the run's config has no controller.

    Raises:
        EvidenceError: σ, its target or its decision differ from those of the controller; or the record has neither a
            measurement nor the reason why it has none.
    """
    if rule is None:
        raise EvidenceError("there is a record of control, but the run's config has no aqn.noise.control")
    step, measured = record["step"] - 1, record.get("measured")
    if type(step) is not int or not 0 <= step < rule.total_steps:
        raise EvidenceError(
            f"there is a record of control for step {record['step']}, but steps are 1 to {rule.total_steps}"
        )
    rule.add(step, measured if isinstance(measured, int | float) else None)
    expected = rule.record(step, {METRICS[rule.control.target]: measured})
    for key in ("source", "target", "sigma", "decision"):
        if record[key] != expected[key]:
            raise EvidenceError(
                f"step {step + 1}: {key} of the controller is {record[key]}, but aqn.noise.control and the "
                f"measurements before it give {expected[key]}"
            )
    reason = record["reason"]
    if "measured" not in record or not isinstance(reason, str) or bool(reason) != (measured is None):
        raise EvidenceError(f"step {step + 1}: the controller has no measurement and no reason, or both")
    if measured is not None and not (math.isfinite(measured) and measured >= -1e-6):
        raise EvidenceError(f"step {step + 1}: the {record['source']} is {measured}, which is not a measurement")
