"""Ratios that must not get worse: our time divided by a peer's, both measured in turn in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.table import Table

from verl_aqn.bench import codec_speed as codec
from verl_aqn.bench import update_speed as update
from verl_aqn.errors import ConfigError

BASELINE = Path(__file__).with_name("baseline.json")
MARGIN = 2.0  # tolerated factor over the recorded ratio, because machines and their load differ


def ratios(rounds: int) -> dict[str, float]:
    """Return name → our time / the peer's. Lower is better."""
    measured = codec.measure("cpu", 1024, rounds, lambda _done, _total: None)
    found = {}
    for row in measured["codec"]:
        if faster := row.get("ours_times_as_fast"):
            found[f"quantise + dequantise, {row['dtype']}, {row['name'].removeprefix('… ')}"] = 1 / faster
    for row in measured["linear"]:
        if row["name"] == "packed":
            found[f"linear {'×'.join(map(str, row['shape']))}, packed by bf16"] = row["time_of_bf16"]
    arms = update.measure("135M", 4, "cpu", (2, 8, 100, 24), rounds)["arms"]
    for name in update.ARMS[1:]:
        found[f"update, {name} by bf16"] = arms[name]["time_of_bf16"]
    return found


def confirmed(
    rounds: int, then: dict[str, float], measure: Callable[[int], dict[str, float]] = ratios
) -> dict[str, float]:
    """Return `ratios`, measured a second time if something seems worse than `then`.

    The better of both values counts, so that other load on the machine does not fail the check.
    """
    now = measure(rounds)
    if not worse(now, then):
        return now
    again = measure(rounds)
    return {name: min(now[name], again[name]) for name in now}


def recorded() -> dict[str, float]:
    """Return the baseline.

    Raises:
        ConfigError: there is no baseline.
    """
    if not BASELINE.is_file():
        raise ConfigError(f"no baseline in {BASELINE}: create one with `verl-aqn bench guard --record`")
    return json.loads(BASELINE.read_text())["ratios"]


def worse(now: dict[str, float], then: dict[str, float]) -> list[str]:
    """Return the names whose ratio is more than `MARGIN` times the recorded one, or which were not measured."""
    return [name for name, ratio in then.items() if name not in now or now[name] > MARGIN * ratio]


def record(now: dict[str, float]) -> None:
    """Save `now` as the baseline."""
    content: dict[str, Any] = {"device": codec.device_name("cpu"), "ratios": {k: round(v, 4) for k, v in now.items()}}
    BASELINE.write_text(json.dumps(content, indent=2) + "\n")


def table(now: dict[str, float], then: dict[str, float]) -> Table:
    """Return a table of recorded and present ratios."""
    view = Table(
        title=f"Our time divided by a peer's; more than {MARGIN} × the recorded ratio is an error", title_justify="left"
    )
    for column in ("", "recorded", "now", ""):
        view.add_column(column, justify="left" if not column else "right")
    faults = worse(now, then)
    for name in dict.fromkeys([*then, *now]):
        cells = (f"{of[name]:.3f}" if name in of else "–" for of in (then, now))
        view.add_row(name, *cells, "worse" if name in faults else "")
    return view
