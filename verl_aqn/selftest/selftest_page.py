"""The result as one JSON document and one page, made to be attached to an issue: no paths, no names of the machine."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verl_aqn import __version__
from verl_aqn.selftest.rung import FAILED, NOT_RUN, PASSED, Outcome, Rung
from verl_aqn.selftest.scrub import Owner, scrub_all

FORMAT = 1
PAGE, DOCUMENT = "selftest.md", "selftest.json"
_MARKS = {PASSED: "✓ passed", FAILED: "✗ failed", NOT_RUN: "– not run"}
# Texts that this package wrote itself. A user called "passed" does not change them.
_OURS = ("name", "status", "proves", "send")


def document(
    rungs: Sequence[Rung], outcomes: Sequence[Outcome], device: str, seconds: float, whose: Owner
) -> dict[str, Any]:
    """Return the whole result as a JSON document, scrubbed."""
    rows = []
    for rung, outcome in zip(rungs, outcomes, strict=True):
        row = {
            "name": rung.name, "status": outcome.status, "seconds": round(outcome.seconds, 1), "proves": rung.proves,
            "figure": outcome.figure, "figures": outcome.figures, "why": outcome.why,
            "send": rung.send if outcome.status == FAILED else "", "log": outcome.tail,
        }  # fmt: skip
        rows.append({key: value if key in _OURS else scrub_all(value, whose) for key, value in row.items()})
    return {
        "selftest": FORMAT,
        "verl_aqn": __version__,
        "device": device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "seconds": round(seconds, 1),
        **{
            status.replace(" ", "_"): sum(row["status"] == status for row in rows)
            for status in (PASSED, FAILED, NOT_RUN)
        },
        "rungs": rows,
    }


def markdown(found: dict[str, Any]) -> str:
    """Return the document as one page."""
    counts = f"{found['passed']} passed, {found['failed']} failed, {found['not_run']} not run"
    lines = [
        f"# verl-aqn selftest: {found['device']}, {counts}",
        "",
        f"verl-aqn {found['verl_aqn']}, {found['date']}, {found['seconds']:.0f} s. This page and `{DOCUMENT}` contain "
        "no paths and no names of the machine. Please attach both to an issue, also if everything passed.",
        "",
        "| rung | result | s | figure, or why not |",
        "|---|---|---:|---|",
    ]
    for row in found["rungs"]:
        said = (row["figure"] or row["why"]).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {row['name']} | {_MARKS[row['status']]} | {row['seconds']:.0f} | {said} |")
    for title, text in (("What passed, and so is proved here", PASSED), ("What was not run", NOT_RUN)):
        if rows := [row for row in found["rungs"] if row["status"] == text]:
            lines += ["", f"## {title}", ""]
            lines += [f"- **{row['name']}**: {row['proves']}" for row in rows]
    for row in (row for row in found["rungs"] if row["status"] == FAILED):
        lines += ["", f"## {row['name']} failed", "", f"It should prove: {row['proves']}", "", f"Why: {row['why']}", ""]
        lines += [f"Please send also: {row['send']}.", ""]
        lines += ["````text", row["log"], "````"] if row["log"] else []
    if environment := next((row["figures"] for row in found["rungs"] if row["name"] == "environment"), None):
        lines += ["", "## Environment", "", "```json", json.dumps(environment, indent=1, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def write(folder: Path, found: dict[str, Any]) -> tuple[Path, Path]:
    """Write both files into `folder`, and return them."""
    page, data = folder / PAGE, folder / DOCUMENT
    page.write_text(markdown(found), encoding="utf-8")
    data.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return page, data
