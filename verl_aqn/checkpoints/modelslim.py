"""MXFP4 checkpoints in the format of Ascend's ModelSlim, for vllm-ascend. Not yet tested on an NPU.

The format is taken from the wheel of vllm-ascend 0.23.0 (contract test: tests/contract/test_modelslim.py):

* ``vllm_ascend/quantization/modelslim_config.py``: the loader recognises the folder by
  ``quant_model_description.json``. ``config.json`` must not have a ``quantization_config`` of another method. The
  description maps ``MODULE.weight`` to a scheme, or to ``FLOAT`` for a module that is not quantised; a linear layer
  without an entry is an error. Modules that vLLM fuses (q, k, v; gate, up) must have the same scheme. MoE layers are
  looked up under names such as ``experts.0.gate_proj``, for the architectures in the table
  ``packed_modules_model_mapping`` (with qwen3_moe, without mixtral).
* ``vllm_ascend/quantization/methods/w4a4_mxfp4.py``: scheme ``W4A4_MXFP4`` loads ``weight`` uint8 [N, K/2] and
  ``weight_scale`` uint8 [N, K/group_size]. ``group_size`` is read from the description; the default is 32. After
  loading, the scales are viewed as [N, K/64, 2], so K must be a multiple of 64. Activations are quantised too.
* ``vllm_ascend/quantization/methods/w4a8_mxfp4.py``: scheme ``W4A8_MXFP`` loads the same tensors, views the scales in
  the same way, and quantises activations to E4M3 with one E8M0 scale for 32 values. It casts weights to the layout NZ.
* ``vllm_ascend/quantization/methods/w8a16.py``: scheme ``W8A16`` loads ``weight`` int8 [N, K], ``weight_scale`` and
  ``weight_offset`` [N, 1] in the model's dtype. It does not initialise the offset, so the folder must have it. After
  loading, the weight is [K, N]. It is for linear layers only, and hands their bias on in the model's dtype.
* ``model_quant_type`` and ``version`` are fields of ModelSlim; vllm-ascend reads ``version`` only for ``W4A8_DYNAMIC``.

Nibble order and scale bytes are those of compressed-tensors (even index in the low nibble, E8M0).
"""

from pathlib import Path
from typing import Any

from verl_aqn.checkpoints.storage import Spec
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK

DESCRIPTION = "quant_model_description.json"
# The schemes of vllm-ascend with MXFP4 weights, by the format of activations (`aqn.mxfp4.activation`).
SCHEMES = {"mxfp4": "W4A4_MXFP4", "mxfp8": "W4A8_MXFP"}
INT8_SCHEME = "W8A16"
# Suffixes of the names of int8 weights, their scales and their offsets.
INT8_SUFFIXES = (".weight", ".weight_scale", ".weight_offset")


def describe(layout: dict[str, Spec], modules: set[str], src: Path, scheme: str) -> dict[str, Any]:
    """Return the description of a folder with the tensors of ``layout``, of which ``modules`` are MXFP4.

    ``scheme`` is one of `SCHEMES`.

    Raises:
        ModelError: a module of ``src`` has a number of inputs that vllm-ascend cannot load.
    """
    for module in sorted(modules):
        k = 2 * layout[module + ".weight"].shape[-1]
        if k % (2 * BLOCK):
            raise ModelError(
                f"{module} of {src} has {k} inputs, but vllm-ascend needs a multiple of {2 * BLOCK}: exclude it"
            )
    coded = {module + suffix for module in modules for suffix in (".weight", ".weight_scale")}
    return {
        "model_quant_type": scheme,
        "version": "1.0.0",
        "group_size": BLOCK,
        **{name: scheme if name in coded else "FLOAT" for name in layout},
    }


def describe_int8(layout: dict[str, Spec], modules: set[str]) -> dict[str, Any]:
    """Return the description of a folder with the tensors of ``layout``, of which ``modules`` are int8."""
    coded = {module + suffix for module in modules for suffix in INT8_SUFFIXES}
    return {
        "model_quant_type": INT8_SCHEME,
        "version": "1.0.0",
        **{name: INT8_SCHEME if name in coded else "FLOAT" for name in layout},
    }
