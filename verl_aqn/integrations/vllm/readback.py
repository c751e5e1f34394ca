"""Read back what a vLLM model really holds, under the checkpoint's names.

vLLM fuses q, k, v (and gate, up, and the experts of a MoE layer) into one parameter, renames modules and splits them
over ranks. While the model was loaded, `verl_aqn.integrations.vllm.trace` observed which region of a parameter came
from which tensor (`model.aqn_loaded`). This module reads these regions and joins them again. Nothing in this file
imports vLLM.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor

from verl_aqn.checkpoints.adapter import digest_name, split_name
from verl_aqn.checkpoints.formats import FORMATS
from verl_aqn.checkpoints.packing import combined_digest, module_digest
from verl_aqn.checkpoints.slices import NOTHING, Loaded, Slices, blocks_of
from verl_aqn.checkpoints.values import plain_digest
from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.int8_layers import int8_as_now, int8_held, int8_names
from verl_aqn.mxfp4 import dequantize

# How vLLM's kernels round activations. The scheme requests MXFP4 from all of them, but only some do it. The entries for
# GPU kernels come from reading vLLM 0.28 (FlashInfer and B12X quantise as NVIDIA's hardware does), not from a test.
KERNEL_ACTIVATIONS = {
    "MarlinMxFp4LinearKernel": "none",
    "HummingMxFp4LinearKernel": "none",
    "FlashInferMxFp4LinearKernel": "rceil/nearest",
    "B12xMxFp4LinearKernel": "rceil/nearest",
    "EmulationMxfp4LinearKernel": "even/nearest",
    "AiterMxfp4LinearKernel": "even/nearest",
    "XPUMxFp4LinearKernel": "unknown",
}
# The same for methods outside vLLM's kernel registry: bf16 weights, packed experts and vllm-ascend's schemes (0.23.0).
METHOD_ACTIVATIONS = {
    "UnquantizedLinearMethod": "none",
    "AscendUnquantizedLinearMethod": "none",
    "UnquantizedFusedMoEMethod": "none",
    "CpuMoEMethod": "none",
    "MarlinExperts": "none",
    "AscendW4A4MXFP4DynamicLinearMethod": "floor/half_away",
    "AscendW4A8MXFPDynamicLinearMethod": "mxfp8/floor/nearest",
    "AscendW8A16LinearMethod": "none",
}


def kernel_activation(kernel: Any) -> str:
    """Return how ``kernel`` rounds activations: "none" (W4A16), "RULE/ROUNDING" (W4A4), that of MXFP8, or "unknown"."""
    if type(kernel).__name__ == "CpuMxfp4LinearKernel":
        return str(kernel.activation or "none")
    return (KERNEL_ACTIVATIONS | METHOD_ACTIVATIONS).get(type(kernel).__name__, "unknown")


def kernel_of(layer: Any) -> Any:
    """Return the object that computes a layer's product: vLLM's kernel, vllm-ascend's scheme, or the bf16 method."""
    if is_experts(layer):
        packed = hasattr(layer, "mxfp4_digests")
        return layer.quant_method.moe_kernel.fused_experts if packed else layer.quant_method
    if hasattr(layer, "scheme"):
        return layer.scheme.kernel
    return getattr(layer.quant_method, "quant_method", layer.quant_method)  # vllm-ascend wraps its schemes


def is_experts(layer: Any) -> bool:
    """Return whether `layer` holds routed experts in vLLM's form: w13 [E, 2I, H] and w2 [E, H, I] of E experts."""
    return hasattr(layer, "w13_weight") or hasattr(layer, "w13_weight_packed")


def remember_base(model: torch.nn.Module) -> None:
    """Keep the digests of everything that was loaded into the model, before kernels rearrange it (most kernels do).

    The keys are the checkpoint's module names for packed and int8 modules, and tensor names for the others. Packed
    layers also get an attribute `mxfp4_digests`.
    """
    loaded = loaded_of(model)
    parameter = parameters_of(model)
    packed: dict[str, tuple[str, ...]] = {m: n for m in _modules(loaded) if (n := _packed_names(loaded, m))}
    int8 = {m: three for m in _modules(loaded) if not packed and (three := int8_names(loaded, m))}
    loaded.digests, loaded.form = {}, "packed" if packed else "int8" if int8 else "bf16"
    parameters = {place: parameter(place) for place in loaded.sources_in}
    loaded.parameters = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in parameters.items()}
    for module, names in packed.items():
        if not (pieces := [piece for name in names for piece in loaded.pieces.get(name, ())]):
            continue  # another rank holds it
        if (weights := _read(loaded, names, parameter)) is None:
            continue
        loaded.digests[module] = module_digest(*weights)
        for piece in pieces:
            layer: Any = model.get_submodule(piece.place.rpartition(".")[0])
            layer.mxfp4_digests = [*getattr(layer, "mxfp4_digests", ()), loaded.digests[module]]
    for module, of_module in int8.items():
        try:
            if of_module[0] in loaded.pieces:
                loaded.digests[module] = int8_held(loaded, module, parameter)
        except EvidenceError as error:
            loaded.lost.update(dict.fromkeys(of_module, str(error)))
    of_modules = {name for names in (*packed.values(), *int8.values()) for name in names}
    for name in loaded.pieces:
        if name not in of_modules and (weights := _read(loaded, (name,), parameter)) is not None:
            loaded.digests[name] = plain_digest(weights[0])


