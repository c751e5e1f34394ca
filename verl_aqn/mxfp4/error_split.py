"""The sources of the error of MXFP4 codes: deadzone, clipping, power-of-two scale, and grid.

For a weight w and its dequantised value q with the block's scale s = 2^k, every element belongs to one group:

* deadzone: w is not zero but q is; its error is w^2;
* clipped: not in the deadzone, and |w| > 6 s, above the largest value that the block can hold; its error is
  (|w| - 6 s)^2 if the code is saturated;
* the other elements, inside the range. Their error is split into two parts, by comparison with the same grid and the
  ideal scale' = amax / 6, which is not a power of two. With q' = round(w / scale') scale', grid noise is the sum of
  (w - q')^2, and scale bias is the sum of (w - q)^2 - (w - q')^2.

By definition the four parts add up to the sum of (w - q)^2. The cross term 2 (w - q')(q' - q) of the two rounding
errors is part of the scale bias. The scale bias therefore says how much error an ideal scale would save on these
elements; it is negative if the power of two happens to fit better. The names deadzone, scale bias and grid noise are
from arXiv 2605.20402, which attributes a separate effect on RL to each; the definitions are ours. Clipping is separate
because it depends only on the choice of the scale rule.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK, dequantize
from verl_aqn.mxfp4.kernels import native

# Blocks per chunk: float64 temporaries stay in the caches of a CPU, and PyTorch uses one thread (see
# `verl_aqn.mxfp4.kernels.reference`).
_STEP = 1023


class ErrorSplit(NamedTuple):
    """Energies (sums of squares) and numbers of elements of one or more quantised weights."""

    signal: float = 0.0
    """Sum of w^2."""
    deadzone: float = 0.0
    clipped: float = 0.0
    scale_bias: float = 0.0
    grid_noise: float = 0.0
    elements: int = 0
    dead: int = 0
    """Number of elements in the deadzone."""
    saturated: int = 0
    """Number of clipped elements."""

    @property
    def noise(self) -> float:
        """Sum of (w - q)^2: the sum of the four parts."""
        return math.fsum((self.deadzone, self.clipped, self.scale_bias, self.grid_noise))

    @property
    def sqnr_db(self) -> float:
        return ratio_db(self.signal, self.noise)

    @property
    def deadzone_share(self) -> float:
        return self.dead / self.elements

    @property
    def clipped_share(self) -> float:
        return self.saturated / self.elements

    @classmethod
    def pooled(cls, splits: Iterable["ErrorSplit"]) -> "ErrorSplit":
        """Combine the splits of several weights."""
        return cls(*(sum(column) for column in zip(cls(), *splits, strict=True)))


def split_error(weight: Tensor, packed: Tensor, scale: Tensor) -> ErrorSplit:
    """Split the squared error of the codes of ``weight`` [..., K] (a float dtype without NaN and Inf), in float64.

    ``packed`` uint8 [..., K/2] and ``scale`` uint8 [..., K/32] may come from any rounding, not only from `quantize`.

    Raises:
        ModelError: as `dequantize`.
    """
    blocks = weight.detach().reshape(-1, BLOCK).resolve_neg()
    codes, scales = packed.reshape(-1, BLOCK // 2), scale.reshape(-1, 1)
    if not len(blocks) == len(codes) == len(scales):
        raise ModelError(f"codes {list(packed.shape)} and scales {list(scale.shape)} do not match {list(weight.shape)}")
    if _has_kernel(blocks, codes, scales):
        parts = native.error_parts(blocks.contiguous(), codes.contiguous(), scales.contiguous())
        signal, deadzone, clipped, scale_bias, grid_noise, dead, saturated = parts
        numbers = (blocks.numel(), int(dead), int(saturated))
        return ErrorSplit(signal, deadzone, clipped, scale_bias, grid_noise, *numbers)
    splits = [
        _split_blocks(blocks[i : i + _STEP].double(), codes[i : i + _STEP], scales[i : i + _STEP])
        for i in range(0, blocks.shape[0], _STEP)
    ]
    return ErrorSplit.pooled(splits)


def _has_kernel(blocks: Tensor, codes: Tensor, scales: Tensor) -> bool:
    """Return whether the compiled code, which takes pointers, can read these tensors."""
    return (
        all(type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cpu" for x in (blocks, codes, scales))
        and codes.dtype == scales.dtype == torch.uint8
        and blocks.dtype in native.DTYPES
        and native.available()
    )


def _split_blocks(w: Tensor, packed: Tensor, scale: Tensor) -> ErrorSplit:
    """Split the error of the codes of float64 blocks [B, 32]. ``error_parts.h`` computes the same on CPUs."""
    q = dequantize(packed, scale, torch.float32).double()
    error = (w - q).square_()
    size = w.abs()
    step = torch.ldexp(torch.ones_like(w[:, :1]), scale.int() - 127)
    dead = (q == 0) & (w != 0)
    clipped = (size > 6 * step) & ~dead
    rest = ~(dead | clipped)

    ideal = size.amax(-1, keepdim=True) / 6
    y = size / ideal.where(ideal > 0, 1)
    # The step of the grid is 0.5 below 2, 1 below 4 and 2 up to 6; the direction of a tie does not change its square.
    grid = (y >= 2).to(y.dtype).add_(1).mul_(0.5).add_(y >= 4)
    floor = (size - (y / grid).round_().mul_(grid).mul_(ideal)).square_()
    error_of = {group: (error * mask).sum().item() for group, mask in (("dead", dead), ("clipped", clipped))}
    grid_noise = (floor * rest).sum().item()
    return ErrorSplit(
        signal=w.square().sum().item(),
        deadzone=error_of["dead"],
        clipped=error_of["clipped"],
        scale_bias=(error - floor).mul_(rest).sum().item(),
        grid_noise=grid_noise,
        elements=w.numel(),
        dead=int(dead.sum()),
        saturated=int(clipped.sum()),
    )


def ratio_db(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise); inf without noise, NaN if either is NaN."""
    if noise == 0:
        return float("inf")
    return (10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))).item()
