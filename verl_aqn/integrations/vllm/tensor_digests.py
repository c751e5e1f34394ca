"""Every tensor of the base as a rank of vLLM holds it: what was loaded, and what can be read there again.

Nothing in this file imports vLLM.
"""

from collections.abc import Collection
from typing import Any

import torch

from verl_aqn.checkpoints.slices import Loaded
from verl_aqn.checkpoints.values import plain_digest
from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.readback import is_experts, kept_by, loaded_of, parameters_of, slice_of, weight_name


def describe_tensors(model: torch.nn.Module, modules: Collection[str]) -> dict[str, Any]:
    """Return `{"tensors", "computed", "lost", "kernel_digest"}` of all of the checkpoint's tensors that a rank holds.

    `modules`: the checkpoint's names of those that are MXFP4 on disk. `tensors`: by module for these, by name for all
    others, [digest, form, live, slice]. `digest` is of what the parameter holds now where it can be read there
    (`live`), else of what was loaded, because a kernel keeps the weight in an order of its own. `form`: "packed" or
    "bf16" of one of `modules`, else the dtype that it was loaded in. `slice`: its `Slice`, None for the whole.
    `computed`: names of those whose values were computed with while they were loaded, and how; `lost`: of those whose
    way could not be followed. `kernel_digest`: of the weights of layers outside `modules` that their kernels have
    rearranged, to be compared between two moments; None where there are none that can be read.
    """
    loaded, parameter = loaded_of(model), parameters_of(model)
    layers = {name.replace(".base_layer", ""): layer for name, layer in model.named_modules()}
    of_modules = {weight_name(loaded, module) for module in modules} if not loaded.packed else set()
    found: dict[str, list[Any]] = {}
    for module in modules:
        key = module if loaded.packed else weight_name(loaded, module)
        if key in loaded.digests:  # what the kernel computes with, `describe_base` compares
            form = "packed" if loaded.packed else "bf16"
            found[module] = [loaded.digests[key], form, False, slice_of(loaded, module)]
    for name in loaded.pieces:
        if name not in loaded.digests or name in of_modules:
            continue
        places = dict.fromkeys(piece.place for piece in loaded.pieces[name])
        live = all(_readable(loaded, layers, parameter, place) for place in places)
        digest = loaded.digests[name]
        if live:
            try:
                digest = plain_digest(loaded.read(name, parameter))
            except EvidenceError as error:  # it is held twice, and the two differ
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
    """Whether a parameter still has the shape that it was loaded in, and no kernel keeps it in an order of its own."""
    layer = layers.get(place.rpartition(".")[0])
    try:
        now = parameter(place)
    except KeyError:  # a kernel took it out of the layer
        return False
    return tuple(now.shape) == loaded.parameters[place][0] and not (layer is not None and is_experts(layer))
