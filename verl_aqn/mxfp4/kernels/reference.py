"""MXFP4 in plain PyTorch: the other kernels must match it bit for bit; it runs where no other kernel does."""

import functools

import torch
from torch import Tensor

BLOCK = 32
_EXPONENT = 0x7F800000  # float32's exponent field; also the bit pattern of Inf
NAN_SCALE = 255
# Added to amax's bit pattern before its exponent is read: the carry out of the mantissa is the rule's "plus 1".
_CARRY = {"floor": 0, "even": 0x200000, "rceil": 0x3FFFFF}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # magnitudes of codes 0 to 7; bit 3 is the sign
# Number of elements per chunk on a CPU. Temporary tensors then stay in the caches, and PyTorch uses one thread for an
# operator on less than 2^15 elements. For more elements it waits for all threads after each operator: this is up to
# twice as fast on two idle cores, but on two busy cores it was measured to be 10 times (dequantise) to 40 times
# (quantise) slower.
_CHUNK = 1023 * BLOCK


def quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, packed: Tensor, scale: Tensor) -> None:
    """Fill ``packed`` uint8 [B, 16] and ``scale`` uint8 [B] from ``x`` [B, 32]."""
    for part in chunks(x):
        uniform = None
        if rounding == "stochastic":
            uniform = uniform24(torch.arange(part.start * BLOCK, part.stop * BLOCK, device=x.device), seed)
            uniform = uniform.view(-1, BLOCK)
        packed[part], scale[part] = _quantize_blocks(x[part].float(), scale_rule, rounding, uniform)


