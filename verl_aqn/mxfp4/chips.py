"""Identification of the Ascend chip; only the Ascend 950 (A5 in vllm-ascend) computes with MXFP4. Imports no torch."""

from verl_aqn.errors import EnvironmentFault, first_line

# Per weight. Packed: 4 bits, and 1/32 of a scale byte. Int8 also has a scale and an offset of 4 bytes for each row.
BYTES_PACKED, BYTES_INT8, BYTES_BF16 = 17 / 32, 1, 2

# Prefixes of chip names that vllm-ascend 0.23.0 (setup.py) and verl 0.9.1 (utils/device.py) map to A2, A3 and A5.
_GENERATIONS = {
    "ascend950": "950",
    "ascend910_95": "950",  # the name of the 950 before its release
    "ascend910_93": "A3",
    "ascend910b": "A2",
    "ascenda2g": "A2",
}


def generation(name: str) -> str:
    """Return the generation (`A2`, `A3` or `950`) of a device with the given name, for example "Ascend910_9392".

    Raises:
        EnvironmentFault: neither vllm-ascend nor verl knows the chip.
    """
    for beginning, found in _GENERATIONS.items():
        if name.lower().startswith(beginning):
            return found
    raise EnvironmentFault(f"unknown Ascend chip {name!r}: this project knows 910B (A2), 910_93 (A3) and 950")


def has_mx_units(name: str) -> bool:
    """Return whether a chip multiplies MXFP4. On other chips a packed base is served dequantised, in bf16."""
    return generation(name) == "950"


def chip_name() -> str:
    """Return the device name of the first NPU of this machine.

    Raises:
        EnvironmentFault: torch_npu is missing, or no device responds.
    """
    try:
        import torch_npu

        return torch_npu.npu.get_device_name()
    except (ImportError, AssertionError, RuntimeError) as error:
        raise EnvironmentFault(
            f"no Ascend device responds ({first_line(error)}): "
            "set aqn.mxfp4.rollout_weight_format to packed (Ascend 950) or bf16 (A2, A3; int8 halves its memory there)"
        ) from error
