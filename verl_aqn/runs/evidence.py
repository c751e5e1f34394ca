"""What a run's records prove: `verl_aqn.judge` over its folder, for report, compare, export and the run's own end."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from verl_aqn.config import NoiseConfig, order_of, parse_aqn, schedule_of
from verl_aqn.errors import AqnError, EvidenceError
from verl_aqn.judge.records import VERSION, Done, Judge
from verl_aqn.runs.chain import broken
from verl_aqn.runs.folder import EVIDENCE, RunFolder
from verl_aqn.schedule import SigmaSchedule

RESCORED = "aqn/parity/rescored_tokens"
CHAIN = "chain"
"""Stands for the order and completeness of the records themselves, beside the kinds of `judge.records`."""


@dataclass(frozen=True)
class Finding:
    """Records of one kind. `right` of `total` are as they should be.

    `unknown`: what cannot be judged, for records of older versions that lack a field or are not there.
    `good`: True where all that is wanted is there and right, False for any fault, None where it is not on record.
    """

    kind: str
    right: int
    total: int
    unknown: int
    faults: tuple[str, ...]

    @property
    def good(self) -> bool | None:
        if self.faults:
            return False
        return None if self.unknown or not self.total else True


@dataclass(frozen=True)
class Judgement:
    """Findings by kind. `version`: of the evidence; 1 does not hold all that is asked for today."""

    version: int
    findings: dict[str, Finding]

    @property
    def faults(self) -> list[str]:
        """Everything that is wrong, in one line each."""
        return [fault for finding in self.findings.values() for fault in finding.faults]


def judge_run(run: RunFolder, *, finished: bool | None = None) -> Judgement:
    """Judge all evidence of a run.

    Args:
        finished: whether the run came to its end; by default what its state says.

    Raises:
        DataError: a record is damaged.
    """
    records = list(run.read(EVIDENCE))
    version = _version(run, records)
    config = run.block("config.yaml") or {}
    steps = run.by_step("metrics.jsonl", "step")
    asked, fault = _asked(run, config)
    faults: dict[str, list[str]] = {"noise": [fault]} if fault and version >= VERSION else {}
    judge = Judge(
        (lambda step: order_of(*asked, step)) if asked else None,
        sigmas=[row["sigma"] for row in _table(run)],
        noisy_actor=bool(asked and asked[0].in_actor),
        whole=version >= VERSION,
    )
    for record in records:
        judge.add(record)
    for kind, tally in judge.tallies.items():
        faults.setdefault(kind, []).extend(tally.faults)
    done = Done(
        steps=steps,
        validations=run.by_step("metrics.jsonl", "validation"),
        rescored=[step for step, record in steps.items() if (record.get("metrics") or {}).get(RESCORED)],
        finished=run.state["status"] == "finished" if finished is None else finished,
    )
    absent: Counter[str] = Counter()
    for kind, fault in judge.missing(done):
        if version >= VERSION:
            faults.setdefault(kind, []).append(fault)
        else:
            absent[kind] += 1
    links, breaks = _chain(run)
    if breaks or (version >= VERSION and links < len(records)):
        lines = ", ".join(map(str, breaks[:5] or [1]))
        faults[CHAIN] = [f"{EVIDENCE} was changed after it was written: line {lines} does not follow the one before"]
    findings = {}
    for kind in dict.fromkeys([*judge.tallies, *faults, *absent]):
        tally = judge.tallies.get(kind)
        right, unknown = (tally.right, tally.unknown + absent[kind]) if tally else (0, absent[kind])
        wrong = tuple(faults.get(kind, ()))
        findings[kind] = Finding(kind, right, right + unknown + len(wrong), unknown, wrong)
    if CHAIN not in findings and links:
        findings[CHAIN] = Finding(CHAIN, links, len(records), len(records) - links, ())
    return Judgement(version, findings)


def check_proved(run: RunFolder) -> None:
    """Raise EvidenceError where a run's evidence does not hold: what was measured in it is no result.

    What older versions did not record is no fault.
    """
    if faults := judge_run(run).faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise EvidenceError(f"the evidence of {run.path} does not hold: {faults[0]}{more}; see `verl-aqn report`")


def _version(run: RunFolder, records: list[dict[str, Any]]) -> int:
    """Of the newest evidence that anything in the folder speaks of: a lost record does not make a run an old one."""
    told = [record.get("evidence") for record in (*records, *run.read("events.jsonl"))]
    return max((value for value in told if isinstance(value, int)), default=1)


def _asked(run: RunFolder, config: dict[str, Any]) -> tuple[tuple[NoiseConfig, SigmaSchedule] | None, str]:
    """The noise that the recorded config asks for, and what is wrong with the record of it."""
    table = _table(run)
    try:
        noise = parse_aqn(config).noise
        schedule = schedule_of(config, len(table) or int(config["trainer"]["total_training_steps"]))
    except (AqnError, KeyError, TypeError, ValueError) as error:
        return None, f"the noise that config.yaml asks for cannot be derived: {error}"
    fault = "" if table else "schedule.json is not there, or is empty"
    for step, row in enumerate(table):
        if row.get("sigma") != schedule.sigma(step) or row.get("stage") != schedule.stage(step):
            fault = f"schedule.json has σ {row.get('sigma')} for step {step}, config.yaml {schedule.sigma(step):g}"
            break
    return (noise, schedule), fault


def _table(run: RunFolder) -> list[dict[str, Any]]:
    path = run.path / "schedule.json"
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError):
        return []
    rows = table if isinstance(table, list) else []
    good = all(isinstance(row, dict) and isinstance(row.get("sigma"), int | float) for row in rows)
    return rows if good else []


def _chain(run: RunFolder) -> tuple[int, list[int]]:
    path = run.path / EVIDENCE
    if not path.is_file():
        return 0, []
    whole = path.read_bytes()
    return broken(whole[: whole.rfind(b"\n") + 1].splitlines())