def _read(loaded: Loaded, names: tuple[str, ...], parameter: Callable[[str], Tensor]) -> list[Tensor] | None:
    """Return what the model holds of these tensors, or None if they cannot be joined; `loaded.lost` has the reason."""
    try:
        return [loaded.read(name, parameter) for name in names]
    except EvidenceError as error:
        loaded.lost.update(dict.fromkeys(names, str(error)))
        return None


def loaded_of(model: torch.nn.Module) -> Loaded:
    loaded: Loaded | None = getattr(model, "aqn_loaded", None)
    if loaded is None or not loaded.sources:
        raise EvidenceError(
            f"the loading of {type(model).__name__} was not observed: set vLLM's load_format to one that calls the "
            "model's load_weights (safetensors)"
        )
    return loaded


def parameters_of(model: torch.nn.Module) -> Callable[[str], Tensor]:
    """Return a function from a name at loading, without LoRA's wrapper, to the current parameter or buffer."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    parameters = {name.replace(".base_layer.", "."): parameter.data for name, parameter in named}
    return parameters.__getitem__


def _modules(loaded: Loaded) -> list[str]:
    """Return the checkpoint's modules that have a weight, and its stacks of experts, in the order of loading."""
    ends = (".weight", *(weight for weight, _ in FORMATS.values()))
    found: dict[str, None] = {}
    for name, source in loaded.sources.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end or len(source.shape) == 3:
            found[name.removesuffix(end or "")] = None
    return list(found)


def weight_name(loaded: Loaded, module: str) -> str:
    """Return the name of the tensor with a module's values; a stack of experts [E, K, N] has the module's name."""
    return module if module in loaded.sources else f"{module}.weight"


def _packed_names(loaded: Loaded, module: str) -> tuple[str, str] | None:
    """Return the names of a packed module's codes and scales, or None if the module is not packed."""
    for weight, scale in FORMATS.values():
        names = (module + weight, module + scale)
        if all(name in loaded.sources and loaded.sources[name].dtype == "uint8" for name in names):
            return names
    return None


def digest_key(loaded: Loaded, module: str) -> str:
    """Return the key in `loaded.digests` of a module that is MXFP4 on disk."""
    return weight_name(loaded, module) if loaded.form == "bf16" else module


def slice_of(loaded: Loaded, module: str) -> list[int] | None:
    """Return the `Slice` of a module's weight [N, K] that this rank holds, or None for the whole weight."""
    names = _packed_names(loaded, module) if loaded.form == "packed" else None
    region = loaded.region(names[0] if names else weight_name(loaded, module))
    if region is None or not names:
        return region
    return [number for row, rows, *columns in blocks_of(region) for number in (row, rows, *(2 * c for c in columns))]


def _names_of(loaded: Loaded, module: str) -> tuple[str, ...]:
    """Return the names of the tensors that a module was loaded from."""
    of_form = {"packed": _packed_names, "int8": int8_names}.get(loaded.form)
    return (of_form(loaded, module) if of_form else None) or (weight_name(loaded, module),)


def kept_by(layer: Any) -> dict[str, torch.Tensor]:
    """Return the weights that a layer's kernel computes with, by the end of their names; skip removed weights."""
    names = ("w13_weight", "w2_weight") if is_experts(layer) else ("weight",)
    weights = {name: getattr(layer, name, None) for name in names}
    return {n.removesuffix("weight"): w.data for n, w in weights.items() if isinstance(w, Tensor) and w.numel()}


def describe_base(model: torch.nn.Module, modules: Collection[str]) -> dict:
    """Return what was loaded into the layers that hold `modules`, and what they compute with now.

    `modules`: the checkpoint's names of the modules that are MXFP4 on disk, with the experts' matrices.

    `layers`, `experts`: numbers of vLLM's layers and of expert matrices. `form`: "packed" if the packed bytes were
    loaded, "bf16" or "int8" if values were. `base_digest`: digest of what was loaded, under the checkpoint's names.
    `slices`: the `Slices` of the weights that the rank holds in part or not at all; the digest is then of these parts.
    `weights_digest`: digest of the weights in the kernel's layout, to be compared between two moments; it covers the
    weights that can be read (not bf16 linear layers on a CPU), and is None if there are none. `weights_equal_base`:
    whether the weights are bit for bit those that were loaded; None if a kernel stores them in its own layout.
    `activations`: how the kernels round their inputs. `kernel`: the names of their classes.

    Raises:
        EvidenceError: one of `modules` could not be followed while it was loaded.
    """
    loaded = loaded_of(model)
    named = {name.removesuffix(".base_layer"): layer for name, layer in model.named_modules()}
    places: dict[str, list[str]] = {}
    digests: list[tuple[str, str]] = []
    experts = 0
    slices: Slices = {}
    for module in modules:
        key = digest_key(loaded, module)
        if key not in loaded.digests:
            _check_followed(model, loaded, module)
            slices[module] = NOTHING
            continue
        digests.append((module, loaded.digests[key]))
        names = _names_of(loaded, module)
        layers_here = [piece.place.rpartition(".")[0] for piece in loaded.pieces[names[0]]]
        for place in layers_here:
            places.setdefault(place, []).append(module)
        experts += is_experts(named[layers_here[0]])
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
        "form": loaded.form,
        "base_digest": combined_digest(digests),
        "slices": slices,
        "weights_digest": tensor_digest(kept) if kept else None,
        "weights_equal_base": False if False in equal else None if None in equal or not equal else True,
        "activations": sorted({kernel_activation(kernel) for kernel in kernels}),
        "kernel": ",".join(sorted({type(kernel).__name__ for kernel in kernels})),
    }


