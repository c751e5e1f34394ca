"""Disk, actor and rollout compared tensor by tensor: what differs, what is rounded, and what is left out and why."""

import copy
import os

import pytest
import torch
from torch import nn

from tests.helpers.base_answers import actor_of, loaded, record_of, records, rollout_of
from tests.helpers.family_models import FAMILIES, make
from verl_aqn.checkpoints.disk_base import DiskBase, Part
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.checkpoints.slices import NOTHING
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.verl.base_evidence import TABLES, table_digest, with_tables
from verl_aqn.runs.judge.base_record import check_base, sentence


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """glm4 has norms, biases, an embedding and a head besides its linear layers; packed folder and source."""
    root = tmp_path_factory.mktemp("base")
    make("glm4", root / "source")
    quantize_checkpoint(root / "source", root / "packed")
    return root


@pytest.mark.parametrize("kind", ["packed", "source"])
def test_every_tensor_is_compared_and_the_sentence_says_what(folders, kind):
    folder = folders / kind
    actor, rollout = actor_of(loaded(folder), folder), rollout_of(folder)
    made = records(folder)
    start = record_of(folder, [actor], [rollout], made=made)
    check_base(start, None)
    matrices = "12 packed matrices" if kind == "packed" else "12 16-bit matrices"
    assert sentence(start).startswith(
        f"base equal on disk, in the actor and in the rollout: {matrices}, 9 norms, 1 embedding, 1 head, 6 biases"
    )
    assert "not compared" not in sentence(start)
    assert sum(start["expected"].values()) == 29 == start["files"]["tensors"]
    end = record_of(folder, [actor], [rollout], "end", made)
    check_base(end, start)
    assert (end["files"]["read"], end["files"]["tensors"]) == ("at the start", 0)
    (file,) = folder.glob("*.safetensors")
    os.utime(file)
    assert record_of(folder, [actor], [rollout], "end", made)["files"]["read"] == "now"
    with pytest.raises(EvidenceError, match="no record of the base from the start"):
        check_base(end, None)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.embed_tokens.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("kind", ["packed", "source"])
def test_one_value_of_the_actor_is_caught(folders, kind, name):
    folder = folders / kind
    model = loaded(folder)
    with torch.no_grad():
        model.get_parameter(name).view(-1)[3] += 1
    record = record_of(folder, [actor_of(model, folder)], [rollout_of(folder)])
    with pytest.raises(EvidenceError, match=f"at the start: {name} in actor differs from the folder"):
        check_base(record, None)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj"])
def test_one_digest_of_one_rank_of_the_rollout_is_caught(folders, name):
    folder = folders / "packed"
    right, wrong = rollout_of(folder), rollout_of(folder)
    wrong["tensors"][name][0] = "0" * 64
    record = record_of(folder, [actor_of(loaded(folder), folder)], [right, wrong])
    with pytest.raises(EvidenceError, match=f"{name} in rollout 1"):
        check_base(record, None)


def test_what_one_side_lacks_is_no_reason_to_leave_it_out(folders):
    folder = folders / "packed"
    actor, rollout = actor_of(loaded(folder), folder), rollout_of(folder)
    name = "model.layers.1.input_layernorm.weight"
    for side, one in (("rollout", rollout), ("actor", actor)):
        without = copy.deepcopy(one)
        del without["tensors"][name]
        record = record_of(folder, [actor if side == "rollout" else without], [rollout if side == "actor" else without])
        with pytest.raises(EvidenceError, match=f"{name} in {side} .* does not"):
            check_base(record, None)
    for one in (actor, rollout):  # neither computes with it: reported, but not an error
        del one["tensors"][name]
    record = record_of(folder, [actor], [rollout])
    check_base(record, None)
    assert f"not compared: 1 norm in the actor ({name}: neither" in sentence(record)
    assert "8 norms" in sentence(record)


def test_a_trained_or_foreign_parameter_of_the_actor_is_named(folders):
    folder = folders / "packed"
    model = loaded(folder)
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight is trained"):
        check_base(record_of(folder, [actor_of(model, folder)], [rollout_of(folder)]), None)
    model.model.norm.weight.requires_grad_(False)
    model.model.norm.extra = nn.Parameter(torch.ones(3), requires_grad=False)
    with pytest.raises(EvidenceError, match=r"model\.norm\.extra has no tensor in the folder"):
        check_base(record_of(folder, [actor_of(model, folder)], [rollout_of(folder)]), None)


