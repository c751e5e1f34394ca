"""Keyed noise, the clean store, and evidence; each old failure is rebuilt as a broken injector that must be caught."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import (
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaModel, GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from verl_aqn.errors import ConfigError, EvidenceError, ModelError
from verl_aqn.noise import NoiseInjector, NoiseOrder, check_evidence, find_norms, sigma_interval

TINY = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
}


def make_model(modules: int = 8, width: int = 256, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Norms as a trained model has them: sizes from 0.03 to 1.8 (SmolLM2-135M)."""
    model = nn.ModuleDict({f"norm_{i}": LlamaRMSNorm(width) for i in range(modules)})
    generator = torch.Generator().manual_seed(0)
    for size, norm in zip(np.geomspace(0.03, 1.8, modules), model.values(), strict=True):
        norm.weight.data.copy_(size * (1 + 0.2 * torch.randn(width, generator=generator)))
    return model.to(dtype)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().float().clone() for p in model.parameters()])


# ---------------------------------------------------------------- sampling interval


@pytest.mark.parametrize("n", [10, 100, 87_552])
def test_sigma_interval_is_that_of_chi_square(n):
    exact = 0.05 * np.sqrt(stats.chi2.ppf([0.025, 0.975], n) / n)
    assert sigma_interval(0.05, n) == pytest.approx(exact.tolist(), rel=5e-3 if n == 10 else 1e-4)


# ---------------------------------------------------------------- which modules


