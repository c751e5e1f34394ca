"""What a vLLM model really holds, under the names that the trainer uses.

vLLM fuses q, k, v (and gate, up) into one layer; here they are taken apart again, so that digests can be compared
with the trainer's. Nothing in this file imports vLLM: it reads the model's own attributes.
"""

from collections.abc import Iterator
from typing import Any

import torch

from verl_aqn.digest import tensor_digest
from verl_aqn.mxfp4 import dequantize
from verl_aqn.mxfp4.checkpoint import combined_digest, module_digest


def hf_names(model: torch.nn.Module, name: str, parts: int) -> list[str]:
    """Trainer's names of the `parts` that vLLM fused into module `name`."""
    parent, _, leaf = name.rpartition(".")
    leaves = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    if len(leaves) != parts:
        raise ValueError(f"{name} has {parts} parts, but the model names {leaves}")
    return [f"{parent}.{leaf}" for leaf in leaves]


def remember_packed(layer: Any) -> None:
    """Keep the digests of a layer's packed parts before a kernel rearranges them (Marlin does)."""
    widths = list(layer.logical_widths)
    parts = zip(layer.weight_packed.data.split(widths), layer.weight_scale.data.split(widths), strict=True)
    layer.mxfp4_digests = [module_digest(packed, scale) for packed, scale in parts]


def describe_base(model: torch.nn.Module) -> dict:
    """What the MXFP4 layers were loaded with, and what they compute with now.

    `base_digest`: of the packed bytes that each layer was loaded with, under the trainer's names. `weights_digest`: of
    the weights as the kernel keeps them, to be compared between two moments. `weights_equal_base`: whether those are
    bit for bit the packed ones; None where a kernel keeps them in an order of its own.
    """
    layers: dict[str, Any] = {
        name.removesuffix(".base_layer"): layer
        for name, layer in model.named_modules()
        if hasattr(layer, "mxfp4_digests")
    }
    loaded = [
        pair
        for name, layer in layers.items()
        for pair in zip(hf_names(model, name, len(layer.mxfp4_digests)), layer.mxfp4_digests, strict=True)
    ]
    dense = [layer for layer in layers.values() if hasattr(layer, "mxfp4_packed")]
    equal = all(
        torch.equal(layer.weight.data, dequantize(layer.mxfp4_packed, layer.weight_scale.data, layer.weight.dtype))
        for layer in dense
    )
    return {
        "layers": len(layers),
        "base_digest": combined_digest(loaded),
        "weights_digest": tensor_digest((name, layer.weight.data) for name, layer in layers.items()),
        "weights_equal_base": equal if dense else None,
        "kernel": ",".join(sorted({type(layer.scheme.kernel).__name__ for layer in layers.values()})),
    }


def adapter_tensors(model: torch.nn.Module, rank: int, slot: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """A [r, K] and B·α/r [N, r] in the LoRA layers' own buffers, under the trainer's names."""
    for name, layer in model.named_modules():
        stacked_a, stacked_b = getattr(layer, "lora_a_stacked", None), getattr(layer, "lora_b_stacked", None)
        if not isinstance(stacked_a, tuple) or not isinstance(stacked_b, tuple):
            continue  # no LoRA layer, or the head: its adapters are one tensor, and nothing here trains it
        for part, a, b in zip(hf_names(model, name, len(stacked_a)), stacked_a, stacked_b, strict=True):
            yield f"{part}.A", a[slot, 0, :rank]
            yield f"{part}.B", b[slot, 0, :, :rank]


def describe_adapter(model: torch.nn.Module, rank: int) -> dict:
    """`{"modules", "adapter_digest", "b_max"}` of the adapter that the engine multiplies with."""
    tensors = list(adapter_tensors(model, rank))
    return {
        "modules": len(tensors) // 2,
        "adapter_digest": tensor_digest(tensors),
        "b_max": max((t.abs().max().item() for n, t in tensors if n.endswith(".B")), default=0.0),
    }
