"""Adapters from outside: the served adapter gives PEFT's outputs; anything beyond plain LoRA is rejected by name."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, VeraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2MoeConfig
from vllm.lora.peft_helper import PEFTHelper

from tests.helpers.outside_adapters import PATTERNS, SERVED, built, sent, write_adapter
from tests.helpers.tiny_configs import SMALL, SMALL_MOE
from verl_aqn.checkpoints.adapter import Adapter
from verl_aqn.checkpoints.loading import dequantize_checkpoint
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.config.compose import load_recipe
from verl_aqn.errors import AqnError, ConfigError, DataError, ModelError
from verl_aqn.evaluation.evaluate import find_target, settings
from verl_aqn.preflight import recipe_checks as checks
from verl_aqn.preflight.adapter_folder import check_new_adapter, read_folder, take_adapter
from verl_aqn.preflight.prepare import prepare_model, refuse_adapter_settings, warnings_of

TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A packed model; next to it `dense`, its bf16 equivalent, and `untied`, which has a separate head."""
    root = tmp_path_factory.mktemp("base")
    for name, tied in (("source", True), ("untied", False)):
        torch.manual_seed(0)
        config = LlamaConfig(**SMALL, tie_word_embeddings=tied)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(root / name)
    quantize_checkpoint(root / "source", root / "packed")
    dequantize_checkpoint(root / "packed", root / "dense")
    return root / "packed"


@cache
def composed() -> DictConfig:
    return load_recipe("e6a", ["profile=cpu"])


def recipe(base: Path, adapter: Path | None, *overrides: str) -> DictConfig:
    """A recipe that starts with the adapter, on the base as it is."""
    config = composed().copy()
    model = config.actor_rollout_ref.model
    model.path, model.lora_adapter_path = str(base), str(adapter) if adapter else None
    config.aqn.mxfp4.enabled = False
    config.merge_with_dotlist(list(overrides))
    return config


def peft_model(base: Path, folder: Path) -> PeftModel:
    """The adapter in PEFT on the base's bf16 equivalent, all in float32."""
    model = AutoModelForCausalLM.from_pretrained(base.parent / "dense", dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(folder)).eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize(
    ("kind", "dtype"), [("plain", torch.float32), ("patterns", torch.float16), ("rslora with patterns", torch.bfloat16)]
)
def test_every_module_has_peft_s_rank_and_scaling(base, tmp_path, kind, dtype):
    folder = write_adapter(tmp_path / "adapter", base.parent / "source", dtype, **SERVED[kind])
    adapter = read_folder(folder, base)
    assert {t.dtype for pair in adapter.matrices.values() for t in pair} == {torch.bfloat16}
    layers = {n.removeprefix("base_model.model."): m for n, m in peft_model(base, folder).named_modules()
              if isinstance(m, LoraLayer)}  # fmt: skip
    assert layers.keys() == adapter.matrices.keys()
    for name, layer in layers.items():
        found = len(adapter.matrices[name][0]), adapter.scaling_of(name)
        assert found == (layer.r["default"], layer.scaling["default"]), name


@pytest.mark.parametrize("kind", SERVED)
def test_what_is_sent_to_the_rollout_answers_as_peft_does(base, tmp_path, kind):
    """Tensors and config that the engine sends, loaded in PEFT and with vLLM's rule for scalings."""
    folder = write_adapter(tmp_path / "adapter", base.parent / "source", **SERVED[kind])
    adapter = read_folder(folder, base)
    engine = built(base, folder, adapter.widest)
    tensors, config = sent(engine)
    assert engine.sent_adapters == (adapter.digest(),)
    assert engine.sent_bytes == sum(tensor.nbytes for tensor in tensors.values())
    # vLLM uses one rank and one scaling for all modules, whatever the folder says.
    helper = PEFTHelper.from_dict(config)
    assert (helper.r, helper.vllm_lora_scaling_factor) == (adapter.widest, 1.0)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {adapter.widest}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "adapter_model.safetensors")
    modules = [n.split(".lora_")[0].removeprefix("base_model.model.") for n in tensors]
    LoraConfig(r=helper.r, lora_alpha=helper.lora_alpha, target_modules=modules).save_pretrained(tmp_path)
    original = peft_model(base, folder)
    expected, found = logits(original), logits(peft_model(base, tmp_path))
    with original.disable_adapter():
        effect = (logits(original) - expected).norm()
    assert (found - expected).norm() < 0.02 * effect  # of bf16's 8 bits


