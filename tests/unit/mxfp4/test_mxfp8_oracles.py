"""The MXFP8 codec against independent implementations: scale bytes and codes, to the last bit.

Compared blocks: for each of many block maxima, every finite bfloat16 value up to it; random blocks; in float32 also
values on each side of every tie. `SPECIAL` has the blocks on which implementations differ, and the tests say why.
"""

import sys
from pathlib import Path

import pytest
import torch
from test_mxfp4_codec import blocks_with_amax, random_blocks
from test_mxfp4_oracles import ones_and
from torch import Tensor

from verl_aqn.mxfp4 import mxfp8

# Every mantissa at one exponent; at others, those on each side of 1.75, from which on `floor` clips.
AMAX = [1 + m / 128 for m in range(128)] + [
    m * 2.0**e for e in (-117, -6, 100, 127) for m in (1.0, 1.7421875, 1.75, 1.7578125, 1.9375, 1.9921875)
]
VALUES = {torch.bfloat16: 5_421_216, torch.float32: 2_032_992}


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Return bfloat16 [B, 32]."""
    return torch.cat([*(blocks_with_amax(amax) for amax in AMAX), random_blocks().view(-1, 32)])


SPECIAL = {
    "zeros": torch.zeros(32),
    "negative zeros": torch.full((32,), -0.0),
    "a negative value that becomes zero": ones_and(-(2.0**-20)),
    "NaN": ones_and(float("nan")),
    "Inf": ones_and(float("inf")),
    "-Inf": ones_and(float("-inf")),
    "amax 2^-118": torch.full((32,), 2.0**-118),
    "amax 2^-119": torch.full((32,), 2.0**-119),
    "amax 2^-126": torch.full((32,), 2.0**-126),
    "amax 2^-133": torch.full((32,), 2.0**-133),
    "amax 1.9 * 2^127": torch.full((32,), 1.9 * 2.0**127),
}
NOT_FINITE = {"NaN", "Inf", "-Inf"}


def special_blocks() -> Tensor:
    return torch.stack(list(SPECIAL.values())).bfloat16()


def different(theirs: tuple[Tensor, Tensor]) -> set[str]:
    """Return the names of the special blocks whose (codes, scale) are not ours."""
    ours = mxfp8.quantize(special_blocks())
    same = (ours.codes == theirs[0]).all(-1) & (ours.scale == theirs[1]).all(-1)
    return {name for name, equal in zip(SPECIAL, same, strict=True) if not equal}


@pytest.fixture(scope="module")
def torchao():
    """torchao is outside the environment, where PEFT would import it into every process (scripts/setup.sh)."""
    folder = str(Path(sys.prefix) / "oracles")
    sys.path.insert(0, folder)
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx

    def quantize_(x: Tensor) -> tuple[Tensor, Tensor]:
        scale, codes = to_mx(x, torch.float8_e4m3fn, 32, ScaleCalculationMode.FLOOR)
        return codes.view(torch.uint8), scale.view(torch.uint8).view(len(x), -1)

    def dequantize_(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return to_dtype(
            codes.view(torch.float8_e4m3fn), scale.view(torch.float8_e8m0fnu), torch.float8_e4m3fn, 32, dtype
        )

    yield quantize_, dequantize_
    sys.path.remove(folder)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchao(dtype: torch.dtype, inputs: Tensor, torchao) -> None:
    quantize_, dequantize_ = torchao
    x = inputs.to(dtype)
    if dtype == torch.float32:  # values between the bfloat16 ones, on each side of every tie
        x = torch.cat([x[::8], x[::8] * (1 + 2**-20), x[::8] * (1 - 2**-20)])
    assert x.numel() == VALUES[dtype]
    codes, scale = mxfp8.quantize(x)
    theirs = quantize_(x)
    assert torch.equal(scale, theirs[1])
    assert torch.equal(codes, theirs[0])
    assert torch.equal(mxfp8.dequantize(codes, scale, dtype), dequantize_(codes, scale, dtype))
    # Theirs: NaN gets its scale byte, but also codes; Inf becomes a finite value (ours: NaN for both). Under scale byte
    # 0 values are divided by 2^-126, twice what the byte says.
    assert different(quantize_(special_blocks())) == NOT_FINITE | {"amax 2^-119", "amax 2^-126", "amax 2^-133"}


def test_compressed_tensors(inputs: Tensor) -> None:
    """Its scale is that of MXFP4's rule: one more than `floor` from a mantissa of 1.75 on. All else is ours."""
    from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=8, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype="torch.uint8"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for part in x.split(1 << 14):  # it makes several copies of every value
            amax = part.abs().amax(-1, keepdim=True)
            scale, _ = calculate_qparams(-amax, amax, args)
            done = MXFP8QuantizationCompressor.compress({"weight": part, "weight_scale": scale}, scheme)
            parts.append((done["weight"].view(torch.uint8), done["weight_scale"]))
        codes, scale = zip(*parts, strict=True)
        return torch.cat(codes), torch.cat(scale)

    mantissa, exponent = torch.frexp(inputs.float().abs().amax(-1))
    upper = (mantissa >= 0.875) & (exponent < 128)  # their 2^128 is Inf
    lower = mantissa < 0.875
    assert lower.sum() > upper.sum() > 10_000
    assert all(torch.equal(a, b) for a, b in zip(theirs(inputs[lower]), mxfp8.quantize(inputs[lower]), strict=True))
    codes, scale = theirs(inputs[upper])
    for place in (0, 1):  # one more value, of a magnitude that gives our rule their scale
        x = inputs[upper].index_fill(1, torch.tensor(place), 0)
        x[:, place] = torch.ldexp(torch.ones(len(x)), exponent[upper]).bfloat16()
        ours = mxfp8.quantize(x)
        assert torch.equal(ours.scale, scale)
        rest = torch.arange(32) != place
        assert torch.equal(ours.codes[:, rest], codes[:, rest])
    # NaN and Inf give scale byte 127 and arbitrary codes, and so does 2^128, which their rule makes of 1.9 * 2^127.
    assert different(theirs(special_blocks())) == NOT_FINITE | {"amax 1.9 * 2^127"}
    restored = MXFP8QuantizationCompressor.decompress(
        {"weight": codes.view(torch.float8_e4m3fn), "weight_scale": scale}, scheme
    )
    assert torch.equal(restored["weight"], mxfp8.dequantize(codes, scale))
