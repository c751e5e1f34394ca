"""The Ascend kernels on an Ascend 950 against plain PyTorch on its CPU. Needs torch, torch_npu and the device.

    pytest tests/npu

Written without one, and not run yet.
"""

import pytest
import torch
from torch import Tensor

from tests.helpers.npu_operators import ANTI, DYNAMIC, inputs
from verl_aqn.mxfp4 import mxfp8
from verl_aqn.mxfp4.kernels import npu, reference

torch_npu = pytest.importorskip("torch_npu")
pytestmark = pytest.mark.skipif(not torch.npu.is_available() or not npu._on_ascend_950(), reason="no Ascend 950")


@pytest.mark.parametrize("schema", [DYNAMIC, ANTI])
def test_schema_is_the_published_one(schema: str) -> None:
    operator = getattr(torch.ops.npu, schema.split("(")[0]).default
    assert str(operator._schema) == str(torch._C.parse_schema(f"npu::{schema}"))


@pytest.mark.parametrize("rule", ["mse", "even", "floor", "rceil"])
@pytest.mark.parametrize("rounding", ["nearest", "half_away", "stochastic"])
def test_equals_the_cpu(rule: str, rounding: str) -> None:
    gaussian = torch.randn(4096 * 128, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    x = torch.cat([inputs(), gaussian])
    (packed, scale), (got_packed, got_scale) = (run(kernel, y, rule, rounding) for kernel, y in devices(x))
    assert torch.equal(got_scale.cpu(), scale)
    assert torch.equal(got_packed.cpu(), packed)
    want, got = torch.empty_like(x), torch.empty_like(x, device="npu")
    reference.dequantize(packed, scale, want)
    npu.dequantize(got_packed, got_scale, got)
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=0, equal_nan=True)


def test_the_operator_of_w4a8_rounds_as_the_actor_does() -> None:
    """The scheme W4A8_MXFP calls it so. Blocks with a mantissa above 1.75 show whether it clips at 448."""
    gaussian = torch.randn(4096 * 128, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    usual = inputs()[(inputs().abs().float().amax(-1) > 2.0**-100) & inputs().isfinite().all(-1)]
    x = torch.cat([gaussian, usual[: len(usual) // 2 * 2]]).view(-1, 64)
    codes, scale = torch_npu.npu_dynamic_mx_quant(x.to("npu"), dst_type=torch.float8_e4m3fn)
    expected = mxfp8.quantize(x)
    assert torch.equal(scale.cpu().view(torch.uint8).view(len(x), -1), expected.scale)
    assert torch.equal(codes.cpu().view(torch.uint8), expected.codes)
    assert torch.equal(mxfp8.fake_quantize(x.to("npu")).cpu(), mxfp8.fake_quantize(x))


def devices(x: Tensor):
    return (reference, x), (npu, x.to("npu"))


def run(kernel, x: Tensor, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    packed = torch.empty(len(x), 16, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    kernel.quantize(x, rule, rounding, 5, packed, scale)
    return packed, scale
