"""MXFP4 in plain Python, written from the format's definition: what the kernels of a device are compared with.

It shares nothing with `verl_aqn.mxfp4` and needs only the standard library. It is slow: use it for some hundred blocks.
`verl_aqn.mxfp4.codec` explains the scale rules, the roundings and the special blocks.
"""

import math
import struct
from collections.abc import Iterator, Sequence

GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAN_SCALE = 255
BIAS = 127


def quantize(
    blocks: Sequence[Sequence[float]], rule: str, rounding: str, seed: int = 0
) -> tuple[list[list[int]], list[int]]:
    """Return packed codes [B][16] and scale bytes [B] of float32 `blocks` [B][32]."""
    uniform = _uniform(32 * len(blocks), seed) if rounding == "stochastic" else []
    packed, scales = [], []
    for number, block in enumerate(blocks):
        if not all(map(math.isfinite, block)):
            packed.append([0] * 16)
            scales.append(NAN_SCALE)
            continue
        exponent = _exponent([abs(x) for x in block], rule)
        u = uniform[32 * number : 32 * number + 32] or [0.0] * 32
        codes = [
            round_code(math.ldexp(abs(x), -exponent), rounding, v) + (8 if math.copysign(1.0, x) < 0 else 0)
            for x, v in zip(block, u, strict=True)
        ]
        packed.append([low | high << 4 for low, high in zip(codes[0::2], codes[1::2], strict=True)])
        scales.append(exponent + BIAS)
    return packed, scales


def value(code: int, scale: int) -> float:
    """Return the value of a 4-bit code under a scale byte."""
    if scale == NAN_SCALE:
        return math.nan
    return math.ldexp(-GRID[code & 7] if code & 8 else GRID[code & 7], scale - BIAS)


def values(packed: Sequence[int], scale: int) -> list[float]:
    """Return the values of one block: 16 bytes of codes, the even index in the low nibble."""
    return [value(code, scale) for byte in packed for code in (byte & 15, byte >> 4)]


def _exponent(magnitude: list[float], rule: str) -> int:
    """Return the scale's exponent of a finite block, at least -127."""
    amax = max(magnitude)
    if amax == 0:
        return -BIAS
    mantissa, exponent = math.frexp(amax)  # mantissa in [0.5, 1)
    floor = exponent - 1 - 2
    if rule == "mse":
        low, high = max(floor, -BIAS), max(floor + 1, -BIAS)
        return high if 4 * _squared_error(magnitude, high) < _squared_error(magnitude, low) else low
    plus = {"floor": False, "even": mantissa >= 0.875, "rceil": mantissa > 0.75}[rule]
    return max(floor + plus, -BIAS)


def round_code(y: float, rounding: str, u: float = 0.0) -> int:
    """Return the magnitude's code 0..7 of y >= 0; `u` in [0, 1) is for stochastic rounding."""
    step, first = (0.5, 0) if y < 2 else (1.0, 2) if y < 4 else (2.0, 4)  # spacing, and codes before the first count
    count = math.floor(y / step)
    rest = y / step - count
    if rounding == "nearest":
        up = rest > 0.5 or (rest == 0.5 and count % 2 == 1)
    else:
        up = rest >= 0.5 if rounding == "half_away" else u < rest
    return min(count + up + first, 7)


def _squared_error(magnitude: list[float], exponent: int) -> float:
    """Return the sum of squared errors of rounding to nearest, in units of the scale, by a tree of fixed shape."""
    # Quotients are float32, as in every kernel: one below 2^-126 is rounded, which can decide a tie of two scales.
    scaled = [struct.unpack("f", struct.pack("f", math.ldexp(x, -exponent)))[0] for x in magnitude]
    s = [(y - GRID[round_code(y, "nearest")]) ** 2 for y in scaled]
    while len(s) > 1:
        half = len(s) // 2
        s = [a + b for a, b in zip(s[:half], s[half:], strict=True)]
    return s[0]


def _uniform(n: int, seed: int) -> list[float]:
    """Return the random numbers of stochastic rounding for elements 0..n-1, multiples of 2^-24 in [0, 1)."""
    words = (word for group in range(-(-n // 4)) for word in _philox(group, seed))
    return [(word >> 8) * 2.0**-24 for word, _ in zip(words, range(n), strict=False)]


def _philox(counter: int, seed: int) -> Iterator[int]:
    """Yield the four words of Philox4x32-10 (Salmon et al. 2011) at a 64-bit counter, with a 64-bit key."""
    word = 0xFFFFFFFF
    c = [counter & word, counter >> 32 & word, 0, 0]
    k0, k1 = seed & word, seed >> 32 & word
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k0, b & word, a >> 32 ^ c[3] ^ k1, a & word]
        k0, k1 = (k0 + 0x9E3779B9) & word, (k1 + 0xBB67AE85) & word
    yield from c
