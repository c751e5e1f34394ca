"""Judge a run's records with `verl_aqn.runs.judge`, for report, compare, export and the end of the run itself."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from verl_aqn.config.noise_settings import order_of, rule_of, schedule_of
from verl_aqn.config.schema import NoiseConfig, parse_aqn
from verl_aqn.config.stock_settings import is_stock
from verl_aqn.errors import AqnError, EvidenceError
from verl_aqn.noise.control import METRICS, ControlledSigma
from verl_aqn.noise.schedule import SigmaSchedule
from verl_aqn.runs.chain import broken
from verl_aqn.runs.folder import EVIDENCE, RunFolder
from verl_aqn.runs.judge.records import VERSION, Done, Judge, Tally
from verl_aqn.runs.judge.stock_records import StockJudge
from verl_aqn.runs.old_names import current_fields

RESCORED = "aqn/mismatch/rescored_tokens"
_FIGURES = ("abs_dlogp_mean", "abs_dlogp_p99", "kl_k3", "clipped_share")
MEASURED: dict[tuple[str, str | None], dict[str, str]] = {
    ("mismatch", "sampled"): {"tokens": "aqn/mismatch/tokens", **{key: f"aqn/mismatch/{key}" for key in _FIGURES}},
    ("mismatch", "rescored"): {"tokens": RESCORED, **{key: f"aqn/mismatch/kernels/{key}" for key in _FIGURES}},
    ("use", None): {"tokens": RESCORED, "effect": "aqn/mismatch/noise/abs_dlogp_mean"},
    **{("control", source): {"measured": name, "sigma": "aqn/sigma"} for source, name in METRICS.items()},
}
"""The fields of a record that are also among the metrics of its step, by kind and source."""
CHAIN = "chain"
"""The kind for the order and completeness of the records themselves, in addition to the kinds of `judge.records`."""


@dataclass(frozen=True)
class Finding:
    """The result for records of one kind: `right` of `total` are as they should be.

    `unknown`: the number that cannot be judged, because records of older versions lack a field or are missing. `good`:
    True if everything expected is present and right, False for any fault, None if the record does not say.
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
    """Findings by kind. `version`: of the evidence; version 1 does not contain everything that is expected today."""

    version: int
    findings: dict[str, Finding]

    @property
    def faults(self) -> list[str]:
        """Return all faults, one line each."""
        return [fault for finding in self.findings.values() for fault in finding.faults]


@dataclass(frozen=True)
class Expected:
    """What a run's other records say that its evidence must show.

    `noise`, `schedule`: None if config.yaml does not say, with the reason in `fault`. `sigmas`: those of schedule.json.
    """

    version: int
    noise: NoiseConfig | None
    schedule: SigmaSchedule | None
    sigmas: tuple[float, ...]
    fault: str
    done: Done
    metrics: dict[int, dict[str, Any]]
    """The metrics by step, from 1; empty if they are not comparable with the evidence."""
    stock: bool = False
    """Whether this is a run of stock verl (`verl_aqn.stock`), which has no noise."""


def judge_run(run: RunFolder, *, finished: bool | None = None) -> Judgement:
    """Judge all evidence of a run.

    Args:
        finished: whether the run reached its end; by default what its state says.

    Raises:
        DataError: a record is damaged.
    """
    lines = _lines(run)
    return judge_lines(expected_of(run, lines, finished), lines)


def judge_lines(expected: Expected, lines: Sequence[bytes]) -> Judgement:
    """Judge the lines of evidence.jsonl against what the run's other records say."""
    whole = expected.version >= VERSION
    noise, schedule = expected.noise, expected.schedule
    rule = rule_of(noise, schedule) if noise and schedule else None
    judge: Judge = (
        StockJudge()
        if expected.stock
        else Judge(
            (lambda step: order_of(noise, rule, step)) if noise and rule else None,
            stage_at=rule.stage if rule else None,
            sigmas=expected.sigmas,
            noisy_actor=bool(noise and noise.in_actor),
            whole=whole,
            control=rule if isinstance(rule, ControlledSigma) else None,
        )
    )
    faults: dict[str, list[str]] = {"noise": [expected.fault]} if expected.fault and whole else {}
    attempts: list[dict[int, dict[str, dict[str, Any]]]] = [{}]  # by attempt, step and kind
    for line in lines:
        record = json.loads(current_fields(line))
        judge.add(record)
        if record.get("kind") == "placed":
            attempts.append({})
        if record.get("kind") in ("mismatch", "use", "control") and isinstance(record.get("step"), int):
            attempts[-1].setdefault(record["step"], {})[record["kind"]] = record
    for kind, fault in _unlike_metrics(expected, attempts) if whole else ():
        faults.setdefault(kind, []).append(fault)
    for kind, tally in judge.tallies.items():
        faults.setdefault(kind, []).extend(tally.faults)
    absent: Counter[str] = Counter()
    for kind, fault in judge.missing(expected.done):
        if whole:
            faults.setdefault(kind, []).append(fault)
        else:
            absent[kind] += 1
    links, breaks = broken(lines)
    if breaks or (whole and links < len(lines)):
        numbers = ", ".join(map(str, breaks[:5] or [1]))
        faults[CHAIN] = [
            f"{EVIDENCE} was changed after it was written: line {numbers} does not follow the previous line"
        ]
    findings = {}
    for kind in dict.fromkeys([*judge.tallies, *faults, *absent]):
        known = judge.tallies.get(kind, Tally())
        right, unknown = known.right, known.unknown + absent[kind]
        wrong = tuple(faults.get(kind, ()))
        findings[kind] = Finding(kind, right, right + unknown + len(wrong), unknown, wrong)
    if CHAIN not in findings and links:
        findings[CHAIN] = Finding(CHAIN, links, len(lines), len(lines) - links, ())
    return Judgement(expected.version, findings)


