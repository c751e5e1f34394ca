"""Growth of a step's time and memory with model size, samples and response length: our runs, one factor varied."""

import shutil
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table
from scipy import stats

from verl_aqn.bench import letters
from verl_aqn.bench.codec_speed import device_name
from verl_aqn.bench.shapes import write_model
from verl_aqn.bench.step import PHASES, RECIPE, Arm, batch_of, overrides, run_arm
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.config.compose import load_recipe
from verl_aqn.preflight.recipe_checks import recipe_shape

TIMES = (*PHASES, "step")


@dataclass(frozen=True)
class Point:
    """A run: model, prompts per step, responses per prompt, and tokens of each response."""

    model: str = "135M"
    prompts: int = 2
    samples: int = 8
    response: int = 24


# The varied factor → its runs. `Point()` is in all of them.
SERIES = {
    "parameters": [Point(model) for model in ("135M", "360M", "1B", "1.5B")],
    "samples": [Point(samples=samples) for samples in (4, 8, 16, 32)],
    "response": [Point(response=tokens) for tokens in (12, 24, 48, 96)],
}
SMALL = {"samples": [Point(samples=samples) for samples in (2, 4, 8)]}


def settings(point: Point, model: Path, steps: int) -> list[str]:
    """Return the recipe's overrides for one run. A random model is rewarded for letters, so that rewards differ."""
    return [
        *overrides(str(model), steps, small=True),
        *batch_of(point.prompts, point.samples),
        f"data.max_response_length={point.response}",
        f"actor_rollout_ref.rollout.max_model_len={136 + point.response}",
        f"reward.custom_reward_function.path={letters.__file__}",
        "reward.reward_kwargs.overlong_buffer_cfg.len=4",
    ]


def measure(steps: int, small: bool, base: Path, on_run: Callable[[str], None]) -> dict[str, Any]:
    """Run every point once, one after another, and return what `table` shows. `on_run` gets a text before each run."""
    series = SMALL if small else SERIES
    points = list(dict.fromkeys(point for points in series.values() for point in points))
    rows = []
    for number, point in enumerate(points):
        answers = f"{point.prompts} × {point.samples} responses of {point.response} tokens"
        on_run(f"{point.model}, {answers} (run {number + 1} of {len(points)})")
        if not (model := base / point.model).exists():  # packed here, so that the model does not stay in the cache
            write_model(point.model, base / "bf16")
            quantize_checkpoint(base / "bf16", model)
            shutil.rmtree(base / "bf16")
        folder = base / f"run-{number}"
        folder.mkdir()
        chosen = settings(point, model, steps)
        rows.append(row(point, chosen, run_arm("ours", chosen, folder, lambda: None)))
    result = {"device": device_name("cpu"), "steps": steps, "rows": rows}
    indices = {what: [points.index(point) for point in of] for what, of in series.items()}
    return result | {"series": indices, "exponents": exponents(rows, indices)}


def row(point: Point, chosen: list[str], arm: Arm) -> dict[str, Any]:
    """Return the medians over the steps of a run: seconds, tokens, bytes."""
    config = load_recipe(RECIPE, chosen)
    found: dict[str, Any] = {key: statistics.median(step[key] for step in arm.steps) for key in (*TIMES, "tokens")}
    found |= {f"memory: {kind}": arm.peak[kind] for kind in ("actor", "rollout", "all")}
    return asdict(point) | {"parameters": recipe_shape(config).parameters} | found


def exponents(rows: list[dict[str, Any]], series: dict[str, list[int]]) -> dict[str, dict[str, list[float]]]:
    """Fit y ~ x^b to the logarithms by least squares; return b and its 95 % interval.

    Only series of three or more runs are fitted.
    """
    found: dict[str, dict[str, list[float]]] = {}
    for what, indices in series.items():
        if len(indices) < 3:
            continue
        x = np.log([rows[index][what] for index in indices])
        for key in (*TIMES, "memory: actor", "memory: rollout"):
            fit = stats.linregress(x, np.log([rows[index][key] for index in indices]))
            half = stats.t.ppf(0.975, len(indices) - 2) * fit.stderr
            found.setdefault(what, {})[key] = [fit.slope, fit.slope - half, fit.slope + half]
    return found


def table(result: dict[str, Any]) -> Table:
    """Return a table with one row for each run, followed by the exponents."""
    view = Table(
        title=f"RL step on {result['device']}, medians of {result['steps']} steps",
        title_justify="left",
    )
    for column in ("model", "responses", "tokens", *(f"{key}, s" for key in TIMES), "actor, GB", "rollout, GB"):
        view.add_column(column, justify="left" if column == "model" else "right")
    for one in result["rows"]:
        times = (f"{one[key]:.2f}" for key in TIMES)
        memory = (f"{one[f'memory: {kind}'] / 1e9:.2f}" for kind in ("actor", "rollout"))
        answers = f"{one['prompts']} × {one['samples']}"
        view.add_row(one["model"], answers, str(one["response"]), *times, *memory)
    for what, fits in result["exponents"].items():
        cells = (f"{b:.2f} [{low:.2f}, {high:.2f}]" for b, low, high in fits.values())
        view.add_row(f"~ {what}^", "", "", *cells)
    return view