def test_a_dequantised_copy_that_the_actor_computes_with_is_compared_with_its_codes(folders):
    folder = folders / "packed"
    model = loaded(folder)
    layer = model.model.layers[1].self_attn.o_proj
    layer.cache_dequantized = True
    layer(torch.ones(1, 64, dtype=torch.bfloat16))
    check_base(record_of(folder, [actor_of(model, folder)], [rollout_of(folder)]), None)
    layer._dense[3, 3] += 1
    with pytest.raises(EvidenceError, match=r"layers\.1\.self_attn\.o_proj\.weight in actor .* than its codes"):
        check_base(record_of(folder, [actor_of(model, folder)], [rollout_of(folder)]), None)


def test_a_tensor_in_another_form_than_the_folder_s_and_faults_of_other_ranks_are_named(folders):
    folder = folders / "source"
    packed = loaded(folders / "packed")
    rollout = rollout_of(folder)
    foreign = actor_of(packed, folders / "packed") | {"activations": []}
    with pytest.raises(EvidenceError, match=r"q_proj in actor .* does not have this tensor"):
        check_base(record_of(folder, [foreign], [rollout]), None)
    rollout["tensors"]["model.norm.weight"][1] = "packed"
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight in rollout 0 .* does not have this tensor as packed"):
        check_base(record_of(folder, [actor_of(loaded(folder), folder)], [rollout]), None)
    actor = actor_of(loaded(folder), folder)
    second = actor | {"faults": ["model.norm.weight is trained"]}
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight in actor rank 1"):
        check_base(record_of(folder, [actor, second], [rollout_of(folder)] * 2), None)


def test_tensor_parallel_ranks_hold_parts_and_together_all(folders):
    folder = folders / "packed"
    rows, columns = (96, 64)
    halves = [
        {
            "model.embed_tokens.weight": [48 * rank, 48, 0, columns],
            "model.layers.0.self_attn.q_proj": [32 * rank, 32, 0, columns],
            "model.layers.0.self_attn.q_proj.bias": [32 * rank, 32, 0, 1],
        }
        for rank in range(2)
    ]
    actor = [actor_of(loaded(folder), folder)] * 2
    made = records(folder)
    record = record_of(folder, actor, [rollout_of(folder, slices) for slices in halves], made=made)
    check_base(record, None)
    assert record["files"]["tensors"] == 29  # each was read once for all parts
    again = record_of(folder, actor, [rollout_of(folder, halves[0])] * 2, made=made)
    with pytest.raises(EvidenceError, match=r"do not hold all of model\.(embed_tokens|layers\.0)"):
        check_base(again, None)
    swapped = [rollout_of(folder, slices) for slices in halves]
    for one, other in zip(swapped, halves[::-1], strict=True):
        one["tensors"]["model.embed_tokens.weight"][3] = other["model.embed_tokens.weight"]
    with pytest.raises(EvidenceError, match=r"embed_tokens\.weight in rollout 0"):
        check_base(record_of(folder, actor, swapped, made=made), None)
    assert rows == DiskBase(folder).weights.specs["model.embed_tokens.weight"].shape[0]


