"""What noise.py counts on in vLLM's norm classes. A failure here means that vLLM moved."""

import os

import pytest
import torch
from torch import nn

from verl_aqn.noise import NoiseInjector, NoiseOrder, check_evidence, find_norms

pytest.importorskip("vllm")


@pytest.fixture(scope="module")
def layernorm():
    """vLLM's module of norms, inside a config: its classes refuse to be built without one."""
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
    assert sorted(find_norms(model)) == ["gemma", "q_norm", "rms"]


@pytest.mark.parametrize("residual", [False, True])
def test_float32_weights_work_over_bfloat16_activations(model, residual):
    """The output stays bf16 and equals that of bf16 weights to one rounding: 2^-7 of the value at most."""
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
    order = NoiseOrder(3, 0, sigma, "rms")
    check_evidence(injector.apply(order), order, injector.clean_digest)
    change = (model["rms"](x) - clean).square().mean().sqrt() / clean.square().mean().sqrt()
    assert change.item() == pytest.approx(sigma, rel=0.3)
    check_evidence(injector.restore(), None, injector.clean_digest)
    assert torch.equal(model["rms"](x), clean)
