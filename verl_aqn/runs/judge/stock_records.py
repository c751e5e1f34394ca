"""The judge of a run of stock verl (`verl_aqn.stock`): it judges adapter, base and mismatch, but no noise.

The base of such a run is never packed. Fields of the record `adapter` here: `step`, after which the sync took place;
`sent`, the digest of the actor's own adapter in the dtype of the rollout; `expected`, the same for the part that each
rank of the rollout holds; `modules`, how many have an adapter in the actor; `faults` of the actor's adapter; `actual`,
what each rank of the rollout multiplies with, or its `fault`; `listed`, for each replica whether its requests get the
adapter; `requests` since the sync before, `with` and `without` an adapter; `uncovered`, what the ranks together do not
hold. The record `requests` at the end has only `listed` and `requests`.

Fields of `adapter use`: `step`, `tokens`, and in nats per token the mean distances `effect` (from the actor with its
adapter to the actor without it), `to_adapter` and `to_base` (from the rollout to each of these), `nearer`
(to_adapter − to_base) and its standard error `error`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from verl_aqn.errors import EvidenceError
from verl_aqn.runs.judge.records import Done, Fields, Judge

KINDS = ("placed", "base", "adapter", "mismatch", "adapter use", "requests", "stopped")
START = ("placed", "base", "adapter")
VISIBLE = 2.0
"""The adapter's effect is visible if it is more than this many times as large as the difference between kernels."""
SURE = 4.0
"""If the rollout is nearer to the base model by more than this many standard errors, that is a fault."""


def is_visible(record: Mapping[str, Any]) -> bool:
    """Return whether the adapter moves log-probs far enough to see from them whether the rollout used it."""
    return bool(record["effect"] > VISIBLE * min(record["to_adapter"], record["to_base"]))


class StockJudge(Judge):
    """A `Judge` for the records of a stock run."""

    def __init__(self) -> None:
        super().__init__(None)
        self.start = START

    def _once(self, kind: str, record: Fields) -> None:  # type: ignore[override]
        if kind not in KINDS:
            raise EvidenceError(f"there is a record of kind {kind!r}, which a stock run does not write")
        super()._once(kind, record)

    def _lacking_at_start(self) -> str:
        there = {key[0] for key in self._attempt}
        return next((kind for kind in START if kind not in there), "")

    def _on_placed(self, record: Fields) -> None:
        super()._on_placed(record)
        self.rollout_ranks = record["rollout_ranks"]
        if self.rollout_ranks < 1:
            raise EvidenceError("the record of the run's nodes counts no rank of the rollout")

    def _on_adapter(self, record: Fields) -> None:
        step, actual, expected = record["step"], record["actual"], record["expected"]
        where = f"after step {step}" if step else "at the start"
        if step < 0 or (self._last_sync is not None and step != self._last_sync + 1):
            raise EvidenceError(f"there is a sync of step {step}, but the sync before it was of step {self._last_sync}")
        self._last_sync = step
        if faults := record["faults"]:
            raise EvidenceError(f"{where}: {faults[0]}")
        if len(actual) != self.rollout_ranks:
            raise EvidenceError(f"{where} {len(actual)} of {self.rollout_ranks} ranks reported their adapter")
        for rank, one in enumerate(actual):
            if fault := one.get("fault"):
                raise EvidenceError(f"{where} the adapter is not in the rollout (rank {rank}): {fault}")
        if missing := record["uncovered"]:
            raise EvidenceError(f"{where} the rollout's ranks together do not hold all of the adapter of {missing[0]}")
        self._check_requests(record, where)
        if {one["modules"] for one in actual} != {record["modules"]} or record["modules"] < 1:
            counts = sorted({one["modules"] for one in actual})
            raise EvidenceError(
                f"{where} the rollout has an adapter on {counts} modules, the actor on {record['modules']}"
            )
        if len(expected) != len(actual) or [one["adapter_digest"] for one in actual] != expected:
            raise EvidenceError(f"{where} the adapter in the rollout is not the actor's")
        if len(expected) == 1 and expected != [record["sent"]]:
            raise EvidenceError(f"{where} the only rank of the rollout holds just a part of the adapter")
        if not all(0 <= one["b_max"] < math.inf for one in actual):
            raise EvidenceError(f"{where} the adapter in the rollout is not finite")
        if self._last_adapter and not record["requests"]["with"]:
            raise EvidenceError(f"{where}: no request to the rollout was seen")
        self._last_adapter = record

    def _on_requests(self, record: Fields) -> None:
        if record["when"] != "end":
            raise EvidenceError(f"requests were recorded at {record['when']!r}, expected 'end'")
        self._check_requests(record, "at the end")

    def _check_requests(self, record: Fields, where: str) -> None:
        """Check that all requests since the sync before had the adapter, and that later requests will have it."""
        if not record["listed"] or not all(record["listed"]):
            raise EvidenceError(
                f"{where} the rollout does not list the adapter: requests would be answered with the base model"
            )
        counts = record["requests"]
        if counts["without"]:
            count = counts["with"] + counts["without"]
            raise EvidenceError(f"{where}: {counts['without']} of {count} requests were answered without the adapter")

    def _on_adapter_use(self, record: Fields) -> None:
        step = record["step"]
        values = [record[key] for key in ("effect", "to_adapter", "to_base", "error")]
        if record["tokens"] < 1 or not all(math.isfinite(one) and one >= 0 for one in values):
            raise EvidenceError(f"step {step}: the effect of the adapter on log-probs was not measured")
        nearer, (effect, to_adapter, to_base, error) = record["nearer"], values
        if not math.isclose(nearer, to_adapter - to_base, rel_tol=1e-6, abs_tol=1e-9):
            raise EvidenceError(f"step {step}: the figures of the adapter's use contradict each other")
        if is_visible(record) and nearer > SURE * error and to_adapter > to_base:
            raise EvidenceError(
                f"step {step}: the rollout responds like the base model without the adapter (its log-probs differ by "
                f"{to_base:.3g} nats per token from the base model, and by {to_adapter:.3g} from the actor with its "
                f"adapter, which moves log-probs by {effect:.3g})"
            )

    def _missing_later(self, done: Done) -> Iterator[tuple[str, str]]:
        wanted: list[tuple] = [(kind, step) for step in done.steps for kind in ("adapter", "mismatch")]
        if done.finished:
            wanted += [("base", "end"), ("requests", "end")]
        yield from self._absent(wanted)
