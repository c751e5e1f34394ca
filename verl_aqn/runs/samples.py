"""Recorded digests of a step's samples. A step with many responses is split into several records to keep each small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_aqn.runs.folder import RunFolder

FILE = "samples.jsonl"
ANSWERS = 16384
"""The maximum number of responses in one record, about 0.6 MB."""


def sample_records(step: int, digest: str, answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the records of a step. `answers` {name: digest} is split over them in order.

    Each record says which part it is (from 0) of how many `parts`; `count` and `digest` are of the whole step.
    """
    items = list(answers.items())
    parts = [dict(items[at : at + ANSWERS]) for at in range(0, max(1, len(items)), ANSWERS)]
    told = {"kind": "samples", "step": step, "count": len(answers), "digest": digest}
    return [told | {"part": part, "parts": len(parts), "answers": found} for part, found in enumerate(parts)]


def samples_of(run: RunFolder) -> dict[int, dict[str, str]]:
    """Return the responses of every step, {name: digest}, ascending. For a repeated step the later ones are used.

    A step is left out if not all of its parts were written because the run was killed.
    """
    found: dict[int, dict[str, str]] = {}
    missing: dict[int, int] = {}
    for record in run.read(FILE):
        step = record["step"]
        if not record.get("part"):  # the first part, or the only record in the format of an older version
            found[step], missing[step] = {}, record.get("parts", 1)
        found[step] |= record["answers"]
        missing[step] -= 1
    return {step: found[step] for step in sorted(found) if missing[step] == 0}
