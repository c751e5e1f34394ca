"""Norms with float32 weights on Ascend: same values as vLLM's forward, by calls that torch_npu's operator accepts."""

import os
import sys
import types

import pytest
import torch
from torch import Tensor, nn

from verl_aqn.errors import ModelError


def npu_rms_norm(x: Tensor, gamma: Tensor, epsilon: float = 1e-06) -> tuple[Tensor, Tensor]:
    """Replace torch_npu's operator as documented: both arguments have one dtype."""
    assert x.dtype == gamma.dtype, f"gamma is {gamma.dtype}, x is {x.dtype}"
    rstd = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + epsilon)
    return (x.float() * rstd * gamma.float()).to(x.dtype), rstd


@pytest.fixture
def norms(monkeypatch):
    os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")
    # Before the stand-in is there: transformers looks for the real torch_npu when it is imported.
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers import layernorm

    monkeypatch.setitem(sys.modules, "torch_npu", types.SimpleNamespace(npu_rms_norm=npu_rms_norm))
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig("cpu"))):
        model = nn.ModuleDict(
            {
                "rms": layernorm.RMSNorm(256, eps=1e-5, dtype=torch.bfloat16),
                "gemma": layernorm.GemmaRMSNorm(256).to(torch.bfloat16),
            }
        )
        for norm in model.values():
            norm.weight.data = norm.weight.data.float().normal_(0.5, 0.2)
        yield model


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("name", ["rms", "gemma"])
def test_the_values_are_those_of_vllm_s_forward(norms, name, residual):
    from verl_aqn.integrations.vllm.ascend_norm import compute_in_float32

    torch.manual_seed(0)
    inputs = [torch.randn(16, 256, dtype=torch.bfloat16) for _ in range(1 + residual)]
    expected = norms[name].forward_native(*[t.clone() for t in inputs])
    compute_in_float32(norms, [name])
    got = norms[name](*[t.clone() for t in inputs])
    for ours, theirs in zip(got, expected, strict=True) if residual else [(got, expected)]:
        assert ours.dtype == torch.bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=0)  # float32 sums in a different order: one rounding
    if residual:
        assert torch.equal(got[1], expected[1])
    # Noise is written into the weight's own storage, so the next forward uses it.
    norms[name].weight.data += 1.0
    again = norms[name](*[t.clone() for t in inputs])
    assert not torch.equal(again[0] if residual else again, got[0] if residual else got)


def test_a_bias_is_not_left_out_without_a_word(norms):
    from verl_aqn.integrations.vllm.ascend_norm import compute_in_float32

    norms["rms"].bias = nn.Parameter(torch.zeros(256))
    with pytest.raises(ModelError, match="rms has a bias"):
        compute_in_float32(norms, ["rms"])
