"""What vllm-ascend has for chips without MX units (A2, A3), and what its int8 form holds of an MXFP4 base.

The statements about packages are read from the pinned wheels. Nothing of it was run on an NPU. docs/devices.md tells
what follows.
"""

import ast
import re
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.helpers.ascend_packages import FOLDER, calls, definitions, node, read
from verl_aqn.cache import cache_dir
from verl_aqn.mxfp4 import dequantize, quantize
from verl_aqn.tasks.smollm2 import embedded_model

METHODS = "vllm_ascend/quantization/methods"
# Scheme for linear layers → file and class in METHODS.
LINEAR = {
    "W8A16": ("w8a16", "AscendW8A16LinearMethod"),
    "W8A8": ("w8a8_static", "AscendW8A8LinearMethod"),
    "W8A8_DYNAMIC": ("w8a8_dynamic", "AscendW8A8DynamicLinearMethod"),
    "W8A8_MIX": ("w8a8_pdmix", "AscendW8A8PDMixLinearMethod"),
    "W8A8FP8_DYNAMIC": ("w8a8fp8_dynamic", "AscendW8A8FP8DynamicLinearMethod"),
    "W8A8_MXFP8": ("w8a8_mxfp8", "AscendW8A8MXFP8DynamicLinearMethod"),
    "W4A8_DYNAMIC": ("w4a8", "AscendW4A8DynamicLinearMethod"),
    "W4A8_MXFP": ("w4a8_mxfp4", "AscendW4A8MXFPDynamicLinearMethod"),
    "W4A4_DYNAMIC": ("w4a4_laos_dynamic", "AscendW4A4LaosDynamicLinearMethod"),
    "W4A4_FLATQUANT_DYNAMIC": ("w4a4_flatquant", "AscendW4A4FlatQuantDynamicLinearMethod"),
    "W4A4_MXFP4": ("w4a4_mxfp4", "AscendW4A4MXFP4DynamicLinearMethod"),
    "W4A4_MXFP4_FLATQUANT": ("w4a4_mxfp4_flatquant", "AscendW4A4MXFP4FlatQuantDynamicLinearMethod"),
}
OPERATOR = "npu_weight_quant_batchmatmul"  # 16-bit activations times int8 or int4


