"""What doctor says of this machine's NPUs."""

from verl_aqn.errors import EnvironmentFault
from verl_aqn.mxfp4.chips import BYTES_BF16, BYTES_INT8, BYTES_PACKED, chip_name, generation, has_mx_units
from verl_aqn.preflight.findings import Finding


def examine() -> list[Finding]:
    """Return the findings of `doctor` about the NPUs of this machine."""
    try:
        chip = chip_name()
        kind = generation(chip)
    except EnvironmentFault as fault:
        return [Finding("NPU", "no response", str(fault))]
    import torch_npu
    from vllm_ascend import _build_info

    packed, bf16 = f"{BYTES_PACKED:.2f} GB", f"{BYTES_BF16} GB"
    if has_mx_units(chip):
        path = f"packed, as W4A8_MXFP: {packed} for 1e9 weights instead of {bf16} in bf16; activations are rounded too"
        path += " (experts, and aqn.mxfp4.activation=mxfp4: W4A4_MXFP4)"
    else:
        path = f"no MX units: dequantised to bf16 (same values), {bf16} for 1e9 weights instead of {packed}"
        path += f" (aqn.mxfp4.rollout_weight_format=int8: {BYTES_INT8} GB; some values may be rounded)"
    built, wanted = _build_info.__device_type__, {"950": "A5"}.get(kind, kind)
    rebuild = (
        f"the wheel on PyPI is for A2: build vllm-ascend from source with SOC_VERSION={chip.lower()}, or use an image"
    )
    return [
        Finding("NPU", f"{torch_npu.npu.device_count()} × {chip} ({kind})"),
        Finding("MXFP4 in the rollout", path),
        Finding("vllm-ascend is built for", built, "" if built == wanted else rebuild),
    ]
