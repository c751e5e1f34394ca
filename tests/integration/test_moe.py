"""Real runs of a tiny mixture of experts: on one rank, and with experts distributed over the rollout's ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PretrainedConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL_MOE
from tests.integration.conftest import finish, lines, newest
from verl_aqn.checkpoints import checksums
from verl_aqn.checkpoints.packing import checkpoint_digest, is_packed

SHORT = ["trainer.total_training_steps=2", "aqn.noise.num_stages=2", "trainer.save_freq=-1"]  # σ 0, then σ_start
UNTESTED = ["trainer.val_before_train=false", "trainer.test_freq=-1"]
SHARED_OUT = [
    "trainer.n_gpus_per_node=2",
    "actor_rollout_ref.rollout.tensor_model_parallel_size=2",
    "actor_rollout_ref.rollout.expert_parallel_size=2",
]
ROUTER_NORMS = [f"model.layers.{layer}.post_attention_layernorm" for layer in range(2)]


def tiny_moe(dense: Path, folder: Path, kind: type[PretrainedConfig], **sizes: int) -> Path:
    """A random MoE model with tokenizer and vocabulary of `dense`. vLLM's attention needs heads of 32."""
    known = json.loads((dense / "config.json").read_text())
    told = {key: known[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**SMALL_MOE | told | heads | sizes), dtype=torch.bfloat16)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:  # as `tiny_model`: activations of unit size, and a head that prefers some tokens
            torch.nn.init.normal_(weight, std=(3 if name == "lm_head.weight" else 1) / 8)
    model.save_pretrained(folder)
    for file in (*dense.glob("token*"), *dense.glob("*.jinja")):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def qwen(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("moe") / "qwen3"
    made = tiny_moe(tiny_model, folder, Qwen3MoeConfig, moe_intermediate_size=64, num_experts=4)
    return f"actor_rollout_ref.model.path={made}"


@pytest.fixture(scope="module")
def mixtral(tiny_model, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("moe") / "mixtral"
    made = tiny_moe(tiny_model, folder, MixtralConfig, intermediate_size=64, num_local_experts=4)
    return f"actor_rollout_ref.model.path={made}"


def assert_trained(run: Path) -> None:
    """Check that trainer and rollout agree without noise, and that the adapters get gradients."""
    first, second = (step["metrics"] for step in lines(run / "metrics.jsonl", "step"))
    assert first["training/rollout_actor_probs_pearson_corr"] > 0.98
    assert second["actor/grad_norm"] > 0


def test_a_moe_trains_with_its_experts_read_back_and_no_noise_before_its_routers(train, qwen, tmp_path):
    run, err = finish(train(tmp_path, qwen, *SHORT), tmp_path)
    assert "MXFP4 (mse) base (in bf16 in the rollout)" in err
    model = yaml.safe_load((run / "config.yaml").read_text())["actor_rollout_ref"]["model"]
    packed, served = Path(model["path"]), Path(model["override_config"]["served_path"])
    assert (is_packed(packed), is_packed(served)) == (True, False)
    for record in lines(run / "evidence.jsonl", "base"):
        (rollout,) = record["rollout"]
        assert {record["disk"], *record["actor"]} == {checkpoint_digest(packed)}
        assert rollout["base_digest"] == record["served"] == checkpoint_digest(packed, form="bf16")
        # In each of two layers qkv, o and the experts: four, each of three matrices.
        assert (rollout["form"], rollout["layers"], rollout["experts"]) == ("bf16", 6, 24)
        assert rollout["weights_digest"]
    adapters = lines(run / "evidence.jsonl", "adapter")
    assert [record["actual"][0]["adapter_digest"] for record in adapters] == [record["sent"] for record in adapters]
    assert {record["actual"][0]["modules"] for record in adapters} == {8}  # attention's
    assert len({record["sent"] for record in adapters}) == 3
    _, noise = lines(run / "evidence.jsonl", "noise")
    noisy = [name for group in noise["groups"] for name in group["modules"]]
    assert (noise["sigma_target"], noise["changed_outside"], noise["router_norms"]) == (0.05, 0, ROUTER_NORMS)
    assert len(noisy) == noise["modules"] == 7  # with those of queries and keys
    assert not set(noisy) & set(ROUTER_NORMS)
    assert_trained(run)


def test_experts_are_shared_out_among_ranks_that_each_tell_of_theirs(train, mixtral, tmp_path):
    """Two actor ranks, which have the rollout's noise, too, and two rollout ranks with two of four experts each."""
    in_actor = "aqn.noise.apply_to=rollout+actor"
    run, _ = finish(train(tmp_path, mixtral, *SHORT, *UNTESTED, *SHARED_OUT, in_actor), tmp_path)
    packed = Path(yaml.safe_load((run / "config.yaml").read_text())["actor_rollout_ref"]["model"]["path"])
    for record in lines(run / "evidence.jsonl", "base"):
        assert {record["disk"], *record["actor"]} == {checkpoint_digest(packed)}
        assert len(record["rollout"]) == 2
        for rank, answer in enumerate(record["rollout"]):
            here = record["holders"][f"rollout {rank}"]["packed"]
            assert answer["base_digest"] == here["disk"]
            # Of each of two layers the matrices of two experts are the other rank's, and halves of q, k, v and o.
            assert (answer["experts"], here["elsewhere"], answer["sliced"]["matrices"]) == (12, 12, 12 + 8)
        assert len({answer["base_digest"] for answer in record["rollout"]}) == 2
    noise = [one for one in lines(run / "evidence.jsonl", "noise") if one["sigma_target"]]
    actor = [one for one in lines(run / "evidence.jsonl", "actor noise") if one["sigma_target"]]
    assert [one["ranks"] for one in noise + actor] == [[0, 1], [0, 1]]
    assert len({one["weights_digest"] for one in noise + actor}) == 1
    assert noise[0]["router_norms"] == actor[0]["router_norms"] == ROUTER_NORMS
    assert_trained(run)


def test_one_weight_of_one_expert_on_one_rank_stops_the_run(train, mixtral, tmp_path):
    process = train(tmp_path, mixtral, *SHORT, *UNTESTED, *SHARED_OUT, "--dry-run")
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err
    model = yaml.safe_load(out)["actor_rollout_ref"]["model"]
    served = Path(model["override_config"]["served_path"])
    (file,) = served.glob("*.safetensors")
    weights = load_file(file)
    weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"][5, 7] += 1
    save_file(weights, file, {"format": "pt"})
    (served / checksums.FILE).unlink()  # otherwise the folder is rejected before anything starts
    try:
        process = train(tmp_path, mixtral, *SHORT, *UNTESTED, *SHARED_OUT)
        _, err = process.communicate(timeout=800)
    finally:
        shutil.rmtree(served)  # of a cache that other tests use
    run = newest(tmp_path)
    assert process.returncode == 1
    name = "model.layers.1.block_sparse_moe.experts.3.w2"
    assert f"at the start: {name} in rollout 1 differs from the folder" in " ".join(err.split())
    assert "Traceback" not in err
    (record,) = lines(run / "evidence.jsonl", "base")
    holders = [record["holders"][f"rollout {rank}"]["packed"] for rank in range(2)]
    assert [one["actual"] == one["disk"] for one in holders] == [True, False]  # the expert is on the second rank
    assert [answer["base_digest"] == one["disk"] for answer, one in zip(record["rollout"], holders, strict=True)] == [
        True, False,
    ]  # fmt: skip
    assert not lines(run / "metrics.jsonl", "step")
