"""Error-compensated rounding to MXFP4 (GPTQ, Frantar et al. 2023, arXiv 2210.17323): same format, calibrated codes.

Plain rounding makes every weight's own error small. What matters is the layer's output error tr((W-Q) H (W-Q)^T) with
H = X^T X over calibration inputs X. GPTQ rounds one column after the other and, after each, moves the columns not yet
rounded so that they make up for its error as well as they can.

Here a scale belongs to 32 columns. It is chosen when they are reached, from the weights as they are by then; under the
``mse`` rule both exponents are tried to the end of the block, and each row keeps the one that costs less output error.
With H = 1 all of this is plain rounding.
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

# A share of the mean energy of an input, added to every input's energy: it keeps faint inputs, of which the sample says
# little, from being bent to make up for others.
DAMPING = 0.01


def gptq(weight: Tensor, moment: Tensor, scale_rule: str = "mse") -> Mxfp4Tensor:
    """Quantise ``weight`` [N, K] for inputs whose second moment X^T X is ``moment`` [K, K] (any positive scale of it).

    An input that is always zero is rounded plainly.

    Raises:
        ModelError: ``moment`` is not [K, K] or not finite; and as `quantize` raises.
    """
    n, k = weight.shape
    if moment.shape != (k, k) or not moment.isfinite().all():
        raise ModelError(
            f"a weight [{n}, {k}] needs a second moment [{k}, {k}] without NaN and Inf, got {list(moment.shape)}: "
            "check the calibration texts and the checkpoint"
        )
    quantize(weight[:0], scale_rule)  # refuses a shape, dtype or rule before any work
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
    """A ``quantizer`` for `quantize_checkpoint`, calibrated on tokens ``ids`` int64 [S, L]; good for one pass.

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
    """`quantize_checkpoint` with error-compensated rounding, calibrated on ``sources`` (see `calibration_ids`).

    Raises:
        DataError: as `calibration_ids`.
        ModelError, ConfigError: as `quantize_checkpoint` and `Calibration`.
    """
    exclude = tuple(exclude)
    quantizer = gptq_quantizer(src, calibration_ids(src, sources), scale_rule, exclude)
    return quantize_checkpoint(src, dst, scale_rule, exclude, progress, quantizer, format)


def _order(energy: Tensor) -> tuple[Tensor, Tensor]:
    """(columns [K], blocks [K/32]) from most to least energy, which leaves the least to be moved at the end.

    Columns stay within their block of 32, since a block shares a scale and the format knows no other order.
    """
    inside = energy.view(-1, BLOCK).argsort(dim=1, descending=True, stable=True)
    blocks = energy.view(-1, BLOCK).sum(1).argsort(descending=True, stable=True)
    return (inside + BLOCK * torch.arange(len(inside))[:, None])[blocks].view(-1), blocks


def _factor(moment: Tensor) -> Tensor:
    """Upper triangular U, float32 [K, K], with U^T U = H^-1: row i tells how column i's error moves later columns."""
    h = moment.double()
    # A dead input has no row in H: any positive value on its diagonal keeps it apart from all others.
    extra = DAMPING * h.diagonal().mean()
    h.diagonal().add_(extra if extra > 0 else 1)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True).float()


def _round_block(block: Tensor, factor: Tensor, scale_rule: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, 32], scales uint8 [N] and error float32 [N, 32] of ``block`` [N, 32].

    An error is the column's at the time it was rounded, over U's diagonal: the sum of their squares is what the block
    adds to the output error.
    """
    if scale_rule == "mse":
        low = quantize(block, "floor").scale
        scales = torch.stack([low, torch.where(low < 254, low + 1, low)])
    else:
        scales = quantize(block, scale_rule).scale[None]
    exponent = scales[..., 0].int() - 127  # [C, N], C choices of a scale
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
    best = error.double().square().sum(-1).argmin(0)  # [N]; of equal ones the first, which is the smaller scale
    rows = torch.arange(block.shape[0])
    return codes[best, rows], scales[best, rows, 0], error[best, rows]


def _upper_middles() -> Tensor:
    """Boundaries b for ``bucketize``, which counts those below y: where a tie goes up, the next float below it.

    Magnitude y has code 1 from above 0.25, code 2 from 0.75 on, and so on: a tie goes to the even code.
    """
    middles = torch.tensor(E2M1).unfold(0, 2, 1).mean(1)
    middles[1::2] = torch.nextafter(middles[1::2], torch.zeros(()))
    return middles
