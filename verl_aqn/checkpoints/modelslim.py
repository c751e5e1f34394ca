"""MXFP4 checkpoints as Ascend's ModelSlim names them, for vllm-ascend. Written from its source, not run on an NPU.

Read in the wheel of vllm-ascend 0.23.0 (contract test: tests/contract/test_modelslim.py):

* ``vllm_ascend/quantization/modelslim_config.py``: the folder is recognised by ``quant_model_description.json``, and
  ``config.json`` must have no ``quantization_config`` of another method. The file maps ``MODULE.weight`` to a scheme,
  or to ``FLOAT`` for a module left alone; a linear layer without an entry is an error. The modules that vLLM fuses
  (q, k, v; gate, up) must share one. MoE layers are looked up under ``experts.0.gate_proj`` and the like, for the
  architectures that its table ``packed_modules_model_mapping`` lists (qwen3_moe among them, not mixtral).
* ``vllm_ascend/quantization/methods/w4a4_mxfp4.py``: scheme ``W4A4_MXFP4`` takes ``weight`` uint8 [N, K/2] and
  ``weight_scale`` uint8 [N, K/group_size], with ``group_size`` from the description, 32 where it says none. After
  loading it views the scales as [N, K/64, 2], so K must be a multiple of 64. It quantises activations too.
* ``model_quant_type`` and ``version`` are ModelSlim's own; vllm-ascend reads ``version`` for W4A8 only.

Nibble order and scale bytes are those of compressed-tensors (low nibble is the even index, E8M0).
"""

from pathlib import Path
from typing import Any

from verl_aqn.checkpoints.storage import Spec
from verl_aqn.errors import ModelError
from verl_aqn.mxfp4.codec import BLOCK

DESCRIPTION = "quant_model_description.json"
SCHEME = "W4A4_MXFP4"


def describe(layout: dict[str, Spec], modules: set[str], src: Path) -> dict[str, Any]:
    """The description of a folder with the tensors of ``layout``, in which ``modules`` are MXFP4.

    Raises:
        ModelError: a module of ``src`` takes a number of inputs that vllm-ascend cannot load.
    """
    for module in sorted(modules):
        k = 2 * layout[module + ".weight"].shape[-1]
        if k % (2 * BLOCK):
            raise ModelError(
                f"{module} of {src} takes {k} inputs, not a multiple of {2 * BLOCK} as vllm-ascend needs: exclude it"
            )
    coded = {module + suffix for module in modules for suffix in (".weight", ".weight_scale")}
    return {
        "model_quant_type": SCHEME,
        "version": "1.0.0",
        "group_size": BLOCK,
        **{name: SCHEME if name in coded else "FLOAT" for name in layout},
    }
