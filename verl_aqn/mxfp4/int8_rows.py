"""MXFP4 weights in int8 with one power of two for each row, the nearest form of vllm-ascend for chips without MX units.

The largest value of a row becomes 64 or 96, because MXFP4 values are 1 or 1.5 times a power of two. A block is exact if
its scale is at least an eighth of the scale of the row's largest value; smaller values are rounded to the nearest
multiple of the row's scale (ties to even). `verl_aqn.mxfp4.int8_change` says how much is lost.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK, dequantize
from verl_aqn.mxfp4.int8_change import Change

_ONE = 127  # the E8M0 byte of the scale 1
_LEAST = -126  # exponent of the smallest normal bfloat16
_FAR = -40  # a block that is this many powers of two below its row's scale is zero in int8
_CHUNK = 1 << 24  # weights that are converted at once, to bound memory


class Int8Rows(NamedTuple):
    """``codes`` int8 [N, K] times ``scale`` bfloat16 [N, 1], a power of two for each row, are the weights."""

    codes: Tensor
    scale: Tensor

    def values(self) -> Tensor:
        """Return the weights [N, K] in bfloat16, in which they are exact. No zero has a sign."""
        return self.codes.to(torch.bfloat16) * self.scale


def to_int8(packed: Tensor, scale: Tensor, name: str = "the weight") -> tuple[Int8Rows, Change]:
    """Convert ``packed`` uint8 [N, K/2] with ``scale`` uint8 [N, K/32] to int8, and measure what changes.

    Raises:
        ModelError: a value is not finite in bfloat16. ``name`` is the matrix in the message.
    """
    n, half = packed.shape
    rows = max(1, _CHUNK // (2 * half))
    parts = [_convert(packed[row : row + rows], scale[row : row + rows], name) for row in range(0, n, rows)]
    made = Int8Rows(*(torch.cat(tensors) for tensors in zip(*(part for part, _ in parts), strict=True)))
    return made, sum((change for _, change in parts), Change())


def _convert(packed: Tensor, scale: Tensor, name: str) -> tuple[Int8Rows, Change]:
    # In units of each block's scale every value is exact, whatever the exponents are.
    units = dequantize(packed, torch.full_like(scale, _ONE), torch.float32).unflatten(1, (-1, BLOCK))
    exponent = scale.int() - _ONE
    largest = units.abs().amax(-1)
    top = torch.where(largest > 0, torch.frexp(largest).exponent.int() + exponent, torch.iinfo(torch.int32).min)
    top = top.amax(1, keepdim=True)  # 2^top is above the row's largest value, and at most twice as large
    if (scale == 255).any() or (top > 128).any():
        raise ModelError(f"{name} holds values that are not finite in bfloat16: start from another checkpoint")
    row = torch.where(top < -500, 0, (top - 7).clamp(min=_LEAST))  # a row of zeros gets the scale 1
    shift = (exponent - row).clamp(min=_FAR)[..., None]
    codes = torch.round(torch.ldexp(units, shift))
    lost = torch.ldexp(codes, -shift) - units
    squares = lost.double().square().sum(-1)
    norms = units.double().square().sum(-1)
    changed = squares > 0
    errors = squares[changed] / norms[changed]
    step = torch.ldexp(torch.ones_like(row, dtype=torch.float32), row).to(torch.bfloat16)
    change = Change(changed.numel(), int(changed.sum()), float(errors.sum()))
    return Int8Rows(codes.flatten(1).to(torch.int8), step), change