def _unlike_metrics(
    expected: Expected, attempts: Sequence[dict[int, dict[str, dict[str, Any]]]]
) -> Iterator[tuple[str, str]]:
    """Yield the kind and the fault of each figure in the evidence that differs from the metrics of its step.

    `attempts`: the records of each attempt by step and kind. If a step was repeated, its metrics are those of the last
    attempt at it. A step writes its metrics at its end, so an attempt that was killed in its last step may have left
    the metrics of an attempt before.
    """
    for step in sorted({step for attempt in attempts for step in attempt}):
        tried = [attempt for attempt in attempts if step in attempt]
        cut_off = step == max(tried[-1]) and not expected.done.finished
        records: dict[str, dict[str, Any]] = {}  # the newest of each kind
        found = []  # the faults, as they were at the end of each attempt
        for attempt in tried:
            records |= attempt[step]
            found.append(list(_unlike(expected, step, records)))
        if not cut_off or all(found):
            yield from found[-1]


def _unlike(expected: Expected, step: int, records: dict[str, dict[str, Any]]) -> Iterator[tuple[str, str]]:
    """Yield the kind and the fault of each figure in an attempt's `records` of a step that differs from its metrics."""
    for kind, record in records.items():
        for key, name in MEASURED.get((kind, record.get("source")), {}).items():
            value, told = expected.metrics.get(step, {}).get(name), record.get(key)
            # The controller must not have used a figure that the step does not have.
            invented = kind == "control" and step in expected.metrics and value is None and told is not None
            if invented or (isinstance(value, int | float) and not _close(told, value)):
                yield kind, f"step {step}: {key} is {told} in {EVIDENCE} and {value} in metrics.jsonl ({name})"


def expected_of(run: RunFolder, lines: Sequence[bytes], finished: bool | None = None) -> Expected:
    """Return what the evidence of a run, given as its `lines`, must show."""
    steps = run.by_step("metrics.jsonl", "step")
    table = _table(run)
    config = run.block("config.yaml") or {}
    stock = is_stock(config)
    noise, schedule, fault = (None, None, "") if stock else _expected_noise(config, table)
    done = Done(
        steps=steps,
        validations=run.by_step("metrics.jsonl", "validation"),
        rescored=[step for step, record in steps.items() if (record.get("metrics") or {}).get(RESCORED)],
        finished=run.state["status"] == "finished" if finished is None else finished,
    )
    # Use the version that began the run: what an older version did not record stays missing when a newer one continues.
    attempts = [record.get("evidence") for record in run.read("events.jsonl") if record.get("kind") == "attempt"]
    told = attempts[:1] or [record.get("evidence") for record in map(json.loads, lines)]
    version = max((value for value in told if isinstance(value, int)), default=1)
    correction = (config.get("algorithm") or {}).get("rollout_correction") or {}
    metrics = {} if correction.get("bypass_mode") else {at: one.get("metrics") or {} for at, one in steps.items()}
    return Expected(version, noise, schedule, tuple(row["sigma"] for row in table), fault, done, metrics, stock)


def check_proved(run: RunFolder) -> None:
    """Raise EvidenceError if the evidence of a run has faults, because its measurements are then not valid results.

    Records that older versions did not write are not faults.
    """
    if faults := judge_run(run).faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise EvidenceError(f"the evidence of {run.path} has a fault: {faults[0]}{more}; see `verl-aqn report`")


def _close(one: Any, other: float) -> bool:
    return isinstance(one, int | float) and math.isclose(one, other, rel_tol=1e-6, abs_tol=1e-9)


def _expected_noise(
    config: dict[str, Any], table: list[dict[str, Any]]
) -> tuple[NoiseConfig | None, SigmaSchedule | None, str]:
    """Return the noise that the recorded config specifies, and what is wrong with the record of it."""
    try:
        noise = parse_aqn(config).noise
        schedule = schedule_of(config, len(table) or int(config["trainer"]["total_training_steps"]))
    except (AqnError, KeyError, TypeError, ValueError) as error:
        return None, None, f"the noise in config.yaml cannot be read: {error}"
    fault = "" if table else "schedule.json is missing or empty"
    for step, row in enumerate(table):
        if row["sigma"] != schedule.sigma(step) or row.get("stage") != schedule.stage(step):
            fault = (
                f"schedule.json has σ {row['sigma']} for step {step}, but config.yaml gives {schedule.sigma(step):g}"
            )
            break
    return noise, schedule, fault


def _table(run: RunFolder) -> list[dict[str, Any]]:
    """Return the rows of schedule.json, or an empty list if it is missing or damaged."""
    try:
        table = json.loads((run.path / "schedule.json").read_text())
    except (OSError, ValueError):
        return []
    rows = table if isinstance(table, list) else []
    good = all(isinstance(row, dict) and isinstance(row.get("sigma"), int | float) for row in rows)
    return rows if good else []


def _lines(run: RunFolder) -> list[bytes]:
    """Return the complete lines of evidence.jsonl. Raises DataError if one is damaged."""
    for _ in run.read(EVIDENCE):
        pass
    path = run.path / EVIDENCE
    whole = path.read_bytes() if path.is_file() else b""
    return whole[: whole.rfind(b"\n") + 1].split(b"\n")[:-1]
