"""Folders of many families: packed under their own names, loaded, and equal to what transformers computes."""

import json
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from tests.helpers.digests import model_digest
from tests.helpers.family_models import FAMILIES, REFUSED, make
from tests.helpers.tiny_configs import SMALL_MOE
from verl_aqn.checkpoints.actual_base import actual_base
from verl_aqn.checkpoints.loading import PACKED, dequantize_checkpoint, load_dense, load_model
from verl_aqn.checkpoints.naming import Naming
from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
from verl_aqn.checkpoints.packing_plan import ROUTERS, matches
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import quantize
from verl_aqn.mxfp4.codec import dequantize
from verl_aqn.mxfp4.linear import Mxfp4Linear
from verl_aqn.preflight.sizing import shape_of
from verl_aqn.preflight.text_part import use_text_alone

TOKENS = torch.arange(3, 27).view(2, 12)
WORKING = [name for name in FAMILIES if name not in REFUSED]


@pytest.fixture(scope="module", params=WORKING)
def family(request, tmp_path_factory) -> Path:
    """A folder with the family's source, and the packed and dequantised folders that quantize makes of it."""
    root = tmp_path_factory.mktemp(request.param)
    make(request.param, root / "source")
    quantize_checkpoint(root / "source", root / "packed")
    dequantize_checkpoint(root / "packed", root / "dense")
    return root


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def logits(model) -> torch.Tensor:
    model.set_experts_implementation("eager")
    with torch.no_grad():
        return model(TOKENS).logits.float()


def rounded(weight: torch.Tensor) -> torch.Tensor:
    return dequantize(*quantize(weight.contiguous(), "mse"))


def test_values_and_names_are_the_sources(family: Path) -> None:
    source, packed, dense = (tensors(family / kind) for kind in ("source", "packed", "dense"))
    assert dense.keys() == source.keys()
    modules = {name.removesuffix(PACKED) for name in packed if name.endswith(PACKED)}
    assert modules
    for name, weight in source.items():
        if name.removesuffix(".weight") not in modules:
            assert torch.equal(dense[name], weight), name
        elif weight.dim() == 3:  # gpt-oss: transposed
            assert torch.equal(dense[name], rounded(weight.transpose(1, 2)).transpose(1, 2)), name
        else:
            assert torch.equal(dense[name], rounded(weight)), name


def test_loaded_model_computes_with_the_rounded_weights(family: Path) -> None:
    model = load_model(family / "packed", torch.float32, attn_implementation="eager")
    dense = load_dense(family / "dense", torch.float32, attn_implementation="eager")
    assert model_digest(model) == checkpoint_digest(family / "packed")
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(logits(model), logits(dense), **close)
    gradients = []
    for each in (model, dense):
        each.requires_grad_(False)
        embedding = each.get_input_embeddings().weight.requires_grad_()
        each(TOKENS, labels=TOKENS).loss.backward()
        gradients.append(embedding.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, **close)


def test_source_loads_as_transformers_loads_it(family: Path) -> None:
    """Loaded by our names; a multimodal folder is compared with the whole model on text only."""
    config = AutoConfig.from_pretrained(family / "source")
    auto = AutoModelForCausalLM if config.get_text_config() is config else AutoModelForImageTextToText
    theirs = auto.from_pretrained(family / "source", dtype=torch.float32, attn_implementation="eager").eval()
    ours = load_dense(family / "source", torch.float32, attn_implementation="eager")
    assert ours.config.get_text_config() is ours.config
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


def test_names_go_back_and_forth(family: Path) -> None:
    naming = Naming.of_folder(family / "packed")
    again = Naming.of_folder(family / "source")
    model = load_model(family / "packed")
    packed = tensors(family / "packed")
    for name, _ in model.named_parameters():
        if not name.endswith(("_packed", "_scale")):
            assert naming.in_checkpoint(name) in packed, name
            assert again.in_checkpoint(name) == naming.in_checkpoint(name)
            assert model.checkpoint_names.in_checkpoint(name) == naming.in_checkpoint(name)
    modules = {name.removesuffix(PACKED) for name in packed if name.endswith(PACKED)}
    for name, module in model.named_modules():
        if isinstance(module, Mxfp4Linear):
            assert naming.in_checkpoint(name) in modules
            sent = naming.adapter_name(f"base_model.model.{name}.lora_A.weight")
            assert sent == f"base_model.model.{naming.in_checkpoint(name)}.lora_A.weight"


