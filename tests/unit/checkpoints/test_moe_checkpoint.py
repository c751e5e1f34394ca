"""MoE experts: packed from the hub's names and from fused stacks, loaded, dequantised, and rejected with a reason."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

from tests.helpers.digests import model_digest
from tests.helpers.tiny_configs import SMALL_MOE
from verl_aqn.checkpoints.error_report import pool_experts
from verl_aqn.checkpoints.loading import dequantize_checkpoint, load_model
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.errors import ConfigError, ModelError
from verl_aqn.mxfp4 import dequantize, fake_quantize, mxfp8, quantize
from verl_aqn.mxfp4.experts import Mxfp4Experts
from verl_aqn.mxfp4.linear import Activation

CONFIGS = {
    "qwen3": Qwen3MoeConfig(**SMALL_MOE, moe_intermediate_size=32, num_experts=4, mlp_only_layers=[1]),
    "qwen2": Qwen2MoeConfig(
        **SMALL_MOE,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=4,
        tie_word_embeddings=True,
    ),
    "mixtral": MixtralConfig(**SMALL_MOE, num_local_experts=4),
}
TOKENS = torch.arange(24).view(2, 12)


def make(folder: Path, name: str, fused: bool = False) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if fused:  # as the model's own state dict has them
        tied = set(model.all_tied_weights_keys)
        state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def logits(model, experts: str | None = None) -> torch.Tensor:
    if experts:
        model.set_experts_implementation(experts)
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", name)
    report = quantize_checkpoint(source, tmp_path / "packed")
    assert report.base_digest == checkpoint_digest(tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    model = load_model(tmp_path / "packed")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(model), logits(dense, "eager"))
    assert sum(isinstance(module, Mxfp4Experts) for module in model.modules()) == (1 if name == "qwen3" else 2)
    assert model_digest(model) == checkpoint_digest(tmp_path / "packed")

    before, after = load_file(source / "model.safetensors"), load_file(tmp_path / "packed" / "model.safetensors")
    assert all(not key.endswith("experts.gate_up_proj") for key in before)
    for module in report.modules:
        weight = before[module.name + ".weight"]
        expected = quantize(weight, "mse")
        assert torch.equal(after[module.name + ".weight_packed"], expected.packed)
        assert torch.equal(after[module.name + ".weight_scale"], expected.scale)
    experts = [module for module in report.modules if ".experts." in module.name]
    assert len(experts) == 4 * 3 * (1 if name == "qwen3" else 2)
    pooled = {module.name for module in pool_experts(report.modules)}
    assert len(pooled) == len(report.modules) - len(experts) * 3 // 4


@pytest.mark.parametrize("name", CONFIGS)
def test_fused_stacks_give_the_same_folder(name: str, tmp_path: Path) -> None:
    hub, fused = make(tmp_path / "hub", name), make(tmp_path / "fused", name, fused=True)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(fused / "model.safetensors"))
    for source in (hub, fused):
        quantize_checkpoint(source, tmp_path / "out" / source.name)
    first, second = (load_file(tmp_path / "out" / source / "model.safetensors") for source in ("hub", "fused"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_routers_are_left_alone_and_named(tmp_path: Path) -> None:
    for name, routers in (("qwen3", ["mlp.gate"]), ("qwen2", ["mlp.gate", "mlp.shared_expert_gate"])):
        quantize_checkpoint(make(tmp_path / name, name), tmp_path / f"{name}-packed")
        config = json.loads((tmp_path / f"{name}-packed" / "config.json").read_text())
        ignore = config["quantization_config"]["ignore"]
        assert {f"model.layers.0.{router}" for router in routers} <= set(ignore)
        assert "model.layers.0.self_attn.q_proj" not in ignore
        kept = load_file(tmp_path / f"{name}-packed" / "model.safetensors")
        assert all(kept[f"model.layers.0.{router}.weight"].dtype == torch.bfloat16 for router in routers)


def test_lora_beside_packed_experts(tmp_path: Path) -> None:
    quantize_checkpoint(make(tmp_path / "source", "qwen3"), tmp_path / "packed")
    model = get_peft_model(load_model(tmp_path / "packed"), LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    model.train()
    before = model_digest(model)
    assert before == checkpoint_digest(tmp_path / "packed")
    with torch.autocast("cpu", torch.bfloat16):
        model(TOKENS, labels=TOKENS).loss.backward()
    gradients = [p.grad for n, p in model.named_parameters() if "lora_B" in n]
    assert len(gradients) == 4
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    assert model_digest(model) == before


def test_gradients_through_packed_experts_equal_those_of_dense_ones(tmp_path: Path) -> None:
    quantize_checkpoint(make(tmp_path / "source", "qwen3"), tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    dense.set_experts_implementation("eager")
    packed = load_model(tmp_path / "packed", dtype=torch.float32)
    gradients = []
    for model in (dense, packed):
        model.requires_grad_(False)
        embedding = model.get_input_embeddings().weight.requires_grad_()
        model(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(embedding.grad)
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("activation", ["even/nearest", "mxfp8/floor/nearest"])
def test_experts_round_the_input_of_each_product(activation: str, tmp_path: Path) -> None:
    quantize_checkpoint(make(tmp_path / "source", "qwen3"), tmp_path / "packed")
    model = load_model(tmp_path / "packed", dtype=torch.float32)
    (experts,) = (module for module in model.modules() if isinstance(module, Mxfp4Experts))
    round_ = mxfp8.fake_quantize if "mxfp8" in activation else fake_quantize
    experts.activation = Activation.parse(activation)
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chosen = torch.tensor([0, 1, 2, 3, 0, 1])
    y = experts(x, chosen.view(6, 1), torch.ones(6, 1))
    up_weight, down_weight = (
        dequantize(getattr(experts, f"{name}_packed"), getattr(experts, f"{name}_scale"), torch.float32)
        for name in ("gate_up_proj", "down_proj")
    )
    for t, e in enumerate(chosen.tolist()):
        gate, up = (round_(x[t].detach()) @ up_weight[e].T).chunk(2)
        expected = round_(torch.nn.functional.silu(gate) * up) @ down_weight[e].T
        torch.testing.assert_close(y[t], expected)
    y.sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0


def test_excluding_experts(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen2")
    report = quantize_checkpoint(source, tmp_path / "packed", exclude=("lm_head", "model.layers.0.mlp.experts"))
    assert {m.name.split(".")[2] for m in report.modules if ".experts." in m.name} == {"1"}
    ignore = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "model.layers.0.mlp.experts.3.down_proj" in ignore
    model = load_model(tmp_path / "packed")
    assert model_digest(model) == checkpoint_digest(tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.bfloat16)
    assert torch.equal(logits(model, "eager"), logits(dense, "eager"))
    with pytest.raises(ConfigError, match=r"exclude has some experts of model\.layers\.0\.mlp\.experts .* not all"):
        quantize_checkpoint(source, tmp_path / "other", exclude=("experts.2.up_proj",))


def test_refuses_what_is_missing_or_does_not_fit(tmp_path: Path) -> None:
    source = make(tmp_path / "source", "qwen3")
    file, name = source / "model.safetensors", "model.layers.0.mlp.experts.2.up_proj.weight"
    good = load_file(file)
    for change, match in (
        ({name: good[name][:, :32].clone()}, r"experts\.2\.up_proj\.weight .* config\.json asks for \[32, 64\]"),
        ({name: torch.full_like(good[name], torch.inf)}, f"tensor {name} of .* contains NaN or Inf"),
        ({name.replace(".2.", ".4."): good[name].clone()}, r"unknown tensor .*experts\.4\.up_proj"),
    ):
        save_file(good | change, file)
        with pytest.raises(ModelError, match=match):
            quantize_checkpoint(source, tmp_path / "packed")
    save_file({key: tensor for key, tensor in good.items() if key != name}, file)
    with pytest.raises(ModelError, match=f"lacks tensor {name}"):
        quantize_checkpoint(source, tmp_path / "packed")

    save_file(good, file)
    quantize_checkpoint(source, tmp_path / "packed")
    file, name = tmp_path / "packed" / "model.safetensors", name + "_scale"
    good = load_file(file)
    save_file({key: t for key, t in good.items() if not key.startswith(name.removesuffix("_scale"))}, file)
    with pytest.raises(ModelError, match=f"lacks tensor {name.removesuffix('_scale')}"):
        load_model(tmp_path / "packed")


def test_one_expert_dequantises_to_its_codes(tmp_path: Path) -> None:
    quantize_checkpoint(make(tmp_path / "source", "mixtral"), tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    packed, dense = (load_file(tmp_path / kind / "model.safetensors") for kind in ("packed", "dense"))
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    codes = packed[name + ".weight_packed"], packed[name + ".weight_scale"]
    assert torch.equal(dense[name + ".weight"], dequantize(*codes))
