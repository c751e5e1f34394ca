"""A second MXFP4 quantisation in NumPy, written directly from the definition: the reference for the kernels.

It is slow and deliberately avoids the codec's methods: exponents come from frexp, quotients are float64, and rounding
counts steps.
"""

import numpy as np

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def quantize(x: np.ndarray, scale_rule: str, rounding: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return packed uint8 [B, 16] and scale uint8 [B] of float32 ``x`` [B, 32]."""
    usable = np.isfinite(x).all(1)
    magnitude = np.where(usable[:, None], np.abs(x), 0)
    mantissa, exponent = np.frexp(magnitude.max(1))  # mantissa in [0.5, 1), or 0 for 0
    floor = exponent - 1 - 2
    if scale_rule == "mse":
        low, high = np.maximum(floor, -127), np.maximum(floor + 1, -127)
        better = 4 * squared_error(magnitude, high) < squared_error(magnitude, low)
        exponent = np.where(better, high, low)
    else:
        plus = {"floor": mantissa > 1, "even": mantissa >= 0.875, "rceil": mantissa > 0.75}[scale_rule]
        exponent = np.maximum(floor + plus, -127)
    exponent = np.where(magnitude.max(1) == 0, -127, exponent)
    u = uniform(x.size, seed).reshape(x.shape) if rounding == "stochastic" else None
    codes = round_codes(np.ldexp(magnitude.astype(np.float64), -exponent[:, None]), rounding, u)
    codes = np.where(usable[:, None], codes + 8 * np.signbit(x), 0).astype(np.uint8)
    return codes[:, 0::2] | codes[:, 1::2] << 4, np.where(usable, exponent + 127, 255).astype(np.uint8)


def values(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return the values, float64 [B, 32]; NaN for scale byte 255."""
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), 32)
    signed = np.where(codes & 8, -GRID[codes & 7], GRID[codes & 7])
    return np.where(scale == 255, np.nan, np.ldexp(1.0, scale.astype(int) - 127))[:, None] * signed


def round_codes(y: np.ndarray, rounding: str, u: np.ndarray | None = None) -> np.ndarray:
    """Return magnitude codes 0..7 of ``y`` >= 0; ``u`` in [0, 1) is for stochastic rounding."""
    p = np.select([y < 2, y < 4], [1, 2], 4)
    t = y * 2 / p
    steps = np.floor(t)
    rest = t - steps
    if rounding == "nearest":
        up = (rest > 0.5) | ((rest == 0.5) & (steps % 2 == 1))
    else:
        up = rest >= 0.5 if rounding == "half_away" else u < rest
    return np.minimum(steps + np.select([p == 1, p == 2], [0, 2], 4) + up, 7).astype(int)


def squared_error(magnitude: np.ndarray, exponent: np.ndarray) -> np.ndarray:
    """Return the sum of squared errors of rounding to nearest, in units of the scale, float64 [B]."""
    # float32, as in every kernel: a quotient below 2^-126 is rounded, which can decide a tie between two scales.
    y = np.ldexp(magnitude.astype(np.float32), -exponent[:, None]).astype(np.float64)
    s = (y - GRID[round_codes(y, "nearest")]) ** 2
    while s.shape[1] > 1:  # the summation tree of all backends
        s = s[:, : s.shape[1] // 2] + s[:, s.shape[1] // 2 :]
    return s[:, 0]


def uniform(n: int, seed: int) -> np.ndarray:
    """Return the random numbers of stochastic rounding for elements 0..n-1, float64 in [0, 1)."""
    group = np.arange(-(-n // 4), dtype=np.uint64)
    counter = np.stack([group & 0xFFFFFFFF, group >> 32, group * 0, group * 0])
    return (philox(counter, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF).T.reshape(-1)[:n] >> 8) * 2.0**-24


def philox(counter: np.ndarray, k0: int, k1: int) -> np.ndarray:
    """Return Philox4x32-10 of ``counter`` uint64 [4, N], each below 2^32 (Salmon et al. 2011; Random123)."""
    c0, c1, c2, c3 = counter.astype(np.uint64)
    word, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    for i in range(10):
        key0, key1 = np.uint64((k0 + i * 0x9E3779B9) & 0xFFFFFFFF), np.uint64((k1 + i * 0xBB67AE85) & 0xFFFFFFFF)
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = b >> half ^ c1 ^ key0, b & word, a >> half ^ c3 ^ key1, a & word
    return np.stack([c0, c1, c2, c3])
