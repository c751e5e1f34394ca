"""MXFP4 on a GPU: Triton kernels with the same bits as `reference`.

All three kernels are limited by memory bandwidth. A thread therefore reads or writes exactly 16 bytes of floating-point
data at a time, contiguous over a warp, and no data passes through shared memory. These 16 bytes correspond to one
*word* of codes: 8 codes (32 bits) for a 2-byte dtype, 4 codes (16 bits) for float32. The threads of a block are 4 (8)
lanes of a warp, and its maximum takes 2 (3) lane shuffles. A program processes one word per thread _STEPS times. (In
quantising, ptxas moves the later loads behind the arithmetic of the first step, which saves registers. The memory is
kept busy by the large number of threads on a multiprocessor.)

The kernels use no instruction that only some GPUs have. All arithmetic is exact except for the rounding itself, so that
the other backends are free in their order of operations. The one exception is the squared errors of the ``mse`` rule:
every backend adds them in float64 with the same tree.

Set ``TRITON_INTERPRET=1`` in the environment to run the kernels on a CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_WARPS, _STEPS = 4, 4
_WORDS = 32 * _WARPS  # words that a program processes in a step, one per thread
# Fused multiply-adds would not change any bit, because the products are exact; without them this need not be assumed.
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}

_EXPONENT = tl.constexpr(0x7F800000)  # float32's exponent field; also the bit pattern of Inf
_ONE = tl.constexpr(0x3F800000)  # float32's 1.0
# The exponent and mantissa of E2M1, placed at the low end of float32's exponent and the high end of its mantissa
# (bits 24..22), give the value times 2^-126; 0.5, the only subnormal of E2M1, becomes a subnormal of float32. So this
# factor turns codes into values and back.
_BIAS = tl.constexpr(2.0**126)


def quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, packed: Tensor, scale: Tensor) -> None:
    """Compute `reference.quantize`; torch raises RuntimeError if ``packed`` is not aligned to words in storage."""
    codes = packed.view(_word_dtype(x))
    _launch(_quantize_kernel, x, x, codes, scale, codes.numel(), *_key(seed), scale_rule, rounding)


def dequantize(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """Compute `reference.dequantize`; torch raises RuntimeError if ``packed`` is not aligned to words in storage."""
    codes = packed.view(_word_dtype(out))
    _launch(_dequantize_kernel, out, codes, scale, out, codes.numel())


def fake_quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, out: Tensor) -> None:
    """Compute `reference.fake_quantize`, with one read and one write."""
    words = x.numel() // _codes_in_word(x)
    _launch(_fake_quantize_kernel, x, x, out, words, *_key(seed), scale_rule, rounding)


def _launch(kernel, values: Tensor, *arguments) -> None:
    """Run ``kernel`` on the device and for the dtype of ``values`` [B, 32]."""
    per = _codes_in_word(values)
    grid = (triton.cdiv(values.numel(), per * _WORDS * _STEPS),)
    with torch.cuda.device_of(values):
        kernel[grid](*arguments, PER=per, WORDS=_WORDS, STEPS=_STEPS, **_OPTIONS)


def _codes_in_word(values: Tensor) -> int:
    return 16 // values.element_size()


def _word_dtype(values: Tensor) -> torch.dtype:
    return torch.int16 if values.dtype == torch.float32 else torch.int32


def _key(seed: int) -> tuple[int, int]:
    """Return the low and high 32 bits of ``seed`` as signed numbers, because Triton passes them as int32."""
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    return low - (low >> 31 << 32), high - (high >> 31 << 32)


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _quantize_kernel(
    x_ptr, codes_ptr, scale_ptr, words, key_low, key_high,
    RULE: tl.constexpr, ROUNDING: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Quantise ``x_ptr`` [words * PER] to ``codes_ptr`` [words] and ``scale_ptr`` [words * PER / 32]."""
    BLOCKS: tl.constexpr = WORDS * PER // 32
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * STEPS)
    blocks = words // (32 // PER)
    loaded = _load_blocks(x_ptr, first, blocks, BLOCKS, STEPS)
    row, column = tl.arange(0, BLOCKS)[:, None], tl.arange(0, 32 // PER)[None, :]
    for step in tl.static_range(STEPS):
        start = first + step * BLOCKS
        values, exponent = _quantize(_widen(loaded[step]), start, key_low, key_high, RULE, ROUNDING)
        codes = _pack(values.reshape(BLOCKS, 32 // PER, PER))
        # The codes of blocks with NaN or Inf have no meaning.
        codes = tl.where((exponent == 255)[:, None], 0, codes).to(codes_ptr.dtype.element_ty)
        inside = row < blocks - start
        word = row * (32 // PER) + column
        tl.store(codes_ptr + start * (32 // PER) + word, codes, mask=inside)
        # The thread with the first word of a block stores the scale. A store of shape [BLOCKS] would go through shared
        # memory, and so would a store of this shape if Triton saw that its addresses are row + start.
        scale = exponent.to(tl.uint8)[:, None].broadcast_to(BLOCKS, 32 // PER)
        tl.store(scale_ptr + start + word // (32 // PER), scale, mask=inside & (column == 0))


@triton.jit(do_not_specialize=["key_low", "key_high"])
def _fake_quantize_kernel(
    x_ptr, out_ptr, words, key_low, key_high,
    RULE: tl.constexpr, ROUNDING: tl.constexpr, PER: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Fake-quantise ``x_ptr`` [words * PER] to ``out_ptr`` [words * PER]."""
    BLOCKS: tl.constexpr = WORDS * PER // 32
    first = tl.program_id(0).to(tl.int64) * (BLOCKS * STEPS)
    blocks = words // (32 // PER)
    loaded = _load_blocks(x_ptr, first, blocks, BLOCKS, STEPS)
    row = tl.arange(0, BLOCKS)[:, None]
    for step in tl.static_range(STEPS):
        start = first + step * BLOCKS
        values, exponent = _quantize(_widen(loaded[step]), start, key_low, key_high, RULE, ROUNDING)
        values = _narrow(values * _scale(exponent)[:, None], out_ptr.dtype.element_ty)
        place = start * 32 + (row * 32 + tl.arange(0, 32)[None, :])
        tl.store(out_ptr + place, values, mask=row < blocks - start)


@triton.jit
def _dequantize_kernel(
    codes_ptr, scale_ptr, out_ptr, words, PER: tl.constexpr, WORDS: tl.constexpr, STEPS: tl.constexpr
):
    """Dequantise ``codes_ptr`` [words] and ``scale_ptr`` [words * PER / 32] to ``out_ptr`` [words * PER]."""
    first = tl.program_id(0).to(tl.int64) * (WORDS * STEPS)
    word = tl.arange(0, WORDS)
    loaded = ()
    for step in tl.static_range(STEPS):
        start = first + step * WORDS
        inside = word < words - start
        codes = tl.load(codes_ptr + start + word, mask=inside, other=0)
        exponent = tl.load(scale_ptr + start // (32 // PER) + word // (32 // PER), mask=inside, other=0)
        loaded += ((codes, exponent),)  # type: ignore[assignment]
    for step in tl.static_range(STEPS):
        start = first + step * WORDS
        codes, exponent = loaded[step]
        values = _unpack(codes, PER) * _scale(exponent.to(tl.int32))[:, None]
        place = start * PER + (word[:, None] * PER + tl.arange(0, PER)[None, :])
        tl.store(out_ptr + place, _narrow(values, out_ptr.dtype.element_ty), mask=(word < words - start)[:, None])


@triton.jit
def _load_blocks(x_ptr, first, blocks, BLOCKS: tl.constexpr, STEPS: tl.constexpr):
    """Load STEPS tensors [BLOCKS, 32] from block ``first`` on; elements from block ``blocks`` on are zero."""
    row = tl.arange(0, BLOCKS)[:, None]
    loaded = ()
    for step in tl.static_range(STEPS):
        start = first + step * BLOCKS
        place = start * 32 + (row * 32 + tl.arange(0, 32)[None, :])
        loaded += (tl.load(x_ptr + place, mask=row < blocks - start, other=0),)  # type: ignore[assignment]
    return loaded


@triton.jit
def _widen(x):
    """Convert a float ``x`` to float32."""
    if x.dtype == tl.bfloat16:  # the cast of the interpreter, here and below, is wrong for subnormals; this is as fast
        return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def _narrow(values, dtype: tl.constexpr):
    """Convert float32 ``values``, which must be exact in bfloat16, to ``dtype``."""
    if dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True) >> 16
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return values.to(dtype)


@triton.jit
def _quantize(x, first, key_low, key_high, RULE: tl.constexpr, ROUNDING: tl.constexpr):
    """Quantise float32 ``x`` [N, 32], whose first row is block ``first``.

    Returns (signed E2M1 values float32 [N, 32], biased scale exponents int32 [N]). A block with NaN or Inf gets
    exponent 255 and values without meaning.
    """
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Positive floats sort like their bit patterns, so this maximum also finds Inf and NaN.
    amax = tl.max(magnitude, axis=1)
    magnitude = magnitude.to(tl.float32, bitcast=True)
    if RULE == "mse":
        low, high = tl.maximum((amax >> 23) - 2, 0), tl.maximum((amax >> 23) - 1, 0)
        # Each error is in units of its own scale; the larger scale is twice the smaller. For a tie use the smaller.
        better = 4 * _squared_error(_divide(magnitude, high)) < _squared_error(_divide(magnitude, low))
        exponent = tl.where(better, high, low)
    else:
        # The carry out of the mantissa is the rule's "plus 1".
        CARRY: tl.constexpr = 0 if RULE == "floor" else (0x200000 if RULE == "even" else 0x3FFFFF)
        exponent = tl.maximum(((amax + CARRY) >> 23) - 2, 0)

    y = _divide(magnitude, exponent)
    if ROUNDING == "nearest":
        value = _nearest(y)
    else:
        # P is the power of two at or below y. The step of E2M1 there is P/2; t is y in such steps. Both are exact.
        p = _power(y)
        t = y * (-p + _EXPONENT).to(tl.float32, bitcast=True)
        steps = t.to(tl.int32).to(tl.float32)
        rest = t - steps
        up = rest >= 0.5 if ROUNDING == "half_away" else _uniform(first, key_low, key_high, x.shape[0]) < rest
        value = (steps + up.to(tl.float32)) * (p - (1 << 23)).to(tl.float32, bitcast=True)
    value = tl.minimum(value, 6.0).to(tl.int32, bitcast=True) | (bits & -0x80000000)
    return value.to(tl.float32, bitcast=True), tl.where(amax >= _EXPONENT, 255, exponent)


@triton.jit
def _divide(magnitude, exponent):
    """Divide ``magnitude`` [N, 32] by 2^(exponent - 127) [N]; exact, and below 8 where both are finite."""
    return magnitude * ((254 - exponent) << 23).to(tl.float32, bitcast=True)[:, None]


@triton.jit
def _power(y):
    """Return the bits of the power of two in {1, 2, 4} at or below float32 ``y`` in [0, 8); of 1 for y below 1."""
    return tl.maximum(y.to(tl.int32, bitcast=True) & _EXPONENT, _ONE)


@triton.jit
def _nearest(y):
    """Round ``y`` in [0, 8) to the nearest of the values of E2M1 and 8; ties go to the even code.

    With C = 2^22 * P, where P is the power of two at or below y, the last place of y + C is worth P/2, which is the
    step of E2M1 there. So the addition rounds.
    """
    c = _power(y).to(tl.float32, bitcast=True) * 4194304.0
    return (y + c) - c


@triton.jit
def _squared_error(y):
    """Sum the squared rounding errors of ``y`` [N, 32] to float64 [N].

    The sum is the tree s[j] + s[j + 16], then with distances 8, 4, 2 and 1. A sum of two numbers does not depend on
    their order, so this tree has exactly one result, which is that of the other backends.
    """
    N: tl.constexpr = y.shape[0]
    error = (tl.minimum(_nearest(y), 6.0) - y).to(tl.float64)
    s = error * error
    for level in tl.static_range(5):
        s = tl.sum(s.reshape(N, 2, 16 >> level), axis=1)
    return s.reshape(N)


@triton.jit
def _uniform(first, key_low, key_high, N: tl.constexpr):
    """Return float32 random numbers [N, 32] in [0, 1).

    They are the upper 24 bits of word i % 4 of Philox4x32-10 with counter i // 4, where i is the flat index.
    """
    counter = first * 8 + (tl.arange(0, N)[:, None] * 8 + tl.arange(0, 8)[None, :])
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    k0, k1 = key_low.to(tl.uint32, bitcast=True), key_high.to(tl.uint32, bitcast=True)
    zero = tl.zeros_like(c0)
    r0, r1, r2, r3 = tl.philox_impl(c0, c1, zero, zero, k0, k1)
    r = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(N, 32)
    return (r >> 8).to(tl.float32) * (2.0**-24)


# Packing and unpacking process two codes of a word at once. The codes are half a word apart and are placed in the two
# halves of 32 bits: as bits 15 (sign) and 8..6 of a half they are the upper halves of two float32 (see _BIAS).


@triton.jit
def _pack(values):
    """Pack the codes of E2M1 ``values`` [N, W, PER] into words uint32 [N, W], code 0 in the lowest bits.

    PER is 8 or 4.
    """
    N: tl.constexpr = values.shape[0]
    W: tl.constexpr = values.shape[1]
    PER: tl.constexpr = values.shape[2]
    bits = (values * (1 / _BIAS)).to(tl.uint32, bitcast=True)
    if PER == 8:  # the last dimension is bit 0 of a code's index, then bit 1, then bit 2
        k0, k1 = tl.split(bits.reshape(N, W, 4, 2))
        k0, k2 = tl.split(k0.reshape(N, W, 2, 2))
        k1, k3 = tl.split(k1.reshape(N, W, 2, 2))
        return _pack_pair(k0, 0) | _pack_pair(k1, 1) | _pack_pair(k2, 2) | _pack_pair(k3, 3)
    else:
        k0, k1 = tl.split(bits.reshape(N, W, 2, 2))
        pairs = _pack_pair(k0, 0) | _pack_pair(k1, 1)
        return (pairs & 0xFF) | (pairs >> 8)


@triton.jit
def _pack_pair(bits, K: tl.constexpr):
    """Convert float32 patterns of two codes uint32 [N, W, 2] to codes at bit 4 * K of each half of uint32 [N, W]."""
    low, high = tl.split(bits)
    pair = (low >> 16) | high
    return (_shift(pair, 4 * K - 6) & (0x00070007 << 4 * K)) | (_shift(pair, 4 * K - 12) & (0x00080008 << 4 * K))


@triton.jit
def _unpack(word, PER: tl.constexpr):
    """Return the values float32 [N, PER] of the codes in ``word`` [N], int32 with 8 codes or int16 with 4."""
    word = word.to(tl.uint32)
    if PER == 8:
        pairs = tl.join(
            tl.join(_unpack_pair(word, 0), _unpack_pair(word, 2)), tl.join(_unpack_pair(word, 1), _unpack_pair(word, 3))
        )
    else:
        word = (word & 0xFF) | ((word & 0xFF00) << 8)
        pairs = tl.join(_unpack_pair(word, 0), _unpack_pair(word, 1))
    return pairs.reshape(word.shape[0], PER).to(tl.float32, bitcast=True) * _BIAS


@triton.jit
def _unpack_pair(word, K: tl.constexpr):
    """Return the float32 patterns uint32 [N, 2] of the codes at bit 4 * K of each half of ``word`` uint32 [N]."""
    pair = (_shift(word, 6 - 4 * K) & 0x01C001C0) | (_shift(word, 12 - 4 * K) & 0x80008000)
    return tl.join(pair << 16, pair & 0xFFFF0000)


@triton.jit
def _shift(bits, BY: tl.constexpr):
    if BY >= 0:
        return bits << BY
    else:
        return bits >> -BY


@triton.jit
def _scale(exponent):
    """Return the float32 value 2^(exponent - 127) of int32 ``exponent``; 0 is the subnormal 2^-127 and 255 is NaN."""
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
