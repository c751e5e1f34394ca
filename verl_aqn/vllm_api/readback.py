"""What a vLLM model really holds, under the names that the trainer uses.

vLLM fuses q, k, v (and gate, up, and the experts of a MoE layer) into one layer; here they are taken apart again, so
that digests can be compared with the trainer's. Nothing in this file imports vLLM: it reads the model's own attributes.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch

from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4 import dequantize
from verl_aqn.mxfp4.checkpoint import combined_digest, module_digest, values_digest
from verl_aqn.shards import NOTHING, ExpertPart, Part, Slices, experts_of, hf_names, is_experts, parts_of

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
# The same of what is no kernel of vLLM's registry: weights in bf16, packed experts, and vllm-ascend's scheme (0.23.0).
METHOD_ACTIVATIONS = {
    "UnquantizedLinearMethod": "none",
    "AscendUnquantizedLinearMethod": "none",
    "UnquantizedFusedMoEMethod": "none",
    "CpuMoEMethod": "none",
    "MarlinExperts": "none",
    "AscendW4A4MXFP4DynamicLinearMethod": "floor/half_away",
}


def kernel_activation(kernel: Any) -> str:
    """How ``kernel`` rounds activations: "none" (W4A16), "RULE/ROUNDING" (W4A4), or "unknown"."""
    if type(kernel).__name__ == "CpuMxfp4LinearKernel":
        return str(kernel.activation or "none")
    return (KERNEL_ACTIVATIONS | METHOD_ACTIVATIONS).get(type(kernel).__name__, "unknown")


def kernel_of(layer: Any) -> Any:
    """What a layer multiplies with: a kernel of vLLM's, vllm-ascend's scheme, or the method for bf16."""
    if is_experts(layer):
        packed = hasattr(layer, "mxfp4_digests")
        return layer.quant_method.moe_kernel.fused_experts if packed else layer.quant_method
    if hasattr(layer, "scheme"):
        return layer.scheme.kernel
    return getattr(layer.quant_method, "quant_method", layer.quant_method)  # vllm-ascend wraps its schemes


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


def remember_base(model: torch.nn.Module) -> None:
    """Keep the digests of what the base was loaded with, before kernels rearrange it (most do).

    Part by part of each fused layer: `mxfp4_digests` of packed layers, or where a model has none, `bf16_digests` of its
    plain ones.
    """
    layers: list[Any] = [layer for layer in model.modules() if _widths(layer) or is_experts(layer)]
    packed = [layer for layer in layers if _is_packed(layer)]
    for layer in packed:
        layer.mxfp4_digests = [module_digest(*pair) for pair in zip(*_pieces(layer, packed=True), strict=True)]
    for layer in [] if packed else layers:
        layer.bf16_digests = [values_digest(part) for part in _pieces(layer, packed=False)[0]]


def _pieces(layer: Any, packed: bool) -> list[Sequence[torch.Tensor]]:
    """A layer's weights part by part, as they were loaded: [codes, scales], or [values]."""
    kinds = ("weight_packed", "weight_scale") if packed else ("weight",)
    if is_experts(layer):
        held = [part for part in experts_of("", layer) if part.place is not None]
        return [[getattr(layer, f"{part.stack}_{kind}").data[part.place, part.rows] for part in held] for kind in kinds]
    # compressed-tensors' name; vllm-ascend has `weight`
    weights = [getattr(layer, kind, None) for kind in kinds]
    return [(layer.weight if weight is None else weight).data.split(_widths(layer)) for weight in weights]


def _widths(layer: Any) -> list[int]:
    """Rows of the parts that a linear layer of vLLM is fused of; [] for other modules."""
    return list(getattr(layer, "logical_widths", None) or getattr(layer, "output_partition_sizes", None) or [])


def _is_packed(layer: Any) -> bool:
    scale = getattr(layer, "w13_weight_scale" if is_experts(layer) else "weight_scale", None)
    return isinstance(scale, torch.Tensor) and scale.dtype == torch.uint8


