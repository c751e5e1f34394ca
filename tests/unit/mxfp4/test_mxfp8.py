"""The MXFP8 codec against the format's definition. (Independent implementations: test_mxfp8_oracles.py.)"""

from collections.abc import Iterator

import pytest
import torch
from test_mxfp4_codec import all_finite_bf16, blocks_with_amax, random_blocks
from torch import Tensor

from tests.helpers.builds import compile_for_any_cpu
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import mxfp8
from verl_aqn.mxfp4.kernels import native

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AMAX = [m * 2.0**e for e in (-124, -119, -6, 0, 100, 127) for m in (1.0, 1.75, 1.7578125, 1.9375, 1.9921875)]


def value(code: int) -> float:
    """Return the value of an E4M3 code by its definition."""
    exponent, mantissa, sign = code >> 3 & 15, code & 7, -1 if code & 128 else 1
    if code & 127 == 127:
        return float("nan")
    return sign * (mantissa * 2.0**-9 if exponent == 0 else (8 + mantissa) * 2.0 ** (exponent - 10))


VALUES = torch.tensor([value(code) for code in range(256)], dtype=torch.float64)


def every_input() -> Tensor:
    """Return bfloat16 blocks [B, 32]: every value up to each of `AMAX`, random ones, zeros, and subnormals."""
    tiny = torch.arange(128, dtype=torch.int16).view(torch.bfloat16).view(-1, 32)
    return torch.cat([*(blocks_with_amax(amax) for amax in AMAX), random_blocks().view(-1, 32), tiny, -tiny])


def between(x: Tensor) -> Tensor:
    """Return float32 values at, above and below ``x``: on each side of every tie."""
    x = x.float()
    return torch.cat([x, x * (1 + 2**-20), x * (1 - 2**-20)])


def of(dtype: torch.dtype) -> Tensor:
    x = every_input()
    return between(x[::4]) if dtype == torch.float32 else x.to(dtype)


@pytest.fixture(scope="module", params=["compiled for this CPU", "compiled for any CPU", "plain"])
def kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run a test with the compiled kernel, with and without AVX-512, and with the definition."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(native, "available", lambda: False)
        elif request.param == "compiled for any CPU":
            compile_for_any_cpu(patch, tmp_path_factory.mktemp("cache"))
        else:
            assert native.available(), native.status().detail
        yield


def assert_same(a: Tensor, b: Tensor) -> None:
    """Check that all bits are equal, but for the payload of NaN."""
    assert a.dtype == b.dtype
    assert torch.equal(a.isnan(), b.isnan())
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    assert torch.equal(a[~a.isnan()].view(bits), b[~b.isnan()].view(bits))


