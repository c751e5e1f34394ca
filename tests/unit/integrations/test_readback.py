"""The content of a model with fused layers, reported under the trainer's names, whatever its kernel did with it."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.helpers.digests import base_digest
from verl_aqn.checkpoints.packing import combined_digest, values_digest
from verl_aqn.checkpoints.slices import NOTHING
from verl_aqn.checkpoints.values import plain_digest
from verl_aqn.errors import EvidenceError
from verl_aqn.integrations.vllm.observe import keep
from verl_aqn.integrations.vllm.readback import describe_base, kernel_activation
from verl_aqn.integrations.vllm.tensor_digests import describe_tensors
from verl_aqn.integrations.vllm.trace import Trace
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.mxfp4.linear import Activation
from verl_aqn.mxfp4.mxfp8 import ARITHMETIC


def loaded_model(layers: dict[str, nn.Module], tensors: dict[str, torch.Tensor], load) -> nn.Module:
    """Return a model of `layers`, observed while `load(model, tensors by name)` fills them."""
    model = nn.Module()
    for name, layer in layers.items():
        parent = model
        for part in name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.add_module(name.rpartition(".")[2], layer)
    with Trace() as trace:
        load(model, dict(trace.watch(tensors.items())))
    keep(model, trace)
    return model


def frozen(*shape: int, dtype=torch.uint8) -> nn.Parameter:
    return nn.Parameter(torch.zeros(*shape, dtype=dtype), requires_grad=False)


NAMES = ["attn.q_proj", "attn.k_proj", "attn.v_proj"]
ENDS = {"packed": ".weight_packed", "scale": ".weight_scale"}


def fused_model(parts):
    """Return one layer as vLLM has it after loading: the parts' rows stacked, under a different parent name."""
    layer = nn.Module()
    rows = sum(len(part.packed) for part in parts)
    layer.weight_packed, layer.weight_scale = frozen(rows, 32), frozen(rows, 2)
    layer.scheme = SimpleNamespace(kernel=object())
    tensors = {f"{n}{end}": getattr(p, kind) for n, p in zip(NAMES, parts, strict=True) for kind, end in ENDS.items()}

    def load(model, tensors):
        begin = 0
        for name, part in zip(NAMES, parts, strict=True):
            for end in ENDS.values():
                getattr(layer, end[1:]).data.narrow(0, begin, len(part.packed)).copy_(tensors[name + end])
            begin += len(part.packed)

    model = loaded_model({"attn.inner.qkv_proj": layer}, tensors, load)
    # The kernel rearranges weights, so the packed layout cannot be read any more.
    layer.weight = nn.Parameter(layer.weight_packed.data.flip(0).contiguous(), requires_grad=False)
    del layer.weight_packed
    return model


def test_digest_is_the_trainer_s_although_the_kernel_has_rearranged_the_weights():
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    said = describe_base(fused_model(parts), NAMES)
    assert said["base_digest"] == base_digest((n, p.packed, p.scale) for n, p in zip(NAMES, parts, strict=True))
    assert (said["layers"], said["weights_equal_base"], said["kernel"]) == (1, None, "object")
    assert (said["form"], said["slices"]) == ("packed", {})


@pytest.mark.parametrize("form", ["codes", "values"])
def test_a_kernel_that_keeps_the_codes_is_read_back_with_each_of_its_bytes(form):
    """This package's CPU kernel multiplies with the codes, or with their values if it must."""
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    model = fused_model(parts)
    layer = model.attn.inner.qkv_proj
    layer.mxfp4_packed = torch.cat([part.packed for part in parts])
    layer.weight_scale.data.copy_(torch.cat([part.scale for part in parts]))
    values = dequantize(layer.mxfp4_packed, layer.weight_scale.data, torch.bfloat16)
    layer.weight = nn.Parameter(layer.mxfp4_packed if form == "codes" else values, requires_grad=False)
    assert describe_base(model, NAMES)["weights_equal_base"] is True
    for tensor, step in ((layer.mxfp4_packed, 0x11), (layer.weight_scale.data, 1), (layer.weight.data, 1)):
        before = tensor[9, 1].clone()
        tensor[9, 1] += step
        assert describe_base(model, NAMES)["weights_equal_base"] is False
        tensor[9, 1] = before
    # Codes and values that agree with each other, but not with what was loaded.
    layer.mxfp4_packed[0, 0] ^= 0x01
    if form == "values":
        layer.weight.data.copy_(dequantize(layer.mxfp4_packed, layer.weight_scale.data, torch.bfloat16))
    assert describe_base(model, NAMES)["weights_equal_base"] is False