def _kept(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer's kernel computes with, by the end of its name; without what was taken out of the layer."""
    names = ("w13_weight", "w2_weight") if is_experts(layer) else ("weight",)
    weights = {name: getattr(layer, name).data for name in names}
    return {name.removesuffix("weight"): weight for name, weight in weights.items() if weight.numel()}


def describe_base(model: torch.nn.Module, modules: Collection[str]) -> dict:
    """What the layers that hold `modules` were loaded with, and what they compute with now.

    `modules`: the trainer's names of those that are MXFP4 on disk, experts' matrices among them. `layers`, `experts`:
    how many layers of vLLM's, and how many matrices of experts. `form`: "packed" where these bytes were loaded,
    "bf16" where their values were. `base_digest`: of what was loaded, under the trainer's names. `slices`: the `Slices`
    of the weights that a rank holds in part or not at all; the digest is then of these parts. `weights_digest`: of
    the weights as the kernel keeps them, to be compared between two moments, as far as they can be read (bf16 linear
    layers on a CPU cannot); None where none can. `weights_equal_base`: whether those are bit for bit the ones that
    were loaded; None where a kernel keeps them in an order of its own. `activations`: what the kernels round their
    inputs to.
    """
    named = [(name.removesuffix(".base_layer"), layer) for name, layer in model.named_modules()]
    form, attribute = "packed", "mxfp4_digests"
    if not any(hasattr(layer, attribute) for _, layer in named):
        form, attribute = "bf16", "bf16_digests"
    layers: dict[str, Any] = {}
    loaded: list[tuple[str, str]] = []
    experts = 0
    slices: Slices = {}
    for name, layer in named:
        if not hasattr(layer, attribute):
            continue
        if is_experts(layer):
            parts: Sequence[Part | ExpertPart] = experts_of(name, layer)
        elif set(hf_names(model, name, len(_widths(layer)))) & set(modules):
            parts = parts_of(model, name, layer)
        else:
            continue
        digests = iter(getattr(layer, attribute))
        for part in parts:
            digest = None if part.slice == NOTHING else next(digests)
            if part.name not in modules:
                continue
            layers[name] = layer
            if digest:
                loaded.append((part.name, digest))
                experts += is_experts(layer)
            if not part.whole:
                slices[part.name] = part.slice
    equal = {equals_loaded(layer) for layer in layers.values()}
    kept = [(name + end, weight) for name, layer in layers.items() for end, weight in _kept(layer).items()]
    kernels = [kernel_of(layer) for layer in layers.values()]
    return {
        "layers": len(layers),
        "experts": experts,
        "form": form,
        "base_digest": combined_digest(loaded),
        "slices": slices,
        "weights_digest": tensor_digest(kept) if kept else None,
        "weights_equal_base": False if False in equal else None if None in equal else True,
        "activations": sorted({kernel_activation(kernel) for kernel in kernels}),
        "kernel": ",".join(sorted({type(kernel).__name__ for kernel in kernels})),
    }


def equals_loaded(layer: Any) -> bool | None:
    """Whether the weight that a layer computes with is what it was loaded with; None where that cannot be told."""
    if is_experts(layer):
        return None
    weight = layer.weight.data
    if hasattr(layer, "mxfp4_packed"):  # our own kernel's
        return torch.equal(weight, dequantize(layer.mxfp4_packed, layer.weight_scale.data, weight.dtype))
    if hasattr(layer, "mxfp4_digests") or len(weight) != sum(_widths(layer)):
        return None
    return [values_digest(part) for part in weight.split(_widths(layer))] == layer.bf16_digests


def adapter_tensors(model: torch.nn.Module, rank: int) -> Iterator[tuple[str, torch.Tensor, list[int] | None]]:
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
            yield f"{part.name}.A", a[0, 0, :rank], [0, rank, column, columns] if narrow else None
            low = not narrow and not part.whole
            yield f"{part.name}.B", b[0, 0, :, :rank], [row, rows, 0, rank] if low else None


def adapter_slices(model: torch.nn.Module, rank: int) -> Slices:
    """The adapter's tensors that this rank holds in part; reads no weight."""
    return {name: part for name, _, part in adapter_tensors(model, rank) if part}


def describe_adapter(model: torch.nn.Module, rank: int) -> dict:
    """`{"modules", "adapter_digest", "b_max"}` of the adapter that the engine multiplies with.

    vLLM has places for an adapter in every layer that can have one, and leaves zeros where none was sent. One that was
    sent has no A of zeros: a lost one shows.
    """
    held = [(name, tensor) for name, tensor, _ in adapter_tensors(model, rank)]
    pairs = zip(held[::2], held[1::2], strict=True)
    tensors = [one for a, b in pairs if a[1].any() or b[1].any() for one in (a, b)]
    return {
        "modules": len(tensors) // 2,
        "adapter_digest": tensor_digest(tensors),
        "b_max": max((t.abs().max().item() for n, t in tensors if n.endswith(".B")), default=0.0),
    }
