"""A base that is already packed: settings of rounding that it cannot follow are refused, and its record is right."""

import json

import pytest
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig

from tests.helpers.composed import recipe_with
from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.foreign import packed_names
from verl_aqn.checkpoints.packing import EXCLUDE, quantize_checkpoint
from verl_aqn.errors import ModelError
from verl_aqn.preflight.packed_source import settle_rounding
from verl_aqn.tasks.smollm2 import tiny_model

FIRST = "model.layers.0.self_attn"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same base, unpacked, packed by this project with o_proj in 16 bits, and in Quark's layout."""
    root = tmp_path_factory.mktemp("base")
    source = tiny_model(root / "tiny")
    quantize_checkpoint(source, root / "packed", "even", (*EXCLUDE, "o_proj"))
    theirs = root / "quark"
    theirs.mkdir()
    config = json.loads((root / "packed/config.json").read_text()) | {"quantization_config": {"quant_method": "quark"}}
    (theirs / "config.json").write_text(json.dumps(config))
    tensors = load_file(root / "packed/model.safetensors")
    save_file({name.replace("weight_packed", "weight"): t for name, t in tensors.items()}, theirs / "model.safetensors")
    return {"bf16": source, "packed": root / "packed", "quark": theirs}


def settled(folder, *overrides):
    """Return `aqn.mxfp4` after `settle_rounding`."""
    config = recipe_with("e12", *(f"aqn.mxfp4.{one}" for one in overrides))
    settle_rounding(config, folder)
    return config.aqn.mxfp4


@pytest.mark.parametrize("kind", ["packed", "quark"])
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("calibrate=[embedded]", "so aqn.mxfp4.calibrate cannot round it again: set calibrate=[]"),
        ("keep.worst=0.1", "so aqn.mxfp4.keep cannot choose layers: set keep.worst=0"),
        ("scale_rule=floor", "so aqn.mxfp4.scale_rule=floor cannot change its scales, whose rule is "),
        ("exclude=[q_proj,k_proj,v_proj]", f"exclude=q_proj cannot put {FIRST}.q_proj back to 16 bits: remove it"),
        ("exclude=[lm_head,self_attn]", f"exclude=self_attn cannot put {FIRST}."),
        ("exclude=[lm_head,nowhere]", "exclude has 'nowhere', which matches no module of"),
    ],
)
def test_another_rounding_is_refused(folders, kind, override, words):
    with pytest.raises(ModelError) as error:
        settled(folders[kind], override)
    assert words in str(error.value)
    assert str(folders[kind]) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["packed", "quark"])
@pytest.mark.parametrize("exclude", ["[]", "[lm_head]", "[lm_head,o_proj]", "['*.layers.0.self_attn.o_proj',norm]"])
def test_what_the_folder_keeps_in_16_bits_may_be_excluded(folders, kind, exclude):
    settled(folders[kind], f"exclude={exclude}")


def test_the_record_has_the_rule_of_the_folder(folders):
    assert settled(folders["packed"]).scale_rule == "even"
    assert settled(folders["packed"], "scale_rule=even").scale_rule == "even"
    with pytest.raises(ModelError, match="rule is even: set scale_rule=even"):
        settled(folders["packed"], "scale_rule=floor")
    with pytest.raises(ModelError, match="rule is not recorded: set scale_rule=mse"):
        settled(folders["quark"], "scale_rule=even")


def test_a_base_in_bf16_is_rounded_as_the_recipe_says(folders):
    wanted = ("scale_rule=floor", "calibrate=[embedded]", "keep.worst=0.1", "exclude=[lm_head,q_proj,k_proj,v_proj]")
    assert settled(folders["bf16"], *wanted).scale_rule == "floor"
    assert settled(folders["packed"], *wanted, "enabled=false").scale_rule == "floor", (
        "prepare_model says what is wrong"
    )


def test_experts_are_found_by_every_name(tmp_path):
    small = {key: value for key, value in SMALL.items() if key != "tie_word_embeddings"}
    AutoModelForCausalLM.from_config(MixtralConfig(**small, num_local_experts=4)).bfloat16().save_pretrained(
        tmp_path / "moe"
    )
    quantize_checkpoint(tmp_path / "moe", tmp_path / "packed")
    assert any(".experts.3." in name for name in packed_names(tmp_path / "packed"))
    for pattern in ("experts", "*.experts.*", "model.layers.0.mlp.experts", "w1"):
        with pytest.raises(ModelError, match="back to 16 bits"):
            settled(tmp_path / "packed", f"exclude=[{pattern!r}]")
    settled(tmp_path / "packed", "exclude=[gate]")
    quantize_checkpoint(tmp_path / "moe", tmp_path / "attention", exclude=(*EXCLUDE, "experts"))
    settled(tmp_path / "attention", "exclude=[experts]")
    assert OmegaConf.is_config(settled(tmp_path / "attention"))
