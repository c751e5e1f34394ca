"""Noise in the actor's forward equals the rollout's to the last bit, while the parameters stay unchanged."""

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, LlamaConfig, Qwen3Config
from transformers.models.gemma.modeling_gemma import GemmaForCausalLM
from transformers.models.llama.modeling_llama import LlamaForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3ForCausalLM

from tests.helpers.engines import bare_engine
from tests.helpers.tiny_configs import TINY
from verl_aqn.integrations.verl.engine import AqnFSDPEngine
from verl_aqn.noise import NoiseInjector, NoiseSpec, check_evidence

ORDER = NoiseSpec(step=3, seed=1, sigma=0.05, unit="rms")
TOKENS = torch.arange(1, 21).reshape(2, 10)
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config),
    "gemma": (GemmaForCausalLM, GemmaConfig),
}


def make(kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    torch.manual_seed(0)
    cls, config = MODELS[kind]
    model = cls(config(**TINY))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model.to(torch.bfloat16).to(dtype)


def logits(model: nn.Module) -> torch.Tensor:
    return model(TOKENS).logits.detach()


@pytest.mark.parametrize("kind", MODELS)
def test_the_actor_s_noise_is_the_rollout_s(kind):
    """Compare digests with an engine whose norms were promoted in place, and outputs with a model with such norms."""
    rollout, actor = make(kind, torch.float32), make(kind)
    engine, injector = NoiseInjector(rollout), NoiseInjector(actor, beside=True)
    assert injector.clean_digest == engine.clean_digest
    clean = logits(actor)
    ordered, evidence = engine.apply(ORDER), injector.apply(ORDER)
    check_evidence(evidence, ORDER, engine.clean_digest)
    assert evidence["weights_digest"] == ordered["weights_digest"]
    noisy = logits(actor)
    assert noisy.dtype == torch.bfloat16
    far, near = (clean - logits(rollout)).norm(), (noisy - logits(rollout)).norm()
    assert near < 0.1 * far


def test_no_parameter_is_touched_and_restoring_gives_the_old_answers():
    model = make()
    state, before = {n: t.clone() for n, t in model.state_dict().items()}, logits(model)
    injector = NoiseInjector(model, beside=True)
    assert torch.equal(logits(model), before)
    injector.apply(ORDER)
    assert not torch.equal(logits(model), before)
    after = model.state_dict()
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    check_evidence(injector.restore(), None, injector.clean_digest)
    assert torch.equal(logits(model), before)


def test_noise_too_small_for_the_parameters_dtype_is_there():
    model = make()
    injector = NoiseInjector(model, beside=True)
    evidence = injector.apply(NoiseSpec(step=3, seed=1, sigma=1e-5, unit="absolute"))
    assert evidence["sigma_measured"] == pytest.approx(1e-5, rel=0.25)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_uses_count_the_forwards_of_every_norm():
    model = make()
    injector = NoiseInjector(model, beside=True)
    logits(model)
    assert injector.uses() == 0
    injector.apply(ORDER)
    assert injector.uses() == 0
    model.model.norm(torch.ones(1, 32))  # one norm alone is not the model
    assert injector.uses() == 0
    logits(model)
    assert injector.uses() == 1
    injector.restore()
    assert injector.uses() == 0


def test_a_forward_that_raises_leaves_the_parameter_in_place():
    model = make()
    injector, norm = NoiseInjector(model, beside=True), model.model.norm
    parameter = norm.weight
    injector.apply(ORDER)
    with pytest.raises(RuntimeError):
        norm(torch.ones(1, 31))
    assert norm.weight is parameter


def test_recomputed_activations_see_the_noise_of_the_forward():
    gradients = []
    for checkpointing in (False, True):
        model = make(dtype=torch.float32).train()
        NoiseInjector(model, beside=True).apply(ORDER)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(TOKENS).logits.square().mean().backward()
        gradients.append(model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


def build(tmp_path, seed: int = 0) -> AqnFSDPEngine:
    """Build verl's engine with a tiny model and a new adapter."""
    make().save_pretrained(tmp_path)
    engine = bare_engine(AqnFSDPEngine, tmp_path, {"noise_in_actor": True}, seed)
    engine.module = engine._build_lora_module(engine._build_module()).eval()
    return engine


def lora_a(engine: AqnFSDPEngine) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for name, p in engine.module.named_parameters() if "lora_A" in name])


def test_an_adapter_begins_as_its_seed_says(tmp_path):
    state = torch.get_rng_state()
    first = lora_a(build(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(lora_a(build(tmp_path)), first)
    assert not torch.equal(lora_a(build(tmp_path, seed=1)), first)


@pytest.fixture
def engine(tmp_path):
    """An engine whose adapter has an effect."""
    engine = build(tmp_path)
    for name, parameter in engine.module.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    return engine


def test_the_reference_policy_has_neither_adapter_nor_noise(engine):
    with torch.autocast("cpu", torch.bfloat16):
        clean = logits(engine.module)
        with engine.disable_adapter():
            reference = logits(engine.module)
        engine.noise.apply(ORDER)
        noisy = logits(engine.module)
        with engine.disable_adapter():
            assert torch.equal(logits(engine.module), reference)
        assert torch.equal(logits(engine.module), noisy)
    assert not torch.equal(noisy, clean)
    assert not torch.equal(clean, reference)