def rows_int8(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 [N, K] and scales [N, 1] in bf16: for each row the finest power of two that clips no value."""
    values = dequantize(packed, scale, torch.float32)
    largest = values.abs().amax(1, keepdim=True).clamp(min=2.0**-120)
    step = torch.exp2(torch.ceil(torch.log2(largest / 127)))
    return torch.round(values / step).to(torch.int8), step.to(torch.bfloat16)


def blocks(weight: Tensor) -> Tensor:
    return weight.unflatten(1, (-1, 32))


# ---- schemes ----


def test_these_are_the_schemes_for_linear_layers():
    read(f"{METHODS}/registry.py")  # skips without the wheels
    found = {}
    for file in sorted((FOLDER / METHODS).glob("*.py")):
        for child in ast.parse(file.read_text()).body:
            for call in getattr(child, "decorator_list", []):
                if ast.unparse(call).startswith("register_scheme(") and call.args[1].value == "linear":
                    found[call.args[0].value] = (file.stem, child.name)
    assert found == LINEAR


def test_only_two_of_them_leave_activations_at_16_bits():
    found = {
        scheme
        for scheme, (file, name) in LINEAR.items()
        if any(calls(node(f"{METHODS}/{file}.py", name, "apply"), OPERATOR))
    }
    assert found == {"W8A16", "W4A8_DYNAMIC"}
    for scheme in found:
        file, name = LINEAR[scheme]
        apply = node(f"{METHODS}/{file}.py", name, "apply")
        assert len([child for child in ast.walk(apply) if isinstance(child, ast.Call)]) <= 2  # no rounding before it
    (moe,) = calls(ast.parse(read(f"{METHODS}/w4a16.py")), "register_scheme")
    assert [ast.literal_eval(argument) for argument in moe.args] == ["W4A16", "moe"]  # W4A16 is for experts alone


def test_w4a8_dynamic_has_int4_in_groups_and_drops_the_bias():
    file, name = LINEAR["W4A8_DYNAMIC"]
    (multiply,) = calls(node(f"{METHODS}/{file}.py", name, "apply"), OPERATOR)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in multiply.keywords}
    assert given["antiquant_group_size"] == "self.group_size"
    assert "bias" not in given
    assert "quant_description.get('group_size', 256)" in ast.unparse(node(f"{METHODS}/{file}.py", name, "__init__"))


def test_w8a16_takes_the_folder_that_would_be_written_and_multiplies_with_exact_values():
    """The product's weight is (int8 + offset) x scale, as torch_npu's page says."""
    file, name = LINEAR["W8A16"]
    parts = ("get_weight", "get_perchannel_param", "process_weights_after_loading")
    methods = definitions(f"quantization/methods/{file}.py", *parts, inside=name)
    methods[parts[2]].__globals__["maybe_trans_nz"] = lambda weight: weight  # VLLM_ASCEND_ENABLE_NZ=0, as in `npu`
    generator = torch.Generator().manual_seed(0)
    packed, scale = quantize(torch.randn(64, 128, generator=generator).to(torch.bfloat16), "mse")
    codes, step = rows_int8(packed, scale)
    written = {"weight": codes, "weight_scale": step, "weight_offset": torch.zeros_like(step)}
    parameters = methods[parts[0]](None, 128, 64, torch.bfloat16) | methods[parts[1]](None, 64, torch.bfloat16)
    assert {n: (p.shape, p.dtype) for n, p in parameters.items()} == {n: (p.shape, p.dtype) for n, p in written.items()}
    layer = SimpleNamespace(**{n: torch.nn.Parameter(p, requires_grad=False) for n, p in written.items()})
    methods[parts[2]](None, layer)
    assert layer.weight.shape == (128, 64)  # read back as [K, N]
    product = (layer.weight.to(torch.bfloat16) + layer.weight_offset) * layer.weight_scale
    assert torch.equal(product.T, dequantize(packed, scale))


def test_w8a16_hands_a_bias_over_as_it_is_and_the_operator_wants_float32():
    """So a model with biases in its linear layers (Qwen2.5) needs them cast on A2 and A3."""
    file, name = LINEAR["W8A16"]
    (multiply,) = calls(node(f"{METHODS}/{file}.py", name, "apply"), OPERATOR)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in multiply.keywords}
    assert given["bias"] == "bias"
    assert "antiquant_group_size" not in given
    (page,) = re.findall(rf'"{OPERATOR}",(.*?)"""\n\)', read("torch_npu/_op_plugin_docs.py"), re.DOTALL)
    for chips in ("Atlas A2 训练系列产品/Atlas 800I A2 推理产品", "Atlas A3 训练系列产品"):
        assert f"{chips}: per-tensor、per-channel、per-group" in page
        assert f"{chips}: 数据类型支持int8、int32" in page  # the weight's dtypes
        # "with x in bfloat16, the bias must be float32"
        assert f"{chips}: 数据类型支持float16、float32. 当x数据类型为bfloat16, bias需为float32" in page
    assert "[32, K-1]且必须是32的倍数" in page  # a group has a multiple of 32, and at most K-1


def test_a_scheme_of_ours_could_be_registered_and_its_scales_split():
    register = ast.unparse(node(f"{METHODS}/registry.py", "register_scheme"))
    assert "_SCHEME_REGISTRY[key] = cls" in register
    create = node("vllm_ascend/quantization/method_adapters.py", "AscendLinearMethod", "create_weights")
    assert "'weight_scale_second' in pergroup_name" in ast.unparse(create)  # this name is split along K too


# ---- values ----


