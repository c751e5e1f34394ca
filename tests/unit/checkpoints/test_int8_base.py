"""The int8 folder of a packed base: its tensors and description, what is refused, and digests of whole and of parts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints import cached
from verl_aqn.checkpoints.cached import int8_cache
from verl_aqn.checkpoints.disk_base import DiskBase, Part
from verl_aqn.checkpoints.foreign import import_checkpoint
from verl_aqn.checkpoints.int8_base import int8_digest, int8_part_digest, read_changes, write_int8
from verl_aqn.checkpoints.packing import checkpoint_digest, combined_digest, quantize_checkpoint
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.int8_change import LIMIT_BASE, LIMIT_MATRIX, Change
from verl_aqn.mxfp4.int8_rows import to_int8


def pack(root: Path, config, change=lambda model: None) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        change(model)
    model.save_pretrained(root / "source")
    quantize_checkpoint(root / "source", root / "packed")
    return root / "packed"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    return pack(tmp_path_factory.mktemp("base"), LlamaConfig(**SMALL))


def test_the_folder_has_codes_scales_offsets_and_a_description(packed, tmp_path):
    seen = []
    changes = write_int8(packed, tmp_path / "int8", lambda done, total, module: seen.append((done, total)))
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "int8", packed))
    modules = {name.removesuffix(".weight_packed") for name in theirs if name.endswith("_packed")}
    assert changes.keys() == modules
    assert seen[-1] == (len(modules), len(modules))
    description = json.loads((tmp_path / "int8" / "quant_model_description.json").read_text())
    assert (description.pop("model_quant_type"), description.pop("version")) == ("W8A16", "1.0.0")
    assert description.keys() == ours.keys()
    for module in modules:
        names = [module + end for end in (".weight", ".weight_scale", ".weight_offset")]
        codes, scale, offset = (ours.pop(name) for name in names)
        values = dequantize(theirs.pop(module + ".weight_packed"), theirs.pop(module + ".weight_scale"))
        assert torch.equal(codes.to(torch.bfloat16) * scale, values) is (changes[module].changed == 0)
        assert (codes.dtype, scale.dtype, offset.dtype) == (torch.int8, torch.bfloat16, torch.bfloat16)
        assert tuple(scale.shape) == tuple(offset.shape) == (len(codes), 1)
        assert not offset.any()
        assert {description[name] for name in names} == {"W8A16"}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and description[name] == "FLOAT" for name in ours)
    assert "quantization_config" not in json.loads((tmp_path / "int8" / "config.json").read_text())
    assert read_changes(tmp_path / "int8") == changes
    assert (tmp_path / "int8" / "quantization.json").is_file()  # how the packed base was made


def test_shards_hold_the_same_tensors(packed, tmp_path):
    write_int8(packed, tmp_path / "one")
    write_int8(packed, tmp_path / "many", max_shard_bytes=20_000)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    many = {name: tensor for file in files for name, tensor in load_file(file).items()}
    one = load_file(tmp_path / "one" / "model.safetensors")
    assert len(files) > 1
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)


def outliers(model) -> None:
    model.model.layers[1].mlp.down_proj.weight[:, 0] *= 10_000


def slight(model) -> None:
    """A block of several matrices is small enough to be rounded, but each matrix changes less than its limit."""
    for layer in model.model.layers:
        for linear in (layer.mlp.up_proj, layer.mlp.gate_proj, layer.mlp.down_proj):
            linear.weight[0, :32] *= 2.0**-4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outliers, r"layers\.1\.mlp\.down_proj would change by \d+ % in int8, more than 2 %.*=bf16"),
        (slight, r"the base would change by [\d.]+ % in int8, more than 0\.5 %: set aqn.*=bf16"),
    ],
)
def test_a_base_that_changes_too_much_is_refused_in_a_line_and_nothing_is_left(change, words, tmp_path):
    folder = pack(tmp_path, LlamaConfig(**SMALL), change)
    with pytest.raises(ModelError, match=words) as refused:
        write_int8(folder, tmp_path / "int8")
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "source"]
    with pytest.raises(ModelError, match=words):
        int8_cache(folder, tmp_path / "cache")


def test_biases_and_experts_are_refused_by_name(tmp_path):
    folder = pack(tmp_path / "a", LlamaConfig(**SMALL, attention_bias=True))
    with pytest.raises(ModelError, match=r"layers\.0\.self_attn\.k_proj of .* has a bias, which vllm-ascend's W8A16"):
        write_int8(folder, tmp_path / "int8")
    moe = Qwen3MoeConfig(**SMALL, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1)
    with pytest.raises(ModelError, match=r"experts\.0\.down_proj of .* is an expert.*for linear layers only.*=bf16"):
        write_int8(pack(tmp_path / "b", moe), tmp_path / "int8")
    with pytest.raises(ModelError, match="is not a packed MXFP4 checkpoint"):
        write_int8(tmp_path / "a" / "source", tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_a_cached_folder_is_used_again_and_checked_against_today_s_limits(packed, tmp_path, monkeypatch):
    folder = int8_cache(packed, tmp_path)
    changes = read_changes(folder)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert (int8_cache(packed, tmp_path), read_changes(folder)) == (folder, changes)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    lost = Change(100, 100, 100 * (1.1 * LIMIT_MATRIX) ** 2)
    monkeypatch.setattr(cached, "read_changes", lambda folder: {**changes, "model.layers.0.mlp.up_proj": lost})
    with pytest.raises(ModelError, match=r"up_proj would change by 2\.2 %"):
        int8_cache(packed, tmp_path)
    monkeypatch.undo()
    (folder / "int8.json").write_text(json.dumps({name: {"blocks": 1, "changed": 0} for name in changes}))
    with pytest.raises(ModelError, match=r"int8\.json"):
        int8_cache(packed, tmp_path)


def test_an_int8_folder_is_no_source_of_another_base(packed, tmp_path):
    write_int8(packed, tmp_path / "int8")
    with pytest.raises(ModelError, match=r"down_proj\.weight of .* is not MXFP4: torch\.int8"):
        import_checkpoint(tmp_path / "int8", tmp_path / "out")


# ---- digests ----


@pytest.fixture
def rows():
    packed, scale = quantize(torch.randn(12, 64, generator=torch.Generator().manual_seed(0)).bfloat16(), "mse")
    return to_int8(packed, scale)[0]


def test_the_digest_is_of_what_codes_scale_and_offset_stand_for(rows):
    codes, scale = rows
    zeros = torch.zeros(12, 1)
    digest = int8_digest(codes, scale, zeros)
    assert digest == int8_digest(codes, scale.float(), zeros.bfloat16())  # dtypes do not matter
    flip = torch.zeros_like(codes)
    flip[3, 5] = 1
    wrong = {
        "a code": (codes + flip, scale, zeros),
        "a scale": (codes, torch.cat([scale[:1] * 2, scale[1:]]), zeros),
        "a scale that is not a power of two": (codes, torch.cat([scale[:1] * 1.01, scale[1:]]), zeros),
        "an offset": (codes, scale, torch.cat([zeros[:1] + 1, zeros[1:]])),
        "an offset that rounding hides": (codes, scale, torch.cat([zeros[:1] + 1e-30, zeros[1:]])),
        "rows in another order": (codes.flip(0), scale, zeros),
        "another shape": (codes.view(24, 32), scale.repeat_interleave(2, 0), zeros.repeat_interleave(2, 0)),
    }
    digests = {name: int8_digest(*tensors) for name, tensors in wrong.items()}
    assert len({digest, *digests.values()}) == 1 + len(wrong)
    for tensors in ((codes.float(), scale, zeros), (codes, scale[:3], zeros), (codes, scale, zeros.flatten())):
        with pytest.raises(ModelError, match="are no int8 weights with a scale and an offset for each row"):
            int8_digest(*tensors)


@pytest.mark.parametrize("part", [[0, 12, 16, 48], [4, 4, 0, 64], [0, 2, 0, 64, 6, 3, 0, 64]])
def test_a_part_has_the_scales_of_its_rows(rows, part):
    """A row's scale is that of the whole row, also for a rank that holds some columns only."""
    chosen = torch.cat([torch.arange(part[i], part[i] + part[i + 1]) for i in range(0, len(part), 4)])
    codes = rows.codes[chosen, part[2] : part[2] + part[3]]
    assert int8_part_digest(rows, part) == int8_digest(codes, rows.scale[chosen], torch.zeros(len(chosen), 1))
    assert int8_part_digest(rows, part) != int8_part_digest(rows, None)


def test_the_folder_s_digests_are_made_of_the_packed_bytes(packed, tmp_path):
    changes = write_int8(packed, tmp_path / "int8")
    tensors = load_file(tmp_path / "int8" / "model.safetensors")
    digests = {
        module: int8_digest(*(tensors[module + end] for end in (".weight", ".weight_scale", ".weight_offset")))
        for module in changes
    }
    assert checkpoint_digest(packed, form="int8") == combined_digest(digests.items())
    disk = DiskBase(packed)
    found, read = disk.digests({module: [Part("int8"), Part("packed")] for module in changes})
    assert {module: found[(module, Part("int8"))] for module in changes} == digests
    assert disk.changes == changes
    assert read == len(changes)
    assert disk.digests({module: [Part("int8")] for module in changes})[1] == 0
    assert disk.changes == changes  # also where nothing was read again
    assert sum(changes.values(), Change()).error <= LIMIT_BASE
