"""What a tensor-parallel rank holds, compared slice by slice with the checkpoint and with the adapter that was sent."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.tiny_configs import SMALL
from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.mxfp4.checkpoint import (
    check_covered,
    checkpoint_digest,
    combined_digest,
    module_digest,
    quantize_checkpoint,
)
from verl_aqn.mxfp4.model import PACKED, SCALE, open_packed, packed_modules
from verl_aqn.shards import cut, parts_of
from verl_aqn.vllm_api.readback import adapter_slices, adapter_tensors, describe_adapter

R = 4  # LoRA's rank


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "packed")
    return folder / "packed"


class Rank(nn.Module):
    """A fused and a row-parallel layer with their adapters, as vLLM has them on rank `rank` of two."""

    packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    def __init__(self, rank: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        gate, up, down = (torch.randn(*shape, generator=generator) for shape in ((96, R), (96, R), (64, R)))
        a = [torch.randn(R, k, generator=generator) for k in (64, 64, 96)]
        self.whole = dict(
            zip(("gate_proj", "up_proj", "down_proj"), zip(a, (gate, up, down), strict=True), strict=True)
        )
        self.gate_up_proj = self.layer([48, 48], 64, 64, 192, rank)
        self.gate_up_proj.lora_a_stacked = tuple(x[None, None] for x in a[:2])
        self.gate_up_proj.lora_b_stacked = tuple(x.chunk(2)[rank][None, None] for x in (gate, up))
        self.down_proj = self.layer([64], 48, 96, 64, rank)
        self.down_proj.lora_a_stacked = (a[2].chunk(2, dim=1)[rank][None, None],)
        self.down_proj.lora_b_stacked = (down[None, None],)

    @staticmethod
    def layer(widths, local, columns, rows, rank) -> nn.Module:
        layer = nn.Module()
        layer.base_layer = nn.Module()
        for name, value in {
            "output_partition_sizes": widths,
            "input_size_per_partition": local,
            "input_size": columns,
            "output_size": rows,
            "tp_rank": rank,
        }.items():
            setattr(layer.base_layer, name, value)
        return layer


def test_a_rank_says_which_parts_it_holds():
    parts = {p.name: p for r in (0, 1) for p in parts_of(Rank(r), "down_proj", Rank(r).down_proj.base_layer)}
    assert parts["down_proj"].origin == (0, 48)
    gate, up = parts_of(Rank(1), "gate_up_proj", Rank(1).gate_up_proj.base_layer)
    assert (gate.name, gate.origin, gate.shape, gate.rows) == ("gate_proj", (48, 0), (48, 64), slice(0, 48))
    assert (up.name, up.origin, up.shape, up.rows, up.whole) == ("up_proj", (48, 0), (48, 64), slice(48, 96), False)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_actor_knows_the_digest_of_the_adapter_s_parts(rank):
    model = Rank(rank)
    slices = adapter_slices(model, R)
    assert slices.keys() == {"gate_proj.B", "up_proj.B", "down_proj.A"}
    sent = {f"{name}.{kind}": t for name, pair in model.whole.items() for kind, t in zip("AB", pair, strict=True)}
    held = tensor_digest((name, tensor) for name, tensor, _ in adapter_tensors(model, R))
    assert tensor_digest((name, cut(tensor, slices.get(name))) for name, tensor in sent.items()) == held
    other = adapter_slices(Rank(1 - rank), R)
    assert tensor_digest((name, cut(tensor, other.get(name))) for name, tensor in sent.items()) != held


def test_places_without_an_adapter_are_no_part_of_it_and_a_lost_one_shows():
    """An adapter on up and down only: vLLM keeps zeros for gate, which it fuses with up."""
    model = Rank(0)
    whole, slices = describe_adapter(model, R), adapter_slices(model, R)
    for tensor in (model.gate_up_proj.lora_a_stacked[0], model.gate_up_proj.lora_b_stacked[0]):
        tensor.zero_()
    sent = {f"{n}.{kind}": t for n in ("up_proj", "down_proj") for kind, t in zip("AB", model.whole[n], strict=True)}
    held = describe_adapter(model, R)
    assert (held["modules"], whole["modules"]) == (2, 3)
    assert held["adapter_digest"] == tensor_digest((name, cut(t, slices.get(name))) for name, t in sent.items())
    model.down_proj.lora_b_stacked[0].zero_()  # as it is before the first step
    assert describe_adapter(model, R)["modules"] == 2
    model.down_proj.lora_a_stacked[0].zero_()
    assert describe_adapter(model, R)["modules"] == 1


def halves(packed, rank: int) -> tuple[dict, str]:
    """Slices of rank `rank` of two (rows of q, columns of o), and the digest of what it then loads."""
    weights, slices, loaded = open_packed(packed), {}, []
    for module in packed_modules(weights):
        codes, scale = weights.read(module + PACKED), weights.read(module + SCALE)
        if module.endswith("q_proj"):
            slices[module] = [32 * rank, 32, 0, 64]
            codes, scale = codes.chunk(2)[rank], scale.chunk(2)[rank]
        elif module.endswith("o_proj"):
            slices[module] = [0, 64, 32 * rank, 32]
            codes, scale = (x.chunk(2, dim=1)[rank].contiguous() for x in (codes, scale))
        loaded.append((module, module_digest(codes, scale)))
    return slices, combined_digest(loaded)


def test_the_checkpoint_s_slices_have_the_digest_of_what_a_rank_loads(packed):
    (first, one), (second, two) = halves(packed, 0), halves(packed, 1)
    assert checkpoint_digest(packed, first) == one
    assert checkpoint_digest(packed, second) == two
    assert len({one, two, checkpoint_digest(packed), checkpoint_digest(packed, {})}) == 3


def test_ranks_that_leave_a_part_of_the_base_out_are_caught(packed):
    (first, _), (second, _) = halves(packed, 0), halves(packed, 1)
    check_covered(packed, [first, second])
    check_covered(packed, [first, second, first, second])  # two replicas
    check_covered(packed, [{}])
    with pytest.raises(EvidenceError, match=r"do not hold the whole of model\.layers\.0\.self_attn\.o_proj"):
        check_covered(packed, [first, first])
