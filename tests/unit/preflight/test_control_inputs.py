"""What closed-loop σ follows must be measured in every step: settings that leave it out are refused before any work."""

import pytest
from omegaconf import OmegaConf

from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError, EnvironmentFault
from verl_aqn.launch.train import train
from verl_aqn.preflight.control_inputs import check_control
from verl_aqn.preflight.recipe_checks import check_recipe, check_schedule

ROLLOUT = "actor_rollout_ref.rollout"
BYPASS = "algorithm.rollout_correction.bypass_mode"
CONTROL = "aqn.noise.control"


@pytest.fixture(scope="module")
def composed():
    return load_recipe("kl_control", ["profile=cpu"])


def fault(config, **settings) -> str:
    config = config.copy()
    for key, value in settings.items():
        OmegaConf.update(config, key, value)
    (found,) = check_control(config)
    return found.fix


@pytest.mark.parametrize(
    ("key", "value", "kl", "entropy"),
    [
        (BYPASS, True, f"{BYPASS}=true leaves out its figures: set it to false", True),
        (f"{ROLLOUT}.calculate_log_probs", False, f"{ROLLOUT}.calculate_log_probs=false leaves out its figures", True),
        (f"{ROLLOUT}.temperature", 0.7, "has temperature 0.7, top_p 1 and top_k -1, but vLLM scores a response", False),
        (f"{ROLLOUT}.top_p", 0.9, "has temperature 1, top_p 0.9 and top_k -1", False),
        (f"{ROLLOUT}.top_k", 20, "top_k 20, but", False),
        (f"{ROLLOUT}.n", 4, "", False),
    ],
)
def test_what_leaves_the_measurement_out_is_refused(composed, key, value, kl, entropy):
    found = fault(composed, **{key: value})
    assert kl in found
    assert bool(found) == bool(kl)
    assert bool(fault(composed, **{key: value, f"{CONTROL}.target": "entropy"})) == entropy


def test_the_schedule_alone_needs_nothing(composed):
    config = composed.copy()
    for key, value in ((BYPASS, True), ("aqn.noise.enabled", False)):
        OmegaConf.update(config, key, value)
    assert list(check_control(config)) == []
    OmegaConf.update(config, "aqn.noise.enabled", True)
    OmegaConf.update(config, CONTROL, None)
    assert list(check_control(config)) == []


def test_it_is_among_the_checks_of_a_recipe_and_stops_a_run(composed):
    found = {one.what: one for one in check_recipe(composed)}
    assert (found["target of σ"].found, found["target of σ"].fix) == ("kl of the rollout, from aqn.noise.control", "")
    assert check_schedule(composed).found.startswith("σ 0.05, then by kl of 0.1 → 0.001 nats a token, 29 steps")
    with pytest.raises(EnvironmentFault, match="vLLM scores a response again at 1, 1 and -1 alone"):
        train("kl_control", ["profile=cpu", f"{ROLLOUT}.temperature=0.7"], dry_run=True)


def test_overrides_may_fill_a_block_that_is_null_key_by_key():
    keys = {"target": "entropy", "value": "0.4", "sigma_min": "1e-5", "sigma_max": "0.1"}
    told = ["profile=cpu", "aqn.noise.kind=constant", *(f"{CONTROL}.{key}={value}" for key, value in keys.items())]
    rule = parse_aqn(load_recipe("e12", told)).noise.controller
    assert (rule.target, rule.value, rule.sigma_min, rule.sigma_max, rule.gain) == ("entropy", 0.4, 1e-5, 0.1, 0.25)
    with pytest.raises(ConfigError, match=r"unknown key aqn\.noise\.control\.gian: did you mean 'gain'"):
        load_recipe("e12", [*told, f"{CONTROL}.gian=1"])
    with pytest.raises(ConfigError, match=r"aqn\.noise\.kind=exponential has no effect with aqn\.noise\.control"):
        load_recipe("e12", [one for one in told if "kind" not in one])
    assert parse_aqn(load_recipe("kl_control", ["profile=cpu", f"{CONTROL}=null"])).noise.controller is None