def test_every_code_and_scale_byte_has_its_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).expand(256, 256)
    scale = torch.arange(256, dtype=torch.uint8).view(256, 1).expand(256, 8)
    exact = VALUES * 2.0 ** (torch.arange(256).double() - 127).view(256, 1)
    exact[255] = float("nan")
    for dtype in DTYPES:
        assert_same(mxfp8.dequantize(codes, scale, dtype), exact.float().to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_are_floor_and_elements_the_nearest_even_value(dtype: torch.dtype) -> None:
    x = of(dtype)
    x = x[x.isfinite().all(-1)]
    codes, scale = mxfp8.quantize(x)
    exponent = torch.frexp(x.double().abs().amax(-1)).exponent - 1  # of m * 2^e
    zero = (x == 0).all(-1)
    assert zero.any()
    assert torch.equal(scale.view(-1)[~zero].int(), (exponent[~zero] - 8 + 127).clamp(min=0))
    assert not scale.view(-1)[zero].any()
    y = x.double() / 2.0 ** (scale.double() - 127)
    grid = VALUES[:127]
    at = torch.searchsorted(grid, y.abs().clamp(max=448), right=True).sub(1)
    low, high = grid[at], grid[(at + 1).clamp(max=126)]
    upper = (y.abs() - low > high - y.abs()) | ((y.abs() - low == high - y.abs()) & (at % 2 == 1))
    assert torch.equal((codes & 127).long(), torch.where(upper, (at + 1).clamp(max=126), at))
    assert torch.equal(codes >> 7 == 1, x.signbit())  # also of -0
    assert (y.abs() > 448).any()
    assert ((y.abs() - low == high - y.abs()) & (y != 0)).any()  # there are ties


@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantise_is_both_steps_and_exact_in_the_dtype(kernels: None, dtype: torch.dtype) -> None:
    x = of(dtype)
    got = mxfp8.fake_quantize(x)
    exact = mxfp8.dequantize(*mxfp8.quantize(x), torch.float32)
    assert_same(got, exact.to(dtype))
    assert_same(got.float(), exact)  # nothing is rounded a second time
    assert_same(mxfp8.fake_quantize(got), got)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_block_with_nan_or_inf_becomes_nan_and_no_other_block(kernels: None, bad: float, dtype: torch.dtype) -> None:
    x = torch.ones(3, 64, dtype=dtype)
    x[1, 40] = bad
    codes, scale = mxfp8.quantize(x)
    assert scale.tolist() == [[119, 119], [119, 255], [119, 119]]
    assert not codes[1, 32:].any()
    got = mxfp8.fake_quantize(x)
    assert got[1, 32:].isnan().all()
    got[1, 32:] = 1
    assert torch.equal(got, torch.ones(3, 64, dtype=dtype))


def test_large_tensors_on_several_threads_and_views(kernels: None) -> None:
    x = torch.randn(96, 3, 8192, generator=torch.Generator().manual_seed(0)).bfloat16()
    expected = torch.stack([mxfp8.fake_quantize(row) for row in x])
    assert torch.equal(mxfp8.fake_quantize(x), expected)
    assert torch.equal(mxfp8.fake_quantize(x.transpose(0, 1)), expected.transpose(0, 1))
    assert mxfp8.fake_quantize(x[:0]).shape == (0, 3, 8192)


def test_the_compiled_kernel_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[torch.Size] = []
    monkeypatch.setattr(native, "available", lambda: True)
    monkeypatch.setattr(native, "mxfp8_fake_quantize", lambda x, out: called.append(x.shape))
    mxfp8.fake_quantize(torch.ones(2, 64))
    assert called == [(4, 32)]


def test_the_gradient_is_passed_straight_through() -> None:
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    grad = torch.randn(4, 64)
    y = mxfp8.fake_quantize(x)
    assert not torch.equal(y, x)
    y.backward(grad)
    assert torch.equal(x.grad, grad)


def test_it_loses_less_than_mxfp4_by_far() -> None:
    from tests.helpers.sqnr import sqnr_db
    from verl_aqn.mxfp4 import fake_quantize

    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(0))
    assert sqnr_db(x, mxfp8.fake_quantize(x)) > 30 > 25 > sqnr_db(x, fake_quantize(x, "even"))


def test_what_it_does_not_take_is_refused() -> None:
    with pytest.raises(ModelError, match=r"shape \[2, 48\] to MXFP8: the last dimension must be a multiple of 32"):
        mxfp8.fake_quantize(torch.ones(2, 48))
    with pytest.raises(ModelError, match=r"cannot quantise torch.float64 to MXFP8"):
        mxfp8.quantize(torch.ones(2, 64, dtype=torch.float64))
    codes, scale = mxfp8.quantize(torch.ones(2, 64))
    with pytest.raises(ModelError, match=r"\[2, 64\] and scales torch.uint8 \[2, 1\] do not match"):
        mxfp8.dequantize(codes, scale[:, :1])


def test_all_finite_bf16_values_have_an_error_of_at_most_half_a_step() -> None:
    """Alone in a block each value is rounded to 4 significant bits, or clipped if its mantissa is above 1.75."""
    x = torch.zeros(65280, 32).bfloat16()
    x[:, 0] = all_finite_bf16()
    error = (mxfp8.fake_quantize(x)[:, 0].double() - x[:, 0].double()).abs()
    mantissa, exponent = torch.frexp(x[:, 0].double().abs())
    clipped = mantissa > 0.875 + 2**-5
    allowed = torch.where(clipped, mantissa - 0.875, 2.0**-5) * 2.0 ** exponent.double()
    assert (error[x[:, 0] != 0] <= allowed[x[:, 0] != 0]).all()
