"""Two tiny models, dense and MoE, each written for Ascend's two schemes and for vLLM."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from tests.helpers.tiny_configs import SMALL_ASCEND
from verl_aqn.checkpoints.packing import quantize_checkpoint

CONFIGS = {
    "llama": LlamaConfig(**SMALL_ASCEND, attention_bias=True, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SMALL_ASCEND, moe_intermediate_size=64, num_experts=2, num_experts_per_tok=1),
}
LAYER = "model.layers.0."
SCHEMES = {"modelslim": "W4A4_MXFP4", "modelslim-w4a8": "W4A8_MXFP"}


class Folders(NamedTuple):
    kind: str
    """The model type."""
    folder: Path
    """The folder for Ascend."""
    packed: Path
    """The folder of compressed-tensors of the same model."""
    scheme: str
    """The scheme of vllm-ascend that `folder` names."""


@pytest.fixture(
    scope="module", params=[(kind, form) for kind in CONFIGS for form in SCHEMES], ids="-".join, name="folders"
)
def modelslim_folders(request, tmp_path_factory) -> Folders:
    kind, form = request.param
    root = tmp_path_factory.mktemp(kind)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], dtype=torch.bfloat16)
    model.save_pretrained(root / "source")
    quantize_checkpoint(root / "source", root / "modelslim", format=form)
    quantize_checkpoint(root / "source", root / "packed")
    return Folders(kind, root / "modelslim", root / "packed", SCHEMES[form])
