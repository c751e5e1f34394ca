"""What fits where: the memory estimate of a recipe for public models on common devices, from their config.json alone.

Nothing here was measured on a device. `verl_aqn.preflight.memory_plan` has the formulas.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verl_aqn.bench.shapes import write_config
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.preflight.device_plan import Fit, fewest
from verl_aqn.preflight.memory_plan import sizes
from verl_aqn.preflight.shape import Shape
from verl_aqn.preflight.sizing import shape_of

RECIPE = "e12_aggressive_1ep"


@dataclass(frozen=True)
class Device:
    """A kind of device: its name, GB of memory (1e9 bytes), and the profile and settings of a run there."""

    name: str
    gb: int
    profile: str
    settings: tuple[str, ...] = ()


INT8 = "aqn.mxfp4.rollout_weight_format=int8"
DEVICES = (
    Device("A2, one die of A3", 64, "npu", ("aqn.mxfp4.rollout_weight_format=bf16",)),
    Device("the same, int8 in the rollout", 64, "npu", (INT8,)),
    Device("Ascend 950PR", 128, "npu", ("aqn.mxfp4.rollout_weight_format=packed",)),
    Device("H100", 80, "cuda"),
    Device("H200", 141, "cuda"),
    Device("B200", 180, "cuda"),
)


# Families with biases in q, k and v. A layer with a bias cannot be int8 (`verl_aqn.checkpoints.int8_base`).
BIASED = ("qwen2",)
KEEP_BIASED = "aqn.mxfp4.exclude=[lm_head,embed_tokens,q_proj,k_proj,v_proj]"
# Name of a model → its shape in `verl_aqn.bench.shapes`, and its family.
MODELS = {
    "Qwen2.5-1.5B": ("1.5B", "qwen2"),
    "Qwen2.5-7B": ("7B", "qwen2"),
    "Llama-3.1-8B": ("8B", "llama"),
    "Qwen2.5-14B": ("14B", "qwen2"),
    "Qwen2.5-32B": ("32B", "qwen2"),
    "Llama-3.1-70B": ("70B", "llama"),
}


def shape(model: str, exclude: tuple[str, ...]) -> Shape:
    """Return the shape of a model of `MODELS`, whose layers are packed without those that `exclude` names."""
    with tempfile.TemporaryDirectory() as folder:
        return shape_of(write_config(MODELS[model][0], Path(folder), MODELS[model][1]), exclude)


def estimate(recipe: str, models: Sequence[str] = tuple(MODELS), overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return for each model and device the fewest devices that hold the recipe, with the parts of the estimate.

    `overrides`: settings of the recipe, for example other lengths.
    """
    rows = []
    for model in models:
        for device in DEVICES:
            biased = INT8 in device.settings and MODELS[model][1] in BIASED
            settings = [*device.settings, *([KEEP_BIASED] if biased else []), *overrides]
            config = load_recipe(recipe, [f"profile={device.profile}", *settings])
            found = fewest(shape(model, parse_aqn(config).mxfp4.exclude), sizes(config), int(device.gb * 1e9))
            rows.append(
                {"model": model, "device": device.name, "estimated": True, **found.to_dict(), "text": cell(found)}
            )
    return rows


def cell(found: Fit) -> str:
    """Return a cell of the table: devices, peak of the actor and of the rollout without cache, sequences at once."""
    if found.fault:
        return f"no: {found.fault}"
    rollout = (found.rollout.total - found.cache) / 1e9
    return f"{found.sizes.ranks}: {found.actor.total / 1e9:.0f}, {rollout:.0f} GB, {found.sequences:,}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the estimates as a Markdown table, a row for each model."""
    names = [f"{device.name}, {device.gb} GB" for device in DEVICES]
    lines = ["| model | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for model in dict.fromkeys(row["model"] for row in rows):
        lines.append(f"| {model} | " + " | ".join(row["text"] for row in rows if row["model"] == model) + " |")
    return "\n".join(lines)


def parts_table(rows: Sequence[dict[str, Any]], device: str) -> str:
    """Return the parts of the estimates on one kind of device as a Markdown table in GB, a column for each model."""
    chosen = [row for row in rows if row["device"] == device]
    lines = ["| GB | " + " | ".join(f"{row['model']}, {row['devices']} ×" for row in chosen) + " |"]
    lines.append("|---|" + "---:|" * len(chosen))
    for who in ("actor", "rollout"):
        for part in dict.fromkeys(part for row in chosen for part in row[who]["parts"]):
            values = [row[who]["parts"].get(part, 0) / 1e9 for row in chosen]
            lines.append(f"| {who}: {part} | " + " | ".join(f"{value:.1f}" for value in values) + " |")
    return "\n".join(lines)
