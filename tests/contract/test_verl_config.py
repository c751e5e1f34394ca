"""Every key of verl's config has an entry in `verl_keys.yaml`, and every entry is a key of verl."""

import pytest
from omegaconf import OmegaConf

from verl_aqn.config.allowed import check_names
from verl_aqn.config.compose import compose_verl, load_recipe
from verl_aqn.config.verl_keys import leaves, rules, rules_of
from verl_aqn.errors import ConfigError
from verl_aqn.preflight.prepare import refuse_unread

RECIPE = "e12"
TREE = [key for key, _ in leaves(compose_verl())]


def test_every_key_of_verl_s_config_has_an_entry():
    assert len(TREE) > 850
    assert [key for key in TREE if not rules_of(key)] == []


def test_a_key_that_verl_adds_has_none():
    for key in ("trainer.new", "actor_rollout_ref.rollout.new", "new.block", "actor_rollout_ref.actor.fsdp_config.new"):
        assert not rules_of(key)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: f"{rule.kind} {rule.key}")
def test_every_entry_is_of_a_key_that_verl_has(rule):
    assert rule.beyond != any(rule.covers(key) for key in TREE), "verl's config has it no more, or has it now"
    assert rule.kind == "passed" or rule.reason


@pytest.fixture(scope="module")
def composed():
    config = load_recipe(RECIPE, ["profile=cpu"])
    OmegaConf.set_struct(config, False)
    return config


@pytest.mark.parametrize("rule", [rule for rule in rules() if rule.bad is not None], ids=lambda rule: rule.key)
def test_what_is_said_to_be_checked_elsewhere_is(composed, rule):
    config = composed.copy()
    OmegaConf.update(config, rule.key, rule.bad)
    with pytest.raises(ConfigError, match=rule.key.replace(".", r"\.")):
        {"config.check_names": check_names, "prepare.refuse_unread": refuse_unread}[rule.by](config)