def dequantize(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` [B, 32] with the values of ``packed`` [B, 16] and ``scale`` [B]."""
    values = out if out.dtype == torch.bfloat16 else torch.empty_like(out, dtype=torch.bfloat16)
    pair_table, scale_table = _tables(packed.device)
    codes, pairs = packed.view(-1), values.view(-1).view(torch.int32)
    for part in chunks(values):
        bytes_ = slice(part.start * 16, part.stop * 16)
        torch.index_select(pair_table, 0, codes[bytes_].int(), out=pairs[bytes_])
        values[part] *= scale_table[scale[part].int()].unsqueeze(1)
    if values is not out:
        out.copy_(values)


def fake_quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, out: Tensor) -> None:
    """Fill ``out`` [B, 32] with the rounded values of ``x`` [B, 32]; both have the same dtype."""
    packed = torch.empty(x.shape[0], BLOCK // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.uint8, device=x.device)
    quantize(x, scale_rule, rounding, seed, packed, scale)
    dequantize(packed, scale, out)


def uniform24(index: Tensor, seed: int) -> Tensor:
    """Return one float32 random number in [0, 1), a multiple of 2^-24, for each element of the int64 ``index``.

    The number depends only on (seed, index). It is the upper 24 bits of word index % 4 of Philox4x32-10 (Salmon et al.,
    "Parallel random numbers: as easy as 1, 2, 3", 2011) at counter (index // 4, 0), with ``seed`` as the 64-bit key.
    """
    word32 = 0xFFFFFFFF
    counter = index >> 2
    c0, c1 = counter & word32, counter >> 32
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & word32, seed >> 32 & word32
    for _ in range(10):
        # Products of two 32-bit numbers overflow int64; the mask removes the effect.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & word32) ^ c1 ^ k0, p1 & word32, (p0 >> 32 & word32) ^ c3 ^ k1, p0 & word32
        k0, k1 = k0 + 0x9E3779B9 & word32, k1 + 0xBB67AE85 & word32
    words = torch.stack([c0, c1, c2, c3]).gather(0, (index & 3).unsqueeze(0)).squeeze(0)
    return (words >> 8).float() * 2.0**-24


def chunks(x: Tensor) -> list[slice]:
    """Return slices over the rows of ``x`` [B, 32]; only one on other devices, where launches cost more than memory."""
    rows = x.shape[0]
    step = _CHUNK // BLOCK if x.device.type == "cpu" else max(rows, 1)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _quantize_blocks(x: Tensor, scale_rule: str, rounding: str, uniform: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantise float32 [B, 32] to packed uint8 [B, 16] and scale uint8 [B]."""
    magnitude = x.abs()
    # Positive floats sort like their bit patterns, so this maximum also finds Inf and NaN.
    amax = magnitude.view(torch.int32).amax(-1, keepdim=True)
    if scale_rule == "mse":
        low, high = ((amax >> 23) - 2).clamp_(min=0), ((amax >> 23) - 1).clamp_(min=0)
        low_codes, low_error = _round_nearest(magnitude, low)
        high_codes, high_error = _round_nearest(magnitude, high)
        # Each error is in units of its own scale; the larger scale is twice the smaller.
        better = 4 * _sum_of_squares(high_error) < _sum_of_squares(low_error)
        exponent, codes = torch.where(better, high, low), torch.where(better, high_codes, low_codes)
    else:
        exponent = ((amax + _CARRY[scale_rule]) >> 23).sub_(2).clamp_(min=0)
        codes, _ = _round_nearest(magnitude, exponent)
    if rounding != "nearest":
        codes = _round_by_fraction(magnitude, exponent, uniform)

    codes |= (x.view(torch.int32) >> 31) & 8
    unusable = amax >= _EXPONENT
    codes.masked_fill_(unusable, 0)
    exponent.masked_fill_(unusable, NAN_SCALE)
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    return packed.to(torch.uint8), exponent.squeeze(1).to(torch.uint8)


def _round_nearest(magnitude: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Return the E2M1 codes (int32, 0..7) of float32 ``magnitude`` [B, 32], and the rounding errors.

    ``exponent`` int32 [B, 1] holds the biased exponents of the scales. Dividing by a power of two is exact; let y be
    the quotient, P the power of two in {1, 2, 4} at or below y, and C = 2^22 * P. The last place of y + C is worth P/2,
    which is the step of E2M1 there. So the addition rounds to nearest even, and the low bits of its bit pattern count
    the steps. For the next P the count continues 2 * log2(P) codes higher.
    """
    y, p = _scaled(magnitude, exponent)
    c = p + (22 << 23)
    rounded = y + c.view(torch.float32)
    codes = (rounded.view(torch.int32) - c).add_((p >> 22).sub_(254)).clamp_(max=7)
    error = (rounded - c.view(torch.float32)).clamp_(max=6).sub_(y)
    return codes, error


def _round_by_fraction(magnitude: Tensor, exponent: Tensor, uniform: Tensor | None) -> Tensor:
    """Return codes as `_round_nearest` does, but rounded up by the fraction of a step.

    A code is rounded up if its fraction exceeds ``uniform`` [B, 32], or without ``uniform`` if it is at least a half.
    """
    y, p = _scaled(magnitude, exponent)
    t = y.clamp_(max=6) * ((255 << 23) - p).view(torch.float32)  # in units of a step; this and the fraction are exact
    steps = t.int()
    fraction = t - steps
    up = fraction >= 0.5 if uniform is None else uniform < fraction
    return (steps + up).add_((p >> 22).sub_(254)).clamp_(max=7)


def _scaled(magnitude: Tensor, exponent: Tensor) -> tuple[Tensor, Tensor]:
    """Return (magnitude in units of the scale, bit pattern of P, the power of two in {1, 2, 4} at or below it)."""
    y = magnitude * ((254 - exponent) << 23).view(torch.float32)
    return y, (y.view(torch.int32) & _EXPONENT).clamp_(min=0x3F800000, max=0x40800000)


def _sum_of_squares(error: Tensor) -> Tensor:
    """Sum the squares of [B, 32] to float64 [B, 1].

    The sum is a tree of fixed shape, so that the choice of a scale does not depend on the machine.
    """
    squares = error.double().square_()
    while (half := squares.shape[1] // 2) > 0:
        squares = squares[:, :half] + squares[:, half:]
    return squares


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return int32 [256], the two values of a byte as a pair of bfloat16, and bfloat16 [256], the scale of a byte."""
    # The tables are cached, and a tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        byte = torch.arange(256)
        values = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.bfloat16)
        pairs = values[torch.stack([byte & 15, byte >> 4], dim=1)]
        # A bfloat16 with exponent field b and mantissa 0 is 2^(b - 127), except for b = 0 (subnormal) and 255 (Inf).
        scales = (byte << 7).to(torch.int16)
        scales[0], scales[NAN_SCALE] = 0x0040, 0x7FC0
        return pairs.view(torch.int32).view(256).to(device), scales.view(torch.bfloat16).to(device)
