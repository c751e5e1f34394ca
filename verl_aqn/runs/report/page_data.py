"""Read what the page needs from a run's folder: the newest record of each step. Any record may be missing."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from verl_aqn.errors import DataError
from verl_aqn.runs.evidence import Judgement, judge_run
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.judge.records import IDENTITY
from verl_aqn.runs.report.charts import COLOURS
from verl_aqn.runs.run_list import describe
from verl_aqn.runs.stats.arms import find_each, flatten, records_of

QUANTIZATION = "quantization.json"  # verl_aqn.checkpoints.error_report.FILE, whose module imports torch


@dataclass(frozen=True)
class Run:
    """The records of one run.

    `steps` counts from 1, as verl does; `validations` has 0 for the validation before training. `summary` is from
    `describe`; `settings` has config and versions by dotted key. `quantization` is the rounding error of the base; if
    it is None, `no_quantization` says why.
    """

    folder: RunFolder
    label: str
    place: int  # in the order of the command line, from 0
    colour: int  # its own colour, or that of its recipe if there are more runs than colours
    summary: dict[str, Any]
    settings: dict[str, Any]
    steps: dict[int, dict[str, float]]
    validations: dict[int, dict[str, Any]]
    evidence: list[dict[str, Any]]
    events: list[dict[str, Any]]
    judgement: Judgement = field(default_factory=lambda: Judgement(1, {}))
    quantization: dict[str, Any] | None = None
    no_quantization: str = ""
    answered: tuple[int, ...] = field(default=())  # steps with recorded responses, ascending

    @cached_property
    def of_kind(self) -> dict[str, list[dict[str, Any]]]:
        """Return the evidence by kind. If an attempt repeated a record (`IDENTITY`), the newest one takes its place."""
        newest: dict[tuple, dict[str, Any]] = {}
        for line, record in enumerate(self.evidence):
            kind = str(record.get("kind"))
            identity = [record.get(part) for part in IDENTITY.get(kind, ()) if part != "rank"]
            if kind not in IDENTITY or None in identity:  # older records may lack a field
                identity = ["line", line]
            for rank in record.get("ranks") or [record.get("rank")]:
                newest[kind, *identity, rank] = record
        found: dict[str, dict[int, dict[str, Any]]] = {}
        for (kind, *_), record in newest.items():
            found.setdefault(kind, {})[id(record)] = record
        return {kind: list(records.values()) for kind, records in found.items()}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read the runs in `paths` (folders of runs or base folders), whatever their status.

    Raises DataError if a path contains no run or a record is damaged, and ConfigError if a run is given twice.
    """
    folders = find_each(paths)
    summaries = [describe(folder) for folder in folders]
    names = [str(one["recipe"] or one["run"]) for one in summaries]
    labels = [
        name if one["seed"] is None else f"{name}, seed {one['seed']}"
        for name, one in zip(names, summaries, strict=True)
    ]
    many = Counter(labels)
    labels = [
        label if many[label] == 1 else f"{label} ({one['run'][-6:]})"
        for label, one in zip(labels, summaries, strict=True)
    ]
    kinds = list(dict.fromkeys(names)) if len(names) > COLOURS else []
    return [
        _read(folder, label, place, (kinds.index(name) if kinds else place) % COLOURS, one)
        for place, (folder, label, name, one) in enumerate(zip(folders, labels, names, summaries, strict=True))
    ]


def _read(folder: RunFolder, label: str, place: int, colour: int, summary: dict[str, Any]) -> Run:
    steps = {}
    for step, record in folder.by_step("metrics.jsonl", "step").items():
        metrics = record.get("metrics") or {}
        steps[step] = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
    validations = folder.by_step("metrics.jsonl", "validation")
    evidence = list(folder.read("evidence.jsonl"))
    config, versions = records_of(folder.path) if (folder.path / "config.yaml").is_file() else ({}, {})
    settings = flatten(config | {"versions": versions})
    quantization, why = _quantization(folder, evidence, settings)
    names = [path.stem for path in (folder.path / "validation").glob("*.jsonl")]
    return Run(
        folder=folder,
        label=label,
        place=place,
        colour=colour,
        summary=summary,
        settings=settings,
        steps=steps,
        validations={step: one for step, one in validations.items() if one.get("items") and "accuracy" in one},
        evidence=evidence,
        judgement=judge_run(folder),
        events=list(folder.read("events.jsonl")),
        quantization=quantization,
        no_quantization=why,
        answered=tuple(sorted(int(name) for name in names if name.isdecimal())),
    )


def base_of(evidence: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the first record of the base, or None."""
    return next((record for record in evidence if record.get("kind") == "base"), None)


def _quantization(
    folder: RunFolder, evidence: Sequence[dict[str, Any]], settings: dict[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """Return the rounding error of the base that has the recorded digest, or None with the reason.

    The report is read from the run's folder, or else from the folder of the checkpoint.
    """
    base = base_of(evidence)
    if base is None:
        return None, "the run stopped before it loaded its base"
    if base.get("quantised") is False:
        return None, "its base is unquantised (16-bit): there is no rounding error to show"
    packed = settings.get("actor_rollout_ref.model.path")
    for file in (folder.path / QUANTIZATION, *([Path(packed) / QUANTIZATION] if packed else [])):
        if not file.is_file():
            continue
        try:
            report = json.loads(file.read_text())
        except ValueError as error:
            raise DataError(f"{file} is damaged ({error}): move it away") from error
        if report.get("base_digest") == base.get("disk"):
            return report, ""
    return None, (
        f"no {QUANTIZATION} of this base was found: its packed checkpoint was made by an older version or by "
        "another tool. `verl-aqn quantize` writes this file for a new checkpoint"
    )


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is not a number, or is NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
