"""MXFP4 on an Ascend 950 through torch_npu's MX operators, where they give the same bits as `reference`.

NOT YET TESTED ON AN NPU. The module is written from published sources and tested against stand-ins that follow them:

* torch_npu 2.10.0.post4 (its wheel): the signatures of ``npu_dynamic_mx_quant`` and ``npu_anti_mx_quant`` and the
  shapes of their results. Version 2.10.0.post2 lacks ``npu_anti_mx_quant``.
* Ascend/op-plugin, docs/zh/custom_APIs/torch_npu, the pages of both operators: dtypes, arguments, formulas, and the
  statement that only the Ascend 950 has these operators.
* hicann/ops-nn, quant/dynamic_mx_quant/op_kernel/arch35/dynamic_mx_quant_tail_axis.h: the exact results.

According to these sources, for bfloat16, ``scale_alg=0`` is the ``floor`` rule, and ``scale_alg=2`` with
``dst_type_max=0`` is ``rceil``: the kernel adds 0x3F to the bit pattern of amax, so that mantissas above 1.5 carry.
(``dst_type_max=7`` adds 0x1F, for mantissas above 1.75, but ``even`` includes 1.75.) ``round_mode`` "rint" rounds a tie
to the even code, "round" rounds a tie away from zero. The operators are not used for float16 and float32, because they
round these to bfloat16 as an additional step, whose results were not checked here.

At the ends of the range of scales the operators give other bits, or may do so: codes under scale byte 0 are 0, codes
under the NaN scale are unspecified, and the treatment of subnormals is not documented. `reference` computes these
blocks again.
"""

import torch
from torch import Tensor

from verl_aqn.mxfp4.chips import has_mx_units
from verl_aqn.mxfp4.kernels import reference

_SCALE_ALG = {"floor": 0, "rceil": 2}
_ROUND_MODE = {"nearest": "rint", "half_away": "round"}
# Numbers of dtypes in torch_npu (TORCH_DTYPE_ENUM_VALUE_TO_SCALAR_TYPE_MAP in its meta registrations).
_FLOAT4_E2M1 = 296
_DST_TYPE = {torch.bfloat16: 15, torch.float32: 6}
# From this scale byte on, a bfloat16 subnormal divided by the scale is below a quarter and therefore has code 0.
_FIRST_WITHOUT_SUBNORMAL_INPUTS = 4
# Range of scale bytes with which every value except 0 is normal and finite in bfloat16.
_NORMAL_VALUES = (2, 252)


def supports(scale_rule: str, rounding: str, dtype: torch.dtype) -> bool:
    """Return whether `quantize` uses the operator; otherwise it uses `reference`, on the same device."""
    return _on_ascend_950() and scale_rule in _SCALE_ALG and rounding in _ROUND_MODE and dtype == torch.bfloat16


def supports_dequantize(dtype: torch.dtype) -> bool:
    """Return whether `dequantize` to ``dtype`` uses the operator, which torch_npu has since 2.10.0.post4."""
    import torch_npu

    return _on_ascend_950() and dtype in _DST_TYPE and hasattr(torch_npu, "npu_anti_mx_quant")


def quantize(x: Tensor, scale_rule: str, rounding: str, seed: int, packed: Tensor, scale: Tensor) -> None:
    """Compute `reference.quantize`. The call waits for the device, to find the blocks to compute again."""
    if not supports(scale_rule, rounding, x.dtype):
        reference.quantize(x, scale_rule, rounding, seed, packed, scale)
        return
    import torch_npu

    # All blocks in one row. The operator returns scales in pairs along K, [1, ceil(B / 2), 2], in the order of blocks.
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
    """Compute `reference.dequantize`. The call waits for the device, to find the blocks to compute again."""
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
    """Compute `reference.fake_quantize` in two steps, because no operator does both."""
    packed = torch.empty(len(x), reference.BLOCK // 2, dtype=torch.uint8, device=x.device)
    scale = torch.empty(len(x), dtype=torch.uint8, device=x.device)
    quantize(x, scale_rule, rounding, seed, packed, scale)
    dequantize(packed, scale, out)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().flatten()


def _on_ascend_950() -> bool:
    import torch_npu

    return has_mx_units(torch_npu.npu.get_device_name())