def test_the_actor_multiplies_as_peft_does_and_drops_nothing(base, tmp_path):
    """This holds in training, too: dropout from the folder would make the update differ from what was sampled."""
    folder = write_adapter(tmp_path / "adapter", base.parent / "source", **SERVED["dropout"], **PATTERNS)
    engine = built(base, folder, 8)
    engine.module.train()
    assert torch.equal(logits(engine.module), logits(engine.module.eval()))
    assert {p.dtype for p in engine.module.parameters() if p.requires_grad} == {torch.float32}
    expected = logits(peft_model(base, folder))
    with engine.disable_adapter():
        effect = (logits(engine.module).float() - expected).norm()
    assert (logits(engine.module).float() - expected).norm() < 0.05 * effect  # the whole actor is in bf16


def test_one_rank_and_one_alpha_say_the_same(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base.parent / "source", **PATTERNS, use_rslora=True)
    adapter = read_folder(folder, base)
    uniform = adapter.uniform()
    assert (uniform.rank, uniform.alpha, uniform.rslora, uniform.rank_pattern) == (8, 8, False, {})
    assert uniform.digest() == adapter.digest()
    assert uniform.uniform() is uniform
    for module in adapter.matrices:
        torch.testing.assert_close(uniform.delta(module), adapter.delta(module), rtol=0.02, atol=0.01)
    assert len({adapter.scaling_of(module) for module in adapter.matrices}) > 3


def test_plain_digests_are_those_of_earlier_versions():
    """The digest is over α/r·B in bf16 under the modules' names, so that old runs stay comparable."""
    torch.manual_seed(0)
    a, b = torch.randn(6, 64).bfloat16(), torch.randn(25, 6).bfloat16()
    assert Adapter({"m.q_proj": (a, b)}, 6, 7).digest().startswith("462d3860bebabdcff76d0d34")


# ---- rejected ----

REFUSED = {
    "dora": ({"use_dora": True}, "use_dora=true is not plain LoRA"),
    "bias": ({"bias": "lora_only"}, 'bias="lora_only" is not plain LoRA'),
    "lora bias": ({"lora_bias": True}, "lora_bias=true"),
    "saved modules": ({"modules_to_save": ["norm"]}, "modules_to_save="),
    "tokens": ({"trainable_token_indices": [1, 2]}, "trainable_token_indices="),
    "embedding": ({"target_modules": ["embed_tokens", "q_proj"]}, r"changes model.embed_tokens \(Embedding\)"),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, r"changes lm_head \(Linear\)"),
    "parameters": ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, "target_parameters="),
    "activated": ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens="),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base weights"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora' changes the base weights"),
    "wide": ({"r": 513, "target_modules": ["q_proj"], "layers_to_transform": [0]}, "has rank 513: vLLM serves"),
    "classifier": ({"task_type": "FEATURE_EXTRACTION"}, "task_type=FEATURE_EXTRACTION: give an adapter for"),
}  # fmt: skip
OTHERS = {
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "PROMPT_TUNING": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    "VERA": VeraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=4),
}


def refuse(match: str, folder: Path, base: Path, error: type[AqnError] = ModelError) -> None:
    """Return the one-line error of `prepare_model` (train, its dry run, eval) and doctor."""
    config = recipe(base, folder)
    with pytest.raises(error, match=match) as said:
        take_adapter(config, base)
    assert "\n" not in str(said.value)
    assert str(folder) in str(said.value)
    (finding,) = checks.check_adapter(config)
    assert finding.fix == str(said.value)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_more_than_plain_lora_is_refused_by_name(base, tmp_path, kind):
    more, match = REFUSED[kind]
    refuse(match, write_adapter(tmp_path / "adapter", base.parent / "untied", **more), base.parent / "untied")


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_adapters_are_refused(base, tmp_path, kind):
    model = AutoModelForCausalLM.from_pretrained(base.parent / "source", dtype=torch.bfloat16)
    get_peft_model(model, OTHERS[kind]).save_pretrained(tmp_path)
    refuse(f"is a {kind} adapter, but the rollout serves only LoRA: merge it", tmp_path, base)


@pytest.fixture(scope="module")
def written(base) -> Path:
    return write_adapter(base.parent / "adapter", base.parent / "source")


@pytest.fixture
def folder(written, tmp_path) -> Path:
    return shutil.copytree(written, tmp_path / "adapter")