def test_what_vllm_leaves_unquantised_is_named(family: Path) -> None:
    ignore = json.loads((family / "packed/config.json").read_text())["quantization_config"]["ignore"]
    packed = tensors(family / "packed")
    for name, tensor in packed.items():
        router = any(matches(name.removesuffix(".weight"), pattern) for pattern in ROUTERS)
        if name.endswith(".weight") and (router or "vision" in name or "visual" in name) and tensor.dim() > 1:
            assert name.removesuffix(".weight") in ignore
    assert not {name.removesuffix(PACKED) for name in packed if name.endswith(PACKED)} & set(ignore)


def test_shape_for_the_memory_plan(family: Path) -> None:
    packed = tensors(family / "packed")
    shape = shape_of(family / "source", ("lm_head", "embed_tokens"))
    assert shape.linears == sum(2 * codes.numel() for name, codes in packed.items() if name.endswith(PACKED))
    assert shape.hidden == 64


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_in_one_line_before_any_work(name: str, tmp_path: Path) -> None:
    source = make(name, tmp_path / "source")
    for refuse in (
        lambda: quantize_checkpoint(source, tmp_path / "packed"),
        lambda: load_dense(source),
        lambda: shape_of(source, ()),
    ):
        with pytest.raises(
            ModelError, match=r"no causal language model for the text part.*start from a text-only"
        ) as e:
            refuse()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", ["gemma3_vl", "nemotron_h", "mixtral"])
