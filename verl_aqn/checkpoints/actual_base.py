"""Digests of the tensors that a transformers model has in memory, also inside PEFT and FSDP2."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.packing import combined_digest, module_digest, packed_weights, plain_name, whole
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.checkpoints.values import plain_digest
from verl_aqn.mxfp4.experts import Mxfp4Experts
from verl_aqn.mxfp4.linear import Mxfp4Linear
from verl_aqn.mxfp4.names import ROLES, parts_in

_ADAPTER = (".lora_", ".modules_to_save.", ".ranknum.")
_PACKED = ("weight_packed", "weight_scale")


class ActualBase(NamedTuple):
    """The tensors that one process holds.

    `tensors`: (digest, dtype or "packed") by the name in the checkpoint. `converted`: tensors that transformers turns
    into others when it loads them, with the conversion. `passed`: tensors that are not in the text model. `faults`:
    messages about errors in this process. `digest`: over all these tensors, to compare ranks. `packed_digest`: over
    the packed modules; None if there are none.
    """

    tensors: dict[str, tuple[str, str]]
    converted: dict[str, str]
    passed: list[str]
    faults: list[str]
    digest: str
    packed_digest: str | None


def actual_base(model: nn.Module, path: str | Path) -> ActualBase:
    """Compute the digest of every frozen parameter and persistent buffer of ``model``, loaded from folder ``path``.

    Packed modules get `module_digest` under the module's name, other tensors get `plain_digest`. Under FSDP2 each
    tensor is gathered in turn, so all ranks must call this.
    """
    weights = Weights(Path(path))
    naming: Naming = getattr(model, "checkpoint_names", None) or Naming.of_folder(path)
    made_of = naming.sources(weights.specs)
    converters = {name: converter for name, (converter, _) in naming.converters.items()}
    packed = [(name, module_digest(codes, scale)) for name, codes, scale in packed_weights(model)]
    tensors: dict[str, tuple[str, str]] = {name: (digest, "packed") for name, digest in packed}
    converted: dict[str, str] = {}
    faults: list[str] = []
    homeless: list[str] = []
    for name, tensor in _frozen(model, faults):
        sources = made_of.get(name)
        if not sources:
            homeless.append(name)
            continue
        values, dtype = whole(tensor.detach()), str(tensor.dtype).removeprefix("torch.")
        if naming.expert(sources[0]):
            for source in sources:
                tensors[source] = (plain_digest(_matrix(naming, source, values)), dtype)
        elif name in converters or len(sources) > 1:
            how = type(converters[name].operations[0]).__name__ if name in converters else "several tensors in one"
            converted |= dict.fromkeys(sources, how)
        else:
            tensors[sources[0]] = (plain_digest(values), dtype)
        del values
    faults += _dense_faults(model)
    ties = dict(getattr(model, "all_tied_weights_keys", None) or {})
    for name in homeless:
        faults += _tied_fault(name, ties, model, tensors, made_of)
    found = combined_digest((name, f"{digest} {form}") for name, (digest, form) in tensors.items())
    return ActualBase(
        tensors, converted, sorted(naming.passed), faults, found, combined_digest(packed) if packed else None
    )


def _dense_faults(model: nn.Module) -> list[str]:
    """Return a message for each layer whose dequantised copy.

    (`Mxfp4Linear.cache_dequantized`) differs from its codes.
    """
    return [
        f"{plain_name(name)}.weight, which the actor keeps dequantised, has other values than its codes"
        for name, layer in model.named_modules()
        if isinstance(layer, Mxfp4Linear) and not layer.keeps_its_codes(whole)
    ]


def _frozen(model: nn.Module, faults: list[str]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name in the model, tensor) of all tensors except adapters and packed weights; tied tensors only once.

    FSDP1 keeps the parameters of each of its units in one flat tensor, so they are gathered unit by unit.
    """
    units = {name: module for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)}
    if not units:
        yield from _own(own_modules(model, ""), faults)
    for name, unit in units.items():
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            yield from _own(own_modules(unit, name), faults)


def own_modules(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) of ``module`` and all modules inside it, without the FSDP1 units inside it."""
    yield name, module
    for leaf, child in module.named_children():
        if not isinstance(child, FullyShardedDataParallel):
            yield from own_modules(child, f"{name}.{leaf}" if name else leaf)


def _own(modules: Iterator[tuple[str, nn.Module]], faults: list[str]) -> Iterator[tuple[str, Tensor]]:
    seen: set[int] = set()
    for prefix, module in modules:
        skipped: tuple[str, ...] = _PACKED if isinstance(module, Mxfp4Linear) else ()
        if isinstance(module, Mxfp4Experts):
            skipped = tuple(name for name in module._parameters if name.endswith(("_packed", "_scale")))
        buffers = {n: b for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for leaf, tensor in {**module._parameters, **buffers}.items():
            full = f"{prefix}.{leaf}" if prefix else leaf
            if tensor is None or leaf in skipped or any(mark in f".{full}" for mark in _ADAPTER) or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            name = plain_name(full).replace(".base_layer.", ".")
            if leaf in module._parameters and tensor.requires_grad:
                faults.append(f"{name} is trained: freeze it, or train only adapters")
            yield name, tensor


def _matrix(naming: Naming, source: str, stack: Tensor) -> Tensor:
    """Return the part of a fused stack that is tensor ``source`` of the checkpoint."""
    expert = naming.expert(source)
    assert expert
    fused, half = ROLES[expert.role]
    return stack[expert.number].chunk(parts_in(fused))[half]


def _tied_fault(
    name: str,
    ties: dict[str, str],
    model: nn.Module,
    tensors: dict[str, tuple[str, str]],
    made_of: dict[str, list[str]],
) -> list[str]:
    """Return messages about a tensor that the folder does not have; none if it equals the tensor that it is tied to."""
    original: Any = made_of.get(ties.get(name, ""))
    if not original:
        return [f"{name} has no tensor in the folder"]
    values = next(whole(tensor.detach()) for own, tensor in _frozen(model, []) if own == name)
    if plain_digest(values) != tensors[original[0]][0]:
        return [f"{name} is tied to {original[0]} but differs from it"]
    return []
