"""Where the error of MXFP4 codes comes from: deadzone, clipping, power-of-two scale, grid.

For a weight w and its dequantised copy q under the block's scale s = 2^k, every element belongs to one group:

* deadzone: w is not zero but q is; its error is w^2;
* clipped: not in the deadzone, and |w| > 6 s, beyond the largest value that the block can hold; its error is
  (|w| - 6 s)^2 where the code is the saturated one;
* the rest, inside the range, whose error is split once more by asking what the same grid would have done under the
  scale that only fp32 can hold, amax / 6, with q' = round(w / scale') scale':
  grid noise is the sum of (w - q')^2, and scale bias is the sum of (w - q)^2 - (w - q')^2.

So the four parts add up to the sum of (w - q)^2 by definition, with nothing counted twice and no cross term left over:
the cross term 2 (w - q')(q' - q) of the two rounding errors goes to the scale bias, which thereby says how much error
an ideal scale would save on these elements. It is negative where the power of two happens to fit better. The three
names besides "clipped" are those of arXiv 2605.20402, which gives each its own effect on RL; the definitions are ours.
Clipping stands by itself because the choice of a scale rule alone decides it.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from verl_aqn.mxfp4.codec import BLOCK, dequantize

# Blocks handled at a time: float64 temporaries stay in a CPU's caches, and PyTorch keeps to one thread (see codec).
_STEP = 1023


class ErrorSplit(NamedTuple):
    """Energies (sums of squares) and counts of elements of one or more quantised weights."""

    signal: float = 0.0
    """Sum of w^2."""
    deadzone: float = 0.0
    clipped: float = 0.0
    scale_bias: float = 0.0
    grid_noise: float = 0.0
    elements: int = 0
    dead: int = 0
    """Elements in the deadzone."""
    saturated: int = 0
    """Elements that are clipped."""

    @property
    def noise(self) -> float:
        """Sum of (w - q)^2: the four parts together."""
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
        """That of several weights taken together."""
        return cls(*(sum(column) for column in zip(cls(), *splits, strict=True)))


def split_error(weight: Tensor, packed: Tensor, scale: Tensor) -> ErrorSplit:
    """Split the squared error of the codes of ``weight`` [..., K], a float dtype without NaN and Inf, in float64.

    ``packed`` uint8 [..., K/2] and ``scale`` uint8 [..., K/32] may come from any rounding, not only from `quantize`.
    Raises what `dequantize` raises.
    """
    blocks = weight.detach().reshape(-1, BLOCK)
    codes, scales = packed.reshape(-1, BLOCK // 2), scale.reshape(-1, 1)
    parts = [
        _split_blocks(blocks[i : i + _STEP].double(), codes[i : i + _STEP], scales[i : i + _STEP])
        for i in range(0, blocks.shape[0], _STEP)
    ]
    return ErrorSplit.pooled(parts)


def _split_blocks(w: Tensor, packed: Tensor, scale: Tensor) -> ErrorSplit:
    """Float64 [B, 32] with its codes."""
    q = dequantize(packed, scale, torch.float32).double()
    error = (w - q).square_()
    size = w.abs()
    step = torch.ldexp(torch.ones_like(w[:, :1]), scale.int() - 127)
    dead = (q == 0) & (w != 0)
    clipped = (size > 6 * step) & ~dead
    rest = ~(dead | clipped)

    ideal = size.amax(-1, keepdim=True) / 6
    y = size / ideal.where(ideal > 0, 1)
    # The grid's step is 0.5 below 2, 1 below 4 and 2 up to 6; which way a tie goes does not change its square.
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
    """10 log10(signal / noise); inf without noise, NaN where either is."""
    if noise == 0:
        return float("inf")
    return (10 * torch.log10(torch.tensor(signal / noise, dtype=torch.float64))).item()
