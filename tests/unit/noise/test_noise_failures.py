"""Every noise failure of an earlier project, rebuilt: config or evidence catches each of them.

Each failure has a test with its name. The classes are injectors that are broken in one way.
"""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import MixtralConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralModel

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.noise_settings import order_of, schedule_of
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError, EvidenceError
from verl_aqn.noise import NoiseInjector, NoiseSpec, check_equal_noise, check_evidence, check_used, draw
from verl_aqn.noise.norms import Form, Survey
from verl_aqn.noise.schedule import SigmaSchedule
from verl_aqn.noise.spec import Layers, Zone

ORDER = NoiseSpec(3, 0, 0.05, "rms")


def make_model(modules: int = 8, width: int = 256, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """Return norms like those of a trained model: sizes from 0.03 to 1.8 (SmolLM2-135M)."""
    model = nn.ModuleDict({f"layers_{i}": nn.ModuleDict({f"{i}": LlamaRMSNorm(width)}) for i in range(modules)})
    generator = torch.Generator().manual_seed(0)
    norms = [module for module in model.modules() if isinstance(module, LlamaRMSNorm)]
    for size, norm in zip(np.geomspace(0.03, 1.8, modules), norms, strict=True):
        norm.weight.data.copy_(size * (1 + 0.2 * torch.randn(width, generator=generator)))
    return model.to(dtype)


def caught(injector: NoiseInjector, order: NoiseSpec, says: str) -> None:
    evidence = json.loads(json.dumps(injector.apply(order)))
    with pytest.raises(EvidenceError, match=says) as error:
        check_evidence(evidence, order, injector.clean_digest)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- no noise at all


class EngineNorm(nn.Module):
    """A different class with the same name, like vLLM's for the fork: isinstance does not recognise it."""

    def __init__(self):
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.ones(256)), 1e-6

    def forward_native(self, x, residual=None):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


def by_class(model: nn.Module) -> Survey:
    return Survey({name: Form(0.0) for name, module in model.named_modules() if isinstance(module, LlamaRMSNorm)})


def test_failure_matching_by_hf_class_finds_0_modules_in_the_engine(monkeypatch):
    model = nn.ModuleDict({"norm": EngineNorm()})
    assert NoiseInjector(model).names == ["norm"]
    monkeypatch.setattr("verl_aqn.noise.injector.survey", by_class)
    with pytest.raises(EvidenceError, match="no norm found"):
        NoiseInjector(nn.ModuleDict({"norm": EngineNorm()})).describe(ORDER)


def test_failure_a_worker_that_matches_0_modules_does_not_pass():
    injector = NoiseInjector(make_model())
    with pytest.raises(EvidenceError, match="0 modules"):
        check_evidence(injector.apply(ORDER) | {"modules": 0}, ORDER, injector.clean_digest)


class StepZeroOfOne(NoiseInjector):
    """The fork's epoch_aware: its injector was called with step 0 of 1, which is always warm-up."""

    def _write(self, order, chosen):
        super()._write(replace(order, sigma=SigmaSchedule(0.05, 1e-5, 10, 1).sigma(0)), chosen)


def test_failure_step_0_of_1_is_always_warm_up_although_the_log_says_otherwise():
    caught(StepZeroOfOne(make_model()), ORDER, "still clean")


def test_failure_epoch_aware_gave_no_noise():
    config = load_recipe("e12", ["profile=cpu"])
    noise = parse_aqn(config).noise
    schedule = schedule_of(config, 29)
    orders = [order_of(noise, schedule, step) for step in range(29)]
    assert max(order.sigma for order in orders) == 0.05
    assert sum(order.sigma > 0 for order in orders) == 26


class StepNotPassedOn(NoiseInjector):
    def apply(self, order):
        return super().apply(replace(order, step=0))


def test_failure_step_never_passed_on():
    caught(StepNotPassedOn(make_model()), replace(ORDER, step=7), "step 7")


def test_failure_sigma_of_an_earlier_stage():
    injector = NoiseInjector(make_model())
    evidence = injector.apply(replace(ORDER, step=7))
    with pytest.raises(EvidenceError, match=r"expected noise of σ 0\.0172"):
        check_evidence(evidence, replace(ORDER, step=7, sigma=0.0172), injector.clean_digest)


class SkipsOneModule(NoiseInjector):
    def _write(self, order, chosen):
        super()._write(order, chosen[1:])


def test_failure_one_module_left_out_of_many():
    """One of 400: too few elements to show in the share of them that changed."""
    caught(SkipsOneModule(make_model(400, 64)), ORDER, r"layers_0\.0 did not change")


def test_failure_noise_lost_in_bfloat16():
    injector = NoiseInjector(make_model(dtype=torch.bfloat16), dtype=None)
    caught(injector, NoiseSpec(27, 0, 1e-5, "absolute"), "dtype cannot hold")


