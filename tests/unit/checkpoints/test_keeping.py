"""Layers that stay in 16 bits by recipe: the worst ones, within the share, the same wherever the folder is read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.helpers.command import one_line, run
from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.cached import quantized_cache
from verl_aqn.checkpoints.calibrate import calibration_ids
from verl_aqn.checkpoints.keeping import SEQUENCES, groups_of, loss_gains, worst
from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import EXCLUDE, is_packed, quantize_checkpoint
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4 import Mxfp4Linear
from verl_aqn.preflight.prepare import prepare_model
from verl_aqn.preflight.recipe_checks import recipe_shape
from verl_aqn.tasks.smollm2 import tiny_model

BAD = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny model with one matrix that rounds badly: an outlier in each block pushes the rest below the grid."""
    folder = tiny_model(tmp_path_factory.mktemp("keep") / "tiny")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{BAD}.weight"][:, ::32] *= 40
    save_file(tensors, file, metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def packed(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("keep") / "packed"
    quantize_checkpoint(source, folder)
    return folder


def test_groups_are_the_layers_that_an_engine_fuses(packed):
    groups = groups_of(packed)
    assert [len(group.modules) for group in groups] == [3, 1, 2, 1] * 2  # q k v, o, gate up, down
    rows = json.loads((packed / "quantization.json").read_text())["modules"]
    assert [name for group in groups for name in group.modules] != []
    assert sorted(name for group in groups for name in group.modules) == sorted(row["name"] for row in rows)
    (bad,) = [group for group in groups if BAD in group.modules]
    (row,) = [row for row in rows if row["name"] == BAD]
    assert bad.sqnr_db == pytest.approx(row["sqnr_db"])
    assert bad.elements == torch.Size(row["shape"]).numel()


def test_the_worst_by_sqnr_come_first_and_the_share_is_a_limit(source, packed):
    groups = groups_of(packed)
    total = sum(group.elements for group in groups)
    order = sorted(groups, key=lambda group: group.sqnr_db)
    assert order[0].modules == (BAD,)
    size = {name: group.elements for group in groups for name in group.names[:1]}
    for share in (order[0].elements / total, 0.3, 0.6, 0.99):
        kept = worst(source, packed, share, "sqnr")
        assert kept[0] == BAD
        taken = sum(size.get(name, 0) for name in kept)
        assert taken <= share * total + 1e-6
        left = [group for group in groups if not set(group.modules) <= set(kept)]
        assert all(taken + group.elements > share * total for group in left), "room is used"
    with pytest.raises(ConfigError, match=r"keep\.worst=0\.001 keeps nothing: .* set at least"):
        worst(source, packed, 0.001, "sqnr")


def test_a_gain_is_the_loss_of_the_rounded_model_less_that_with_the_group_in_16_bits(source, packed, tmp_path):
    """Measured once more with a folder in which that group was never rounded, by transformers' own loss."""
    groups = [group for group in groups_of(packed) if "layers.1." in group.modules[0]]
    gains = loss_gains(source, packed, groups, EXCLUDE, ["embedded"])
    ids = calibration_ids(source, ["embedded"], sequences=SEQUENCES)

    def loss(folder) -> float:
        with torch.inference_mode():
            return load_model(folder)(ids, labels=ids).loss.item()

    for number, group in enumerate(groups):
        quantize_checkpoint(source, tmp_path / str(number), exclude=(*EXCLUDE, *group.names))
        assert gains[group] == pytest.approx(loss(packed) - loss(tmp_path / str(number)), abs=2e-3)
    again = loss_gains(source, packed, groups, EXCLUDE, ["embedded"])
    assert again == gains, "each group is put back to its rounded weights"


def test_by_loss_the_order_is_that_of_the_gain_for_each_weight(source, packed, monkeypatch):
    groups = groups_of(packed)
    told = {group: number * group.elements for number, group in enumerate(groups, start=1)}
    assert max(told, key=told.get) != groups[-1]  # the largest gain is not the largest for each weight
    monkeypatch.setattr("verl_aqn.checkpoints.keeping.loss_gains", lambda *_: told)
    assert worst(source, packed, 0.99, "loss")[:1] == groups[-1].modules


def test_the_cached_folder_keeps_them_and_is_another_one_than_without(source, tmp_path):
    share = 0.12  # room for one of the two
    plain = quantized_cache(source, tmp_path)
    kept = quantized_cache(source, tmp_path, keep=(share, "sqnr"))
    assert kept != plain
    assert quantized_cache(source, tmp_path, keep=(share, "sqnr")) == kept
    assert quantized_cache(source, tmp_path, keep=(0.3, "sqnr")) not in (kept, plain)
    assert BAD in json.loads((kept / "quantization.json").read_text())["left_in_16_bits"]
    model, original = load_model(kept), AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    assert not isinstance(model.get_submodule(BAD), Mxfp4Linear)
    assert torch.equal(model.get_submodule(BAD).weight, original.get_submodule(BAD).weight)
    assert isinstance(model.get_submodule(BAD.replace("layers.1", "layers.0")), Mxfp4Linear)


@pytest.mark.parametrize("calibrate", ["[]", "[embedded]"])
@pytest.mark.parametrize("rule", ["mse", "even"])
def test_a_recipe_keeps_them_with_every_way_of_rounding(source, calibrate, rule, tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path))
    options = ["profile=cpu", f"actor_rollout_ref.model.path={source}", f"aqn.mxfp4.scale_rule={rule}"]
    config = load_recipe("e12", [*options, f"aqn.mxfp4.calibrate={calibrate}", "aqn.mxfp4.keep.worst=0.2"])
    planned = recipe_shape(config)
    prepare_model(config)
    folder = config.actor_rollout_ref.model.path
    assert BAD in json.loads((tmp_path / "mxfp4" / folder / "quantization.json").read_text())["left_in_16_bits"]
    actual = recipe_shape(config)
    assert planned.linears <= actual.linears, "the plan of memory counts at least what is kept"
    assert planned.kept >= actual.kept
    assert planned.linears + planned.kept == actual.linears + actual.kept


def test_experts_of_a_layer_are_kept_together_by_sqnr_alone(tmp_path):
    torch.manual_seed(0)
    small = {key: value for key, value in SMALL.items() if key != "tie_word_embeddings"}
    moe = AutoModelForCausalLM.from_config(MixtralConfig(**small, num_local_experts=4), dtype=torch.bfloat16)
    moe.save_pretrained(tmp_path / "moe")
    quantize_checkpoint(tmp_path / "moe", tmp_path / "packed")
    groups = groups_of(tmp_path / "packed")
    experts = [group for group in groups if ".experts." in group.modules[0]]
    assert {len(group.modules) for group in experts} == {12}
    kept = worst(tmp_path / "moe", tmp_path / "packed", 0.5, "sqnr")
    quantize_checkpoint(tmp_path / "moe", tmp_path / "kept", exclude=(*EXCLUDE, *kept))
    rounded = {row["name"] for row in json.loads((tmp_path / "kept" / "quantization.json").read_text())["modules"]}
    names = {name for group in groups if set(group.names) <= set(kept) for name in group.modules}
    assert any(".experts." in name for name in names)
    assert rounded == {name for group in groups for name in group.modules} - names
    with pytest.raises(ConfigError, match=r"keep\.by=loss does not measure experts .*: set aqn\.mxfp4\.keep\.by=sqnr"):
        worst(tmp_path / "moe", tmp_path / "packed", 0.5, "loss")


def test_a_packed_model_has_nothing_to_choose(packed):
    options = ["profile=cpu", f"actor_rollout_ref.model.path={packed}", "aqn.mxfp4.keep.worst=0.1"]
    with pytest.raises(ModelError, match=r"is already MXFP4, so aqn\.mxfp4\.keep cannot choose"):
        prepare_model(load_recipe("e12", options))


@pytest.mark.parametrize("share", ["1", "-0.1", "5"])
def test_a_share_is_a_fraction(share):
    with pytest.raises(ConfigError, match=r"aqn\.mxfp4\.keep\.worst is .*: give a share"):
        load_recipe("e12", ["profile=cpu", f"aqn.mxfp4.keep.worst={share}"])


def test_the_command(source, packed, tmp_path):
    done = run("quantize", source, tmp_path / "out", "--keep-worst", "0.2", "--json")
    assert BAD in json.loads(done.stdout)["left_in_16_bits"]
    assert is_packed(tmp_path / "out")
    assert "--keep-by least is not one of sqnr, loss" in one_line(
        run("quantize", source, tmp_path / "no", "--keep-worst", "0.2", "--keep-by", "least"), 2
    )
    assert "--keep-worst 5: give a share" in one_line(run("quantize", source, tmp_path / "no", "--keep-worst", "5"), 2)
    assert "remove --exclude" in one_line(run("quantize", packed, tmp_path / "no", "--keep-worst", "0.2"), 2)
