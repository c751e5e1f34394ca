"""The MXFP8 codec for activations (W4A8): quantise, dequantise, and fake-quantise (both in one step).

The format (OCP Microscaling Formats v1.0): 32 consecutive values along K share one scale byte.

* Element E4M3, 8 bits: sign, 4 bits of exponent with bias 7, 3 bits of mantissa. The largest value is 448, the smallest
  normal value is 2^-6, the step below it is 2^-9. 0x7F and 0xFF are NaN; there is no Inf.
* Scale E8M0, 8 bits: byte b means 2^(b - 127); 255 is NaN; there is no zero.

With amax = m * 2^e, 1 <= m < 2, the scale is 2^(e - 8): the rule ``floor`` of the OCP specification, which torchao has
as FLOOR and Ascend's ``npu_dynamic_mx_quant`` as ``scale_alg=0``. Elements saturate at 448, so values above 1.75 * 2^e
are clipped. (compressed-tensors takes 2^(e - 7) from m = 1.75 on, as for MXFP4; torchao's RCEIL above m = 1.75.) An
element gets the nearer value, the even code for a tie. Special cases, as in `codec`:

* -0 and negative values that round to zero keep their sign.
* A block that contains NaN or Inf gets scale byte 255 and codes 0, so that all its 32 values are dequantised to NaN.
* A block of zeros gets scale byte 0 (2^-127) and is dequantised to zeros.
* A block with amax < 2^-119 would need a scale below 2^-127. It gets 2^-127 and is rounded on that grid.

This module is the definition, in plain PyTorch for every device. On a CPU a compiled kernel computes `fake_quantize`
with the same bits.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.kernels import native, reference
from verl_aqn.mxfp4.kernels.reference import BLOCK, NAN_SCALE

ARITHMETIC = "mxfp8/floor/nearest"
"""The name of this arithmetic in settings and evidence: format, scale rule, rounding."""
_EXPONENT = 0x7F800000  # float32's exponent field; also the bit pattern of Inf
_LARGEST = 0x7E  # the code of 448
_SMALLEST_POWER, _LARGEST_POWER = 121 << 23, 135 << 23  # 2^-6 and 2^8 as float32


class Mxfp8Tensor(NamedTuple):
    """A quantised tensor of shape [..., K]."""

    codes: Tensor
    """uint8 [..., K]: the bit patterns of E4M3."""
    scale: Tensor
    """uint8 [..., K/32]: one E8M0 byte for each block along K."""


def quantize(x: Tensor) -> Mxfp8Tensor:
    """Quantise ``x`` [..., K] (float32, bfloat16 or float16) in blocks of 32 along its last dimension.

    Raises:
        ModelError: K is not a multiple of 32, or the dtype is not supported.
    """
    blocks = _blocks(x)
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(blocks), dtype=torch.uint8, device=x.device)
    for part in reference.chunks(blocks):
        codes[part], scale[part] = _encode(blocks[part].float())
    return Mxfp8Tensor(codes.view(x.shape), scale.view(*x.shape[:-1], -1))


def dequantize(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Dequantise ``codes`` uint8 [..., K] with ``scale`` uint8 [..., K/32] to ``dtype`` [..., K].

    Every value is exact in float32, except 2^128 and above, which become Inf. Other dtypes round values that they
    cannot hold.

    Raises:
        ModelError: the inputs are not uint8, or their shapes do not match.
    """
    *lead, k = codes.shape
    if codes.dtype != torch.uint8 or scale.dtype != torch.uint8 or k % BLOCK or scale.shape != (*lead, k // BLOCK):
        raise ModelError(
            f"codes {codes.dtype} {list(codes.shape)} and scales {scale.dtype} {list(scale.shape)} do not match: for "
            "[N, K] they must be uint8 [N, K] and [N, K/32]"
        )
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    blocks, scales, out = codes.reshape(-1, BLOCK), scale.reshape(-1), values.view(-1, BLOCK)
    for part in reference.chunks(blocks):
        out[part] = _decode(blocks[part], scales[part])
    return values


def fake_quantize(x: Tensor) -> Tensor:
    """Round ``x`` [..., K] to MXFP8 values in the dtype of ``x``, which holds all of them exactly.

    The gradient is passed straight through, also where values saturate.

    Raises:
        ModelError: as `quantize`.
    """
    _check(x)
    return _FakeQuantize.apply(x)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.ops.verl_aqn.mxfp8_fake_quantize(x) if torch.compiler.is_compiling() else _fake_quantize(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _fake_quantize(x: Tensor) -> Tensor:
    blocks = _blocks(x)
    values = torch.empty_like(blocks)
    if type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" and native.available():
        native.mxfp8_fake_quantize(blocks, values)
    else:
        for part in reference.chunks(blocks):
            values[part] = _decode(*_encode(blocks[part].float()))
    return values.view(x.shape)


def _blocks(x: Tensor) -> Tensor:
    _check(x)
    return x.detach().reshape(-1, BLOCK).contiguous().resolve_neg()


def _check(x: Tensor) -> None:
    if x.dim() == 0 or x.shape[-1] % BLOCK:
        raise ModelError(
            f"cannot quantise shape {list(x.shape)} to MXFP8: the last dimension must be a multiple of {BLOCK}; set "
            "aqn.mxfp4.activation=none"
        )
    if x.dtype not in native.DTYPES:
        raise ModelError(f"cannot quantise {x.dtype} to MXFP8: convert it to float32, bfloat16 or float16")


def _encode(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise float32 [B, 32] to codes uint8 [B, 32] and scales uint8 [B].

    Dividing by a power of two is exact; let y be the quotient, P the power of two in {2^-6, …, 2^8} at or below y, and
    C = 2^20 * P. The last place of y + C is worth P/8, which is the step of E4M3 there. So the addition rounds to
    nearest even, and the low bits of its bit pattern count the steps. For the next P the count continues 8 codes
    higher.
    """
    magnitude = x.abs()
    # Positive floats sort like their bit patterns, so this maximum also finds Inf and NaN.
    amax = magnitude.view(torch.int32).amax(-1, keepdim=True)
    exponent = ((amax >> 23) - 8).clamp_(min=0)
    y = magnitude * ((254 - exponent) << 23).view(torch.float32)
    p = (y.view(torch.int32) & _EXPONENT).clamp_(min=_SMALLEST_POWER, max=_LARGEST_POWER)
    c = p + (20 << 23)
    codes = ((y + c.view(torch.float32)).view(torch.int32) - c).add_((p >> 20) - (_SMALLEST_POWER >> 20))
    codes = codes.clamp_(max=_LARGEST) | ((x.view(torch.int32) >> 24) & 0x80)
    unusable = amax >= _EXPONENT
    codes.masked_fill_(unusable, 0)
    exponent.masked_fill_(unusable, NAN_SCALE)
    return codes.to(torch.uint8), exponent.squeeze(1).to(torch.uint8)


def _decode(codes: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 values [B, 32] of codes uint8 [B, 32] with scales uint8 [B]."""
    elements, scales = _tables(codes.device)
    return elements[codes.int()] * scales[scale.int()].unsqueeze(1)


@functools.cache
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return float32 [256], the value of each E4M3 code, and float32 [256], the scale of each byte."""
    nan = float("nan")
    steps = [(8 * (c >= 8) + c % 8) * 2.0 ** (max(c // 8, 1) - 10) for c in range(_LARGEST + 1)]
    elements = [*steps, nan, *(-value for value in steps), nan]
    scales = [*(2.0 ** (b - 127) for b in range(NAN_SCALE)), nan]
    # The tables are cached, and a tensor made in inference mode could not be used in training later.
    with torch.inference_mode(False):
        return tuple(torch.tensor(table, dtype=torch.float32).to(device) for table in (elements, scales))  # type: ignore[return-value]


# torch.compile cannot trace a compiled kernel. In a graph it is a custom operator with a declared result.
@torch.library.custom_op("verl_aqn::mxfp8_fake_quantize", mutates_args=())
def _fake_quantize_op(x: Tensor) -> Tensor:
    return _fake_quantize(x)


@_fake_quantize_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
