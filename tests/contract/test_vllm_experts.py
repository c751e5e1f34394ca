"""Experts in vLLM's own layers on ranks of tensor and expert parallelism: what is reported of them, and computed."""

import os
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL_MOE
from verl_aqn.checkpoints.disk_base import DiskBase
from verl_aqn.checkpoints.loading import dequantize_checkpoint, open_packed, packed_modules
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.checkpoints.slices import NOTHING, not_covered
from verl_aqn.integrations.vllm.observe import keep
from verl_aqn.integrations.vllm.readback import describe_base, remember_base
from verl_aqn.integrations.vllm.trace import Trace

EXPERTS, INNER = 4, 128
MODELS = {
    "mlp": Qwen3MoeConfig(**SMALL_MOE, moe_intermediate_size=INNER, num_experts=EXPERTS),
    "block_sparse_moe": MixtralConfig(**SMALL_MOE | {"intermediate_size": INNER}, num_local_experts=EXPERTS),
}
# Sizes of tensor and expert parallelism inside a MoE layer: vLLM sets the first to 1 if the second is above 1.
ONE, TENSOR, EXPERT = (1, 1), (2, 1), (1, 2)


@pytest.fixture(scope="module", params=MODELS)
def folders(request, tmp_path_factory) -> tuple[str, Path]:
    """(the model's name for a layer's MoE part, folder with `packed` and `dense`). Only experts are packed."""
    root = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(MODELS[request.param], dtype=torch.bfloat16).save_pretrained(root / "source")
    exclude = ("lm_head", "embed_tokens", "*.self_attn.*")
    quantize_checkpoint(root / "source", root / "packed", exclude=exclude)
    dequantize_checkpoint(root / "packed", root / "dense")
    return request.param, root


@contextmanager
def vllm_on_cpu():
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    from verl_aqn.integrations.vllm import vllm_plugin as plugin

    plugin.register()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield


