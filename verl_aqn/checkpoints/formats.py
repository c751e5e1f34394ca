"""The formats of packed checkpoints: their tensor names and the files that describe them to a loader."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from verl_aqn.checkpoints.loading import PACKED, PACKED_FORMAT, SCALE
from verl_aqn.checkpoints.modelslim import DESCRIPTION, SCHEMES, describe
from verl_aqn.checkpoints.storage import Spec
from verl_aqn.mxfp4.codec import BLOCK

# The formats of ModelSlim by the format that vllm-ascend rounds activations to. They differ in the description alone.
MODELSLIM_FORMATS = {"mxfp4": "modelslim", "mxfp8": "modelslim-w4a8"}
# Suffixes of the names of codes and scales, by format.
FORMATS = {"compressed-tensors": (PACKED, SCALE)} | dict.fromkeys(
    MODELSLIM_FORMATS.values(), (".weight", ".weight_scale")
)


def packed_specs(module: str, shape: tuple[int, ...], format: str) -> dict[str, Spec]:
    """Return the specs of the tensors of a packed module of ``shape`` [..., N, K]."""
    *lead, k = shape
    packed, scale = FORMATS[format]
    return {
        module + packed: Spec(torch.uint8, (*lead, k // 2)),
        module + scale: Spec(torch.uint8, (*lead, k // BLOCK)),
    }


def finish(
    format: str, config: dict[str, Any], layout: dict[str, Spec], modules: set[str], ignored: Iterable[str], src: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return (config.json of the packed folder, further JSON files by name) for the config.json of source ``src``.

    Raises:
        ModelError: ``format`` cannot hold one of ``modules``.
    """
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = "bfloat16"
    for activation, name in MODELSLIM_FORMATS.items():
        if format == name:
            return config, {DESCRIPTION: describe(layout, modules, src, SCHEMES[activation])}
    return config | {"quantization_config": quantization_config(ignored)}, {}


def quantization_config(ignore: Iterable[str]) -> dict[str, Any]:
    """Return the ``quantization_config`` that describes weight-only MXFP4 to vLLM and compressed-tensors."""
    weights = {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": BLOCK,
        "symmetric": True,
        "dynamic": False,
        "scale_dtype": "torch.uint8",
        "zp_dtype": "torch.uint8",
    }
    return {
        "quant_method": "compressed-tensors",
        "format": PACKED_FORMAT,
        "quantization_status": "compressed",
        "ignore": sorted(ignore),
        "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": None, "weights": weights}},
    }
