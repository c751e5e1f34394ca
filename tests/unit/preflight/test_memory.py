"""The memory estimate: formulas against numbers computed by hand, files, and autograd's own account."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from verl_aqn.checkpoints.loading import load_model
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.config.compose import load_recipe
from verl_aqn.models import layouts as layout
from verl_aqn.models import recompute
from verl_aqn.models.attention import NAME, laid_out
from verl_aqn.models.shared_prompts import share_prompts
from verl_aqn.preflight import memory_plan as memory
from verl_aqn.preflight.device_plan import fewest, fit, plan
from verl_aqn.preflight.memory_plan import DEVICE, MicroBatch, Sizes, micro_batch, sizes
from verl_aqn.preflight.shape import Shape
from verl_aqn.preflight.sizing import shape_of
from verl_aqn.tasks.smollm2 import tiny_model

CPU = memory.cpu_costs()
EXCLUDE = ("lm_head", "embed_tokens")
QWEN_1_5B = {
    "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "hidden_size": 1536, "intermediate_size": 8960,
    "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2, "vocab_size": 151936,
    "tie_word_embeddings": True, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_MOE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "head_dim": 128,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
    "tie_word_embeddings": False, "max_position_embeddings": 40960,
}  # fmt: skip


def folder(path: Path, config: dict) -> Path:
    """A model folder that contains only its config.json."""
    (path / "config.json").write_text(json.dumps(config))
    return path


def qwen(tmp_path: Path) -> Shape:
    return shape_of(folder(tmp_path, QWEN_1_5B), EXCLUDE)


def recipe(*overrides: str, profile: str = "cuda") -> Sizes:
    return sizes(load_recipe("grpo", [f"profile={profile}", *overrides]))


@pytest.mark.parametrize(
    ("overrides", "critic"),
    [
        ([], False),
        (["algorithm.adv_estimator=gae"], True),
        (["critic.enable=true"], True),
        (["algorithm.adv_estimator=gae", "critic.enable=false"], False),
    ],
)
def test_a_critic_counts_if_verl_builds_it(overrides, critic):
    assert recipe(*overrides).critic == critic


def test_a_dense_model_s_numbers_are_those_of_its_paper(tmp_path):
    """Qwen2.5-1.5B has 1.54 B parameters, 1.31 B without the embedding, which is also the head."""
    shape = qwen(tmp_path)
    assert shape.linears == 28 * (1536 * (1536 + 2 * 256) + 1536 * 1536 + 3 * 1536 * 8960) == 1_310_195_712
    assert shape.kept == 151936 * 1536 + 57 * 1536 + 28 * (1536 + 2 * 256)  # embedding, norms, biases of q, k, v
    assert shape.adapted == 28 * ((1536 + 1536) + 2 * (1536 + 256) + (1536 + 1536) + 3 * (1536 + 8960))
    assert (shape.norms, shape.largest, shape.key_value) == (57 * 1536, 1536 * 8960, 256)


def test_a_mixture_of_experts_counts_all_experts_and_computes_with_those_of_a_token(tmp_path):
    """Qwen3-30B-A3B has 30.5 B parameters. Its experts are packed, its routers and their adapters are not."""
    shape = shape_of(folder(tmp_path, QWEN_MOE), EXCLUDE)
    experts = 128 * 3 * 2048 * 768
    attention = 2048 * (4096 + 2 * 512) + 4096 * 2048
    assert shape.linears == 48 * (experts + attention)
    assert shape.parameters == pytest.approx(30.5e9, rel=0.005)
    assert (shape.inner, shape.largest) == (8 * 768, 4096 * 2048)  # the queries' weight, not an expert's
    assert shape.adapted == 48 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))


@pytest.mark.parametrize("kept", ["model.layers.1.mlp.down_proj", "layers.1.mlp"])
@pytest.mark.parametrize("packed_already", [False, True])
def test_the_base_is_as_large_as_the_files_that_quantize_writes(tmp_path, packed_already, kept):
    source = tiny_model(tmp_path / "tiny", layers=3)
    quantize_checkpoint(source, tmp_path / "packed", exclude=(*EXCLUDE, kept))
    written = sum(spec.nbytes for spec in Weights(tmp_path / "packed").specs.values())
    exclude = EXCLUDE if packed_already else (*EXCLUDE, kept)
    shape = shape_of(tmp_path / "packed" if packed_already else source, exclude)
    assert memory.PACKED * shape.linears + memory.BF16 * shape.kept == written


def test_parts_of_an_actor_rank_by_hand(tmp_path):
    """GRPO of Qwen2.5-1.5B on 8 ranks: 128 prompts × 8 responses, 2,048 tokens each, micro-batches of 16,384."""
    shape, given = qwen(tmp_path), recipe()
    found = memory.actor(shape, given, DEVICE)
    adapter = 32 * shape.adapted
    assert found.resident == {
        "process": 1_500_000_000,
        "base": (17 * shape.linears // 32 + 2 * shape.kept) // 8,
        "adapter and Adam": 12 * adapter // 8,
    }
    update = found.phases["update"]
    assert update["gradients"] == 4 * adapter // 8
    assert update["logits"] == 4 * 151936 * 16384  # bf16 and their gradient
    token = 8 * 1536 + 2 * (2 * 1536 + 1536) + 2 * (1536 + 2 * 256) + 8 * 8960 + 14 * 32 + 4 * 12
    assert update["activations"] == 16384 * (token + 28 * 2 * 1536)  # checkpointing: one layer, and inputs of all
    layer = 17 * shape.layer_linears // 32 + 2 * shape.layer_kept + 2 * adapter // 28
    assert update["gathered"] == pytest.approx(2 * shape.root + layer + 2 * shape.largest, abs=2)
    assert found.phase == "log-probs"
    assert found.phases["log-probs"]["logits"] == 6 * 151936 * 16384


def test_logits_of_a_bare_head_do_not_grow_with_the_tokens(tmp_path):
    """On CPUs the head works in three buffers of a few tokens; the update keeps a slope [T, H] and its gradient."""
    shape = qwen(tmp_path)
    assert shape.bare_head
    given = [recipe(f"data.max_response_length={tokens}", profile="cpu") for tokens in (512, 1024)]
    buffers = 151936 * ((24 << 20) // (4 * 151936)) * (4 + 4 + 2)
    for one in given:
        found, answers = memory.actor(shape, one, CPU), micro_batch(one, one.mini_batch, one.update_tokens).answers
        assert found.phases["log-probs"]["logits"] == buffers
        assert found.phases["update"]["logits"] == buffers + 2 * 2 * answers * 1536
    capped = replace(shape, bare_head=False)
    assert all(memory.actor(capped, one, CPU).phases["log-probs"]["logits"] > 100 * buffers for one in given)
    trained = replace(given[0], rank=0)  # without an adapter, the head is trained and needs its logits
    assert memory.score_logits(shape, trained, micro_batch(trained, 1, 4096)) > 10 * buffers


def test_parts_of_a_rollout_rank_by_hand(tmp_path):
    shape, given = qwen(tmp_path), recipe("actor_rollout_ref.rollout.tensor_model_parallel_size=2")
    found = memory.rollout(shape, given, DEVICE, 3_000_000_000)
    weights = (17 * shape.linears // 32 + 2 * shape.kept) // 2
    assert found.resident["base"] == weights
    assert found.resident["adapter slots"] == 2 * 2 * 32 * shape.adapted // 2 + 2 * 32 * (151936 + 1536)
    assert found.resident["norms in fp32"] == 8 * 57 * 1536
    assert found.resident["KV cache"] == 3_000_000_000
    assert memory.cache_bytes(shape, given) == 2 * 2 * 28 * 128  # one of two heads of keys and values
    assert memory.rollout_logits(shape, given) == 22 * given.sequences * 151936


def test_heads_of_keys_are_not_halved_below_one(tmp_path):
    """Two heads on four ranks: each rank has one whole head in its cache, and the weights of it."""
    shape, given = qwen(tmp_path), recipe("actor_rollout_ref.rollout.tensor_model_parallel_size=4")
    assert memory.cache_bytes(shape, given) == 2 * 2 * 28 * 128
    twice = 2 * 28 * 1536 * (128 - 256 // 4)  # elements that another rank has too
    even = (17 * shape.linears // 32 + 2 * shape.kept) // 4
    assert memory.rollout(shape, given, DEVICE, 0).resident["base"] == pytest.approx(even + 17 * twice // 32, abs=2)


@pytest.mark.parametrize(
    ("changes", "part", "factor"),
    [
        (["aqn.mxfp4.enabled=false"], "base", 4 / (17 / 32)),  # fp32, as verl loads what it trains
        (["trainer.n_gpus_per_node=4"], "adapter and Adam", 2),
        (["actor_rollout_ref.model.lora_rank=64"], "adapter and Adam", 2),
    ],
)
def test_what_a_setting_changes(tmp_path, changes, part, factor):
    shape = replace(qwen(tmp_path), kept=0)
    before, after = (memory.actor(shape, recipe(*c), DEVICE).resident[part] for c in ([], changes))
    assert after / before == pytest.approx(factor, rel=1e-3)


def test_ppo_holds_its_critic_in_the_same_process(tmp_path):
    shape = qwen(tmp_path)
    actor, both = (memory.actor(shape, replace(recipe(), critic=critic), DEVICE) for critic in (False, True))
    assert both.resident["base"] == pytest.approx(2 * actor.resident["base"], abs=2)
    assert both.resident["adapter and Adam"] == 2 * actor.resident["adapter and Adam"]


def test_micro_batches_are_verl_s():
    given = recipe("experiment=embedded", profile="cpu")
    # 6 prompts of 128 × 8 responses of 24 tokens in one micro-batch: each prompt is stored once.
    one = 6 * 128 + 48 * 24
    assert micro_batch(given, 6, 16384) == MicroBatch(one, one, 6 * 128 + 48 * 152, 48 * 24 * 152, 48 * 24, 48 * 24)
    # Half of the tokens: 24 of the 48 responses, which may belong to any of the prompts.
    half = 6 * 128 + 24 * 24
    assert micro_batch(given, 6, 48 * 152 // 2) == MicroBatch(
        half, half, 6 * 128 + 24 * 152, 24 * 24 * 152, 24 * 24, 24 * 24
    )
    long = micro_batch(replace(given, response=256), 6, 10**6)
    assert (long.queries, long.masked) == (long.keys, 0)
    packed = replace(given, padded=False, ranks=2)
    assert micro_batch(packed, 6, 16384) == MicroBatch(24 * 152, 24 * 152, 24 * 152, 0, 24 * 24, 24 * 152)
    assert micro_batch(packed, 6, 10).forward == 152  # one sample at least


@pytest.mark.parametrize(("kind", "lean"), [("llama", False), ("qwen3", False), ("llama", True)])
def test_saved_activations_are_what_autograd_keeps(tmp_path, kind, lean, monkeypatch):
    """The actor's layers as in a run (bf16 adapters of FSDP, autocast, its layout), counted by autograd's hooks."""
    source = tiny_model(tmp_path / "tiny", layers=4, hidden=128)
    if kind == "qwen3":
        source = as_qwen3(source, tmp_path / "qwen3")
    quantize_checkpoint(source, tmp_path / "packed")
    model = load_model(tmp_path / "packed", dtype=torch.bfloat16)
    layout.use_attention(model, NAME)
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()
    monkeypatch.setattr(recompute, "WORTH", 0 if lean else 1 << 60)
    assert recompute.recompute_mlps(model) == 4
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    prompts, samples, prompt, response, kept = 2, 3, 96, 33, {}
    ids = [torch.randint(0, 1000, (prompt,)) for _ in range(prompts) for _ in range(samples)]
    ids = [ids[i - i % samples] for i in range(len(ids))]
    shared = share_prompts(ids, [torch.randint(0, 1000, (response,)) for _ in ids])

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    inputs = layout.shared_inputs(shared, keeps=True) | {"logits_to_keep": shared.column[:1]}
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),
        torch.autocast("cpu", torch.bfloat16),
        laid_out(shared),
    ):
        out = model(**inputs, use_cache=False)
    given = replace(recipe("experiment=embedded", profile="cpu"), rank=8)
    shape = shape_of(tmp_path / "packed", EXCLUDE)
    assert shape.head_norms == (kind == "qwen3")
    forward = prompts * prompt + len(ids) * (response - 1)  # the last token of a response predicts nothing
    keys = prompts * prompt + len(ids) * (prompt + response - 1)
    masked = len(ids) * (response - 1) * (prompt + response - 1)
    one = memory.saved_activations(shape, given, MicroBatch(forward, forward, keys, masked, 0, 0), lean=lean)
    assert 4 * one == pytest.approx(sum(kept.values()), rel=0.03)
    del out


LONG = ("data.max_response_length=1024", "actor_rollout_ref.model.enable_gradient_checkpointing=false")


def test_an_actor_on_a_cpu_keeps_the_inner_features_of_one_layer_where_all_would_be_much(tmp_path):
    shape, given = qwen(tmp_path), recipe(*LONG, profile="cpu")
    update = micro_batch(given, given.mini_batch, given.update_tokens)
    one = memory.saved_activations(shape, given, update)
    inner = 8 * shape.inner * update.forward
    assert 28 * inner > 1 << 30
    found = memory.actor(shape, given, CPU).phases["update"]["activations"]
    assert found == 28 * (one - inner) + inner
    few = replace(given, response=8, prompt=8)
    assert not memory.recomputes(shape, few, micro_batch(few, few.mini_batch, few.update_tokens))


@pytest.mark.parametrize(
    ("change", "experts"),
    [({"cpu": False}, 0), ({"checkpointing": True}, 0), ({}, 8)],
    ids=["device", "layers", "experts"],
)
def test_what_keeps_its_inner_features(tmp_path, change, experts):
    shape, given = replace(qwen(tmp_path), experts=experts), replace(recipe(*LONG, profile="cpu"), **change)
    assert not memory.recomputes(shape, given, micro_batch(given, given.mini_batch, given.update_tokens))


def as_qwen3(source: Path, target: Path) -> Path:
    """Return a random model of the same sizes with norms on the query and key heads."""
    from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

    sizes_of = AutoConfig.from_pretrained(source)
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
             "head_dim", "vocab_size")  # fmt: skip
    Qwen3ForCausalLM(Qwen3Config(**{name: getattr(sizes_of, name) for name in names})).bfloat16().save_pretrained(
        target
    )
    return target


def test_the_plan_takes_more_devices_where_they_are_smaller(tmp_path):
    shape = shape_of(folder(tmp_path, QWEN_MOE), EXCLUDE)
    found = plan(shape, recipe())
    assert all(not one.fault for one in found)
    assert [one.sizes.ranks for one in found] == sorted((one.sizes.ranks for one in found), reverse=True)
    assert found[0].sizes.ranks > found[-1].sizes.ranks
    for one in found:
        assert one.actor.total + one.rollout.resident["process"] <= one.size
        assert one.rollout.total <= one.sizes.utilization * one.size
        assert one.sequences >= 1


def test_micro_batches_are_halved_where_no_number_of_devices_would_do(tmp_path):
    """Logits of 16,384 tokens and 152 thousand words take 15 GB on each device, whatever the number of devices."""
    found = fewest(qwen(tmp_path), recipe(), int(16e9))
    assert not found.fault
    assert found.sizes.update_tokens < 16384
    hopeless = fewest(qwen(tmp_path), recipe(), int(4e9))
    assert "needs" in hopeless.fault or "keeps" in hopeless.fault or "no room" in hopeless.fault


def test_a_device_says_what_is_too_much(tmp_path):
    shape = qwen(tmp_path)
    assert 'in its phase "log-probs"' in fit(shape, recipe(), int(12e9)).fault
    assert "in addition to the rollout's 99%" in fit(shape, replace(recipe(), utilization=0.99), int(80e9)).fault


def test_the_machine_of_a_tiny_model_needs_less_and_ppo_more(tmp_path):
    tiny = shape_of(tiny_model(tmp_path / "tiny"), EXCLUDE)
    needs = {}
    for name in ("e12_aggressive_1ep", "ppo"):
        needs[name] = sum(memory.machine(load_recipe(name, ["profile=cpu"]), tiny, 1 << 30).values())
    assert needs["e12_aggressive_1ep"] < needs["ppo"] < 6e9
    config = load_recipe("e12_aggressive_1ep", ["profile=cpu"])
    embedded = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
        "tie_word_embeddings": True, "head_dim": 64,
    }  # fmt: skip
    shape = shape_of(folder(tmp_path, embedded), EXCLUDE)
    whole = sum(memory.machine(config, shape, 1 << 30).values())
    assert whole == pytest.approx(7.5e9, rel=0.1)  # measured: the largest sum of the proportional set sizes in a run
    separate = load_recipe("e12_aggressive_1ep", ["profile=cpu", "actor_rollout_ref.rollout.full_determinism=true"])
    assert sum(memory.machine(separate, shape, 1 << 30).values()) == pytest.approx(11.2e9, rel=0.1)  # none is forked
    critic = sum(memory.machine(load_recipe("ppo", ["profile=cpu"]), shape, 1 << 30).values())
    assert critic > whole


def test_costs_of_the_cpu_are_the_measured_ones(monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    costs = memory.cpu_costs()
    assert costs.actor > 0
    assert costs.heap == 0.25


def test_without_jemalloc_the_plan_has_the_heap_of_another_allocator(tmp_path, monkeypatch):
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    config, shape = load_recipe("grpo", ["profile=cpu"]), qwen(tmp_path)
    activations = memory.actor(shape, sizes(config), memory.cpu_costs()).phases["update"]["activations"]
    with_jemalloc = memory.machine(config, shape, 1 << 30)["actor"]
    monkeypatch.setenv("LD_PRELOAD", "/usr/lib/libtcmalloc.so")
    assert memory.cpu_costs().heap == 1.3
    more = memory.machine(config, shape, 1 << 30)["actor"] - with_jemalloc
    assert more == pytest.approx(sizes(config).ranks * 1.05 * activations, rel=1e-6)
