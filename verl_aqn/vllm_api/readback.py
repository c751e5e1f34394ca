"""What a vLLM model really holds, under the names that the trainer uses.

vLLM fuses q, k, v (and gate, up) into one layer; here they are taken apart again, so that digests can be compared
with the trainer's. Nothing in this file imports vLLM: it reads the model's own attributes.
"""

from collections.abc import Iterator
from typing import Any

import torch

from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4 import dequantize
from verl_aqn.mxfp4.checkpoint import combined_digest, module_digest
from verl_aqn.shards import Slices, hf_names, parts_of

# How vLLM's kernels round activations; the scheme asks all of them for MXFP4 and only some comply. What is written here
# of kernels for GPUs was read in vLLM 0.28 (FlashInfer and B12X quantise as NVIDIA's hardware does), not measured.
KERNEL_ACTIVATIONS = {
    "MarlinMxFp4LinearKernel": "none",
    "HummingMxFp4LinearKernel": "none",
    "FlashInferMxFp4LinearKernel": "rceil/nearest",
    "B12xMxFp4LinearKernel": "rceil/nearest",
    "EmulationMxfp4LinearKernel": "even/nearest",
    "AiterMxfp4LinearKernel": "even/nearest",
    "XPUMxFp4LinearKernel": "unknown",
}


def kernel_activation(kernel: Any) -> str:
    """How ``kernel`` rounds activations: "none" (W4A16), "RULE/ROUNDING" (W4A4), or "unknown"."""
    if hasattr(kernel, "activation"):  # our own
        return str(kernel.activation or "none")
    return KERNEL_ACTIVATIONS.get(type(kernel).__name__, "unknown")


def check_activations(asked: str, actor: list[list[str]], rollout: list[dict]) -> None:
    """Raise EvidenceError unless every actor rank and every rollout rank rounds activations as the recipe asks.

    `asked`: as `kernel_activation` says it. `actor`: a list for each rank. `rollout`: answers of `describe_base`.
    """
    for rank, found in enumerate(actor):
        if found != [asked]:
            raise EvidenceError(f"actor rank {rank} rounds activations as {found}, but the recipe asks for {asked!r}")
    for answer in rollout:
        if answer["activations"] != [asked]:
            raise EvidenceError(
                f"the rollout's kernel {answer['kernel']} rounds activations as {answer['activations']}, but the "
                f"recipe asks for {asked!r}: set actor_rollout_ref.rollout.engine_kwargs.vllm.linear_backend (marlin "
                "for W4A16), or aqn.mxfp4.activation"
            )


def remember_packed(layer: Any) -> None:
    """Keep the digests of a layer's packed parts before a kernel rearranges them (Marlin does)."""
    widths = list(layer.logical_widths)
    parts = zip(layer.weight_packed.data.split(widths), layer.weight_scale.data.split(widths), strict=True)
    layer.mxfp4_digests = [module_digest(packed, scale) for packed, scale in parts]


def describe_base(model: torch.nn.Module) -> dict:
    """What the MXFP4 layers were loaded with, and what they compute with now.

    `base_digest`: of the packed bytes that each layer was loaded with, under the trainer's names. `slices`: the
    `Slices` of the weights that a tensor-parallel rank holds in part; the digest is then of these parts.
    `weights_digest`: of the weights as the kernel keeps them, to be compared between two moments.
    `weights_equal_base`: whether those are bit for bit the packed ones; None where a kernel keeps them in an order of
    its own. `activations`: what the kernels round their inputs to.
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
    parts = [part for name, layer in layers.items() for part in parts_of(model, name, layer)]
    dense = [layer for layer in layers.values() if hasattr(layer, "mxfp4_packed")]
    equal = all(
        torch.equal(layer.weight.data, dequantize(layer.mxfp4_packed, layer.weight_scale.data, layer.weight.dtype))
        for layer in dense
    )
    return {
        "layers": len(layers),
        "base_digest": combined_digest(loaded),
        "slices": {part.name: part.slice for part in parts if not part.whole},
        "weights_digest": tensor_digest((name, layer.weight.data) for name, layer in layers.items()),
        "weights_equal_base": equal if dense else None,
        "activations": sorted({kernel_activation(layer.scheme.kernel) for layer in layers.values()}),
        "kernel": ",".join(sorted({type(layer.scheme.kernel).__name__ for layer in layers.values()})),
    }


def adapter_tensors(
    model: torch.nn.Module, rank: int, slot: int = 0
) -> Iterator[tuple[str, torch.Tensor, list[int] | None]]:
    """A [r, K] and B·α/r [N, r] in the LoRA layers' own buffers, under the trainer's names.

    With each: None, or the `Slice` of it that a tensor-parallel rank holds.
    """
    for name, layer in model.named_modules():
        stacked_a, stacked_b = getattr(layer, "lora_a_stacked", None), getattr(layer, "lora_b_stacked", None)
        if not isinstance(stacked_a, tuple) or not isinstance(stacked_b, tuple):
            continue  # no LoRA layer, or the head: its adapters are one tensor, and nothing here trains it
        for part, a, b in zip(parts_of(model, name, layer.base_layer), stacked_a, stacked_b, strict=True):
            row, rows, column, columns = part.slice
            narrow = columns != part.columns
            yield f"{part.name}.A", a[slot, 0, :rank], [0, rank, column, columns] if narrow else None
            low = not narrow and not part.whole
            yield f"{part.name}.B", b[slot, 0, :, :rank], [row, rows, 0, rank] if low else None


def adapter_slices(model: torch.nn.Module, rank: int) -> Slices:
    """The adapter's tensors that this rank holds in part; reads no weight."""
    return {name: part for name, _, part in adapter_tensors(model, rank) if part}


def describe_adapter(model: torch.nn.Module, rank: int) -> dict:
    """`{"modules", "adapter_digest", "b_max"}` of the adapter that the engine multiplies with."""
    tensors = [(name, tensor) for name, tensor, _ in adapter_tensors(model, rank)]
    return {
        "modules": len(tensors) // 2,
        "adapter_digest": tensor_digest(tensors),
        "b_max": max((t.abs().max().item() for n, t in tensors if n.endswith(".B")), default=0.0),
    }
