"""Readings of every tensor of the base that a rank of vLLM holds: as it was loaded, or as it is now.

Nothing in this file imports vLLM.
"""

from collections.abc import Collection
from typing import Any

import torch

from verl_aqn.checkpoints.slices import Loaded
from verl_aqn.checkpoints.values import plain_digest
from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.readback import (
    digest_key,
    is_experts,
    kept_by,
    loaded_of,
    parameters_of,
    slice_of,
    weight_name,
)


def describe_tensors(model: torch.nn.Module, modules: Collection[str]) -> dict[str, Any]:
    """Return `{"tensors", "computed", "lost", "kernel_digest"}` for all of the checkpoint's tensors that a rank holds.

    `modules`: the checkpoint's names of the modules that are MXFP4 on disk.

    `tensors`: [digest, form, live, slice] for each tensor, by module for `modules` and by name for all others. If
    `live`, `digest` is of what the parameter holds now; otherwise a kernel stores the weight in its own layout, and
    `digest` is of what was loaded. `form`: "packed", "bf16" or "int8" for `modules`, otherwise the dtype at
    loading. `slice`: the `Slice` that the rank holds, None for the whole tensor.

    `computed`: names of tensors whose values were changed by operations while they were loaded, and the operations.
    `lost`: names of tensors that could not be followed into the model, and why. `kernel_digest`: digest of the weights
    outside `modules` that their kernels have rearranged, to be compared between two moments; None if there are none
    that can be read.
    """
    loaded, parameter = loaded_of(model), parameters_of(model)
    layers = {name.replace(".base_layer", ""): layer for name, layer in model.named_modules()}
    of_modules = {weight_name(loaded, module) for module in modules} if loaded.form == "bf16" else set()
    found: dict[str, list[Any]] = {}
    for module in modules:
        key = digest_key(loaded, module)
        if key in loaded.digests:  # `describe_base` compares what the kernel computes with
            found[module] = [loaded.digests[key], loaded.form, False, slice_of(loaded, module)]
    for name in loaded.pieces:
        if name not in loaded.digests or name in of_modules:
            continue
        places = dict.fromkeys(piece.place for piece in loaded.pieces[name])
        live = all(_readable(loaded, layers, parameter, place) for place in places)
        digest = loaded.digests[name]
        if live:
            try:
                digest = plain_digest(loaded.read(name, parameter))
            except EvidenceError as error:  # the model holds it twice, and the copies differ
                digest = str(error)
        found[name] = [digest, loaded.parameters[next(iter(places))][1], live, loaded.region(name)]
    rearranged = {
        piece.place.rpartition(".")[0]
        for name, (_, _, live, _) in found.items()
        if not live and name not in modules
        for piece in loaded.pieces[name]
    }
    kept = [(place + end, w) for place in rearranged for end, w in kept_by(layers.get(place)).items()]
    kernels = tensor_digest(kept) if kept else None
    return {"tensors": found, "computed": loaded.computed, "lost": loaded.lost, "kernel_digest": kernels}


def _readable(loaded: Loaded, layers: dict[str, Any], parameter: Any, place: str) -> bool:
    """Return whether a parameter still has its shape from loading, and no kernel stores it in its own layout."""
    layer = layers.get(place.rpartition(".")[0])
    try:
        now = parameter(place)
    except KeyError:  # a kernel has removed it from the layer
        return False
    return tuple(now.shape) == loaded.parameters[place][0] and not (layer is not None and is_experts(layer))
