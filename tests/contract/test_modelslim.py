"""ModelSlim folders have the form that vllm-ascend 0.23.0's source reads; test_modelslim_ascend.py runs that source."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers.modelslim_folders import SCHEMES, modelslim_folders  # noqa: F401
from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.errors import ModelError


def test_description_names_every_tensor(folders) -> None:
    _, folder, packed, scheme = folders
    description = json.loads((folder / "quant_model_description.json").read_text())
    wide = {key: description.pop(key) for key in ("model_quant_type", "version", "group_size")}
    assert wide == {"model_quant_type": scheme, "version": "1.0.0", "group_size": 32}
    ours, theirs = load_file(folder / "model.safetensors"), load_file(packed / "model.safetensors")
    assert description.keys() == ours.keys()
    assert {name for name, found in description.items() if found == scheme} == {
        name.replace("weight_packed", "weight") for name in theirs if theirs[name].dtype == torch.uint8
    }
    assert set(description.values()) == {scheme, "FLOAT"}
    for name, tensor in theirs.items():
        assert torch.equal(ours[name.replace("weight_packed", "weight")], tensor)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("form", SCHEMES)
def test_inputs_must_fill_pairs_of_scales(form: str, tmp_path: Path) -> None:
    config = LlamaConfig(**SMALL)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "odd")
    with pytest.raises(ModelError, match=r"down_proj of .* has 96 inputs, but vllm-ascend needs a multiple of 64"):
        quantize_checkpoint(tmp_path / "odd", tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()
