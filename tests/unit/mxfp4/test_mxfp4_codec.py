"""The codec against the format's definition. (Independent implementations: test_mxfp4_oracles.py.)"""

import pytest
import torch
from torch import Tensor

from tests.helpers.sqnr import sqnr_db
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import dequantize, fake_quantize, quantize
from verl_aqn.mxfp4.codec import SCALE_RULES
from verl_aqn.mxfp4.kernels import native, reference

GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def all_finite_bf16() -> Tensor:
    """Return every finite bfloat16 value, including -0 and subnormals [65280]."""
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    return values[values.isfinite()]


def blocks_with_amax(amax: float) -> Tensor:
    """Return every bfloat16 value up to ``amax`` in magnitude, 31 per block, each block starting with ``amax``."""
    amax = torch.tensor(amax).bfloat16()
    values = all_finite_bf16()
    values = values[values.abs() <= amax]
    values = torch.nn.functional.pad(values, (0, -len(values) % 31)).view(-1, 31)
    return torch.cat([amax.expand(len(values), 1), values], dim=1)


def random_blocks() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, 256, generator=generator) * torch.exp(3 * torch.randn(512, 1, generator=generator))
    return torch.cat([x, torch.zeros(1, 256)]).bfloat16()


# Mantissas on each side of the rules' thresholds (1.5, 1.75), at low, usual and high exponents.
AMAX = [m * 2.0**e for e in (-120, -6, 0, 100) for m in (1.0, 1.4921875, 1.5, 1.5078125, 1.7421875, 1.75, 1.9921875)]


def every_input(amax: list[float] = AMAX) -> Tensor:
    return torch.cat([*(blocks_with_amax(a) for a in amax), random_blocks().view(-1, 32)])


@pytest.fixture(params=["native", "reference"], autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test of the codec with the compiled and with the plain kernels."""
    if request.param == "reference":
        monkeypatch.setattr(native, "available", lambda: False)


def test_layout_and_all_bytes() -> None:
    """Every (scale byte, code byte) pair dequantises to the value in the format's definition, in float64."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).expand(256, 256)
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 16)
    low, high = (codes & 15).long(), (codes >> 4).long()
    signed = torch.cat([GRID, -GRID]).double()
    expected = torch.stack([signed[low], signed[high]], dim=-1).view(256, 512)
    expected = expected * 2.0 ** (torch.arange(256).double() - 127).view(256, 1)
    expected[255] = float("nan")
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        got = dequantize(codes, scale, dtype)
        assert got.dtype == dtype
        assert got.shape == (256, 512)
        torch.testing.assert_close(got, expected.to(dtype), rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit()[:255], expected.signbit()[:255])


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_rounding_is_nearest_even_and_saturates(rule: str) -> None:
    x = every_input().float()
    packed, scale = quantize(x, rule)
    y = x.double() / 2.0 ** (scale.double() - 127)
    nearest = (y.abs().clamp(max=6).unsqueeze(-1) - GRID).abs()
    code = torch.stack([packed & 7, packed >> 4 & 7], dim=-1).view(x.shape).long()
    best = nearest.amin(-1)
    assert torch.equal(nearest.gather(-1, code.unsqueeze(-1)).squeeze(-1), best)
    tie = (nearest == best.unsqueeze(-1)).sum(-1) == 2
    assert tie.any()
    assert (code[tie] % 2 == 0).all()


@pytest.mark.parametrize("rule", SCALE_RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_idempotent(rule: str, dtype: torch.dtype) -> None:
    x = random_blocks().to(dtype)
    x = x[x.abs().amax(-1) < 1e4]  # within float16
    once = fake_quantize(x, rule)
    assert torch.equal(fake_quantize(once, rule), once)


def test_mse_never_worse_than_a_neighbour() -> None:
    x = every_input().double()
    amax = x.abs().amax(-1, keepdim=True)
    amax_exponent = torch.frexp(amax).exponent - 1
    chosen = quantize(x.float(), "mse")
    error = (dequantize(*chosen, dtype=torch.float32).double() - x).square().sum(-1)
    for step in (-2, -1):
        unit = 2.0 ** (amax_exponent + step).clamp(min=-127).double()
        y = (x / unit).abs()
        nearest = GRID[(y.unsqueeze(-1) - GRID).abs().argmin(-1)].double()
        theirs = ((y - nearest).square() * unit.square()).sum(-1)
        assert (error <= theirs * (1 + 1e-12)).all()
    free = amax.squeeze(-1) > 0
    exponent = chosen.scale.squeeze(-1).int() - 127 - amax_exponent.squeeze(-1)
    assert set(exponent[free].tolist()) == {-2, -1}


def test_mse_tie_takes_the_smaller_exponent() -> None:
    x = torch.zeros(1, 32)
    x[0, 0] = 4.0  # exact under both scales
    assert quantize(x, "mse").scale.item() == 127


def test_mse_beats_the_others_on_gaussian_weights() -> None:
    x = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0))
    sqnr = {rule: sqnr_db(x, fake_quantize(x, rule)) for rule in SCALE_RULES}
    assert sqnr["mse"] == max(sqnr.values())
    assert 18 < min(sqnr.values()) < sqnr["mse"] < 19.5


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_edges(rule: str) -> None:
    x = torch.ones(6, 32)
    x[0] = 0
    x[1, 3] = float("nan")
    x[2, 3] = float("-inf")
    x[3, 5] = -0.0
    x[4] = 2.0**-126
    x[5] = 2.0**-140
    packed, scale = quantize(x, rule)
    y = dequantize(packed, scale)
    assert scale[0] == 0
    assert torch.equal(y[0], torch.zeros(32).bfloat16())
    assert (scale[1:3] == 255).all()
    assert (packed[1:3] == 0).all()
    assert y[1:3].isnan().all()
    assert y[3, 5] == 0
    assert y[3, 5].signbit()
    assert not y[3, 4].signbit()
    assert scale[4] == 0
    assert torch.equal(y[4].float(), x[4])
    assert torch.equal(y[5], torch.zeros(32).bfloat16())