def test_folder_under_transformers_own_names(name: str, tmp_path: Path) -> None:
    """Names that ``save_pretrained`` would change back are packed under the hub's names."""
    hub, own = make(name, tmp_path / "hub"), make(name, tmp_path / "own")
    model = AutoModelForCausalLM.from_pretrained(own, dtype=torch.bfloat16)
    tied = set(model.all_tied_weights_keys)
    state = {key: tensor for key, tensor in model.state_dict().items() if key not in tied}
    save_file(state, own / "model.safetensors", {"format": "pt"})
    for folder in (hub, own):
        quantize_checkpoint(folder, tmp_path / "packed" / folder.name)
    first, second = (tensors(tmp_path / "packed" / folder) for folder in ("hub", "own"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj"])
def test_excluded_by_the_models_name_or_the_folders(name: str, tmp_path: Path) -> None:
    source = make("gemma3_vl", tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "packed", exclude=("lm_head", name, name.replace("up_", "gate_")))
    assert "language_model.model.layers.1.mlp.up_proj.weight" in tensors(tmp_path / "packed")


def test_excluded_experts_of_gpt_oss_stay_in_bf16(tmp_path: Path) -> None:
    source = make("gpt_oss", tmp_path / "source")
    report = quantize_checkpoint(source, tmp_path / "packed", exclude=("lm_head", "experts"))
    assert {module.name.rpartition(".")[2] for module in report.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(tensors(tmp_path / "packed")[name], tensors(source)[name])
    assert logits(load_model(tmp_path / "packed", attn_implementation="eager")).isfinite().all()


def test_experts_without_a_gate_are_refused_unless_excluded(tmp_path: Path) -> None:
    from transformers import NemotronHConfig

    config = NemotronHConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        hybrid_override_pattern="E*",
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        n_group=1,
        topk_group=1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"NemotronHExperts cannot be packed \(they have no gate\): exclude it"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed", exclude=("lm_head", "experts"))
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    model = load_model(tmp_path / "packed", torch.float32, attn_implementation="eager")
    dense = load_dense(tmp_path / "dense", torch.float32, attn_implementation="eager")
    torch.testing.assert_close(logits(model), logits(dense), atol=1e-4, rtol=1e-4)


def test_experts_in_an_unknown_layout_are_refused_unless_excluded(tmp_path: Path) -> None:
    from transformers import GraniteMoeConfig

    torch.manual_seed(0)
    config = GraniteMoeConfig(**SMALL_MOE, num_local_experts=4)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    with pytest.raises(ModelError, match=r"GraniteMoeParallelExperts\) .* exclude model\.layers\.0\.block_sparse_moe$"):
        quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    report = quantize_checkpoint(tmp_path / "source", tmp_path / "packed", exclude=("lm_head", "block_sparse_moe"))
    assert {module.name.rpartition(".")[2] for module in report.modules} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    ignore = json.loads((tmp_path / "packed/config.json").read_text())["quantization_config"]["ignore"]
    assert {"model.layers.0.block_sparse_moe.router.layer", r"re:model\.layers\.1\.block_sparse_moe\..*"} <= set(ignore)
    assert logits(load_model(tmp_path / "packed")).isfinite().all()


def test_verl_and_vllm_are_told_to_leave_images_alone(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    source = make("gemma3_vl", tmp_path / "source")
    (source / "preprocessor_config.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"processor_class": "Gemma3Processor", "eos_token": "e"}')
    block = {"model": {"tokenizer_path": None}, "rollout": {"engine_kwargs": {"vllm": {}}}}
    config = OmegaConf.create({"actor_rollout_ref": block})
    use_text_alone(config, source)
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.language_model_only
    folder = Path(config.actor_rollout_ref.model.tokenizer_path)
    assert {file.name for file in folder.iterdir()} >= {"config.json", "tokenizer_config.json"}
    assert not (folder / "preprocessor_config.json").exists()
    assert AutoConfig.from_pretrained(folder).model_type == "gemma3_text"
    assert json.loads((folder / "tokenizer_config.json").read_text()) == {"eos_token": "e"}
    again = OmegaConf.create({"actor_rollout_ref": block})
    use_text_alone(again, source)
    assert again == config
    text = OmegaConf.create({"actor_rollout_ref": block})
    use_text_alone(text, make("llama_tied", tmp_path / "text"))
    assert text.actor_rollout_ref == block


@pytest.mark.parametrize(("tied", "fits"), [(True, False), (False, True)])
def test_stored_head_that_differs(tied: bool, fits: bool, tmp_path: Path) -> None:
    source = make("llama_untied", tmp_path / "source")
    quantize_checkpoint(source, tmp_path / "packed")
    file = tmp_path / "packed/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": tied}))
    if fits:
        model = load_model(tmp_path / "packed")
        assert torch.equal(model.get_output_embeddings().weight, tensors(source)["lm_head.weight"])
        assert not torch.equal(model.get_output_embeddings().weight, model.get_input_embeddings().weight)
    else:
        with pytest.raises(ModelError, match=r"ties lm_head\.weight to .*stores different values"):
            load_model(tmp_path / "packed")


def test_biases_that_choose_experts_stay_in_float32(tmp_path: Path) -> None:
    source, name = make("deepseek_v3", tmp_path / "source"), "model.layers.1.mlp.gate.e_score_correction_bias"
    weights = tensors(source)
    bias = torch.tensor([6.991, 6.994, 6.997, 7.003])  # near 7 the spacing of bfloat16 is 0.03: all would be 7
    save_file(weights | {name: bias}, source / "model.safetensors", {"format": "pt"})
    quantize_checkpoint(source, tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    for folder in ("packed", "dense"):
        assert torch.equal(tensors(tmp_path / folder)[name], bias)
    model = load_model(tmp_path / "packed")
    assert torch.equal(model.get_buffer(name), bias)
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    assert torch.equal(load_dense(source).get_buffer(name), bias)


def test_a_bias_that_is_a_parameter_is_not_cast_by_fsdp2(tmp_path: Path) -> None:
    from transformers import AfmoeConfig

    sizes = SMALL_MOE | {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_dense_layers": 1}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AfmoeConfig(**sizes), dtype=torch.bfloat16).save_pretrained(tmp_path / "source")
    name, bias = "model.layers.1.mlp.expert_bias", torch.tensor([6.991, 6.994, 6.997, 7.003])
    weights = tensors(tmp_path / "source") | {name: bias}
    save_file(weights, tmp_path / "source/model.safetensors", {"format": "pt"})
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    model, elsewhere = load_model(tmp_path / "packed"), load_model(tmp_path / "packed", device="meta")
    assert torch.equal(dict(model.named_buffers())[name], bias)
    assert name not in dict(model.named_parameters())
    assert dict(elsewhere.named_buffers())[name].dtype == torch.float32
    assert logits(model).isfinite().all()
    held = actual_base(model.requires_grad_(False), tmp_path / "packed")
    assert not held.faults
    assert held.tensors[name][1] == "float32"
