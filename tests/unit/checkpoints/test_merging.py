"""Base and adapter in one bf16 model: names of all architectures, unquantised bases, and weights without a place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from tests.helpers.family_models import make as make_family
from tests.helpers.tiny_configs import SMALL, SMALL_MOE
from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.loading import DenseView, dequantize_checkpoint
from verl_aqn.checkpoints.merging import check_merged, write_merged
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import dequantize

CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "qwen3 moe": Qwen3MoeConfig(**SMALL_MOE, moe_intermediate_size=32, num_experts=4, head_dim=16),
    "mixtral": MixtralConfig(**SMALL_MOE, num_local_experts=4),
}


def make(folder: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).save_pretrained(folder)
    return folder


def random_adapter(folder: Path, *kinds: str) -> Adapter:
    """Write an adapter for every linear layer whose last name is in `kinds`, under transformers' names."""
    torch.manual_seed(2)
    matrices = {}
    for name, module in AutoModelForCausalLM.from_pretrained(folder).named_modules():
        if name.rpartition(".")[2] in kinds:
            n, k = module.weight.shape
            matrices[name] = (torch.randn(8, k).bfloat16() / 8, torch.randn(n, 8).bfloat16() / 8)
    return Adapter(matrices, 8, 12)


def merge(base: Path, adapter: Adapter, folder: Path, packed: bool = True):
    folder.mkdir()
    return write_merged(folder, base, packed, adapter, max_shard_bytes=30_000)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged_equals_peft_s_own_merge_of_the_dequantised_base(name, tmp_path):
    from peft import LoraConfig, get_peft_model

    source = make(tmp_path / "source", name)
    quantize_checkpoint(source, tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    adapter = random_adapter(source, "q_proj", "o_proj")
    report = merge(tmp_path / "packed", adapter, tmp_path / "merged")
    assert (report.tensors, report.changed) == (4, 4)
    config = LoraConfig(r=8, lora_alpha=12, target_modules=["q_proj", "o_proj"])
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32), config)
    for parameter, tensor in (
        (model.get_parameter(tensor_name.replace(".weight", ".default.weight")), tensor)
        for tensor_name, tensor in adapter.tensors()
    ):
        parameter.data = tensor.float()
    theirs = model.merge_and_unload().bfloat16()
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    assert not (tmp_path / "merged/model.safetensors").exists()  # in shards
    for (name, a), (other, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other
        # The two add in a different order in places; at a tie this changes the last bit of bf16.
        assert (a != b).float().mean() < 1e-3, name
        torch.testing.assert_close(a, b, msg=name)


def test_an_unquantised_base_is_merged_from_itself_in_bf16(tmp_path):
    source = make(tmp_path / "source", dtype=torch.float32)
    adapter = random_adapter(source, "down_proj")
    merge(source, adapter, tmp_path / "merged", packed=False)
    before, after = load_file(source / "model.safetensors"), {}
    for file in (tmp_path / "merged").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name, weight in before.items():
        module = name.removesuffix(".weight")
        if module in adapter.matrices:
            weight = weight + adapter.delta(module)
        assert torch.equal(after[name], weight.bfloat16()), name


@pytest.mark.parametrize(
    ("module", "match"),
    [
        ("lm_head", "does not exist"),
        ("model.layers.0.mlp.experts", "does not exist"),
        ("model.layers.0.self_attn.q_proj", r"is \[64, 64\]"),
    ],
)
def test_what_has_no_weight_of_its_own_is_refused(module, match, tmp_path):
    quantize_checkpoint(make(tmp_path / "source"), tmp_path / "packed")
    adapter = Adapter({module: (torch.ones(8, 32).bfloat16(), torch.ones(32, 8).bfloat16())}, 8, 8)
    with pytest.raises(ModelError, match=f"{match}.*export without --merge"):
        merge(tmp_path / "packed", adapter, tmp_path / "merged")


def test_a_dense_view_is_the_packed_folder_bit_for_bit(tmp_path):
    quantize_checkpoint(make(tmp_path / "source", "qwen3 moe"), tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    packed, dense = (load_file(tmp_path / name / "model.safetensors") for name in ("packed", "dense"))
    view = DenseView(tmp_path / "packed")
    assert view.specs.keys() == dense.keys()
    found = 0
    for name, weight in dense.items():
        codes = packed.get(name.removesuffix(".weight") + ".weight_packed")
        if codes is None:
            expected = packed[name]
        else:
            found += 1
            expected = dequantize(codes, packed[name.removesuffix(".weight") + ".weight_scale"], torch.bfloat16)
        assert torch.equal(weight, expected), name
        assert torch.equal(view.read(name), expected), name
        assert view.specs[name] == (weight.dtype, tuple(weight.shape))
    assert found == 2 * (4 + 4 * 3)


def test_biases_that_choose_experts_stay_in_float32(tmp_path):
    source, name = make_family("deepseek_v3", tmp_path / "source"), "model.layers.1.mlp.gate.e_score_correction_bias"
    bias = torch.tensor([6.991, 6.994, 6.997, 7.003])
    weights = load_file(source / "model.safetensors") | {name: bias}
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    adapter = random_adapter(source, "o_proj")
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", source, False, adapter)
    assert check_merged(tmp_path / "merged", source, False, adapter) == len(weights)
    assert torch.equal(load_file(tmp_path / "merged/model.safetensors")[name], bias)
