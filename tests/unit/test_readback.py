"""What a model with fused layers holds, told under the trainer's names, whatever its kernel has made of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.checkpoint import base_digest, combined_digest, values_digest
from verl_aqn.shards import hf_names
from verl_aqn.vllm_api.readback import check_activations, describe_base, kernel_activation, remember_base


class Model(nn.Module):
    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012


def fused_model(parts):
    """One layer as vLLM has it after loading: the parts' rows below each other."""
    model, attention, layer = Model(), nn.Module(), nn.Module()
    layer.logical_widths = [len(part.packed) for part in parts]
    layer.weight_packed = nn.Parameter(torch.cat([part.packed for part in parts]), requires_grad=False)
    layer.weight_scale = nn.Parameter(torch.cat([part.scale for part in parts]), requires_grad=False)
    layer.scheme = SimpleNamespace(kernel=object())
    attention.qkv_proj = layer
    model.attn = attention
    remember_base(model)
    # A kernel that rearranges: nothing of the packed layout is left to read.
    layer.weight = nn.Parameter(layer.weight_packed.data.flip(0).contiguous(), requires_grad=False)
    del layer.weight_packed
    return model


def test_digest_is_the_trainer_s_although_the_kernel_has_rearranged_the_weights():
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    said = describe_base(fused_model(parts), names)
    assert said["base_digest"] == base_digest((n, p.packed, p.scale) for n, p in zip(names, parts, strict=True))
    assert (said["layers"], said["weights_equal_base"], said["kernel"]) == (1, None, "object")
    assert said["form"] == "packed"


def plain_model(parts, excluded):
    """The bf16 equal of `parts` as vLLM loads it, with a layer beside it that the packed base leaves in bf16."""
    model = Model()
    for name, weights in (("attn.qkv_proj", parts), ("head", [excluded])):
        layer = nn.Module()
        layer.output_partition_sizes, layer.input_size_per_partition = [len(weight) for weight in weights], 64
        layer.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
        layer.quant_method = named_kernel("AscendUnquantizedLinearMethod")
        if name != "head":
            model.attn = nn.Module()
        model.get_submodule(name.rpartition(".")[0]).add_module(name.rpartition(".")[2], layer)
    remember_base(model)
    return model


def test_a_bf16_base_is_known_by_the_values_of_the_packed_one(tmp_path):
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    dense = [dequantize(*part, torch.bfloat16) for part in parts]
    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    said = describe_base(model := plain_model(dense, torch.randn(3, 64).bfloat16()), names)
    assert said["base_digest"] == combined_digest((n, values_digest(w)) for n, w in zip(names, dense, strict=True))
    assert (said["form"], said["layers"], said["weights_equal_base"]) == ("bf16", 1, True)
    assert (said["kernel"], said["activations"]) == ("AscendUnquantizedLinearMethod", ["none"])
    weight = model.attn.qkv_proj.weight
    weight.data[0, 0] += 1
    assert describe_base(model, names)["weights_equal_base"] is False
    # vLLM's CPU platform packs the weight away: what cannot be read is not vouched for.
    model.attn.qkv_proj.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    gone = describe_base(model, names)
    assert gone["base_digest"] == said["base_digest"]
    assert gone["weights_equal_base"] is gone["weights_digest"] is None


def test_one_changed_weight_shows_between_two_moments():
    model = fused_model([quantize(torch.randn(8, 64)) for _ in range(3)])
    before = describe_base(model, ["attn.q_proj"])
    model.attn.qkv_proj.weight.data[0, 0] ^= 1
    after = describe_base(model, ["attn.q_proj"])
    assert after["weights_digest"] != before["weights_digest"]


def test_unknown_fusion_is_an_error_and_not_a_wrong_name():
    with pytest.raises(ValueError, match="3 parts"):
        hf_names(Model(), "mlp.gate_up_proj", 3)


def named_kernel(name: str, **attributes):
    return type(name, (), attributes)()


def test_a_kernel_that_rounds_activations_without_a_word_is_found_out():
    """The trap of Blackwell: a weight-only checkpoint runs as W4A4 there."""
    blackwell, hopper = named_kernel("FlashInferMxFp4LinearKernel"), named_kernel("MarlinMxFp4LinearKernel")
    found = [{"kernel": type(k).__name__, "activations": [kernel_activation(k)]} for k in (hopper, blackwell)]
    check_activations("none", [["none"]], found[:1])
    check_activations("rceil/nearest", [["rceil/nearest"]], found[1:])
    with pytest.raises(EvidenceError, match=r"FlashInferMxFp4LinearKernel rounds activations.*linear_backend"):
        check_activations("none", [["none"]], found)
    with pytest.raises(EvidenceError, match="actor rank 1"):
        check_activations("none", [["none"], ["even/nearest"]], found[:1])
    assert kernel_activation(named_kernel("NewKernel")) == "unknown"
    assert kernel_activation(named_kernel("CpuMxfp4LinearKernel", activation=None)) == "none"
