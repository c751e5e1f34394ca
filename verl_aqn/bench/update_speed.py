"""The actor's update (forward, backward, Adam) on random weights: packed or bf16 base, prompts shared or not.

One process, one device; LoRA of rank 32 on every linear layer by PEFT, bf16 adapters, SDPA, logits of responses only.
"""

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from verl_aqn.bench.codec_speed import device_name
from verl_aqn.bench.shapes import SHAPES, write_config
from verl_aqn.models.attention import NAME, laid_out
from verl_aqn.models.layouts import shared_inputs
from verl_aqn.models.shared_prompts import SharedPrompts, share_prompts
from verl_aqn.mxfp4.linear import Mxfp4Linear

ARMS = ("bf16", "packed", "packed, prompts shared")


def build(shape: str, layers: int | None, device: str, attention: str = "sdpa") -> PreTrainedModel:
    """Return a model with random bf16 weights. `layers`: number of layers, if fewer than in the shape."""
    with TemporaryDirectory() as folder:
        config = AutoConfig.from_pretrained(write_config(shape, Path(folder)))
    config.num_hidden_layers = layers or config.num_hidden_layers
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)


def pack(model: PreTrainedModel) -> None:
    """Replace every linear layer except the head by an `Mxfp4Linear`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear) and child is not model.get_output_embeddings():
                setattr(module, name, Mxfp4Linear.from_linear(child))


def updater(
    model: PreTrainedModel, inputs: dict[str, Tensor], places: tuple[Tensor, Tensor, Tensor],
    layout: SharedPrompts | None,
) -> Callable:  # fmt: skip
    """Return a function that takes one optimiser step. `places`: row, column and label of each response token."""
    adapted = get_peft_model(
        model, LoraConfig(r=32, lora_alpha=16, target_modules="all-linear"), autocast_adapter_dtype=False
    )
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-5)
    row, column, label = places

    def update() -> None:
        with laid_out(layout):
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[row, column]).float()
        nn.functional.cross_entropy(logits, label).backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def batches(vocabulary: int, prompts: int, samples: int, prompt: int, response: int, device: str) -> dict[str, Any]:
    """Return inputs and places of the same responses: with one row per sample, and with one row per prompt."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randint(vocabulary, (prompts, prompt), generator=generator).repeat_interleave(samples, 0)
    answers = torch.randint(vocabulary, (prompts * samples, response), generator=generator)
    shared = share_prompts(list(given.to(device)), list(answers.to(device)))
    rows = torch.arange(prompts * samples).repeat_interleave(response)
    columns = (prompt - 1 + torch.arange(response)).repeat(prompts * samples)
    return {
        "separate": (
            {"input_ids": torch.cat([given, answers], 1).to(device)},
            (rows.to(device), columns.to(device), answers.flatten().to(device)),
            None,
        ),
        "shared": (
            shared_inputs(shared, keeps=False),
            (torch.zeros_like(shared.column), shared.column, shared.label),
            shared,
        ),
    }


def measure(
    shape: str, layers: int | None, device: str, sizes: tuple[int, int, int, int], rounds: int,
    on_round: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:  # fmt: skip
    """Run the arms in turn, `rounds` times after a warm-up; return medians, and ratios to bf16 in the same round.

    `sizes`: prompts, samples per prompt, tokens per prompt, tokens per response.
    """
    rows: dict[str, dict[str, Any]] = {}
    made = batches(SHAPES[shape][-1], *sizes, device)
    for name in ARMS:
        shared = "shared" in name
        model = build(shape, layers, device, NAME if shared else "sdpa")
        if name != "bf16":
            pack(model)
        weights = sum(p.nbytes for p in model.parameters())
        batch = made["shared" if shared else "separate"]
        rows[name] = {"update": updater(model, *batch), "weights": weights, "times": [], "peak": 0}
    for number in range(rounds + 1):
        for found in rows.values():
            seconds, peak = timed(found["update"], device)
            if number:
                found["times"].append(seconds)
                found["peak"] = max(found["peak"], peak)
        on_round(number)
    dense = rows["bf16"]
    return {
        "device": device_name(device),
        "shape": shape,
        "layers": layers,
        "sizes": list(sizes),
        "arms": {
            name: {
                "seconds": median(found["times"]),
                "time_of_bf16": median(t / d for t, d in zip(found["times"], dense["times"], strict=True)),
                "weight_bytes": found["weights"],
                "peak_bytes": found["peak"] or None,
            }
            for name, found in rows.items()
        },
    }


def timed(update: Callable, device: str) -> tuple[float, int]:
    """Return seconds, and bytes that the step allocated beyond what stays on the device (0 on a CPU)."""
    accelerator = torch.get_device_module(device) if device != "cpu" else None
    if accelerator:
        accelerator.synchronize()
        accelerator.reset_peak_memory_stats()
        before = accelerator.memory_allocated()
    begun = time.perf_counter()
    update()
    if not accelerator:
        return time.perf_counter() - begun, 0
    accelerator.synchronize()
    return time.perf_counter() - begun, accelerator.max_memory_allocated() - before


def table(result: dict[str, Any]) -> Table:
    """Return a table with one row per arm."""
    prompts, samples, prompt, response = result["sizes"]
    layers = f", {result['layers']} layers" if result["layers"] else ""
    view = Table(
        title=f"Update of {result['shape']}{layers}, {prompts} × {samples} responses, {prompt} + {response} tokens, "
        f"{result['device']}",
        title_justify="left",
    )
    for column in ("", "ms", "time relative to bf16", "weights, MB", "other peak memory, MB"):
        view.add_column(column, justify="right" if column else "left")
    for name, arm in result["arms"].items():
        peak = f"{arm['peak_bytes'] / 1e6:,.0f}" if arm["peak_bytes"] else ""
        times = (f"{arm['seconds'] * 1e3:,.1f}", f"{arm['time_of_bf16']:.2f}")
        view.add_row(name, *times, f"{arm['weight_bytes'] / 1e6:,.1f}", peak)
    return view
