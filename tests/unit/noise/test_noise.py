"""Keyed noise, clean weights, and evidence. Each old failure is rebuilt as a broken injector that must be caught."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.cohere.modeling_cohere import CohereLayerNorm
from transformers.models.gemma.modeling_gemma import GemmaModel, GemmaRMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaModel, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Model
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm, Qwen3NextRMSNormGated

from tests.helpers.tiny_configs import TINY
from verl_aqn.errors import ConfigError, EvidenceError, ModelError
from verl_aqn.noise import (
    NoiseInjector,
    NoiseSpec,
    check_evidence,
    check_norms,
    expected_norms,
    find_norms,
    sigma_interval,
)
from verl_aqn.noise.norms import Form, survey


def make_model(modules: int = 8, width: int = 256, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Return norms like those of a trained model: sizes from 0.03 to 1.8 (SmolLM2-135M)."""
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


def test_layer_norms_are_found():
    norms = {"n": nn.LayerNorm(64), "without_bias": nn.LayerNorm(64, bias=False), "cohere": CohereLayerNorm(64)}
    for norm in norms.values():
        norm.weight.data.normal_(0.5, 0.2)
    norms["n"].bias.data.normal_()
    for dtype in (torch.float32, torch.bfloat16):
        forms = survey(nn.ModuleDict(norms).to(dtype)).found
        assert forms == dict.fromkeys(norms, Form(0.0, centred=True))


def test_what_is_not_a_norm_of_one_dimension_is_left_alone():
    others = {
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
    order = NoiseSpec(3, 7, sigma, unit)
    evidence = injector.apply(order)
    check_evidence(evidence, order, injector.clean_digest)
    assert evidence["modules"] == len(injector.names) == 57
    assert evidence["elements"] == 57 * 576
    assert evidence["sigma_measured"] == pytest.approx(sigma, rel=0.02)
    assert evidence["weights_digest"] != evidence["clean_digest"] == injector.clean_digest


def test_rms_noise_is_in_proportion_to_the_effective_weight():
    model = nn.ModuleDict({"llama": LlamaRMSNorm(4096), "gemma": GemmaRMSNorm(4096)})
    model["llama"].weight.data.fill_(0.03)
    model["gemma"].weight.data.fill_(2.0)  # effective: 3
    NoiseInjector(model).apply(NoiseSpec(0, 0, 0.1, "rms"))
    assert (model["llama"].weight - 0.03).std().item() == pytest.approx(0.003, rel=0.05)
    assert (model["gemma"].weight - 2.0).std().item() == pytest.approx(0.3, rel=0.05)


def test_two_processes_with_the_same_order_have_the_same_weights():
    one, two = NoiseInjector(make_model()), NoiseInjector(make_model())
    two.apply(NoiseSpec(1, 0, 0.05, "rms"))  # another history
    order = NoiseSpec(4, 0, 0.01, "rms")
    assert one.apply(order) == two.apply(order)


def test_restore_is_bit_exact_and_noise_never_accumulates():
    model = make_model()
    clean = weights(model)
    injector = NoiseInjector(model)
    first = injector.apply(NoiseSpec(0, 0, 0.05, "rms"))
    for step in range(20):
        injector.apply(NoiseSpec(step, 0, 0.05, "rms"))
    assert injector.apply(NoiseSpec(0, 0, 0.05, "rms")) == first
    evidence = injector.restore()
    check_evidence(evidence, None, injector.clean_digest)
    assert torch.equal(weights(model), clean)
    assert evidence["unchanged_share"] == 1
    assert evidence["sigma_measured"] == 0


def test_apply_writes_into_the_same_storage():
    """A captured graph reads the address with which it was captured."""
    model = make_model()
    injector = NoiseInjector(model)
    before = [p.data_ptr() for p in model.parameters()]
    injector.apply(NoiseSpec(0, 0, 0.05, "rms"))
    injector.restore()
    assert [p.data_ptr() for p in model.parameters()] == before


def test_a_compiled_model_sees_noise_come_and_go():
    """Compiled graphs read the weights' storage at every call, so noise is written in place."""
    model = make_model(2, 64)
    injector = NoiseInjector(model)
    forward = torch.compile(lambda x: model["norm_1"](model["norm_0"](x)), backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 64)
    clean = forward(x)
    injector.apply(NoiseSpec(3, 0, 0.1, "rms"))
    noisy = forward(x)
    assert torch.equal(noisy, model["norm_1"](model["norm_0"](x)))
    assert not torch.equal(noisy, clean)
    injector.restore()
    assert torch.equal(forward(x), clean)


@pytest.mark.parametrize(
    "norm", [LlamaRMSNorm(64), nn.LayerNorm(64), nn.LayerNorm(64, bias=False), CohereLayerNorm(64)]
)
def test_a_promoted_norm_keeps_the_activations_dtype(norm):
    """Without this, Llama's norm with float32 weights returns float32, and torch's LayerNorm raises."""
    torch.manual_seed(0)
    model, x = nn.ModuleDict({"n": norm.to(torch.bfloat16)}), torch.randn(8, 64, dtype=torch.bfloat16)
    before = norm(x)
    injector = NoiseInjector(model)
    assert norm.weight.dtype == torch.float32
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x), before, rtol=2**-7, atol=2**-8)
    order = NoiseSpec(0, 0, 0.05, "absolute")
    check_evidence(injector.apply(order), order, injector.clean_digest)
    assert not torch.equal(norm(x), before)


