"""What a step would take on many devices: `verl_aqn.bench.cost` at published limits, times what is reached of them.

On the CPU what is reached is fitted to `verl-aqn bench growth`; on accelerators nothing was measured, and the shares
are assumptions that are printed with the result.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.table import Table
from scipy.optimize import nnls

from verl_aqn.bench.cost import Device, Load, Work, bound, limit_s, phases
from verl_aqn.bench.growth import machine, work_of
from verl_aqn.bench.shapes import write_config
from verl_aqn.bench.step import PHASES, RECIPE
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.preflight.device_plan import fit as fits
from verl_aqn.preflight.memory_plan import Sizes, sizes
from verl_aqn.preflight.shape import Shape
from verl_aqn.preflight.sizing import shape_of

GROWTH = Path(__file__).with_name("growth.json")  # `verl-aqn bench growth --json`
NPUS, NO_MX = ("a2", "a3", "950dt"), ("a2", "a3")
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Reached:
    """Seconds of a phase = `times` the limit + `turn` for each turn (launches, schedulers) + `once` a step."""

    times: float
    turn: float = 0.0
    once: float = 0.0

    def seconds(self, limit: float, turns: float) -> float:
        return self.times * limit + self.turn * turns + self.once


# Assumed, not measured: 40 % of the peak in training, 60 % of the memory's bandwidth in decoding, and some 15 ms for
# which a decoding step that is launched eagerly waits for its host.
ASSUMED = {
    "generation": Reached(1 / 0.6, turn=0.015),
    "log-probs": Reached(1 / 0.4, turn=0.05),
    "update": Reached(1 / 0.4, turn=0.1),
    "sync": Reached(2.0, once=0.5),
}


def of_growth(growth: dict[str, Any]) -> tuple[dict[str, Reached], list[float], list[dict[str, Any]]]:
    """From what `verl_aqn.bench.growth` recorded: what the CPU reaches, seconds beside the phases (a step, a sample),
    and each run measured and fitted. The last run is not fitted to."""
    device, runs = machine(growth), growth["rows"]
    works = [work_of(run) for run in runs]
    samples = [run["prompts"] * run["samples"] for run in runs]
    beside = [run["step"] - sum(run[name] for name in PHASES) for run in runs]
    fitted = slice(0, len(runs) - 1)
    reached = {
        name: fit_reached([run[name] for run in runs[fitted]], [work[name] for work in works[fitted]], device)
        for name in PHASES
    }
    rest = nnls(np.array([[1.0, number] for number in samples[fitted]]), np.array(beside[fitted]))[0].tolist()
    rows: list[dict[str, Any]] = []
    for run, work, number in zip(runs, works, samples, strict=True):
        found = predict(reached, work, device, 1)
        found["step"] += rest[0] + rest[1] * number
        what = f"{run['model']}, {run['prompts']} × {run['samples']} × {run['response']}"
        what += " (not fitted)" * (run is runs[-1])
        rows.append({"run": what, "measured": {name: run[name] for name in (*PHASES, "step")}, "fitted": found})
    return reached, rest, rows


def project_recipe(shape: str, device: Device, prompt: int, response: int, *, weak: bool) -> dict[str, Any]:
    """`project` for the recipe on GSM8K; what the CPU was measured at gives `beside` and the check of the small end."""
    growth = json.loads(GROWTH.read_text())
    _, rest, check = of_growth(growth)
    profile = "npu" if device.name in NPUS else "cuda"
    config = load_recipe(RECIPE, [f"profile={profile}", "experiment=gsm8k"])
    given = replace(sizes(config), served_packed=device.name not in NO_MX)
    with TemporaryDirectory() as folder:
        found = shape_of(write_config(shape, Path(folder)), parse_aqn(config).mxfp4.exclude)
    load = Load(given.batch, given.samples, prompt, response, given.response)
    rows = project(found, given, load, device, COUNTS, weak=weak, beside=rest[1])
    assumed = [
        f"{name}: {1 / one.times:.0%} of the limit, {one.turn:g} s a turn, {one.once:g} s a step"
        for name, one in ASSUMED.items()
    ]
    base = "as MXFP4" if given.served_packed else "as its bf16 equal"
    return {
        "title": f"{shape} on {device.name}, {load.prompts} × {load.samples} answers{' on 8, more on more' * weak}, "
        f"{prompt} + {response} tokens (longest {given.response}), served {base}",
        "rows": rows,
        "check": check,
        "assumed": [
            "Assumed of devices, none of which was measured:",
            *assumed,
            f"beside: {rest[1] * 1e3:.1f} ms a sample in the trainer's process, measured on {growth['device']}; "
            "nothing overlaps; limit: all of this at 100 %, without turns.",
        ],
    }


def fit_reached(seconds: list[float], works: list[Work], device: Device) -> Reached:
    """Of one phase on one CPU, by least squares of relative errors without negative parts."""
    x = np.array([[limit_s(work, device, 1), work.turns, 1.0] for work in works])
    y = np.array(seconds)
    (times, turn, once), _ = nnls(x / y[:, None], np.ones_like(y))
    return Reached(float(times), float(turn), float(once))


def predict(reached: dict[str, Reached], works: dict[str, Work], device: Device, ranks: int) -> dict[str, float]:
    """Seconds of each phase and of the `step`, without what the trainer's process does beside them."""
    found = {name: reached[name].seconds(limit_s(works[name], device, ranks), works[name].turns) for name in PHASES}
    return found | {"step": sum(found.values())}