def edit(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    told = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in told.items() if value != "gone"}))


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"r": "gone", "lora_alpha": "gone"}, DataError, "lacks r, lora_alpha"),
        ({"peft_type": "gone"}, DataError, "lacks peft_type"),
        ({"lora_alpha": 0}, DataError, "lora_alpha=0 in adapter_config.json is not a number above 0"),
        ({"alpha_pattern": {"q_proj": "8"}}, DataError, r"alpha_pattern\.q_proj='8'"),
        ({"r": 4.5}, DataError, r"r=4\.5 in adapter_config.json is not a whole number above 0"),
        ({"r": 8}, ModelError, "does not fit .* PEFT says: .*size mismatch"),
        ({"rank_pattern": {"q_proj": 3}}, ModelError, "does not fit .* PEFT says: .*size mismatch"),
        ({"target_modules": ["q_proj"]}, ModelError, "the model has no module for .* and 22 more"),
        ({"target_modules": ["query"]}, ModelError, "PEFT says: Target modules .*query.* not found"),
        ({"use_qalora": True}, ModelError, "use_qalora=true"),
        ({"use_bdlora": {"nblocks": 2}}, ModelError, "use_bdlora="),
        ({"layer_replication": [[0, 2], [0, 2]]}, ModelError, "layer_replication="),
        ({"use_newlora": {"x": 1}, "peft_version": "99.1"}, ModelError, "PEFT 99.1 with use_newlora={'x': 1}"),
    ],
)  # fmt: skip
def test_an_entry_that_changes_the_answers_is_refused(base, folder, changes, error, match):
    edit(folder, **changes)
    refuse(match, folder, base, error)


def test_what_other_tools_write_beside_it_is_no_fault(base, folder):
    before = read_folder(folder, base).digest()
    edit(folder, unsloth_fixed=True, use_newlora=None, peft_version="gone")
    assert read_folder(folder, base).digest() == before


