"""What a vLLM model really holds, under the names that the trainer uses.

vLLM fuses q, k, v (and gate, up) into one layer; here they are taken apart again, so that digests can be compared
with the trainer's. Nothing in this file imports vLLM: it reads the model's own attributes.
"""

from collections.abc import Iterator
from typing import Any

import torch

from verl_aqn.digest import tensor_digest
from verl_aqn.mxfp4 import dequantize
from verl_aqn.mxfp4.checkpoint import base_digest


def hf_names(model: torch.nn.Module, name: str, parts: int) -> list[str]:
    """Trainer's names of the `parts` that vLLM fused into module `name`."""
    parent, _, leaf = name.rpartition(".")
    leaves = getattr(model, "packed_modules_mapping", {}).get(leaf, [leaf])
    if len(leaves) != parts:
        raise ValueError(f"{name} has {parts} parts, but the model names {leaves}")
    return [f"{parent}.{leaf}" for leaf in leaves]


def packed_base(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Packed codes u8 [N, K/2] and scales u8 [N, K/32] of every MXFP4 layer, under the trainer's names."""
    layer: Any
    for name, layer in model.named_modules():
        if not hasattr(layer, "mxfp4_packed"):
            continue
        name = name.removesuffix(".base_layer")
        widths = list(layer.logical_widths)
        packed = layer.mxfp4_packed.split(widths)
        scale = layer.weight_scale.data.split(widths)
        yield from zip(hf_names(model, name, len(widths)), packed, scale, strict=True)


def describe_base(model: torch.nn.Module) -> dict:
    """`{"layers", "base_digest", "weights_equal_base", "kernel"}` of the MXFP4 layers that compute.

    `weights_equal_base` says that the weights which the layers multiply with are bit for bit the packed ones.
    """
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "mxfp4_packed")]
    equal = all(
        torch.equal(layer.weight.data, dequantize(layer.mxfp4_packed, layer.weight_scale.data, layer.weight.dtype))
        for layer in layers
    )
    kernels = {type(layer.scheme.kernel).__name__ for layer in layers if hasattr(layer, "scheme")}
    return {
        "layers": len(layers),
        "base_digest": base_digest(packed_base(model)),
        "weights_equal_base": equal,
        "kernel": ",".join(sorted(kernels)),
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
