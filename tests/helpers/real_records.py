"""Records of real runs on a tiny model (tests/integration/conftest.py's settings).

`actor` has noise in the actor too; the σ of `sigma_control` follows a KL.
"""

import json
from pathlib import Path

from verl_aqn.runs.chain import linked
from verl_aqn.runs.folder import EVIDENCE
from verl_aqn.runs.judge.base_record import EMPTY_DIGEST
from verl_aqn.runs.judge.ranks import grouped, grouped_base
from verl_aqn.runs.old_names import current_fields

REAL = sorted((Path(__file__).parents[1] / "unit" / "runs" / "real_runs").iterdir())
FORMS = ("each rank", "alike ranks")
"""Records of the runs as they were written, and as they are today: one for all ranks that say the same."""


def records_of(run: Path, form: str = FORMS[0]) -> list[dict]:
    records = [json.loads(current_fields(line)) for line in (run / EVIDENCE).read_bytes().splitlines()]
    if form != FORMS[0] and not any(
        isinstance(one.get("ranks"), list) for one in records
    ):  # a newer run was written so
        records = [alike(one) for one in records]
    return [json.loads(line) for line in lines_of(records)]  # linked under today's names of fields


def alike(record: dict) -> dict:
    if "rank" in record:
        record["ranks"] = [record.pop("rank")]
    if record["kind"] == "adapter":
        ranks = zip(record.pop("expected"), record["actual"], strict=True)
        record["actual"] = grouped([{"expected": wanted, **one} for wanted, one in ranks])
    if record["kind"] == "base":
        for one in record["rollout"]:
            assert one.pop("slices") == {}
            one["sliced"] = {"matrices": 0, "digest": EMPTY_DIGEST}
        record = grouped_base(record)
    return record


def lines_of(records: list[dict], link: bool = True, before: bytes = b"") -> list[bytes]:
    """Return lines of evidence.jsonl that follow line `before`, linked again so that the chain finds nothing."""
    lines = [before]
    for record in records:
        lines.append(json.dumps(linked(lines[-1], record) if link else record).encode())
    return lines[1:]