def change(folder: Path, edit) -> None:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("what", "error", "match"),
    [
        (lambda t: t.pop(NAME + "B.weight"), ModelError, "lacks .*layers.0.self_attn.q_proj.lora_B"),
        (lambda t: t.update({NAME + "magnitude_vector": torch.ones(64)}), ModelError, "no module for .*magnitude"),
        (lambda t: t[NAME + "A.weight"].fill_(torch.nan), DataError, "q_proj.lora_A.weight contains NaN or infinity"),
        (lambda t: t.update({NAME + "A.weight": torch.ones(4, 64).to(torch.float8_e4m3fn)}), ModelError, "is F8_E4M3"),
        (lambda t: [t[NAME + k + ".weight"].zero_() for k in "AB"], ModelError, "A and B of .*q_proj are zero"),
        (
            lambda t: [t.update({n.replace("model.model.", "model.language_model.model."): t.pop(n)}) for n in list(t)],
            ModelError,
            "no module for base_model.language_model.model",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(base, folder, what, error, match):
    change(folder, what)
    refuse(match, folder, base, error)


def test_an_adapter_of_another_model_is_refused(base, folder, tmp_path):
    for name, more in (("wide", {"intermediate_size": 128}), ("deep", {"num_hidden_layers": 3})):
        LlamaConfig(**SMALL | more).save_pretrained(tmp_path / name)
    refuse("size mismatch", folder, tmp_path / "wide")
    # With last names as target_modules, PEFT looks for an adapter in the third layer, too.
    edit(folder, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    refuse("lacks model.layers.2.mlp.down_proj", folder, tmp_path / "deep")


def test_a_folder_that_is_none_or_damaged_is_refused_and_nothing_is_unpickled(base, folder, tmp_path):
    refuse("adapter folder .* does not exist", tmp_path / "nowhere", base, DataError)
    (tmp_path / "empty").mkdir()
    refuse("cannot read adapter_config.json", tmp_path / "empty", base, DataError)
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    refuse("is damaged", folder, base, DataError)
    weights.rename(folder / "adapter_model.bin")
    refuse("no other format is read: convert it", folder, base, DataError)
    (folder / "adapter_model.bin").unlink()
    refuse("verl-aqn export", folder, base, DataError)


def test_beside_experts_only_attention_may_be_changed(tmp_path, monkeypatch):
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    config = Qwen2MoeConfig(
        **SMALL_MOE, moe_intermediate_size=32, shared_expert_intermediate_size=64, num_experts=4
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "moe")
    for name, targets in (("attention", ["q_proj"]), ("gate", ["q_proj", "shared_expert_gate"])):
        write_adapter(tmp_path / name, tmp_path / "moe", target_modules=targets)
        config = recipe(tmp_path / "moe", tmp_path / name)
        if name == "gate":
            with pytest.raises(
                ConfigError, match="changes shared_expert_gate: in a MoE model only attention can have adapters"
            ):
                prepare_model(config)
        else:
            prepare_model(config)
            assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.lora_target_modules == ["q_proj"]


# ---- changes to the recipe ----


def test_rank_alpha_and_layers_of_a_recipe_are_the_adapter_s(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VERL_AQN_CACHE", str(tmp_path / "cache"))
    write_adapter(tmp_path / "adapter", base.parent / "source", **PATTERNS, lora_alpha=16)
    config = recipe(base, Path("adapter"), "aqn.mxfp4.enabled=true")
    prepare_model(config)
    model = config.actor_rollout_ref.model
    assert (model.lora_rank, model.lora_alpha, model.lora_adapter_path) == (8, 16, str(tmp_path / "adapter"))
    assert model.target_modules == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
    found = settings(find_target(base.parent / "dense"), ["profile=cpu"], Path("adapter"), "mxfp4")
    assert found.actor_rollout_ref.model.lora_adapter_path == str(tmp_path / "adapter")
    (finding,) = checks.check_adapter(config)
    assert not finding.fix


@pytest.mark.parametrize(
    ("override", "match"),
    [
        ("lora.rank=64", r"model\.lora\.rank=64 is for Megatron, .*: set actor_rollout_ref.model.lora_rank, .* to 0"),
        ("lora.alpha=64", r"set actor_rollout_ref\.model\.lora_alpha, and reset this key to 32"),
        ("lora.type=dora", r"model\.lora\.type=dora is for Megatron, .*: reset it to lora"),
        ("lora.dropout=0.1", r"model\.lora\.dropout=0\.1 is for Megatron"),
        ("lora.adapter_path=/x", "set actor_rollout_ref.model.lora_adapter_path"),
        ("lora_alpha=0", r"model\.lora_alpha=0 is not a number above 0"),
        ("lora_alpha=x", r"model\.lora_alpha=x is not a number above 0"),
    ],
)
def test_settings_of_adapters_that_contradict_are_refused(override, match):
    config = recipe(Path("x"), None, f"actor_rollout_ref.model.{override}")
    with pytest.raises(ConfigError, match=match):
        refuse_adapter_settings(config)
    (finding,) = checks.check_adapter(config)
    assert finding.fix


def test_one_rank_said_twice_is_one_rank():
    refuse_adapter_settings(recipe(Path("x"), None, "actor_rollout_ref.model.lora.rank=32"))
    with pytest.raises(ConfigError, match=r"critic\.model\.lora_adapter_path"):
        refuse_adapter_settings(recipe(Path("x"), None, "critic.model.lora_adapter_path=x"))


@pytest.mark.parametrize(
    ("targets", "match"),
    [
        ("[q_proj,lm_head]", r"target_modules changes lm_head \(Linear\): .* below the head: leave it out"),
        ("[q_proj,embed_tokens]", r"target_modules changes model\.embed_tokens \(Embedding\)"),
        ("[query]", r"target_modules=\['query'\] does not fit .*: Target modules"),
        ("[q_proj,down_proj]", None),
        (".*_proj", None),
    ],
)
def test_a_new_adapter_where_the_rollout_has_no_place_for_one_is_refused(base, targets, match):
    config = recipe(base.parent / "untied", None, f"actor_rollout_ref.model.target_modules={targets}")
    if match is None:
        check_new_adapter(config, base)
        assert not list(checks.check_adapter(config))
    else:
        with pytest.raises(ModelError, match=match) as said:
            check_new_adapter(config, base.parent / "untied")
        (finding,) = checks.check_adapter(config)
        assert finding.fix == str(said.value)


def test_a_kl_against_the_bare_base_is_said(base):
    kl = "actor_rollout_ref.actor.use_kl_loss=true"
    assert "without lora_adapter_path" in warnings_of(recipe(base, Path("x"), kl))[0]
    assert not warnings_of(recipe(base, None, kl))
    assert not warnings_of(recipe(base, Path("x")))
