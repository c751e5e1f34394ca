"""Error-compensated rounding to MXFP4 (GPTQ, Frantar et al. 2023, arXiv 2210.17323): same format, calibrated codes.

Plain rounding minimises the error of every single weight. What matters is the output error of the layer,
tr((W-Q) H (W-Q)^T) with H = X^T X over calibration inputs X. GPTQ rounds one column after the other. After each column
it adjusts the columns that are not yet rounded, so that they compensate for the error as well as possible.

In MXFP4 a scale belongs to 32 columns. It is chosen when the algorithm reaches these columns, from their adjusted
values. With the ``mse`` rule both exponents are tried to the end of the block, and each row keeps the one with the
smaller output error. With H = 1 the result is plain rounding.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from verl_aqn.checkpoints.calibrate import Calibration, calibration_ids
from verl_aqn.checkpoints.error_report import QuantReport
from verl_aqn.checkpoints.packing import quantize_checkpoint
from verl_aqn.checkpoints.packing_plan import EXCLUDE, make_plan
from verl_aqn.checkpoints.storage import Weights
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK, Mxfp4Tensor, dequantize, quantize
from verl_aqn.mxfp4.kernels.reference import E2M1

# Share of the mean energy of the inputs that is added to the energy of every input. The sample says little about inputs
# with low energy; without damping their weights would change too much to compensate for others.
DAMPING = 0.01


def gptq(weight: Tensor, moment: Tensor, scale_rule: str = "mse") -> Mxfp4Tensor:
    """Quantise ``weight`` [N, K] for inputs with second moment X^T X = ``moment`` [K, K], up to a positive factor.

    The weights of an input that is always zero are rounded plainly.

    Raises:
        ModelError: ``moment`` is not [K, K] or not finite; also as `quantize`.
    """
    n, k = weight.shape
    if moment.shape != (k, k) or not moment.isfinite().all():
        raise ModelError(
            f"a weight [{n}, {k}] needs a second moment [{k}, {k}] without NaN and Inf, got {list(moment.shape)}: "
            "check the calibration texts and the checkpoint"
        )
    quantize(weight[:0], scale_rule)  # checks shape, dtype and rule before any work
    order, blocks = _order(moment.diagonal())
    factor = _factor(moment[order][:, order])
    rest = weight.detach().float()[:, order]
    codes = torch.empty(n, k, dtype=torch.uint8)
    scale = torch.empty(n, k // BLOCK, dtype=torch.uint8)
    for start in range(0, k, BLOCK):
        now, later = slice(start, start + BLOCK), slice(start + BLOCK, k)
        columns, unit, error = _round_block(rest[:, now].contiguous(), factor[now, now], scale_rule)
        codes[:, order[now]], scale[:, blocks[start // BLOCK]] = columns, unit
        rest[:, later] -= error @ factor[now, later]
    return Mxfp4Tensor(codes[:, 0::2] | (codes[:, 1::2] << 4), scale)


def gptq_quantizer(
    src: str | Path, ids: Tensor, scale_rule: str = "mse", exclude: Iterable[str] = EXCLUDE
) -> Callable[[str, Tensor], Mxfp4Tensor]:
    """Return a ``quantizer`` for `quantize_checkpoint`, calibrated on tokens ``ids`` int64 [S, L]; use it for one pass.

    Raises:
        ModelError, ConfigError: as `Calibration` and `quantize_checkpoint` with ``exclude``, before any work.
    """
    plan = make_plan(Path(src), Weights(Path(src)), tuple(exclude))
    calibration = Calibration(src, ids)
    calibration.check(piece.module for piece in plan.pieces)

    def quantizer(name: str, weight: Tensor) -> Mxfp4Tensor:
        codes = gptq(weight, calibration.second_moment(name), scale_rule)
        calibration.replace(name, dequantize(*codes))
        return codes

    return quantizer


def quantize_with_gptq(
    src: str | Path,
    dst: str | Path,
    sources: list[str],
    scale_rule: str = "mse",
    exclude: Iterable[str] = EXCLUDE,
    progress: Callable[[int, int, str], None] | None = None,
    format: str = "compressed-tensors",
) -> QuantReport:
    """Run `quantize_checkpoint` with error-compensated rounding, calibrated on ``sources`` (see `calibration_ids`).

    Raises:
        DataError: as `calibration_ids`.
        ModelError, ConfigError: as `quantize_checkpoint` and `Calibration`.
    """
    exclude = tuple(exclude)
    quantizer = gptq_quantizer(src, calibration_ids(src, sources), scale_rule, exclude)
    return quantize_checkpoint(src, dst, scale_rule, exclude, progress, quantizer, format)


def _order(energy: Tensor) -> tuple[Tensor, Tensor]:
    """Return (columns [K], blocks [K/32]) in order of falling energy, so that the last columns matter least.

    Columns stay within their block of 32, because a block shares a scale and the format stores no order of columns.
    """
    inside = energy.view(-1, BLOCK).argsort(dim=1, descending=True, stable=True)
    blocks = energy.view(-1, BLOCK).sum(1).argsort(descending=True, stable=True)
    return (inside + BLOCK * torch.arange(len(inside))[:, None])[blocks].view(-1), blocks


def damped(moment: Tensor) -> Tensor:
    """Return a copy of a second moment [K, K] with `DAMPING` added to its diagonal."""
    h = moment.clone()
    # The row of H for an input that is always zero is zero: any positive value on the diagonal keeps it independent.
    extra = DAMPING * h.diagonal().mean()
    h.diagonal().add_(extra if extra > 0 else 1)
    return h


def _factor(moment: Tensor) -> Tensor:
    """Return the upper triangular U, float32 [K, K], with U^T U = H^-1.

    Row i gives the change of later columns for the error of column i.
    """
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(moment.double())))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_block(block: Tensor, factor: Tensor, scale_rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes uint8 [N, 32], scales uint8 [N] and errors float32 [N, 32] of ``block`` [N, 32].

    The error of a column is its rounding error divided by the diagonal of U. The sum of the squared errors is the
    contribution of the block to the output error.
    """
    if scale_rule == "mse":
        low = quantize(block, "floor").scale
        scales = torch.stack([low, torch.where(low < 254, low + 1, low)])
    else:
        scales = quantize(block, scale_rule).scale[None]
    exponent = scales[..., 0].int() - 127  # [C, N] with C candidate scales
    unit = torch.ldexp(torch.ones(exponent.shape), exponent)
    rest = block.expand(len(scales), *block.shape).clone()
    codes = torch.empty(rest.shape, dtype=torch.uint8)
    error = torch.empty_like(rest)
    values, middles = torch.tensor(E2M1), _upper_middles()
    for j in range(BLOCK):
        column = rest[..., j]
        code = torch.bucketize(column.abs() / unit, middles)
        error[..., j] = (column - torch.copysign(values[code] * unit, column)) / factor[j, j]
        codes[..., j] = code + 8 * column.signbit()
        rest[..., j + 1 :] -= error[..., j, None] * factor[j, j + 1 :]
    best = error.double().square().sum(-1).argmin(0)  # [N]; for a tie the first, which is the smaller scale
    rows = torch.arange(block.shape[0])
    return codes[best, rows], scales[best, rows, 0], error[best, rows]


def _upper_middles() -> Tensor:
    """Return the boundaries between codes for ``bucketize``, which counts the boundaries below y.

    Magnitude y has code 1 above 0.25, code 2 from 0.75 on, and so on: a tie goes to the even code. Where a tie goes up,
    the boundary is therefore the next float below the middle.
    """
    middles = torch.tensor(E2M1).unfold(0, 2, 1).mean(1)
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(()))
    return middles
