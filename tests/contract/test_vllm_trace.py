"""vLLM's own loaders under observation: what a tensor-parallel rank's layers hold, and the hooks that this needs."""

import inspect
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from verl_aqn.checkpoints.slices import not_covered
from verl_aqn.integrations.vllm.trace import Trace


@contextmanager
def rank_of(rank: int, world: int, monkeypatch):
    """Build vLLM's layers as on rank `rank` of `world`, without a process group."""
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor import parameter
    from vllm.model_executor.layers import linear, vocab_parallel_embedding

    for module in (linear, parameter, vocab_parallel_embedding):
        monkeypatch.setattr(module, "get_tensor_model_parallel_rank", lambda: rank)
        monkeypatch.setattr(module, "get_tensor_model_parallel_world_size", lambda: world)
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


def loaded_on(rank: int, world: int, monkeypatch):
    """(tensors by name, `Loaded`, parameters) of a rank's fused, split and padded layers, in bfloat16."""
    from vllm.model_executor.layers import linear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    generator = torch.Generator().manual_seed(0)
    shapes = {"q": (64, 64), "k": (16, 64), "v": (16, 64), "o": (64, 64), "qkv": (96, 64), "gate_up": (64, 64)}
    tensors = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    tensors["embed"] = torch.randn(50, 64, generator=generator).bfloat16()
    sizes = {"bias": False, "params_dtype": torch.bfloat16}
    with rank_of(rank, world, monkeypatch):
        layers = {
            "qkv_proj": linear.QKVParallelLinear(64, 16, 4, 1, **sizes),
            "o_proj": linear.RowParallelLinear(64, 64, **sizes),
            "phi_qkv": linear.QKVParallelLinear(64, 16, 4, 1, **sizes),
            "gate_up_proj": linear.MergedColumnParallelLinear(64, [32, 32], **sizes),
            "embed_tokens": VocabParallelEmbedding(50, 64, params_dtype=torch.bfloat16),
        }
        with Trace() as trace:
            seen = dict(trace.watch(tensors.items()))
            for name in ("q", "k", "v"):
                layers["qkv_proj"].weight_loader(layers["qkv_proj"].weight, seen[name], name)
            for layer, name in (
                ("o_proj", "o"),
                ("phi_qkv", "qkv"),
                ("gate_up_proj", "gate_up"),
                ("embed_tokens", "embed"),
            ):
                layers[layer].weight_loader(layers[layer].weight, seen[name])
    parameters = {f"{name}.weight": layer.weight for name, layer in layers.items()}
    return tensors, trace.loaded(parameters.items()), parameters


@pytest.mark.parametrize("world", [1, 2, 4])
def test_what_the_ranks_hold_is_what_was_loaded_and_together_it_is_all(world, monkeypatch):
    from verl_aqn.checkpoints.slices import cut

    holders = []
    for rank in range(world):
        tensors, loaded, parameters = loaded_on(rank, world, monkeypatch)
        regions = {name: loaded.region(name) for name in tensors}
        for name, tensor in tensors.items():
            assert torch.equal(loaded.read(name, parameters.__getitem__), cut(tensor, regions[name])), name
        holders.append({name: region for name, region in regions.items() if region})
        assert not loaded.lost
    assert not_covered(holders, lambda name: tensors[name].numel()) is None
    if world == 1:
        assert holders == [{}]
        assert loaded.names()["embed_tokens.weight"] == "embed"
        assert "qkv_proj.weight" not in loaded.names()
    else:
        assert holders[1]["q"] == [64 // world, 64 // world, 0, 64]
        assert holders[1]["o"] == [0, 64, 64 // world, 64 // world]
        assert "k" not in holders[1]  # one head of k and v, so every rank has a copy
        half = 32 // world
        assert holders[1]["gate_up"] == [half, half, 0, 64, 32 + half, half, 0, 64]
        for name in ("q", "gate_up", "embed"):
            alone = [{name: holders[0][name]}] * world
            assert not_covered(alone, lambda name: tensors[name].numel()) is not None


def test_the_seams_of_the_observation():
    """Loaders pass weights through the model's `load_weights`; adapters come through `from_lora_tensors`."""
    from vllm.lora import lora_model, worker_manager
    from vllm.model_executor.model_loader import base_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    assert "model.load_weights(" in inspect.getsource(DefaultModelLoader.load_weights)
    # Read from the file: another test of this process may have replaced the function by ours.
    assert "self.load_weights(model, model_config" in Path(base_loader.__file__).read_text()
    assert list(inspect.signature(lora_model.LoRAModel.from_lora_tensors).parameters)[:2] == [
        "lora_model_id",
        "tensors",
    ]
    assert "from_lora_tensors(" in inspect.getsource(lora_model.LoRAModel.from_local_checkpoint)
    for manager in (worker_manager.WorkerLoRAManager, worker_manager.LRUCacheWorkerLoRAManager):
        source = inspect.getsource(inspect.unwrap(manager.add_adapter))
        assert "activate_adapter(" in source or "add(self, request)" in source  # vLLM's function, or our wrapper of it
