"""MXFP4 on an Ascend 950 through torch_npu's MX operators, where they compute `reference`'s bits.

NOT RUN ON HARDWARE. Written from published sources, and tested against stand-ins that follow them:

* torch_npu 2.10.0.post4 (its wheel): the signatures of ``npu_dynamic_mx_quant`` and ``npu_anti_mx_quant``, which
  2.10.0.post2 lacks, and the shapes of their results.
* Ascend/op-plugin, docs/zh/custom_APIs/torch_npu, the pages of both operators: dtypes, arguments, formulas, and that of
  all chips the Ascend 950 alone has them.
* hicann/ops-nn, quant/dynamic_mx_quant/op_kernel/arch35/dynamic_mx_quant_tail_axis.h: what they compute to the bit.

By these, for bfloat16, ``scale_alg=0`` is the ``floor`` rule and ``scale_alg=2`` with ``dst_type_max=0`` is ``rceil``:
the kernel adds 0x3F to amax's bit pattern, so that mantissas above 1.5 carry. (``dst_type_max=7`` adds 0x1F, for those
above 1.75; ``even`` begins at 1.75.) ``round_mode`` "rint" is a tie to the even code, "round" a tie away from zero.
float16 and float32 are left out: they go through a second rounding, to bfloat16, which this module does not vouch for.

At the ends of the scale's range the operators do not give our bits, or may not: codes are 0 under scale byte 0, NaN's
codes are left open, and whether subnormals are kept nobody says. Blocks there are done again by `reference`.
"""

import torch
from torch import Tensor

from verl_aqn.mxfp4.chips import has_mx_units
from verl_aqn.mxfp4.kernels import reference

_SCALE_ALG = {"floor": 0, "rceil": 2}
_ROUND_MODE = {"nearest": "rint", "half_away": "round"}
# torch_npu's numbers for dtypes (TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP in its meta registrations).
_FLOAT4_E2M1 = 296
_DST_TYPE = {torch.bfloat16: 15, torch.float32: 6}
# A bfloat16 subnormal over the scale is below a quarter, and so has code 0, from this scale byte on.
_FIRST_WITHOUT_SUBNORMAL_INPUTS = 4
# Scale bytes under which every value but 0 is normal in bfloat16, and finite.
_NORMAL_VALUES = (2, 252)


def supports(scale_rule: str, rounding: str, dtype: torch.dtype) -> bool:
    """Whether `quantize` leaves this to the operator; everything else is `reference`'s, on the same device."""
    return _on_ascend_950() and scale_rule in _SCALE_ALG and rounding in _ROUND_MODE and dtype == torch.bfloat16


def supports_dequantize(dtype: torch.dtype) -> bool:
    """Whether `dequantize` to ``dtype`` leaves it to the operator, which torch_npu has since 2.10.0.post4."""
    import torch_npu

    return _on_ascend_950() and dtype in _DST_TYPE and hasattr(torch_npu, "npu_anti_mx_quant")


def quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, packed: Tensor, scale: Tensor) -> None:
    """As `reference.quantize`. Waits for the device, to learn whether a block has to be done again."""
    if not supports(scale_rule, rounding, x.dtype):
        reference.quantize(x, scale_rule, rounding, seed, packed, scale)
        return
    import torch_npu

    # One row, as long as it takes: its scales come in pairs along K, [1, ceil(B / 2), 2], in the order of the blocks.
    codes, scales = torch_npu.npu_dynamic_mx_quant(
        x.view(1, -1),
        axis=-1,
        round_mode=_ROUND_MODE[rounding],
        dst_type=_FLOAT4_E2M1,
        block_size=reference.BLOCK,
        scale_alg=_SCALE_ALG[scale_rule],
    )
    packed.copy_(codes.view(packed.shape))
    scale.copy_(scales.view(torch.uint8).view(-1)[: len(scale)])
    again = _rows((scale < _FIRST_WITHOUT_SUBNORMAL_INPUTS) | (scale == reference.NAN_SCALE))
    if len(again):
        part = packed[again], scale[again]
        reference.quantize(x[again], scale_rule, rounding, seed, *part)
        packed[again], scale[again] = part


def dequantize(packed: Tensor, scale: Tensor, out: Tensor) -> None:
    """As `reference.dequantize`. Waits for the device, to learn whether a block has to be done again."""
    if not supports_dequantize(out.dtype):
        reference.dequantize(packed, scale, out)
        return
    import torch_npu

    pairs = torch.nn.functional.pad(scale, (0, len(scale) % 2)).view(1, -1, 2)
    values = torch_npu.npu_anti_mx_quant(
        packed.view(1, -1), pairs, axis=-1, dst_type=_DST_TYPE[out.dtype], src_type=_FLOAT4_E2M1
    )
    out.copy_(values.view(out.shape))
    low, high = _NORMAL_VALUES
    again = _rows((scale < low) | (scale > high))
    if len(again):
        part = out[again]
        reference.dequantize(packed[again], scale[again], part)
        out[again] = part


def fake_quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, out: Tensor) -> None:
    """As `reference.fake_quantize`: there is no operator that does both."""
    packed = torch.empty(len(x), reference.BLOCK // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    quantize(x, scale_rule, rounding, seed, packed, scale)
    dequantize(packed, scale, out)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _on_ascend_950() -> bool:
    import torch_npu

    return has_mx_units(torch_npu.npu.get_device_name())
