"""The Ascend kernels with stand-ins for torch_npu's operators: calls, dtypes, layouts, and recomputed blocks.

The stand-ins are registered with torch under the operators' published schemas, so torch rejects a call that the real
operators would reject. They compute what the kernels of hicann/ops-nn do (see `npu`), from the tests' own definition of
the format. Values that the kernels leave undefined are filled with nonsense. No hardware is involved.
"""

import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import mxfp4_definition as definition
from tests.helpers.npu_operators import ANTI, DYNAMIC, inputs
from verl_aqn.mxfp4.kernels import npu, reference


# torch omits arguments that equal the schema's defaults.
def dynamic(
    input: Tensor, *, axis=-1, round_mode="rint", dst_type=296, block_size=32, scale_alg=0, dst_type_max=0.0
) -> tuple[Tensor, Tensor]:
    assert (input.dtype, axis, dst_type, block_size, dst_type_max) == (torch.bfloat16, -1, 296, 32, 0.0)
    rule, rounding = {0: "floor", 2: "rceil"}[scale_alg], {"rint": "nearest", "round": "half_away"}[round_mode]
    rows, k = input.shape
    packed, scale = definition.quantize(input.float().numpy().reshape(-1, 32), rule, rounding)
    packed[scale == 0] = 0
    packed[scale == 255] = 0x5A
    scale = np.pad(scale.reshape(rows, -1), ((0, 0), (0, k // 32 % 2)))
    return torch.from_numpy(packed).view(rows, k // 2), torch.from_numpy(scale).view(rows, -1, 2)


def anti(x: Tensor, mxscale: Tensor, *, axis=-1, dst_type=15, src_type=292) -> Tensor:
    assert (x.dtype, mxscale.dtype, axis, src_type) == (torch.uint8, torch.uint8, -1, 296)
    rows, half = x.shape
    assert mxscale.shape == (rows, -(-half // 32), 2)
    scale = mxscale.view(rows, -1)[:, : half // 16].reshape(-1)
    values = definition.values(x.view(-1, 16).numpy(), scale.numpy())
    values[(scale < 2) | (scale > 252)] = 5.0
    return torch.from_numpy(values).view(rows, -1).to({6: torch.float32, 15: torch.bfloat16}[dst_type])


@pytest.fixture
def torch_npu(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """Provide the module with both operators, on an Ascend 950; ``calls`` lists the names of called operators."""
    calls: list[str] = []

    def recorded(name, implementation):
        def operator(*args, **kwargs):
            calls.append(name)
            return implementation(*args, **kwargs)

        return operator

    library = torch.library.Library("npu_stand_in", "FRAGMENT")
    for schema, implementation in ((DYNAMIC, dynamic), (ANTI, anti)):
        name = schema.split("(")[0]
        library.define(schema)
        library.impl(name, recorded(name, implementation), "CPU", with_keyset=False)
    module = types.ModuleType("torch_npu")
    vars(module).update(
        npu_dynamic_mx_quant=torch.ops.npu_stand_in.npu_dynamic_mx_quant,
        npu_anti_mx_quant=torch.ops.npu_stand_in.npu_anti_mx_quant,
        npu=types.SimpleNamespace(get_device_name=lambda: "Ascend950PR_9589"),
        calls=calls,
    )
    monkeypatch.setitem(sys.modules, "torch_npu", module)
    yield module
    library._destroy()


def bytes_of(kernel, x: Tensor, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    packed, scale = torch.empty(len(x), 16, dtype=torch.uint8), torch.empty(len(x), dtype=torch.uint8)
    kernel.quantize(x, rule, rounding, 5, packed, scale)
    return packed, scale


@pytest.mark.parametrize("rule", ["mse", "even", "floor", "rceil"])
@pytest.mark.parametrize("rounding", ["nearest", "half_away", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("blocks", [251, 250, 1])
def test_quantize(rule: str, rounding: str, dtype: torch.dtype, blocks: int, torch_npu) -> None:
    x = inputs()[-blocks:].to(dtype)
    got, want = bytes_of(npu, x, rule, rounding), bytes_of(reference, x, rule, rounding)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    operator = rule in ("floor", "rceil") and rounding != "stochastic" and dtype == torch.bfloat16
    assert torch_npu.calls == ["npu_dynamic_mx_quant"] * operator
    assert npu.supports(rule, rounding, dtype) == operator


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_dequantize_every_pair_of_bytes(dtype: torch.dtype, torch_npu) -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).reshape(4096, 16)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    for rows in (slice(0, 4096), slice(0, 4095)):  # an odd number of scales is padded
        got, want = torch.empty(2, *codes[rows].shape[:1], 32, dtype=dtype)
        npu.dequantize(codes[rows], scale[rows], got)
        reference.dequantize(codes[rows], scale[rows], want)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit()[:4080], want.signbit()[:4080])
    operator = dtype != torch.float16
    assert torch_npu.calls == ["npu_anti_mx_quant"] * 2 * operator
    assert npu.supports_dequantize(dtype) == operator


def test_fake_quantize(torch_npu) -> None:
    x = inputs()
    got, want = torch.empty_like(x), torch.empty_like(x)
    npu.fake_quantize(x, "rceil", "half_away", 0, got)
    reference.fake_quantize(x, "rceil", "half_away", 0, want)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch_npu.calls == ["npu_dynamic_mx_quant", "npu_anti_mx_quant"]


def test_plain_pytorch_on_other_chips_and_without_the_operator(torch_npu) -> None:
    del torch_npu.npu_anti_mx_quant  # as in torch_npu 2.10.0.post2
    assert not npu.supports_dequantize(torch.bfloat16)
    assert npu.supports("floor", "nearest", torch.bfloat16)
    torch_npu.npu.get_device_name = lambda: "Ascend910_9382"  # an A3
    x = inputs()
    got, want = torch.empty_like(x), torch.empty_like(x)
    npu.fake_quantize(x, "floor", "nearest", 0, got)
    reference.fake_quantize(x, "floor", "nearest", 0, want)
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert torch_npu.calls == []
