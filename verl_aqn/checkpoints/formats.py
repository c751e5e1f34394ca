"""The two ways in which a packed checkpoint can be written: what tensors are called and what tells a loader."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from verl_aqn.checkpoints.loading import PACKED, PACKED_FORMAT, SCALE
from verl_aqn.checkpoints.modelslim import DESCRIPTION, describe
from verl_aqn.checkpoints.storage import Spec
from verl_aqn.mxfp4.codec import BLOCK

# How a module's codes and scales are named.
FORMATS = {"compressed-tensors": (PACKED, SCALE), "modelslim": (".weight", ".weight_scale")}


def packed_specs(module: str, shape: tuple[int, ...], format: str) -> dict[str, Spec]:
    """The tensors of a packed module of ``shape`` [..., N, K]."""
    *lead, k = shape
    packed, scale = FORMATS[format]
    return {
        module + packed: Spec(torch.uint8, (*lead, k // 2)),
        module + scale: Spec(torch.uint8, (*lead, k // BLOCK)),
    }


def finish(
    format: str, config: dict[str, Any], layout: dict[str, Spec], modules: set[str], ignored: Iterable[str], src: Path
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(config.json of the packed folder, further JSON files by name), from that of the source ``src``.

    Raises ModelError where ``format`` cannot hold one of ``modules``.
    """
    config = {key: value for key, value in config.items() if key not in ("torch_dtype", "quantization_config")}
    config["dtype"] = "bfloat16"
    if format == "modelslim":
        return config, {DESCRIPTION: describe(layout, modules, src)}
    return config | {"quantization_config": quantization_config(ignored)}, {}


def quantization_config(ignore: Iterable[str]) -> dict[str, Any]:
    """The ``quantization_config`` by which vLLM and compressed-tensors know weight-only MXFP4."""
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
