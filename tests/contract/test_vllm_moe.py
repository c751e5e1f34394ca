"""Stock vLLM's MXFP4 method for MoE layers accepts the experts that we write. Its kernels need a GPU."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL_MOE
from verl_aqn.checkpoints.loading import dequantize_checkpoint
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.mxfp4 import dequantize

SIZES = SMALL_MOE | {"intermediate_size": 32, "num_hidden_layers": 1}  # like vLLM's layer below
CONFIGS = {
    "mlp": (
        Qwen3MoeConfig(**SIZES, moe_intermediate_size=32, num_experts=4),
        ("gate_proj", "down_proj", "up_proj"),
    ),
    "block_sparse_moe": (MixtralConfig(**SIZES, num_local_experts=4), ("w1", "w2", "w3")),
}


@pytest.mark.parametrize("block", CONFIGS)
def test_experts_fill_vllm_s_parameters(block, tmp_path):
    os.environ.setdefault("VERL_PLATFORM", "cpu")
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors
    from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
        compressed_tensors_moe_w4a4_mxfp4 as moe,
    )
    from vllm.model_executor.layers.quantization.compressed_tensors.utils import should_ignore_layer

    config, names = CONFIGS[block]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    packed, dense = (load_file(tmp_path / kind / "model.safetensors") for kind in ("packed", "dense"))

    method = object.__new__(moe.CompressedTensorsW4A4Mxfp4MoEMethod)
    method.group_size, method.moe = 32, SimpleNamespace(w13_num_shards=2)
    layer = torch.nn.Module()
    method.create_weights(layer, 4, 64, 32, torch.bfloat16)
    parameters = {f"experts.{name}": parameter.data for name, parameter in layer.named_parameters()}
    gate, down, up = names
    mapping = RoutedExperts.build_expert_params_mapping(gate, down, up, 4)
    filled = dict.fromkeys(parameters, 0)
    for name, tensor in packed.items():
        if ".experts." not in name:
            continue
        tail = "experts." + name.partition(".experts.")[2]
        ((parameter, expert, shard),) = [
            (tail.replace(source, target), expert, shard) for target, source, expert, shard in mapping if source in tail
        ]
        parameter = parameter.replace("routed_experts.", "")
        place = parameters[parameter][expert]
        if "w13" in parameter:
            place = place.chunk(2)[0 if shard == "w1" else 1]
        assert (place.shape, place.dtype) == (tensor.shape, tensor.dtype)
        place.copy_(tensor)
        filled[parameter] += tensor.numel()
    assert all(filled[name] == parameter.numel() for name, parameter in parameters.items())

    stacks = {
        name: dequantize(parameters[f"experts.{name}_weight_packed"], parameters[f"experts.{name}_weight_scale"])
        for name in ("w13", "w2")
    }
    prefix = f"model.layers.0.{block}.experts."
    for expert in range(4):
        both = torch.cat([dense[f"{prefix}{expert}.{gate}.weight"], dense[f"{prefix}{expert}.{up}.weight"]])
        assert torch.equal(stacks["w13"][expert], both)
        assert torch.equal(stacks["w2"][expert], dense[f"{prefix}{expert}.{down}.weight"])

    quantization = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]
    theirs = compressed_tensors.CompressedTensorsConfig.from_config(quantization)
    assert theirs._is_mxfp4(theirs.target_scheme_map["Linear"]["weights"])
    assert should_ignore_layer(f"model.layers.0.{block}.gate", ignore=theirs.ignore)
    assert not should_ignore_layer(f"{prefix}0.gate_proj", ignore=theirs.ignore)
