"""Which Ascend chip this is: only the Ascend 950 (vllm-ascend calls it A5) computes with MXFP4. Imports no torch."""

from verl_aqn.errors import EnvironmentFault, first_line

BYTES_PACKED, BYTES_BF16 = 17 / 32, 2  # of one weight: 4 bits and its part of a scale byte for 32

# What vllm-ascend 0.23.0 (setup.py) and verl 0.9.1 (utils/device.py) map to A2, A3 and A5, by the names' beginnings.
_GENERATIONS = {
    "ascend950": "950",
    "ascend910_95": "950",  # its name before the release
    "ascend910_93": "A3",
    "ascend910b": "A2",
    "ascenda2g": "A2",
}


def generation(name: str) -> str:
    """`A2`, `A3` or `950` of a device that calls itself `name`, as in "Ascend910_9392".

    Raises:
        EnvironmentFault: neither vllm-ascend nor verl knows such a chip.
    """
    for beginning, found in _GENERATIONS.items():
        if name.lower().startswith(beginning):
            return found
    raise EnvironmentFault(f"unknown Ascend chip {name!r}: this project knows 910B (A2), 910_93 (A3) and 950")


def has_mx_units(name: str) -> bool:
    """Whether a chip multiplies MXFP4; on the others a packed base is served as its exact bf16 equal."""
    return generation(name) == "950"


def chip_name() -> str:
    """What the first NPU of this machine calls itself.

    Raises:
        EnvironmentFault: torch_npu is missing, or no device answers.
    """
    try:
        import torch_npu

        return torch_npu.npu.get_device_name()
    except (ImportError, AssertionError, RuntimeError) as error:
        raise EnvironmentFault(
            f"no Ascend device answers ({first_line(error)}): "
            "set aqn.mxfp4.rollout_weight_format to packed (Ascend 950) or bf16 (A2, A3)"
        ) from error
