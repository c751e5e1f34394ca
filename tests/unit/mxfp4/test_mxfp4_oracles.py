"""The codec against independent implementations: scale bytes and codes, to the last bit.

Compared blocks: for each of 149 block maxima, every finite bfloat16 value up to it; random blocks; every tie. `SPECIAL`
has the blocks on which implementations differ, and `DIFFERENCES` says which differ there, and why.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_mxfp4_codec import blocks_with_amax, random_blocks
from torch import Tensor

from verl_aqn.mxfp4 import dequantize, quantize

ROOT = Path(__file__).parents[3]

# Every mantissa at one exponent; at others, those on each side of the rules' thresholds (1.5, 1.75).
AMAX = [1 + m / 128 for m in range(128)] + [
    m * 2.0**e for e in (-120, -6, 100) for m in (1.0, 1.4921875, 1.5, 1.5078125, 1.7421875, 1.75, 1.9921875)
]
VALUES = {torch.bfloat16: 5_110_688, torch.float32: 1_916_544}  # compared with each oracle and rule


def ties() -> Tensor:
    """Return every tie and its neighbours, both signs, under amax 4, 6 and 7 at many exponents: bfloat16 [B, 32]."""
    tie = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    near = torch.cat([tie * (1 - 2**-8), tie, tie * (1 + 2**-7)])
    blocks = [
        torch.cat([torch.tensor([amax]), sign * near.clamp(max=amax), torch.zeros(10)]) * 2.0**e
        for amax in (4.0, 6.0, 7.0)
        for sign in (-1, 1)
        for e in range(-110, 111, 10)
    ]
    return torch.stack(blocks).bfloat16()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    """Return bfloat16 [B, 32]."""
    return torch.cat([*(blocks_with_amax(amax) for amax in AMAX), random_blocks().view(-1, 32), ties()])


def ones_and(value: float) -> Tensor:
    return torch.ones(32).index_fill(0, torch.tensor(3), value)


SPECIAL = {
    "zeros": torch.zeros(32),
    "negative zeros": torch.full((32,), -0.0),
    "a negative value that becomes zero": ones_and(-0.01),
    "NaN": ones_and(float("nan")),
    "Inf": ones_and(float("inf")),
    "-Inf": ones_and(float("-inf")),
    "amax 2^-124": torch.full((32,), 2.0**-124),
    "amax 2^-125": torch.full((32,), 2.0**-125),
    "amax 1.9 * 2^-125": torch.full((32,), 1.9 * 2.0**-125),
    "amax 2^-126": torch.full((32,), 2.0**-126),
    "amax 2^-127": torch.full((32,), 2.0**-127),
    "amax 2^-133": torch.full((32,), 2.0**-133),
    "amax 1.4 * 2^127": torch.full((32,), 1.4 * 2.0**127),
    "amax 1.9 * 2^127": torch.full((32,), 1.9 * 2.0**127),
}
NOT_FINITE = {"NaN", "Inf", "-Inf"}
DIFFERENCES = {
    # NaN gets its scale byte, but also codes; Inf becomes the largest value. (Ours: NaN for both.)
    # Under scale byte 0, values are divided by 2^-126, twice what the byte says (even, floor), or are lost (rceil).
    ("torchao", "even"): NOT_FINITE | {"amax 2^-125", "amax 2^-126", "amax 2^-127"},
    ("torchao", "floor"): NOT_FINITE | {"amax 2^-125", "amax 1.9 * 2^-125", "amax 2^-126", "amax 2^-127"},
    ("torchao", "rceil"): NOT_FINITE | {"amax 2^-125", "amax 2^-126", "amax 2^-127"},
    # -0 loses its sign, but a negative value that rounds to zero keeps it. NaN, Inf and 2^128 give scale byte
    # 127 and arbitrary codes.
    ("compressed-tensors", "even"): NOT_FINITE | {"negative zeros", "amax 1.9 * 2^127"},
    # A maximum that ignores NaN. Inf and 2^128 get scale byte 254; ours for 2^128 is 253, with elements twice as
    # large (both come back as Inf). And 2^-127 is lost by Triton's interpreter, which reads subnormal bfloat16 as 0.
    ("vLLM", "even"): NOT_FINITE | {"amax 1.9 * 2^127", "amax 2^-127"},
}


def assert_equal_but_for(x: Tensor, rule: str, theirs: tuple[Tensor, Tensor], special: tuple[Tensor, Tensor], who: str):
    """Check that ``theirs`` (packed, scale) equals ours for ``x``, except for the known cases in ``special``."""
    assert x.numel() == VALUES[x.dtype]
    packed, scale = quantize(x, rule)
    assert torch.equal(scale, theirs[1])
    assert torch.equal(packed, theirs[0])
    ours = quantize(special_blocks(), rule)
    same = (ours.packed == special[0]).all(-1) & (ours.scale == special[1]).all(-1)
    assert {name for name, equal in zip(SPECIAL, same, strict=True) if not equal} == DIFFERENCES[who, rule]


def special_blocks() -> Tensor:
    return torch.stack(list(SPECIAL.values())).bfloat16()


@pytest.fixture(scope="module")
def torchao():
    """torchao is outside the environment, where PEFT would import it into every process (scripts/setup.sh)."""
    folder = str(Path(sys.prefix) / "oracles")
    sys.path.insert(0, folder)
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    def quantize_(x: Tensor, rule: str) -> tuple[Tensor, Tensor]:
        scale, packed = to_mx(x, torch.float4_e2m1fn_x2, 32, ScaleCalculationMode[rule.upper()])
        return packed.view(torch.uint8).view(len(x), -1), scale.view(torch.uint8)

    yield quantize_
    sys.path.remove(folder)


@pytest.mark.parametrize("rule", ["even", "floor", "rceil"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchao(rule: str, dtype: torch.dtype, inputs: Tensor, torchao) -> None:
    x = inputs.to(dtype)
    if dtype == torch.float32:  # values between the bfloat16 ones, on each side of every tie
        x = torch.cat([x[::8], x[::8] * (1 + 2**-20), x[::8] * (1 - 2**-20)])
        # Theirs: rceil takes log2(amax / 6) in float32, which rounds an amax within 2^-20 above 1.5 * 2^e down to it.
        near = torch.frexp(x.abs().amax(-1)).mantissa / 0.75 - 1
        x[(near != 0) & (near.abs() < 2**-18)] = 0
    assert_equal_but_for(x, rule, torchao(x, rule), torchao(special_blocks(), rule), "torchao")


def test_compressed_tensors(inputs: Tensor) -> None:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(
        num_bits=4, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype="torch.uint8"
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)

    def theirs(x: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for part in x.split(1 << 14):  # it makes 8 copies of every value
            amax = part.abs().amax(-1, keepdim=True)
            scale, _ = calculate_qparams(-amax, amax, args)
            done = MXFP4PackedCompressor.compress({"weight": part, "weight_scale": scale}, scheme)
            parts.append((done["weight_packed"], done["weight_scale"]))
        packed, scale = zip(*parts, strict=True)
        return torch.cat(packed), torch.cat(scale)

    # No -0 (see DIFFERENCES), neither as such nor as a quotient that underflows.
    quotient = inputs / torch.exp2(quantize(inputs, "even").scale.float() - 127).bfloat16()
    x = inputs.masked_fill(quotient == 0, 0)
    assert_equal_but_for(x, "even", theirs(x), theirs(special_blocks()), "compressed-tensors")
    packed, scale = quantize(inputs, "even")
    restored = MXFP4PackedCompressor.decompress({"weight_packed": packed, "weight_scale": scale}, scheme)["weight"]
    assert torch.equal(restored, dequantize(packed, scale))


VLLM = """
import sys, torch, triton, triton.language
import vllm.triton_utils
# vLLM puts stand-ins here where there is no GPU driver; the interpreter needs none.
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, triton.language
from vllm.model_executor.layers.quantization.utils.mxfp4_utils import downcast_to_mxfp
inputs = torch.load(sys.argv[1])
torch.save([downcast_to_mxfp(x, axis=-1, BLOCK_OUT_DIM=1 << 15)[:2] for x in inputs], sys.argv[2])
"""


def test_vllm_triton_kernel(inputs: Tensor, tmp_path: Path) -> None:
    torch.save([inputs, special_blocks()], tmp_path / "in")
    done = subprocess.run(
        [sys.executable, "-c", VLLM, tmp_path / "in", tmp_path / "out"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    theirs, special = torch.load(tmp_path / "out")
    assert_equal_but_for(inputs, "even", theirs, special, "vLLM")
