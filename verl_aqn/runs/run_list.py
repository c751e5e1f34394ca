"""List the runs and their progress, for `verl-aqn runs`."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from verl_aqn.errors import AqnError, DataError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.stats.intervals import pass_text, samples_of, share_text
from verl_aqn.safe_files import is_own_folder

DEFAULT_BASES = "/tmp/mxfp4_*"  # where recipes and plans put their runs if aqn.run.dir is not set
# a base folder, or a folder with several, such as a plan's
_BELOW = ("runs/[!.]*/state.json", "*/runs/[!.]*/state.json")

_KEYS = (
    "run", "recipe", "status", "attempt", "created", "minutes", "step", "steps", "accuracy", "flexible", "math_verify",
    "items", "samples", "pass_at", "seed", "noise", "base", "adapter", "message", "path",
)  # fmt: skip


def find_runs(folder: Path | None = None) -> list[RunFolder]:
    """Return the runs under `folder`: a base folder, a folder with base folders, or one run; oldest first.

    By default, search the folders of recipes and plans that belong to this user. Raises DataError if `folder` does not
    exist or contains no run.
    """
    if folder is None:
        bases = sorted(filter(is_own_folder, Path(DEFAULT_BASES).parent.glob(Path(DEFAULT_BASES).name)))
        paths = [path for base in bases for pattern in _BELOW for path in base.glob(pattern)]
    else:
        paths = [path for pattern in ("state.json", *_BELOW) for path in folder.glob(pattern)]
        if not paths:
            what = "contains no runs" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
            raise DataError(f"{folder} {what}: give a folder that was used as aqn.run.dir in `verl-aqn train`")
    return sorted((RunFolder(path.parent) for path in paths), key=_created)


def _created(run: RunFolder) -> str:
    try:
        return run.state["created"]
    except AqnError:  # a damaged run: sorted before all others
        return ""


def listed(run: RunFolder) -> dict[str, Any]:
    """Return `describe`; for a run with damaged records, only its name, path, `status` and `message` are set.

    `status` is then `damaged`.
    """
    try:
        return describe(run)
    except AqnError as error:
        known = {"run": run.path.name, "status": "damaged", "message": str(error), "path": str(run.path)}
        return dict.fromkeys(_KEYS) | known


def describe(run: RunFolder) -> dict[str, Any]:
    """Describe one run in plain values. Values that an older version did not record are None.

    `status` is that of state.json, or `dead` if the state is running but no process holds the run's lock. `step` and
    `steps`: finished and planned steps. From the last validation, as fractions of 1 over `items`: `accuracy` (strict),
    `flexible` and `math_verify`; with several responses (`samples`) per item these are averages, and `pass_at` has
    pass@k by k. `minutes`: from the start of the first attempt to the end or to the last record. `base` and `adapter`:
    digests of the MXFP4 base and of the last adapter in the rollout.
    """
    state = run.state
    status = state["status"]
    if status == "running" and not run.locked:
        status = "dead"
    config = run.block("config.yaml")  # None if the run was killed before the file was written
    metrics = list(run.read("metrics.jsonl"))
    steps = [record for record in metrics if record.get("kind") == "step"]
    validations = [record for record in metrics if record.get("kind") == "validation"]
    evidence = list(run.read("evidence.jsonl"))
    base = next((record.get("disk") for record in evidence if record.get("kind") == "base"), None)
    adapter = next((record.get("sent") for record in reversed(evidence) if record.get("kind") == "adapter"), None)
    last = validations[-1] if validations else {}
    began, ended = (datetime.fromisoformat(state[key]).timestamp() for key in ("created", "updated"))
    if status in ("running", "dead"):  # state.json was written at the start
        files = (run.path / "metrics.jsonl", run.path / "state.json")
        ended = max(path.stat().st_mtime for path in files if path.exists())
    return {
        "run": run.path.name,
        "recipe": _get(config, "trainer", "experiment_name"),
        "status": status,
        "attempt": state.get("attempt"),
        "created": state["created"],
        "minutes": round((ended - began) / 60, 1),
        "step": steps[-1]["step"] if steps else 0,
        "steps": _get(config, "trainer", "total_training_steps"),
        "accuracy": last.get("accuracy"),
        "flexible": last.get("flexible"),
        "math_verify": last.get("math_verify"),
        "items": last.get("items"),
        "samples": samples_of(last) if last else None,
        "pass_at": last.get("pass_at"),
        "seed": _get(config, "aqn", "seed"),
        "noise": _get(config, "aqn", "noise"),
        "base": base,
        "adapter": adapter,
        "message": state.get("message", ""),
        "path": str(run.path),
    }


def table(rows: Iterable[dict[str, Any]]) -> Table:
    """Return a table of the results of `listed`, one run per row."""
    view = Table(title="Runs (accuracy without noise, 95 % interval)", title_justify="left")
    rows = list(rows)
    several = any(map(pass_text, rows))
    passed = ("pass@k",) if several else ()
    for column in ("run", "recipe", "status", "steps", "σ", "seed", "accuracy", *passed, "minutes"):
        view.add_column(column, justify="left" if column in ("run", "recipe", "status") else "right", no_wrap=True)
    for row in rows:
        view.add_row(
            escape(row["run"]),
            escape(row["recipe"] or "–"),
            row["status"],
            "–" if row["step"] is None else f"{row['step']}/{row['steps'] or '?'}",
            sigmas(row["noise"]),
            "–" if row["seed"] is None else str(row["seed"]),
            escape(share_text(row["accuracy"], row["items"], " %")),
            *([pass_text(row) or "–"] if several else []),
            "–" if row["minutes"] is None else f"{row['minutes']:g}",
        )
    return view


def sigmas(noise: dict[str, Any] | None) -> str:
    """Return '0.05 → 1e-05' for a config's `aqn.noise`, or '0.005', '0.05, then by kl', 'off' or '–'.

    '0.005' is a constant σ, whose end is not used; with `aqn.noise.control` it is the start. '–' means that there is no
    noise block.
    """
    if not noise or not noise.get("enabled", True):
        return "off" if noise else "–"
    keys = ("sigma_start",) if noise.get("kind") == "constant" else ("sigma_start", "sigma_end")
    text = " → ".join("?" if noise.get(key) is None else f"{noise[key]:g}" for key in keys)
    return f"{text}, then by {noise['control']['target']}" if noise.get("control") else text


def _get(config: Any, *keys: str) -> Any:
    for key in keys:
        config = config.get(key) if isinstance(config, dict) else None
    return config