def rank_of(block: str, folder: Path, sizes: tuple[int, int], rank: int, lora: bool = True) -> nn.Module:
    """Return the MoE layers of a folder as vLLM loads them on a rank, before its kernels rearrange them."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.fused_moe.activation import MoEActivation
    from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEParallelConfig, RoutingMethodType
    from vllm.model_executor.layers.fused_moe.expert_map_manager import ExpertMapManager
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

    from verl_aqn.checkpoints.storage import read_config

    tensor, expert = sizes
    parallel: Any = FusedMoEParallelConfig.make_no_parallel()
    parallel.tp_size, parallel.ep_size, parallel.use_ep = tensor, expert, expert > 1
    parallel.tp_rank, parallel.ep_rank = (rank if size > 1 else 0 for size in sizes)
    quantization = read_config(folder).get("quantization_config")
    names = {"mlp": ("gate_proj", "down_proj", "up_proj"), "block_sparse_moe": ("w1", "w2", "w3")}[block]
    model, number = nn.Module(), 0
    with safe_open(folder / "model.safetensors", "pt") as file, Trace() as trace:
        while any(f"layers.{number}." in name for name in file.keys()):  # noqa: SIM118
            prefix = f"model.layers.{number}.{block}.experts"
            manager = ExpertMapManager(64, 2, EXPERTS, 0, None, parallel, "linear", False)
            moe = FusedMoEConfig(
                num_experts=EXPERTS, experts_per_token=2, hidden_dim=64, intermediate_size=INNER,
                num_local_experts=manager.local_num_experts, num_logical_experts=EXPERTS,
                activation=MoEActivation.SILU, device="cpu", routing_method=RoutingMethodType.Renormalize,
                moe_parallel_config=parallel, in_dtype=torch.bfloat16, is_lora_enabled=lora,
            )  # fmt: skip
            config = CompressedTensorsConfig.from_config(quantization) if quantization else None
            layer = RoutedExperts(prefix, torch.bfloat16, moe, config, manager, *names)
            layer.layer_name = prefix
            tensors = [(n.removeprefix(f"{prefix}."), file.get_tensor(n)) for n in file.keys() if prefix in n]  # noqa: SIM118
            for name, tensor in tensors:
                trace.name(f"{prefix}.{name}", tensor)
            assert set(layer.load_weights(tensors)) == {name for name, _ in layer.named_parameters()}
            parent = model
            for part in f"{prefix}.routed_experts".split(".")[:-1]:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.routed_experts = layer
            number += 1
    keep(model, trace)
    return model


def layers_of(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if hasattr(layer, "w13_weight") or hasattr(layer, "w13_weight_packed")]


@pytest.mark.parametrize("sizes", [ONE, TENSOR, EXPERT])
@pytest.mark.parametrize("form", ["bf16", "packed"])
def test_every_rank_tells_its_part_of_the_experts_under_the_trainer_s_names(folders, form, sizes):
    """vLLM's own loader loads our folders. The result is compared with the packed folder's content for such a rank."""
    block, root = folders
    modules = packed_modules(open_packed(root / "packed"))
    assert len(modules) == 2 * EXPERTS * 3
    answers = []
    with vllm_on_cpu():
        from vllm.model_executor.layers.fused_moe.experts.marlin_moe import MarlinExperts

        for rank in range(max(sizes)):
            model = rank_of(block, root / ("packed" if form == "packed" else "dense"), sizes, rank)
            for layer in layers_of(model):
                if form == "packed":  # its kernel needs a GPU; only the choice of the kernel is checked
                    layer.quant_method.moe_kernel = type("Kernel", (), {})()
                    layer.quant_method.moe_kernel.fused_experts = MarlinExperts.__new__(MarlinExperts)
                    layer.w13_weight, layer.w2_weight = layer.w13_weight_packed, layer.w2_weight_packed
                else:
                    layer.quant_method.process_weights_after_loading(layer)
            answers.append(describe_base(model, modules))
    for said in answers:
        assert (said["form"], said["layers"], said["activations"]) == (form, 2, ["none"])
        assert said["base_digest"] == checkpoint_digest(root / "packed", said["slices"], form)
        assert said["experts"] == len(modules) // sizes[1]
    elements = DiskBase(root / "packed").elements.__getitem__
    assert not_covered([said["slices"] for said in answers], elements) is None
    slices = answers[0]["slices"]
    name = f"model.layers.1.{block}.experts.3." + ("down_proj" if block == "mlp" else "w2")
    assert slices.get(name) == {ONE: None, TENSOR: [0, 64, 0, 64], EXPERT: NOTHING}[sizes]
    if sizes != ONE:
        assert not_covered([slices, slices], elements)


@pytest.mark.parametrize("sizes", [ONE, TENSOR, EXPERT])
def test_one_changed_weight_of_one_expert_is_found(folders, sizes):
    """A wrong load is found by the digest of what was loaded, a later change by that of what the kernel keeps."""
    block, root = folders
    modules = packed_modules(open_packed(root / "packed"))
    with vllm_on_cpu():
        model = rank_of(block, root / "dense", sizes, 0)
        loaded = describe_base(model, modules)
        layer = layers_of(model)[1]
        layer.w2_weight.data[1, 5, 7] += 1
        remember_base(model)
        assert describe_base(model, modules)["base_digest"] != loaded["base_digest"]
        layer.w2_weight.data[1, 5, 7] -= 1
        remember_base(model)
        layer.quant_method.process_weights_after_loading(layer)
        before = describe_base(model, modules)
        assert before["base_digest"] == checkpoint_digest(root / "packed", before["slices"], "bf16")
        layer.w13_weight.data.view(-1)[100] += 1
        after = describe_base(model, modules)
    assert after["base_digest"] == before["base_digest"]
    assert after["weights_digest"] != before["weights_digest"]


@pytest.mark.parametrize("sizes", [TENSOR, EXPERT])
def test_what_the_ranks_of_a_cpu_compute_adds_up_to_the_whole(folders, sizes):
    """With LoRA in the engine, the sum over ranks equals vLLM's own kernel on a single rank without LoRA."""
    block, root = folders
    torch.manual_seed(1)
    x, router = torch.randn(7, 64).bfloat16(), torch.randn(7, EXPERTS).bfloat16()
    outputs = []
    with vllm_on_cpu():
        for one, rank, lora in [(ONE, 0, False), *((sizes, rank, True) for rank in range(2))]:
            layer = layers_of(rank_of(block, root / "dense", one, rank, lora))[0]
            layer.quant_method.process_weights_after_loading(layer)
            assert layer.quant_method.is_monolithic
            outputs.append(layer.forward_monolithic(x.clone(), router).float())
    whole, *parts = outputs
    assert all(0.1 * whole.norm() < part.norm() < whole.norm() for part in parts)
    torch.testing.assert_close(sum(parts), whole, atol=0.02 * whole.abs().max().item(), rtol=0)


def test_vllm_s_own_method_would_take_triton_s_kernel_beside_lora_and_ids_of_the_whole_model():
    """cpu_moe.py exists because of this; if this test fails, the file can go."""
    import inspect

    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.oracle import unquantized

    source = inspect.getsource(unquantized.select_unquantized_moe_backend)
    assert source.index("if moe_config.is_lora_enabled:") < source.index("_get_priority_backends(moe_config)")
    computed = inspect.getsource(CPUUnquantizedExperts.apply)
    assert "self._select_experts(" in computed
    assert computed.count("expert_map") == 1  # an unused argument
