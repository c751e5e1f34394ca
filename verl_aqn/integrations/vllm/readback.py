"""Read back what a vLLM model really holds, under the checkpoint's names.

vLLM fuses q, k, v (and gate, up, and the experts of a MoE layer) into one parameter, renames modules and splits them
over ranks. Which region of a parameter came from which tensor was observed while it was loaded (`model.aqn_loaded`, see
`verl_aqn.integrations.vllm.trace`); here these regions are read and put together again. Nothing in this file imports vLLM.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from verl_aqn.checkpoints.adapter import held_name, split_name
from verl_aqn.checkpoints.formats import FORMATS
from verl_aqn.checkpoints.packing import combined_digest, module_digest
from verl_aqn.checkpoints.slices import NOTHING, Loaded, Slices, blocks_of
from verl_aqn.checkpoints.values import plain_digest
from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4 import dequantize

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


def is_experts(layer: Any) -> bool:
    """Whether `layer` holds routed experts as vLLM keeps them: w13 [E, 2I, H] and w2 [E, H, I] of E experts."""
    return hasattr(layer, "w13_weight") or hasattr(layer, "w13_weight_packed")


def remember_base(model: torch.nn.Module) -> None:
    """Keep the digests of all that the model was loaded with, before kernels rearrange it (most do).

    Of packed modules by the checkpoint's module, of other tensors by name. `mxfp4_digests` marks packed layers.
    """
    loaded = loaded_of(model)
    parameter = parameters_of(model)
    packed: dict[str, tuple[str, ...]] = {m: n for m in _modules(loaded) if (n := _packed_names(loaded, m))}
    loaded.digests, loaded.packed = {}, bool(packed)
    held = {place: parameter(place) for place in loaded.held_in}
    loaded.parameters = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in held.items()}
    for module, names in packed.items():
        if not (pieces := [piece for name in names for piece in loaded.pieces.get(name, ())]):
            continue  # another rank's
        if (weights := _read(loaded, names, parameter)) is None:
            continue
        loaded.digests[module] = module_digest(*weights)
        for piece in pieces:
            layer: Any = model.get_submodule(piece.place.rpartition(".")[0])
            layer.mxfp4_digests = [*getattr(layer, "mxfp4_digests", ()), loaded.digests[module]]
    of_packed = {name for names in packed.values() for name in names}
    for name in loaded.pieces:
        if name not in of_packed and (weights := _read(loaded, (name,), parameter)) is not None:
            loaded.digests[name] = plain_digest(weights[0])


def _read(loaded: Loaded, names: tuple[str, ...], parameter: Callable[[str], Tensor]) -> list[Tensor] | None:
    """What the model holds of these tensors; None, and why, on record, where they cannot be put together again."""
    try:
        return [loaded.read(name, parameter) for name in names]
    except EvidenceError as error:
        loaded.lost.update(dict.fromkeys(names, str(error)))
        return None


def loaded_of(model: torch.nn.Module) -> Loaded:
    loaded: Loaded | None = getattr(model, "aqn_loaded", None)
    if loaded is None or not loaded.sources:
        raise EvidenceError(
            f"how {type(model).__name__} was loaded was not seen: set vLLM's load_format to one that calls the model's "
            "load_weights (safetensors)"
        )
    return loaded


def parameters_of(model: torch.nn.Module) -> Callable[[str], Tensor]:
    """A parameter or buffer as it is now by the name that it had when it was loaded: without LoRA's wrapper."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    held = {name.replace(".base_layer.", "."): parameter.data for name, parameter in named}
    return held.__getitem__


def _modules(loaded: Loaded) -> list[str]:
    """Modules of the checkpoint that have a weight, and stacks of experts, in order of loading."""
    ends = (".weight", *(weight for weight, _ in FORMATS.values()))
    found: dict[str, None] = {}
    for name, source in loaded.sources.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end or len(source.shape) == 3:
            found[name.removesuffix(end or "")] = None
    return list(found)


def weight_name(loaded: Loaded, module: str) -> str:
    """Name of the tensor with a module's values; a stack of experts [E, K, N] has the module's own name."""
    return module if module in loaded.sources else f"{module}.weight"


