"""A tensor-parallel rank's content, compared slice by slice with the checkpoint and with the adapter that was sent."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers.tiny_configs import SMALL
from verl_aqn.checkpoints.adapter import digest_name
from verl_aqn.checkpoints.disk_base import DiskBase
from verl_aqn.checkpoints.loading import PACKED, SCALE, open_packed, packed_modules
from verl_aqn.checkpoints.packing import (
    checkpoint_digest,
    combined_digest,
    module_digest,
    quantize_checkpoint,
)
from verl_aqn.checkpoints.slices import cut, not_covered
from verl_aqn.digest import tensor_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.readback import describe_adapter, lora_buffers
from verl_aqn.integrations.vllm.trace import Trace

R = 4  # LoRA's rank


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    LlamaForCausalLM(LlamaConfig(**SMALL)).save_pretrained(folder / "plain")
    quantize_checkpoint(folder / "plain", folder / "packed")
    return folder / "packed"


class Rank(nn.Module):
    """A fused and a row-parallel layer with their adapters, as in vLLM on rank `rank` of two.

    The adapter of gate_up_proj is one tensor over both halves, of which a rank holds the halves' halves.
    """

    WHOLE = {"gate_up_proj": (64, 192), "down_proj": (96, 64)}  # noqa: RUF012

    def __init__(self, rank: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.sent = {}
        for name, (k, n) in self.WHOLE.items():
            prefix = f"base_model.model.{name}"
            self.sent[f"{prefix}.lora_A.weight"] = torch.randn(R, k, generator=generator)
            self.sent[f"{prefix}.lora_B.weight"] = torch.randn(n, R, generator=generator)
        self.gate_up_proj, self.down_proj = nn.Module(), nn.Module()
        self.gate_up_proj.lora_a_stacked = tuple(torch.zeros(1, 1, R, 64) for _ in range(2))
        self.gate_up_proj.lora_b_stacked = tuple(torch.zeros(1, 1, 48, R) for _ in range(2))
        self.down_proj.lora_a_stacked = (torch.zeros(1, 1, R, 48),)
        self.down_proj.lora_b_stacked = (torch.zeros(1, 1, 64, R),)
        with Trace() as trace:
            a, b, down_a, down_b = dict(trace.watch(self.sent.items())).values()
            for half in range(2):
                self.gate_up_proj.lora_a_stacked[half][0, 0].copy_(a)
                self.gate_up_proj.lora_b_stacked[half][0, 0].copy_(b.chunk(2)[half].chunk(2)[rank])
            self.down_proj.lora_a_stacked[0][0, 0].copy_(down_a.chunk(2, dim=1)[rank])
            self.down_proj.lora_b_stacked[0][0, 0].copy_(down_b)
        self.aqn_adapter = trace.loaded(lora_buffers(self))


@pytest.mark.parametrize("rank", [0, 1])
def test_the_actor_knows_the_digest_of_the_adapter_s_parts(rank):
    model, other = Rank(rank), describe_adapter(Rank(1 - rank))["slices"]
    actual = describe_adapter(model)
    first, second = (48, 144) if rank else (0, 96)
    assert actual["slices"]["gate_up_proj.B"] == [first, 48, 0, R, second, 48, 0, R]
    assert actual["slices"].keys() == {"gate_up_proj.B", "down_proj.A"}
    served = [(digest_name(name), tensor) for name, tensor in model.sent.items()]
    digests = [tensor_digest((n, cut(t, slices.get(n))) for n, t in served) for slices in (actual["slices"], other)]
    assert actual["adapter_digest"] == digests[0] != digests[1]
    assert not_covered([actual["slices"], other], actual["sizes"].__getitem__) is None
    assert "down_proj.A" in not_covered([actual["slices"]] * 2, actual["sizes"].__getitem__)


def test_a_lost_copied_wrong_or_foreign_adapter_shows():
    model = Rank(0)
    whole = describe_adapter(model)["adapter_digest"]
    model.down_proj.lora_b_stacked[0].zero_()
    assert describe_adapter(model)["adapter_digest"] != whole
    model.gate_up_proj.lora_a_stacked[1][0, 0, 0, 0] += 1  # one of the two copies of A
    with pytest.raises(EvidenceError, match="held twice"):
        describe_adapter(model)
    model = Rank(0)
    model.other = nn.Module()
    model.other.lora_b_stacked = torch.zeros(1, 1, 8, R)
    assert describe_adapter(model)["adapter_digest"] == whole  # a module without an adapter is not included
    model.other.lora_b_stacked[0, 0, 0] = 1
    with pytest.raises(EvidenceError, match=r"other\.lora_b_stacked\.0 that were not sent"):
        describe_adapter(model)
    del model.other, model.aqn_adapter.pieces["base_model.model.down_proj.lora_B.weight"]
    with pytest.raises(EvidenceError, match="no place for the adapter of down_proj"):
        describe_adapter(model)


def halves(packed, rank: int) -> tuple[dict, str]:
    """Return the slices of rank `rank` of two (rows of q, columns of o), and the digest of what it then loads."""
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
    elements = DiskBase(packed).elements.__getitem__
    assert not_covered([first, second], elements) is None
    assert not_covered([first, second, first, second], elements) is None  # two replicas
    assert not_covered([{}], elements) is None
    assert not_covered([first, first], elements).startswith("model.layers.0.self_attn.o_proj")
