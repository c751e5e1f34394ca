"""Ratios that must not get worse: our time divided by a peer's, both measured in turn in this process."""

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table

from verl_aqn.bench import codec_speed as codec
from verl_aqn.bench import update_speed as update
from verl_aqn.errors import ConfigError
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.kernels import native

BASELINE = Path(__file__).with_name("baseline.json")
# Tolerated factors over the recorded ratio, because machines and their load differ. A ratio near 1 compares two similar
# computations and varies less.
NEAR_1, MARGIN_NEAR_1, MARGIN = (0.8, 1.25), 1.3, 2.0
ATTEMPTS = 3


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
    found["product of 16 tokens with an adapter, packed by bf16"] = decode_product(16, 1536, 576, rounds)
    return found


def decode_product(tokens: int, n: int, k: int, rounds: int) -> float:
    """Return the time of the rollout's products on this CPU divided by that of bf16 products, for the same adapters.

    Each of 30 layers of N x K has its own weight, so that caches do not help.
    """
    torch.manual_seed(0)
    x, a = torch.randn(tokens, k).bfloat16(), torch.randn(32, k).bfloat16()
    b = torch.randn(n, 32).bfloat16()
    packed = [quantize(torch.randn(n, k).bfloat16(), "even") for _ in range(30)]
    dense = [dequantize(*codes, torch.bfloat16) for codes in packed]

    def theirs() -> None:
        for weight in dense:
            F.linear(x, weight).addmm_(F.linear(x, a), b.t())

    def ours() -> None:
        for codes in packed:
            native.multiply(codes.packed, codes.scale, x, None, a, b)

    works = [ours if native.can_multiply() else theirs, theirs]
    times = [[update.timed(work, "cpu")[0] for work in works] for _ in range(4 * rounds + 1)][1:]
    return median(one / other for one, other in times)


def confirmed(
    rounds: int, then: dict[str, float], measure: Callable[[int], dict[str, float]] = ratios
) -> dict[str, float]:
    """Return `ratios`, measured up to three times if something seems worse than `then`.

    The best value of each counts, so that other load on the machine does not fail the check.
    """
    now = measure(rounds)
    for _ in range(ATTEMPTS - 1):
        if not worse(now, then):
            break
        again = measure(rounds)
        now = {name: min(now[name], again[name]) for name in now}
    return now


def recorded() -> dict[str, float]:
    """Return the baseline.

    Raises:
        ConfigError: there is no baseline.
    """
    if not BASELINE.is_file():
        raise ConfigError(f"no baseline in {BASELINE}: create one with `verl-aqn bench guard --record`")
    return json.loads(BASELINE.read_text())["ratios"]


def worse(now: dict[str, float], then: dict[str, float]) -> list[str]:
    """Return the names whose ratio is more than `margin` times the recorded one, or which were not measured."""
    return [name for name, ratio in then.items() if name not in now or now[name] > margin(ratio) * ratio]


def margin(recorded: float) -> float:
    """Return the factor over the recorded ratio that is tolerated."""
    low, high = NEAR_1
    return MARGIN_NEAR_1 if low <= recorded <= high else MARGIN


def record(now: dict[str, float]) -> None:
    """Save `now` as the baseline."""
    content: dict[str, Any] = {"device": codec.device_name("cpu"), "ratios": {k: round(v, 4) for k, v in now.items()}}
    BASELINE.write_text(json.dumps(content, indent=2) + "\n")


def table(now: dict[str, float], then: dict[str, float]) -> Table:
    """Return a table of recorded and present ratios."""
    title = (
        f"Our time divided by a peer's; an error is more than {MARGIN} × the recorded ratio, or {MARGIN_NEAR_1} × if "
        f"the ratio is between {NEAR_1[0]} and {NEAR_1[1]}"
    )
    view = Table(title=title, title_justify="left")
    for column in ("", "recorded", "now", ""):
        view.add_column(column, justify="left" if not column else "right")
    faults = worse(now, then)
    for name in dict.fromkeys([*then, *now]):
        cells = (f"{of[name]:.3f}" if name in of else "–" for of in (then, now))
        view.add_row(name, *cells, "worse" if name in faults else "")
    return view
