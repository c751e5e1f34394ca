"""MXFP4 quantise and dequantise in plain PyTorch.

The format (OCP Microscaling Formats v1.0): 32 consecutive values along K share one scale byte.

* Element E2M1, 4 bits: codes 0..7 are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and bit 3 is the sign. No Inf, no NaN. Two codes
  share a byte, the even index in the low nibble.
* Scale E8M0, 8 bits: byte b stands for 2^(b - 127); 255 is NaN; there is no zero.

With amax = m * 2^e, 1 <= m < 2, a scale rule chooses the scale's exponent:

========  =============================  ==================================================
``floor``  e - 2                         OCP's text; clips where m > 1.5
``even``   e - 2, plus 1 where m >= 1.75  amax rounded to E2M1's grid first; compressed-tensors
``rceil``  e - 2, plus 1 where m > 1.5    never clips; NVIDIA
``mse``    e - 2 or e - 1                 whichever has the smaller squared error; a tie takes e - 2
========  =============================  ==================================================

Elements are rounded to nearest, ties to even code, and saturate at 6. At the edges:

* -0 keeps its sign, and so does every negative value that rounds to zero.
* A block that holds NaN or an Inf gets scale byte 255 and codes 0, so that all its 32 values come back as NaN:
  nothing infinite becomes a plausible weight.
* An all-zero block gets scale byte 0 (2^-127) and comes back as zeros.
* A block with amax < 2^-124 would need a scale below 2^-127; it gets 2^-127, the smallest there is, and is rounded
  on that grid (values of at most 2^-129 become zero).
* Where the rule rounds amax up to 2^128 (``even`` from 1.75 * 2^127, ``rceil`` and ``mse`` likewise), the value comes
  back as Inf, since neither float32 nor bfloat16 holds 2^128.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from verl_aqn.errors import ModelError

BLOCK = 32
SCALE_RULES = ("mse", "even", "floor", "rceil")

_EXPONENT = 0x7F800000  # float32's exponent field; also the bit pattern of Inf
_NAN_SCALE = 255
# Added to amax's bit pattern before its exponent is read: the carry out of the mantissa is the rule's "plus 1".
_CARRY = {"floor": 0, "even": 0x200000, "rceil": 0x3FFFFF}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# Elements handled at a time on a CPU. Temporaries stay in the caches, and PyTorch runs an operator on less than 2^15
# elements on one thread: with more it waits for all threads after each, which is up to twice as fast on two idle cores
# and, measured on two busy ones, 10 times (dequantise) to 40 times (quantise) slower.
_CHUNK = 1023 * BLOCK


class Mxfp4Tensor(NamedTuple):
    """A quantised tensor of shape [..., N, K]."""

    packed: Tensor
    """uint8 [..., N, K/2]: two E2M1 codes a byte, the even index in the low nibble."""
    scale: Tensor
    """uint8 [..., N, K/32]: one E8M0 byte for each block along K."""


def quantize(x: Tensor, scale_rule: str = "even") -> Mxfp4Tensor:
    """Quantise ``x`` [..., K] (float32, bfloat16 or float16) in blocks of 32 along its last dimension.

    The module's docstring gives the scale rules and what becomes of -0, NaN, Inf, zero and tiny blocks.

    Raises:
        ModelError: K is not a multiple of 32, the dtype is another one, or the rule is unknown.
    """
    if scale_rule not in SCALE_RULES:
        raise ModelError(f"unknown scale rule {scale_rule!r}: use one of {', '.join(SCALE_RULES)}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ModelError(f"cannot quantise {x.dtype} to MXFP4: convert it to float32, bfloat16 or float16")
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ModelError(
            f"cannot quantise shape {list(x.shape)} to MXFP4: the last dimension must be a multiple of {BLOCK}; "
            "exclude this weight or pad it"
        )
    *lead, k = x.shape
    blocks = x.detach().reshape(-1, BLOCK)
    packed = torch.empty(blocks.shape[0], BLOCK // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(blocks.shape[0], 1, dtype=torch.uint8, device=x.device)
    for part in _chunks(blocks):
        packed[part], scale[part] = _quantize_blocks(blocks[part].float(), scale_rule)
    return Mxfp4Tensor(packed.view(*lead, k // 2), scale.view(*lead, k // BLOCK))


def dequantize(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16, out: Tensor | None = None) -> Tensor:
    """The values of ``packed`` uint8 [..., K/2] under ``scale`` uint8 [..., K/32], as ``dtype`` [..., K].

    Every value is exact in bfloat16 and float32 (2^128 aside, which becomes Inf); float16 rounds what it cannot hold.
    ``out``, contiguous and of the result's shape and dtype, receives the values without a new allocation.

    Raises:
        ModelError: the inputs are not uint8, or their shapes do not belong together.
    """
    *lead, half = packed.shape
    if packed.dtype != torch.uint8 or scale.dtype != torch.uint8:
        raise ModelError(f"packed codes and scales must be uint8, not {packed.dtype} and {scale.dtype}")
    if list(scale.shape) != [*lead, half // 16] or half % 16:
        raise ModelError(
            f"packed codes {list(packed.shape)} and scales {list(scale.shape)} do not belong together: "
            "for a weight [N, K] they are [N, K/2] and [N, K/32]"
        )
    shape = (*lead, 2 * half)
    if out is None:
        out = torch.empty(shape, dtype=dtype, device=packed.device)
    elif out.shape != shape or out.dtype != dtype or not out.is_contiguous():
        raise ModelError(f"out must be contiguous {dtype} {list(shape)}, not {out.dtype} {list(out.shape)}")
    values = out if dtype == torch.bfloat16 else torch.empty(shape, dtype=torch.bfloat16, device=packed.device)

    codes, scales = packed.reshape(-1), scale.reshape(-1)
    pairs, blocks = values.view(torch.int32).view(-1), values.view(-1, BLOCK)
    pair_table, scale_table = _tables(packed.device)
    for part in _chunks(blocks):
        bytes_ = slice(part.start * 16, part.stop * 16)
        torch.index_select(pair_table, 0, codes[bytes_].int(), out=pairs[bytes_])
        blocks[part] *= scale_table[scales[part].int()].unsqueeze(1)
    return out if values is out else out.copy_(values)


def fake_quantize(x: Tensor, scale_rule: str = "even") -> Tensor:
    """``x`` rounded to MXFP4, in its own dtype; the gradient passes straight through. Raises what `quantize` raises."""
    return _FakeQuantize.apply(x, scale_rule)


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Signal to quantisation noise of ``y``, a copy of ``x``, in dB: 10 log10(sum x^2 / sum (x - y)^2), or inf."""
    return ratio_db(*energies(x, y))


