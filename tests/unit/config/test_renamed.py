"""Settings that have a new name: the old one works, with a warning, on the command line, in recipes and in records."""

import json

import pytest

from verl_aqn.config import renamed
from verl_aqn.config.compose import load_recipe
from verl_aqn.config.schema import parse_aqn
from verl_aqn.errors import ConfigError
from verl_aqn.runs.folder import RunFolder
from verl_aqn.runs.old_names import load_recorded
from verl_aqn.runs.stats.arms import differences, settings_of


@pytest.fixture(autouse=True)
def warned_anew():
    renamed._warn.cache_clear()


@pytest.mark.parametrize(("old", "new", "value", "read"), [
    ("aqn.mxfp4.serve", "aqn.mxfp4.rollout_weight_format", "bf16", lambda aqn: aqn.mxfp4.rollout_weight_format),
    ("aqn.mxfp4.keep_dense", "aqn.mxfp4.cache_dequantized", True, lambda aqn: aqn.mxfp4.cache_dequantized),
    ("aqn.run.patience", "aqn.run.hang_timeout_factor", 3.0, lambda aqn: aqn.run.hang_timeout_factor),
    ("aqn.parity.stop", "aqn.mismatch.stop", 2.0, lambda aqn: aqn.mismatch.stop),
])  # fmt: skip
def test_an_old_name_is_accepted_with_a_warning(tmp_path, capsys, old, new, value, read):
    text = str(value).lower()
    assert read(parse_aqn(load_recipe("e12", ["profile=cpu", f"{old}={text}"]))) == value
    warning = f"warning: {old.removesuffix('.stop')} is called {new.removesuffix('.stop')} now"
    assert warning in capsys.readouterr().err
    renamed._warn.cache_clear()
    _, block, key = old.split(".")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"defaults: [base, _self_]\naqn: {{{block}: {{{key}: {text}}}}}\n")
    config = load_recipe(str(recipe), ["profile=cpu"])
    assert read(parse_aqn(config)) == value
    assert block != "parity" or "parity" not in config.aqn
    assert warning in capsys.readouterr().err


def test_a_recorded_config_is_read_without_a_warning(capsys, tmp_path):
    block = {"mxfp4": {"serve": "packed", "keep_dense": False}, "run": {"patience": 7.0}, "parity": {"stop": 2.0}}
    (tmp_path / "config.yaml").write_text(json.dumps({"aqn": block}))
    aqn = parse_aqn(load_recorded(tmp_path / "config.yaml"))
    assert parse_aqn(RunFolder(tmp_path).block("config.yaml")) == aqn
    assert (aqn.mxfp4.rollout_weight_format, aqn.run.hang_timeout_factor, aqn.mismatch.stop) == ("packed", 7.0, 2.0)
    assert capsys.readouterr().err == ""


def test_what_was_never_a_name_is_still_refused():
    with pytest.raises(ConfigError, match=r"unknown key aqn\.mxfp4\.serv"):
        load_recipe("e12", ["profile=cpu", "aqn.mxfp4.serv=bf16"])


def test_settings_of_an_old_run_are_those_of_a_new_one_under_other_names(tmp_path):
    old = {"aqn": {"mxfp4": {"serve": "packed"}, "parity": {"stop": 2.0}}}
    new = {"aqn": {"mxfp4": {"rollout_weight_format": "packed"}, "mismatch": {"stop": 2.0}}}
    read = []
    for name, config in (("old", old), ("new", new)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
        read.append(settings_of(RunFolder(tmp_path / name).block("config.yaml")))
    assert differences(*read) == {}
