"""What a model with fused layers holds, told under the trainer's names, whatever its kernel has made of it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4 import quantize
from verl_aqn.mxfp4.checkpoint import base_digest
from verl_aqn.shards import hf_names
from verl_aqn.vllm_api.readback import check_activations, describe_base, kernel_activation, remember_packed


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
    remember_packed(layer)
    # A kernel that rearranges: nothing of the packed layout is left to read.
    layer.weight = nn.Parameter(layer.weight_packed.data.flip(0).contiguous(), requires_grad=False)
    del layer.weight_packed
    return model


def test_digest_is_the_trainer_s_although_the_kernel_has_rearranged_the_weights():
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    said = describe_base(fused_model(parts))
    names = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
    assert said["base_digest"] == base_digest((n, p.packed, p.scale) for n, p in zip(names, parts, strict=True))
    assert (said["layers"], said["weights_equal_base"], said["kernel"]) == (1, None, "object")


def test_one_changed_weight_shows_between_two_moments():
    model = fused_model([quantize(torch.randn(8, 64)) for _ in range(3)])
    before = describe_base(model)
    model.attn.qkv_proj.weight.data[0, 0] ^= 1
    after = describe_base(model)
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