def energies(x: Tensor, y: Tensor) -> tuple[float, float]:
    """(sum x^2, sum (x - y)^2) in float64: what `sqnr_db` is made of, so that it can be pooled over tensors."""
    signal = noise = 0.0
    # In pieces: a float64 copy of a whole embedding would be four times its size.
    for a, b in zip(x.reshape(-1).split(1 << 20), y.reshape(-1).split(1 << 20), strict=True):
        a, b = a.double(), b.double()
        signal += a.square().sum().item()
        noise += (a - b).square().sum().item()
    return signal, noise


def ratio_db(signal: float, noise: float) -> float:
    """10 log10(signal / noise); inf without noise, NaN where either is."""
    if noise == 0:
        return float("inf")
    return (10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))).item()


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale_rule: str) -> Tensor:
        return dequantize(*quantize(x, scale_rule), dtype=x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _chunks(blocks: Tensor) -> list[slice]:
    """Slices over the rows of ``blocks`` [B, 32]; a single one off the CPU, where launches cost more than memory."""
    rows = blocks.shape[0]
    step = _CHUNK // BLOCK if blocks.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _quantize_blocks(x: Tensor, scale_rule: str) -> Mxfp4Tensor:
    """Float32 [B, 32] to packed uint8 [B, 16] and scale uint8 [B, 1]."""
    magnitude = x.abs()
    # Positive floats sort like their bit patterns, so this maximum also finds Inf and NaN.
    amax = magnitude.view(torch.int32).amax(-1, keepdim=True)
    if scale_rule == "mse":
        low, high = ((amax >> 23) - 2).clamp_(min=0), ((amax >> 23) - 1).clamp_(min=0)
        low_codes, low_error = _round(magnitude, low)
        high_codes, high_error = _round(magnitude, high)
        # Each error is in units of its own scale; the larger scale is twice the smaller.
        better = 4 * _sum_of_squares(high_error) < _sum_of_squares(low_error)
        exponent, codes = torch.where(better, high, low), torch.where(better, high_codes, low_codes)
    else:
        exponent = ((amax + _CARRY[scale_rule]) >> 23).sub_(2).clamp_(min=0)
        codes, _ = _round(magnitude, exponent)

    codes |= (x.view(torch.int32) >> 31) & 8
    unusable = amax >= _EXPONENT
    codes.masked_fill_(unusable, 0)
    exponent.masked_fill_(unusable, _NAN_SCALE)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return Mxfp4Tensor(packed.to(torch.uint8), exponent.to(torch.uint8))


def _round(magnitude: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 codes (int32, 0..7) of float32 ``magnitude`` [B, 32] under biased scale exponents int32 [B, 1], and errors.

    Dividing by a power of two is exact. Then y + C, with C = 2^22 * P and P the power of two in {1, 2, 4} below y,
    has a last place worth P/2, which is E2M1's step there: the addition itself rounds to nearest even, and the low bits
    of its pattern count the steps. The first step of the next P continues the count 2 * log2(P) codes further on.
    """
    y = magnitude * ((254 - exponent) << 23).view(torch.float32)
    p = (y.view(torch.int32) & _EXPONENT).clamp_(min=0x3F800000, max=0x40800000)
    c = p + (22 << 23)
    rounded = y + c.view(torch.float32)
    codes = (rounded.view(torch.int32) - c).add_((p >> 22).sub_(254)).clamp_(max=7)
    error = (rounded - c.view(torch.float32)).clamp_(max=6).sub_(y)
    return codes, error


def _sum_of_squares(error: Tensor) -> Tensor:
    # float64: the choice of a scale must not hang on the order in which a machine adds up 32 float32 numbers.
    return error.double().square_().sum(-1, keepdim=True)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """(int32 [256]: a byte's two values as a pair of bfloat16; bfloat16 [256]: a scale byte's value)."""
    # The cache outlives the caller's mode, and an inference tensor would be refused in training.
    with torch.inference_mode(False):
        byte = torch.arange(256)
        pairs = torch.tensor(_E2M1, dtype=torch.bfloat16)[torch.stack([byte & 15, byte >> 4], dim=1)]
        # A bfloat16 with exponent field b and no mantissa is 2^(b - 127), but for 0 (a subnormal) and 255 (Inf).
        scales = (byte << 7).to(torch.int16)
        scales[0], scales[_NAN_SCALE] = 0x0040, 0x7FC0
        return pairs.view(torch.int32).view(256).to(device), scales.view(torch.bfloat16).to(device)
