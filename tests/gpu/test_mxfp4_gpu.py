"""The Triton kernels against the format's definition, to the last bit. Needs torch, triton, numpy and a CUDA device.

    pytest tests/gpu

Under TRITON_INTERPRET=1 it runs on a CPU, without the large shapes: tests/unit/mxfp4/test_mxfp4_gpu_interpreted.py does
so.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import mxfp4_definition as definition
from verl_aqn.mxfp4 import dequantize, fake_quantize, quantize
from verl_aqn.mxfp4.kernels import gpu
from verl_aqn.selftest import codec_rungs

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no CUDA device")
needs_gpu = pytest.mark.skipif(INTERPRETED, reason="too large for the interpreter")

RULES = ("mse", "even", "floor", "rceil")
ROUNDINGS = ("nearest", "half_away", "stochastic")
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
SEED = 0x9E3779B97F4A7C15  # both words of the key in use, both negative as int32


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter's time goes by programs, not by elements."""
    if INTERPRETED:
        monkeypatch.setattr(gpu, "_WORDS", 1 << 14)
        monkeypatch.setattr(gpu, "_STEPS", 1)


def inputs(dtype: torch.dtype) -> Tensor:
    """Blocks [B, 32] around every tie, of every magnitude, and of all that is special."""
    return codec_rungs.inputs(dtype, random=256)


def gpu_quantize(x: Tensor, rule: str, rounding: str, seed: int) -> tuple[Tensor, Tensor]:
    x = x.to(DEVICE)
    packed = torch.empty(len(x), 16, dtype=torch.uint8, device=DEVICE)
    scale = torch.empty(len(x), dtype=torch.uint8, device=DEVICE)
    gpu.quantize(x, rule, rounding, seed, packed, scale)
    return packed, scale


def gpu_fake_quantize(x: Tensor, rule: str, rounding: str, seed: int) -> Tensor:
    x = x.to(DEVICE)
    out = torch.empty_like(x)
    gpu.fake_quantize(x, rule, rounding, seed, out)
    return out


def expected(x: Tensor, rule: str, rounding: str) -> tuple[Tensor, Tensor]:
    packed, scale = definition.quantize(x.float().numpy(), rule, rounding, SEED)
    return torch.from_numpy(packed), torch.from_numpy(scale)


def same_values(got: Tensor, want: Tensor) -> bool:
    """Equal, with the sign of zeros, and NaN where NaN is."""
    got = got.cpu()
    number = ~want.isnan()
    return torch.equal(got.isnan(), ~number) and all(
        torch.equal(f(got)[number], f(want)[number]) for f in (torch.Tensor.clone, torch.signbit)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", RULES)
def test_equals_the_definition(rule: str, rounding: str, dtype: torch.dtype, large_tiles) -> None:
    x = inputs(dtype)
    packed, scale = expected(x, rule, rounding)
    got_packed, got_scale = gpu_quantize(x, rule, rounding, SEED)
    assert torch.equal(got_scale.cpu(), scale)
    assert torch.equal(got_packed.cpu(), packed)
    fake = gpu_fake_quantize(x, rule, rounding, SEED)
    with np.errstate(over="ignore"):
        want = torch.from_numpy(definition.values(packed.numpy(), scale.numpy()).astype(np.float32)).to(dtype)
    assert fake.dtype == dtype
    assert same_values(fake, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_the_codec(dtype: torch.dtype, large_tiles) -> None:
    """Over every finite bfloat16 value as well: in order, and with all magnitudes in each block."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    finite = bits.view(torch.bfloat16)[bits.view(torch.bfloat16).isfinite()]
    x = torch.cat([inputs(dtype), finite.view(-1, 32).to(dtype), finite.view(32, -1).t().to(dtype)])
    for rule in RULES:
        packed, scale = quantize(x, rule)
        got_packed, got_scale = gpu_quantize(x, rule, "nearest", 0)
        assert torch.equal(got_scale.cpu(), scale.view(-1))
        assert torch.equal(got_packed.cpu(), packed)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantizes_every_pair_of_bytes(dtype: torch.dtype, large_tiles) -> None:
    """All 256 scale bytes with all 256 code bytes."""
    codes = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).reshape(4096, 16)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    out = torch.empty(4096, 32, dtype=dtype, device=DEVICE)
    gpu.dequantize(codes.to(DEVICE), scale.to(DEVICE), out)
    assert same_values(out, dequantize(codes, scale.view(-1, 1), dtype))


@pytest.mark.parametrize("blocks", [0, 1, 5, 31, 33, 129])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tail(blocks: int, dtype: torch.dtype) -> None:
    """Nothing is written behind the end, whatever the tile."""
    x = torch.randn(blocks, 32, generator=torch.Generator().manual_seed(blocks)).to(dtype)
    packed, scale = gpu_quantize(x, "even", "stochastic", SEED)
    assert [*packed.shape, *scale.shape] == [blocks, 16, blocks]
    want = expected(x, "even", "stochastic")
    assert torch.equal(packed.cpu(), want[0])
    assert torch.equal(scale.cpu(), want[1])
    buffer = torch.full((blocks + 8, 32), 7.0, dtype=dtype, device=DEVICE)
    gpu.dequantize(packed, scale, buffer[:blocks])
    assert torch.equal(buffer[:blocks].cpu(), gpu_fake_quantize(x, "even", "stochastic", SEED).cpu())
    assert (buffer[blocks:] == 7).all()


@needs_gpu
@pytest.mark.parametrize("shape", [(4096, 4096), (1, 32), (33, 96), (4097, 4064)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_and_odd_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = x.view(-1, 32).to(DEVICE)
    for rule in RULES:
        packed, scale = quantize(x, rule)
        got_packed, got_scale = gpu_quantize(blocks, rule, "nearest", 0)
        assert torch.equal(got_scale.cpu(), scale.view(-1))
        assert torch.equal(got_packed.cpu(), packed.view(-1, 16))
        want = dequantize(packed, scale, dtype).view(-1, 32)
        out = torch.empty_like(blocks)
        gpu.dequantize(got_packed, got_scale, out)
        assert torch.equal(out.cpu(), want)
        assert torch.equal(gpu_fake_quantize(blocks, rule, "nearest", 0).cpu(), want)


@needs_gpu
def test_more_than_2_31_elements() -> None:
    """The last blocks of 2^32 + 96 elements (24 GB at the peak) are what they are on their own."""
    blocks = (1 << 27) + 3
    x = torch.zeros(blocks, 32, dtype=torch.bfloat16, device=DEVICE)
    x[-4:] = torch.randn(4, 32, device=DEVICE, dtype=torch.bfloat16)
    packed, scale = gpu_quantize(x, "even", "nearest", 0)
    want = gpu_quantize(x[-4:].clone(), "even", "nearest", 0)
    assert torch.equal(packed[-4:], want[0])
    assert torch.equal(scale[-4:], want[1])
    gpu.dequantize(packed, scale, x)
    out = torch.empty(4, 32, dtype=torch.bfloat16, device=DEVICE)
    gpu.dequantize(*want, out)
    assert torch.equal(x[-4:], out)


@needs_gpu
def test_runs_on_the_tensor_s_device() -> None:
    x = torch.randn(64, 32, device=torch.device("cuda", torch.cuda.device_count() - 1))
    out = torch.empty_like(x)
    gpu.fake_quantize(x, "mse", "nearest", 0, out)
    assert torch.equal(out.cpu(), fake_quantize(x.cpu(), "mse"))
