"""Observe how vLLM loads the base and adapters (`verl_aqn.integrations.vllm.trace`), and keep the results on the model.

`model.aqn_loaded`: which regions of its parameters came from which tensors of the checkpoint. `model.aqn_names`: the
checkpoint's name of every parameter that is one tensor. `model.aqn_adapter`: the same as `aqn_loaded` for the adapter
that was sent last and the buffers of the LoRA layers.
"""

from typing import Any

from torch import nn

from verl_aqn.checkpoints.slices import Loaded, module_of
from verl_aqn.integrations.vllm.readback import lora_buffers, remember_base
from verl_aqn.integrations.vllm.trace import Trace


def observe_load(loader: Any) -> None:
    """Make `loader`, which loads one model, set `aqn_loaded` (with digests of the weights) and `aqn_names` on it."""
    load_weights = loader.load_weights

    def load_and_remember(model: Any, *args: Any, **kwargs: Any) -> None:
        trace, take = Trace(), model.load_weights

        def take_and_watch(weights: Any, *more: Any, **named: Any) -> Any:
            with trace:
                return take(trace.watch(weights), *more, **named)

        model.load_weights = take_and_watch
        try:
            load_weights(model, *args, **kwargs)
        finally:
            del model.load_weights
        keep(model, trace)

    loader.load_weights = load_and_remember


def keep(model: Any, trace: Trace) -> None:
    """Keep on `model` what `trace` recorded, and the digests of the weights before kernels rearrange them."""
    named = dict(model.named_parameters(remove_duplicate=False))
    owned = {parameter.untyped_storage().data_ptr() for parameter in named.values()}
    # Add buffers too, except those that are views of a parameter (Mamba's convolutions).
    named |= {name: b for name, b in model.named_buffers() if b.untyped_storage().data_ptr() not in owned}
    model.aqn_loaded = trace.loaded(named.items())
    model.aqn_names = model.aqn_loaded.names()
    if model.aqn_loaded.sources:
        remember_base(model)
        _correct_packing(model, model.aqn_loaded)


def _correct_packing(model: Any, loaded: Loaded) -> None:
    """Correct the model's `packed_modules_mapping` where it splits a module that is one tensor in the checkpoint.

    vLLM's LoRA layers use this mapping. For GLM4 it names gate_proj and up_proj, but the checkpoints have only
    gate_up_proj.
    """
    mapping: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
    wrong: set[str] = set()
    right: set[str] = set()
    for place, sources in loaded.sources_in.items():
        parent = place.rpartition(".")[0].rpartition(".")[2]
        if parent in mapping and place.endswith((".weight", ".weight_packed")):
            leaves = {module_of(source).rpartition(".")[2] for source in sources}
            (wrong if leaves == {parent} != set(mapping[parent]) else right).add(parent)
    if wrong - right:
        model.packed_modules_mapping = mapping | {name: [name] for name in wrong - right}


def observe_adapters() -> None:
    """Make vLLM set `aqn_adapter` on a model that `observe_load` observed, each time it loads an adapter."""
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager, WorkerLoRAManager

    watching: list[Trace] = []
    from_tensors = LoRAModel.from_lora_tensors.__func__

    def from_lora_tensors(cls: Any, lora_model_id: int, tensors: dict, *args: Any, **kwargs: Any) -> Any:
        for trace in watching[-1:]:
            for name, tensor in tensors.items():
                trace.name(name, tensor)
        return from_tensors(cls, lora_model_id, tensors, *args, **kwargs)

    LoRAModel.from_lora_tensors = classmethod(from_lora_tensors)

    def observed(add: Any) -> Any:
        def add_adapter(self: Any, request: Any) -> bool:
            model: nn.Module = self._adapter_manager.model
            if not hasattr(model, "aqn_loaded"):
                return bool(add(self, request))
            with Trace() as trace:
                watching.append(trace)
                try:
                    added = bool(add(self, request))
                finally:
                    watching.pop()
            if trace.sources:  # otherwise the adapter was loaded before
                model.aqn_adapter = trace.loaded(lora_buffers(model))
            return added

        return add_adapter

    for manager in (WorkerLoRAManager, LRUCacheWorkerLoRAManager):
        if "add_adapter" in vars(manager):
            manager.add_adapter = observed(manager.add_adapter)
