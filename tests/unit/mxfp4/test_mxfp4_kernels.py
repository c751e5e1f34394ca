"""The compiled kernels against the plain ones, rounding against its definition, and fallback without a compiler."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from test_mxfp4_codec import GRID, every_input
from torch import Tensor

from tests.helpers.builds import compile_for_any_cpu
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4 import dequantize, fake_quantize, quantize
from verl_aqn.mxfp4.codec import ROUNDINGS, SCALE_RULES, dequantize_transposed
from verl_aqn.mxfp4.error_split import split_error
from verl_aqn.mxfp4.kernels import native, reference


def hard_inputs() -> Tensor:
    """Return float32 blocks: around every tie, arbitrary bit patterns, subnormals, and ordinary weights."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.randint(-(1 << 31), 1 << 31, (20_000, 32), generator=generator).to(torch.int32)
    tiny = torch.randint(0, 0x01000000, (500, 32), generator=generator, dtype=torch.int32)
    x = every_input()[::8].float()
    floats = [patterns.view(torch.float32), tiny.view(torch.float32), torch.randn(2000, 32, generator=generator)]
    return torch.cat([x, x * (1 + 2**-20), x * (1 - 2**-20), *floats])


def run(kernel, x: Tensor, rule: str, rounding: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    packed = torch.empty(len(x), 16, dtype=torch.uint8)
    scale = torch.empty(len(x), dtype=torch.uint8)
    kernel.quantize(x, rule, rounding, 7, packed, scale)
    restored, fake = torch.empty_like(x), torch.empty_like(x)
    kernel.dequantize(packed, scale, restored)
    kernel.fake_quantize(x, rule, rounding, 7, fake)
    return packed, scale, restored, fake


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    nan = a.isnan()  # the payload of a NaN is not compared
    assert torch.equal(nan, b.isnan())
    bits = {2: torch.int16, 4: torch.int32}[a.itemsize]
    assert torch.equal(a[~nan].view(bits), b[~nan].view(bits))


@pytest.fixture(scope="module", params=["this CPU", "any CPU"])
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Compile the kernels for this CPU, and for the oldest one of its kind: that build has no AVX-512."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "any CPU":
            compile_for_any_cpu(patch, tmp_path_factory.mktemp("cache"))
        yield request.param


def test_the_compiled_kernels_are_there() -> None:
    assert native.status().available, native.status().detail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_native_equals_reference(build: str, rule: str, rounding: str, dtype: torch.dtype) -> None:
    x = hard_inputs().to(dtype)
    ours, theirs = run(native, x, rule, rounding), run(reference, x, rule, rounding)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert_same_bits(ours[2], theirs[2])
    assert_same_bits(ours[3], theirs[2])
    assert_same_bits(theirs[3], theirs[2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_byte_with_every_scale(build: str, dtype: torch.dtype) -> None:
    packed = torch.arange(256, dtype=torch.uint8).view(1, 16, 16).expand(256, 16, 16).reshape(-1, 16)
    scale = torch.arange(256, dtype=torch.uint8).repeat_interleave(16)
    ours, theirs = torch.empty(len(packed), 32, dtype=dtype), torch.empty(len(packed), 32, dtype=dtype)
    native.dequantize(packed, scale, ours)
    reference.dequantize(packed, scale, theirs)
    assert_same_bits(ours, theirs)


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_larger_than_the_caches(
    build: str, dtype: torch.dtype, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are written past the caches where the memory is aligned for it."""
    monkeypatch.setattr(native, "_threads", lambda blocks: 1)
    blocks = (1 << 25) // (32 * dtype.itemsize) + 3
    x = torch.randn(1000, 32, generator=torch.Generator().manual_seed(6)).to(dtype)
    codes = [part.repeat(blocks // 1000 + 1, *[1] * (part.dim() - 1))[:blocks] for part in quantize(x, "mse")]
    codes[1] = codes[1].reshape(-1)
    out = torch.full((blocks * 32 + shift + 1,), 99, dtype=dtype)
    native.dequantize(*codes, out[shift:-1].view(-1, 32))
    expected = fake_quantize(x, "mse").repeat(blocks // 1000 + 1, 1)[:blocks]
    assert torch.equal(out[shift:-1].view(-1, 32), expected)
    assert out[-1] == 99


@pytest.mark.parametrize("blocks", [1, 2, 15, 16, 17, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_is_written_beyond_the_last_block(build: str, blocks: int, dtype: torch.dtype) -> None:
    """The blocks are at an odd address for their dtype's vectors, and lie between others that must not change."""
    x = torch.randn(blocks * 32 + 1, generator=torch.Generator().manual_seed(blocks)).to(dtype)[1:].view(-1, 32)
    codes, scales = torch.full((blocks + 2, 16), 99, dtype=torch.uint8), torch.full((blocks + 2,), 99).byte()
    values, fakes = torch.full((2, blocks * 32 + 65), 99.0, dtype=dtype)
    native.quantize(x, "mse", "nearest", 0, codes[1:-1], scales[1:-1])
    native.dequantize(codes[1:-1], scales[1:-1], values[33:-32].view(-1, 32))
    native.fake_quantize(x, "mse", "nearest", 0, fakes[33:-32].view(-1, 32))
    expected = run(reference, x, "mse", "nearest")
    for whole, inside, by_reference in zip(
        (codes, scales, values, fakes),
        (codes[1:-1], scales[1:-1], values[33:-32].view(-1, 32), fakes[33:-32].view(-1, 32)),
        expected,
        strict=True,
    ):
        assert torch.equal(inside, by_reference)
        assert (whole == 99).sum() == whole.numel() - inside.numel() + (by_reference == 99).sum()


def excess(y: Tensor) -> Tensor:
    """Return how much larger the squared error of y [B, 32] is with scale 2 than with scale 1, float64 [B]."""
    step = torch.where(y < 2, 0.5, torch.where(y < 4, 1.0, 2.0)).double()
    finer = y - ((y / step).round() * step).clamp(max=6)
    step = torch.where(y < 4, 1.0, 2.0).double()
    return ((y - (y / step).round() * step).square() - finer.square()).sum(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_that_fit_almost_equally_well(build: str, dtype: torch.dtype) -> None:
    """The rule mse decides by the last bits of two sums here; a tie takes the smaller scale."""
    generator = torch.Generator().manual_seed(2)
    y = torch.rand(40_000, 32, generator=generator, dtype=torch.float64) * torch.tensor([4.0] * 16 + [1.0] * 16)
    y[:, :3] += 4
    y = y.to(dtype).double()
    # An element of 1/4 + d, 0 <= d <= 1/4, adds d to the excess.
    y[:, 20] = 0.25
    y[:, 20] -= excess(y)
    y = y[(y[:, 20] >= 0.25) & (y[:, 20] <= 0.5)]
    assert len(y) > 1000
    nudges = torch.tensor([0.0, 1e-9, -1e-9, 1e-7, -1e-7, 1e-5, -1e-5, 1e-3, -1e-3, 0.004]).double()
    y[:, 20] += nudges[torch.arange(len(y)) % len(nudges)]
    y = y.to(dtype).double()
    for bound in (2.0**-12, 2.0**-7):
        assert (excess(y).abs() < bound).sum() > 100
        assert (excess(y).abs() >= bound / 4).sum() > 100
    sign = 1 - 2 * torch.randint(2, y.shape, generator=generator)
    exponent = torch.randint(-110, 110, (len(y), 1), generator=generator)
    x = (y * sign * torch.exp2(exponent.double())).to(dtype)
    ours, theirs = run(native, x, "mse", "nearest"), run(reference, x, "mse", "nearest")
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)
    larger = theirs[1].long() - 127 - exponent.view(-1)
    decided = excess(y).abs() > 1e-12
    assert torch.equal(larger[decided], (excess(y)[decided] < 0).long())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_every_scale(build: str, rule: str, dtype: torch.dtype) -> None:
    """Include both ends of the range, where float32 has subnormal values and the scale cannot become smaller."""
    x = torch.randn(280, 8, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = (x * torch.exp2(torch.arange(-150.0, 130.0, dtype=torch.float64)).view(-1, 1, 1)).to(dtype).view(-1, 32)
    for a, b in zip(run(native, x, rule, "nearest"), run(reference, x, rule, "nearest"), strict=True):
        assert_same_bits(a.float(), b.float())


@pytest.mark.parametrize("shape", [(1, 32), (31, 64), (32, 32), (97, 96), (1100, 160)])
@pytest.mark.parametrize("ends", [False, True])
def test_transposed(build: str, shape: tuple[int, int], ends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not fill a tile, scales at both ends of the range, and several threads."""
    generator = torch.Generator().manual_seed(5)
    n, k = shape
    packed = torch.randint(256, (n, k // 2), dtype=torch.uint8, generator=generator)
    low, high = (0, 256) if ends else (2, 253)
    scale = torch.randint(low, high, (n, k // 32), dtype=torch.uint8, generator=generator)
    expected = dequantize(packed, scale).t()
    for threads in (1, min(3, k // 32)):
        monkeypatch.setattr(native, "_threads", lambda blocks, t=threads: t)
        out = torch.full((k, n), 99, dtype=torch.bfloat16)
        assert dequantize_transposed(packed, scale, out) is out
        assert_same_bits(out, expected.contiguous())
    monkeypatch.setattr(native, "available", lambda: False)
    assert_same_bits(dequantize_transposed(packed, scale, torch.empty_like(out)), out)
    with pytest.raises(ModelError, match="out must be contiguous"):
        dequantize_transposed(packed, scale, torch.empty(n, k + 1, dtype=torch.bfloat16))


def test_both_builds_find_the_parts_of_the_error(build: str) -> None:
    x = torch.randn(3000, 32, generator=torch.Generator().manual_seed(4))
    codes = quantize(x, "mse")
    expected = split_error(x.double(), *codes)  # in plain PyTorch
    assert split_error(x, *codes) == pytest.approx(expected, rel=1e-12)


def test_threads_do_not_show(build: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(40_000, 32, generator=torch.Generator().manual_seed(0))
    alone = run(native, x, "even", "stochastic")
    monkeypatch.setattr(native, "_threads", lambda blocks: 7)
    for a, b in zip(alone, run(native, x, "even", "stochastic"), strict=True):
        assert torch.equal(a, b)


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> list[int]:
    """Compute Philox4x32-10 with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = p1 >> 32 ^ c1 ^ k0, p1 & 0xFFFFFFFF, p0 >> 32 ^ c3 ^ k1, p0 & 0xFFFFFFFF
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def test_random_numbers_are_philox() -> None:
    # Known answers of Random123 1.14.0 (kat_vectors): philox4x32, 10 rounds.
    assert philox4x32((0,) * 4, (0, 0)) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox4x32((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    seed = 0x123456789ABCDEF0
    index = [0, 1, 2, 3, 4, 1023, (1 << 40) + 5]
    words = [philox4x32((i >> 2 & 0xFFFFFFFF, i >> 34, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[i & 3] for i in index]
    expected = np.array([(word >> 8) / 2**24 for word in words], dtype=np.float32)
    assert np.array_equal(reference.uniform24(torch.tensor(index), seed).numpy(), expected)


@pytest.mark.parametrize("rounding", ["half_away", "stochastic"])
@pytest.mark.parametrize("rule", SCALE_RULES)
def test_rounding_by_definition(rule: str, rounding: str) -> None:
    """Codes follow from the two grid points around every value, in float64."""
    x = hard_inputs()
    x = x[x.isfinite().all(-1)]
    packed, scale = quantize(x, rule, rounding, seed=3)
    assert torch.equal(scale, quantize(x, rule).scale)
    y = (x.double().abs() / 2.0 ** (scale.double() - 127)).clamp(max=6)
    below = torch.searchsorted(GRID.double(), y, right=True).sub_(1).clamp_(max=6)
    low, high = GRID.double()[below], GRID.double()[below + 1]
    fraction = (y - low) / (high - low)
    uniform = reference.uniform24(torch.arange(x.numel()), 3).view(x.shape)
    up = fraction >= 0.5 if rounding == "half_away" else uniform < fraction
    got = torch.stack([packed & 7, packed >> 4 & 7], dim=-1).view(x.shape)
    assert torch.equal(got.long(), below + up)
    if rounding == "half_away":
        assert ((fraction == 0.5) & (below % 2 == 0)).any()  # ties that half to even would round down


def test_stochastic_rounding_is_unbiased() -> None:
    x = torch.randn(64, generator=torch.Generator().manual_seed(0)).expand(20_000, 64)
    rounded = fake_quantize(x, "rceil", "stochastic", seed=11).double()
    error = (rounded.mean(0) - x[0].double()) / (rounded.std(0) / 20_000**0.5).clamp(min=1e-12)
    assert error.abs().max() < 4.5  # 64 standard normal numbers exceed it once in 2,000
    assert not torch.equal(rounded, fake_quantize(x, "rceil", "stochastic", seed=12).double())
    assert torch.equal(rounded, fake_quantize(x, "rceil", "stochastic", seed=11).double())


@pytest.mark.parametrize("k", [1, 31, 33, 95])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fake_quantize_of_any_length(k: int, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, k, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    padded = torch.zeros(3, 5, -(-k // 32) * 32, dtype=dtype)
    padded[..., :k] = x.detach()
    y = fake_quantize(x, "mse")
    assert torch.equal(y, dequantize(*quantize(padded, "mse"), dtype)[..., :k])
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    out = torch.empty(3, 5, k, dtype=dtype)
    assert fake_quantize(x.detach(), "mse", out=out).data_ptr() == out.data_ptr()
    assert torch.equal(out, y)
    assert fake_quantize(torch.randn(0, k)).shape == (0, k)


@pytest.mark.parametrize("k", [32, 64])
def test_slices_are_read_as_they_are_seen(k: int) -> None:
    """Rows have their own stride: kernels that take pointers must not read past the slice."""
    wide = torch.randn(40, 4 * k, generator=torch.Generator().manual_seed(0))
    for x in (wide[:, k : 2 * k], wide[:k].t()[:, :32] if k == 32 else wide[::2, :k]):
        plain = x.contiguous()
        codes, expected = quantize(x), quantize(plain)
        assert torch.equal(codes.packed, expected.packed)
        assert torch.equal(codes.scale, expected.scale)
        assert torch.equal(fake_quantize(x), fake_quantize(plain))
    codes = quantize(wide)
    packed, scale = codes.packed[:, k // 2 : k], codes.scale[:, k // 32 : k // 16]
    assert torch.equal(dequantize(packed, scale), dequantize(packed.contiguous(), scale.contiguous()))


def test_out_is_filled_and_checked() -> None:
    x = torch.randn(4, 64)
    expected = quantize(x, "mse")
    out = type(expected)(torch.empty(4, 32, dtype=torch.uint8), torch.empty(4, 2, dtype=torch.uint8))
    assert quantize(x, "mse", out=out) is out
    assert torch.equal(out.packed, expected.packed)
    assert torch.equal(out.scale, expected.scale)
    with pytest.raises(ModelError, match=r"out must be contiguous torch.uint8 \[4, 2\]"):
        quantize(x, out=out._replace(scale=out.packed))
    with pytest.raises(ModelError, match="unknown rounding 'up'"):
        quantize(x, rounding="up")


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_inside_torch_compile(rounding: str) -> None:
    def roundtrip(x: Tensor) -> tuple[Tensor, Tensor]:
        packed, scale = quantize(x, "mse", rounding)
        return dequantize(packed, scale, torch.float32), fake_quantize(2 * x, "mse", rounding)

    x = torch.randn(8, 64, requires_grad=True)
    values, fake = torch.compile(roundtrip, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(values, roundtrip(x)[0])
    assert torch.equal(fake, roundtrip(x)[1])
    fake.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2))


CHILD = """
import torch
from verl_aqn.mxfp4 import fake_quantize
from verl_aqn.mxfp4.kernels import native
print(float(fake_quantize(torch.tensor([5.0])))), print(native.status())
"""


def child(tmp_path: Path, **environment: str) -> subprocess.Popen:
    environment = {**os.environ, "VERL_AQN_CACHE": str(tmp_path), **environment}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"PATH": "/nonexistent"}, "no C++ compiler"),
        ({"CXX": "false"}, "could not compile|false"),
        ({"VERL_AQN_NATIVE": "0"}, "switched off"),
        ({"VERL_AQN_CACHE": "/proc/none"}, "cannot build"),
    ],
)
def test_without_a_compiler_the_plain_kernels_serve(tmp_path: Path, environment: dict[str, str], reason: str) -> None:
    process = child(tmp_path, **environment)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.startswith("4.0\nStatus(available=False")
    assert any(part in out for part in reason.split("|"))


def test_processes_may_race_to_compile(tmp_path: Path) -> None:
    children = [child(tmp_path) for _ in range(2)]
    for process in children:
        out, err = process.communicate(timeout=600)
        assert "available=True" in out, err
    assert [file.suffix for file in (tmp_path / "kernels").iterdir()] == [".so"]