# ---------------------------------------------------------------- noise that differs from the order

TARGETED = replace(ORDER, layers=Layers("targeted", modules=("0-3",), multiplier=0.3))


class NoSuchField(NoiseInjector):
    """The fork's rollout config had no field for multipliers, so they were dropped."""

    def apply(self, order):
        return super().apply(replace(order, layers=Layers()))


class IgnoresMultipliers(NoiseInjector):
    """The order arrives complete, but the writer ignores it."""

    def _select(self, order):
        return [(target, 1.0) for target, _ in super()._select(order)]


class WritesWithoutMultipliers(NoiseInjector):
    """Worse: the evidence claims the multipliers, too."""

    def _write(self, order, chosen):
        super()._write(order, [(target, 1.0) for target, _ in chosen])


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (NoSuchField, "order has layers"),
        (IgnoresMultipliers, "multipliers did not reach"),
        (WritesWithoutMultipliers, r"multiplier 0\.3.* is in the weights"),
    ],
)
def test_failure_multipliers_dropped_between_trainer_and_rollout(broken, says):
    sound = NoiseInjector(make_model())
    check_evidence(sound.apply(TARGETED), TARGETED, sound.clean_digest)
    caught(broken(make_model()), TARGETED, says)


def test_failure_a_zone_s_boundary_that_is_never_crossed():
    class AlwaysEarly(NoiseInjector):
        def _select(self, order):
            return super()._select(replace(order, share=0.0))

    zones = Layers("zones", zones=(Zone(("0-3",), 1.0, 0.3),), boundary=0.5)
    caught(AlwaysEarly(make_model()), replace(ORDER, layers=zones, share=0.7), "multipliers did not reach")


@pytest.mark.parametrize("unit", ["absolute", "multiplicative"])
def test_failure_unit_dropped_on_the_way(unit):
    class OtherUnit(NoiseInjector):
        def _write(self, order, chosen):
            super()._write(replace(order, unit=unit), chosen)

    caught(OtherUnit(make_model()), ORDER if unit == "absolute" else replace(ORDER, unit="absolute"), "in the weights")


class AddsInPlace(NoiseInjector):
    """With adapter-only sync the base is never rewritten, so noise added to it accumulates."""

    def _put(self, target, sigma, unit, z):
        target.write(target.data().cpu().float() + sigma * target.unit(unit) * z)


def test_failure_noise_added_in_place_accumulates():
    injector = AddsInPlace(make_model())
    check_evidence(injector.apply(ORDER), ORDER, injector.clean_digest)
    caught(injector, replace(ORDER, step=4), "was added more than once")


def test_failure_noise_added_in_place_keeps_sigma_from_decaying():
    injector = AddsInPlace(make_model())
    injector.apply(ORDER)
    caught(injector, replace(ORDER, step=6, sigma=0.0172), "was added more than once")


def test_failure_clean_weights_taken_while_noise_is_on():
    model = make_model()
    first = NoiseInjector(model)
    first.apply(ORDER)
    with pytest.raises(EvidenceError, match="not those from the start of the run"):
        check_evidence(NoiseInjector(model).apply(replace(ORDER, step=4)), replace(ORDER, step=4), first.clean_digest)


class EachRankItsOwn(NoiseInjector):
    def _write(self, order, chosen):
        super()._write(replace(order, seed=id(self)), chosen)


def test_failure_ranks_with_different_noise():
    """Each rank alone is valid; together they are not."""
    sound, other = NoiseInjector(make_model()), EachRankItsOwn(make_model())
    one, two = sound.apply(ORDER), other.apply(ORDER)
    check_evidence(two, ORDER, other.clean_digest)
    assert one["clean_digest"] == two["clean_digest"]
    check_equal_noise({"rollout rank 0": one, "rollout rank 1": one})
    with pytest.raises(EvidenceError, match="rollout rank 0 and actor rank 1 hold different noise at step 3"):
        check_equal_noise({"rollout rank 0": one, "actor rank 0": one, "actor rank 1": two})


def test_failure_an_actor_whose_forward_goes_another_way():
    """A compiled or replaced forward would not call the norms that hold the noise."""
    model = make_model()
    injector = NoiseInjector(model, beside=True)
    check_evidence(injector.apply(ORDER), ORDER, injector.clean_digest)
    with pytest.raises(EvidenceError, match="its forward did not use it"):
        check_used({"uses": injector.uses(), **injector.restore()}, ORDER.sigma)
    injector.apply(ORDER)
    for norm in model.modules():
        if list(norm.parameters(recurse=False)):
            norm(torch.ones(1, norm.weight.numel()))
    check_used({"uses": injector.uses(), **injector.restore()}, ORDER.sigma)


