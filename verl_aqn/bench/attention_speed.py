"""Attention of one layer over groups of responses to one prompt, forward and backward, bf16, head size 64.

Arms: one row for each group with a dense mask (transformers' way to separate the responses of a row); separate rows
that repeat the prompt; and the layout of `verl_aqn.models`, including its gathering. All arms give the same values.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function

from verl_aqn.bench.codec_speed import device_name
from verl_aqn.models.attention import SharedMask, attend, attention
from verl_aqn.models.shared_prompts import share_prompts

SHAPES = ((4, 4, 192), (4, 8, 192), (2, 8, 512))  # groups, responses per group, tokens per response
WIDTH = 64
ARMS = ("dense mask", "separate rows", "shared prompts")


def measure(device: str, heads: int, kv_heads: int, prompt: int, rounds: int) -> dict[str, Any]:
    """Return seconds of each arm and shape in `SHAPES`: the best of `rounds` after a warm-up, with arms in turn."""
    rows = []
    for groups, samples, response in SHAPES:
        steps = arms(device, heads, kv_heads, groups, samples, prompt, response)
        best = dict.fromkeys(ARMS, float("inf"))
        for number in range(rounds + 1):
            for name, step in steps.items():
                seconds = _seconds(step, device)
                if number:
                    best[name] = min(best[name], seconds)
        rows.append({"groups": groups, "samples": samples, "response": response, "seconds": best})
    return {
        "device": device_name(device), "threads": torch.get_num_threads(), "heads": heads, "kv_heads": kv_heads,
        "prompt": prompt, "rows": rows,
    }  # fmt: skip


def arms(
    device: str, heads: int, kv_heads: int, groups: int, samples: int, prompt: int, response: int,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Callable[[], list[Tensor]]]:  # fmt: skip
    """Return functions that run attention forward and backward, one for each arm.

    Each returns the outputs of the responses [B, T, H, D], then the gradients of queries, keys and values in the layout
    of its inputs.
    """
    generator = torch.Generator().manual_seed(0)
    count, length = groups * samples, prompt + response
    ids = torch.arange(groups).repeat_interleave(samples).unsqueeze(1).expand(count, prompt)
    layout = share_prompts(list(ids.to(device)), [torch.zeros(response + 1, dtype=torch.int64, device=device)] * count)
    size = layout.input_ids.shape[1]
    places = torch.arange(size, device=device).view(groups, prompt + samples * response)
    own = places[:, prompt:].reshape(count, response)
    slots = torch.cat(
        [places[:, :prompt].repeat_interleave(samples, 0), own], 1
    )  # [B, P + T], positions of each response's row

    def states(number: int) -> Tensor:
        return torch.randn(1, size, number, WIDTH, generator=generator).to(device, dtype)

    given = [states(heads), states(kv_heads), states(kv_heads)]
    mask, module = SharedMask(layout, causal_mask_function), nn.Module()
    segment = torch.cat([torch.zeros(prompt), 1 + torch.arange(samples).repeat_interleave(response)]).to(device)
    order = torch.arange(places.shape[1], device=device)
    seen = (order[:, None] >= order) & ((segment == 0) | (segment == segment[:, None]))
    dense = seen.expand(groups, 1, *seen.shape)

    def run(inputs: list[Tensor], function: Callable[..., Tensor], pick: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [states.detach().requires_grad_() for states in inputs]
        out = pick(function(*(states.transpose(1, 2) for states in leaves)))
        out.backward(torch.ones_like(out))
        return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    grouped = [states[0][places] for states in given]
    separate = [states[0][slots] for states in given]
    return {
        "dense mask": lambda: run(
            grouped, lambda q, k, v: attend(q, k, v, dense, False).transpose(1, 2),
            lambda out: out[:, prompt:].reshape(count, response, heads, WIDTH),
        ),
        "separate rows": lambda: run(
            separate, lambda q, k, v: attend(q, k, v, None, True).transpose(1, 2), lambda out: out[:, prompt:length]
        ),
        "shared prompts": lambda: run(
            given, lambda q, k, v: attention(module, q, k, v, mask)[0],
            lambda out: out[0].index_select(0, own.flatten()).view(count, response, heads, WIDTH),
        ),
    }  # fmt: skip


def _seconds(step: Callable[[], Any], device: str) -> float:
    accelerator = torch.get_device_module(device) if device != "cpu" else None
    if accelerator:
        accelerator.synchronize()
    begun = time.perf_counter()
    step()
    if accelerator:
        accelerator.synchronize()
    return time.perf_counter() - begun


def table(result: dict[str, Any]) -> Table:
    """Return a table with one row for each shape."""
    view = Table(
        title=f"Attention of one layer, forward and backward, ms: {result['heads']} heads of {WIDTH} "
        f"({result['kv_heads']} of keys), prompts of {result['prompt']}, bf16, {result['device']}, "
        f"{result['threads']} threads",
        title_justify="left",
    )
    for column in ("groups × responses × tokens", *ARMS):
        view.add_column(column, justify="left" if column.startswith("groups") else "right")
    for row in result["rows"]:
        shape = f"{row['groups']} × {row['samples']} × {row['response']}"
        view.add_row(shape, *(f"{row['seconds'][name] * 1e3:,.0f}" for name in ARMS))
    return view