def project(
    shape: Shape, sizes: Sizes, load: Load, device: Device, counts: Iterable[int], *, weak: bool, beside: float
) -> list[dict[str, Any]]:
    """A row for each number of devices. `weak`: the batch grows with them, from `load` on the first count.

    `beside`: seconds of the trainer's process for each sample, which more devices do not shorten.
    """
    rows: list[dict[str, Any]] = []
    counts = list(counts)
    for ranks in counts:
        grown = ranks // counts[0] if weak else 1
        here = replace(sizes, ranks=ranks, batch=sizes.batch * grown, mini_batch=sizes.mini_batch * grown)
        loaded = replace(load, prompts=load.prompts * grown)
        held = fits(shape, here, int(device.size))
        works = phases(shape, here, loaded, held.cache)
        times = predict(ASSUMED, works, device, ranks)
        rest = beside * loaded.prompts * load.samples
        rows.append(
            {
                "devices": ranks,
                "samples": loaded.prompts * load.samples,
                "tokens": loaded.prompts * load.samples * (load.prompt + load.response),
                **times,
                "beside": rest,
                "step": times["step"] + rest,
                "limit": sum(limit_s(work, device, ranks) for work in works.values()),
                "bound": {name: bound(work, device, ranks) for name, work in works.items()},
                "received": sum(work.received for work in works.values()),
                "memory": max(held.actor.total, held.rollout.total),
                "fault": held.fault,
            }
        )
    return rows


def check_table(rows: list[dict[str, Any]]) -> Table:
    """Measured runs beside what the fitted model says of them."""
    view = Table(title="The model's small end: seconds measured and fitted, CPU", title_justify="left")
    view.add_column("run")
    for name in (*PHASES, "step"):
        view.add_column(name, justify="right")
    for one in rows:
        pairs = (f"{one['measured'][name]:.2f} {one['fitted'][name]:.2f}" for name in (*PHASES, "step"))
        view.add_row(one["run"], *pairs)
    return view


def scale_table(rows: list[dict[str, Any]], title: str) -> Table:
    """The projection. Times in seconds at the assumed shares; in the last columns the limits, traffic and memory."""
    view = Table(title=title, title_justify="left")
    names = ("devices", "samples", *PHASES, "beside", "step", "limit", "tokens/s")
    for column in (*names, "received, GB", "needed, GB"):
        view.add_column(column, justify="right")
    for one in rows:
        times = (f"{one[name]:.2f}" for name in (*PHASES, "beside", "step", "limit"))
        held = one["fault"] or f"{one['memory'] / 1e9:.1f}"
        view.add_row(
            f"{one['devices']:,}", f"{one['samples']:,}", *times, f"{one['tokens'] / one['step']:,.0f}",
            f"{one['received'] / 1e9:.2f}", held,
        )  # fmt: skip
    return view