@pytest.mark.parametrize(
    ("model", "count"),
    [
        (lambda: LlamaModel(LlamaConfig(**TINY)), 5),
        (lambda: Qwen2Model(Qwen2Config(**TINY)), 5),
        (lambda: Qwen3Model(Qwen3Config(**TINY)), 9),  # and q_norm, k_norm in each layer
        (lambda: GemmaModel(GemmaConfig(**TINY)), 5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_hf_models_are_found(model, count, dtype):
    names = find_norms(model().to(dtype))
    assert len(names) == count
    assert {"norm", "layers.1.input_layernorm", "layers.1.post_attention_layernorm"} <= names.keys()


@pytest.mark.parametrize("size", [0.0, 0.03, 1.0, 60.0])
def test_norms_are_found_whatever_the_size_of_their_weight(size):
    for norm in (LlamaRMSNorm(64), GemmaRMSNorm(64), nn.RMSNorm(64), nn.RMSNorm(64, eps=1e-5)):
        norm.weight.data.normal_(size, 0.1)
        assert list(find_norms(nn.ModuleDict({"n": norm.to(torch.bfloat16)}))) == ["n"]


def test_what_is_not_an_rmsnorm_is_left_alone():
    others = {
        "layer_norm": nn.LayerNorm(64),
        "layer_norm_without_bias": nn.LayerNorm(64, bias=False),
        "subtracts_the_mean": CohereLayerNorm(64),
        "without_weight": nn.RMSNorm(64, elementwise_affine=False),
        "two_dimensional": nn.RMSNorm((4, 16)),
        "gated": Qwen3NextRMSNormGated(64),
        "linear": nn.Linear(64, 64, bias=False),
        "prelu": nn.PReLU(64),
    }
    assert find_norms(nn.ModuleDict(others)) == {}


# ---------------------------------------------------------------- apply, restore, evidence


@pytest.mark.parametrize("unit", ["absolute", "rms"])
@pytest.mark.parametrize("sigma", [0.05, 2.44e-4, 1e-5])
def test_what_was_ordered_is_in_the_weights(unit, sigma):
    injector = NoiseInjector(make_model(57, 576))
    order = NoiseOrder(3, 7, sigma, unit)
    evidence = injector.apply(order)
    check_evidence(evidence, order, injector.clean_digest)
    assert evidence["modules"] == len(injector.names) == 57
    assert evidence["elements"] == 57 * 576
    assert evidence["sigma_realised"] == pytest.approx(sigma, rel=0.02)
    assert evidence["weights_digest"] != evidence["clean_digest"] == injector.clean_digest


def test_rms_noise_is_in_proportion_to_the_effective_weight():
    model = nn.ModuleDict({"llama": LlamaRMSNorm(4096), "gemma": GemmaRMSNorm(4096)})
    model["llama"].weight.data.fill_(0.03)
    model["gemma"].weight.data.fill_(2.0)  # effective: 3
    NoiseInjector(model).apply(NoiseOrder(0, 0, 0.1, "rms"))
    assert (model["llama"].weight - 0.03).std().item() == pytest.approx(0.003, rel=0.05)
    assert (model["gemma"].weight - 2.0).std().item() == pytest.approx(0.3, rel=0.05)


def test_two_processes_with_the_same_order_have_the_same_weights():
    one, two = NoiseInjector(make_model()), NoiseInjector(make_model())
    two.apply(NoiseOrder(1, 0, 0.05, "rms"))  # another history
    order = NoiseOrder(4, 0, 0.01, "rms")
    assert one.apply(order) == two.apply(order)


def test_restore_is_bit_exact_and_noise_never_accumulates():
    model = make_model()
    clean = weights(model)
    injector = NoiseInjector(model)
    first = injector.apply(NoiseOrder(0, 0, 0.05, "rms"))
    for step in range(20):
        injector.apply(NoiseOrder(step, 0, 0.05, "rms"))
    assert injector.apply(NoiseOrder(0, 0, 0.05, "rms")) == first
    evidence = injector.restore()
    check_evidence(evidence, None, injector.clean_digest)
    assert torch.equal(weights(model), clean)
    assert evidence["unchanged_share"] == 1
    assert evidence["sigma_realised"] == 0


def test_apply_writes_into_the_same_storage():
    """A captured graph reads the address that it was captured with."""
    model = make_model()
    injector = NoiseInjector(model)
    before = [p.data_ptr() for p in model.parameters()]
    injector.apply(NoiseOrder(0, 0, 0.05, "rms"))
    injector.restore()
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_compiled_model_sees_noise_come_and_go():
    """Compiled graphs read the weights' storage at every call, which is why noise is written in place."""
    model = make_model(2, 64)
    injector = NoiseInjector(model)
    forward = torch.compile(lambda x: model["norm_1"](model["norm_0"](x)), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    clean = forward(x)
    injector.apply(NoiseOrder(3, 0, 0.1, "rms"))
    noisy = forward(x)
    assert torch.equal(noisy, model["norm_1"](model["norm_0"](x)))
    assert not torch.equal(noisy, clean)
    injector.restore()
    assert torch.equal(forward(x), clean)


def test_promotion_that_changes_the_activations_is_refused_and_undone():
    """HF's Llama norm with float32 weights returns float32, which a bf16 linear layer does not take."""
    model = make_model(dtype=torch.bfloat16)
    with pytest.raises(ModelError, match="float32"):
        NoiseInjector(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_promoted_weights_keep_their_values():
    model = nn.ModuleDict({"n": GemmaRMSNorm(64)}).to(torch.bfloat16)
    model["n"].weight.data.normal_()
    before = weights(model)
    NoiseInjector(model)
    assert model["n"].weight.dtype == torch.float32
    assert torch.equal(weights(model), before)


def test_excluded_norms_stay_clean():
    model = LlamaModel(LlamaConfig(**TINY))
    injector = NoiseInjector(model)
    order = NoiseOrder(0, 0, 0.05, "absolute", exclude=("*.post_attention_layernorm",))
    evidence = injector.apply(order)
    check_evidence(evidence, order, injector.clean_digest)
    assert evidence["groups"][0]["modules"] == ["layers.0.input_layernorm", "layers.1.input_layernorm", "norm"]
    assert torch.equal(model.layers[0].post_attention_layernorm.weight, torch.ones(32))
    with pytest.raises(ConfigError, match="nothing_like_it"):
        injector.apply(NoiseOrder(0, 0, 0.05, "absolute", exclude=("nothing_like_it",)))
    with pytest.raises(EvidenceError, match="excluded"):
        injector.apply(NoiseOrder(0, 0, 0.05, "absolute", exclude=("*",)))


def test_order_survives_the_wire_and_refuses_nonsense():
    order = NoiseOrder(3, 1, 0.05, "rms")
    assert NoiseOrder.from_dict(order.to_dict()) == order
    for bad in ({"unit": "relative"}, {"sigma": -1.0}, {"sigma": float("nan")}, {"step": -1}):
        with pytest.raises(ConfigError):
            NoiseOrder.from_dict(order.to_dict() | bad)


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.floats(1e-6, 0.2), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_sound_injector_passes_or_is_told_that_its_dtype_is_too_coarse(dtype, sigma, seed):
    injector = NoiseInjector(make_model(4, 64, dtype), dtype=None)
    order = NoiseOrder(0, seed, sigma, "rms")
    evidence = injector.apply(order)
    if evidence["unchanged_share"] > 0.5:
        assert dtype == torch.bfloat16
        assert sigma < 0.005
        with pytest.raises(EvidenceError, match="dtype cannot hold"):
            check_evidence(evidence, order, injector.clean_digest)
    else:
        check_evidence(evidence, order, injector.clean_digest)