def _packed_names(loaded: Loaded, module: str) -> tuple[str, str] | None:
    """Names of a packed module's codes and scales; None for one that is not packed."""
    for weight, scale in FORMATS.values():
        names = (module + weight, module + scale)
        if all(name in loaded.sources and loaded.sources[name].dtype == "uint8" for name in names):
            return names
    return None


def slice_of(loaded: Loaded, module: str) -> list[int] | None:
    """The `Slice` of a module's weight [N, K] that this rank holds."""
    names = _packed_names(loaded, module) if loaded.packed else None
    region = loaded.region(names[0] if names else weight_name(loaded, module))
    if region is None or not names:
        return region
    return [number for row, rows, *columns in blocks_of(region) for number in (row, rows, *(2 * c for c in columns))]


def kept_by(layer: Any) -> dict[str, torch.Tensor]:
    """What a layer's kernel computes with, by the end of its name; without what was taken out of the layer."""
    names = ("w13_weight", "w2_weight") if is_experts(layer) else ("weight",)
    weights = {name: getattr(layer, name, None) for name in names}
    return {n.removesuffix("weight"): w.data for n, w in weights.items() if isinstance(w, Tensor) and w.numel()}


def describe_base(model: torch.nn.Module, modules: Collection[str]) -> dict:
    """What the layers that hold `modules` were loaded with, and what they compute with now.

    `modules`: the checkpoint's names of those that are MXFP4 on disk, experts' matrices among them. `layers`,
    `experts`: how many layers of vLLM's, and how many matrices of experts. `form`: "packed" where these bytes were
    loaded, "bf16" where their values were. `base_digest`: of what was loaded, under the checkpoint's names. `slices`:
    the `Slices` of the weights that a rank holds in part or not at all; the digest is then of these parts.
    `weights_digest`: of the weights as the kernel keeps them, to be compared between two moments, as far as they can be
    read (bf16 linear layers on a CPU cannot); None where none can. `weights_equal_base`: whether those are bit for bit
    the ones that were loaded; None where a kernel keeps them in an order of its own. `activations`: what the kernels
    round their inputs to.

    Raises EvidenceError where one of `modules` was loaded in a way that could not be followed.
    """
    loaded = loaded_of(model)
    named = {name.removesuffix(".base_layer"): layer for name, layer in model.named_modules()}
    places: dict[str, list[str]] = {}
    digests: list[tuple[str, str]] = []
    experts = 0
    slices: Slices = {}
    for module in modules:
        key = module if loaded.packed else weight_name(loaded, module)
        if key not in loaded.digests:
            _check_followed(model, loaded, module)
            slices[module] = NOTHING
            continue
        digests.append((module, loaded.digests[key]))
        names = (_packed_names(loaded, module) if loaded.packed else None) or (weight_name(loaded, module),)
        held_in = [piece.place.rpartition(".")[0] for piece in loaded.pieces[names[0]]]
        for place in held_in:
            places.setdefault(place, []).append(module)
        experts += is_experts(named[held_in[0]])
        if part := slice_of(loaded, module):
            slices[module] = part
    layers: dict[str, Any] = {name: layer for name, layer in named.items() if name in places}
    parameter = parameters_of(model)
    equal = {equals_loaded(loaded, layer, places[name], parameter) for name, layer in layers.items()}
    kept = [(name + end, weight) for name, layer in layers.items() for end, weight in kept_by(layer).items()]
    kernels = [kernel_of(layer) for layer in layers.values()]
    return {
        "layers": len(layers),
        "experts": experts,
        "form": "packed" if loaded.packed else "bf16",
        "base_digest": combined_digest(digests),
        "slices": slices,
        "weights_digest": tensor_digest(kept) if kept else None,
        "weights_equal_base": False if False in equal else None if None in equal or not equal else True,
        "activations": sorted({kernel_activation(kernel) for kernel in kernels}),
        "kernel": ",".join(sorted({type(kernel).__name__ for kernel in kernels})),
    }