@pytest.mark.parametrize("rule", SCALE_RULES)
def test_tiny_blocks_use_the_smallest_scale(rule: str) -> None:
    bits = torch.randint(0, 0x01000000, (64, 32), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    x = bits.view(torch.float32)  # up to 2^-125, subnormals included
    packed, scale = quantize(x, rule)
    assert (scale <= 1).all()
    y = (x.double() * 2.0**127) if (scale == 0).all() else x.double() / 2.0 ** (scale.double() - 127)
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0))
    got = dequantize(packed, scale, torch.float32).double() / 2.0 ** (scale.double() - 127)
    assert ((got - y).abs() <= torch.where(y > 6, 2.0, step / 2)).all()


def test_largest_values() -> None:
    x = torch.full((1, 32), torch.finfo(torch.bfloat16).max, dtype=torch.bfloat16)
    assert dequantize(*quantize(x, "floor"))[0, 0] == 6 * 2.0**125  # clipped
    assert dequantize(*quantize(x, "even")).isinf().all()  # rounds up to 2^128


def test_any_leading_shape_and_strides() -> None:
    x = torch.randn(64, 3, 2, 5).permute(2, 1, 3, 0)
    packed, scale = quantize(x)
    assert packed.shape == (2, 3, 5, 32)
    assert scale.shape == (2, 3, 5, 2)
    y = dequantize(packed, scale)
    assert torch.equal(y[1, 2], dequantize(*quantize(x[1, 2].contiguous())))
    strided = packed.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(dequantize(strided, scale), y)


def test_chunks_do_not_show() -> None:
    x = torch.randn(1100, 1024)  # many chunks, the last one short
    packed, scale = quantize(x)
    assert torch.equal(packed[-3:], quantize(x[-3:]).packed)
    assert torch.equal(dequantize(packed, scale)[-3:], dequantize(packed[-3:], scale[-3:]))


def test_out_and_empty() -> None:
    packed, scale = quantize(torch.randn(4, 64))
    for dtype in (torch.bfloat16, torch.float32):
        out = torch.empty(4, 64, dtype=dtype)
        assert dequantize(packed, scale, dtype, out=out) is out
        assert torch.equal(out, dequantize(packed, scale, dtype))
    with pytest.raises(ModelError, match="out must be contiguous"):
        dequantize(packed, scale, out=torch.empty(64, 4, dtype=torch.bfloat16).t())
    assert dequantize(*quantize(torch.empty(0, 64))).shape == (0, 64)


def test_fake_quantize_passes_the_gradient_through() -> None:
    x = torch.randn(4, 64, requires_grad=True)
    grad = torch.randn(4, 64)
    fake_quantize(x, "mse").backward(grad)
    assert torch.equal(x.grad, grad)


def test_tables_made_in_inference_mode_serve_training() -> None:
    reference._tables.cache_clear()
    with torch.inference_mode():
        fake_quantize(torch.randn(1, 32))
    x = torch.randn(1, 32, requires_grad=True)
    fake_quantize(x).sum().backward()


def test_errors_name_the_fix() -> None:
    with pytest.raises(ModelError, match=r"\[2, 33\].*multiple of 32"):
        quantize(torch.zeros(2, 33))
    with pytest.raises(ModelError, match="unknown scale rule 'ceil': use one of mse, even, floor, rceil"):
        quantize(torch.zeros(2, 32), "ceil")
    with pytest.raises(ModelError, match="float64"):
        quantize(torch.zeros(2, 32, dtype=torch.float64))
    packed, scale = quantize(torch.zeros(2, 64))
    with pytest.raises(ModelError, match="do not match"):
        dequantize(packed, scale[:, :1])
    with pytest.raises(ModelError, match="uint8"):
        dequantize(packed.int(), scale)
