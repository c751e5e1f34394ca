"""Reading of the adapter that an actor really computes with, from its LoRA layers."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from verl_aqn.checkpoints.actual_base import own_modules
from verl_aqn.checkpoints.adapter import unwrapped
from verl_aqn.checkpoints.packing import whole

_MATRICES = (".lora_A.default", ".lora_B.default")


class ActualAdapter(NamedTuple):
    """A [r, K] and B [N, r] on the CPU by their PEFT names, and PEFT's scaling by the name of B.

    `faults`: messages about parameters that are trained but that no rollout receives.
    """

    tensors: dict[str, Tensor]
    scalings: dict[str, float]
    faults: list[str]

    def served(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the tensors as a rollout holds them: rounded to ``dtype``, then each B multiplied by its scaling."""
        rounded = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return {
            name: tensor * self.scalings[name] if name in self.scalings else tensor for name, tensor in rounded.items()
        }


def actual_adapter(model: nn.Module) -> ActualAdapter:
    """Copy the adapter of ``model``. Under FSDP each tensor is gathered in turn, so all ranks must call this."""
    layers = ((name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer))
    scalings = {unwrapped(f"{name}.lora_B.weight"): layer.scaling["default"] for name, layer in layers}
    tensors: dict[str, Tensor] = {}
    faults: list[str] = []
    for full, parameter in _trained(model):
        module, leaf = full.rsplit(".", 1)
        if leaf == "weight" and module.endswith(_MATRICES):
            tensors[f"{module.removesuffix('.default')}.weight"] = whole(parameter.detach()).cpu().clone()
        else:
            faults.append(f"{full} is trained in the actor but is not a LoRA matrix: the rollout does not receive it")
    return ActualAdapter(tensors, scalings, faults)


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name without wrappers, parameter) of trained or adapter parameters, gathered while they are used."""
    units = {name: module for name, module in model.named_modules() if isinstance(module, FullyShardedDataParallel)}
    if not units:
        yield from _own(own_modules(model, ""))
    for name, unit in units.items():
        with FullyShardedDataParallel.summon_full_params(unit, recurse=False, writeback=False):
            yield from _own(own_modules(unit, name))


def _own(modules: Iterator[tuple[str, nn.Module]]) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in modules:
        for leaf, parameter in module._parameters.items():
            full = unwrapped(f"{prefix}.{leaf}")
            if parameter is not None and (parameter.requires_grad or ".lora_" in f".{full}"):
                yield full, parameter
