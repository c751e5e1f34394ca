"""Read-back of int8 layers as vllm-ascend holds them: fused, on ranks with parts, and after they were transposed."""

import pytest
import torch
from torch import nn

from verl_aqn.checkpoints.int8_base import int8_part_digest, with_offset
from verl_aqn.checkpoints.packing import combined_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.observe import keep
from verl_aqn.integrations.vllm.readback import describe_base
from verl_aqn.integrations.vllm.tensor_digests import describe_tensors
from verl_aqn.integrations.vllm.trace import Trace
from verl_aqn.mxfp4 import quantize
from verl_aqn.mxfp4.int8_rows import Int8Rows, to_int8

NAMES = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
ENDS = ("weight", "weight_scale", "weight_offset")
WHOLE = (slice(None), slice(None))


@pytest.fixture
def parts() -> list[Int8Rows]:
    torch.manual_seed(0)
    return [to_int8(*quantize(torch.randn(n, 64).bfloat16(), "mse"))[0] for n in (8, 4, 4)]


def frozen(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def loaded(parts, cut=WHOLE, scales=None, leave=(), transpose=True) -> nn.Module:
    """Return a model whose fused layer holds the rows and columns `cut` of each part, as a rank of vllm-ascend.

    `scales`: other rows, for scales and offsets. `leave`: names of tensors that are not loaded.
    """
    layer, model = nn.Module(), nn.Module()
    model.attn = nn.ModuleDict({"qkv_proj": layer})
    layer.quant_method = type("AscendW8A16LinearMethod", (), {})()
    rows, columns = cut
    tensors = {
        f"{name}.{end}": tensor.clone()
        for name, part in zip(NAMES, parts, strict=True)
        for end, tensor in zip(ENDS, with_offset(part), strict=True)
    }
    taken = {
        name: (rows, columns) if name.endswith(".weight") else (rows if scales is None else scales, slice(None))
        for name in tensors
    }
    for end in ENDS:
        held = [tensor[taken[name]] for name, tensor in tensors.items() if name.endswith(f".{end}")]
        setattr(layer, end, frozen(torch.zeros_like(torch.cat(held))))
    with Trace() as trace:
        begin = dict.fromkeys(ENDS, 0)
        for name, tensor in trace.watch(tensors.items()):
            piece, end = tensor[taken[name]], name.rpartition(".")[2]
            if name not in leave:
                getattr(layer, end).data.narrow(0, begin[end], len(piece)).copy_(piece)
            begin[end] += len(piece)
    keep(model, trace)
    if transpose:  # as process_weights_after_loading
        layer.weight.data = layer.weight.data.t().contiguous()
        layer.weight_scale.data = layer.weight_scale.data.flatten()
        layer.weight_offset.data = layer.weight_offset.data.flatten()
    return model


def digest(parts, part=None) -> str:
    return combined_digest((name, int8_part_digest(one, part)) for name, one in zip(NAMES, parts, strict=True))


def test_a_fused_layer_is_read_under_the_checkpoint_s_names(parts):
    model = loaded(parts)
    said = describe_base(model, NAMES)
    assert (said["form"], said["base_digest"], said["slices"]) == ("int8", digest(parts), {})
    assert (said["layers"], said["weights_equal_base"], said["activations"]) == (1, True, ["none"])
    told = describe_tensors(model, NAMES)
    assert {name: one[1:] for name, one in told["tensors"].items()} == {n: ["int8", False, None] for n in NAMES}
    assert told["kernel_digest"] is None


@pytest.mark.parametrize(
    ("cut", "part"),
    [((slice(2, 4), slice(None)), [2, 2, 0, 64]), ((slice(None), slice(32, 64)), None)],
    ids=["rows", "columns"],
)
def test_a_rank_with_a_part_has_the_scales_of_the_whole_rows(parts, cut, part):
    said = describe_base(loaded(parts, cut), NAMES)
    of = [part or [0, len(one.codes), 32, 32] for one in parts]
    assert said["slices"] == dict(zip(NAMES, of, strict=True))
    wanted = ((n, int8_part_digest(one, p)) for n, one, p in zip(NAMES, parts, of, strict=True))
    assert said["base_digest"] == combined_digest(wanted)
    assert said["weights_equal_base"] is True


@pytest.mark.parametrize("end", ENDS)
def test_every_value_that_the_layer_computes_with_is_read(parts, end):
    model = loaded(parts)
    layer = model.attn["qkv_proj"]
    before = describe_base(model, NAMES)
    flat = getattr(layer, end).data.view(-1)
    flat[7] += 1
    after = describe_base(model, NAMES)
    assert after["weights_equal_base"] is False
    assert after["base_digest"] == before["base_digest"]  # of what was loaded
    flat[7] -= 1
    assert describe_base(model, NAMES) == before


def test_a_weight_in_another_layout_dtype_or_place_is_not_confirmed(parts):
    square = [Int8Rows(torch.cat([one.codes] * (64 // len(one.codes))), one.scale.repeat(64 // len(one.codes), 1))
              for one in parts]  # fmt: skip
    for given in (parts, square):
        assert describe_base(loaded(given, transpose=False), NAMES)["weights_equal_base"] is False
    for change in (
        lambda layer: setattr(layer.weight, "data", layer.weight.data.float()),
        lambda layer: setattr(layer.weight, "data", layer.weight.data.flip(0).contiguous()),
        lambda layer: setattr(layer.weight, "data", torch.empty(0, dtype=torch.int8)),
        lambda layer: setattr(layer.weight_scale, "data", layer.weight_scale.data.float()),
        lambda layer: setattr(layer.weight_scale, "data", layer.weight_scale.data.flip(0)),
        lambda layer: setattr(layer.weight_offset, "data", layer.weight_offset.data[:3]),
    ):
        model = loaded(parts)
        change(model.attn["qkv_proj"])
        assert describe_base(model, NAMES)["weights_equal_base"] is False


def test_values_that_were_loaded_wrong_have_another_digest(parts):
    wrong = [Int8Rows(one.codes, one.scale * 2) for one in parts]
    assert describe_base(loaded(wrong), NAMES)["base_digest"] != digest(parts)
    swapped = describe_base(loaded([parts[0], parts[2], parts[1]]), NAMES)
    assert swapped["base_digest"] != digest(parts)


@pytest.mark.parametrize("end", ENDS[1:])
def test_scales_or_offsets_that_were_not_loaded_are_named(parts, end):
    """vllm-ascend's parameters are not initialised: without an offset in the folder they hold anything."""
    model = loaded(parts, leave=(f"attn.k_proj.{end}",))
    with pytest.raises(EvidenceError, match=r"attn\.k_proj: its way into vLLM .* weights of rows \[0, 4\] with scales"):
        describe_base(model, NAMES)


def test_scales_of_other_rows_are_named(parts):
    model = loaded(parts, (slice(0, 2), slice(None)), scales=slice(2, 4))
    with pytest.raises(EvidenceError, match=r"rows \[0, 2\] with scales of \[2, 2\] and offsets of \[2, 2\]"):
        describe_base(model, NAMES)


def test_a_layer_without_scales_is_not_int8(parts):
    """Plain int8 weights would be other values."""
    layer, model = nn.Module(), nn.Module()
    model.attn = nn.ModuleDict({"q_proj": layer})
    layer.quant_method = object()
    layer.weight = frozen(torch.zeros(8, 64, dtype=torch.int8))
    with Trace() as trace:
        for _, tensor in trace.watch([("attn.q_proj.weight", parts[0].codes.clone())]):
            layer.weight.data.copy_(tensor)
    keep(model, trace)
    said = describe_base(model, NAMES[:1])
    assert said["form"] == "bf16"
    assert said["base_digest"] != digest(parts)