def _check_followed(model: torch.nn.Module, loaded: Loaded, module: str) -> None:
    """Raise EvidenceError if the trace lost `module` while it was loaded; a module of another rank is no error."""
    for name, how in loaded.lost.items():
        if name == module or name.startswith(f"{module}."):
            loader = f"{type(model).__module__}.{type(model).__name__}.load_weights"
            raise EvidenceError(f"{module}: its way into vLLM cannot be followed ({how}), as {loader} loads it")


def equals_loaded(loaded: Loaded, layer: Any, modules: list[str], parameter: Callable[[str], Tensor]) -> bool | None:
    """Return whether a layer computes with the weight that was loaded, or None if this cannot be determined."""
    if is_experts(layer) or not hasattr(layer, "weight"):
        return None
    weight = layer.weight.data
    if hasattr(layer, "mxfp4_packed"):  # set by this package's CPU kernel
        codes, scale = layer.mxfp4_packed, layer.weight_scale.data
        held = dict(zip(FORMATS["compressed-tensors"], (codes, scale), strict=True))

        def bytes_of(place: str) -> Tensor:
            return held["." + place.rpartition(".")[2]]

        for module in modules:
            names = _packed_names(loaded, module)
            assert names is not None
            if module_digest(*(loaded.read(name, bytes_of) for name in names)) != loaded.digests[module]:
                return False
        # The kernel multiplies with the codes themselves, or with their values.
        return torch.equal(weight, codes if weight.dtype == codes.dtype else dequantize(codes, scale, weight.dtype))
    if loaded.form == "int8":
        return all(int8_as_now(loaded, module, parameter) for module in modules)
    sources = [f"{module}.weight" for module in modules]
    if loaded.form == "packed" or weight.dim() != 2 or any(_outgrown(loaded, source, parameter) for source in sources):
        return None
    return all(plain_digest(loaded.read(source, parameter)) == loaded.digests[source] for source in sources)


def _outgrown(loaded: Loaded, source: str, parameter: Callable[[str], Tensor]) -> bool:
    """Return whether a parameter has become too small to hold the elements that `source` was loaded into."""
    return any(
        piece.here + sum((size - 1) * step for size, step, _ in piece.dims) >= parameter(piece.place).numel()
        for piece in loaded.pieces[source]
    )


def describe_adapter(model: torch.nn.Module) -> dict:
    """Return `{"modules", "adapter_digest", "b_max", "slices", "sizes"}` of the adapter that the engine uses.

    The tensors are read back from the buffers of the LoRA layers, under the names and in the shapes in which they were
    sent. `slices`: the `Slices` of the tensors that a tensor-parallel rank holds in part; `sizes`: numbers of elements
    of these whole tensors.

    Raises:
        EvidenceError: a module that was sent is in no buffer, or a buffer holds something that was not sent.
    """
    sent: Loaded | None = getattr(model, "aqn_adapter", None)
    if sent is None or not sent.sources:
        raise EvidenceError("the rollout has no adapter: nothing was sent since it started")
    buffers = dict(lora_buffers(model))
    homeless = sorted({split_name(name)[0] for name in sent.sources if name not in sent.pieces})
    if homeless:
        raise EvidenceError(
            f"vLLM's {type(model).__name__} has no place for the adapter of {', '.join(homeless[:3])}"
            f"{' …' if len(homeless) > 3 else ''} ({len(homeless)} modules): leave them out of "
            "actor_rollout_ref.model.target_modules"
        )
    foreign = [place for place, buffer in buffers.items() if place not in sent.sources_in and bool(buffer.any())]
    if foreign:
        raise EvidenceError(f"vLLM multiplies with adapter values in {foreign[0]} that were not sent")
    tensors: list[tuple[str, Tensor]] = []
    slices: Slices = {}
    sizes: dict[str, int] = {}
    for source in sent.sources:
        name = digest_name(source)
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
    """Yield the buffers of vLLM's LoRA layers (`lora_a_stacked`, `w13_lora_b_stacked`, …) by name."""
    for name, layer in model.named_modules():
        for attribute, value in vars(layer).items():
            if "lora_" in attribute and attribute.endswith("_stacked"):
                stack = [value] if isinstance(value, Tensor) else value
                yield from ((f"{name}.{attribute}.{number}", one) for number, one in enumerate(stack))
