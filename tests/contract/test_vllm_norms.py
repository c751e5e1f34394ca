"""What noise.py assumes about vLLM's norm classes. A failure here means that vLLM has changed."""

import os

import pytest
import torch
from torch import nn

from verl_aqn.noise import NoiseInjector, NoiseSpec, check_evidence, find_norms

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def layernorm():
    """vLLM's module of norms, inside a config, because its classes cannot be built without one."""
    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import layernorm

    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        yield layernorm


@pytest.fixture
def model(layernorm):
    model = nn.ModuleDict(
        {
            "rms": layernorm.RMSNorm(256, eps=1e-5, dtype=torch.bfloat16),
            "q_norm": layernorm.RMSNorm(64, eps=1e-6, dtype=torch.bfloat16),
            "gemma": layernorm.GemmaRMSNorm(256).to(torch.bfloat16),
            "layer_norm": layernorm.LayerNorm(256),
            "gated": layernorm.RMSNormGated(256),
            "without_weight": layernorm.RMSNorm(256, has_weight=False),
        }
    )
    for name in ("rms", "q_norm", "gemma"):
        model[name].weight.data.normal_(0.5, 0.2)
    return model


def test_vllm_norms_are_found(model):
    assert sorted(find_norms(model)) == ["gemma", "layer_norm", "q_norm", "rms"]


def test_norms_that_give_back_a_tuple_or_have_no_native_forward_end_no_load(layernorm):
    from vllm.model_executor.layers.minimax_rms_norm.rms_norm_tp import MiniMaxText01RMSNormTP
    from vllm.model_executor.models.commandr import LayerNorm

    odd = MiniMaxText01RMSNormTP.__new__(MiniMaxText01RMSNormTP)
    nn.Module.__init__(odd)
    odd.weight, odd.variance_epsilon = nn.Parameter(torch.ones(64)), 1e-6
    model = nn.ModuleDict({"cohere": LayerNorm(64).to(torch.bfloat16), "minimax": odd})
    injector = NoiseInjector(model)
    assert "cohere" in injector.names
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    assert model["cohere"](x)[0].dtype == torch.bfloat16
    assert {*injector.names, *injector.lacking} == {"cohere", "minimax"}


@pytest.mark.parametrize("residual", [False, True])
def test_float32_weights_work_over_bfloat16_activations(model, residual):
    """The output stays bf16 and equals that of bf16 weights up to one rounding: at most 2^-7 of the value."""
    torch.manual_seed(0)
    inputs = [torch.randn(16, 256, dtype=torch.bfloat16) for _ in range(1 + residual)]
    for name in ("rms", "gemma"):
        norm = model[name]

        def outputs(norm=norm):
            out = norm(*[t.clone() for t in inputs])
            return out if residual else (out,)

        before = outputs()
        norm.weight.data = norm.weight.data.float()
        after = outputs()
        assert all(t.dtype == torch.bfloat16 for t in after)
        torch.testing.assert_close(after[0], before[0], rtol=2**-7, atol=0)
        if residual:
            assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("sigma", [0.05, 1e-5])
def test_noise_reaches_what_vllm_computes(model, sigma):
    model = nn.ModuleDict({"rms": model["rms"]})
    injector = NoiseInjector(model)
    x = torch.randn(4, 256)
    clean = model["rms"](x)
    order = NoiseSpec(3, 0, sigma, "rms")
    check_evidence(injector.apply(order), order, injector.clean_digest)
    change = (model["rms"](x) - clean).square().mean().sqrt() / clean.square().mean().sqrt()
    assert change.item() == pytest.approx(sigma, rel=0.3)
    check_evidence(injector.restore(), None, injector.clean_digest)
    assert torch.equal(model["rms"](x), clean)


class Experts(nn.Module):
    """vLLM's RoutedExperts as the search for routers sees it."""

    local_num_experts = 4


ROUTED = {
    ("qwen3_moe", "Qwen3MoeDecoderLayer"): ("self_attn", "mlp", {}),
    ("qwen2_moe", "Qwen2MoeDecoderLayer"): ("self_attn", "mlp", {}),
    ("mixtral", "MixtralDecoderLayer"): ("self_attn", "block_sparse_moe", {}),
    ("gpt_oss", "TransformerBlock"): ("attn", "mlp", {}),
    ("glm4_moe", "Glm4MoeDecoderLayer"): ("self_attn", "mlp", {}),
    ("olmoe", "OlmoeDecoderLayer"): ("self_attn", "mlp", {}),
    ("deepseek_v2", "DeepseekV2DecoderLayer"): (
        "self_attn",
        "mlp",
        {"use_sequence_parallel_moe": False, "use_mha": False},
    ),
}


@pytest.mark.parametrize("name", ROUTED)
def test_the_norm_in_front_of_the_router_is_found_in_vllm_s_own_layers(layernorm, name):
    """The layers' real forward is used, with fused add-and-norm.

    Only the parts that need an engine are replaced by stand-ins.
    """
    import importlib

    module, cls = name
    attention, experts, attributes = ROUTED[name]
    layer_class = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), cls)
    layers = nn.ModuleList()
    for number in range(2):
        layer = layer_class.__new__(layer_class)
        nn.Module.__init__(layer)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            setattr(layer, norm, layernorm.RMSNorm(64, dtype=torch.bfloat16))
        setattr(layer, attention, nn.Linear(64, 64))
        dense, routed = nn.Linear(64, 64), nn.Module()
        routed.gate, routed.experts = nn.Linear(64, 4), Experts()
        setattr(layer, experts, dense if number == 0 else routed)  # the first layer is dense, as in many models
        for attribute, value in attributes.items():
            setattr(layer, attribute, value)
        layers.append(layer)
    model = nn.ModuleDict({"layers": layers, "norm": layernorm.RMSNorm(64, dtype=torch.bfloat16)})
    injector = NoiseInjector(model)
    order = NoiseSpec(3, 0, 0.05, "absolute")
    evidence = injector.apply(order)
    check_evidence(evidence, order, injector.clean_digest)
    assert injector.describe(order)["router_norms"] == ["layers.1.post_attention_layernorm"]
    assert len(evidence["groups"][0]["modules"]) == 4


def test_experts_of_vllm_say_how_many_they_hold():
    import inspect

    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    assert "self.local_num_experts =" in inspect.getsource(RoutedExperts)


def test_norms_over_the_whole_width_say_which_part_of_a_weight_they_hold():
    import inspect

    from vllm.model_executor.layers.minimax_rms_norm.rms_norm_tp import MiniMaxText01RMSNormTP

    for attribute in ("self.weight_shard_world =", "self.weight_shard_rank ="):
        assert attribute in inspect.getsource(MiniMaxText01RMSNormTP)