class Raises(nn.LayerNorm):
    """A norm that cannot be tried: it needs another argument, a device, or a custom operator."""

    def forward(self, x, *args):
        raise NotImplementedError("no native forward")


class WantsItsOwnDtype(LlamaRMSNorm):
    def forward(self, x):
        if self.weight.dtype != torch.bfloat16:
            raise RuntimeError("weight must be bf16")
        return super().forward(x)


@pytest.mark.parametrize("norm", [Raises(64), WantsItsOwnDtype(64)])
def test_a_norm_that_cannot_carry_noise_is_told_when_an_order_needs_it(norm):
    model = nn.ModuleDict({"good": LlamaRMSNorm(64), "bad": norm}).to(torch.bfloat16)
    injector = NoiseInjector(model)
    assert injector.names == ["good"]
    assert norm.weight.dtype == torch.bfloat16
    order = NoiseSpec(0, 0, 0.0, "absolute")  # at a step without noise too: at the start
    for ask in (injector.describe, injector.apply):
        with pytest.raises(ModelError, match=rf"bad of ModuleDict: .*{type(norm).__name__}.*(no native|must be bf16)"):
            ask(order)
    without = replace(order, sigma=0.05, exclude=("bad",))
    assert injector.describe(without)["norms"] == 1
    check_evidence(injector.apply(without), without, injector.clean_digest)
    check_evidence(injector.restore(), None, injector.clean_digest)


def test_a_model_without_norms_runs_without_noise():
    injector = NoiseInjector(nn.ModuleDict({"linear": nn.Linear(8, 8)}))
    off = NoiseSpec(0, 0, 0.0, "absolute", targets=())
    assert injector.describe(off)["norms"] == 0
    for evidence, order in ((injector.apply(off), off), (injector.restore(), None)):
        check_evidence(evidence, order, injector.clean_digest)
    with pytest.raises(EvidenceError, match="no norm found in ModuleDict"):
        injector.describe(NoiseSpec(0, 0, 0.0, "absolute"))
    with pytest.raises(ConfigError, match=r"noise.targets is \[\]"):
        NoiseSpec(0, 0, 0.1, "absolute", targets=())


@pytest.mark.parametrize(
    ("norm", "offset"),
    [(GemmaRMSNorm, 1.0), (Qwen3NextRMSNorm, 1.0), (Gemma4RMSNorm, 0.0), (LlamaRMSNorm, 0.0), (nn.LayerNorm, 0.0)],
)
@pytest.mark.parametrize("beside", [False, True])
def test_units_count_in_what_the_model_multiplies_with(norm, offset, beside):
    """In Gemma's norms the effective weight is 1 + w; this must hold for actor and rollout weights."""
    module = norm(4096)
    module.weight.data.normal_(0.3, 0.1)
    effective = module.weight.detach().clone() + offset
    injector = NoiseInjector(nn.ModuleDict({"n": module}), beside=beside)
    for unit, size in (("absolute", 1.0), ("rms", effective.square().mean().sqrt()), ("multiplicative", effective)):
        order = NoiseSpec(3, 0, 0.05, unit)
        check_evidence(injector.apply(order), order, injector.clean_digest)
        noise = injector._norms["n"].data() + offset - effective
        assert (noise / size).square().mean().sqrt().item() == pytest.approx(0.05, rel=0.05)
        injector.restore()


