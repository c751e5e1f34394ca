"""Digests of a step's samples on record: a step of many answers is several records, none of which is large."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verl_aqn.runs.folder import RunFolder

FILE = "samples.jsonl"
ANSWERS = 16384
"""Of one record: some 0.6 MB."""


def sample_records(step: int, digest: str, answers: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the records of a step, whose `answers` {name: digest} are split over them in their order.

    Each says which part it is (from 0) of how many `parts`; `count` and `digest` are of the whole step.
    """
    items = list(answers.items())
    parts = [dict(items[at : at + ANSWERS]) for at in range(0, max(1, len(items)), ANSWERS)]
    told = {"kind": "samples", "step": step, "count": len(answers), "digest": digest}
    return [told | {"part": part, "parts": len(parts), "answers": found} for part, found in enumerate(parts)]


def samples_of(run: RunFolder) -> dict[int, dict[str, str]]:
    """Return the answers of every step, {name: digest}, ascending. Of a step that was taken twice the later ones.

    A step of which not all parts were written, because the run was killed, is left out.
    """
    found: dict[int, dict[str, str]] = {}
    missing: dict[int, int] = {}
    for record in run.read(FILE):
        step = record["step"]
        if not record.get("part"):  # the first, or the only one of an older version
            found[step], missing[step] = {}, record.get("parts", 1)
        found[step] |= record["answers"]
        missing[step] -= 1
    return {step: found[step] for step in sorted(found) if missing[step] == 0}