def _check_followed(model: torch.nn.Module, loaded: Loaded, module: str) -> None:
    """Raise EvidenceError where `module` disappeared on its way into the model; a rank may hold nothing of it."""
    for name, how in loaded.lost.items():
        if name == module or name.startswith(f"{module}."):
            loader = f"{type(model).__module__}.{type(model).__name__}.load_weights"
            raise EvidenceError(f"{module}: its way into vLLM cannot be followed ({how}), as {loader} loads it")


def equals_loaded(loaded: Loaded, layer: Any, modules: list[str], parameter: Callable[[str], Tensor]) -> bool | None:
    """Whether the weight that a layer computes with is what it was loaded with; None where that cannot be told."""
    if is_experts(layer) or not hasattr(layer, "weight"):
        return None
    weight = layer.weight.data
    if hasattr(layer, "mxfp4_packed"):  # our own kernel's
        return torch.equal(weight, dequantize(layer.mxfp4_packed, layer.weight_scale.data, weight.dtype))
    sources = [f"{module}.weight" for module in modules]
    if loaded.packed or weight.dim() != 2 or any(_outgrown(loaded, source, parameter) for source in sources):
        return None
    return all(plain_digest(loaded.read(source, parameter)) == loaded.digests[source] for source in sources)


def _outgrown(loaded: Loaded, source: str, parameter: Callable[[str], Tensor]) -> bool:
    """Whether a parameter no longer has the elements that `source` was loaded into."""
    return any(
        piece.here + sum((size - 1) * step for size, step, _ in piece.dims) >= parameter(piece.place).numel()
        for piece in loaded.pieces[source]
    )


def describe_adapter(model: torch.nn.Module) -> dict:
    """`{"modules", "adapter_digest", "b_max", "slices", "sizes"}` of the adapter that the engine multiplies with.

    What was sent is read back from the LoRA layers' own buffers, under the names and in the shapes in which it was
    sent; `slices`: the `Slices` of the tensors that a tensor-parallel rank holds in part; `sizes`: elements of these.

    Raises EvidenceError where a module that was sent is found nowhere, or a buffer holds what was not sent.
    """
    sent: Loaded | None = getattr(model, "aqn_adapter", None)
    if sent is None or not sent.sources:
        raise EvidenceError("the rollout has not got an adapter: nothing was sent since it started")
    buffers = dict(lora_buffers(model))
    homeless = sorted({split_name(name)[0] for name in sent.sources if name not in sent.pieces})
    if homeless:
        raise EvidenceError(
            f"vLLM's {type(model).__name__} has no place for the adapter of {', '.join(homeless[:3])}"
            f"{' …' if len(homeless) > 3 else ''} ({len(homeless)} modules): leave them out of "
            "actor_rollout_ref.model.target_modules"
        )
    foreign = [place for place, buffer in buffers.items() if place not in sent.held_in and bool(buffer.any())]
    if foreign:
        raise EvidenceError(f"vLLM multiplies with an adapter in {foreign[0]} that was not sent")
    tensors: list[tuple[str, Tensor]] = []
    slices: Slices = {}
    sizes: dict[str, int] = {}
    for source in sent.sources:
        name = held_name(source)
        tensors.append((name, sent.read(source, buffers.__getitem__)))
        if part := sent.region(source):
            slices[name], sizes[name] = part, sent.sources[source].numel
    return {
        "modules": len({split_name(source)[0] for source in sent.sources}),
        "adapter_digest": tensor_digest(tensors),
        "b_max": max((t.abs().max().item() for n, t in tensors if n.endswith(".B")), default=0.0),
        "slices": slices,
        "sizes": sizes,
    }


def lora_buffers(model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The buffers of vLLM's LoRA layers (`lora_a_stacked`, `w13_lora_b_stacked`, …) by name."""
    for name, layer in model.named_modules():
        for attribute, value in vars(layer).items():
            if "lora_" in attribute and attribute.endswith("_stacked"):
                stack = [value] if isinstance(value, Tensor) else value
                yield from ((f"{name}.{attribute}.{number}", one) for number, one in enumerate(stack))