# ---------------------------------------------------------------- the norms that a model should have


def test_norms_expected_of_a_folder_are_those_of_its_model(tmp_path):
    config = Qwen3Config(**TINY)
    config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(
        json.dumps(config.to_dict() | {"architectures": ["Qwen3ForCausalLM"]}, default=str)
    )
    expected, order = expected_norms(tmp_path), NoiseSpec(0, 0, 0.0, "absolute")
    injector = NoiseInjector(AutoModelForCausalLM.from_config(config))
    assert expected == injector.names
    answer = injector.describe(order)
    check_norms(expected, [answer], order)
    short = answer | {"names": expected[1:]}
    with pytest.raises(EvidenceError, match=rf"norm {expected[0]}: the model folder has it, .*8 found, 9 expected"):
        check_norms(expected, [answer, short], order)
    with pytest.raises(EvidenceError, match=r"norm mtp\.norm: rollout rank 0 has it"):
        check_norms(expected, [answer | {"names": [*expected, "mtp.norm"]}], order)
    check_norms(expected, [short], replace(order, exclude=(expected[0],)))
    check_norms(expected, [short], replace(order, targets=()))


def test_towers_beside_the_language_model_get_no_noise():
    class Multimodal(nn.Module):
        def __init__(self):
            super().__init__()
            self.vision_tower = nn.ModuleDict({"norm": nn.LayerNorm(8)})
            self.language_model = nn.ModuleDict({"norm": LlamaRMSNorm(8)})

        def get_language_model(self):
            return self.language_model

    assert list(find_norms(Multimodal())) == ["language_model.norm"]


def test_noise_is_drawn_under_the_checkpoint_s_names():
    def model(name):
        return nn.ModuleDict({name: LlamaRMSNorm(64)})

    plain, renamed = model("norm"), model("final_layernorm")
    renamed.aqn_names = {"final_layernorm.weight": "norm.weight"}
    injectors = [NoiseInjector(plain), NoiseInjector(renamed)]
    assert injectors[1].names == ["norm"]
    order = NoiseSpec(3, 0, 0.05, "absolute")
    first, second = (injector.apply(order) for injector in injectors)
    assert first["weights_digest"] == second["weights_digest"]


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
    order = NoiseSpec(0, 0, 0.05, "absolute", exclude=("*.post_attention_layernorm",))
    evidence = injector.apply(order)
    check_evidence(evidence, order, injector.clean_digest)
    assert evidence["groups"][0]["modules"] == ["layers.0.input_layernorm", "layers.1.input_layernorm", "norm"]
    assert torch.equal(model.layers[0].post_attention_layernorm.weight, torch.ones(32))
    with pytest.raises(ConfigError, match="nothing_like_it"):
        injector.apply(NoiseSpec(0, 0, 0.05, "absolute", exclude=("nothing_like_it",)))
    with pytest.raises(EvidenceError, match="excluded"):
        injector.apply(NoiseSpec(0, 0, 0.05, "absolute", exclude=("*",)))


def test_order_survives_the_wire_and_refuses_nonsense():
    order = NoiseSpec(3, 1, 0.05, "rms")
    assert NoiseSpec.from_dict(order.to_dict()) == order
    for bad in ({"unit": "relative"}, {"sigma": -1.0}, {"sigma": float("nan")}, {"step": -1}):
        with pytest.raises(ConfigError):
            NoiseSpec.from_dict(order.to_dict() | bad)


@given(st.sampled_from([torch.float32, torch.bfloat16]), st.floats(1e-6, 0.2), st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_a_sound_injector_passes_or_is_told_that_its_dtype_is_too_coarse(dtype, sigma, seed):
    injector = NoiseInjector(make_model(4, 64, dtype), dtype=None)
    order = NoiseSpec(0, seed, sigma, "rms")
    evidence = injector.apply(order)
    if evidence["unchanged_share"] > 0.5:
        assert dtype == torch.bfloat16
        assert sigma < 0.005
        with pytest.raises(EvidenceError, match="dtype cannot hold"):
            check_evidence(evidence, order, injector.clean_digest)
    else:
        check_evidence(evidence, order, injector.clean_digest)