def plain_model(parts, excluded):
    """Return the bf16 equivalent of `parts` as vLLM loads it, with a layer that the packed base leaves in bf16."""
    layers = {"attn.qkv_proj": nn.Module(), "head": nn.Module()}
    for layer, rows in zip(layers.values(), (16, len(excluded)), strict=True):
        layer.weight = frozen(rows, 64, dtype=torch.bfloat16)
        layer.quant_method = named_kernel("AscendUnquantizedLinearMethod")
    tensors = dict(zip((f"{n}.weight" for n in [*NAMES, "head"]), [*parts, excluded], strict=True))

    def load(model, tensors):
        *fused, head = tensors.values()
        model.attn.qkv_proj.weight.data.copy_(torch.cat(fused))
        model.head.weight.data.copy_(head)

    return loaded_model(layers, tensors, load)


def test_a_bf16_base_is_known_by_the_values_of_the_packed_one(tmp_path):
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    dense = [dequantize(*part, torch.bfloat16) for part in parts]
    said = describe_base(model := plain_model(dense, torch.randn(3, 64).bfloat16()), NAMES)
    assert said["base_digest"] == combined_digest((n, values_digest(w)) for n, w in zip(NAMES, dense, strict=True))
    assert (said["form"], said["layers"], said["weights_equal_base"]) == ("bf16", 1, True)
    assert (said["kernel"], said["activations"]) == ("AscendUnquantizedLinearMethod", ["none"])
    assert model.aqn_names == {"head.weight": "head.weight"}
    weight = model.attn.qkv_proj.weight
    weight.data[0, 0] += 1
    assert describe_base(model, NAMES)["weights_equal_base"] is False
    # vLLM's CPU platform repacks the weight: what cannot be read is not confirmed.
    model.attn.qkv_proj.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    gone = describe_base(model, NAMES)
    assert gone["base_digest"] == said["base_digest"]
    assert gone["weights_equal_base"] is gone["weights_digest"] is None


def test_every_tensor_is_read_where_it_is_now_or_else_as_it_was_loaded():
    layers = {"norm": nn.Module(), "o_proj": nn.Module(), "embed": nn.Module(), "twin": nn.Module()}
    layers["norm"].weight = nn.Parameter(torch.zeros(64, dtype=torch.bfloat16), requires_grad=False)
    for name in ("o_proj", "embed", "twin"):
        layers[name].weight = frozen(8, 64, dtype=torch.bfloat16)
    tensors = {f"{name}.weight": torch.randn(layer.weight.shape).bfloat16() for name, layer in layers.items()}

    def load(model, tensors):
        for name, layer in layers.items():
            layer.weight.data.copy_(tensors["embed.weight" if name == "twin" else f"{name}.weight"])

    model = loaded_model(layers, {n: t for n, t in tensors.items() if n != "twin.weight"}, load)
    digests = {name: plain_digest(tensor) for name, tensor in tensors.items() if name != "twin.weight"}
    model.norm.weight.data = model.norm.weight.data.float()  # as for noise
    said = describe_tensors(model, [])
    assert said["tensors"] == {name: [digest, "bfloat16", True, None] for name, digest in digests.items()}
    assert (said["computed"], said["lost"], said["kernel_digest"]) == ({}, {}, None)
    model.norm.weight.data[3] += 2**-12  # a change too small for bfloat16
    model.o_proj.weight = nn.Parameter(torch.empty(0), requires_grad=False)  # a kernel removed it
    again = describe_tensors(model, [])["tensors"]
    assert again["norm.weight"][0] != digests["norm.weight"]
    assert again["o_proj.weight"] == [digests["o_proj.weight"], "bfloat16", False, None]
    model.twin.weight.data[0, 0] += 1  # one of two copies
    assert "held twice" in describe_tensors(model, [])["tensors"]["embed.weight"][0]
    model.wrapped = nn.Module()  # LoRA puts layers into wrappers
    model.wrapped.base_layer = model.embed
    model.twin.weight.data[0, 0] -= 1
    model.embed, model.wrapped = model.wrapped, None
    assert describe_tensors(model, [])["tensors"]["embed.weight"] == [digests["embed.weight"], "bfloat16", True, None]


def test_one_changed_weight_shows_between_two_moments():
    model = fused_model([quantize(torch.randn(n, 64)) for n in (8, 8, 8)])
    before = describe_base(model, ["attn.q_proj"])
    model.attn.inner.qkv_proj.weight.data[0, 0] ^= 1
    after = describe_base(model, ["attn.q_proj"])
    assert after["weights_digest"] != before["weights_digest"]


def test_a_swapped_part_is_found_although_all_shapes_fit():
    """The loader puts k into the place of v."""
    torch.manual_seed(0)
    parts = [quantize(torch.randn(n, 64)) for n in (8, 4, 4)]
    swapped = fused_model([parts[0], parts[2], parts[1]])
    right = base_digest((n, p.packed, p.scale) for n, p in zip(NAMES, parts, strict=True))
    assert describe_base(swapped, NAMES)["base_digest"] != right