def test_experts_of_other_ranks_are_counted_as_theirs(tmp_path):
    make("qwen3_moe", tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    folder = tmp_path / "packed"
    experts = [name for name in DiskBase(folder).groups if ".experts." in name]
    slices_of = [{n: NOTHING for n in experts if (int(n.split(".")[5]) < 2) == bool(rank)} for rank in range(2)]
    actor = [actor_of(loaded(folder), folder)]
    record = record_of(folder, actor, [rollout_of(folder, slices) for slices in slices_of])
    check_base(record, None)
    packed = record["holders"]["rollout 0"]["packed"]
    assert (packed["tensors"], packed["elsewhere"]) == (20, 12)
    assert record["expected"]["routers"] == 2
    with pytest.raises(EvidenceError, match=r"experts\.2"):
        check_base(record_of(folder, actor, [rollout_of(folder, slices_of[0])] * 2), None)


def test_rounding_to_the_served_dtype_is_done_on_disk_s_side_and_on_record(tmp_path):
    torch.manual_seed(0)
    model = FAMILIES["llama_untied"]()  # float32
    model.model.norm.weight.data += 1e-3 * torch.rand(64)
    model.save_pretrained(tmp_path / "source")
    folder = tmp_path / "source"
    rollout = rollout_of(folder)
    disk = DiskBase(folder)
    parts = {name: Part("bfloat16") for name in disk.groups}
    digests, _ = disk.digests({name: [part] for name, part in parts.items()})
    for name, part in parts.items():
        rollout["tensors"][name] = [digests[(name, part)], "bfloat16", True, None]
    record = record_of(folder, [actor_of(loaded(folder), folder)], [rollout])
    check_base(record, None)
    assert record["converted"]["rollout 0"] == {"float32 → bfloat16": 21}
    assert "after rounding to the dtype" in sentence(record)
    exact = copy.deepcopy(rollout)  # says bfloat16, holds what is on disk
    name = "model.norm.weight"
    exact["tensors"][name][0] = disk.digests({name: [Part("float32")]})[0][(name, Part("float32"))]
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight in rollout 0"):
        check_base(record_of(folder, [actor_of(loaded(folder), folder)], [exact]), None)


def test_what_vllm_computes_on_loading_is_named_and_never_a_norm(tmp_path):
    make("falcon_h1", tmp_path / "source")
    folder = tmp_path / "source"
    actor, rollout = [actor_of(loaded(folder), folder)], rollout_of(folder)
    name = "model.layers.0.mamba.A_log"
    rollout["tensors"][name][0] = "0" * 64
    with pytest.raises(EvidenceError, match=f"{name} in rollout 0"):
        check_base(record_of(folder, actor, [rollout]), None)
    rollout["computed"][name] = "exp, neg"
    record = record_of(folder, actor, [rollout])
    check_base(record, None)
    assert f"1 other tensor in the rollout ({name}: vLLM computes another tensor from it: exp, neg)" in sentence(record)
    name = "model.final_layernorm.weight"
    rollout["tensors"][name][0], rollout["computed"][name] = "0" * 64, "add"
    with pytest.raises(EvidenceError, match=f"{name} in rollout 0"):
        check_base(record_of(folder, actor, [rollout]), None)
    rollout = rollout_of(folder)
    del rollout["tensors"][name]
    rollout["lost"][name] = "aten.sum"
    with pytest.raises(EvidenceError, match=f"{name} in the rollout was not compared"):
        check_base(record_of(folder, actor, [rollout]), None)


def test_a_tied_head_that_the_folder_holds_is_the_embedding(tmp_path):
    from safetensors.torch import load_file, save_file

    make("llama_tied", tmp_path / "source")
    folder = tmp_path / "source"
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    rollout = rollout_of(folder)
    del rollout["tensors"]["lm_head.weight"]
    record = record_of(folder, [actor_of(loaded(folder), folder)], [rollout])
    check_base(record, None)
    assert "1 head in the actor (lm_head.weight: tied to model.embed_tokens.weight)" in sentence(record)


def test_the_parts_of_a_multimodal_folder_that_are_no_text_are_named(tmp_path):
    make("gemma3_vl", tmp_path / "source")
    folder = tmp_path / "source"
    record = record_of(folder, [actor_of(loaded(folder), folder)], [rollout_of(folder)])
    check_base(record, None)
    left = [one for one in record["not_compared"] if one["side"] == "actor"]
    assert {one["code"] for one in left} == {"other part"}
    assert sum(one["tensors"] for one in left) == 34
    assert not [one for one in record["not_compared"] if one["side"] == "rollout"]


def test_tables_are_asked_for_once_and_are_those_that_were_told(folders):
    folder = folders / "packed"
    halves = [{"model.layers.0.self_attn.q_proj": [32 * rank, 32, 0, 64]} for rank in range(2)]
    whole = [rollout_of(folder, slices) for slices in halves]
    tables = [{key: answer[key] for key in TABLES} for answer in whole]
    told = [
        {key: value for key, value in answer.items() if key not in TABLES} | {"told": table_digest(one)}
        for answer, one in zip(whole, tables, strict=True)
    ]
    replicas = []
    rollout = with_tables([told] * 3, lambda replica: replicas.append(replica) or tables)
    assert replicas == [0]
    assert [answer["tensors"] for answer in rollout] == [one["tensors"] for one in tables] * 3
    actor = [actor_of(loaded(folder), folder)]
    record = record_of(folder, actor, rollout)
    check_base(record, None)
    assert {**record, "seconds": 0} == {**record_of(folder, actor, whole * 3), "seconds": 0}
    with pytest.raises(EvidenceError, match="rank 0 of replica 0 reported other tensors when it was asked again"):
        with_tables([told] * 3, lambda replica: tables[::-1])
    changed = copy.deepcopy(tables)
    changed[1]["tensors"]["model.norm.weight"][0] = "0" * 64
    with pytest.raises(EvidenceError, match="rank 1 of replica 0"):
        with_tables([told], lambda replica: changed)
    other = [told[0], told[1] | {"told": table_digest(changed[1])}]  # the second replica's second rank
    rollout = with_tables([told, other], lambda replica: changed if replica else tables)
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight in rollout 3"):
        check_base(record_of(folder, actor, rollout), None)
    rollout = with_tables([told, other, other], lambda replica: changed if replica else tables)
    with pytest.raises(EvidenceError, match=r"model\.norm\.weight in rollout 3 .* \(and 1 more ranks\)"):
        check_base(record_of(folder, actor, rollout), None)
