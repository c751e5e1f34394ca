"""What fits where: the memory estimate of a recipe for public models on common devices, from their config.json alone.

Nothing here was measured on a device. `verl_aqn.preflight.memory_plan` has the formulas.
"""

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


DEVICES = (
    Device("A2, one die of A3", 64, "npu", ("aqn.mxfp4.rollout_weight_format=bf16",)),
    Device("Ascend 950PR", 128, "npu", ("aqn.mxfp4.rollout_weight_format=packed",)),
    Device("H100", 80, "cuda"),
    Device("H200", 141, "cuda"),
    Device("B200", 180, "cuda"),
)


def _qwen(hidden: int, inner: int, layers: int, heads: int, keys: int, vocabulary: int = 152064) -> dict[str, Any]:
    return {
        "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": keys, "vocab_size": vocabulary, "tie_word_embeddings": hidden < 3000,
        "max_position_embeddings": 32768,
    }  # fmt: skip


def _llama(hidden: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    }  # fmt: skip


# The sizes in the models' own config.json.
MODELS = {
    "Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2, 151936),
    "Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4),
    "Llama-3.1-8B": _llama(4096, 14336, 32, 32),
    "Qwen2.5-14B": _qwen(5120, 13824, 48, 40, 8),
    "Qwen2.5-32B": _qwen(5120, 27648, 64, 40, 8),
    "Llama-3.1-70B": _llama(8192, 28672, 80, 64),
}


def shape(config: dict[str, Any], exclude: tuple[str, ...]) -> Shape:
    """Return the shape of a model with this config.json, without the layers `exclude` among those that are packed."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return shape_of(Path(folder), exclude)


def estimate(recipe: str, models: Sequence[str] = tuple(MODELS), overrides: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Return for each model and device the fewest devices that hold the recipe, with the parts of the estimate.

    `overrides`: settings of the recipe, for example other lengths.
    """
    rows = []
    for model in models:
        for device in DEVICES:
            config = load_recipe(recipe, [f"profile={device.profile}", *device.settings, *overrides])
            found = fewest(shape(MODELS[model], parse_aqn(config).mxfp4.exclude), sizes(config), int(device.gb * 1e9))
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
