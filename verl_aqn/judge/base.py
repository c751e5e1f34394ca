"""placeholder of branch `base`"""

from collections.abc import Mapping
from typing import Any

from verl_aqn.errors import EvidenceError


def check_base(record: Mapping[str, Any], first: Mapping[str, Any] | None) -> None:
    if record.get("quantised") is False:
        return
    held = record["rollout"]
    if not record["actor"] or not held:
        raise EvidenceError("base: no rank")
    whole = [one["base_digest"] for one in held if not one.get("slices")]
    if {record["disk"], *record["actor"]} != {record["disk"]} or {record.get("served") or record["disk"], *whole} != {
        record.get("served") or record["disk"]
    }:
        raise EvidenceError(f"at the {record['when']} the MXFP4 base differs between disk, actor and rollout")
    if any(one.get("weights_equal_base") is False for one in held):
        raise EvidenceError("the rollout computes with other weights than its MXFP4 base")
    if first and first["disk"] != record["disk"]:
        raise EvidenceError("the base changed on disk")