# ---------------------------------------------------------------- noise in the wrong place


class StaysOnInValidation(NoiseInjector):
    def restore(self):
        return self._evidence(None, [])


def test_failure_noise_stays_on_during_validation():
    injector = StaysOnInValidation(make_model())
    injector.apply(ORDER)
    with pytest.raises(EvidenceError, match="was not removed"):
        check_evidence(injector.restore(), None, injector.clean_digest)


class LeavesExcludedNoisy(NoiseInjector):
    def _clean_all(self, but):
        if not but:
            super()._clean_all(but)


def test_failure_noise_of_an_earlier_order_stays_on_what_is_excluded_now():
    injector = LeavesExcludedNoisy(make_model())
    injector.apply(ORDER)
    caught(injector, replace(ORDER, step=4, exclude=("layers_0.0",)), "written to the wrong weights")


class IgnoresPatterns(NoiseInjector):
    def _select(self, order):
        return super()._select(replace(order, exclude=()))


def test_failure_noise_on_what_is_excluded():
    caught(IgnoresPatterns(make_model()), replace(ORDER, exclude=("layers_0.0",)), "do not select it")


def test_failure_warm_up_with_noise_left_from_before():
    class KeepsIt(NoiseInjector):
        def _write(self, order, chosen):
            if order.sigma:
                super()._write(order, chosen)

    injector = KeepsIt(make_model())
    injector.apply(ORDER)
    caught(injector, replace(ORDER, step=9, sigma=0.0), "was not removed")


class RouterNormByName(NoiseInjector):
    """The fork's rule used names and was inverted: it skipped all norms except the router's."""

    def _routers(self):
        return set(self.names) - super()._routers()


def test_failure_noise_on_the_norm_in_front_of_a_router():
    tiny = {"vocab_size": 32, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
    config = MixtralConfig(**tiny, num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    model = MixtralModel(config)
    injector = NoiseInjector(model)
    evidence = injector.apply(replace(ORDER, unit="absolute"))
    assert not [name for name in evidence["groups"][0]["modules"] if "post_attention" in name]
    assert torch.equal(model.layers[0].post_attention_layernorm.weight, torch.ones(64))
    alone = injector.describe(ORDER)["router_norms"]
    assert alone == [f"layers.{i}.post_attention_layernorm" for i in range(2)]
    inverted = RouterNormByName(MixtralModel(config))
    caught(inverted, replace(ORDER, unit="absolute"), "is the norm of a router")


# ---------------------------------------------------------------- schedules and keys


@pytest.mark.parametrize("kind", ["exponential", "linear", "cosine", "logarithmic"])
def test_failure_sigma_end_0_broke_the_decay(kind):
    sigma = [row["sigma"] for row in SigmaSchedule(0.05, 0.0, 10, 30, kind=kind).table()]
    assert np.isfinite(sigma).all()
    assert (sigma[3], sigma[-1]) == (0.05, 0.0)
    assert all(value > 0 for value in sigma[3:27])


@pytest.mark.parametrize("stages", [1, 2])
def test_failure_one_or_two_stages_gave_no_noise_or_a_division_by_zero(stages):
    assert SigmaSchedule(0.05, 1e-5, stages, 10).sigma(9) == 0.05


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("+aqn.noise.sigma=0.05", "unknown key"),
        ("+aqn.noise.layers.scale=2", "unknown key"),
        ("aqn.noise.layers.first=2", "has no effect"),
        ("aqn.noise.layers={kind: targeted, modules: ['0'], boundary: 0.2}", "has no effect"),
    ],
)
def test_failure_unused_keys_ignored(override, says):
    with pytest.raises(ConfigError, match=says):
        load_recipe("e12", ["profile=cpu", override])


def test_failure_patterns_that_match_nothing_ignored():
    with pytest.raises(ConfigError, match="matches no module"):
        NoiseInjector(make_model()).apply(replace(ORDER, exclude=("*.post_attention_layernorm",)))


def test_failure_hidden_logs_are_not_what_tells(caplog):
    """σ and its effect are in the record of every step, whatever the log level."""
    with caplog.at_level(logging.CRITICAL):
        evidence = NoiseInjector(make_model()).apply(ORDER)
    assert evidence["sigma_measured"] == pytest.approx(0.05, rel=0.1)
    assert evidence["modules"] == 8


def test_the_noise_is_that_of_the_key_and_not_of_a_generator_s_state():
    model = make_model(1)
    clean = model["layers_0"]["0"].weight.detach().clone()
    NoiseInjector(model).apply(replace(ORDER, unit="absolute"))
    assert torch.equal(model["layers_0"]["0"].weight, clean + 0.05 * draw(0, 3, "layers_0.0", 256))