@pytest.mark.parametrize(("lower", "exact"), [(0, True), (3, True), (4, False)])
def test_a_row_in_int8_holds_blocks_up_to_three_powers_of_two_below_its_largest(lower, exact):
    every_code = torch.tensor([0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 4, dtype=torch.uint8)
    packed = every_code.reshape(1, 32)
    scale = torch.tensor([[127, 127 - lower]], dtype=torch.uint8)
    codes, step = rows_int8(packed, scale)
    assert torch.equal(codes * step.float(), dequantize(packed, scale, torch.float32)) is exact


def test_int8_with_one_scale_for_a_block_holds_every_mxfp4_value():
    packed = torch.arange(256, dtype=torch.uint8).repeat(2, 1)
    scale = torch.arange(32, dtype=torch.uint8).reshape(2, 16) * 7 + 10
    values = dequantize(packed, scale, torch.float32)
    half = torch.exp2(scale.float() - 128)[..., None]
    codes = (blocks(values) / half).to(torch.int8)
    assert codes.abs().max() == 12
    again = (codes * half).flatten(1)
    assert torch.equal(again, values)
    assert bool(torch.signbit(values)[values == 0].any())  # but int8 has no negative zero: bytes are not equal,
    assert not bool(torch.signbit(again)[again == 0].any())  # so a digest must not see the sign of a zero


@pytest.mark.parametrize(("times", "share", "error"), [(1, 1.0, 0.0), (20, 0.47, 0.085), (100, 0.06, 0.125)])
def test_columns_with_large_weights_cost_the_other_blocks_of_a_row(times, share, error):
    """Random rows of 2,048 weights, of which four columns are larger."""
    weight = torch.randn(512, 2048, generator=torch.Generator().manual_seed(0))
    weight[:, ::512] *= times
    packed, scale = quantize(weight.to(torch.bfloat16), "mse")
    codes, step = rows_int8(packed, scale)
    values = dequantize(packed, scale, torch.float32)
    lost = codes * step.float() - values
    assert (blocks(lost) == 0).all(-1).float().mean().item() == pytest.approx(share, abs=5e-3)
    assert (lost.norm() / values.norm()).item() == pytest.approx(error, abs=1e-3)


def test_what_int8_holds_of_the_embedded_model_is_what_the_page_says():
    (file,) = embedded_model(cache_dir() / "models").glob("*.safetensors")
    layers = kept_layers = all_blocks = kept = int4 = rows = kept_rows = 0
    signal = power_of_two = ordinary = worst = 0.0
    with safe_open(file, "pt") as weights:
        for name in weights.keys():  # noqa: SIM118
            if not name.endswith("_proj.weight"):
                continue
            packed, scale = quantize(weights.get_tensor(name), "mse")
            values = dequantize(packed, scale, torch.float32)
            codes, step = rows_int8(packed, scale)
            error = codes * step.float() - values
            same = (blocks(error) == 0).all(-1)
            layers, kept_layers = layers + 1, kept_layers + bool(same.all())
            all_blocks, kept = all_blocks + same.numel(), kept + int(same.sum())
            rows, kept_rows = rows + len(same), kept_rows + int(same.all(1).sum())
            halves = (blocks(values) / torch.exp2(scale.float() - 128)[..., None]).to(torch.int8)
            fits = [((halves % unit == 0) & (halves >= -8 * unit) & (halves <= 7 * unit)).all(-1) for unit in (1, 2, 4)]
            int4 += int((fits[0] | fits[1] | fits[2]).sum())
            by_127 = (values.abs().amax(1, keepdim=True) / 127).to(torch.bfloat16).float().clamp(min=2.0**-120)
            other = torch.round(values / by_127).clamp(-128, 127) * by_127 - values
            squares = [float((tensor**2).sum()) for tensor in (values, error, other)]
            signal, power_of_two, ordinary = (
                a + b for a, b in zip((signal, power_of_two, ordinary), squares, strict=True)
            )
            worst = max(worst, (squares[1] / squares[0]) ** 0.5)
    assert (layers, kept_layers) == (210, 159)
    assert (all_blocks, all_blocks - kept) == (3_317_760, 532)
    assert (rows, rows - kept_rows) == (155_520, 81)
    assert int4 / all_blocks == pytest.approx(0.156, abs=5e-4)
    assert (power_of_two / signal) ** 0.5 == pytest.approx(0.0007, abs=5e-5)
    assert (ordinary / signal) ** 0.5 == pytest.approx(0.0081, abs=5e-5)
    assert worst == pytest.approx(0.0053, abs=5e-5)