def test_a_way_of_loading_that_cannot_be_followed_is_named():
    layer = nn.Module()
    layer.weight = frozen(4, 64, dtype=torch.bfloat16)
    weight = torch.randn(4, 64).bfloat16()

    def load(model, tensors):
        model.o_proj.weight.data.copy_(tensors["o_proj.weight"].sum(0, keepdim=True).expand(4, 64))

    model = loaded_model({"o_proj": layer}, {"o_proj.weight": weight}, load)
    with pytest.raises(EvidenceError, match=r"o_proj: its way into vLLM cannot be followed \(aten.sum.*load_weights"):
        describe_base(model, ["o_proj"])
    assert describe_base(model, ["other"])["slices"] == {"other": NOTHING}
    with pytest.raises(EvidenceError, match="load_format"):
        describe_base(nn.Module(), ["o_proj"])


@pytest.mark.parametrize(
    ("tensors", "mapping"),
    [
        (["mlp.gate_proj", "mlp.up_proj"], ["gate_proj", "up_proj"]),
        (["mlp.gate_up_proj"], ["gate_up_proj"]),  # GLM4: vLLM's LoRA layers would look for gate_proj
    ],
)
def test_what_the_checkpoint_has_in_one_tensor_is_one_module_for_adapters_too(tensors, mapping):
    class Glm(nn.Module):
        packed_modules_mapping = {"gate_up_proj": ["gate_proj", "up_proj"]}  # noqa: RUF012

    model, layer = Glm(), nn.Module()
    layer.weight = frozen(8, 64, dtype=torch.bfloat16)
    model.mlp = nn.ModuleDict({"gate_up_proj": layer})
    with Trace() as trace:
        weights = ((f"{name}.weight", torch.randn(8 // len(tensors), 64).bfloat16()) for name in tensors)
        layer.weight.data.copy_(torch.cat([weight for _, weight in trace.watch(weights)]))
    keep(model, trace)
    assert model.packed_modules_mapping == {"gate_up_proj": mapping}
    assert Glm.packed_modules_mapping == {"gate_up_proj": ["gate_proj", "up_proj"]}


def named_kernel(name: str, **attributes):
    return type(name, (), attributes)()


def test_every_kernel_is_known_by_how_it_rounds_activations():
    """On Blackwell a weight-only checkpoint runs as W4A4 (`verl_aqn.runs.judge.base_record` compares)."""
    names = ("FlashInferMxFp4LinearKernel", "MarlinMxFp4LinearKernel", "NewKernel")
    assert [kernel_activation(named_kernel(name)) for name in names] == ["rceil/nearest", "none", "unknown"]
    assert kernel_activation(named_kernel("CpuMxfp4LinearKernel", activation=None)) == "none"
    for text in ("even/nearest", ARITHMETIC):
        assert kernel_activation(named_kernel("CpuMxfp4LinearKernel", activation=Activation.parse(text))) == text
    assert kernel_activation(named_kernel("AscendW4A8MXFPDynamicLinearMethod")) == ARITHMETIC


def test_a_stack_of_experts_is_read_back_as_its_folder_holds_it(tmp_path):
    """gpt-oss: [E, K, N] in the bf16 folder, [E, N, K] in vLLM's layer."""
    from tests.helpers.family_models import make
    from verl_aqn.checkpoints.loading import dequantize_checkpoint, open_packed, packed_modules
    from verl_aqn.checkpoints.packing import checkpoint_digest, quantize_checkpoint
    from verl_aqn.checkpoints.slices import NOTHING
    from verl_aqn.checkpoints.storage import Weights
    from verl_aqn.integrations.vllm.observe import keep
    from verl_aqn.integrations.vllm.trace import Trace

    make("gpt_oss", tmp_path / "source")
    quantize_checkpoint(tmp_path / "source", tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dense")
    name = "model.layers.0.mlp.experts.down_proj"
    stack = Weights(tmp_path / "dense").read(name)
    others = [module for module in packed_modules(open_packed(tmp_path / "packed")) if module != name]
    wanted = checkpoint_digest(tmp_path / "packed", dict.fromkeys(others, NOTHING), "bf16")

    def described(values: torch.Tensor) -> dict:
        model = torch.nn.Module()
        model.experts = torch.nn.Module()
        model.experts.w2_weight = torch.nn.Parameter(torch.zeros_like(stack.transpose(1, 2).contiguous()))
        model.experts.quant_method = object()
        with Trace() as trace:
            ((_, tensor),) = trace.watch([(name, values)])
            model.experts.w2_weight.data.copy_(tensor.transpose(1, 2))
        keep(model, trace)
        return describe_base(model, [name, *others])

    assert described(stack)["base_digest"] == wanted
    assert described(stack)["slices"] == dict.fromkeys(others, NOTHING)
    wrong = stack.clone()
    wrong[-1, -1, -1] += 1
    assert described(wrong)["base_digest"] != wanted
