"""Base and adapter in one packed model: what is rounded again, what stays bit for bit, and what is lost."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.unit.checkpoints.test_calibration import CONFIGS
from tests.unit.checkpoints.test_calibration import make as calibration_make
from tests.unit.checkpoints.test_merging import make, random_adapter
from verl_aqn.checkpoints import merging_packed
from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.code_descent import improve
from verl_aqn.checkpoints.loading import PACKED, SCALE, load_model, open_packed
from verl_aqn.checkpoints.merging_packed import check_merged_packed, check_packable, merged_copy, write_merged_packed
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed, quantize_checkpoint
from verl_aqn.errors import EvidenceError, ModelError
from verl_aqn.mxfp4.codec import Mxfp4Tensor, dequantize, quantize

IDS = torch.randint(1, 90, (6, 32), generator=torch.Generator().manual_seed(0))
KINDS = ("q_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("base")
    quantize_checkpoint(make(root / "dense"), root / "packed", exclude=["lm_head", "layers.1.mlp.down_proj"])
    return root / "packed"


@pytest.fixture(scope="module")
def adapter(base) -> Adapter:
    return random_adapter(base.parent / "dense", *KINDS)


def merge(base: Path, adapter: Adapter, folder: Path):
    folder.mkdir()
    with merged_copy(folder, base, adapter) as dense:
        rounding = write_merged_packed(folder, base, adapter, dense, IDS)
    assert not [path for path in folder.iterdir() if path.is_dir()], "temporary folders"
    return rounding


def test_what_cannot_be_calibrated_is_refused_before_prompts_are_answered(tmp_path):
    """gemma4 computes inputs for each layer outside of its list of layers."""
    gemma = calibration_make(tmp_path / "gemma", CONFIGS["gemma4, per-layer inputs and shared KV"])
    quantize_checkpoint(gemma, tmp_path / "packed")
    with (
        pytest.raises(ModelError, match=r"per_layer_model_projection, which is outside model\.layers: export with"),
        merged_copy(tmp_path, tmp_path / "packed", random_adapter(gemma, "q_proj", "per_layer_model_projection")),
    ):
        pytest.fail("the prompts would be answered here")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gemma", "packed"]


def test_what_the_adapter_does_not_change_is_bit_for_bit_the_base(base, adapter, tmp_path):
    rounding = merge(base, adapter, tmp_path / "out")
    assert is_packed(tmp_path / "out")
    assert not (tmp_path / "out/quantization.json").exists()
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".weight")[0] for name in differing} == set(adapter.matrices)
    report, tensors = check_merged_packed(tmp_path / "out", base, adapter, rounding.digest)
    assert (tensors, report.tensors, report.changed) == (len(before), 4, 4)
    assert report.modules["model.layers.1.mlp.down_proj"]["kept"] > 0.95  # in 16 bits
    assert 0 < rounding.output_error < 1
    assert rounding.tokens == IDS.numel()


def test_its_log_probabilities_are_nearer_to_the_adapted_model_than_those_of_the_base(base, adapter, tmp_path):
    merge(base, adapter, tmp_path / "out")
    trained = AutoModelForCausalLM.from_pretrained(base.parent / "dense", dtype=torch.float32)
    unadapted = load_model(base)
    state = {name: parameter for name, parameter in unadapted.state_dict().items() if "weight_" not in name}
    trained.load_state_dict(state, strict=False)
    weights = open_packed(base)
    for name, module in trained.named_modules():
        if name + PACKED in weights.specs:
            module.weight.data = dequantize(weights.read(name + PACKED), weights.read(name + SCALE)).float()
    others = torch.randint(1, 90, (4, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        of_base = trained(others).logits.log_softmax(-1)
        for name in adapter.matrices:
            trained.get_submodule(name).weight.data += adapter.delta(name)
        wanted = trained(others).logits.log_softmax(-1)
        found = load_model(tmp_path / "out")(others).logits.float().log_softmax(-1)
    assert (found - wanted).norm() < 0.7 * (of_base - wanted).norm()


@pytest.mark.parametrize("size", [1.0, 0.03, 0.001])
def test_no_row_is_further_from_the_adapted_output_than_the_base(size):
    """Inputs with a common mean and few directions, as those of a model; updates above, near and below a step."""
    torch.manual_seed(0)
    mix = torch.randn(64, 64) @ torch.diag(torch.logspace(0, -2, 64))
    inputs = torch.randn(500, 64) @ mix + torch.randn(64)
    moment = inputs.T @ inputs
    old = quantize(torch.randn(48, 64), "mse")
    wanted = dequantize(*old).float() + size * torch.randn(48, 4) @ torch.randn(4, 64) / 2

    def error(codes: Mxfp4Tensor) -> torch.Tensor:
        return (inputs.double() @ (wanted - dequantize(*codes).float()).double().T).square().sum(0)

    found = improve(wanted, old, moment)
    assert torch.equal(found.scale, old.scale)
    changed = (found.packed != old.packed).any(1)
    assert (error(found) <= error(old) * (1 + 1e-6)).all()
    assert (error(found)[changed] < error(old)[changed]).all()
    plain = quantize(wanted, "mse")
    assert error(found).sum() < 0.9 * torch.minimum(error(plain).sum(), error(old).sum()) or size < 0.01


def test_one_code_at_a_time_is_changed_where_it_helps_most():
    """Two equal inputs: only the sum of their weights counts, and the smallest step that fits is taken."""
    moment = torch.zeros(32, 32)
    moment[:2, :2] = 1
    old = Mxfp4Tensor(torch.zeros(1, 16, dtype=torch.uint8), torch.full((1, 1), 127, dtype=torch.uint8))
    for update, expected in ((0.4, 0.5), (-0.4, -0.5), (0.2, 0.0), (1.1, 1.0), (9.0, 9.0), (-30.0, -12.0)):
        wanted = torch.zeros(1, 32)
        wanted[0, 0] = update
        found = dequantize(*improve(wanted, old, moment)).float()
        assert found[0, :2].sum() == expected, update
        assert not found[0, 2:].any()


def test_damage_and_another_adapter_are_found(base, adapter, tmp_path):
    digest = merge(base, adapter, out := tmp_path / "out").digest
    tensors = load_file(out / "model.safetensors")
    of_adapter = r"base \+ scaling·B·A of model\.layers\.1\.mlp\.down_proj"
    for name, what in (
        ("model.layers.0.mlp.up_proj.weight_packed", "the tensor of the base"),
        ("model.layers.0.mlp.up_proj.weight_scale", "the tensor of the base"),
        ("model.layers.0.mlp.down_proj.weight_scale", "the tensor of the base"),
        ("model.layers.1.mlp.down_proj.weight", of_adapter),
        ("model.norm.weight", "the tensor of the base"),
        ("model.layers.0.mlp.down_proj.weight_packed", ""),
    ):
        damaged = tensors[name].clone()
        damaged.view(-1).view(torch.uint8)[0] ^= 1
        save_file(tensors | {name: damaged}, out / "model.safetensors")
        if ".weight_" in name:
            with pytest.raises(EvidenceError, match="but those that were made have"):
                check_merged_packed(out, base, adapter, digest)
        made = checkpoint_digest(out)  # as if it had been made so
        if what:
            with pytest.raises(EvidenceError, match=rf"{name} in the merged folder is not, bit for bit, {what}"):
                check_merged_packed(out, base, adapter, made)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    save_file(fewer, out / "model.safetensors")
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight in the merged folder is None"):
        check_merged_packed(out, base, adapter, digest)
    save_file(tensors, out / "model.safetensors")
    with pytest.raises(EvidenceError, match=r"layers\.1\.mlp\.down_proj\.weight in the merged folder is not"):
        check_merged_packed(out, base, replace(adapter, alpha=13.0), digest)


def test_another_config_is_found(base, adapter, tmp_path):
    digest = merge(base, adapter, out := tmp_path / "out").digest
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    with pytest.raises(EvidenceError, match=r"config\.json in the merged folder is not that of the base"):
        check_merged_packed(out, base, adapter, digest)


def test_later_layers_are_calibrated_on_the_outputs_of_rounded_earlier_ones(base, adapter, tmp_path, monkeypatch):
    seen: list[list[torch.Tensor]] = []

    def rounded(change: int):
        def improved(weight, codes, moment):
            seen[-1].append(moment)
            return codes._replace(packed=codes.packed ^ (change if len(seen[-1]) == 1 else 0))

        return improved

    for change in (0, 0, 0x11):
        seen.append([])
        monkeypatch.setattr(merging_packed, "improve", rounded(change))
        merge(base, adapter, tmp_path / str(len(seen)))
    first, again, other = seen
    assert all(map(torch.equal, first, again))
    assert [torch.equal(*pair) for pair in zip(first, other, strict=True)] == [True, True, False]  # q, down; next q


def test_what_cannot_be_rounded_again_is_refused_before_any_work(base, adapter, tmp_path):
    with pytest.raises(ModelError, match="is not MXFP4, so there are no 4 bits to return to: export with --merge"):
        check_packable(base.parent / "dense", adapter)
    moe = make(tmp_path / "moe", "qwen3 moe")
    quantize_checkpoint(moe, tmp_path / "packed")
    with pytest.raises(ModelError, match="has experts, which are not calibrated"):
        check_packable(tmp_path / "packed", random_adapter(moe, "q_proj"))
    check_packable(base, adapter)
